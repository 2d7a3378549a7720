"""Kernels of convolutional nets, run by Triton's interpreter, against torch in float64 (TRITON_INTERPRET=1)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

pytest.importorskip("triton")

from reference import Wrapped, compare

from torchlathe import targets
from torchlathe.codegen.base import Region, in_memory
from torchlathe.codegen.partition import partition
from torchlathe.codegen.trial import run_kernel
from torchlathe.codegen.triton.backend import TritonBackend
from torchlathe.passes.base import Context
from torchlathe.passes.capture import capture
from torchlathe.passes.exact.fold_norm import FoldNorm

pytestmark = pytest.mark.slow  # the interpreter needs minutes for these

LAST = torch.channels_last
FORMATS = (torch.contiguous_format, LAST)
HALVES = (torch.float16, torch.bfloat16)
TARGET = targets.get("nvidia-sm90")


class Conv(nn.Module):
    """A convolution, then what `tail` makes of its result."""

    def __init__(self, conv: nn.Module, tail: Any = None) -> None:
        super().__init__()
        self.conv, self.tail = conv, tail

    def forward(self, x: torch.Tensor, *rest: torch.Tensor) -> Any:
        y = self.conv(x)
        return y if self.tail is None else self.tail(y, *rest)


def whole(net: nn.Module, args: tuple[torch.Tensor, ...], dynamic: Any = None) -> tuple[Any, Region]:
    """The program of a net, and all of its operators as one region."""
    program = capture(net.eval(), args, dynamic_shapes=dynamic)
    calls = [n for n in program.graph.nodes if n.op == "call_function" and "sym_size" not in str(n.target)]
    return program, Region.of(calls)


def kinds_of(program: Any, region: Region) -> set[str]:
    return {s.name for s in TritonBackend(program).space(region, TARGET)}


def near(ours: torch.Tensor, eager: torch.Tensor, exact: torch.Tensor) -> None:
    """As `compare`, but the interpreter cuts float32 off to bfloat16 where a GPU rounds."""
    if ours.dtype is torch.bfloat16:
        scale = exact.abs().max()
        assert (ours.double() - exact).abs().max() <= 2 * (eager.double() - exact).abs().max() + scale / 128
    else:
        compare(ours, eager, exact)


def check(net: nn.Module | Callable[..., Any], *args: torch.Tensor, most: int | None = 2, dynamic: Any = None,
          calls: Any = None) -> tuple[set[str], torch.Tensor]:  # fmt: skip
    """Compare schedules with float64 on `args`, or on each tuple in `calls`; kinds of schedules, the last result."""
    net = net if isinstance(net, nn.Module) else Wrapped(net)
    program, region = whole(net, args, dynamic)
    backend, names = TritonBackend(program), set[str]()
    assert backend.supports(region, TARGET) is None
    for schedule in itertools.islice(backend.space(region, TARGET), most):
        kernel = backend.lower(region, TARGET, schedule)
        names.add(schedule.name)
        for values in calls or [args]:
            env = dict(zip(program.inputs, values, strict=True))
            inputs = [env[n] if n in env else program.weights[str(n.target)] for n in region.inputs]
            (ours,) = run_kernel(kernel, inputs)
            eager = net(*values)
            exact = doubled(net, *values)
            assert ours.shape == eager.shape and ours.dtype == eager.dtype
            near(ours, eager, exact)
    return names, ours


def doubled(net: nn.Module, *args: torch.Tensor) -> torch.Tensor:
    """The net's answer in float64."""
    kinds = {k: v.clone() for k, v in net.state_dict().items()}
    dtype = next((p.dtype for p in net.parameters()), torch.float32)
    exact = net.double()(*(a.double() if a.is_floating_point() else a for a in args))
    net.to(dtype).load_state_dict(kinds)
    return exact


def image(channels: int, rows: int = 7, columns: int = 9, batch: int = 2) -> torch.Tensor:
    torch.manual_seed(rows * columns)
    return torch.randn(batch, channels, rows, columns)


# --- convolutions

