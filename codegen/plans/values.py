"""The row program of a region: what each element of the outputs is, as a small expression graph over (row, column).

Layout operators vanish here: they only change the coordinates at which their argument is read. Reductions over the
last dimension become ``reduce`` values, one number per row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from ..base import Region

KINDS = {
    torch.float32: "float32",
    torch.bfloat16: "float32",
    torch.float16: "float32",
    torch.int64: "int64",
    torch.int32: "int32",
    torch.bool: "bool",
}
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
HEAVY = {"exp": 12, "erf": 12, "tanh": 12, "log": 14, "log1p": 16, "expm1": 14, "sigmoid": 14, "div": 4, "sqrt": 4}

Extent = Any  # a static int or a torch.SymInt
COLUMN, FIXED = -1, -2
Coordinate = tuple[int, int] | None  # (dimension of the space or COLUMN, shift), (FIXED, index), or index zero


class Unsupported(Exception):
    """The region has no row program; the message is the reason."""


@dataclass(eq=False)
class Value:
    """One value per (row, column), or per row where `vary` is false.

    Attributes:
        op: ``load``, ``gather`` (a load with one index that is a value), ``const``, ``reduce``, ``cat`` (of columns),
            ``pick`` (of rows), ``product``, or the name of an elementwise operation.
        args: operands.
        attr: what else defines it: input and coordinates, the constant, the kind of reduction, boundaries, a dtype.
        kind: scalar type that it is computed in: float32, int64, int32 or bool.
        vary: whether it depends on the column.
        stage: number of reductions that must be finished before it can be computed.
        cost: rough number of vector instructions to compute it again from memory and row values.
    """

    op: str
    args: tuple[Value, ...]
    attr: Any
    kind: str
    vary: bool
    stage: int
    cost: int


@dataclass
class Builder:
    """Makes values as torch computes them on a kind of device; equal values are made once.

    Attributes:
        space: sizes of the space, rows before columns.
        order: dimensions of the region's tensors in the order in which the space has them (None: as they are).
    """

    region: Region
    space: tuple[Extent, ...]
    device: str = "cpu"
    order: tuple[int, ...] | None = None
    table: dict[Any, Value] = field(default_factory=dict)

    def op(self, name: str, *args: Value, kind: str = "float32", attr: Any = None) -> Value:
        """An elementwise value."""
        vary = any(a.vary for a in args)
        cost = HEAVY.get(name, 1) + sum(a.cost for a in args if a.vary)
        return self._make(name, args, attr, kind, vary, max((a.stage for a in args), default=0), cost)

    def const(self, value: float | int | bool, kind: str = "float32") -> Value:
        """A constant."""
        if kind == "float32":
            value = torch.tensor(value, dtype=torch.float32).item()  # rounded here, so that 1e300 becomes Inf
        else:
            value = bool(value) if kind == "bool" else int(value)
        return self._make("const", (), repr(value), kind, False, 0, 0)

    def reduce(self, how: str, value: Value) -> Value:
        """``sum``, ``max``, ``min`` or ``peak`` (a maximum that may lose NaN) of each row."""
        if value.kind != "float32":
            raise Unsupported(f"a reduction of {value.kind} values")
        value = value if value.vary else self.op("spread", value, attr="column")
        value.vary = True
        return self._make("reduce", (value,), how, "float32", False, value.stage + 1, 0)

    def cast(self, value: Value, kind: str) -> Value:
        """Conversion to another computing type."""
        return value if value.kind == kind else self.op("cast", value, kind=kind)

    def rounded(self, value: Value, dtype: torch.dtype) -> Value:
        """Rounded to a lower precision and back."""
        if dtype not in (torch.bfloat16, torch.float16) or value.kind != "float32":
            return value
        if value.op == "const":
            return self.const(torch.tensor(float(value.attr), dtype=dtype).item())
        return self.op("round", value, attr=str(dtype).removeprefix("torch."))

    def load(self, node: fx.Node, coords: tuple[Coordinate, ...]) -> Value:
        """An element of a region input."""
        if node not in self.region.inputs:
            raise Unsupported(f"{node.name} is read at other elements than its own")
        kind, vary = KINDS[node.meta["val"].dtype], _varies(coords)
        return self._make("load", (), (self.region.inputs.index(node), coords), kind, vary, 0, 1)

    def gather(self, node: fx.Node, dim: int, index: Value, coords: tuple[Coordinate, ...]) -> Value:
        """An element of a region input whose index along `dim` is a value: on CPUs one that a whole row shares."""
        if node not in self.region.inputs or (index.vary and self.device == "cpu") or index.stage:
            raise Unsupported(f"{node.name} is looked up by more than one index per row")
        coords = (*coords[:dim], None, *coords[dim + 1 :])
        where = self.region.inputs.index(node), coords, dim
        vary = index.vary or _varies(coords)
        return self._make("gather", (index,), where, KINDS[node.meta["val"].dtype], vary, 0, 1)

    def pick(self, parts: Sequence[Value], at: Coordinate, bounds: tuple[int, ...]) -> Value:
        """Part k in the rows whose index along the dimension of `at` is bounds[k] or more."""
        vary, stage = any(p.vary for p in parts), max(p.stage for p in parts)
        cost = max(p.cost for p in parts)
        return self._make("pick", tuple(parts), (at, bounds), parts[0].kind, vary, stage, cost)

    def product(self, kind: str = "float32", start: int = 0) -> Value:
        """The element of a matrix product at this row, so many columns after this one: what the accumulators hold."""
        return self._make("product", (), start, kind, True, 0, 0)

    def cat(self, parts: Sequence[Value], bounds: tuple[int, ...]) -> Value:
        """Part k from column bounds[k] on."""
        stage = max(p.stage for p in parts)
        return self._make("cat", tuple(parts), bounds, parts[0].kind, True, stage, max(p.cost for p in parts))

    @property
    def sizes(self) -> tuple[Extent, ...]:
        """Shape of a tensor that fills the space."""
        order = self.order or range(len(self.space))
        return tuple(self.space[list(order).index(d)] for d in range(len(self.space)))

    def identity(self) -> tuple[Coordinate, ...]:
        """Where a tensor that fills the space is read."""
        own = (*(None if is_one(e) else (k, 0) for k, e in enumerate(self.space[:-1])), (COLUMN, 0))
        return own if self.order is None else tuple(own[self.order.index(d)] for d in range(len(own)))

    def _make(self, op: str, args: tuple[Value, ...], attr: Any, kind: str, vary: bool, stage: int, cost: int) -> Value:
        key = (op, tuple(map(id, args)), attr, kind)
        if key not in self.table:
            self.table[key] = Value(op, args, attr, kind, vary, stage, cost)
        return self.table[key]


def _varies(coords: tuple[Coordinate, ...]) -> bool:
    return any(c is not None and c[0] == COLUMN for c in coords)


def in_order(sizes: tuple[Extent, ...], order: Sequence[int] | None) -> tuple[Extent, ...]:
    """Sizes of dimensions that are put into another order; None leaves them."""
    return sizes if order is None else tuple(sizes[d] for d in order)


def is_one(extent: Extent) -> bool:
    """Whether an extent is statically one."""
    return isinstance(extent, int) and extent == 1


def same(a: Extent, b: Extent) -> bool:
    """Whether two extents are equal by their expressions; adds no guard."""
    return str(a) == str(b)


def shape(node: fx.Node) -> tuple[Extent, ...]:
    """Shape of a node's value."""
    return tuple(node.meta["val"].shape)


