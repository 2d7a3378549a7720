"""What a template yields: the text of a module with kernels, and how they are launched."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch.utils._sympy.functions import FloorDiv

from ..plans.layout import expression
from ..plans.values import Unsupported
from ..symbols import encode, python_text

HEAD = """import triton
import triton.language as tl
from torchlathe.codegen.triton import device
"""
LARGEST_INT32 = 2**31 - 1
LARGEST_SIDE = 65535  # programs along the second and third dimension of a launch


@dataclass(frozen=True)
class Launch:
    """One kernel of a region.

    Attributes:
        function: its name in the text; "" lets torch's own product of two matrices write the third tensor.
        tensors: which tensors it takes, in order: numbers of the parameters, scratch tensors after them.
        grid: programs along up to three axes, the fastest first, as expressions of the sizes.
        warps: groups of threads of one program.
        stages: depth of the software pipeline.
        turned: for torch's product: whether the second matrix is transposed.
    """

    function: str
    tensors: tuple[int, ...]
    grid: tuple[sympy.Expr, ...]
    warps: int = 4
    stages: int = 2
    turned: bool = False


@dataclass(frozen=True)
class Code:
    """Kernels of a region as text.

    Attributes:
        text: a Python module.
        launches: in order.
        sizes: (parameter, dimension) of each symbolic size; kernels take them after their tensors.
        symbols: names of these sizes.
        scratch: shape and dtype of tensors between launches.
    """

    text: str
    launches: tuple[Launch, ...]
    sizes: tuple[tuple[int, int], ...] = ()
    symbols: tuple[str, ...] = ()
    scratch: tuple[tuple[tuple[sympy.Expr, ...], torch.dtype], ...] = ()

    def evaluator(self, expressions: Sequence[sympy.Expr]) -> Callable[..., tuple[int, ...]]:
        """A function from the sizes to the values of expressions of them."""
        names = dict(zip(self.symbols, (f"s{k}" for k in range(len(self.symbols))), strict=True))
        body = ", ".join(python_text(encode(e), names.__getitem__) for e in expressions)
        made: Callable[..., tuple[int, ...]] = eval(f"lambda {', '.join(names.values())}: ({body},)", {})
        return made


@dataclass
class Sizes:
    """Texts of sizes, and where the symbols in them come from."""

    tensors: Sequence[torch.Tensor]
    names: dict[str, str] = field(default_factory=dict)
    sources: list[tuple[int, int]] = field(default_factory=list)

    def text(self, expr: Any) -> str:
        """A size as text. Raises Unsupported when a symbol is not the size of a parameter."""
        expr = expression(expr)
        for symbol in sorted(expr.free_symbols, key=str):
            self._bind(symbol)
        try:
            return python_text(encode(expr), self.names.__getitem__)
        except ValueError as error:
            raise Unsupported(str(error)) from error

    def _bind(self, symbol: sympy.Symbol) -> None:
        if symbol.name in self.names:
            return
        for k, tensor in enumerate(self.tensors):
            for d, size in enumerate(tensor.shape):
                if expression(size) == symbol:
                    self.names[symbol.name] = f"s{len(self.names)}"
                    self.sources.append((k, d))
                    return
        raise Unsupported(f"the size {symbol} is not the size of an input")

    @property
    def parameters(self) -> list[str]:
        """Names that kernels take after their tensors. Ask when all texts have been made."""
        return list(self.names.values())

    def code(self, text: str, launches: Sequence[Launch], scratch: Any = ()) -> Code:
        """The finished code."""
        return Code(text, tuple(launches), tuple(self.sources), tuple(self.names), tuple(scratch))


def parts(size: sympy.Expr, block: int) -> sympy.Expr:
    """How many blocks cover a size."""
    size = sympy.sympify(size)
    return sympy.Integer(-(-int(size) // block)) if size.is_Integer else FloorDiv(size + block - 1, block)


def dimensions(grid: Sequence[sympy.Expr]) -> list[list[int]]:
    """The axes of a grid that each dimension of a launch counts; all but the first dimension have 16 bits on GPUs.

    An axis after the first has a dimension of its own if its size is known to fit.
    """
    small = [k for k, size in enumerate(grid) if k and size.is_Integer and int(size) <= LARGEST_SIDE]
    return [[k for k in range(len(grid)) if k not in small], *([k] for k in small)]


def is_wide(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether offsets into some tensor may not fit 32 bits."""
    for tensor in tensors:
        last = sum((expression(n) - 1) * expression(s) for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        last = sympy.sympify(last)
        if not last.is_Integer or int(last) > LARGEST_INT32 // 2:
            return True
    return False


def long(number: str, tensors: Sequence[torch.Tensor]) -> str:
    """The text of a number that strides of some tensors multiply: in 64 bits if offsets may need them."""
    return f"{number}.to(tl.int64)" if number != "0" and is_wide(tensors) else number


def power_of_two(least: int | sympy.Integer) -> int:
    """The smallest power of two that is not less."""
    return 1 << max(0, int(least) - 1).bit_length()


def module(functions: Sequence[str]) -> str:
    """A module of kernels."""
    return HEAD + "".join(f"\n\n@triton.jit\n{text}" for text in functions)


def function(name: str, parameters: Sequence[str], lines: Sequence[str]) -> str:
    """The text of one kernel."""
    return f"def {name}({', '.join(parameters)}):\n" + "\n".join(f"    {line}" for line in lines) + "\n"
