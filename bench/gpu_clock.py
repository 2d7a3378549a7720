"""Time on a GPU: whole models by events around many calls, single kernels by graphs with a cold cache.

On the CPU (a dry run under Triton's interpreter) both are a plain clock, so that every line of the benchmark can run.
"""

from __future__ import annotations

import gc
import math
import random
from collections.abc import Callable, Mapping
from time import perf_counter
from typing import Any

import gpu_tree  # noqa: F401
import torch

from torchlathe.targets.measure import Comparison, Timing

Call = Callable[[], Any]
LEAST = 4e-3  # seconds of a sample: far above what an event resolves
CALLS = 400  # of a sample at most


def synchronize(device: str) -> None:
    """Wait for the device."""
    if device == "cuda":
        torch.cuda.synchronize()


def elapsed(work: Call, device: str) -> float:
    """Seconds of one run, from an idle device to an idle device."""
    if device == "cpu":
        start = perf_counter()
        work()
        return max(perf_counter() - start, 1e-9)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    work()
    end.record()
    end.synchronize()
    return max(begin.elapsed_time(end) / 1e3, 1e-9)


def interleaved(works: Mapping[str, Call], device: str, seconds: float, rounds: int = 7) -> dict[str, list[float]]:
    """Seconds of every work, one sample of each per round, in an order that is drawn anew in each.

    Args:
        seconds: after which to stop.
        rounds: to run even if they take longer.
    """
    samples: dict[str, list[float]] = {name: [] for name in works}
    draw, start, done = random.Random(0), perf_counter(), 0
    collecting = gc.isenabled()
    gc.disable()  # a collection in the middle of a sample would be counted as somebody's
    try:
        while works and (done < rounds or perf_counter() - start < seconds):
            for name in draw.sample(list(works), len(works)):
                samples[name].append(elapsed(works[name], device))
            done += 1
    finally:
        if collecting:
            gc.enable()
    return samples


def repeated(call: Call, count: int) -> Call:
    """The call, `count` times."""

    def run() -> None:
        for _ in range(count):
            call()

    return run


def time_models(calls: Mapping[str, Call], device: str, seconds: float) -> dict[str, Timing]:
    """Timings of whole models as a user calls them: back to back, launches by the CPU counted in."""
    counts = {}
    for name, call in calls.items():
        elapsed(call, device)
        once = min(elapsed(call, device) for _ in range(3))
        counts[name] = max(1, min(CALLS, math.ceil(LEAST / once)))
    works = {name: repeated(call, counts[name]) for name, call in calls.items()}
    interleaved(works, device, seconds / 10, 1)  # clocks rise, caches fill
    found = interleaved(works, device, seconds)
    return {name: Timing.of([s / counts[name] for s in samples]) for name, samples in found.items()}


class Flush:
    """Empties the second cache level by reading three times its size: what is read leaves nothing to write back."""

    def __init__(self) -> None:
        size = 3 * (int(getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 0)) or 64 * 2**20)
        self.buffer = torch.ones(size // 4, device="cuda")

    def __call__(self) -> torch.Tensor:
        return self.buffer.sum()


def recorded(work: Call) -> Call:
    """The replay of a CUDA graph of one run. Whatever the work returns is freed in the graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        work()
    return graph.replay


def time_kernels(calls: Mapping[str, Call], device: str, seconds: float, rounds: int = 7) -> dict[str, Timing]:
    """Timings of kernels that find their operands in main memory.

    Each is a CUDA graph of several calls, each after a flush of the cache. A graph of flushes alone takes turns with
    them, and its time is subtracted round by round.
    """
    if device == "cpu":
        return {n: Timing.of(s) for n, s in interleaved(calls, device, seconds, min(rounds, 2)).items()}
    flush = Flush()
    alone = 20
    works, counts = {"": recorded(repeated(flush, alone))}, {}
    pause = min(elapsed(works[""], device) for _ in range(3)) / alone
    for name, call in calls.items():
        once = min(elapsed(call, device) for _ in range(3))
        counts[name] = max(2, min(20, math.ceil(LEAST / (once + pause))))
        works[name] = recorded(repeated(lambda call=call: (flush(), call()), counts[name]))
    for work in works.values():
        work()
    found = interleaved(works, device, seconds, rounds)
    pauses = [s / alone for s in found.pop("")]
    return {name: Timing.of([max(s / counts[name] - p, 1e-7) for s, p in zip(samples, pauses, strict=True)])
            for name, samples in found.items()}  # fmt: skip


def best_of(timings: Mapping[str, Timing], ours: str = "ours", aside: tuple[str, ...] = ()) -> tuple[str, Comparison]:
    """The fastest rival, and how its time compares with ours (a ratio above 1: ours is faster)."""
    others = {name: t.median for name, t in timings.items() if name != ours and name not in aside}
    best = min(others, key=others.__getitem__)
    return best, Comparison.of(timings[ours], timings[best])


def ratio_text(found: tuple[str, Comparison]) -> str:
    """The ratio with its interval, and who the rival is."""
    name, seen = found
    return f"{seen.ratio:.2f} ({seen.low:.2f} to {seen.high:.2f}) {name}"


def ceilings(device: str) -> dict[str, float]:
    """What the device does at best, as torch's own copy and product show: bytes and operations per second."""
    small = device == "cpu"
    size, side = (2**16, 64) if small else (2**29, 8192)
    x = torch.randn(size, dtype=torch.bfloat16, device=device)
    y = torch.empty_like(x)
    a, b = (torch.randn(side, side, dtype=torch.bfloat16, device=device) for _ in range(2))
    out = torch.empty_like(a)
    calls = {"copy": lambda: y.copy_(x), "product": lambda: torch.mm(a, b, out=out)}
    seen = time_kernels(calls, device, 0.0 if small else 1.5, 10)
    return {"copy": 2 * x.nbytes / seen["copy"].median, "product": 2 * side**3 / seen["product"].median}
