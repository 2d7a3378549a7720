"""The stated errors of the vector math, measured on compiled kernels against float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

tvm = pytest.importorskip("tvm")
from tvm import tirx  # noqa: E402

from torchlathe.codegen.tvm import build  # noqa: E402
from torchlathe.codegen.tvm import math as vector  # noqa: E402
from torchlathe.codegen.tvm.emit import integer, put, serial  # noqa: E402


def compiled(function: Callable[[vector.Block, Any], Any]) -> Callable[[torch.Tensor], torch.Tensor]:
    """The function over a float32 tensor whose length is a multiple of eight."""
    n = tirx.Var("n", "int64")
    x = tirx.decl_buffer((n,), "float32", "x", data_alignment=4)
    y = tirx.decl_buffer((n,), "float32", "y", data_alignment=4)
    j, b = tirx.Var("j", "int64"), vector.Block(8)
    index = tirx.Ramp(j * integer(8), integer(1), 8)
    put(b, y, j * integer(8), function(b, b.let(tirx.BufferLoad(x, [index]))))
    loop = serial(j, tirx.floordiv(n, integer(8)), b.statements)
    func = tirx.PrimFunc([x, y], loop).with_attr("global_symbol", "f").with_attr("tirx.noalias", True)
    target = tvm.target.Target({"kind": "llvm", "mcpu": tvm.target.codegen.llvm_get_system_cpu()})
    call = build.compile_function(func, target)["f"]

    def run(values: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(values)
        call(values, out)
        return out

    return run


def grid(low: float, high: float) -> torch.Tensor:
    """A dense grid plus all magnitudes around zero, a multiple of eight in length."""
    even = torch.linspace(low, high, 1 << 20, dtype=torch.float64)
    small = torch.logspace(-37, 0, 1 << 14, dtype=torch.float64)
    both = torch.cat([even, small, -small])
    return both[(both >= low) & (both <= high)][: 1 << 20].float()[: (1 << 20) // 8 * 8 - 8]


def ulps(ours: torch.Tensor, exact: torch.Tensor) -> float:
    """Largest error in units of the last place of the exact result."""
    exponent = torch.floor(torch.log2(exact.abs().clamp_min(2.0**-126)))
    return float(((ours.double() - exact).abs() / torch.exp2(exponent - 23)).max())


@pytest.mark.parametrize(
    ("function", "exact", "low", "high", "limit"),
    [
        (vector.exp, torch.exp, -87.0, 88.7, 1.1),
        (vector.log, torch.log, 1e-37, 100.0, 2.0),
        (vector.log1p, torch.log1p, 0.0, 100.0, 4.0),
        (vector.sigmoid, torch.sigmoid, -80.0, 80.0, 4.0),
    ],
)
def test_ulps(function: Any, exact: Any, low: float, high: float, limit: float) -> None:
    x = grid(low, high)
    assert ulps(compiled(function)(x), exact(x.double())) <= limit


@pytest.mark.parametrize(
    ("function", "exact", "low", "high", "limit"),
    [
        (vector.erf, torch.erf, -6.0, 6.0, 5e-7),
        (vector.tanh, torch.tanh, -12.0, 12.0, 5e-7),
        (vector.expm1_negative, torch.expm1, -20.0, 0.0, 1e-6),
    ],
)
def test_relative(function: Any, exact: Any, low: float, high: float, limit: float) -> None:
    x = grid(low, high)
    x = x[x != 0][: (x != 0).sum() // 8 * 8].contiguous()
    right = exact(x.double())
    assert float(((compiled(function)(x).double() - right) / right).abs().max()) <= limit


@pytest.mark.parametrize(
    ("function", "exact"),
    [(vector.exp, torch.exp), (vector.log, torch.log), (vector.erf, torch.erf), (vector.tanh, torch.tanh),
     (vector.sigmoid, torch.sigmoid)],
)  # fmt: skip
def test_special_values(function: Any, exact: Any) -> None:
    x = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 89.0, -200.0, 1e-40])
    torch.testing.assert_close(compiled(function)(x), exact(x), equal_nan=True, rtol=1e-6, atol=1e-38)
