"""GPU kernels for matrix products and what follows them, run by Triton's interpreter, against eager."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from lowered import FLOATS, LAYOUTS, agree, alone, laid_out
from torch.export import Dim

from torchlathe import targets
from torchlathe.codegen.triton.backend import TritonBackend


def layer(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return F.gelu(F.linear(x, w, b))


@settings(deadline=None, max_examples=15, derandomize=True, phases=[Phase.generate])
@given(st.data())
def test_any_product(data: st.DataObject) -> None:
    rows, columns, depth = (data.draw(st.integers(1, n)) for n in (40, 70, 80))
    dtype = data.draw(st.sampled_from(FLOATS))
    x, w = torch.randn(rows, depth).to(dtype), torch.randn(columns, depth).to(dtype)
    how = [data.draw(st.sampled_from(LAYOUTS)) for _ in range(2)]
    x, w = laid_out(x, how[0]), laid_out(w, how[1])
    if data.draw(st.booleans()):
        assert agree(layer, x, w, torch.randn(columns).to(dtype), most=1)
    else:
        assert agree(lambda x, w: x @ w, x, laid_out(w.t(), how[0]), most=1)


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_layer_with_bias_activation_and_residual(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, w, b, y = (torch.randn(s).to(dtype) for s in ((3, 11, 50), (37, 50), (37,), (3, 11, 37)))
    assert agree(lambda x, w, b, y: F.silu(F.linear(x, w, b)) * 0.5 + y, x, w, b, y)
    assert agree(lambda x, w, y: F.relu(torch.matmul(x, w)) * y, x, w.t(), y)
    assert agree(lambda x, w, b: torch.addmm(b, x, w).tanh(), x[0], w.t().contiguous(), b, most=1)


@pytest.mark.parametrize("dtype", FLOATS)
def test_batches_of_products(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(2, 3, 20, 18).to(dtype), torch.randn(2, 3, 18, 25).to(dtype)
    assert agree(lambda x, y: torch.matmul(x, y) * 2, x, y, most=2)
    assert agree(lambda x, y: torch.bmm(x, y), x[0], y[1].transpose(1, 2).contiguous().transpose(1, 2), most=1)
    assert agree(lambda x, y, z: torch.baddbmm(z, x, y), x[0], y[1], torch.randn(3, 1, 25).to(dtype), most=1)


def test_a_split_depth() -> None:
    torch.manual_seed(0)
    x, w, b = torch.randn(2, 900).half(), torch.randn(20, 900).half(), torch.randn(20).half()
    found = agree(layer, x, w, b, most=3)
    assert any("splits=" in kernel and "splits=1 " not in kernel for kernel in found)
    x, w = torch.randn(2, 3, 1400).half(), torch.randn(2, 1400, 17).half()
    assert "splits=1 " not in agree(lambda x, w: torch.bmm(x, w) + 1, x, w, most=1)[0]


def test_operands_that_are_read_by_descriptors() -> None:
    torch.manual_seed(0)
    x, w = torch.randn(130, 72).half(), torch.randn(80, 72).half()
    function = lambda x, w: F.relu(F.linear(x, w))  # noqa: E731
    region, _ = alone(function, (x, w))
    all_of_them = TritonBackend().space(region, targets.get("nvidia-sm90"))
    first = next(k for k, s in enumerate(itertools.islice(all_of_them, 20)) if dict(s.params).get("tma"))
    assert any("tma=True" in kernel for kernel in agree(function, x, w, most=first + 1))
    assert any("tma=True" in kernel for kernel in agree(lambda x, w: x @ w, x, w.t().contiguous(), most=first + 1))


def gated(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    both, n = F.linear(x, w, b), w.shape[0] // 2
    return F.silu(both[..., :n]) * both[..., n:]


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_gate_and_what_it_lets_pass(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, w, b = (torch.randn(s).to(dtype) / 4 for s in ((3, 11, 50), (2 * 37, 50), (2 * 37,)))
    found = agree(gated, x, w, b, most=3)
    assert any("library" in kernel for kernel in found) and any("rows=" in kernel for kernel in found)

    def geglu(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        both, n = x @ w, w.shape[1] // 2
        return both[..., :n] * F.gelu(both[..., n:])

    assert agree(geglu, x, w.t(), most=2) and agree(geglu, x, w.t().contiguous(), most=2)


def test_three_parts() -> None:
    torch.manual_seed(0)
    function = lambda x, w: (lambda y: y[:, :20] * y[:, 20:40].sigmoid() + y[:, 40:])(F.linear(x, w))  # noqa: E731
    assert agree(function, torch.randn(40, 24), torch.randn(60, 24), most=2)


def test_a_gate_of_few_rows_by_a_split_depth() -> None:
    torch.manual_seed(0)
    x, w, b = torch.randn(2, 900).half() / 8, torch.randn(40, 900).half() / 8, torch.randn(40).half()
    found = agree(gated, x, w, b, most=3)
    assert any("splits=" in kernel and "splits=1 " not in kernel for kernel in found)


def test_a_gate_by_descriptors() -> None:
    torch.manual_seed(0)
    x, w, b = torch.randn(130, 72).half() / 8, torch.randn(2 * 88, 72).half(), torch.randn(2 * 88).half()
    region, _ = alone(gated, (x, w, b))
    space = itertools.islice(TritonBackend().space(region, targets.get("nvidia-sm90")), 20)
    first = next(k for k, s in enumerate(space) if dict(s.params).get("tma"))
    assert any("tma=True" in kernel for kernel in agree(gated, x, w, b, most=first + 1))


def test_descriptors_begin_where_the_bulk_copy_can() -> None:
    torch.manual_seed(0)
    function = lambda x, w: (lambda y, n: y[:, :n] * y[:, n:].tanh())(x @ w, w.shape[1] // 2)  # noqa: E731
    for width, reads in ((88, True), (36, False)):  # a part of 36 numbers of two bytes ends between 16 bytes
        x, w = torch.randn(130, 72).half() / 8, torch.randn(72, 2 * width).half()
        found = agree(function, x, w, most=5)
        assert any("tma=True" in kernel for kernel in found) is reads


def test_parts_of_symbolic_columns() -> None:
    n = Dim("n", min=30, max=99)
    function = lambda x, w: (lambda y: y[:, :10] * y[:, 10:20].tanh())(x @ w)  # noqa: E731
    args = [(torch.randn(9, 24), torch.randn(24, k)) for k in (40, 31)]
    assert agree(function, *args[0], others=args[1:], dynamic=({}, {1: n}), most=2)


@pytest.mark.parametrize("how", LAYOUTS)
def test_layouts_of_operands_and_residual(how: str) -> None:
    torch.manual_seed(0)
    x, w, y = (laid_out(torch.randn(s), how) for s in ((4, 9, 33), (26, 33), (4, 9, 26)))
    dense = torch.contiguous_format

    def function(x: torch.Tensor, w: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (F.linear(x, w) + y).clone(memory_format=dense)

    assert agree(function, x, w, y, most=1)


def test_expanded_operands() -> None:
    x, y = torch.randn(1, 7, 20).expand(3, 7, 20), torch.randn(3, 20, 1).expand(3, 20, 9)
    assert agree(lambda x, y: torch.bmm(x, y), x, y, most=1)
    assert agree(lambda x, w: F.linear(x, w), torch.randn(3, 1, 20).expand(3, 7, 20), torch.randn(9, 20), most=1)
    assert agree(lambda x, w: F.linear(x, w), torch.randn(1, 20).expand(7, 20), torch.randn(9, 20), most=1)


@pytest.mark.parametrize("dtype", FLOATS)
def test_symbolic_rows(dtype: torch.dtype) -> None:
    n = Dim("n", min=2, max=999)
    w, b = torch.randn(30, 24).to(dtype), torch.randn(30).to(dtype)
    args = [(torch.randn(k, 5, 24).to(dtype), w, b) for k in (6, 1, 0, 29)]
    assert agree(layer, *args[0], others=args[1:], dynamic=({0: n}, {}, {}), most=1)


def test_a_gate_of_symbolic_rows() -> None:
    n = Dim("n", min=2, max=999)
    w, b = torch.randn(60, 24), torch.randn(60)
    args = [(torch.randn(k, 5, 24), w, b) for k in (6, 1, 0, 29)]
    assert agree(gated, *args[0], others=args[1:], dynamic=({0: n}, {}, {}), most=2)


def test_symbolic_batches() -> None:
    n, m = Dim("n", min=2, max=99), Dim("m", min=2, max=99)
    args = [(torch.randn(b, k, 12), torch.randn(b, 12, 20)) for b, k in ((3, 7), (1, 1), (2, 40), (0, 3))]
    assert agree(lambda x, y: torch.bmm(x, y) * 2, *args[0], others=args[1:], dynamic=({0: n, 1: m}, {0: n}), most=1)


def test_what_is_not_a_number_stays_in_its_row() -> None:
    torch.manual_seed(0)
    x, w, b = torch.randn(21, 40), torch.randn(19, 40), torch.randn(19)
    x[2, 3], x[20, 39], w[5, 0], b[7] = math.nan, math.inf, -math.inf, math.nan
    dirty = lambda x, w, b: F.relu(F.linear(x, w, b))  # noqa: E731
    assert agree(dirty, x, w, b)
    assert dirty(x, w, b).isnan().float().mean() < 0.3


def test_what_is_refused() -> None:
    backend, target = TritonBackend(), targets.get("nvidia-sm90")
    region, _ = alone(lambda x, w: F.linear(x, w), (torch.randn(4, 0), torch.randn(3, 0)))
    assert "without elements" in str(backend.supports(region, target))
    region, _ = alone(lambda x, w: F.softmax(F.linear(x, w), -1), (torch.randn(4, 5), torch.randn(3, 5)))
    assert backend.supports(region, target) is not None


def grouped(x: torch.Tensor, w: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    return F.relu(torch._grouped_mm(x, w, offs=ends))


def in_turn(x: torch.Tensor, w: torch.Tensor, ends: torch.Tensor, after: Any = F.relu) -> Any:
    """The same, one group after the other: torch's own knows no double precision, and traces bfloat16 only."""
    first, parts = [0, *ends.tolist()], []
    for k in range(len(w)):
        parts.append(x[first[k] : first[k + 1]] @ w[k])
    return after(torch.cat(parts))


