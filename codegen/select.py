"""Select: walk a program region by region on real values and give each the kernel that its trial chose."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from ..passes.program import Program
from ..passes.verify import difference
from ..targets.target import Target
from .base import Backend, Kernel, Region, Schedule, in_memory
from .eager import EagerBackend
from .layouts import size_hint
from .plans.layout import order_in_memory
from .source import releases
from .store import kept
from .trial import Trial, run_kernel
from .tuner import Tuner


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
    tuner: Tuner,
    progress: Callable[[str], None] | None = None,
) -> list[Choice]:
    """Run the program region by region on real values and choose a kernel for each.

    Regions are visited in order with the values that the kernels chosen so far produce, so that layouts which a
    backend changes (channels last, for instance) are what the next candidates are compiled for and timed on.

    Args:
        regions: from `partition`, in order.
        backends: candidates besides the eager one.
        inputs: flat example inputs of the program.
        tuner: decides between candidates.
        progress: told in a short sentence what was chosen.
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
            key = region.key(program)
            choice = _repeat(known[key], region, backends, target) if key in known else None
            if choice is None:
                trial = tuner.choose(program, region, backends, target, values)
                choice = known[key] = _made(trial, region, backends, target, values)
                if progress and choice.kernel.backend != "eager":
                    progress(f"region {number + 1} of {len(regions)}: {choice.kernel.name} by {choice.kernel.backend}")
            choice, results = _run(choice, region, target, values)
            choices.append(choice)
            moved = (n.meta["val"] for n in region.inputs if "traced" in n.meta)
            if choice.kernel.backend == "eager" and any(map(_open, moved)):
                follow(program, region)
            for node, value in zip(region.outputs, results, strict=True):
                env[node] = value
                _note_layouts_of(node, value)
            note_orders(region, choice.kernel, symbolic=True)
            for node in done:
                env.pop(node, None)
    return choices


def _run(choice: Choice, region: Region, target: Target, values: Sequence[Any]) -> tuple[Choice, list[Any]]:
    """The choice with its results; eager instead if the kernel does not take these values."""
    try:
        return choice, run_kernel(choice.kernel, values)
    except Exception as error:  # whatever a kernel raises costs this kernel only
        if choice.kernel.backend == "eager":
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        kernel = EagerBackend().lower(region, target, Schedule())
        refused = choice.refused | {f"{choice.kernel.backend} {choice.kernel.schedule}": reason}
        return Choice(region, kernel, choice.rivals, refused), run_kernel(kernel, values)


def _made(trial: Trial, region: Region, backends: Sequence[Backend], target: Target, values: Sequence[Any]) -> Choice:
    """The winner of a trial as a kernel of this process; eager if that fails or if an untimed kernel is wrong."""
    kernel, refused = trial.kernel, dict(trial.refused)
    if kernel is None:
        try:
            backend = _named(trial.backend, backends)
            kernel = _stored(backend, region, target, trial) or backend.lower(region, target, trial.schedule)
            if trial.seconds is None and kernel.backend != "eager":
                referee = EagerBackend().lower(region, target, Schedule())
                size, place = difference(run_kernel(kernel, values), run_kernel(referee, values))
                if size > 1:
                    raise RuntimeError(f"wrong answer: {place} deviates {size:.3g} times more than rounding explains")
        except Exception as error:  # whatever a backend raises costs this candidate only
            refused[f"{trial.backend} {trial.schedule}"] = (str(error).splitlines() or [type(error).__name__])[0]
            kernel = EagerBackend().lower(region, target, Schedule())
            return Choice(region, kernel, trial.rivals, refused)
    kernel.seconds = trial.seconds
    return Choice(region, kernel, trial.rivals, refused)