def dense(node: Any) -> torch.Tensor:
    """The fake tensor of a node. Raises Unsupported unless it is a dense one."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    if not isinstance(value, torch.Tensor) or value.layout is not torch.strided:
        raise Unsupported(f"{node} is not a dense tensor")
    return value


def devices(region: Region) -> set[str]:
    """Kinds of devices that the region's tensors are on."""
    values = [v for n in (*region.inputs, *region.nodes) for v in pytree.tree_leaves(n.meta.get("val"))]
    return {v.device.type for v in values if isinstance(v, torch.Tensor)}


def bound(node: fx.Node) -> dict[str, Any]:
    """The arguments of a node by name, defaults filled in."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    values = {a.name: a.default_value for a in schema if a.has_default_value()}
    values.update({a.name: v for a, v in zip(schema, node.args, strict=False)})
    values.update(node.kwargs)
    return values


def broadcast(coords: tuple[Coordinate, ...], to: tuple[Extent, ...], of: tuple[Extent, ...]) -> tuple[Coordinate, ...]:
    """Coordinates in a tensor of shape `of` that is broadcast to shape `to`, read at `coords`."""
    tail = zip(coords[len(to) - len(of) :], to[len(to) - len(of) :], of, strict=True)
    return tuple(None if is_one(o) and not is_one(t) else c for c, t, o in tail)


@dataclass
class Site:
    """A node read at coordinates: what a rule sees."""

    build: Builder
    node: fx.Node
    coords: tuple[Coordinate, ...]
    args: dict[str, Any]
    read: Any  # (node, coords) -> Value

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the node."""
        found: torch.dtype = self.node.meta["val"].dtype
        return found

    @property
    def kind(self) -> str:
        """Type that the node is computed in."""
        return KINDS[self.dtype]

    def value(self, name: str, kind: str | None = None) -> Value:
        """Operand at this element, in the node's own type unless told otherwise."""
        return self.of(self.args[name], kind or self.kind)

    def of(self, arg: Any, kind: str) -> Value:
        """A node or number at this element."""
        if isinstance(arg, fx.Node):
            at = broadcast(self.coords, shape(self.node), shape(arg))
            return self.build.cast(self.read(arg, at), kind)
        if not isinstance(arg, (int, float, bool)):
            raise Unsupported(f"{self.node.target} with an argument that is not a number")
        return self.build.const(arg, kind)

    def row(self, name: str, kind: str = "float32") -> Value:
        """The operand of a reduction over the last dimension, at every column of this row."""
        arg = self.args[name]
        sizes, own = self.build.sizes, self.build.identity()
        if len(shape(arg)) != len(sizes) or not all(map(same, shape(arg), sizes)):
            raise Unsupported(f"{self.node.target} reduces a tensor of another shape than the region's")
        if own[-1] != (COLUMN, 0):
            raise Unsupported(f"{self.node.target} reduces a dimension that is not the last in memory")
        given = self.coords if len(self.coords) == len(own) else (*self.coords, own[-1])
        if given[:-1] != own[:-1]:
            raise Unsupported(f"{self.node.target} is read at other rows than its own")
        return self.build.cast(self.read(arg, own), kind)

    def last_dim(self, name: str = "dim") -> None:
        """Raise unless the node works along the last dimension only."""
        dims = self.args.get(name)
        rank = len(shape(self.args["self" if "self" in self.args else "input"]))
        listed = dims if isinstance(dims, (list, tuple)) else [dims]
        if len(listed) != 1 or listed[0] is None or listed[0] % rank != rank - 1:
            raise Unsupported(f"{self.node.target} along another dimension than the last")

    @property
    def columns(self) -> int:
        """Static size of the last dimension."""
        size: int = self.build.space[-1]
        return size
