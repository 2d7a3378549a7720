"""Time work on a GPU: graphs of several calls, with a cold second-level cache before each, sampled in turn."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from time import perf_counter
from typing import Any

import torch

from .measure import Call, Timing

GRAPH_SECONDS = 2e-3  # what one sample should last at least
MOST_CALLS = 50


def settled(call: Call, device: torch.device) -> Call:
    """A call that returns when its work is done: on a GPU, a call alone returns when the work is queued."""
    if device.type != "cuda":
        return call

    def done() -> Any:
        result = call()
        torch.cuda.synchronize(device)
        return result

    return done


def compare_kernels(
    fns: Mapping[str, Call], device: torch.device, budget: float, min_rounds: int = 7
) -> dict[str, Timing]:
    """Seconds of one call of each candidate on the GPU alone, without what it costs to queue it.

    Each sample replays a graph of several calls, each after a read that fills the second-level cache (what is written
    would have to leave it while the kernel runs); the time of the same graph with the reads alone is taken off. A
    candidate that cannot be captured is queued call by call.

    Args:
        fns: candidates by name, callables of no arguments.
        budget: seconds of sampling for all together.
        min_rounds: rounds to run even if they exceed the budget.
    """
    size = 3 * int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or 64 << 20)
    sweep = torch.zeros(size // 4, device=device)
    replays: dict[str, tuple[Call, int]] = {}
    idle: dict[int, Call] = {}
    for name, fn in fns.items():
        count = _count(fn)
        replays[name] = _recorded(fn, sweep, count), count
        idle.setdefault(count, _recorded(lambda: None, sweep, count))
    samples: dict[str, list[float]] = {name: [] for name in fns}
    start, rounds = perf_counter(), 0
    while rounds < min_rounds or perf_counter() - start < budget:
        alone = {count: _elapsed(replay) for count, replay in idle.items()}
        for name, (replay, count) in replays.items() if rounds % 2 else reversed(replays.items()):
            samples[name].append(max(_elapsed(replay) - alone[count], 1e-9) / count)
        rounds += 1
    return {name: Timing.of(s) for name, s in samples.items()}


def _count(fn: Call) -> int:
    fn()
    seconds = _elapsed(fn)
    return max(3, min(MOST_CALLS, math.ceil(GRAPH_SECONDS / max(seconds, 1e-6))))


def _recorded(fn: Call, sweep: torch.Tensor, count: int) -> Call:
    def calls() -> None:
        for _ in range(count):
            sweep.sum()
            fn()

    try:
        return captured(calls).replay
    except RuntimeError:  # it synchronises, or allocates in a way that a graph cannot hold
        torch.cuda.synchronize()
        return calls


def captured(calls: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    """A graph of what `calls` queues. Raises RuntimeError if it does what a graph cannot hold."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        calls()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        calls()
    return graph


def _elapsed(replay: Call) -> float:
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    first.record()
    replay()
    last.record()
    last.synchronize()
    return float(first.elapsed_time(last)) * 1e-3
