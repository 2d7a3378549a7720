"""A product whose parts are put together (a gate and what it lets pass) is one kernel: answers, cuts and refusals."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.export import Dim
from torch.nn import functional as F

pytest.importorskip("tvm")

from reference import compare

from torchlathe.codegen.base import Region
from torchlathe.codegen.partition import partition
from torchlathe.codegen.select import run_kernel
from torchlathe.codegen.tvm import matmul_family
from torchlathe.codegen.tvm.backend import TvmBackend
from torchlathe.passes.capture import capture
from torchlathe.targets.target import Target

CORES = Target("cpu", "cpu", "generic", 2, {}, 0.0, (32768, 1 << 20), 0, (), vector_bits=256)


class Gated(nn.Module):
    """One product for all parts, and a function of the parts."""

    def __init__(self, depth: int, width: int, combine: Callable[..., Any], parts: int = 2, bias: bool = True) -> None:
        super().__init__()
        torch.manual_seed(depth + width)
        self.inner, self.parts, self.combine = nn.Linear(depth, parts * width, bias), parts, combine

    def forward(self, x: torch.Tensor) -> Any:
        return self.combine(*self.inner(x).chunk(self.parts, -1))


def swiglu(gate: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return F.silu(gate) * value


def geglu(value: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    return value * F.gelu(gate)


def regions(model: nn.Module, *args: torch.Tensor, dynamic: Any = None) -> tuple[TvmBackend, list[Region]]:
    program = capture(model.eval(), args, dynamic_shapes=dynamic)
    backend = TvmBackend(program)
    return backend, partition(program, [backend], CORES)


def check(model: nn.Module, x: torch.Tensor) -> int:
    """Every schedule against eager and against float64; returns how many there were."""
    backend, (region,) = regions(model, x)
    program = backend.program
    assert program is not None and backend.supports(region, CORES) is None
    values = [x if n.op == "placeholder" else program.weights[str(n.target)] for n in region.inputs]
    with torch.no_grad():
        eager = model(x)
        exact = type(model).__call__(model.double(), x.double())
    count = 0
    for schedule in backend.space(region, CORES):
        (ours,) = run_kernel(backend.lower(region, CORES, schedule), values)
        compare(ours, eager, exact)
        count += 1
    return count


@pytest.mark.parametrize("combine", [swiglu, geglu])
@pytest.mark.parametrize(("rows", "width"), [((1,), 5), ((3, 7), 8), ((38,), 41), ((2, 61), 100)])
def test_any_size(combine: Callable[..., Any], rows: tuple[int, ...], width: int) -> None:
    assert check(Gated(33, width, combine), torch.randn(*rows, 33))


def test_every_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul_family, "MOST", ((float("inf"), 99),))
    assert check(Gated(40, 83, swiglu, bias=False), torch.randn(3, 61, 40)) >= 4


@pytest.mark.parametrize("bits", [256, 512])
@pytest.mark.parametrize("parts", [2, 3, 4, 5])
def test_sums_stay_in_registers(parts: int, bits: int) -> None:
    target = replace(CORES, vector_bits=bits)
    for rows in (1, 4, 12, 96):
        model = Gated(64, 64, lambda first, *rest: functools.reduce(torch.mul, rest, first), parts=parts)
        program = capture(model.eval(), (torch.randn(rows, 64),))
        (region,) = partition(program, [backend := TvmBackend(program)], target)
        for schedule in backend.space(region, target):
            assert int(schedule["rows"]) * int(schedule["vectors"]) <= {256: 12, 512: 28}[bits]
            assert int(schedule["vectors"]) % parts == 0


def test_three_parts() -> None:
    combine = lambda a, b, c: a * torch.sigmoid(b) + c  # noqa: E731
    assert check(Gated(24, 19, combine, parts=3), torch.randn(11, 24))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    assert check(Gated(64, 30, swiglu).to(dtype), torch.randn(9, 64).to(dtype))


def test_symbolic_rows() -> None:
    model, rows = Gated(24, 30, geglu), Dim("rows", min=2, max=999)
    backend, (region,) = regions(model, torch.randn(7, 24), dynamic=({0: rows},))
    assert backend.program is not None
    kernel = backend.lower(region, CORES, next(iter(backend.space(region, CORES))))
    for n in (1, 6, 13, 200):
        x = torch.randn(n, 24)
        values = [x if i.op == "placeholder" else backend.program.weights[str(i.target)] for i in region.inputs]
        torch.testing.assert_close(run_kernel(kernel, values)[0], model(x), atol=1e-5, rtol=1e-5)


def test_what_is_not_a_number_stays_in_its_column() -> None:
    model = Gated(16, 12, swiglu)
    with torch.no_grad():
        model.inner.bias[3], model.inner.bias[17] = torch.nan, torch.inf
    backend, (region,) = regions(model, x := torch.randn(5, 16))
    assert backend.program is not None
    values = [x if i.op == "placeholder" else backend.program.weights[str(i.target)] for i in region.inputs]
    (ours,) = run_kernel(backend.lower(region, CORES, next(iter(backend.space(region, CORES)))), values)
    torch.testing.assert_close(ours, model(x), equal_nan=True, atol=1e-5, rtol=1e-5)


def uneven(s: Any, y: torch.Tensor) -> torch.Tensor:
    return F.silu(y[..., :10]) * y[..., 10:20].sum(-1, keepdim=True) + y[..., 20:21]


def also_whole(s: Any, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return F.silu(y[..., :12]) * y[..., 12:], y * 2


def every_second(s: Any, y: torch.Tensor) -> torch.Tensor:
    return F.silu(y[..., ::2]) * y[..., 1::2]


@pytest.mark.parametrize("function", [uneven, also_whole, every_second])
def test_other_readers_keep_the_product_apart(function: Callable[..., Any]) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(16, 24)

        def forward(self, x: torch.Tensor) -> Any:
            return function(self, self.inner(x))

    _, found = regions(Model(), torch.randn(5, 16))
    product = next(r for r in found if "linear" in str(r.nodes[0].target))
    assert not any("slice" in str(n.target) for n in product.nodes)


def test_a_product_of_two_inputs_is_not_cut_into_parts() -> None:
    class Model(nn.Module):
        def forward(self, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
            return swiglu(*F.linear(x, w).chunk(2, -1))

    _, found = regions(Model(), torch.randn(5, 16), torch.randn(24, 16))
    assert len(found) == 2