WINDOWS = {
    "3x3": {"kernel_size": 3, "padding": 1},
    "stride": {"kernel_size": 3, "stride": 2, "padding": 1},
    "dilation": {"kernel_size": 3, "dilation": 2, "padding": 2},
    "uneven": {"kernel_size": (3, 2), "padding": (1, 0), "stride": (1, 2), "bias": False},
    "inside": {"kernel_size": 3},
    "large": {"kernel_size": 7, "stride": 2, "padding": 3},
    "beyond": {"kernel_size": 9, "padding": 4, "dilation": (1, 2)},
}


@pytest.mark.parametrize("channels", [(3, 8), (24, 20)])
@pytest.mark.parametrize("name", WINDOWS)
def test_windows(name: str, channels: tuple[int, int]) -> None:
    x = image(channels[0], columns=19 if name == "beyond" else 9)
    x = x if channels[0] == 3 else x.to(memory_format=LAST)
    names, ours = check(Conv(nn.Conv2d(*channels, **WINDOWS[name])), x, most=1)
    assert names == {"conv"} and ours.is_contiguous(memory_format=LAST)


def test_layouts_of_the_image() -> None:
    net = Conv(nn.Conv2d(40, 3, 3, padding=1))
    for x in (image(40), image(80)[:, ::2], image(40, 14, 18)[:, :, ::2, 1::2], image(40)[:1].expand(3, -1, -1, -1)):
        check(net, x, most=1)
    check(Conv(nn.Conv2d(3, 8, 3, padding=1)), image(3).to(memory_format=LAST))


@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize("options", [
    {"kernel_size": 3, "padding": 1}, {"kernel_size": 7, "padding": 3, "stride": 2}, {"kernel_size": 3},
    {"kernel_size": (2, 9), "padding": (0, 4), "dilation": (2, 1), "bias": False},
], ids=str)  # fmt: skip
def test_depthwise(options: dict[str, Any], form: Any) -> None:
    channels = 70 if form is LAST else 5
    net = Conv(nn.Conv2d(channels, channels, groups=channels, **options))
    names, ours = check(net, image(channels, 11).to(memory_format=form))
    assert names == {"depthwise"} and ours.is_contiguous(memory_format=LAST)


def test_a_window_of_one_pixel_is_a_product() -> None:
    for form in FORMATS:
        names, ours = check(Conv(nn.Conv2d(24, 20, 1), torch.relu), image(24).to(memory_format=form))
        assert names == {"matmul"} and ours.is_contiguous(memory_format=LAST)
        assert check(Conv(nn.Conv2d(24, 20, 1, stride=2)), image(24).to(memory_format=form))[0] == {"matmul"}
    assert check(Conv(nn.Conv2d(24, 20, 1, padding=1)), image(24))[0] == {"conv"}


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_precision(dtype: torch.dtype) -> None:
    x = image(24).to(dtype)
    for conv in (nn.Conv2d(24, 20, 3, padding=1, stride=2), nn.Conv2d(24, 24, 3, padding=1, groups=24),
                 nn.Conv2d(24, 20, 1)):  # fmt: skip
        for form in FORMATS:
            check(Conv(conv, F.silu).to(dtype), x.to(memory_format=form))
    check(Conv(nn.Conv2d(3, 8, 3, padding=1)).to(dtype), image(3).to(dtype))


def test_the_depth_is_split_where_there_are_few_pixels() -> None:
    net = Conv(nn.Conv2d(96, 24, 3, padding=1), torch.relu)
    program, region = whole(net, (image(96, 3, 3, 1),))
    splits = {s["splits"] for s in TritonBackend(program).space(region, TARGET)}
    assert len(splits) > 1
    check(net, image(96, 3, 3, 1), most=4)


def test_tail_is_fused() -> None:
    residual = image(24)
    for form in FORMATS:
        other = residual.to(memory_format=form)
        check(Conv(nn.Conv2d(16, 24, 3, padding=1), lambda y, r: torch.relu(y + r)), image(16), other)
        check(Conv(nn.Conv2d(16, 24, 1), lambda y, r: torch.relu(y + r)), image(16), other)
        check(Conv(nn.Conv2d(24, 24, 3, padding=1, groups=24), lambda y, r: F.gelu(y) * r), image(24), other)
    gate = torch.rand(2, 24, 1, 1)
    check(Conv(nn.Conv2d(16, 24, 1), lambda y, s: F.hardswish(y) * s), image(16), gate)