def _stored(backend: Backend, region: Region, target: Target, trial: Trial) -> Kernel | None:
    """The winner from the store of compiled kernels, if its backend can take code from there."""
    found = kept(trial.library) if trial.library is not None else None
    adopt = getattr(backend, "adopt", None)
    if found is None or adopt is None:
        return None
    try:
        adopt(region, trial.schedule, target, *found)
        return backend.lower(region, target, trial.schedule)
    except Exception:  # another system's library, or a folder that may not hold code: compile instead
        return None


def _named(name: str, backends: Sequence[Backend]) -> Backend:
    return next(b for b in [EagerBackend(), *backends] if b.name == name)


def _repeat(before: Choice, region: Region, backends: Sequence[Backend], target: Target) -> Choice | None:
    """The choice for a region that equals one already decided: same code, its own weights."""
    kernel = before.kernel
    if kernel.destinations is None or kernel.constants:  # weights or names of nodes are part of the kernel
        backend = _named(kernel.backend, backends)
        if backend.supports(region, target) is not None:  # what was a weight there is computed or carried here
            return None
        kernel = backend.lower(region, target, kernel.schedule)
        kernel.seconds = before.kernel.seconds
    return Choice(region, kernel, before.rivals, before.refused)


def follow(program: Program, region: Region) -> None:
    """Correct the layouts of what torch computes to those that follow from the layouts that kernels before it leave."""
    for node in region.nodes:
        before = node.meta.get("val")
        if isinstance(before, torch.Tensor) and any("traced" in n.meta for n in node.all_input_nodes):
            if node.target in (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default):
                node.target = torch.ops.aten.reshape.default  # which is what a view is called as
            program.infer(node)
            if node.meta["val"].stride() != before.stride():
                node.meta.setdefault("traced", before)


def _open(fake: torch.Tensor) -> bool:
    """Whether a size or stride is known at run time only."""
    return any(isinstance(s, torch.SymInt) for s in (*fake.shape, *fake.stride()))


def _as_it_lies(fake: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """The fake with the layout of its value: itself if it has that, or if nothing can be said.

    Of open sizes that is told from an order without gaps, and where the sizes are those of the trace.
    """
    if not _open(fake):
        if fake.stride() == value.stride():
            return fake
        with fake.fake_mode:  # type: ignore[attr-defined]
            return torch.empty_strided(fake.shape, value.stride(), dtype=fake.dtype, device=fake.device)
    sizes, steps = (tuple(size_hint(s) for s in each) for each in (fake.shape, fake.stride()))
    same = all(a == b for n, a, b in zip(sizes, steps, value.stride(), strict=True) if n != 1)
    order = None if same or sizes != tuple(value.shape) else order_in_memory(value)
    return fake if order is None else in_memory(fake, order)


def _note_layouts(region: Region, values: Sequence[Any]) -> None:
    for node, value in zip(region.inputs, values, strict=True):
        _note_layouts_of(node, value)


def note_orders(region: Region, kernel: Kernel, symbolic: bool = False) -> None:
    """Correct the layouts that the graph claims to what a kernel says about the memory of its results.

    Args:
        symbolic: leave results of known sizes alone, whose values show how they lie.
    """
    for node, destination in zip(region.outputs, kernel.destinations or (), strict=False):
        fake = node.meta["val"]
        known = not _open(fake)
        if (symbolic and known) or (destination.order is None and not known):
            continue
        own = in_memory(fake, destination.order or tuple(range(fake.dim())))
        if not known or own.stride() != fake.stride():
            node.meta.setdefault("traced", fake)  # what the caller of the program may rely on
            node.meta["val"] = own


def _note_layouts_of(node: fx.Node, value: Any) -> None:
    """Correct the layout that the graph claims to the one that the value really has."""
    fake = node.meta.get("val")
    if not isinstance(fake, torch.Tensor) or not isinstance(value, torch.Tensor) or value.layout is not torch.strided:
        return
    own = _as_it_lies(fake, value)
    if own is not fake:
        node.meta.setdefault("traced", fake)  # what the caller of the program may rely on
        node.meta["val"] = own
