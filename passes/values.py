"""What is known of a node's numbers before any input is there: constants, and the ranges that others stay in."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from .evaluate import steps
from .nodes import ancestors, arguments, is_pure
from .operators import ADD, CASTS, COPIES, DIV, FILL, MUL, PRODUCTS, SUB, TURNS, VIEWS, WHERE
from .program import Program

aten = torch.ops.aten

NEAR = 64  # how many nodes `near_constant` looks back
LARGEST = 1 << 24  # elements of a constant that is still worth evaluating
SCORE = 8192.0  # products of activations are taken to stay below this; a mask value beyond it takes a key out

UNIFORM = {aten.full.default, aten.full_like.default, aten.zeros.default, aten.zeros_like.default, aten.expand.default}

RSUB = {aten.rsub.Scalar, aten.rsub.Tensor}

Spans = list[tuple[float, float]]

MOVES = {aten.slice.Tensor, aten.index.Tensor, aten.select.int, aten.gather.default, aten.embedding.default,
         aten.repeat.default, aten.index_select.default} | TURNS | VIEWS | COPIES  # fmt: skip


@dataclass
class Values:
    """Answers about the nodes of one program; they hold for as long as the nodes are not changed."""

    program: Program
    constants: dict[fx.Node, torch.Tensor | None] = field(default_factory=dict)
    ranges: dict[fx.Node, Spans | None] = field(default_factory=dict)

    def constant(self, node: Any) -> torch.Tensor | None:
        """The node's tensor if it depends on no input, else None.

        A dimension that is only expanded to a size not yet known may come out with size 1.
        """
        if not isinstance(node, fx.Node) or not isinstance(node.meta.get("val"), torch.Tensor):
            return None
        if node not in self.constants:
            waiting, new = [node], {node}
            while waiting:  # inputs first, without recursion: the graph behind may be deep
                found = [n for n in waiting.pop().all_input_nodes if n not in new and n not in self.constants]
                new.update(found)
                waiting += found
            for n in sorted(new):
                tensor = isinstance(n.meta.get("val"), torch.Tensor)
                self.constants[n] = (
                    None if not tensor else self.program.constant(n) if n.op == "get_attr" else self._evaluate(n)
                )
        return self.constants[node]

    def _evaluate(self, node: fx.Node) -> torch.Tensor | None:
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload) or not is_pure(node):
            return None
        wanted = node.meta["val"].shape
        fixed = all(isinstance(size, int) for size in wanted)
        if fixed and wanted.numel() > LARGEST:
            return None
        sources = {source: self.constant(source) for source in node.all_input_nodes}
        spread = node.target is aten.expand.default and not fixed
        if spread:
            return _unspread(sources.get(node.args[0]), wanted)  # type: ignore[arg-type]
        if any(value is None for value in sources.values()):
            return None
        exact = all(value.shape == source.meta["val"].shape for source, value in sources.items() if value is not None)
        if not exact and torch.Tag.pointwise not in node.target.tags and node.target not in WHERE | CASTS:
            return None
        if exact and not fixed:
            return None
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), sources.__getitem__)
        with torch.no_grad():
            result = node.target(*args, **kwargs)
        return result if isinstance(result, torch.Tensor) else None

    def number(self, value: Any) -> float | None:
        """A Python number, or the one value of all elements of a tensor; None for anything else."""
        if isinstance(value, fx.Node) and value.target not in UNIFORM and self.constant(value) is None:
            return None
        spans = self.spans(value)
        return spans[0][0] if spans is not None and len(spans) == 1 and spans[0][0] == spans[0][1] else None

    def spans(self, node: Any) -> Spans | None:
        """Closed intervals that hold every element, None if nothing is known. Products are taken to be finite."""
        if isinstance(node, (int, float)):
            return [(float(node), float(node))]
        if not isinstance(node, fx.Node) or not isinstance(node.meta.get("val"), torch.Tensor):
            return None
        if node.meta["val"].dtype == torch.bool:
            return [(0.0, 0.0), (1.0, 1.0)]
        value = self.constant(node)
        if value is not None:
            return _spans_of(value)
        if node in self.ranges:
            return self.ranges[node]
        found = self._spans(node)
        kept = None if found is None else sorted(set(found))
        self.ranges[node] = (
            None if kept is None or len(kept) > 16 or any(math.isnan(x) for s in kept for x in s) else kept
        )
        return self.ranges[node]

    def _spans(self, node: fx.Node) -> Spans | None:
        target, given = node.target, arguments(node)
        if target in MOVES:
            return self.spans(node.args[0])
        if target in CASTS and node.meta["val"].is_floating_point():
            found, largest = self.spans(node.args[0]), torch.finfo(node.meta["val"].dtype).max
            return found and [(_round(a, largest), _round(b, largest)) for a, b in found]
        if target in PRODUCTS or target is aten.linear.default:
            return [(-SCORE, SCORE)]
        if target in (aten.full.default, aten.full_like.default):
            return self.spans(given["fill_value"])
        if target in (aten.zeros.default, aten.zeros_like.default):
            return [(0.0, 0.0)]
        if target in WHERE or target in FILL:
            a, b = (given["self"], given["other"]) if target in WHERE else (given["self"], given["value"])
            first, second = self.spans(a), self.spans(b)
            return None if first is None or second is None else first + second
        if target in ADD | SUB | RSUB | MUL | DIV and given.get("alpha", 1) == 1:
            return self._arithmetic(node)
        return None

    def _arithmetic(self, node: fx.Node) -> Spans | None:
        first, second = self.spans(node.args[0]), self.spans(node.args[1])
        if first is None or second is None:
            return None
        target, largest = node.target, torch.finfo(torch.float64).max
        if node.meta["val"].is_floating_point():
            largest = torch.finfo(node.meta["val"].dtype).max
        if target in DIV and any(a <= 0 <= b for a, b in second):
            return None
        operation: Callable[[float, float], float] = next(f for ops, f in _ARITHMETIC if target in ops)
        return [_hull([_round(operation(x, y), largest) for x in s for y in t]) for s in first for t in second]


_ARITHMETIC: tuple[tuple[set[Any], Callable[[float, float], float]], ...] = (
    (ADD, lambda x, y: x + y),
    (SUB, lambda x, y: x - y),
    (RSUB, lambda x, y: y - x),
    (MUL, lambda x, y: x * y),
    (DIV, lambda x, y: x / y),
)


def _hull(points: list[float]) -> tuple[float, float]:
    return (math.nan, math.nan) if any(math.isnan(p) for p in points) else (min(points), max(points))


def _round(value: float, largest: float) -> float:
    """Beyond the largest number of a dtype lies infinity."""
    return value if abs(value) <= largest else math.copysign(math.inf, value)


def _spans_of(value: torch.Tensor) -> Spans | None:
    if value.numel() == 0 or value.is_complex():
        return None
    flat = value.detach().double().flatten()
    if bool(flat.isnan().any()):
        return None
    different = flat[:4096].unique() if flat.numel() <= 4096 else None
    if different is not None and different.numel() <= 4:
        return [(float(x), float(x)) for x in different]
    return [(float(flat.min()), float(flat.max()))]


def _unspread(value: torch.Tensor | None, wanted: torch.Size) -> torch.Tensor | None:
    """The expanded tensor with size 1 wherever the wanted size is only known at run time."""
    if value is None or value.dim() > len(wanted):
        return None
    sizes = [size if isinstance(size, int) else 1 for size in wanted]
    tail = sizes[len(sizes) - value.dim() :]
    return value.expand(sizes) if all(a in (1, b) for a, b in zip(value.shape, tail, strict=True)) else None


def evaluated(program: Program, wanted: list[fx.Node]) -> dict[fx.Node, Any]:
    """The values of constant nodes, in the operators' own precision, so that folding changes no bit."""
    kept, needed = set(wanted), set[fx.Node]().union(*(ancestors(node) for node in wanted))
    with torch.no_grad():
        return {node: value for node, value in steps(sorted(needed), program.weights) if node in kept}


