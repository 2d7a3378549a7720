"""Where a value lies in memory: strides and offsets as expressions of symbols, and how to merge dimensions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch

from ...passes.nodes import expression as expression
from .values import FIXED, Coordinate, Value


def equal(a: sympy.Expr, b: sympy.Expr) -> bool:
    """Whether two expressions are the same polynomial."""
    return bool(sympy.expand(a - b) == 0)


def contiguous(tensor: torch.Tensor) -> bool:
    """Whether the (fake) tensor is contiguous for all values of its symbols; dimensions of size one do not count."""
    expected: sympy.Expr = sympy.Integer(1)
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.stride()), strict=True):
        if expression(size) != 1 and not equal(expression(stride), expected):
            return False
        expected = expected * expression(size)
    return True


def dense_order(sizes: Sequence[Any], strides: Sequence[Any]) -> tuple[int, ...] | None:
    """Dimensions from the outermost to the innermost of a tensor without gaps; None if it has some or overlaps.

    Dimensions of size one stand where their stride puts them; those whose stride fits nowhere are the outermost.
    """
    left, order, step = list(range(len(sizes))), list[int](), sympy.Integer(1)
    while left:
        fits = [d for d in reversed(left) if equal(strides[d], step)]
        inner = next((d for d in fits if sizes[d] == 1), fits[0] if fits else None)
        if inner is None:
            break
        left.remove(inner)
        order.insert(0, inner)
        step = step * sizes[inner]
    return (*left, *order) if all(sizes[d] == 1 for d in left) else None


def order_in_memory(tensor: torch.Tensor) -> tuple[int, ...] | None:
    """`dense_order` of a (fake) tensor for all values of its symbols; that of its dimensions if it is contiguous."""
    if contiguous(tensor):
        return tuple(range(tensor.dim()))
    return dense_order(*([expression(s) for s in each] for each in (tensor.shape, tensor.stride())))


@dataclass
class Access:
    """How one value of the row program walks through one buffer: a stride per dimension of the space."""

    buffer: int
    strides: list[sympy.Expr]
    shift: sympy.Expr


def access_of(value: Value, tensors: Sequence[torch.Tensor], rank: int) -> Access:
    """The access of a load or gather; of a pick, the walk of the index that decides."""
    if value.op == "pick":
        return _walk([1], [value.attr[0]], -1, rank)
    position, coords, *_ = value.attr
    return _walk([expression(s) for s in tensors[position].stride()], coords, position, rank)


def _walk(steps: Sequence[Any], coords: Sequence[Coordinate], position: int, rank: int) -> Access:
    strides: list[sympy.Expr] = [sympy.Integer(0)] * rank
    shift: sympy.Expr = sympy.Integer(0)
    for step, coordinate in zip(steps, coords, strict=True):
        if coordinate is not None:
            dim, start = coordinate
            if dim != FIXED:
                strides[dim] = strides[dim] + step
            shift = shift + step * start
    return Access(position, strides, shift)


def merge(extents: list[sympy.Expr], accesses: Sequence[Access], columns_too: bool) -> list[sympy.Expr]:
    """Merge neighbouring dimensions that every access walks as one; returns the new extents, edits the accesses.

    The last dimension is left alone unless `columns_too`. Static dimensions of size one are dropped.
    """
    extents = list(extents)
    for dim in reversed(range(len(extents) - 1)):
        if extents[dim] == 1:
            inner = False
        else:
            last = dim + 1 == len(extents) - 1
            if last and not columns_too:
                continue
            inner = all(equal(a.strides[dim], a.strides[dim + 1] * extents[dim + 1]) for a in accesses)
            if not inner:
                continue
        if inner:
            extents[dim + 1] = extents[dim] * extents[dim + 1]
        del extents[dim]
        for a in accesses:
            del a.strides[dim]
    return extents
