"""Our kernels for a function of tensors: captured, partitioned, each region with the fastest schedule that is right."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import gpu_tree  # noqa: F401
import torch
from gpu_clock import time_kernels

from torchlathe import targets
from torchlathe.codegen.base import Kernel, Region, Schedule
from torchlathe.codegen.eager import EagerBackend
from torchlathe.codegen.partition import partition
from torchlathe.codegen.triton.backend import TritonBackend
from torchlathe.codegen.triton.compile import compile_launch, interpreted
from torchlathe.passes.capture import capture
from torchlathe.passes.verify import difference
from torchlathe.targets.target import Target

Tensors = tuple[torch.Tensor, ...]
CHUNK = 2**26  # elements that are compared at once


class Net(torch.nn.Module):
    """A function of tensors, with constants as buffers."""

    def __init__(self, function: Callable[..., Any], **constants: torch.Tensor) -> None:
        super().__init__()
        self.function = function
        for name, value in constants.items():
            self.register_buffer(name, value)

    def forward(self, *args: torch.Tensor) -> Any:
        """Apply the function."""
        return self.function(self, *args)


def here(device: str) -> Target:
    """The GPU of this host; in a dry run a documented one, whose kernels are then interpreted."""
    if device == "cpu" and not interpreted():
        raise RuntimeError("kernels run on the CPU with TRITON_INTERPRET=1 only")
    return targets.get("cuda" if device == "cuda" else "nvidia-sm90")


@functools.cache
def compilers() -> ProcessPoolExecutor:
    """Processes that fill Triton's cache. Ask for them before the device is used: they are forks of this process."""
    count = int(os.environ.get("TORCHINDUCTOR_COMPILE_THREADS", "4"))
    pool = ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("fork"))
    list(pool.map(time.sleep, [0.1] * count))  # a process is made when there is work for it
    return pool


def compile_ahead(backend: TritonBackend, region: Region, target: Target, schedules: Sequence[Schedule]) -> None:
    """Compile all schedules at the same time. What fails here fails again where it is asked for."""
    plan, name, jobs = backend._plan(region, target), backend._named(region), []
    for schedule in schedules:
        with contextlib.suppress(Exception):
            code = plan.code(name, schedule, target)
            dtypes = [*(t.dtype for t in plan.tensors), *(dtype for _, dtype in code.scratch)]
            jobs += [compilers().submit(_compiled, code, launch, dtypes, target) for launch in code.launches]
    for job in jobs:
        with contextlib.suppress(Exception):
            job.result()


def _compiled(*job: Any) -> None:
    compile_launch(*job)  # the result stays in the cache on the disk


