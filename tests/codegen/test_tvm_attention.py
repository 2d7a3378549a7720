"""Attention kernels against torch in float64: masks, causality, grouped heads, layouts, dtypes, sizes known late."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.export import Dim
from torch.nn import functional as F

pytest.importorskip("tvm")

from torchlathe.codegen.base import Kernel, Region
from torchlathe.codegen.eager import op_name
from torchlathe.codegen.select import run_kernel
from torchlathe.codegen.tvm import attention_family
from torchlathe.codegen.tvm.backend import TvmBackend
from torchlathe.passes.capture import capture
from torchlathe.targets.target import Target

TARGET = Target("cpu", "cpu", "generic", 2, {}, 0.0, (32768, 1 << 20), 0, (), vector_bits=256)
BACKEND = TvmBackend()
INF, NAN = float("inf"), float("nan")


class Attend(torch.nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None) -> Any:
        return F.scaled_dot_product_attention(q, k, v, mask, **self.options)


def lowered(net: Attend, args: tuple[Any, ...], dynamic: Any = None) -> list[tuple[Kernel, list[int]]]:
    """Every schedule's kernel, and which arguments it takes."""
    program = capture(net, args, dynamic_shapes=dynamic)
    region = Region.of(n for n in program.graph.nodes if op_name(n).startswith("scaled_dot"))
    assert BACKEND.supports(region, TARGET) is None
    order = [program.inputs.index(n) for n in region.inputs]
    return [(BACKEND.lower(region, TARGET, s), order) for s in BACKEND.space(region, TARGET)]


def check(*args: torch.Tensor, **options: Any) -> None:
    net = Attend(**options)
    eager = net(*args)
    exact = net(*(a.double() if a.is_floating_point() else a for a in args))
    for kernel, order in lowered(net, args):
        (ours,) = run_kernel(kernel, [args[i] for i in order])
        assert ours.shape == eager.shape and ours.dtype == eager.dtype
        assert torch.equal(ours.isnan(), eager.isnan())
        good = eager.isfinite()
        floor = 2e-6 if eager.dtype is torch.float32 else 1e-2
        limit = 2 * (eager - exact)[good].abs().max() + floor
        assert (ours - exact)[good].abs().max() <= limit, str(kernel.schedule)


def operands(queries: int, keys: int, features: int = 24, heads: int = 3, batch: int = 2) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(queries * 1000 + keys)
    return tuple(torch.randn(batch, heads, n, features) for n in (queries, keys, keys))


@pytest.mark.parametrize("keys", [1, 5, 16, 37])
@pytest.mark.parametrize("queries", [1, 7, 8, 33])
def test_any_length(queries: int, keys: int) -> None:
    check(*operands(queries, keys))


@pytest.mark.parametrize("features", [1, 8, 20, 40, 80])
def test_any_number_of_features(features: int) -> None:
    check(*operands(9, 21, features))


def test_values_of_another_width() -> None:
    q, k, _ = operands(9, 21)
    check(q, k, torch.randn(2, 3, 21, 13))


@pytest.mark.parametrize("queries", [5, 21, 40])
def test_causal(queries: int) -> None:
    check(*operands(queries, 21), is_causal=True)


@pytest.mark.parametrize("shape", [(13, 21), (2, 1, 13, 21), (1, 3, 1, 21), (2, 3, 13, 21), (13, 1), (1, 1)])
@pytest.mark.parametrize("kind", ["boolean", "additive"])
def test_masks(kind: str, shape: tuple[int, ...]) -> None:
    q, k, v = operands(13, 21)
    mask = torch.rand(shape) < 0.7 if kind == "boolean" else torch.randn(shape)
    check(q, k, v, mask)


def test_mask_read_across_its_rows() -> None:
    q, k, v = operands(13, 21)
    check(q, k, v, torch.randn(2, 3, 21, 13).transpose(-1, -2))


