"""Keys and values that are read through an index: pages of a pool, or places of a ring, put together for attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from ...passes.nodes import RESHAPES
from ..base import Region
from .layout import equal, expression
from .moves import TURNS, turn_of
from .rules import name_of
from .values import Unsupported, bound, dense

VIEWS = (*RESHAPES, *TURNS, "unsqueeze", "squeeze")
LOOK_UPS = ("index", "index_select")

Atom = tuple[bool, int]  # whether it is a dimension of the index, and which one; else of what is read


@dataclass(frozen=True)
class Walk:
    """A tensor that is never made: its shape, and how far apart in memory its neighbours would be."""

    shape: tuple[Any, ...]
    steps: tuple[sympy.Expr, ...]

    def stride(self, dim: int) -> sympy.Expr:
        """Elements between neighbours along a dimension."""
        return self.steps[dim]


@dataclass(frozen=True)
class Look:
    """A tensor [..., keys, features] whose key k lies where entry k // page of an index says, k % page places on.

    Attributes:
        source: what is read, a region input.
        index: int32 or int64 tensor of entries, a region input.
        own: the tensor's walk over the source, entries not counted.
        entries: its walk over the index; along the keys the step from one entry to the next.
        page: keys that share an entry.
        stride: elements of the source between two entries.
        count: entries of the source.
        wraps: whether a negative entry counts from the end.
        nodes: what the region computes it by.
    """

    source: fx.Node
    index: fx.Node
    own: Walk
    entries: Walk
    page: sympy.Expr
    stride: sympy.Expr
    count: sympy.Expr
    wraps: bool
    nodes: tuple[fx.Node, ...]


def chain(node: fx.Node) -> list[fx.Node]:
    """The nodes from a look-up by one index to this view of it; none if it is no such view."""
    nodes = [node]
    while name_of(nodes[-1]) in VIEWS:
        nodes.append(nodes[-1].all_input_nodes[0])
    return nodes if _look_up(nodes[-1]) is not None else []


def _look_up(node: fx.Node) -> tuple[fx.Node, int, fx.Node] | None:
    """What is read, along which dimension, and by which index."""
    if name_of(node) not in LOOK_UPS:
        return None
    given = bound(node)
    if name_of(node) == "index_select":
        source, dim, index = given["self"], given["dim"] % dense(given["self"]).dim(), given["index"]
    else:
        source, places = given["self"], [d for d, i in enumerate(given["indices"]) if i is not None]
        if len(places) != 1:
            return None
        dim, index = places[0], given["indices"][places[0]]
    value = index.meta.get("val")
    whole = isinstance(value, torch.Tensor) and value.dtype in (torch.int32, torch.int64)
    return (source, dim, index) if whole else None


def look(region: Region, operand: fx.Node) -> Look:
    """How an operand of attention that the region looks up is read. Raises Unsupported with the reason."""
    nodes = chain(operand)
    found = _look_up(nodes[-1]) if nodes and all(n in region.nodes for n in nodes) else None
    if found is None:
        raise Unsupported("attention with other operators")
    source, dim, index = found
    tensor, table = dense(source), dense(index)
    if tensor.dtype is not dense(operand).dtype:
        raise Unsupported("attention over keys that are looked up in another dtype")
    kept = [(False, d) for d in range(tensor.dim())]
    dims: list[tuple[Atom, ...]] = [(a,) for a in (*kept[:dim], *((True, d) for d in range(table.dim())),
                                                   *kept[dim + 1 :])]  # fmt: skip
    for node in reversed(nodes[:-1]):
        dims = _viewed(node, dims, lambda atom: expression((table if atom[0] else tensor).shape[atom[1]]))
    *lead, key, feature = dims
    plain = all(len(d) < 2 for d in lead) and [looked for looked, _ in feature] == [False]
    if not plain or [looked for looked, _ in key] not in ([True], [True, False]):
        raise Unsupported("attention over keys that are looked up otherwise than one by one or by pages")
    shape = tuple(dense(operand).shape)
    page = expression(tensor.shape[key[1][1]]) if len(key) == 2 else sympy.Integer(1)
    own = [_step(tensor, [a for a in d if not a[0]]) for d in (*lead, key[1:], feature)]
    entries = [_step(table, [a for a in d if a[0]]) for d in (*lead, key[:1], feature)]
    return Look(source, index, Walk(shape, tuple(own)), Walk(shape, tuple(entries)), page,
                expression(tensor.stride(dim)), expression(tensor.shape[dim]),
                name_of(nodes[-1]) == "index", tuple(nodes))  # fmt: skip


def _step(tensor: torch.Tensor, atoms: Sequence[Atom]) -> sympy.Expr:
    return expression(tensor.stride(atoms[0][1])) if atoms else sympy.Integer(0)


def _viewed(node: fx.Node, dims: list[tuple[Atom, ...]], size: Any) -> list[tuple[Atom, ...]]:
    """Which dimensions of index and source make up each dimension of a view, given those of what is viewed."""
    if name_of(node) in TURNS:
        return [dims[d] for d in turn_of(bound(node), len(dims))]
    left = [d for d in dims if d and not all(size(a) == 1 for a in d)]
    found: list[tuple[Atom, ...]] = []
    for wanted in map(expression, dense(node).shape):
        part: tuple[Atom, ...] = ()
        while left and not equal(sympy.Mul(*map(size, part)), wanted):
            part += left.pop(0)
        if not equal(sympy.Mul(*map(size, part)), wanted):
            raise Unsupported("attention over keys whose index is split")
        found.append(part)
    if left:
        raise Unsupported("attention over keys whose index is split")
    return found