def test_nothing_beyond_the_image_is_read() -> None:
    """Pixels and channels around a view are NaN in memory."""
    for channels, groups in ((3, 1), (24, 1), (24, 24)):
        around = torch.full((2, channels + 2, 9, 11), math.nan)
        around[:, 1:-1, 1:-1, 1:-1] = image(channels)
        x = around[:, 1:-1, 1:-1, 1:-1]
        for padding in (0, 1, 2):
            _, ours = check(Conv(nn.Conv2d(channels, channels, 3, padding=padding, groups=groups)), x, most=1)
            assert not ours.isnan().any()


@pytest.mark.parametrize("channels", [3, 24])
def test_infinity_stays_in_its_windows(channels: int) -> None:
    x = image(channels)
    x[0, 1, 2, 3], x[1, 0, 0, 0] = math.inf, math.nan
    check(Conv(nn.Conv2d(channels, 8, 3, padding=1)), x, most=1)
    check(Conv(nn.Conv2d(channels, channels, 3, padding=1, groups=channels)), x, most=1)


class Framed(Conv):
    def forward(self, x: torch.Tensor) -> Any:
        return super().forward(F.pad(x, (0, 1, 2, 1)))


def test_a_frame_of_zeros_is_part_of_the_window() -> None:
    check(Framed(nn.Conv2d(8, 12, 3, stride=2)), image(8))
    check(Framed(nn.Conv2d(8, 8, 3, padding=1, groups=8)), image(8))
    program, region = whole(Framed(nn.Conv2d(8, 12, 1)), (image(8),))
    assert kinds_of(program, region) == {"conv"}
    alone = Region.of([region.nodes[0]])
    assert TritonBackend(program).supports(alone, TARGET) is not None
    assert len(partition(program, [TritonBackend(program)], TARGET)) == 1


@pytest.mark.parametrize("groups", [1, 8])
def test_padding_by_name(groups: int) -> None:
    check(Conv(nn.Conv2d(8, 8, (2, 5), padding="same", groups=groups)), image(8), most=1)
    check(Conv(nn.Conv2d(8, 8, 3, padding="valid", groups=groups, stride=2)), image(8), most=1)


@pytest.mark.parametrize("options", [
    {"kernel_size": 1}, {"kernel_size": 3, "padding": 1}, {"kernel_size": 10, "stride": 5},
    {"kernel_size": 4, "padding": 3, "groups": 16}, {"kernel_size": 3, "padding": "same", "dilation": 2},
], ids=str)  # fmt: skip
def test_signals(options: dict[str, Any]) -> None:
    x, bias = torch.randn(2, 16, 33), torch.randn(2, 16, 1)
    turned = x.transpose(1, 2).contiguous().transpose(1, 2)
    check(Conv(nn.Conv1d(16, 16, **options)), x, most=1)
    check(Conv(nn.Conv1d(16, 16, **options), lambda y, b: F.gelu(y) + b), turned, bias, most=1)


def test_number_of_images_known_late() -> None:
    batch = torch.export.Dim("batch", min=1, max=64)
    for conv in (nn.Conv2d(24, 20, 3, padding=1), nn.Conv2d(24, 20, 1), nn.Conv2d(24, 24, 3, groups=24)):
        calls = [(image(24, batch=n),) for n in (1, 3)]
        check(Conv(conv, torch.relu), image(24), dynamic=({0: batch},), most=1, calls=calls)


class Computed(nn.Module):
    def forward(self, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, w)


@pytest.mark.parametrize(
    ("net", "args", "reason"),
    [
        (Conv(nn.Conv2d(8, 8, 3, groups=4)), (image(8),), "grouped"),
        (Conv(nn.ConvTranspose2d(8, 8, 3)), (image(8),), "rule"),
        (Computed(), (image(8), torch.randn(4, 8, 3, 3)), "not a constant"),
        (Conv(nn.Conv2d(8, 8, 3)).double(), (image(8).double(),), "float64"),
        (Conv(nn.Conv2d(8, 8, 3), lambda y: y.softmax(-1)), (image(8),), "pointwise|another shape|last"),
    ],
)
def test_refusals(net: nn.Module, args: tuple[torch.Tensor, ...], reason: str) -> None:
    import re

    program, region = whole(net, args)
    found = TritonBackend(program).supports(region, TARGET)
    assert found is not None and re.search(reason, found), found


