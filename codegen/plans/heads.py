"""A product whose columns are heads, with what follows for some of them: rotary embedding of queries and keys.

Each head is read in two halves, which rotary embedding combines (Su et al., "RoFormer", 2021): column i of a head with
the one half a head away. A tile of the product has both halves, and each half of what follows is computed from them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import sympy
import torch
from torch import fx

from ...passes.nodes import RESHAPES
from ...targets.cost import is_free
from ..base import Region, in_memory, seen_by_callers
from .layout import Access, access_of, expression
from .product import LINEAR, MATRIX
from .rows import Output, equal_shapes, reach, reason_against
from .rules import name_of, read
from .tail import Tail, first_column
from .values import COLUMN, KINDS, Builder, Coordinate, Unsupported, Value, same, shape


@dataclass
class Piece:
    """Some of the heads: the first one, how many, and what is done to them."""

    first: int
    count: int
    tail: Tail


@dataclass
class Heads:
    """All pieces of a product in order, the features of a head, and how each output of the region lies in memory."""

    pieces: list[Piece]
    features: int
    orders: list[tuple[int, ...]]


@dataclass
class _Half:
    """What is computed from one half of the heads of a cut: sum, bias as it is read, and result."""

    start: int
    summed: Value
    bias: Value | None
    result: Value


@dataclass(frozen=True)
class _Cut:
    """Columns of the product from `start` on, as the node that shows them by heads (or as they are) and the output."""

    start: int
    stop: int
    seen: fx.Node
    output: fx.Node


def by_heads(region: Region, root: fx.Node) -> bool:
    """Whether some columns of the product are shown by heads."""
    readers = {*root.users, *(u for user in root.users if name_of(user) == "slice" for u in user.users)}
    shown = (n for n in readers if n in region.nodes and name_of(n) in RESHAPES)
    return root not in region.outputs and any(len(shape(n)) == len(shape(root)) + 1 for n in shown)


def plan_heads(region: Region, root: fx.Node, bias: fx.Node | None) -> Heads:
    """What follows the heads of a product. Raises Unsupported with the reason."""
    if name_of(root) not in (*LINEAR, *MATRIX) or not isinstance(shape(root)[-1], int):
        raise Unsupported("heads of something else than a product of fixed width")
    if bias is not None and not equal_shapes(shape(bias), shape(root)[-1:]):
        raise Unsupported("heads of a product with another addend than one for each column")
    if all(n is root or is_free(n) for n in region.nodes):
        raise Unsupported("heads that are shown and not computed with")
    cuts = sorted(_cuts(region, root), key=lambda cut: cut.start)
    if [c.start for c in cuts] != [0, *(c.stop for c in cuts[:-1])] or cuts[-1].stop != shape(root)[-1]:
        raise Unsupported("heads that overlap or leave columns out")
    if {c.output for c in cuts} != set(region.outputs):
        raise Unsupported("an output that is not that of one piece of a product")
    widths = {shape(c.seen)[-1] for c in cuts if name_of(c.seen) in RESHAPES}
    features = widths.pop() if len(widths) == 1 else None
    if not isinstance(features, int) or features % 2 or any((c.stop - c.start) % features for c in cuts):
        raise Unsupported("heads of different or odd widths")
    found = [_read(region, root, bias, cut, features) for cut in cuts]
    orders = {cut.output: _order(len(shape(cut.output)), place) for cut, (place, _) in zip(cuts, found, strict=True)}
    tensors = [n.meta["val"] for n in region.inputs] + [_written(n, orders[n]) for n in region.outputs]
    pieces = [_piece(region, root, bias, cut, features, place, halves, tensors)
              for cut, (place, halves) in zip(cuts, found, strict=True)]  # fmt: skip
    return Heads(pieces, features, [orders[n] for n in region.outputs])


def _cuts(region: Region, root: fx.Node) -> Iterator[_Cut]:
    for user in root.users:
        start, stop, node = 0, shape(root)[-1], user
        if name_of(user) == "slice":
            start = first_column(root, user)
            stop = start + shape(user)[-1]
            inner = list(user.users)
            if user not in region.outputs and len(inner) == 1:
                (node,) = inner
        if node not in region.nodes:
            raise Unsupported("a part of the product is read outside")
        ends = [n for n in region.outputs if node in _before(region, n)]
        if len(ends) != 1:
            raise Unsupported("a part of the product that does not lead to one output")
        if not _splits(root, node) if name_of(node) in RESHAPES else (name_of(node) != "slice" or ends != [user]):
            raise Unsupported("a part of the product is seen otherwise than by heads")
        yield _Cut(start, stop, node, ends[0])


def _before(region: Region, node: fx.Node) -> set[fx.Node]:
    """A node and all nodes of the region that it depends on."""
    found, stack = {node}, [node]
    while stack:
        for source in stack.pop().all_input_nodes:
            if source in region.nodes and source not in found:
                found.add(source)
                stack.append(source)
    return found


def _splits(root: fx.Node, view: fx.Node) -> bool:
    """Whether a view only cuts the last dimension into heads."""
    lead, seen = shape(root)[:-1], shape(view)
    return len(seen) == len(lead) + 2 and all(map(same, seen, lead))


def _read(region: Region, root: fx.Node, bias: fx.Node | None, cut: _Cut,
          features: int) -> tuple[int | None, list[_Half]]:  # fmt: skip
    """Which dimension of the output of a cut counts the heads (None: none does), and the halves of what is computed."""
    half, lead = features // 2, shape(root)[:-1]
    build, memo, halves = Builder(region, ((cut.stop - cut.start) // features, *lead, half), "cuda"), {}, []
    for start in (0, half):
        value = summed = build.product(KINDS.get(root.meta["val"].dtype, "float32"), start)
        added = None if bias is None else build.load(bias, ((COLUMN, start),))
        if added is not None:
            value = build.op("add", value, added)
        value = memo[cut.seen, _at(len(lead), len(lead), start)] = build.rounded(value, root.meta["val"].dtype)
        halves.append(_Half(start, summed, added, value))
    if cut.output is cut.seen:
        return len(lead) if name_of(cut.seen) in RESHAPES else None, halves
    members, why = _before(region, cut.output) - {root, cut.seen, *root.users}, ""
    for node in [n for n in region.nodes if n in members]:
        if (reason := reason_against(node)) is not None:
            raise Unsupported(reason)
    for place in range(len(lead) + 1):
        if not equal_shapes(shape(cut.output), (*lead[:place], build.space[0], *lead[place:], features)):
            why = why or f"the output {cut.output.name} has another shape than its heads"
            continue
        try:
            for h in halves:
                h.result = read(build, members, memo, cut.output, _at(len(lead), place, h.start))
        except Unsupported as error:
            why = str(error)
        else:
            return place, halves
    raise Unsupported(why)


def _at(lead: int, place: int, start: int) -> tuple[Coordinate, ...]:
    """Where a tensor whose dimension `place` counts the heads is read, in (heads, leading dimensions, half a head)."""
    outer: list[Coordinate] = [(d + 1, 0) for d in range(lead)]
    return (*outer[:place], (0, 0), *outer[place:], (COLUMN, start))


def _order(rank: int, place: int | None) -> tuple[int, ...]:
    """Dimensions of an output in memory: as the product would have written them, heads before their features."""
    if place is None:
        return tuple(range(rank))
    return (*(d for d in range(rank - 1) if d != place), place, rank - 1)


def _written(node: fx.Node, order: tuple[int, ...]) -> torch.Tensor:
    """An output as the kernel writes it. Raises Unsupported where a caller relies on another layout."""
    value: torch.Tensor = node.meta["val"]
    own = in_memory(value, order)
    if seen_by_callers(node) and own.stride() != value.stride():
        raise Unsupported(f"the output {node.name} lies otherwise in memory")
    return own


def _piece(region: Region, root: fx.Node, bias: fx.Node | None, cut: _Cut, features: int, place: int | None,
           halves: Sequence[_Half], tensors: list[torch.Tensor]) -> Piece:  # fmt: skip
    """The kernel's part for one cut: loads, and stores of both halves."""
    reached, lead = reach([h.result for h in halves]), len(shape(root)) - 1
    if any(v.op in ("reduce", "cat", "pick", "gather") for v in reached):
        raise Unsupported("the nodes after the product are not pointwise in halves of heads")
    loads = {v: access_of(v, tensors, lead + 2) for v in reached if v.op == "load"}
    for h in halves:
        if h.bias is not None and bias is not None:
            step = expression(bias.meta["val"].stride(0))
            loads[h.bias] = Access(loads[h.bias].buffer, [step * features, *[sympy.Integer(0)] * lead, step],
                                   step * (cut.start + h.start))  # fmt: skip
    position = len(region.inputs) + region.outputs.index(cut.output)
    steps = [expression(s) for s in tensors[position].stride()]
    if place is None:
        walk = [steps[-1] * features, *steps[:-1], steps[-1]]
    else:
        walk = [steps[place], *(s for d, s in enumerate(steps[:-1]) if d != place), steps[-1]]
    outputs = [Output(h.result, False, Access(position, list(walk), walk[-1] * h.start)) for h in halves]
    results = {h.start: h.summed for h in halves}
    return Piece(cut.start // features, (cut.stop - cut.start) // features, Tail(tensors, outputs, loads, results))
