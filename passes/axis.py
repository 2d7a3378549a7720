"""Axes and what is known of them: the data that analysis 1 fills (see `axes`), and what its rules see."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
from torch import fx

from .nodes import expression

ONE = sympy.Integer(1)


class Unknown(Exception):
    """The axes of a result cannot be told; the message is the reason."""


@dataclass(eq=False)
class Axis:
    """One logical axis.

    Attributes:
        size: number of elements.
        name: where it was first seen: a value and its dimension.
        same: the axis that this one was found to be equal to.
        parts: the axes that it was taken apart into, the outermost first.
    """

    size: sympy.Expr
    name: str
    same: Axis | None = None
    parts: tuple[Axis, ...] = ()

    def __str__(self) -> str:
        return f"{self.name}={self.size}"


Dim = tuple[Axis, ...]


@dataclass(frozen=True)
class Taken:
    """A part of an axis: elements start, start + step, ... of `source`."""

    source: Dim
    start: Any
    step: int
    node: fx.Node


@dataclass(frozen=True)
class Joined:
    """An axis put together from pieces, in order."""

    pieces: tuple[tuple[fx.Node, Dim], ...]
    node: fx.Node


@dataclass
class Axes:
    """The axes of a program; they print as one line per call.

    Attributes:
        graph: the program's.
        values: dimensions by node; a list of them for nodes that yield several tensors.
        mixes: dimensions along which a node's result depends on more than its own element: what it reduces,
            normalises, contracts or reorders.
        unknown: why a node's result is not understood.
        taken: axes that are a part of another one.
        joined: axes that were concatenated.
    """

    graph: fx.Graph
    values: dict[fx.Node, Any] = field(default_factory=dict)
    mixes: dict[fx.Node, list[Dim]] = field(default_factory=dict)
    unknown: dict[fx.Node, str] = field(default_factory=dict)
    taken: dict[Axis, Taken] = field(default_factory=dict)
    joined: dict[Axis, Joined] = field(default_factory=dict)

    def of(self, node: fx.Node) -> list[Dim]:
        """The dimensions of a node that yields one tensor, in terms of axes that are not taken apart further."""
        found = self.values[node]
        return [self.resolve(d) for d in found] if isinstance(found, list) else []

    def mixed(self, node: fx.Node) -> list[Dim]:
        """The dimensions that a node mixes."""
        return [self.resolve(d) for d in self.mixes.get(node, ())]

    def resolve(self, dim: Sequence[Axis]) -> Dim:
        """A dimension in terms of axes that are not taken apart further."""
        found: list[Axis] = []
        for axis in dim:
            root = _root(axis)
            found += self.resolve(root.parts) if root.parts else [root]
        return tuple(found)

    def unify(self, a: Dim, b: Dim) -> None:
        """Note that two dimensions are the same, element by element. Raises Unknown if they cannot be."""
        left, right = list(self.resolve(a)), list(self.resolve(b))
        while left and right:
            x, y = left[0], right[0]
            if x is y or x.size == y.size:
                if x is not y:
                    y.same = x
                del left[0], right[0]
            elif ratio(x.size, y.size) is not None:
                left[:1] = self.split(x, y.size)
            elif ratio(y.size, x.size) is not None:
                right[:1] = self.split(y, x.size)
            else:
                raise Unknown(f"an axis of {x.size} meets one of {y.size}")
        if left or right:
            raise Unknown("dimensions of different sizes meet")

    def split(self, axis: Axis, outer: sympy.Expr) -> Dim:
        """Take an axis apart, the outer part of this size."""
        inner = ratio(axis.size, outer)
        assert inner is not None and not axis.parts
        axis.parts = Axis(outer, f"{axis.name}/0"), Axis(inner, f"{axis.name}/1")
        return axis.parts

    def __str__(self) -> str:
        """One line per call: its dimensions, what it mixes, and why it is unknown; at the end the axes."""
        names, lines = dict[Axis, str](), list[str]()

        def show(dim: Dim) -> str:
            return "*".join(names.setdefault(a, f"a{len(names)}") for a in self.resolve(dim)) or "1"

        for node in self.graph.nodes:
            if node not in self.values or not isinstance(self.values[node], list):
                continue
            line = f"{node.name} [{', '.join(map(show, self.values[node]))}]"
            mixed = dict.fromkeys(show(d) for d in self.mixes.get(node, ()))
            line += f" mixes {', '.join(mixed)}" if mixed else ""
            line += f" unknown: {self.unknown[node]}" if node in self.unknown else ""
            lines.append(line)
        return "\n".join([*lines, *(f"{short} = {axis}" for axis, short in names.items())])


def _root(axis: Axis) -> Axis:
    while axis.same is not None:
        if axis.same.same is not None:
            axis.same = axis.same.same
        axis = axis.same
    return axis


def ratio(a: sympy.Expr, b: sympy.Expr) -> sympy.Expr | None:
    """a / b if it is a whole expression, else None."""
    if a.is_Integer and b.is_Integer:
        return sympy.Integer(a // b) if b != 0 and a % b == 0 else None
    quotient = sympy.cancel(a / b)
    return quotient if sympy.denom(quotient) == 1 else None


@dataclass
class Site:
    """A node whose result a rule explains.

    Attributes:
        axes: the analysis so far.
        node: the call.
        args: its arguments by name.
    """

    axes: Axes
    node: fx.Node
    args: dict[str, Any]

    def dims(self, name: str) -> list[Dim]:
        """Dimensions of a tensor argument."""
        return self.dims_of(self.args[name])

    def dims_of(self, value: Any) -> list[Dim]:
        """Dimensions of a value. Raises Unknown if it is no single tensor."""
        found = self.axes.values.get(value) if isinstance(value, fx.Node) else None
        if not isinstance(found, list):
            raise Unknown(f"{value} is not a tensor")
        return list(found)

    def tensors(self) -> Iterator[list[Dim]]:
        """Dimensions of every tensor argument, those in lists included."""
        for source in self.node.all_input_nodes:
            found = self.axes.values.get(source)
            if isinstance(found, list):
                yield list(found)

    def sizes(self, index: int | None = None) -> list[sympy.Expr]:
        """Sizes of the result, or of one of several results."""
        value = self.node.meta["val"]
        value = value if index is None else value[index]
        return [expression(s) for s in value.shape]

    def fresh(self, dim: int, index: int | None = None) -> Dim:
        """A new axis for a dimension of the result."""
        size = self.sizes(index)[dim]
        suffix = str(dim) if index is None else f"{index}.{dim}"
        return () if size == ONE else (Axis(size, f"{self.node.name}.{suffix}"),)

    def unify(self, a: Dim, b: Dim) -> None:
        """Note that two dimensions are the same; a dimension of size one goes with any."""
        if a and b:
            self.axes.unify(a, b)

    def mix(self, *dims: Dim) -> None:
        """Note that the node mixes along dimensions."""
        self.axes.mixes.setdefault(self.node, []).extend(d for d in dims if d)