# --- windows

POOLS = {
    "max": lambda x: F.max_pool2d(x, 3, 2, 1),
    "max-dilated": lambda x: F.relu(F.max_pool2d(x, (2, 3), 1, (0, 1), dilation=(2, 1))),
    "avg": lambda x: F.avg_pool2d(x, 3, 2, 1) * 2,
    "avg-inside": lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False),
    "avg-divided": lambda x: F.avg_pool2d(x, 2, 2, divisor_override=3),
    "avg-wide": lambda x: F.avg_pool2d(x, 7, 1, 3, count_include_pad=False),
    "adaptive": lambda x: F.adaptive_avg_pool2d(x, (3, 7)),
    "global": lambda x: F.adaptive_avg_pool2d(x, 1),
    "mean": lambda x: x.mean((2, 3)),
    "amin": lambda x: x.exp().amin((-1, -2)),
    "batch": lambda x: x.sum(0),
}


@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize("name", POOLS)
def test_pooling_of_images(name: str, form: Any) -> None:
    kinds = ((70, torch.float32), (8, torch.float16)) if form is LAST else ((3, torch.float32), (8, torch.bfloat16))
    for channels, dtype in kinds:
        names, ours = check(POOLS[name], image(channels, 12, 14).to(dtype).to(memory_format=form))
        assert names == {"windows"}
        if ours.dim() == 4 and form is LAST:
            assert ours.is_contiguous(memory_format=LAST)


@pytest.mark.parametrize("name", ["max", "avg", "amin", "mean", "global"])
def test_nan_and_infinity_spread(name: str) -> None:
    x = image(20, 12, 14, 1)
    x[0, 0, 3, 3], x[0, 1, 0, 0], x[0, 2, 5, 5], x[0, 3] = math.nan, math.inf, -math.inf, -math.inf
    check(POOLS[name], x.to(memory_format=LAST))


def test_pooling_of_signals_and_volumes() -> None:
    check(lambda x: F.avg_pool1d(x, 3, 2, 1), torch.randn(2, 18, 31))
    check(lambda x: F.max_pool3d(x, 2), torch.randn(2, 18, 4, 6, 8))
    check(lambda x, y: F.gelu(F.avg_pool2d(x, 2) * 2 + y), image(18, 6, 8), image(18, 3, 4))


def test_masked_mean_of_tokens() -> None:
    tokens, mask = torch.randn(3, 70, 50), torch.ones(3, 70, 1)
    mask[1, 50:] = 0
    check(lambda t, m: (t * m).sum(1) * 0.5, tokens, mask)


def test_number_of_tokens_known_late() -> None:
    length = torch.export.Dim("length", min=2, max=4096)
    calls = [(torch.randn(2, n, 40),) for n in (2, 63, 65)]
    check(lambda x: x.mean(1).exp(), torch.randn(2, 9, 40), dynamic={"args": ({1: length},)}, calls=calls)


# --- group normalisation


@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_group_norm(dtype: torch.dtype, form: Any) -> None:
    for groups, channels in ((6, 24), (4, 4), (1, 10)):
        net = nn.Sequential(nn.GroupNorm(groups, channels), nn.SiLU()).to(dtype)
        nn.init.normal_(net[0].weight), nn.init.normal_(net[0].bias)
        names, ours = check(net, image(channels).to(dtype).to(memory_format=form))
        assert names == {"groups"} and ours.is_contiguous(memory_format=form)


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_large_groups_are_walked_and_shared(form: Any) -> None:
    """Groups of 9,900 elements around 30, of which the last tile is not whole."""
    x = 30 + image(30, 33, 20, 1).to(memory_format=form)
    net = nn.GroupNorm(2, 30)
    program, region = whole(net, (x,))
    assert {s["splits"] for s in TritonBackend(program).space(region, TARGET)} == {1, 2}
    check(net, x, most=None)


