"""What a region computes that reduces windows of a tensor: pooling, and reductions over other dimensions than the last.

A window is what one element of the result is made of: along each dimension of the operand a number of taps, one for
those that are kept, all for those that are reduced. Elements of the operand come from a row program (so that a masked
mean multiplies with its mask while it sums), and what follows is a row program over the result.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sympy
from torch import fx

from ..base import Region
from .layout import Access, access_of, expression
from .rows import reach, reason_against
from .rules import name_of, read
from .tail import Tail, plan_tail
from .values import KINDS, Builder, Unsupported, Value, bound, dense, in_order, shape

REDUCTIONS = {"mean": "sum", "sum": "sum", "amax": "max", "amin": "min"}
POOLS = {f"{kind}_pool{n}d": how for n in (1, 2, 3)
         for kind, how in (("avg", "sum"), ("adaptive_avg", "sum"), ("max", "max"))}  # fmt: skip
ONE = sympy.Integer(1)


@dataclass(frozen=True)
class Window:
    """One dimension of the operand: index = result's index * stride - before + tap * dilation.

    Attributes:
        size: of the operand.
        result: size of the result, one if the dimension is reduced.
        taps: elements of a window.
        stride: between windows.
        dilation: between taps.
        before: elements of the first window that lie before the operand; they count as absent.
    """

    size: sympy.Expr
    result: sympy.Expr
    taps: sympy.Expr = ONE
    stride: int = 1
    dilation: int = 1
    before: int = 0

    @property
    def clipped(self) -> bool:
        """Whether some window reaches beyond the operand."""
        if self.taps == ONE or self.taps == self.size:
            return self.before > 0
        last = (self.result - 1) * self.stride + (self.taps - 1) * self.dilation - self.before
        return self.before > 0 or bool(last >= self.size)


@dataclass
class WindowPlan:
    """A reduction over windows with what comes before and after it.

    Attributes:
        how: ``sum``, ``max`` or ``min``.
        operand: element of the operand.
        loads: what the operand reads, over its dimensions with the columns last.
        windows: of the operand's dimensions, columns last; the columns are kept.
        rows: for each of them but the columns, the place of its index among the result's, None if it is reduced away.
        extents: sizes of the result, columns last.
        divisor: what sums are divided by: a number, ``"taps"`` for the taps inside the operand, None for nothing.
        tail: what is done to each element of the result.
    """

    how: str
    operand: Value
    loads: dict[Value, Access]
    windows: list[Window]
    rows: list[int | None]
    extents: list[sympy.Expr]
    divisor: float | str | None
    tail: Tail
    order: tuple[int, ...] | None

    @property
    def columns(self) -> int:
        """Number of columns."""
        return int(self.extents[-1])

    @property
    def work(self) -> int | None:
        """Vector instructions per lane of one call, None if sizes are symbolic."""
        sizes = [*self.extents, *(w.taps for w in self.windows)]
        static = all(s.is_Integer for s in sizes)
        return math.prod(int(s) for s in sizes) * (2 + self.operand.cost) if static else None


def reduces_windows(node: fx.Node) -> bool:
    """Whether a node is a pooling or a reduction over other dimensions than the last alone."""
    name = name_of(node)
    if name in POOLS:
        return True
    if name not in REDUCTIONS or not isinstance(node.args[0], fx.Node):
        return False
    return _dims(node) != [len(shape(node.args[0])) - 1]


def _dims(node: fx.Node) -> list[int]:
    """Reduced dimensions, rising."""
    given, rank = bound(node).get("dim"), len(shape(node.args[0]))  # type: ignore[arg-type]
    listed = [given] if isinstance(given, int) else list(given or range(rank))
    return sorted(d % rank for d in listed)


def plan(region: Region, device: str = "cpu") -> WindowPlan:
    """The windows of a region whose kernel runs on a kind of device. Raises Unsupported with the reason."""
    roots = [n for n in region.nodes if reduces_windows(n)]
    if len(roots) != 1:
        raise Unsupported("not exactly one reduction over windows")
    root, name = roots[0], name_of(roots[0]) or ""
    source: Any = root.args[0]
    dense(root), dense(source)
    if KINDS.get(root.meta["val"].dtype) != "float32" or root.meta["val"].dtype is not source.meta["val"].dtype:
        raise Unsupported(f"a reduction of {source.meta['val'].dtype} to {root.meta['val'].dtype}")
    windows, kept, divisor = _pooled(root, name) if name in POOLS else _reduced(root, name)
    inner = _before(root, set(region.nodes))
    column = _column(source, windows, region)
    order = [d for d in range(len(windows)) if d != column] + [column]
    value, loads = _operand(region, source, inner, order, device)
    result_order = [kept.index(d) for d in order if d in kept]
    given_order = None if result_order == list(range(len(kept))) else tuple(result_order)
    tail = plan_tail(region, root, None, 0, given_order, inner, device=device)
    rows = [result_order.index(kept.index(d)) if d in kept else None for d in order[:-1]]
    extents = [expression(shape(root)[k]) for k in result_order]
    how = (POOLS | REDUCTIONS)[name]
    return WindowPlan(how, value, loads, [windows[d] for d in order], rows, extents, divisor, tail, given_order)


def _before(root: fx.Node, members: set[fx.Node]) -> set[fx.Node]:
    """Nodes of the region that the root is computed from."""
    found, stack = set[fx.Node](), list(root.all_input_nodes)
    while stack:
        node = stack.pop()
        if node in members and node not in found:
            if (reason := reason_against(node)) is not None:
                raise Unsupported(reason)
            found.add(node)
            stack.extend(node.all_input_nodes)
    return found


def _operand(region: Region, source: Any, inner: set[fx.Node], order: list[int],
             device: str) -> tuple[Value, dict[Value, Access]]:  # fmt: skip
    build = Builder(region, in_order(shape(source), order), device, tuple(order))
    value = read(build, inner, {}, source, build.identity())
    reached = reach([value])
    if value.kind != "float32" or any(v.op in ("reduce", "cat", "pick", "gather") for v in reached):
        raise Unsupported("the operand of a reduction over windows is not pointwise")
    tensors = [n.meta["val"] for n in region.inputs]
    return value, {v: access_of(v, tensors, len(order)) for v in reached if v.op == "load"}


def _column(source: Any, windows: Sequence[Window], region: Region) -> int:
    """The kept dimension that is innermost in memory."""
    same = [n for n in region.inputs if shape(n) == shape(source)]
    strides = (same[0] if same and source not in region.inputs else source).meta["val"].stride()
    whole = [d for d, w in enumerate(windows) if w.taps == 1 and w.stride == 1 and not w.before and w.size == w.result]
    whole = [d for d in whole if windows[d].size.is_Integer and windows[d].size > 1]
    if not whole:
        raise Unsupported("a reduction that keeps no dimension of static size")
    return min(whole, key=lambda d: (strides[d] if isinstance(strides[d], int) else math.inf, -d))


def _reduced(root: fx.Node, name: str) -> tuple[list[Window], list[int], float | str | None]:
    """Windows, the operand's dimension for each of the result's, divisor."""
    given, sizes, dims = bound(root), shape(root.args[0]), _dims(root)  # type: ignore[arg-type]
    windows = [Window(expression(n), ONE, expression(n)) if d in dims else Window(expression(n), expression(n))
               for d, n in enumerate(sizes)]  # fmt: skip
    if any(w.taps == 0 for w in windows):
        raise Unsupported("a reduction of nothing")
    kept = [d for d in range(len(sizes)) if given.get("keepdim") or d not in dims]
    count = math.prod(w.taps for w in windows)
    divisor = None if name != "mean" else float(count) if count.is_Integer else "taps"
    return windows, kept, divisor


def _pooled(root: fx.Node, name: str) -> tuple[list[Window], list[int], float | str | None]:
    given, sizes, results = bound(root), shape(root.args[0]), shape(root)  # type: ignore[arg-type]
    count, first = int(name[-2]), len(sizes) - int(name[-2])
    if not all(isinstance(n, int) and n > 0 for n in (*sizes[first:], *results[first:])):
        raise Unsupported("pooling over dimensions of symbolic or empty size")
    windows = [Window(expression(n), expression(n)) for n in sizes[:first]]
    if "kernel_size" not in given:  # adaptive
        if any(n % m for n, m in zip(sizes[first:], results[first:], strict=True)):
            raise Unsupported("adaptive pooling with windows of several sizes")
        spread = [n // m for n, m in zip(sizes[first:], results[first:], strict=True)]
        taps, strides, before, dilation = spread, spread, [0] * count, [1] * count
    else:
        taps, strides, before, dilation = (_all(given.get(k), count) for k in
                                           ("kernel_size", "stride", "padding", "dilation"))  # fmt: skip
        strides, before, dilation = strides or taps, before or [0] * count, dilation or [1] * count
        if given.get("ceil_mode"):
            raise Unsupported("pooling with windows that begin beyond the last element")
    for d in range(count):
        size, result = (sympy.Integer(n[first + d]) for n in (sizes, results))
        windows.append(Window(size, result, sympy.Integer(taps[d]), strides[d], dilation[d], before[d]))
    divisor: float | str | None = None
    if POOLS[name] == "sum":
        counted = given.get("count_include_pad", True) or not any(w.clipped for w in windows)
        divisor = float(given.get("divisor_override") or math.prod(taps)) if counted else "taps"
        if given.get("divisor_override"):
            divisor = float(given["divisor_override"])
    return windows, list(range(len(sizes))), divisor


def _all(given: Any, count: int) -> list[int]:
    """An argument for every dimension, [] if it was left out."""
    listed = [given] if isinstance(given, int) else list(given or [])
    return listed * count if len(listed) == 1 else listed
