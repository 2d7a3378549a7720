"""Row kernels against eager torch in float64: error at most twice eager's own, NaN and Inf as in eager."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("tvm")

from reference import compare, region_of

from torchlathe.codegen.base import Kernel, Region
from torchlathe.codegen.trial import run_kernel
from torchlathe.codegen.tvm import build
from torchlathe.codegen.tvm.backend import TvmBackend
from torchlathe.targets.target import Target

TARGET = Target("cpu", "cpu", "generic", 2, {}, 0.0, (), 0, ("float32",), vector_bits=256)
BACKEND = TvmBackend()
INF, NAN = math.inf, math.nan


def call(kernel: Kernel, region: Region, graph: Any, args: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    names = [n.name for n in graph.nodes if n.op == "placeholder"]
    inputs = [args[names.index(n.name)] for n in region.inputs]
    assert kernel.destinations is not None
    outs = []
    for d in kernel.destinations:
        shape = [e if isinstance(e, int) else inputs[e[0]].shape[e[1]] for e in d.shape]
        buffer = torch.full([shape[k] for k in d.order or range(len(shape))], 7).to(d.dtype)
        outs.append(buffer.permute(d.seen()))
    assert kernel.call(*inputs, *outs) is None
    return outs


def check(function: Callable[..., Any], *args: torch.Tensor, schedules: int = 2) -> None:
    region, graph = region_of(function, args)
    assert BACKEND.supports(region, TARGET) is None
    eager = function(*args)
    exact = function(*(a.double() if a.is_floating_point() else a for a in args))
    for schedule in list(BACKEND.space(region, TARGET))[:: 3 - schedules]:
        ours = call(BACKEND.lower(region, TARGET, schedule), region, graph, args)[0]
        assert ours.dtype == eager.dtype and ours.shape == eager.shape
        compare(ours, eager, exact)


def strange(rows: int = 6, columns: int = 197) -> torch.Tensor:
    torch.manual_seed(0)
    x = torch.randn(rows, columns)
    x[0, 3], x[1], x[2, 5], x[3, 1] = NAN, -INF, INF, -INF
    x[4, 7], x[4, 8] = INF, -INF
    return x


ONE = {
    "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "silu": F.silu, "relu": torch.relu,
    "softmax": lambda x: torch.softmax(x, -1), "log_softmax": lambda x: torch.log_softmax(x, -1),
    "layer_norm": lambda x: F.layer_norm(x, x.shape[-1:]), "rms_norm": lambda x: F.rms_norm(x, x.shape[-1:]),
    "sigmoid": torch.sigmoid, "tanh": torch.tanh, "erf": torch.erf, "exp": torch.exp, "elu": F.elu,
    "softplus": F.softplus, "hardswish": F.hardswish, "hardsigmoid": F.hardsigmoid, "leaky_relu": F.leaky_relu,
    "clamp": lambda x: x.clamp(-0.5, 0.5), "hardtanh": F.hardtanh, "abs": torch.abs, "neg": torch.neg,
    "sqrt": lambda x: x.abs().sqrt() + x.abs().rsqrt(), "log": lambda x: x.abs().log(),
    "pow": lambda x: x.pow(3) + x.abs().pow(0.5) - x.pow(-1), "amax": lambda x: x - x.amax(-1, keepdim=True),
    "amin": lambda x: x - x.amin(-1, keepdim=True), "mean": lambda x: x.mean(-1), "sum": lambda x: x.sum(-1, True),
    "var": lambda x: x.var(-1, keepdim=True), "isnan": lambda x: x != x,
    "compare": lambda x: torch.logical_or(x > 1, x < -1),
    "kept": lambda x: torch.softmax(x.sigmoid().exp(), -1) + x.sigmoid(),
}  # fmt: skip


@pytest.mark.parametrize("name", ONE)
def test_one_input(name: str) -> None:
    check(ONE[name], strange(), schedules=1)


@pytest.mark.parametrize("columns", [1, 3, 64, 384])
@pytest.mark.parametrize("name", ["layer_norm", "softmax", "gelu"])
def test_widths(name: str, columns: int) -> None:
    if name == "layer_norm" and columns == 1:
        pytest.skip("zero variance: only rounding is left")
    check(ONE[name], torch.randn(5, columns))


def test_layer_norm_with_large_mean() -> None:
    for offset in (1e3, 1e4):
        check(ONE["layer_norm"], torch.randn(16, 384) + offset)


def test_residual_norm_with_two_outputs() -> None:
    def function(x: Any, y: Any, w: Any, b: Any) -> Any:
        h = x + y
        return h, F.layer_norm(h, (384,), w, b)

    args = (torch.randn(2, 9, 384), torch.randn(2, 9, 384), torch.randn(384), torch.randn(384))
    region, graph = region_of(function, args)
    kernel = BACKEND.lower(region, TARGET, next(iter(BACKEND.space(region, TARGET))))
    h, n = call(kernel, region, graph, args)
    assert torch.equal(h, args[0] + args[1])
    torch.testing.assert_close(n, function(*args)[1])


def rotary(q: torch.Tensor, c: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    c, s, half = c.unsqueeze(1), s.unsqueeze(1), q.shape[-1] // 2
    return q * c + torch.cat((-q[..., half:], q[..., :half]), -1) * s


def test_rotary() -> None:
    check(rotary, torch.randn(2, 4, 17, 64), torch.randn(2, 17, 64), torch.randn(1, 17, 64))


def test_masks_and_integers() -> None:
    x, mask = strange(), torch.rand(6, 197) > 0.5
    check(lambda x, m: torch.softmax(x.masked_fill(m, -INF), -1), x, mask)
    check(lambda x, m: torch.where(m, x, torch.relu(x) * 2), x, mask[:1])
    check(lambda a, b: torch.where(a >= b, a * 2, b - 1), torch.randint(-9, 9, (6, 40)), torch.randint(-9, 9, (40,)))
    check(lambda x, y: torch.maximum(x, y) + torch.minimum(x, y), x, x.flip(1).contiguous())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype: torch.dtype) -> None:
    x = strange().to(dtype)
    for name in ("layer_norm", "softmax", "gelu", "silu"):
        check(ONE[name], x, schedules=1)


def test_cast_rounds() -> None:
    x = torch.randn(3, 100)
    region, graph = region_of(lambda x: torch.ops.aten._to_copy(torch.ops.aten._to_copy(x, dtype=torch.bfloat16),
                                                                dtype=torch.float32), (x,))  # fmt: skip
    kernel = BACKEND.lower(region, TARGET, next(iter(BACKEND.space(region, TARGET))))
    assert torch.equal(call(kernel, region, graph, (x,))[0], x.bfloat16().float())


def test_views_and_broadcasts() -> None:
    x = torch.randn(3, 4, 5, 24)
    check(lambda x: (x + 1).contiguous(), x.transpose(1, 2), schedules=1)
    check(lambda x, y: torch.tanh(x) * y, x, torch.randn(4, 1, 24), schedules=1)
    check(lambda x, y: x.contiguous() * y, x[..., 3:20], torch.randn(3, 1, 1, 1), schedules=1)


def heads() -> torch.Tensor:
    return torch.randn(2, 7, 3, 40).transpose(1, 2)


@pytest.mark.parametrize(("function", "args"), [
    (lambda x: x * 2 + 1, (torch.randn(5, 33).t(),)),
    (lambda x, y: rotary(x, y, y), (heads(), torch.randn(1, 1, 7, 40))),
    (lambda x: (x - x.mean(-1, keepdim=True)) * 2, (heads(),)),
    (lambda x, y: x * y.sigmoid(), (torch.randn(2, 5, 6, 24).permute(0, 3, 1, 2), torch.randn(2, 24, 1, 1))),
    (lambda x, y: torch.cat([x, y], 1).relu(), tuple(torch.randn(2, 5, 6, c).permute(0, 3, 1, 2) for c in (8, 13))),
], ids=["columns", "heads", "mean", "gate", "cat"])  # fmt: skip
def test_what_callers_see_lies_as_eager_leaves_it(function: Callable[..., Any], args: tuple[torch.Tensor, ...]) -> None:
    region, graph = region_of(function, args)
    check(function, *args)
    (ours,) = call(BACKEND.lower(region, TARGET, next(iter(BACKEND.space(region, TARGET)))), region, graph, args)
    assert ours.stride() == function(*args).stride() and not ours.is_contiguous()


def test_heads_of_any_number_of_texts_lie_as_eager_leaves_them() -> None:
    batch, tokens = torch.export.Dim("batch", min=2, max=64), torch.export.Dim("tokens", min=2, max=64)
    region, _ = region_of(lambda x: x.transpose(1, 2) * 2, (torch.randn(3, 5, 4, 16),), [{0: batch, 1: tokens}])
    product = Region.of(region.nodes[1:])
    kernel = BACKEND.lower(product, TARGET, next(iter(BACKEND.space(product, TARGET))))
    assert kernel.destinations is not None and kernel.destinations[0].order == (0, 2, 1, 3)
    x = torch.randn(2, 9, 4, 16).transpose(1, 2)
    torch.testing.assert_close(run_kernel(kernel, [x])[0], x * 2)


def test_images_keep_channels_last_between_convolutions() -> None:
    """Nobody sees the result; most of what is read decides, and an explicit copy stays what it is."""
    last, first, gate = torch.randn(2, 5, 6, 24).permute(0, 3, 1, 2), torch.randn(2, 24, 5, 6), torch.randn(2, 24, 1, 1)
    for function, args, order in (
        (lambda x, g: x * g, (last, gate), (0, 2, 3, 1)),
        (lambda x, g: x * g, (first, gate), None),
        (lambda x, y, z: x * y + z, (last, last + 1, first), (0, 2, 3, 1)),
        (lambda x: x.contiguous(), (last,), None),
        (lambda x: x.softmax(-1), (last,), None),
        (lambda x: x * 2, (heads(),), None),
    ):
        region, graph = region_of(function, args)
        region.outputs[0].meta["kept"] = False
        kernel = BACKEND.lower(region, TARGET, next(iter(BACKEND.space(region, TARGET))))
        assert kernel.destinations is not None and kernel.destinations[0].order == order
        torch.testing.assert_close(call(kernel, region, graph, args)[0], function(*args))


@pytest.mark.parametrize("batch", [1, 2, 64])
def test_symbolic_rows(batch: int) -> None:
    dim = torch.export.Dim("batch", min=2, max=4096)
    for name in ("layer_norm", "gelu", "softmax"):
        region, graph = region_of(ONE[name], (torch.randn(4, 8, 48),), [{0: dim}])
        assert BACKEND.supports(region, TARGET) is None
        kernel = BACKEND.lower(region, TARGET, next(iter(BACKEND.space(region, TARGET))))
        for size in (0, batch):
            x = torch.randn(size, 8, 48)
            torch.testing.assert_close(call(kernel, region, graph, (x,))[0], ONE[name](x))


def test_large_flat_and_threads() -> None:
    x = torch.randn(7, 333, 129)
    check(lambda x: F.gelu(x) * 2, x)
    check(ONE["softmax"], torch.randn(2000, 130))


def test_refusals() -> None:
    for function, args, words in (
        (lambda x: x.softmax(0), (torch.randn(3, 4),), "another dimension"),
        (lambda x: x + 1, (torch.randn(3, 4).double(),), "float64"),
        (lambda x: x + 1, (torch.randn(0, 4),), "without elements"),
        (lambda x: (x + 1)[:, :3], (torch.randn(3, 4),), "not contiguous"),
        (lambda x: (x.t(), x.t() + 1), (torch.randn(3, 4),), "callers see"),
    ):
        region, _ = region_of(function, args)
        assert words in (BACKEND.supports(region, TARGET) or "")


def test_wrong_shape_is_an_error() -> None:
    region, _ = region_of(F.gelu, (torch.randn(3, 8),))
    kernel = BACKEND.lower(region, TARGET, next(iter(BACKEND.space(region, TARGET))))
    with pytest.raises((ValueError, TypeError, RuntimeError)):
        kernel.call(torch.randn(3, 9), torch.empty(3, 9))


def test_library(tmp_path: Path) -> None:
    x = torch.randn(4000, 64)
    region, _ = region_of(ONE["softmax"], (x,))
    kernel = BACKEND.lower(region, TARGET, next(iter(BACKEND.space(region, TARGET))))
    assert kernel.library is not None
    kernel.library(str(tmp_path / "kernel.so"))
    out = torch.empty_like(x)
    build.load_library(str(tmp_path / "kernel.so"), kernel.name)(x, out)
    torch.testing.assert_close(out, torch.softmax(x, -1))


# --- rows put together, cut and looked up


def test_rows_put_together() -> None:
    token, patches, positions = torch.randn(1, 1, 48), torch.randn(3, 9, 48), torch.randn(1, 10, 48)

    def joined(t: torch.Tensor, p: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(torch.cat([t.expand(3, 1, 48), p], 1) + x, (48,))

    check(joined, token, patches, positions)
    check(lambda t, p, x: torch.cat([p, t.expand(3, 1, 48), p * 2], 1).sum(-1), token, patches, positions)


def test_rows_cut_and_put_together() -> None:
    a, b = torch.randn(2, 7, 4, 33), torch.randn(2, 3, 4, 33)
    check(lambda a, b: torch.softmax(torch.cat([a[:, 2:6], b[:, -1:]], 1), -1), a, b)
    check(lambda a, b: a[:, 1:4] * b + a[:, 4:, 1:2], a, b)


def test_rows_put_together_of_symbolic_length() -> None:
    args = (torch.randn(2, 1, 40), torch.randn(2, 9, 40))
    length = torch.export.Dim("length", min=2, max=64)

    def function(token: torch.Tensor, patches: torch.Tensor) -> torch.Tensor:
        return torch.cat([token, patches], 1).exp()

    region, _ = region_of(function, args, (None, {1: length}))
    assert BACKEND.supports(region, TARGET) is None
    kernel = BACKEND.lower(region, TARGET, next(iter(BACKEND.space(region, TARGET))))
    for patches in (args[1], torch.randn(2, 2, 40), torch.randn(2, 31, 40)):
        (ours,) = run_kernel(kernel, [args[0], patches])  # its length is one more than an input's
        torch.testing.assert_close(ours, function(args[0], patches), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", [torch.int64, torch.int32])
def test_looked_up_rows_with_norm(kind: torch.dtype) -> None:
    table, positions, ids = torch.randn(50, 40), torch.randn(12, 40), torch.randint(0, 50, (3, 12), dtype=kind)
    ids[0, 0], ids[2, 11] = 0, 49
    check(lambda t, x, i: F.layer_norm(F.embedding(i, t) + x, (40,)), table, positions, ids)
    check(lambda t, x, i: F.embedding(i, t), table, positions, ids)


@pytest.mark.parametrize("wrong", [50, -1])
def test_an_entry_that_a_table_does_not_have_is_an_error(wrong: int) -> None:
    table, ids = torch.randn(50, 40), torch.randint(0, 50, (3, 400))
    ids[1, 7] = wrong
    region, graph = region_of(lambda t, i: F.embedding(i, t).exp(), (table, ids))
    for schedule in BACKEND.space(region, TARGET):
        with pytest.raises(IndexError, match="out of range"):
            call(BACKEND.lower(region, TARGET, schedule), region, graph, (table, ids))


def test_a_look_up_for_some_rows_is_refused() -> None:
    table, ids, token = torch.randn(50, 40), torch.randint(0, 50, (3, 12)), torch.randn(3, 1, 40)
    region, _ = region_of(lambda t, i, c: torch.cat([c, F.embedding(i, t)], 1), (table, ids, token))
    assert "some rows only" in (BACKEND.supports(region, TARGET) or "")
