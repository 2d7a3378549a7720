"""Select: lower every region with every backend that supports it, check against eager, time, keep the fastest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from ..passes.program import Program
from ..passes.verify import difference
from ..targets.measure import compare_many, time_calls
from ..targets.target import Target
from .base import Backend, Kernel, Region, Schedule
from .eager import EagerBackend
from .source import releases

GAIN = 0.97  # a rival must need less than this share of eager's time: a tie goes to the referee


@dataclass
class Choice:
    """What runs a region.

    Attributes:
        region: the nodes.
        kernel: the fastest kernel that gave eager's answers.
        rivals: seconds of every candidate that was timed, by backend and schedule.
        refused: why other backends could not take the region or lost it, by backend.
    """

    region: Region
    kernel: Kernel
    rivals: dict[str, float] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)


def select(
    program: Program,
    regions: Sequence[Region],
    backends: Sequence[Backend],
    target: Target,
    inputs: Sequence[Any],
    *,
    budget: float = 0.1,
    progress: Callable[[str], None] | None = None,
) -> list[Choice]:
    """Run the program region by region on real values and choose a kernel for each.

    Regions are visited in order with the values that the kernels chosen so far produce, so that layouts which a
    backend changes (channels last, for instance) are what the next candidates are compiled for and timed on.

    Args:
        regions: from `partition`, in order.
        backends: candidates besides the eager one.
        inputs: flat example inputs of the program.
        budget: seconds of timing per distinct region.
        progress: told in a short sentence what is being timed.
    """
    env: dict[fx.Node, Any] = dict(zip(program.inputs, inputs, strict=True))
    env |= {n: program.weights[str(n.target)] for n in program.graph.nodes if n.op == "get_attr"}
    outputs = [n for n in program.outputs if isinstance(n, fx.Node)]
    dead = releases([(list(r.inputs), list(r.outputs)) for r in regions], [*outputs, *program.inputs])
    known: dict[str, Choice] = {}
    choices = []
    with torch.no_grad():
        for number, (region, done) in enumerate(zip(regions, dead, strict=True)):
            values = [env[n] for n in region.inputs]
            _note_layouts(region, values)
            decided = len(known)
            choice = _choose(region, backends, target, values, known, budget)
            if progress and len(known) > decided and len(choice.rivals) > 1:
                progress(f"region {number + 1} of {len(regions)}: {choice.kernel.name} by {choice.kernel.backend}")
            choices.append(choice)
            results = run_kernel(choice.kernel, values)
            for node, value in zip(region.outputs, results, strict=True):
                env[node] = value
                _note_layouts_of(node, value)
            for node in done:
                env.pop(node, None)
    return choices


def _choose(region: Region, backends: Sequence[Backend], target: Target, values: list[Any],
            known: dict[str, Choice], budget: float) -> Choice:  # fmt: skip
    key = region.digest()
    if key in known and (again := _repeat(known[key], region, backends, target)) is not None:
        return again
    kernels, refused = _candidates(region, backends, target, values)
    calls = {name: _bound(kernel, values) for name, kernel in kernels.items()}
    rivals: dict[str, float] = {}
    if len(calls) == 1:
        kernels["eager"].seconds = time_calls(calls["eager"], budget=0.01, warmup=1, min_rounds=3).median
        best = "eager"
    else:
        rivals = {name: timing.median for name, timing in compare_many(calls, budget=budget).items()}
        best = min(rivals, key=rivals.__getitem__)
        if best != "eager" and rivals[best] > GAIN * rivals["eager"]:
            refused[best] = "not measurably faster than eager"
            best = "eager"
        kernels[best].seconds = rivals[best]
    known[key] = Choice(region, kernels[best], rivals, refused)
    return known[key]


def _candidates(region: Region, backends: Sequence[Backend], target: Target,
                values: list[Any]) -> tuple[dict[str, Kernel], dict[str, str]]:  # fmt: skip
    """Kernels that give eager's answers on these values, by backend and schedule, and why there are not more."""
    referee = EagerBackend().lower(region, target, Schedule())
    kernels, refused = {"eager": referee}, dict[str, str]()
    wanted: list[Any] | None = None
    for backend in backends:
        if reason := backend.supports(region, target):
            refused[backend.name] = reason
            continue
        for schedule in backend.space(region, target):
            wanted = run_kernel(referee, values) if wanted is None else wanted
            label = f"{backend.name} {schedule}"
            try:
                kernel = backend.lower(region, target, schedule)
                size, place = difference(run_kernel(kernel, values), wanted)
            except Exception as error:  # whatever a backend raises costs this candidate only
                refused[label] = (str(error).splitlines() or [type(error).__name__])[0]
                continue
            if size > 1:
                refused[label] = f"wrong answer: {place} deviates {size:.3g} times more than rounding explains"
            else:
                kernels[label] = kernel
    return kernels, refused


def _repeat(before: Choice, region: Region, backends: Sequence[Backend], target: Target) -> Choice | None:
    """The choice for a region that equals one already decided: same code, its own weights."""
    kernel = before.kernel
    if kernel.destinations is None:  # weights and names of nodes are part of the kernel
        rivals: list[Backend] = [EagerBackend(), *backends]
        backend = next(b for b in rivals if b.name == kernel.backend)
        if backend.supports(region, target) is not None:  # what was a weight there is computed or carried here
            return None
        kernel = backend.lower(region, target, kernel.schedule)
        kernel.seconds = before.kernel.seconds
    return Choice(region, kernel, before.rivals, before.refused)


def run_kernel(kernel: Kernel, values: Sequence[Any]) -> list[Any]:
    """Call a kernel, allocating its destinations if it has any. Returns the list of its outputs."""
    if kernel.destinations is not None:
        buffers = allocate(kernel, values)
        kernel.call(*values, *kernel.constants, *buffers)
        return buffers
    result = kernel.call(*values, *kernel.constants)
    return list(result) if isinstance(result, tuple) and kernel.outputs > 1 else [result]


def allocate(kernel: Kernel, values: Sequence[Any]) -> list[torch.Tensor]:
    """Fresh output buffers for a kernel with destinations, sized by its inputs."""
    assert kernel.destinations is not None
    return [
        torch.empty([e if isinstance(e, int) else values[e[0]].shape[e[1]] for e in d.shape], dtype=d.dtype)
        for d in kernel.destinations
    ]


def _bound(kernel: Kernel, values: Sequence[Any]) -> Callable[[], Any]:
    return lambda: run_kernel(kernel, values)


def _note_layouts(region: Region, values: Sequence[Any]) -> None:
    for node, value in zip(region.inputs, values, strict=True):
        _note_layouts_of(node, value)


def _note_layouts_of(node: fx.Node, value: Any) -> None:
    """Correct the layout that the graph claims to the one that the value really has."""
    fake = node.meta.get("val")
    if not isinstance(fake, torch.Tensor) or not isinstance(value, torch.Tensor) or value.layout is not torch.strided:
        return
    if any(isinstance(s, torch.SymInt) for s in (*fake.shape, *fake.stride())) or fake.stride() == value.stride():
        return
    node.meta.setdefault("traced", fake)  # what the caller of the program may rely on
    with fake.fake_mode:  # type: ignore[attr-defined]
        node.meta["val"] = torch.empty_strided(fake.shape, value.stride(), dtype=fake.dtype, device=fake.device)