def test_rows_that_see_no_key_are_zero() -> None:
    q, k, v = operands(13, 21)
    mask = torch.ones(13, 21, dtype=torch.bool)
    mask[[0, 7]] = False
    net = Attend()
    for kernel, order in lowered(net, (q, k, v, mask)):
        (ours,) = run_kernel(kernel, [(q, k, v, mask)[i] for i in order])
        assert ours[:, :, [0, 7]].abs().max() == 0
        torch.testing.assert_close(ours, net(q, k, v, mask))


def test_nan_and_infinity_as_in_eager() -> None:
    q, k, v = operands(40, 37)
    q[0, 0, 3, 2], q[1, 1, 5, 0], v[1, 2, 4, 1] = NAN, INF, NAN
    check(q, k, v)


def test_large_scores_do_not_overflow() -> None:
    q, k, v = operands(9, 21)
    check(q * 300, k, v)
    check(q, k, v, scale=-80.0)


@pytest.mark.parametrize("group", [1, 2, 6])
def test_grouped_heads(group: int) -> None:
    q = torch.randn(2, 6, 9, 16)
    k, v = (torch.randn(2, 6 // group, 21, 16) for _ in range(2))
    check(q, k, v, enable_gqa=True)


def test_operands_as_a_joint_projection_leaves_them() -> None:
    q, k, v = torch.randn(2, 19, 3, 4, 16).permute(2, 0, 3, 1, 4).unbind(0)
    check(q, k, v)
    check(q.transpose(-1, -2).contiguous().transpose(-1, -2), k, v)  # features far apart
    check(q, k[:, :1].expand(-1, 4, -1, -1), v)


def test_three_dimensions() -> None:
    q, k, v = operands(9, 21)
    check(q[0], k[0], v[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    q, k, v = (t.to(dtype) for t in operands(19, 37, 32))
    check(q, k, v)
    check(q, k, v, torch.randn(19, 37).to(dtype))


@pytest.mark.parametrize("options", [{}, {"is_causal": True}])
def test_several_blocks_of_keys(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_family, "BLOCK", 16)
    check(*operands(40, 57), **options)


@pytest.mark.parametrize("options", [{}, {"is_causal": True}])
def test_lengths_known_at_run_time(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_family, "BLOCK", 16)
    net = Attend(**options)
    batch, queries, keys = (Dim(n, min=2, max=200) for n in ("batch", "queries", "keys"))
    dynamic = ({0: batch, 2: queries}, {0: batch, 2: keys}, {0: batch, 2: keys})
    for kernel, order in lowered(net, operands(9, 21), dynamic):
        for b, nq, nk in [(2, 2, 2), (3, 17, 33), (2, 40, 16), (2, 8, 61)]:
            args = operands(nq, nk, batch=b)
            (ours,) = run_kernel(kernel, [args[i] for i in order])
            torch.testing.assert_close(ours, net(*args))


@pytest.mark.parametrize("queries", [1, 2, 4])
def test_few_queries_split_the_keys(queries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_family, "MOST", 24)  # several runs, the last one not whole
    q, k, v = operands(queries, 77, 32)
    assert lowered(Attend(), (q, k, v))[0][0].schedule.name == "decode"
    check(q, k, v)
    check(q, k, v, torch.rand(queries, 77) < 0.7)
    check(q, k, v, torch.randn(2, 1, 1, 77))
    hidden = torch.ones(queries, 77, dtype=torch.bool)
    hidden[:, :50] = False  # whole runs see no key
    check(q * 200, k, v, hidden)
    check(*(t.bfloat16() for t in (q, k, v)))
    k[0, 0, 40, 3] = NAN
    check(q, k, v)


def test_grouped_heads_share_the_reading_of_keys() -> None:
    q, k, v = torch.randn(2, 8, 1, 16), torch.randn(2, 2, 33, 16), torch.randn(2, 2, 33, 24)
    assert lowered(Attend(enable_gqa=True), (q, k, v))[0][0].schedule.name == "decode"
    check(q, k, v, enable_gqa=True)
    check(q, k, v, torch.randn(2, 8, 1, 33), enable_gqa=True)


def test_one_query_and_a_number_of_keys_known_at_run_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_family, "RUN", 16)
    net, keys = Attend(), Dim("keys", min=2, max=200)
    for kernel, order in lowered(net, operands(1, 21, 16), (None, {2: keys}, {2: keys})):
        for n in (2, 16, 33, 100):
            args = operands(1, n, 16)
            (ours,) = run_kernel(kernel, [args[i] for i in order])
            torch.testing.assert_close(ours, net(*args))


def test_masked_lengths_known_at_run_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_family, "BLOCK", 16)
    net, length = Attend(), Dim("length", min=2, max=200)
    q, k, v = operands(21, 21)
    dynamic = ({2: length}, {2: length}, {2: length}, {0: length, 1: length})
    for kernel, order in lowered(net, (q, k, v, torch.randn(21, 21)), dynamic):
        for n in (2, 19, 40):
            args = (*operands(n, n), torch.randn(n, n))
            (ours,) = run_kernel(kernel, [args[i] for i in order])
            torch.testing.assert_close(ours, net(*args))


@pytest.mark.parametrize(("make", "reason"), [
    (lambda q: F.scaled_dot_product_attention(q, q, q, dropout_p=0.5), "dropout"),
    (lambda q: F.scaled_dot_product_attention(q.double(), q.double(), q.double()), "float64"),
    (lambda q: F.scaled_dot_product_attention(*(q.repeat(1, 1, 1, 30),) * 3), "300 features"),
])  # fmt: skip
def test_refusals_name_the_reason(make: Callable[..., Any], reason: str) -> None:
    class Net(torch.nn.Module):
        def forward(self, q: torch.Tensor) -> torch.Tensor:
            return make(q)  # type: ignore[no-any-return]

    program = capture(Net(), (torch.randn(1, 2, 5, 10),))
    region = Region.of(n for n in program.graph.nodes if op_name(n).startswith("scaled_dot"))
    assert reason in str(BACKEND.supports(region, TARGET))


class Windowed(torch.nn.Module):
    """Attention through a mask that is part of the model."""

    def __init__(self, mask: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, self.mask)


def window(queries: int, keys: int, reach: int) -> torch.Tensor:
    distance = torch.arange(queries)[:, None] - torch.arange(keys)
    return (distance >= 0) & (distance < reach)


def known(net: Windowed, args: tuple[torch.Tensor, ...]) -> list[Kernel]:
    program = capture(net, args)
    region = Region.of(n for n in program.graph.nodes if op_name(n).startswith("scaled_dot"))
    backend = TvmBackend(program)
    values = dict(zip(program.inputs, args, strict=True))
    values |= {n: program.weights[str(n.target)] for n in region.inputs if n.op == "get_attr"}
    kernels = [backend.lower(region, TARGET, s) for s in backend.space(region, TARGET)]
    exact = net.double()(*(a.double() for a in args))
    net.float()
    for kernel in kernels:
        (ours,) = run_kernel(kernel, [values[n] for n in region.inputs])
        assert (ours - exact).abs().max() <= 1e-5, str(kernel.schedule)
    return kernels


@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("reach", [3, 40, 1000])
def test_blocks_hidden_by_a_known_mask(additive: bool, reach: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_family, "SPARSE", (32, 16))
    mask = window(150, 150, reach)
    mask[70:90] = False  # queries that see nothing
    mask[70:90, 149] = True
    if additive:
        mask = torch.zeros(2, 1, 150, 150).masked_fill(~mask, -INF)
    kernels = known(Windowed(mask), operands(150, 150))
    assert any(k.schedule["block"] < 150 for k in kernels)


def test_hidden_blocks_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_family, "SPARSE", (16,))
    q, k, v = operands(64, 64)
    clean = Windowed(window(64, 64, 16))
    kernels = [kernel for kernel in known(clean, (q, k, v)) if kernel.schedule["block"] == 16]
    k[..., 48:, :] = NAN
    for kernel in kernels:
        (ours,) = run_kernel(kernel, [q, k, v, clean.mask])
        assert ours[..., :32, :].isfinite().all() and ours[..., 48:, :].isnan().all()


def test_a_known_mask_for_few_queries() -> None:
    assert known(Windowed(window(1, 100, 30)), operands(1, 100))
    assert known(Windowed(torch.randn(3, 1, 1, 100)), operands(1, 100, batch=3))
