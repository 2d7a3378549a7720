"""Where a value lies in memory: sizes, strides and offsets as expressions of symbols, and how to merge them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from tvm import tirx

from ...passes.nodes import expression as expression
from .values import FIXED, Coordinate, Extent, Unsupported, Value

STORED = {torch.bfloat16: "uint16", torch.bool: "int8"}  # how the kernel itself reads and writes these
OPEN = 1 << 40  # extent of the flat views: their bounds are those of the checked parameter


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


@dataclass
class Sizes:
    """TIR variables for symbolic sizes: plain symbols are shared, other expressions get a variable of their own."""

    variables: dict[sympy.Expr, Any] = field(default_factory=dict)

    def bind(self, extent: Extent) -> Any:
        """The size of a parameter's dimension: it defines its variable."""
        expr = expression(extent)
        if expr.is_Integer:
            return tirx.IntImm("int64", int(expr))
        if expr not in self.variables:
            self.variables[expr] = tirx.Var(f"n{len(self.variables)}", "int64")
        return self.variables[expr]

    def tir(self, expr: sympy.Expr) -> Any:
        """A size or stride computed from the bound variables. Raises Unsupported when a symbol has no variable."""
        if expr.is_Integer:
            return tirx.IntImm("int64", int(expr))
        if expr in self.variables:
            return self.variables[expr]
        if expr.is_Add or expr.is_Mul:
            result = self.tir(expr.args[0])
            for part in expr.args[1:]:
                result = result + self.tir(part) if expr.is_Add else result * self.tir(part)
            return result
        if expr.is_Pow and expr.exp.is_Integer and 0 < int(expr.exp) < 8:
            return self.tir(expr.base) * self.tir(expr.base ** (expr.exp - 1))
        raise Unsupported(f"the size {expr} is not the size of an input")

    def offset(self, access: Access, digits: Sequence[Any], shift: bool = True) -> Any:
        """Where an access is at these indices of the leading dimensions; with or without its constant part."""
        base = self.tir(access.shift) if shift else tirx.IntImm("int64", 0)
        for digit, stride in zip(digits, access.strides, strict=False):
            if stride != 0:
                base = base + (digit if stride == 1 else digit * self.tir(stride))
        return base


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


def parameter(name: str, tensor: torch.Tensor, sizes: Sizes) -> Any:
    """The checked buffer of a tensor that the caller passes. Unaligned storage offsets are allowed."""
    shape = [sizes.bind(s) for s in tensor.shape]
    strides = None
    if not contiguous(tensor):
        # a dimension of size one may come with any stride
        strides = [tirx.Var(f"{name}_s{k}", "int64") if expression(n) == 1 else sizes.tir(expression(s))
                   for k, (n, s) in enumerate(zip(tensor.shape, tensor.stride(), strict=True))]  # fmt: skip
    dtype = str(tensor.dtype).removeprefix("torch.")
    return tirx.decl_buffer(shape, dtype, name, strides=strides, data_alignment=tensor.element_size())


def flat(name: str, buffer: Any, dtype: torch.dtype) -> Any:
    """A one-dimensional view of a parameter, in the type in which the kernel reads it."""
    stored = STORED.get(dtype, str(dtype).removeprefix("torch."))
    return tirx.decl_buffer((OPEN,), stored, name, data=buffer.data, data_alignment=dtype.itemsize)
