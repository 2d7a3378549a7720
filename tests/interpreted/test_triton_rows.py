"""GPU kernels for pointwise operators and row reductions, run by Triton's interpreter, against eager."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import sympy
import torch
import torch.nn.functional as F
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from lowered import FLOATS, LAYOUTS, agree, alone, laid_out
from torch.export import Dim

from torchlathe import targets
from torchlathe.codegen.trial import run_kernel
from torchlathe.codegen.triton import code, rows
from torchlathe.codegen.triton.backend import TritonBackend
from torchlathe.codegen.triton.writer import Writer
from torchlathe.passes import ops

INF, NAN = math.inf, math.nan
CORNERS = [0.0, -0.0, 1.0, -1.0, 0.3, -2.7, 88.0, -88.0, 104.0, 1e-30, 65000.0, -65000.0, INF, -INF, NAN]

BOUNDED: dict[str, Callable[..., Any]] = {
    "silu": F.silu,
    "sigmoid": lambda x: torch.sigmoid(x) - 0.5,
    "tanh": torch.tanh,
    "softplus": F.softplus,
    "elu": F.elu,
    "leaky": lambda x: F.leaky_relu(x, 0.1),
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "relu6": F.relu6,
    "clamp": lambda x: x.clamp(-0.5, 2.0),
    "rsqrt": lambda x: (x * x + 0.1).rsqrt(),
    "quotient": lambda x: x / (x.abs() + 1.0),
    "where": lambda x: torch.where((x > 0) & (x < 1), x, -x),
    "reciprocal": lambda x: 1.0 / x,
}
GROWING: dict[str, Callable[..., Any]] = {  # at infinity eager on CPUs is not what it is on GPUs
    "gelu": lambda x: F.gelu(x) * 2 + 1,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "square": lambda x: x**2 - x**3,
    "exp_log": lambda x: (x.exp() + 1.0).log(),
}
REDUCTIONS: dict[str, Callable[..., Any]] = {
    "softmax": lambda x: F.softmax(x, -1),
    "log_softmax": lambda x: F.log_softmax(x, -1),
    "layer_norm": lambda x: F.layer_norm(x, x.shape[-1:]),
    "rms_norm": lambda x: F.rms_norm(x, x.shape[-1:]),
    "mean": lambda x: x.mean(-1, keepdim=True),
    "sum": lambda x: x.sum(-1),
    "var": lambda x: x.var(-1),
    "max": lambda x: x.amax(-1),
    "min": lambda x: x.amin(-1),
}


def together(functions: dict[str, Callable[..., Any]]) -> Callable[..., Any]:
    """One function that yields the results of all, in order: one region."""
    return lambda x: tuple(function(x) for function in functions.values())


@pytest.mark.parametrize("dtype", FLOATS)
def test_pointwise(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = (torch.randn(3, 5, 7) * 3).to(dtype)
    assert agree(together(BOUNDED), x, most=1)
    assert agree(together(GROWING), x, most=1)


@pytest.mark.parametrize("dtype", FLOATS)
def test_pointwise_in_the_corners(dtype: torch.dtype) -> None:
    assert agree(together(BOUNDED), torch.tensor([CORNERS, CORNERS[::-1]]).to(dtype), most=1)


@settings(deadline=None, max_examples=15, derandomize=True, phases=[Phase.generate])
@given(st.data())
def test_broadcasting_of_any_layouts(data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    operands = []
    for _ in range(2):
        own = [n if data.draw(st.booleans()) else 1 for n in shape]
        own = own[data.draw(st.integers(0, len(shape) - 1)) :]
        x = torch.randn(own).to(data.draw(st.sampled_from(FLOATS)))
        operands.append(laid_out(x, data.draw(st.sampled_from(LAYOUTS))))
    full = laid_out(torch.randn(shape), data.draw(st.sampled_from(LAYOUTS)))
    dense = torch.contiguous_format  # eager would keep the layout of its operands

    def function(x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        return (torch.maximum(x * 2 - y, z) + z).clone(memory_format=dense)

    assert agree(function, *operands, full, most=2)


def test_every_schedule_of_a_pointwise_region() -> None:
    assert len(agree(lambda x, y: F.relu(x) * y, torch.randn(9, 700), torch.randn(9, 1), most=99)) > 2


def test_expanded_inputs() -> None:
    x, y = torch.randn(4, 1, 6).expand(4, 5, 6), torch.randn(1).expand(4, 5, 6)
    assert agree(lambda x, y: x.exp() * y, x, y)


def test_outputs_at_an_odd_address() -> None:
    x = torch.randn(5, 7)
    region, _ = alone(torch.exp, (x,))
    backend, row = TritonBackend(), targets.get("nvidia-sm90")
    kernel = backend.lower(region, row, next(iter(backend.space(region, row))))
    memory = torch.zeros(37)
    kernel.call(x, memory[1:36].view(5, 7))
    assert torch.allclose(memory[1:36].view(5, 7), x.exp()) and memory[0] == memory[36] == 0


@pytest.mark.parametrize("most", [1, 3, 65535])
@pytest.mark.parametrize("grid", [(3, 1, 4), (5,), (1, 1), (2, 3, 2), (1, 4)])
def test_programs_count_the_axes_of_a_grid(grid: tuple[int, ...], most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(code, "LARGEST_SIDE", most)
    sizes, seen = [sympy.Integer(n) for n in grid], set()
    launch = [math.prod(grid[k] for k in axes) for axes in code.dimensions(sizes)]
    assert all(n <= most for n in launch[1:]) and math.prod(launch) == math.prod(grid)
    for numbers in itertools.product(*map(range, launch)):
        writer = Writer(code.Sizes([]), [], {})
        names = writer.program(*sizes)
        known: dict[str, Any] = {"tl": SimpleNamespace(program_id=numbers.__getitem__)}
        exec("\n".join(writer.blocks[0].lines), known)
        seen.add(tuple(eval(name, known) for name in names))
    assert seen == set(itertools.product(*map(range, grid)))


def test_sides_of_a_launch_that_gpus_cannot_count() -> None:
    x = sympy.Symbol("x", integer=True, positive=True)
    big, small = sympy.Integer(70000), sympy.Integer(7)
    assert code.dimensions([small, big, small]) == [[0, 1], [2]] and code.dimensions([big, x, big]) == [[0, 1, 2]]


def test_results_lie_as_eager_leaves_them() -> None:
    torch.manual_seed(0)
    images, gate = torch.randn(2, 3, 5, 24).permute(0, 3, 1, 2), torch.randn(2, 24, 1, 1)
    assert agree(lambda x, g: x * g.sigmoid() + 1, images, gate)
    assert agree(lambda x, y: torch.cat([x, y], 1) * 2, images, images[:, :9] + 1)
    assert agree(lambda x: (x - x.mean(-1, keepdim=True)) * 2, torch.randn(2, 7, 3, 12).transpose(1, 2))


def test_expanded_inputs_at_an_odd_address() -> None:
    x = torch.randn(25)[1:].view(4, 1, 6).expand(4, 5, 6)
    assert agree(lambda x: x.exp() + 1, x)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("columns", [1, 7, 100])
def test_reductions(columns: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    assert agree(together(REDUCTIONS), (torch.randn(3, 5, columns) * 3).to(dtype), most=2)


@pytest.mark.parametrize("how", LAYOUTS)
def test_reductions_of_other_layouts(how: str) -> None:
    torch.manual_seed(0)
    assert agree(together(REDUCTIONS), laid_out(torch.randn(4, 3, 33), how), most=1)


@pytest.mark.parametrize("columns", [9, 17000])
def test_reductions_of_what_is_not_a_number(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "RESIDENT", 8192)
    x = torch.randn(6, columns)
    x[0, -1], x[1, 0], x[2, 3], x[3, 1:3] = NAN, INF, -INF, torch.tensor([INF, -INF])
    x[4] = -INF
    x[5, -2] = 40.0
    (kernel,) = agree(together(REDUCTIONS), x, most=1)
    assert ("columns=8192" in kernel) is (columns > 8192)  # long rows are walked in pieces


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_norm_with_what_surrounds_it(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(2, 6, 48).to(dtype), torch.randn(2, 6, 48).to(dtype)
    weight, bias = torch.randn(48).to(dtype), torch.randn(48).to(dtype)

    def norm(x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> Any:
        total = x + y
        return total, F.layer_norm(total, (48,), weight, bias)

    assert agree(norm, x, y, weight, bias)
    assert agree(lambda x, w: F.rms_norm(x.float(), (48,), w.float()).to(x.dtype) * 2, x, weight)


def test_a_masked_softmax() -> None:
    x, mask = torch.randn(2, 3, 5, 9), torch.rand(2, 1, 1, 9) > 0.4
    mask[0] = False  # rows in which nothing is seen
    assert agree(lambda x, m: F.softmax(x.masked_fill(~m, -INF), -1), x, mask)


@pytest.mark.parametrize("name", ["gelu", "softmax", "layer_norm"])
def test_symbolic_rows(name: str) -> None:
    n, m = Dim("n", min=2, max=99), Dim("m", min=2, max=99)
    args = [(torch.randn(a, b, 20),) for a, b in ((3, 4), (1, 7), (0, 5), (6, 0), (40, 3))]
    function = {**GROWING, **REDUCTIONS}[name]
    assert agree(function, *args[0], others=args[1:], dynamic=({0: n, 1: m},), most=2)


def test_symbolic_columns() -> None:
    n = Dim("n", min=2, max=9999)
    args = [(torch.randn(3, k), torch.randn(k)) for k in (12, 1, 0, 5000)]
    assert agree(lambda x, y: F.silu(x) * y, *args[0], others=args[1:], dynamic=({1: n}, {0: n}), most=2)


def test_integers_and_booleans() -> None:
    i, j = torch.randint(-9, 9, (4, 9)), torch.randint(-9, 9, (4, 9))
    assert agree(lambda i, j: (i * j - i, (i < j) | (i == 3), torch.maximum(i, j)), i, j)
    assert agree(lambda i, x: torch.where(i > 2, x, i.to(x.dtype)), i, torch.randn(4, 9))
    assert agree(lambda i: i.to(torch.int32) * 2 - 3, i)


@pytest.mark.parametrize("dtype", FLOATS)
def test_rows_are_put_together(dtype: torch.dtype) -> None:
    parts = [torch.randn(3, n, 8).to(dtype) for n in (4, 1, 6)]
    assert agree(lambda a, b, c: torch.cat([a, b, c], 1) * 2, *parts)
    n = Dim("n", min=2, max=9)
    others = [tuple(torch.randn(b, k, 8) for k in (4, 1)) for b in (1, 5)]
    args = torch.randn(3, 4, 8), torch.randn(3, 1, 8)
    assert agree(lambda a, b: torch.cat([a, b], 1) + 1, *args, others=others, dynamic=({0: n}, {0: n}))


@pytest.mark.parametrize("dtype", FLOATS)
def test_columns_are_put_together(dtype: torch.dtype) -> None:
    parts = [torch.randn(3, 4, n).to(dtype) for n in (8, 5, 1)]
    assert agree(lambda a, b, c: torch.cat([a, b, c], -1) * 2, *parts)
    assert agree(lambda a, b, c: F.softmax(torch.cat([a, b, c], -1), -1), *parts)
    x = torch.randn(2, 5, 16).to(dtype)
    assert agree(lambda x, c: x * c + torch.cat([-x[..., 8:], x[..., :8]], -1), x, torch.randn(5, 16).to(dtype))


@pytest.mark.parametrize("dtype", FLOATS)
def test_embedding(dtype: torch.dtype) -> None:
    index, table = torch.randint(0, 10, (3, 7)), torch.randn(10, 24).to(dtype)
    assert agree(lambda i, w: F.embedding(i, w) * 2, index, table)
    assert agree(lambda i, w, p: F.layer_norm(F.embedding(i, w) + p, (24,)), index, table, torch.randn(7, 24).to(dtype))


@pytest.mark.parametrize("wrong", [10, -1, 2**40])
def test_an_index_outside_the_table_yields_no_number(wrong: int) -> None:
    index, table = torch.tensor([[0, 9], [wrong, 3]]), torch.randn(10, 24)
    function = lambda i, w: F.embedding(i, w) + 1  # noqa: E731
    region, order = alone(function, (index.clamp(0, 9), table))
    backend, target = TritonBackend(), targets.get("nvidia-sm90")
    kernel = backend.lower(region, target, next(iter(backend.space(region, target))))
    (ours,) = run_kernel(kernel, [(index, table)[k] for k in order])
    wanted = function(index.clamp(0, 9), table)
    wanted[1, 0] = NAN
    assert torch.equal(ours.isnan(), wanted.isnan())
    assert torch.equal(ours.nan_to_num(7), wanted.nan_to_num(7))


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_taking_tokens(dim: int) -> None:
    torch.manual_seed(0)
    x, table = torch.randn(3, 9, 8, 10), torch.randn(1, 9, 8, 10)
    index = torch.randint(0, 8, (3, 5))
    assert agree(lambda x, t, i: ops.take()(x, dim, i) + ops.take()(t, dim, i), x, table, index)


def test_taking_from_masks() -> None:
    valid, index = torch.rand(3, 9) > 0.5, torch.randint(0, 9, (3, 5))
    assert agree(lambda v, i: ops.take()(v, 1, i), valid, index)
    mask = torch.randn(3, 1, 4, 9)
    both = lambda m, i: ops.take()(m, 3, i) * 2  # noqa: E731
    assert agree(both, mask, index)