def operands(kernel: Kernel, values: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """What a kernel with destinations is called with, and the buffers among it that it writes.

    Buffers hold NaN or the largest number, so that an element that is not written shows.
    """
    assert kernel.destinations is not None
    buffers, device = [], next(v.device for v in values if isinstance(v, torch.Tensor))
    for d in kernel.destinations:
        sizes = [e if isinstance(e, int) else values[e[0]].shape[e[1]] for e in d.stored()]
        fill = math.nan if d.dtype.is_floating_point else d.dtype is torch.bool or torch.iinfo(d.dtype).max
        buffers.append(torch.full(sizes, fill, dtype=d.dtype, device=device).permute(d.seen()))
    return [*values, *kernel.constants, *buffers], buffers


def as_list(result: Any, count: int) -> list[Any]:
    """Outputs of an eager region."""
    return list(result) if isinstance(result, tuple) and count > 1 else [result]


def deviation(found: Sequence[Any], wanted: Sequence[Any]) -> float:
    """As `difference`, piece by piece where tensors are large."""
    worst = 0.0
    for a, b in zip(found, wanted, strict=True):
        if not isinstance(b, torch.Tensor) or b.numel() <= CHUNK or a.shape != b.shape:
            worst = max(worst, difference([a], [b])[0])
            continue
        rows = max(1, CHUNK // (b.numel() // b.shape[0]))
        for start in range(0, b.shape[0], rows):
            worst = max(worst, difference([a[start : start + rows]], [b[start : start + rows]])[0])
    return worst


@dataclass
class Candidate:
    """A kernel for a region, made and checked.

    Attributes:
        deviation: from eager, as a multiple of what rounding explains; infinite if it failed.
        reason: why it failed.
    """

    schedule: Schedule
    kernel: Kernel | None = None
    operands: list[Any] = field(default_factory=list)
    buffers: list[Any] = field(default_factory=list)
    deviation: float = math.inf
    reason: str = ""

    @property
    def right(self) -> bool:
        """Whether it gives eager's answers."""
        return self.kernel is not None and self.deviation <= 1

    def run(self) -> None:
        """Call it."""
        assert self.kernel is not None
        self.kernel.call(*self.operands)


@dataclass
class Part:
    """A region with eager's outputs on real values, and our candidates or the reason why there are none."""

    region: Region
    values: list[Any]
    eager: Kernel
    wanted: list[Any]
    reason: str | None
    candidates: list[Candidate]


def parts(net: torch.nn.Module, args: Tensors, target: Target, most: int, dynamic: Any = None,
          run: Tensors | None = None) -> Iterator[Part]:  # fmt: skip
    """The regions of a captured function in order, each with its first `most` schedules, made and checked.

    Args:
        dynamic: as in `torch.export.export`.
        run: inputs of other sizes than those of the capture.
    """
    program = capture(net.eval(), args, dynamic_shapes=dynamic)
    backend = TritonBackend(program)
    env = dict(zip(program.inputs, args if run is None else run, strict=True))
    env |= {n: program.weights[str(n.target)] for n in program.graph.nodes if n.op == "get_attr"}
    for region in partition(program, [backend], target):
        values = [env[n] for n in region.inputs]
        eager = EagerBackend().lower(region, target, Schedule())
        wanted = as_list(eager.call(*values, *eager.constants), eager.outputs)
        reason = backend.supports(region, target)
        found = [] if reason else _candidates(backend, region, target, values, wanted, most)
        yield Part(region, values, eager, wanted, reason, found)
        env |= dict(zip(region.outputs, wanted, strict=True))


def _candidates(backend: TritonBackend, region: Region, target: Target, values: list[Any], wanted: list[Any],
                most: int) -> list[Candidate]:  # fmt: skip
    def made(schedule: Schedule) -> Candidate:
        try:
            return Candidate(schedule, backend.lower(region, target, schedule))
        except Exception as error:  # a schedule that cannot be compiled costs itself
            return Candidate(schedule, reason=f"{type(error).__name__}: {str(error)[:300]}")

    schedules = list(itertools.islice(backend.space(region, target), most))
    if len(schedules) > 1 and not interpreted():
        with contextlib.suppress(Exception):  # only a matter of speed
            compile_ahead(backend, region, target, schedules)
    found = [made(s) for s in schedules]
    for candidate in found:
        if candidate.kernel is None:
            continue
        candidate.operands, candidate.buffers = operands(candidate.kernel, values)
        candidate.run()
        candidate.deviation = deviation(candidate.buffers, wanted)
    return found


@dataclass
class Ours:
    """The fastest right kernels of a function, called in order.

    Attributes:
        schedules: of each region; ``eager`` with the reason where we have no kernel.
        outputs: of the last region.
    """

    calls: list[Callable[[], Any]] = field(default_factory=list)
    schedules: list[str] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)

    def __call__(self) -> None:
        for call in self.calls:
            call()


def fastest(net: torch.nn.Module, args: Tensors, device: str, most: int = 8) -> Ours:
    """Our kernels for all of `net`; the operands of later regions are what eager gave.

    Raises:
        RuntimeError: a region has kernels and none of them is right.
    """
    ours = Ours()
    with torch.no_grad():
        for part in parts(net, args, here(device), most):
            if part.reason is not None:
                ours.schedules.append(f"eager ({part.reason})")
                ours.calls.append(lambda p=part: p.eager.call(*p.values, *p.eager.constants))
                ours.outputs = part.wanted
                continue
            right = [c for c in part.candidates if c.right]
            if not right:
                raise RuntimeError("; ".join(f"{c.schedule}: {c.reason or c.deviation}" for c in part.candidates)[:600])
            best = right[0]
            if len(right) > 1:
                seen = time_kernels({str(c.schedule): c.run for c in right}, device, 0.1, 5)
                best = min(right, key=lambda c: seen[str(c.schedule)].median)
            ours.schedules.append(str(best.schedule))
            ours.calls.append(best.run)
            ours.outputs = best.buffers
    return ours