@pytest.mark.parametrize("turned", [False, True])
def test_rows_in_groups(turned: bool) -> None:
    torch.manual_seed(0)
    x, w = torch.randn(75, 48).bfloat16(), torch.randn(5, 48, 40).bfloat16() / 8
    w = w.transpose(1, 2).contiguous().transpose(1, 2) if turned else w
    ends = [torch.tensor(e, dtype=torch.int32) for e in ([20, 20, 37, 70, 75], [0, 75, 75, 75, 75], [1, 2, 3, 4, 75])]
    others = [(x, w, e) for e in ends[1:]]
    assert len(agree(grouped, x, w, ends[0], others=others, most=3, wanted=in_turn)) == 3


def test_groups_of_any_number_of_rows_and_a_gate() -> None:
    def experts(x: torch.Tensor, w: torch.Tensor, ends: torch.Tensor, share: torch.Tensor, product: Any = None) -> Any:
        y = (product or torch._grouped_mm)(x, w, offs=ends)
        return F.silu(y[:, :24]) * y[:, 24:] * share[:, None]

    def wanted(x: torch.Tensor, w: torch.Tensor, ends: torch.Tensor, share: torch.Tensor) -> Any:
        return experts(x, w, ends, share, lambda x, w, offs: in_turn(x, w, offs, lambda y: y))

    torch.manual_seed(0)
    w, rows = torch.randn(3, 16, 48).bfloat16(), Dim("rows", min=2, max=200)
    args = [(torch.randn(n, 16).bfloat16(), w, torch.tensor([n // 3, n // 2, n], dtype=torch.int32),
             torch.rand(n).bfloat16()) for n in (60, 33)]  # fmt: skip
    dynamic = ({0: rows}, {}, {}, {0: rows})
    assert agree(experts, *args[0], others=args[1:], dynamic=dynamic, most=2, wanted=wanted)
