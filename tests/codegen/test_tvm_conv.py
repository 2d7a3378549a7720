"""Convolution kernels against torch in float64: windows, borders, strides, depthwise, layouts, fused tails."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.export import Dim
from torch.nn import functional as F

pytest.importorskip("tvm")

from torchlathe.codegen.base import Region
from torchlathe.codegen.trial import run_kernel
from torchlathe.codegen.tvm.backend import TvmBackend
from torchlathe.passes.capture import capture
from torchlathe.targets.target import Target

LAST = torch.channels_last
TARGET = Target("cpu", "cpu", "generic", 2, {}, 0.0, (32768, 1 << 20), 0, (), vector_bits=256)


class Conv(torch.nn.Module):
    """A convolution, then what `tail` makes of its result."""

    def __init__(self, channels: tuple[int, int], window: Any, tail: Any = None, bias: bool = True, **options: Any):
        super().__init__()
        torch.manual_seed(0)
        self.conv = torch.nn.Conv2d(*channels, window, bias=bias, **options)
        self.tail = tail

    def forward(self, x: torch.Tensor, *rest: torch.Tensor) -> Any:
        y = self.conv(x)
        return y if self.tail is None else self.tail(y, *rest)


def check(net: Conv, *args: torch.Tensor, dynamic: Any = None, calls: Any = None, target: Target = TARGET) -> str:
    """Compare every schedule with eager in float64, on `args` or on each tuple in `calls`. Returns the schedules."""
    program = capture(net.eval(), args, dynamic_shapes=dynamic)
    region = Region.of(n for n in program.graph.nodes if n.op == "call_function" and "sym_size" not in str(n.target))
    backend = TvmBackend(program)
    assert backend.supports(region, target) is None
    schedules = list(backend.space(region, target))
    for schedule in schedules:
        kernel = backend.lower(region, target, schedule)
        for values in calls or [args]:
            env = dict(zip(program.inputs, values, strict=True))
            inputs = [env[n] if n in env else program.weights[str(n.target)] for n in region.inputs]
            (ours,) = run_kernel(kernel, inputs)
            eager = net(*values)
            exact = net.double()(*(v.double() for v in values))
            net.float()
            assert ours.shape == eager.shape
            assert ours.movedim(1, -1).is_contiguous() or 1 in ours.shape
            limit = 2 * (eager - exact).abs().max() + 1e-5 * exact.abs().max()
            assert (ours - exact).abs().max() <= limit, str(schedule)
    return " ".join(map(str, schedules))


def image(channels: int, rows: int = 9, columns: int = 11, batch: int = 2) -> torch.Tensor:
    torch.manual_seed(rows * columns)
    return torch.randn(batch, channels, rows, columns)


@pytest.mark.parametrize("channels", [(3, 8), (8, 3), (16, 40), (5, 1)])
@pytest.mark.parametrize("options", [
    {"window": 1}, {"window": 3, "padding": 1}, {"window": 3, "stride": 2, "padding": 1},
    {"window": (3, 5), "padding": (1, 2)}, {"window": 2, "stride": 2}, {"window": 3, "dilation": 2, "padding": 2},
    {"window": 7, "stride": 2, "padding": 3, "bias": False}, {"window": 1, "stride": 2},
], ids=str)  # fmt: skip
def test_windows(channels: tuple[int, int], options: dict[str, Any]) -> None:
    check(Conv(channels, options["window"], **{k: v for k, v in options.items() if k != "window"}), image(channels[0]))


@pytest.mark.parametrize("channels", [1, 8, 19])
@pytest.mark.parametrize("options", [
    {"window": 3, "padding": 1}, {"window": 3, "stride": 2, "padding": 1}, {"window": 7, "padding": 3},
    {"window": 3},
], ids=str)  # fmt: skip
def test_depthwise(channels: int, options: dict[str, Any]) -> None:
    rest = {k: v for k, v in options.items() if k != "window"}
    net = Conv((channels, channels), options["window"], groups=channels, **rest)
    check(net, image(channels))
    check(net, image(channels).contiguous(memory_format=LAST))


def test_layouts_of_the_image() -> None:
    net = Conv((16, 8), 3, padding=1)
    check(net, image(16).contiguous(memory_format=LAST))
    check(net, image(32)[:, ::2])
    check(net, image(16, 18, 22)[:, :, ::2, 1::2])
    check(Conv((16, 8), 1), image(16).contiguous(memory_format=LAST))


def test_tail_is_fused() -> None:
    residual = image(24).contiguous(memory_format=LAST)
    check(Conv((16, 24), 1, lambda y, r: torch.relu(y + r)), image(16), residual)
    check(Conv((16, 24), 3, lambda y, r: torch.relu(y + r), padding=1), image(16), image(24))
    check(Conv((16, 16), 3, lambda y: F.hardtanh(y, 0.0, 6.0), groups=16, padding=1), image(16))
    check(Conv((16, 24), 1, lambda y, s: F.silu(y) * s), image(16), torch.randn(2, 24, 1, 1))


class Framed(Conv):
    def forward(self, x: torch.Tensor) -> Any:
        return super().forward(F.pad(x, (0, 1, 2, 1)))


def test_a_frame_of_zeros_is_part_of_the_window() -> None:
    check(Framed((8, 12), 3, stride=2), image(8))
    check(Framed((8, 8), 3, padding=1, groups=8), image(8))


@pytest.mark.parametrize("groups", [1, 8])
@pytest.mark.parametrize("window", [3, 4, (2, 5)])
def test_padding_by_name(groups: int, window: Any) -> None:
    check(Conv((8, 8), window, padding="same", groups=groups), image(8))
    check(Conv((8, 8), window, padding="valid", groups=groups, stride=2), image(8))


@pytest.mark.parametrize("columns", [1, 5, 9, 30])
def test_depthwise_rows_of_all_lengths(columns: int) -> None:
    for options in ({"padding": 1}, {"padding": (1, 2), "stride": 2}, {"padding": 2, "dilation": 2}):
        check(Conv((10, 10), 3, groups=10, **options), image(10, columns=columns).contiguous(memory_format=LAST))


@pytest.mark.parametrize("options", [{"padding": 1}, {"stride": 2}, {"padding": 2, "dilation": 2}], ids=str)
def test_depthwise_asks_for_rows_ahead(options: dict[str, Any]) -> None:
    """Of images that the cores' own caches do not hold, also beyond the end of the last one."""
    small = replace(TARGET, caches=(1024, 2048))
    net = Conv((24, 24), 3, groups=24, **options)
    assert "ahead=True" in check(net, image(24).contiguous(memory_format=LAST), target=small)
    assert "ahead=True" not in check(net, image(24))


