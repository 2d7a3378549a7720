"""Shape editing: from one value on, an axis is shorter, and its elements are chosen anew in every sample.

All that descends from the value follows: sizes baked into views are dealt out again, other tensors that carry the axis
(positions, masks, rotary tables) are taken at the chosen elements, and every shape is inferred anew and compared with
what the axes say it must be, so that no old size is left. An operator for which the order or the number of elements
matters stops the edit with its name.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from . import ops
from .axis import Axes, Dim
from .axis_rules import NORMS, REDUCTIONS, by_element
from .nodes import RESHAPES, arguments, expression, operator_name
from .program import Program

aten = torch.ops.aten
WEIGHED = {"mean", "sum", "amax", "amin", "any", "all"}  # sums must be weighted by whoever merges, extremes need not be
SOFTMAX = {"softmax", "_softmax", "_safe_softmax", "log_softmax", "_log_softmax"}
ALONE = {"linear", "embedding", *SOFTMAX, *NORMS, *REDUCTIONS}
PRODUCTS = {"matmul", "bmm", "mm", "baddbmm", "addmm", "einsum"}
ARRANGED = {"permute", "transpose", "t", "mT", "unsqueeze", "squeeze", "flatten", "stack"}
PIECES = {"split", "split_with_sizes", "chunk", "unbind", "cat"}
WHOLE = 1 << 40  # ends of slices from here on mean "to the end"


class Stopped(Exception):
    """The axis cannot be made shorter; `node` is where."""

    def __init__(self, node: fx.Node, reason: str) -> None:
        super().__init__(reason)
        self.node = node


def _set(node: fx.Node, *args: Any) -> bool:
    """Replace all arguments but the first."""
    node.args, node.kwargs = (node.args[0], *args), {}
    return True


def contains(dim: Dim, axis: Dim) -> bool:
    """Whether a dimension is made of the whole axis and perhaps others."""
    return any(dim[k : k + len(axis)] == axis for k in range(len(dim) - len(axis) + 1))


@dataclass
class Shortening:
    """One edit.

    Attributes:
        program: what is edited, in place.
        axes: its axes; nodes that the edit inserts get theirs.
        axis: what gets shorter, as one dimension.
        activations: nodes that hold activations: they cannot be taken at the chosen elements, since they would be
            read as they were before the edit.
        fixed: where elements that keep places known beforehand are in `at`, and where in `new`; below zero, counted
            from the last.
        at: the value from which on the axis is shorter, [batch, axis, ...].
        new: the same, shorter; it stands after `at`, and what computes it between them.
        kept: [batch, shorter axis], the place of each element of `new` along the axis of `at`; None: their places are
            new ones, counted from zero.
        in_order: whether what stays keeps its order and what it stands for.
        inside: nodes that may become shorter, None for all that follow; `restore` then serves those outside.
        spans: dimensions that get shorter: the axis, and slices of it that lack only so many of its first and last
            elements, all of them fixed.
    """

    program: Program
    axes: Axes
    axis: Dim
    activations: set[fx.Node]
    fixed: Mapping[int, int]
    at: fx.Node
    new: fx.Node
    kept: fx.Node | None
    in_order: bool = False
    inside: frozenset[fx.Node] | None = None
    changed: set[fx.Node] = field(default_factory=set)
    taken: dict[tuple[fx.Node, int], fx.Node] = field(default_factory=dict)
    spans: dict[Dim, tuple[int, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.spans[self.axis] = 0, 0

    def span(self, dim: Dim) -> Dim | None:
        """The dimension that gets shorter which this one is made of, perhaps with others."""
        return next((s for s in self.spans if contains(dim, s)), None)

    def apply(self) -> None:
        """Let what comes after `new` read it instead of `at`, and follow. Raises Stopped: the graph is then void."""
        for user in [u for u in self.at.users if u > self.new and self._follows(u)]:
            user.replace_input_with(self.at, self.new)
        self.axes.values[self.new] = list(self.axes.of(self.at))
        self.activations.add(self.new)
        self.changed.add(self.new)
        for node in [n for n in self.program.graph.nodes if n > self.new and n.op != "output"]:
            if self._follows(node) and any(n in self.changed for n in node.all_input_nodes):
                self._follow(node)

    def restore(self, places: fx.Node, residual: bool = False) -> None:
        """Let what is not inside read the axis at full length: each element as the one that it became.

        Args:
            places: [batch, axis], where each element went.
            residual: add to each element, as it was at `at`, what the element that it became has changed by. That is
                for values of a residual stream.
        """
        call, take = self.program.call, ops.take()
        for node in sorted(self.changed - {self.new}):
            readers = [u for u in node.users if u not in self.changed and not self._follows(u)]
            if not readers or node in self.taken.values():
                continue
            if self.axes.of(node)[1:2] != [self.axis] or len(self.places(node)) != 1:
                raise Stopped(node, "it carries the shorter axis out of the part that may be shorter")
            before = node.next
            if residual:
                change = call(aten.sub.Tensor, node, self.new, before=before)
                whole = call(aten.add.Tensor, self.at, call(take, change, 1, places, before=before), before=before)
            else:
                whole = call(take, node, 1, places, before=before)
            self.axes.values[whole] = list(self.axes.of(node))
            for reader in readers:
                reader.replace_input_with(node, whole)

    def _follows(self, node: fx.Node) -> bool:
        return self.inside is None or node in self.inside

    def places(self, node: fx.Node) -> list[int]:
        """Dimensions of a node's tensor that carry the axis. Raises Stopped if one carries a part of it."""
        found = []
        for k, dim in enumerate(self.axes.of(node)):
            if self.span(dim) is not None:
                found.append(k)
            elif any(a in dim for s in self.spans for a in s):
                raise Stopped(node, "it takes the axis apart")
        return found

    def _follow(self, node: fx.Node) -> None:
        value = node.meta.get("val")
        if not isinstance(value, (torch.Tensor, tuple, list)):
            self.program.infer(node)  # a size
            return
        self._check(node)
        places = self.places(node) if isinstance(value, torch.Tensor) else []  # a slice may have become a span
        self._take_sides(node)
        self._deal(node, places)
        self.program.infer(node)
        self._verify(node, value)
        if places or (not isinstance(value, torch.Tensor) and self._any(node)):
            self.changed.add(node)

    def _any(self, node: fx.Node) -> bool:
        """Whether one of several results carries the axis."""
        return any(self.span(self.axes.resolve(d)) for dims in self.axes.values[node] or () for d in dims or ())

    def _check(self, node: fx.Node) -> None:
        """Raise Stopped where the operator's answer depends on the order or the number of the axis's elements."""
        if node in self.axes.unknown:
            raise Stopped(node, f"its axes are not known: {self.axes.unknown[node]}")
        name = operator_name(node)
        mixed = any(self.span(d) for d in self.axes.mixed(node))
        if node.target is operator.getitem or by_element(node):
            return
        if name == "scaled_dot_product_attention":
            if arguments(node)["is_causal"] and not self.in_order:
                raise Stopped(node, "attention is causal: tokens of different places would be told apart by order")
            return
        if name in WEIGHED or (name in SOFTMAX and self.in_order):
            return
        if name in PRODUCTS:
            if mixed and any(n not in self.changed for n in node.all_input_nodes if self._carries(n)):
                raise Stopped(node, "it mixes the axis by a matrix of its own")
            return
        if name in ("slice", "select") and (not self._along(node) or self._repoint(node, name)):
            return
        known = name in ALONE | ARRANGED | RESHAPES | PIECES | {"expand", "repeat"}
        if mixed or not known or (name in PIECES | {"slice", "select"} and self._along(node)):
            raise Stopped(node, f"{name} works along the axis")

    def _carries(self, node: fx.Node) -> bool:
        return isinstance(node.meta.get("val"), torch.Tensor) and any(map(self.span, self.axes.of(node)))

    def _along(self, node: fx.Node) -> bool:
        """Whether the operator's `dim` is one that carries the axis in a tensor argument."""
        given = arguments(node)
        tensors = given["tensors"] if "tensors" in given else [given["self"]]
        dims = [self.axes.of(t) for t in tensors]
        return any(self.span(d[given["dim"] % len(d)]) for d in dims)

    def _repoint(self, node: fx.Node, name: str) -> bool:
        """Let a slice or a choice of one element read the same ones after the edit; False if it cannot.

        A slice that leaves out fixed elements only, in front and behind, gives a span.
        """
        given = arguments(node)
        dim, span = given["dim"], self.axes.of(given["self"])[given["dim"]]
        if span not in self.spans:  # flattened together with others
            return False
        size = self.at.meta["val"].shape[1] - sum(self.spans[span])  # before the edit, as the arguments are
        if name == "select":
            place = self._fixed(given["index"], size, span)
            return place is not None and _set(node, dim, place)
        start, end = given["start"] or 0, given["end"]
        if given["step"] != 1 or not isinstance(start, int) or not isinstance(end, (int, type(None))):
            return False
        end = WHOLE if end is None or end >= WHOLE or (isinstance(size, int) and end >= size) else end
        return self._cut_outside(node, span, start, end, size) or self._cut_inside(node, span, start, end, size)

    def _fixed(self, place: Any, size: Any, span: Dim) -> int | None:
        """Where an element of a span is after the edit; None if it is not fixed."""
        if not isinstance(place, int):
            return None
        before, behind = self.spans[span]
        names = [place] if not isinstance(size, int) else [place % size, place % size - size]
        moved = [self.fixed.get(p + before if p >= 0 else p - behind) for p in names]
        return next((p - before if p >= 0 else p + behind for p in moved if p is not None), None)

    def _cut_outside(self, node: fx.Node, span: Dim, start: int, end: int, size: Any) -> bool:
        """A slice that leaves out fixed elements at the ends."""
        given = arguments(node)
        first = start if start >= 0 or not isinstance(size, int) else max(0, start + size)
        last = 0 if end == WHOLE else end - size if end > 0 and isinstance(size, int) else end
        if first < 0 or last > 0:
            return False
        ends = [*range(first), *range(last, 0)]
        if any(self._fixed(p, size, span) != p for p in ends):
            return False
        _set(node, given["dim"], first, last or WHOLE)
        part = self.axes.of(node)[given["dim"]]
        before, behind = self.spans[span]
        ends_of = before + first, behind - last
        if part and self.spans.setdefault(part, ends_of) != ends_of:
            raise Stopped(node, "different parts of the axis meet behind it")
        return True

    def _cut_inside(self, node: fx.Node, span: Dim, start: int, end: int, size: Any) -> bool:
        """A slice of fixed elements that are neighbours after the edit, too."""
        given = arguments(node)
        chosen = range(size)[start:end] if isinstance(size, int) else range(start, 0 if end == WHOLE else end)
        found = [self._fixed(p, size, span) for p in chosen]
        if not found or found[0] is None or found != list(range(found[0], found[0] + len(found))):
            return False
        last = found[0] + len(found)
        crosses = start < 0 < end < WHOLE and not isinstance(size, int)
        return not crosses and _set(node, given["dim"], found[0], last or WHOLE)

    def _take_sides(self, node: fx.Node) -> None:
        """Replace arguments that carry the axis, and do not descend from the edit, by their chosen elements."""
        rank = len(self.axes.of(node)) if isinstance(node.meta["val"], torch.Tensor) else None
        for source in node.all_input_nodes:
            if source in self.changed or not self._carries(source):
                continue
            if source in self.activations:
                raise Stopped(node, f"it reads {source.name}, which is older than the edit")
            if rank is None or operator_name(node) in ("linear", "layer_norm", "rms_norm", "embedding"):
                raise Stopped(node, f"{source.name} carries the axis in a way that cannot be followed")
            if operator_name(node) == "scaled_dot_product_attention":
                rank = len(self.axes.of(arguments(node)["query"]))
            node.replace_input_with(source, self._taken(source, rank, node))

    def _taken(self, source: fx.Node, rank: int, before: fx.Node) -> fx.Node:
        """The chosen elements of a tensor, with a batch dimension, as broadcast against tensors of this rank."""
        if (source, rank) not in self.taken:
            value, dims = source, self.axes.of(source)
            for _ in range(rank - len(dims)):
                value, dims = self.program.call(aten.unsqueeze.default, value, 0, before=before), [(), *dims]
            for place, dim in enumerate(dims):
                if any(a in dim for s in self.spans for a in s):
                    if dim not in self.spans or place == 0:
                        raise Stopped(before, f"{source.name} carries the axis flattened together with others")
                    value = self._chosen(value, place, dim, before)
            self.axes.values[value] = dims if self.kept is None else [self.axes.of(self.at)[0], *dims[1:]]
            self.taken[source, rank] = value
            self.changed.add(value)
        return self.taken[source, rank]

    def _chosen(self, value: fx.Node, place: int, span: Dim, before: fx.Node) -> fx.Node:
        """The chosen elements along one dimension, a span; where places are new, the first ones."""
        call, (first, last) = self.program.call, self.spans[span]
        part = self.new if self.kept is None else self.kept
        if first or last:
            part = call(aten.slice.Tensor, part, 1, first, -last or WHOLE, before=before)
        if self.kept is not None:
            part = call(aten.sub.Tensor, part, first, before=before) if first else part
            return call(ops.take(), value, place, part, before=before)
        count = part.meta["val"].shape[1]
        if not isinstance(count, int):
            count = call(aten.sym_size.int, part, 1, before=before)
        return call(aten.slice.Tensor, value, place, 0, count, before=before)

    def _deal(self, node: fx.Node, places: list[int]) -> None:
        """Sizes of views and expansions that hold the axis."""
        name = operator_name(node)
        if name not in RESHAPES | {"expand"}:
            return
        source, sizes = node.args[0], list(node.args[1])  # type: ignore[arg-type]
        if name == "expand":
            for k in places:
                sizes[k] = -1
        elif len(places) == 1:
            known = [s if s != -1 else n for s, n in zip(sizes, node.meta["val"].shape, strict=True)]
            sizes = [-1 if k == places[0] else n for k, n in enumerate(known)]
            if any(isinstance(n, torch.SymInt) for n in sizes):
                raise Stopped(node, "a view with two open sizes")
        elif places:
            raise Stopped(node, "a view in which the axis occurs twice")
        node.args = (source, sizes, *node.args[2:])

    def _verify(self, node: fx.Node, before: Any) -> None:
        """Compare the inferred shape with what the axes say. Raises Stopped for a size that is left over."""
        after = node.meta["val"]
        whole, short = (expression(n.meta["val"].shape[1]) for n in (self.at, self.new))
        pairs = [(before, after, self.axes.values[node])] if isinstance(after, torch.Tensor) else list(
            zip(before, after, self.axes.values[node], strict=True))  # fmt: skip
        for old, new, dims in pairs:
            if not isinstance(new, torch.Tensor):
                continue
            for size, found, dim in zip(old.shape, new.shape, dims, strict=True):
                wanted, span = expression(size), self.span(self.axes.resolve(dim))
                if span is not None:
                    ends = sum(self.spans[span])
                    wanted = wanted * (short - ends) / (whole - ends)
                if expression(found) != wanted and (wanted - expression(found)).simplify() != 0:
                    raise Stopped(node, f"a size of {found} where {wanted} was expected")
