"""Sizes, strides and parameters of a function as TIR."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from tvm import tirx

from ..plans.layout import Access, contiguous, expression
from ..plans.values import Extent, Unsupported

STORED = {torch.bfloat16: "uint16", torch.bool: "int8"}  # how the kernel itself reads and writes these
OPEN = 1 << 40  # extent of the flat views: their bounds are those of the checked parameter


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
