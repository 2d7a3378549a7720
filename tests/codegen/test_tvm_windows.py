"""Kernels that reduce over windows (pooling, other dimensions than the last) or groups, against torch in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("tvm")

from reference import compare, region_of

from torchlathe.codegen.plans.windows import reduces_windows
from torchlathe.codegen.trial import run_kernel
from torchlathe.codegen.tvm.backend import TvmBackend
from torchlathe.targets.target import Target

TARGET = Target("cpu", "cpu", "generic", 2, {}, 0.0, (), 0, ("float32",), vector_bits=256)
BACKEND = TvmBackend()
LAST = torch.channels_last


def check(function: Callable[..., Any], *args: torch.Tensor) -> torch.Tensor:
    region, graph = region_of(function, args)
    assert BACKEND.supports(region, TARGET) is None
    names = [n.name for n in graph.nodes if n.op == "placeholder"]
    values = [args[names.index(n.name)] for n in region.inputs]
    eager = function(*args)
    exact = function(*(a.double() if a.is_floating_point() else a for a in args))
    for schedule in BACKEND.space(region, TARGET):
        ours = run_kernel(BACKEND.lower(region, TARGET, schedule), values)[0]
        assert ours.dtype == eager.dtype and ours.shape == eager.shape
        compare(ours, eager, exact)
    return ours


POOLS = {
    "max": lambda x: F.max_pool2d(x, 3, 2, 1),
    "max-dilated": lambda x: F.max_pool2d(x, (2, 3), 1, (0, 1), dilation=(2, 1)),
    "avg": lambda x: F.avg_pool2d(x, 3, 2, 1),
    "avg-inside": lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False),
    "avg-divided": lambda x: F.avg_pool2d(x, 2, 2, divisor_override=3),
    "adaptive": lambda x: F.adaptive_avg_pool2d(x, (3, 7)),
    "global": lambda x: F.adaptive_avg_pool2d(x, 1),
    "amax": lambda x: x.amax((2, 3), keepdim=True),
    "amin": lambda x: x.amin((-1, -2)),
    "mean": lambda x: x.mean((2, 3)),
}


@pytest.mark.parametrize("channels", [3, 70])
@pytest.mark.parametrize("name", POOLS)
def test_pooling_of_images(name: str, channels: int) -> None:
    torch.manual_seed(0)
    check(POOLS[name], torch.randn(2, channels, 12, 14).to(memory_format=LAST))


@pytest.mark.parametrize("name", ["max", "avg-inside", "global"])
def test_channels_outermost(name: str) -> None:
    check(POOLS[name], torch.randn(2, 20, 12, 14))


def test_the_result_lies_in_memory_as_the_image() -> None:
    ours = check(POOLS["max"], torch.randn(2, 16, 12, 14).to(memory_format=LAST))
    assert ours.is_contiguous(memory_format=LAST)


@pytest.mark.parametrize("name", ["max", "avg", "amin", "mean"])
def test_nan_and_infinity_spread(name: str) -> None:
    x = torch.randn(1, 20, 12, 14)
    x[0, 0, 3, 3], x[0, 1, 0, 0], x[0, 2, 5, 5], x[0, 3] = math.nan, math.inf, -math.inf, -math.inf
    check(POOLS[name], x.to(memory_format=LAST))


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_half_precision(kind: torch.dtype) -> None:
    x = torch.randn(2, 40, 8, 8).to(kind).to(memory_format=LAST)
    check(lambda x: F.relu(F.max_pool2d(x, 2)), x)
    region, _ = region_of(lambda x: x.mean(1), (torch.randn(2, 9, 33).to(kind),))
    assert BACKEND.supports(region, TARGET) is None


def test_pooling_of_signals_and_volumes() -> None:
    check(lambda x: F.avg_pool1d(x, 3, 2, 1), torch.randn(2, 18, 31))
    check(lambda x: F.adaptive_avg_pool1d(x, 1), torch.randn(2, 18, 31))
    check(lambda x: F.max_pool3d(x, 2), torch.randn(2, 18, 4, 6, 8))
    check(lambda x: F.max_pool2d(x, 2), torch.randn(18, 6, 8))


def test_masked_mean_of_tokens() -> None:
    """What sentence embeddings do after the last layer."""
    tokens, mask = torch.randn(3, 200, 384), torch.ones(3, 200, dtype=torch.int64)
    mask[1, 50:] = 0

    def pooled(t: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
        return (t * m[:, :, None]).sum(1) * 0.5

    check(pooled, tokens, mask)


def test_tail_and_residual() -> None:
    x, y = torch.randn(2, 40, 8, 8).to(memory_format=LAST), torch.randn(2, 40, 4, 4).to(memory_format=LAST)
    check(lambda x, y: F.gelu(F.avg_pool2d(x, 2) * 2 + y), x, y)


def test_long_sums_stay_accurate() -> None:
    torch.manual_seed(0)
    check(lambda x: x.sum(0), torch.rand(100_000, 20) + 1000)


def test_length_known_late() -> None:
    length = torch.export.Dim("length", min=1, max=4096)
    region, _ = region_of(lambda x: x.mean(1).exp(), (torch.randn(2, 9, 40),), ({1: length},))
    assert BACKEND.supports(region, TARGET) is None
    for schedule in BACKEND.space(region, TARGET):
        kernel = BACKEND.lower(region, TARGET, schedule)
        for n in (1, 63, 64, 65, 500):
            x = torch.randn(2, n, 40)
            compare(run_kernel(kernel, [x])[0], x.mean(1).exp(), x.double().mean(1).exp())


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x: F.adaptive_avg_pool2d(x, 5), "several sizes"),
        (lambda x: F.max_pool2d(x, 3, 2, ceil_mode=True), "beyond the last element"),
        (lambda x: x.sum(), "keeps no dimension"),
        (lambda x: torch.softmax(x, -1).mean(1), "not pointwise|another shape"),
        (lambda x: x.mean(1, dtype=torch.float64), "float64"),
    ],
)
def test_refusals(function: Callable[..., Any], reason: str) -> None:
    import re

    region, _ = region_of(function, (torch.randn(2, 16, 12, 14),))
    found = BACKEND.supports(region, TARGET)
    assert found is not None and re.search(reason, found), found


def test_a_reduction_of_the_last_dimension_is_no_window() -> None:
    region, _ = region_of(lambda x: x.mean(-1), (torch.randn(2, 16),))
    assert not any(map(reduces_windows, region.nodes))


# --- group normalisation


def norm_of(groups: int) -> Callable[..., torch.Tensor]:
    return lambda x, w, b: F.silu(F.group_norm(x, groups, w, b))


@pytest.mark.parametrize(("channels", "groups"), [(32, 8), (30, 3), (7, 7), (160, 32), (12, 1)])
@pytest.mark.parametrize("last", [True, False])
def test_group_norm(channels: int, groups: int, last: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, channels, 5, 6) + 3
    ours = check(norm_of(groups), x.to(memory_format=LAST) if last else x, torch.randn(channels), torch.randn(channels))
    assert ours.is_contiguous(memory_format=LAST)


def test_group_norm_without_scale_of_signals_and_volumes() -> None:
    check(lambda x: F.group_norm(x, 4), torch.randn(3, 8, 31))
    check(lambda x: F.group_norm(x, 4, eps=0.1) * 2, torch.randn(1, 8, 3, 4, 5))


def test_group_norm_with_large_mean_and_special_values() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 32, 8, 8) + 1000
    check(lambda x: F.group_norm(x, 4), x)
    x[0, 0, 1, 1], x[1, 9, 0, 0] = math.nan, math.inf
    check(lambda x: F.group_norm(x, 4), x)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_group_norm_in_half_precision(kind: torch.dtype) -> None:
    x, w = torch.randn(2, 32, 8, 8).to(kind).to(memory_format=LAST), torch.randn(32).to(kind)
    region, _ = region_of(lambda x, w: F.group_norm(x, 4, w), (x, w))
    assert BACKEND.supports(region, TARGET) is None
    exact = F.group_norm(x.double(), 4, w.double())
    (ours,) = run_kernel(BACKEND.lower(region, TARGET, next(iter(BACKEND.space(region, TARGET)))), [x, w])
    assert ours.dtype is kind
    torch.testing.assert_close(ours.double(), exact, atol=0.02, rtol=0.02)


def test_group_norm_of_late_size() -> None:
    rows = torch.export.Dim("rows", min=2, max=64)
    region, _ = region_of(lambda x: F.group_norm(x, 4), (torch.randn(2, 16, 6, 5),), ({2: rows},))
    assert BACKEND.supports(region, TARGET) is None
    kernel = BACKEND.lower(region, TARGET, next(iter(BACKEND.space(region, TARGET))))
    for n in (2, 31):
        x = torch.randn(2, 16, n, 5)
        compare(run_kernel(kernel, [x])[0], F.group_norm(x, 4), F.group_norm(x.double(), 4))
