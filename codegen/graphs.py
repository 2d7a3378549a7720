"""CUDA graphs: a call of an executable on a GPU replays what it queued the first time it saw these shapes."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..targets.measure_gpu import captured

MOST = 8  # graphs of one executable: each holds the memory of all its results


@dataclass
class _Graph:
    graph: torch.cuda.CUDAGraph
    inputs: list[Any]
    results: Sequence[Any]


class Graphs:
    """Calls a function through graphs, one for each combination of input shapes.

    Inputs are copied to where the graph reads them, and results out of where it writes them, so that they belong to
    the caller. A function that a graph cannot hold (it looks at values on the host) is called as it is from then on.

    Args:
        run: takes and returns flat values.
        counts: where falls back to plain calls are counted.
    """

    def __init__(self, run: Callable[..., Any], counts: dict[str, int]) -> None:
        self._run, self._counts = run, counts
        self._known: OrderedDict[Any, _Graph | None] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, *flat: Any) -> Any:
        """The results for these inputs."""
        if torch.cuda.is_current_stream_capturing():  # the caller makes a graph of its own
            return self._run(*flat)
        key = tuple((v.shape, v.stride(), v.dtype) if isinstance(v, torch.Tensor) else (type(v), v) for v in flat)
        with self._lock:
            if key not in self._known:
                self._known[key] = self._capture(flat)
                if len(self._known) > MOST:
                    self._known.popitem(last=False)
            self._known.move_to_end(key)
            found = self._known[key]
            if found is not None:
                return self._replay(found, flat)
        return self._run(*flat)

    def _replay(self, found: _Graph, flat: Sequence[Any]) -> tuple[Any, ...]:
        for mine, given in zip(found.inputs, flat, strict=True):
            if isinstance(given, torch.Tensor):
                mine.copy_(given)
        found.graph.replay()
        return tuple(r.clone() if isinstance(r, torch.Tensor) else r for r in found.results)

    def _capture(self, flat: Sequence[Any]) -> _Graph | None:
        inputs = [_copy(v) if isinstance(v, torch.Tensor) else v for v in flat]
        self._run(*inputs)  # what is wrong with the call itself is raised here
        results: list[Any] = []

        def calls() -> None:
            results[:] = self._run(*inputs)

        try:
            return _Graph(captured(calls), inputs, list(results))
        except Exception:  # whatever a captured operator raises: the plain call works
            torch.cuda.synchronize()
            self._counts["calls without a graph"] = self._counts.get("calls without a graph", 0) + 1
            return None


def _copy(value: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device).copy_(value)