class Signal(Conv):
    """A convolution over signals."""

    def __init__(self, channels: tuple[int, int], window: int, tail: Any = None, **options: Any):
        super().__init__(channels, 1, tail)
        self.conv = torch.nn.Conv1d(*channels, window, **options)


@pytest.mark.parametrize("options", [
    {"window": 1}, {"window": 3, "padding": 1}, {"window": 10, "stride": 5}, {"window": 4, "padding": 3, "groups": 8},
    {"window": 3, "padding": "same", "dilation": 2}, {"window": 3, "stride": 2, "padding": 1, "groups": 8},
], ids=str)  # fmt: skip
def test_signals(options: dict[str, Any]) -> None:
    x, bias = torch.randn(2, 8, 50), torch.randn(2, 8, 1)
    check(Signal((8, 8), **options), x)
    check(
        Signal((8, 8), tail=lambda y, b: F.gelu(y) + b, **options), x.transpose(1, 2).contiguous().transpose(1, 2), bias
    )


def test_a_window_larger_than_the_image() -> None:
    check(Conv((9, 9), 7, padding=3, groups=9), image(9, rows=2, columns=3))
    check(Conv((9, 5), 7, padding=3), image(9, rows=2, columns=3))


def test_batch_known_at_run_time() -> None:
    for net in (Conv((8, 12), 3, padding=1), Conv((8, 8), 3, padding=1, groups=8), Conv((8, 12), 1)):
        calls = [(image(8, batch=n),) for n in (2, 3, 5)]
        check(net, image(8, batch=3), dynamic=({0: Dim("batch", min=2, max=16)},), calls=calls)


@pytest.mark.parametrize(("net", "reason"), [
    (Conv((8, 8), 3, groups=2), "not depthwise"),
    (Conv((8, 16), 3, groups=8), "not depthwise"),
    (Conv((8, 8), 3, lambda y: y.mean(-1)), "has no rule|shape|pointwise"),
])  # fmt: skip
def test_refusals_name_the_reason(net: Conv, reason: str) -> None:
    program = capture(net.eval(), (image(8),))
    region = Region.of(n for n in program.graph.nodes if n.op == "call_function")
    found = str(TvmBackend(program).supports(region, TARGET))
    assert any(r in found for r in reason.split("|")), found
