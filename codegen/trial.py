"""A trial: all candidates for one region, checked against eager and timed interleaved on real values."""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..passes.placement import device_of
from ..passes.verify import difference
from ..targets.measure import race, time_calls
from ..targets.measure_gpu import compare_kernels
from ..targets.target import Target
from .base import Backend, Destination, Kernel, Region, Schedule
from .eager import EagerBackend
from .graph_json import decode_value, encode_value
from .pages import on_large_pages

Json = Any
GAIN = 0.97  # a rival must need less than this share of eager's time: a tie goes to the referee
ENOUGH = 10.0  # seconds that checking candidates may take, beyond the first of each backend
TIMING = "timing"  # what is told when no candidate is to blame
REFEREE = "eager"  # the label of what all others must agree with


@dataclass
class Trial:
    """What a trial found.

    Attributes:
        backend: text name of the fastest backend that gave eager's answers.
        schedule: its schedule.
        seconds: of one call of it, None if nothing was timed.
        rivals: seconds of every candidate that was timed, by backend and schedule.
        refused: why other candidates could not take the region or lost it.
        kernel: the winner, if it was made in this process.
        library: name of its compiled code in the store of kernels, None if it is not there.
    """

    backend: str = REFEREE
    schedule: Schedule = field(default_factory=Schedule)
    seconds: float | None = None
    rivals: dict[str, float] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    kernel: Kernel | None = None
    library: str | None = None


def hold(
    region: Region,
    backends: Sequence[Backend],
    target: Target,
    values: Sequence[Any],
    budget: float,
    *,
    skip: Collection[str] = (),
    only: Collection[str] = (),
    lasting: tuple[type[Exception], ...] = (),
    tell: Callable[[str], None] = lambda label: None,
) -> Trial:
    """Make, check and time every candidate; the fastest wins, a tie goes to eager.

    Args:
        values: of the region's inputs.
        budget: seconds of timing.
        skip: labels of candidates that are known to fail.
        only: labels of candidates to try; all, if this is empty or if none of them works here.
        lasting: errors of a candidate that say nothing about it, and are raised; all others cost it alone.
        tell: called with the label of each candidate before it is made, and with TIMING before each round of timing.
    """
    kernels, refused = _candidates(region, backends, target, values, skip, only, lasting, tell)
    calls = {name: _bound(kernel, values) for name, kernel in kernels.items()}
    tell(TIMING)
    if len(calls) == 1:
        seconds = _timed(calls, values, 0.01, tell)[REFEREE]
        return Trial(seconds=seconds, refused=refused, kernel=kernels[REFEREE])
    rivals = _timed(calls, values, budget, tell)
    best = min(rivals, key=rivals.__getitem__)
    if best != REFEREE and rivals[best] > GAIN * rivals[REFEREE]:
        refused[best] = "not measurably faster than eager"
        best = REFEREE
    kernel = kernels[best]
    return Trial(kernel.backend, kernel.schedule, rivals[best], rivals, refused, kernel)


def _timed(
    calls: Mapping[str, Callable[[], Any]], values: Sequence[Any], budget: float, tell: Callable[[str], None]
) -> dict[str, float]:
    """Median seconds of each candidate."""
    device = device_of(values)
    if device.type == "cuda":
        seen = compare_kernels(calls, device, budget)
    elif len(calls) == 1:
        seen = {name: time_calls(call, budget=budget, warmup=1, min_rounds=3) for name, call in calls.items()}
    else:
        seen = race(calls, budget, tell=lambda: tell(TIMING))
    return {name: timing.median for name, timing in seen.items()}


def encode_trial(trial: Trial) -> Json:
    """A trial as plain JSON, without its kernel."""
    return {"backend": trial.backend, "schedule": [trial.schedule.name, encode_value(trial.schedule.params)],
            "seconds": trial.seconds, "rivals": trial.rivals, "refused": trial.refused,
            "library": trial.library}  # fmt: skip


def decode_trial(stored: Json) -> Trial:
    """The inverse of `encode_trial`. Raises KeyError, ValueError or TypeError for foreign content."""
    name, params = stored["schedule"]
    return Trial(stored["backend"], Schedule(name, decode_value(params)), stored["seconds"], stored["rivals"],
                 stored["refused"], library=stored["library"])  # fmt: skip


