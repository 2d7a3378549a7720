"""Turns a region into a row program with its layout, or says why it has none."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from ...passes.nodes import RESHAPES
from ..base import Region, in_memory, seen_by_callers
from .layout import Access, access_of, contiguous, expression, merge, order_in_memory
from .moves import TURNS
from .rules import RULES, name_of, read
from .values import KINDS, Builder, Extent, Unsupported, Value, in_order, is_one, same, shape

REDUCING = {"mean", "sum", "amax", "amin", "var", "layer_norm", "rms_norm",
            "softmax", "_softmax", "log_softmax", "_log_softmax"}  # fmt: skip
VIEWS = frozenset((*TURNS, "unsqueeze", "squeeze", "slice", "select", "expand"))  # strides change alone
CHUNK = 4096  # columns of one task when rows were merged into one long row


@dataclass
class Output:
    """One result: its value, whether it has one element per row only, and where it goes."""

    value: Value
    per_row: bool
    access: Access


@dataclass
class Plan:
    """Everything that emission needs.

    Attributes:
        tensors: fake tensors of the parameters, inputs before outputs.
        outputs: one per region output.
        loads: the access of every load, gather and pick.
        reductions: reductions by the stage of their operand.
        segments: column ranges inside which every cat reads one part (empty: the columns are not static).
        extents: sizes of the merged space, columns last.
        gathers: the loads with an index that is a value, with the number of entries to choose from.
        pick: the value whose index decides which part of every pick a row reads, None if there is no pick.
        order: dimensions of the outputs in memory, as in `Destination`.
    """

    tensors: list[torch.Tensor]
    outputs: list[Output]
    loads: dict[Value, Access]
    reductions: dict[int, list[Value]]
    segments: list[tuple[int, int]]
    extents: list[sympy.Expr]
    gathers: list[tuple[Value, sympy.Expr]]
    pick: Value | None
    order: tuple[int, ...] | None

    @property
    def stages(self) -> int:
        """Number of passes over a row."""
        last = max([o.value.stage for o in self.outputs if not o.per_row], default=0)
        return max([last, *self.reductions]) + 1

    @property
    def weight(self) -> int:
        """Rough number of vector instructions per vector of columns."""
        roots = [o.value for o in self.outputs] + [v.args[0] for group in self.reductions.values() for v in group]
        return sum(2 + v.cost for v in roots)


def reason_against(node: fx.Node) -> str | None:
    """Why a node cannot be part of any region, judged alone."""
    name = name_of(node)
    if name not in RULES:
        return f"{node.target} has no rule"
    for n in (node, *node.all_input_nodes):
        value = n.meta.get("val")
        if not isinstance(value, torch.Tensor) or value.layout is not torch.strided:
            return f"{n.name} is not a dense tensor"
        if value.dtype not in KINDS:
            return f"{n.name} is {value.dtype}"
    if name in REDUCING and not isinstance(node.all_input_nodes[0].meta["val"].shape[-1:][0], int):
        return "a reduction over a dimension of symbolic size"
    return None


def make(region: Region, device: str = "cpu") -> Plan:
    """The plan of a region whose kernel runs on a kind of device. Raises Unsupported with the reason."""
    for node in region.nodes:
        if (reason := reason_against(node)) is not None:
            raise Unsupported(reason)
    space = _space(region)
    if any(isinstance(e, int) and e == 0 for e in space):
        raise Unsupported("a region without elements")
    if any(seen_by_callers(n) and _of_an_input(region, n) for n in region.outputs):
        raise Unsupported("a view of an input that callers see")
    order = _order_seen(region, space)
    outputs = _outputs(region, space, order, device)
    if order is None and _of_images(region, space, outputs):
        last = (0, *range(2, len(space)), 1)
        with contextlib.suppress(Unsupported):  # a reduction over what is not innermost then
            return _finish(region, space, last, _outputs(region, space, last, device))
    return _finish(region, space, order, outputs)


def _outputs(region: Region, sizes: tuple[Extent, ...], order: tuple[int, ...] | None, device: str) -> list[Output]:
    """The results of a region, which have these sizes, or one element less per row, and lie in this order."""
    space = in_order(sizes, order)
    build, members, memo = Builder(region, space, device, order), set(region.nodes), dict[Any, Value]()
    outputs = []
    for k, node in enumerate(region.outputs):
        at, per_row = build.identity(), False
        if not equal_shapes(shape(node), sizes):
            per_row, at = True, (*at[:-1], None)
            if equal_shapes(shape(node), sizes[:-1]):
                at = at[:-1]
            elif not equal_shapes(shape(node), (*sizes[:-1], 1)):
                raise Unsupported(f"the output {node.name} has another shape than the region")
        value = read(build, members, memo, node, at)
        if per_row and value.vary:
            raise Unsupported(f"the output {node.name} takes one column of a row")
        outputs.append(Output(value, per_row, output_access(len(region.inputs) + k, space, per_row)))
    return outputs


def _of_an_input(region: Region, node: fx.Node) -> bool:
    """Whether a node of a region shows elements of one of its inputs in another way: eager computes nothing for it."""
    while node in region.nodes and name_of(node) in VIEWS:
        node = node.all_input_nodes[0]
    return node not in region.nodes


def _order_seen(region: Region, space: tuple[Extent, ...]) -> tuple[int, ...] | None:
    """The order in which eager leaves those results that callers see; None if it is that of the dimensions, or none."""
    orders = {order_in_memory(n.meta["val"]) for n in region.outputs if seen_by_callers(n)}
    if len(orders) != 1 or any(not equal_shapes(shape(n), space) for n in region.outputs):
        return None
    (order,) = orders
    return None if order == tuple(range(len(space))) else order


def _of_images(region: Region, space: tuple[Extent, ...], outputs: list[Output]) -> bool:
    """Whether most of what is read for the results are images with channels last: then the results are such images.

    Eager would keep them so, and the convolution that reads them wants them so. Callers get what the trace says, and an
    explicit copy is contiguous.
    """
    rank, votes = len(space), 0
    if rank < 4 or all(map(is_one, space[2:])):
        return False
    if any(not equal_shapes(shape(n), space) or _wants_contiguous(n) for n in region.outputs):
        return False
    tensors = [n.meta["val"] for n in region.inputs]
    for value in reach([o.value for o in outputs]):
        if value.op == "load":
            strides = access_of(value, tensors, rank).strides
            inner = [strides[0], *strides[2:], strides[1]]
            last = strides[1] == 1 and all(a != 0 and not (a - b).is_negative for a, b in itertools.pairwise(inner))
            read_here = (e for e, s in zip(space, strides, strict=True) if s != 0 and isinstance(e, int))
            votes += math.prod(read_here) if last else -math.prod(read_here)
    return votes > 0


def _wants_contiguous(node: fx.Node) -> bool:
    """Whether a result is a copy for its layout, or seen by callers, or flattened with its channels in front."""
    flat = (u for u in node.users if name_of(u) in RESHAPES and not equal_shapes(shape(u)[:2], shape(node)[:2]))
    return seen_by_callers(node) or name_of(node) in ("clone", "contiguous") or any(flat)


def result_of(node: fx.Node) -> torch.Tensor:
    """What the kernel writes for an output: a contiguous tensor, also where eager would keep permuted strides.

    Later readers take layouts as they come, except callers of the program and code compiled for symbolic strides.
    """
    value: torch.Tensor = node.meta["val"]
    if contiguous(value):
        return value
    symbolic = any(isinstance(s, torch.SymInt) for s in (*value.shape, *value.stride()))
    if symbolic or seen_by_callers(node):
        raise Unsupported(f"the output {node.name} is not contiguous")
    return value.new_empty(value.shape)


def _space(region: Region) -> tuple[Extent, ...]:
    for node in region.nodes:
        if name_of(node) in REDUCING:
            return shape(node.all_input_nodes[0])
    space = shape(region.outputs[0])
    if not space:
        raise Unsupported("a region of scalars")
    return space


def equal_shapes(a: Iterable[Extent], b: Iterable[Extent]) -> bool:
    """Whether two shapes are equal by their expressions."""
    a, b = tuple(a), tuple(b)
    return len(a) == len(b) and all(map(same, a, b))


def output_access(position: int, space: tuple[Extent, ...], per_row: bool) -> Access:
    """The walk of a contiguous output."""
    strides: list[sympy.Expr] = []
    step: sympy.Expr = sympy.Integer(1)
    for k, extent in enumerate(reversed(space)):
        if k == 0 and per_row:
            strides.append(sympy.Integer(0))
            continue
        strides.append(step)
        step = step * expression(extent)
    return Access(position, strides[::-1], sympy.Integer(0))


def _finish(region: Region, sizes: tuple[Extent, ...], order: tuple[int, ...] | None, outputs: list[Output]) -> Plan:
    results = [result_of(n) if order is None else in_memory(n.meta["val"], order) for n in region.outputs]
    space, tensors = in_order(sizes, order), [*(n.meta["val"] for n in region.inputs), *results]
    reached = reach([o.value for o in outputs])
    loads = {v: access_of(v, tensors, len(space)) for v in reached if v.op in ("load", "gather", "pick")}
    reductions: dict[int, list[Value]] = {}
    for v in reached:
        if v.op == "reduce":
            reductions.setdefault(v.args[0].stage, []).append(v)
    cuts = {bound for v in reached if v.op == "cat" for bound in v.attr}
    shifted = any(a.shift != 0 for a in loads.values())
    accesses = [*loads.values(), *(o.access for o in outputs)]
    looked_up = any(v.op in ("gather", "pick") for v in loads)
    rigid = bool(reductions or cuts or shifted or looked_up or any(o.per_row for o in outputs))
    extents = merge([expression(e) for e in space], accesses, columns_too=not rigid)
    if not rigid:
        extents = _chunk(extents, accesses)
    segments: list[tuple[int, int]] = []
    if extents[-1].is_Integer:
        columns = int(extents[-1])
        edges = sorted({0, columns, *(c for c in cuts if 0 < c < columns)})
        segments = list(itertools.pairwise(edges))
    elif rigid:
        raise Unsupported("the last dimension has a symbolic size")
    gathers = [(v, expression(tensors[v.attr[0]].shape[v.attr[2]])) for v in reached if v.op == "gather"]
    picks = [v for v in reached if v.op == "pick"]
    if any(v.attr != picks[0].attr for v in picks):
        raise Unsupported("rows are put together at different places")
    if any(v.op == "gather" for v in reach([a for v in (*picks, *(v for v, _ in gathers)) for a in v.args])):
        raise Unsupported("a look-up for some rows only, or by the result of another")
    return Plan(tensors, outputs, loads, reductions, segments, extents, gathers, picks[0] if picks else None, order)


def _chunk(extents: list[sympy.Expr], accesses: list[Access]) -> list[sympy.Expr]:
    """Cut a long static row into equal rows of at most CHUNK columns, so that threads can share it."""
    if not extents[-1].is_Integer or int(extents[-1]) <= CHUNK:
        return extents
    columns = int(extents[-1])
    size = next((g * k for g in (64, 16) if columns % g == 0 for k in range(CHUNK // g, 0, -1)
                 if columns // g % k == 0 and g * k >= 256), 0)  # fmt: skip
    if not size:
        return extents
    for a in accesses:
        a.strides.insert(-1, a.strides[-1] * size)
    return [*extents[:-1], sympy.Integer(columns // size), sympy.Integer(size)]


def reach(roots: list[Value]) -> list[Value]:
    """All values that the roots need, in a fixed order."""
    seen: dict[Value, None] = {}
    stack = list(reversed(roots))
    while stack:
        v = stack.pop()
        if v not in seen:
            seen[v] = None
            stack.extend(reversed(v.args))
    return list(seen)


def elements(plan: Plan) -> int | None:
    """Number of elements of the space, None if symbolic."""
    if all(e.is_Integer for e in plan.extents):
        return math.prod(int(e) for e in plan.extents)
    return None