def test_any_number_of_images() -> None:
    batch = torch.export.Dim("batch", min=1, max=64)
    calls = [(torch.randn(3, 12, 7, 7),), (torch.randn(1, 12, 7, 7),)]
    for function in (lambda x: F.group_norm(x, 3), lambda x: F.adaptive_avg_pool2d(x, 1) * 2):
        check(function, torch.randn(2, 12, 7, 7), dynamic={"args": ({0: batch},)}, calls=calls)


def test_residual_after_group_norm() -> None:
    x, other, scale = image(12), image(12, 7, 9, 1), torch.randn(2, 12, 1, 1)
    for form in FORMATS:
        check(lambda x, r, s: F.relu(F.group_norm(x, 3) * s + r), x.to(memory_format=form), other, scale)
    check(lambda x: F.group_norm(x, 3), torch.randn(2, 12, 31))


# --- nets


class Bottleneck(nn.Module):
    """A residual block: 1x1, 3x3 with stride, 1x1, and a 1x1 with stride beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(16, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 32, 1, bias=False), nn.BatchNorm2d(32),
        )  # fmt: skip
        self.beside = nn.Sequential(nn.Conv2d(16, 32, 1, 2, bias=False), nn.BatchNorm2d(32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.body(x) + self.beside(x))


class ResNet(nn.Module):
    """A stem with pooling, one block, and the head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 16, 7, 2, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
        )
        self.block, self.head = Bottleneck(), nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.block(self.stem(x))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Inverted(nn.Module):
    """An inverted residual: 1x1, depthwise 3x3, 1x1, and the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(12, 36, 1, bias=False), nn.BatchNorm2d(36), nn.ReLU6(),
            nn.Conv2d(36, 36, 3, 1, 1, groups=36, bias=False), nn.BatchNorm2d(36), nn.ReLU6(),
            nn.Conv2d(36, 12, 1, bias=False), nn.BatchNorm2d(12),
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.body(x)


def run_by_regions(net: nn.Module, x: torch.Tensor) -> tuple[list[str], torch.Tensor]:
    """The kinds of kernels in order, and the result; kernels are given the layouts that those before them chose."""
    program = capture(net.eval(), (x,))
    assert FoldNorm().run(program, Context(TARGET))
    backend, names = TritonBackend(program), list[str]()
    weights = [n for n in program.graph.nodes if n.op == "get_attr"]
    env = {program.inputs[0]: x} | {n: program.weights[str(n.target)] for n in weights}
    for region in partition(program, [backend], TARGET):
        values = [env[n] for n in region.inputs]
        if backend.supports(region, TARGET) is not None:  # what eager does by changing strides alone
            names.append("eager")
            for node in region.nodes:
                env[node] = node.target(*[env.get(a, a) if isinstance(a, torch.fx.Node) else a for a in node.args])
                node.meta["val"] = node.meta["val"].new_empty(env[node].shape)
            continue
        schedule = next(iter(backend.space(region, TARGET)))
        kernel = backend.lower(region, TARGET, schedule)
        names.append(schedule.name)
        for node, value, to in zip(region.outputs, run_kernel(kernel, values), kernel.destinations, strict=True):
            env[node] = value
            if to.order is not None:
                node.meta["val"] = in_memory(node.meta["val"], to.order)
    (result,) = program.outputs
    return names, env[result]


def normalised(net: nn.Module) -> nn.Module:
    """The net with statistics of batch norm that are not trivial."""
    torch.manual_seed(1)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5), nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean), nn.init.uniform_(module.running_var, 0.5, 1.5)
    return net.eval()


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_a_residual_net_region_by_region(form: Any) -> None:
    net, x = normalised(ResNet()), image(3, 31, 37, 1).to(memory_format=form)
    with torch.no_grad():
        names, ours = run_by_regions(net, x)
        compare(ours, net(x), doubled(net, x))
    assert sorted(names) == ["conv", "conv", "eager", "matmul", "matmul", "matmul", "matmul", "windows", "windows"]


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_an_inverted_residual_region_by_region(form: Any) -> None:
    net, x = normalised(Inverted()), image(12).to(memory_format=form)
    with torch.no_grad():
        names, ours = run_by_regions(net, x)
        compare(ours, net(x), doubled(net, x))
    assert names == ["matmul", "depthwise", "matmul"]