def guess(region: Region, backends: Sequence[Backend], target: Target) -> tuple[Backend, Schedule]:
    """The likeliest candidate, by the order in which backends offer schedules. Nothing is run."""
    for backend in backends:
        if backend.supports(region, target) is None:
            first = next(iter(backend.space(region, target)), None)
            if first is not None:
                return backend, first
    return EagerBackend(), Schedule()


def _candidates(
    region: Region, backends: Sequence[Backend], target: Target, values: Sequence[Any], skip: Collection[str],
    only: Collection[str], lasting: tuple[type[Exception], ...], tell: Callable[[str], None],
) -> tuple[dict[str, Kernel], dict[str, str]]:  # fmt: skip
    """Kernels that give eager's answers on these values, by backend and schedule, and why there are not more.

    When checking them has taken ENOUGH seconds, one of each backend will do: timing takes longer still.
    """
    referee = EagerBackend().lower(region, target, Schedule())
    kernels, refused, spaces = {REFEREE: referee}, dict[str, str](), list[list[tuple[Backend, Schedule]]]()
    for backend in backends:
        if reason := backend.supports(region, target):
            refused[backend.name] = reason
            continue
        spaces.append([(backend, schedule) for schedule in backend.space(region, target)])
    turns = itertools.chain(*itertools.zip_longest(*spaces))  # each backend's likeliest before anyone's second
    offered = {f"{backend.name} {schedule}": (backend, schedule) for backend, schedule in filter(None, turns)}
    start, tried = time.perf_counter(), set[str]()
    wanted = run_kernel(referee, values) if offered else []
    spent = time.perf_counter() - start
    allowed = [label for label in offered if label not in skip]
    for labels in ([label for label in allowed if label in only], [label for label in allowed if label not in only]):
        if len(kernels) > 1:
            break
        prepare(backends, region, target, [offered[label] for label in labels])
        for label in labels:
            backend, schedule = offered[label]
            if spent > ENOUGH and len(kernels) > 1 and backend.name in tried:
                refused[label] = "not tried: the region is too slow for so many candidates"
                continue
            tell(label)
            tried.add(backend.name)
            try:
                kernel = backend.lower(region, target, schedule)
                start = time.perf_counter()
                size, place = difference(run_kernel(kernel, values), wanted)
                spent += time.perf_counter() - start
            except Exception as error:  # whatever a backend raises costs this candidate only
                if isinstance(error, lasting):
                    raise
                if torch.cuda.is_initialized():
                    torch.cuda.synchronize()  # raises where it broke the device for all that come after it
                refused[label] = (str(error).splitlines() or [type(error).__name__])[0]
                continue
            if size > 1:
                refused[label] = f"wrong answer: {place} deviates {size:.3g} times more than rounding explains"
            else:
                kernels[label] = kernel
    return kernels, refused


def prepare(backends: Iterable[Backend], region: Region, target: Target,
            candidates: Sequence[tuple[Backend, Schedule]]) -> None:  # fmt: skip
    """Let backends that can compile several candidates at once begin with all of these."""
    for backend in backends:
        begin, schedules = getattr(backend, "prepare", None), [s for b, s in candidates if b is backend]
        if begin is not None and schedules:
            begin(region, target, schedules)


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
    buffers, device = [], device_of(values)
    for d in kernel.destinations:
        buffer = on_large_pages(torch.empty(_sizes(d, len(values))(values), dtype=d.dtype, device=device))
        buffers.append(buffer if d.order is None else buffer.permute(d.seen()))
    return buffers


@functools.cache
def _sizes(destination: Destination, inputs: int) -> Callable[[Sequence[Any]], tuple[int, ...]]:
    """The stored sizes as a function of the inputs."""
    text = destination.text([f"values[{k}]" for k in range(inputs)])
    return eval(f"lambda values: {text}")  # type: ignore[no-any-return]


def _bound(kernel: Kernel, values: Sequence[Any]) -> Callable[[], Any]:
    return lambda: run_kernel(kernel, values)
