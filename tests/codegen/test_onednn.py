"""Prepacked linear and convolution against eager torch in float64, with every fused operation that is claimed."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from torchlathe import targets
from torchlathe.codegen.executable import Executable
from torchlathe.codegen.lower import lower_unmeasured
from torchlathe.passes.capture import capture

HOST = targets.get("x86-64-v3")
ACTIVATIONS = {
    "relu": nn.ReLU(), "sigmoid": nn.Sigmoid(), "tanh": nn.Tanh(), "hardswish": nn.Hardswish(), "silu": nn.SiLU(),
    "gelu": nn.GELU(), "gelu_tanh": nn.GELU(approximate="tanh"), "leaky_relu": nn.LeakyReLU(0.2),
    "relu6": nn.ReLU6(), "hardtanh": nn.Hardtanh(-0.3, 0.7),
}  # fmt: skip


class Residual(nn.Module):
    """body(x) + x, in either order."""

    def __init__(self, body, first):
        super().__init__()
        self.body, self.first = body, first

    def forward(self, x):
        return self.body(x) + x if self.first else x + self.body(x)


def check(model, x, backend="onednn", count=1):
    """The model runs in `count` packed kernels, with at most twice eager's error against float64."""
    torch.manual_seed(0)
    model = model.eval()
    program = capture(model, (x,))
    choices = lower_unmeasured(program, HOST)
    assert [c.kernel.backend for c in choices].count(backend) == count, [
        str(n) for c in choices for n in c.region.nodes
    ]
    with torch.no_grad():
        found, eager = Executable(program, choices)(x), model(x)
        wanted = copy.deepcopy(model).double()(x.double())
    floor = 1e-5 if x.dtype is torch.float32 else 1e-2
    mine, theirs = ((v.double() - wanted).abs().max() for v in (found, eager))
    assert found.dtype is eager.dtype and mine <= 2 * theirs + floor * wanted.abs().max()
    return choices


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(4, 16), (2, 5, 16), (16,), (1, 1, 1, 16)])
def test_linear(shape, bias):
    check(nn.Linear(16, 24, bias=bias), torch.randn(shape))


class Product(nn.Module):
    """x times a stored matrix [16, 24], with a bias per column if asked for."""

    def __init__(self, op, bias):
        super().__init__()
        self.op, self.weight = op, nn.Parameter(torch.randn(16, 24))
        self.bias = nn.Parameter(torch.randn(24)) if bias else None

    def forward(self, x):
        return self.op(x, self.weight) if self.bias is None else self.op(self.bias, x, self.weight)


@pytest.mark.parametrize("shape", [(4, 16), (2, 5, 16)])
def test_products_with_a_stored_matrix(shape):
    check(Product(torch.matmul, False), torch.randn(shape))
    if len(shape) == 2:
        check(Product(torch.mm, False), torch.randn(shape))
        check(Product(torch.addmm, True), torch.randn(shape))
        assert len(check(nn.Sequential(Product(torch.addmm, True), nn.GELU()), torch.randn(shape))) == 1


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_fused(name):
    choices = check(nn.Sequential(nn.Linear(16, 24), ACTIVATIONS[name]), torch.randn(7, 16))
    assert len(choices) == 1
    assert len(check(nn.Sequential(nn.Conv2d(3, 8, 3), ACTIVATIONS[name]), torch.randn(2, 3, 9, 9))) == 1


@pytest.mark.parametrize("first", [True, False])
def test_residual_adds_are_fused(first):
    assert len(check(Residual(nn.Linear(16, 16), first), torch.randn(3, 5, 16))) == 1
    convolution = Residual(nn.Conv2d(8, 8, 3, padding=1), first)
    assert len(check(convolution, torch.randn(2, 8, 6, 7))) == 1
    assert len(check(nn.Sequential(convolution, nn.ReLU()), torch.randn(2, 8, 6, 7))) == 1


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(8, 16, 3, stride=2, padding=1),
        nn.Conv2d(8, 16, 1, bias=False),
        nn.Conv2d(8, 8, 3, padding=1, groups=8),
        nn.Conv2d(8, 16, (3, 5), padding=(1, 2), dilation=(2, 1), groups=4),
        nn.Conv2d(8, 4, 7, stride=(2, 1)),
    ],
    ids=str,
)
def test_convolutions(conv):
    check(conv, torch.randn(2, 8, 17, 15))
    check(conv, torch.randn(2, 8, 17, 15).to(memory_format=torch.channels_last))


def test_views_after_a_convolution_accept_its_layout():
    class Patches(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 4, 4)

        def forward(self, x):
            return self.conv(x).view(2, 8, -1).transpose(1, 2)

    check(Patches(), torch.randn(2, 3, 16, 16))


@pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="the processor has no bfloat16 arithmetic")
def test_bfloat16():
    check(nn.Sequential(nn.Linear(64, 24), nn.GELU()).bfloat16(), torch.randn(7, 64).bfloat16())


def test_what_is_left_alone():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x):
            y = self.linear(x)
            return y.relu() + y

    assert len(check(Shared(), torch.randn(3, 8))) == 3
    check(nn.Linear(8, 8).double(), torch.randn(3, 8).double(), count=0)
    check(nn.ConvTranspose2d(3, 4, 3), torch.randn(1, 3, 5, 5), count=0)
    check(nn.Sequential(nn.Linear(8, 8), nn.ELU()), torch.randn(3, 8))


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("layer", [nn.Linear(1, 3), nn.Conv2d(1, 3, 1)], ids=["linear", "conv"])
def test_nan_and_inf_pass_through(name, layer):
    model = nn.Sequential(layer, ACTIVATIONS[name]).eval()
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), 1e30, -1e30, 0.0, -0.0, 3.0]).reshape(8, 1)
    x = x if isinstance(layer, nn.Linear) else x.reshape(1, 1, 2, 4)
    program = capture(model, (x,))
    choices = lower_unmeasured(program, HOST)
    assert choices[0].kernel.backend == "onednn"
    with torch.no_grad():
        torch.testing.assert_close(Executable(program, choices)(x), model(x), equal_nan=True)