def near_constant(program: Program, value: Any) -> torch.Tensor | None:
    """The tensor that a node yields in every run; None if it depends on an input or is far to compute.

    The question costs the same in a graph of any size; the tensor may be of any size too. `Values.constant` is for
    numbers that are to be looked at, and remembers its answers.
    """
    direct = program.constant(value)
    if direct is not None or not isinstance(value, fx.Node):
        return direct
    found, waiting = {value}, [value]
    while waiting:
        node = waiting.pop()
        fixed = is_pure(node) if node.op == "call_function" else program.constant(node) is not None
        if not fixed or len(found) > NEAR or not isinstance(node.meta.get("val"), torch.Tensor):
            return None
        new = [n for n in node.all_input_nodes if n not in found]
        found.update(new)
        waiting += new
    result: torch.Tensor = evaluated(program, [value])[value]
    return result


def is_causal(mask: torch.Tensor, queries: Any, keys: Any) -> bool:
    """Whether a constant additive mask hides from each of n queries exactly the keys behind it, out of n."""
    if mask.dim() < 2 or tuple(mask.shape[-2:]) != (queries, keys) or queries != keys:
        return False
    seen = torch.ones(mask.shape[-2:], dtype=torch.bool, device=mask.device).tril()
    return bool((torch.where(seen, mask == 0, mask <= -SCORE)).all())


def swallows_all_or_little(spans: list[tuple[float, float]] | None, dtype: torch.dtype) -> bool:
    """Whether each value, added to a score in half precision, leaves the value itself or about the exact sum."""
    if spans is None:
        return False
    least = -1e30 if dtype is torch.bfloat16 else -math.inf
    return all(high <= least or low >= -128 for low, high in spans)
