"""fold_norm: scales and shifts per channel go into the layer beside them, and stay where they may not."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from torchlathe.passes import FoldNorm
from torchlathe.passes.base import Refusal

aten = torch.ops.aten


def trained(model, seed=0):
    """Random statistics and scales, so that a norm that is left out or misplaced shows."""
    torch.manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_()
            module.running_var.uniform_(0.2, 3)
            if module.affine:
                module.weight.data.normal_()
                module.bias.data.normal_()
    return model


def names(program):
    return [str(n.target).removeprefix("aten.") for n in program.graph.nodes if n.op == "call_function"]


def norms(program):
    return sum("batch_norm" in n for n in names(program))


BACKWARD = {
    "conv1d": (lambda: [nn.Conv1d(4, 6, 3, padding=1), nn.BatchNorm1d(6)], (2, 4, 9)),
    "conv2d": (lambda: [nn.Conv2d(4, 6, 3, padding=1, stride=2), nn.BatchNorm2d(6)], (2, 4, 9, 9)),
    "conv3d": (lambda: [nn.Conv3d(2, 3, 2), nn.BatchNorm3d(3)], (1, 2, 4, 4, 4)),
    "no bias": (lambda: [nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6)], (2, 4, 9, 9)),
    "no affine": (lambda: [nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, affine=False)], (2, 4, 9, 9)),
    "groups": (lambda: [nn.Conv2d(4, 8, 3, groups=2, dilation=2), nn.BatchNorm2d(8)], (2, 4, 9, 9)),
    "same": (lambda: [nn.Conv2d(4, 6, 3, padding="same"), nn.BatchNorm2d(6)], (2, 4, 9, 9)),
    "same even": (lambda: [nn.Conv2d(4, 6, 2, padding="same"), nn.BatchNorm2d(6)], (2, 4, 9, 9)),
    "transposed": (lambda: [nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1), nn.BatchNorm2d(6)], (2, 4, 5, 5)),
    "transposed groups": (lambda: [nn.ConvTranspose1d(4, 6, 3, groups=2), nn.BatchNorm1d(6)], (2, 4, 5)),
    "linear": (lambda: [nn.Linear(4, 6), nn.BatchNorm1d(6)], (3, 4)),
    "two": (lambda: [nn.Linear(4, 6), nn.BatchNorm1d(6), nn.BatchNorm1d(6)], (3, 4)),
}


@pytest.mark.parametrize("name", BACKWARD)
def test_folds_into_the_layer_before(ask, name):
    make, shape = BACKWARD[name]
    torch.manual_seed(0)
    before, after, sites = ask(FoldNorm(), trained(nn.Sequential(*make(), nn.ReLU())), (torch.randn(shape),))
    assert sites == norms(before) >= 1 and norms(after) == 0 and len(names(after)) == 2


FORWARD = {
    "conv": (lambda: [nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3)], (2, 4, 9, 9)),
    "groups": (lambda: [nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, groups=2, bias=False)], (2, 4, 9, 9)),
    "linear": (lambda: [nn.BatchNorm1d(4), nn.Linear(4, 6)], (3, 4)),
}


@pytest.mark.parametrize("name", FORWARD)
def test_folds_into_the_layer_after(ask, name):
    make, shape = FORWARD[name]
    torch.manual_seed(0)
    _, after, sites = ask(FoldNorm(), trained(nn.Sequential(nn.ReLU(), *make())), (torch.randn(shape),))
    assert sites == 1 and norms(after) == 0 and len(names(after)) == 2


def test_a_norm_before_padding_is_folded_only_without_a_shift(ask):
    model = trained(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, padding=1)))
    _, _, refusal = ask(FoldNorm(), model, (torch.randn(2, 4, 9, 9),))
    assert isinstance(refusal, Refusal) and "padding + bias" in refusal.reason
    model[1].running_mean.zero_()
    model[1].bias.data.zero_()
    assert ask(FoldNorm(), model, (torch.randn(2, 4, 9, 9),))[2] == 1


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x):
        y = self.conv(x)
        return self.norm(y).relu() + y


REFUSED = {
    "also used elsewhere": (Shared, (2, 3, 4, 4)),
    "no linear or convolution of constant weights beside it": (
        lambda: nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3)), (2, 3, 4, 4)),
    "before it has its channels in another dimension": (
        lambda: nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(3)), (2, 3, 5)),
    "a different number of times at the border": (
        lambda: nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3), nn.ConvTranspose2d(3, 4, 3)), (2, 3, 4, 4)),
}  # fmt: skip


@pytest.mark.parametrize("reason", REFUSED)
def test_refuses_with_the_reason(ask, reason):
    make, shape = REFUSED[reason]
    _, _, refusal = ask(FoldNorm(), trained(make()), (torch.randn(shape),))
    assert isinstance(refusal, Refusal) and reason in refusal.reason and refusal.node


def test_refuses_weights_out_of_range(ask):
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6)).half()
    model[0].weight.data.fill_(3e4)
    model[1].running_var.fill_(1e-4)
    _, _, refusal = ask(FoldNorm(), model, (torch.zeros(3, 4).half(),))
    assert isinstance(refusal, Refusal) and "not finite in torch.float16" in refusal.reason


def test_nothing_to_fold(ask):
    _, _, refusal = ask(FoldNorm(), nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), (torch.randn(2, 4),))
    assert isinstance(refusal, Refusal) and refusal.reason.startswith("no batch norm")


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.plain = nn.Linear(4, 4), nn.Linear(4, 4)
        self.conv = nn.Conv2d(3, 5, 3, padding=1, bias=False)
        self.gamma, self.tone = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(5, 1, 1))
        self.place = nn.Parameter(torch.randn(4, 4))

    def forward(self, x):
        y = self.linear(x) * self.gamma / 8 - 0.5
        return y.relu() + self.place, self.plain(x) + self.place, (self.tone * self.conv(x) + 1).relu()


def test_folds_hand_written_scales(ask, golden):
    torch.manual_seed(1)
    _, after, sites = ask(FoldNorm(), Scaled(), (torch.randn(2, 3, 4, 4),))
    assert sites == 5 and names(after).count("add.Tensor") == 2 and names(after).count("mul.Tensor") == 0
    golden(after.text())


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(9, 4), nn.Linear(4, 9, bias=False)
        self.head.weight = self.table.weight

    def forward(self, i):
        return self.head(self.table(i).relu() * 0.5)


def test_a_scale_beside_a_tied_weight_stays(ask):
    _, _, refusal = ask(FoldNorm(), Tied(), (torch.arange(5),))
    assert isinstance(refusal, Refusal) and "is shared" in refusal.reason


def test_symbolic_sizes(ask):
    model = trained(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()))
    sizes = ({0: torch.export.Dim("n", min=2, max=16), 2: torch.export.Dim("h", min=4, max=64)},)
    _, after, sites = ask(FoldNorm(), model, (torch.randn(2, 3, 8, 8),), dynamic_shapes=sizes)
    assert sites == 1
    x = torch.randn(5, 3, 9, 8)
    torch.testing.assert_close(after(x), model(x))


def test_split_writes_a_lone_norm_as_multiply_and_add(ask):
    model = trained(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3)))
    _, after, sites = ask(FoldNorm(split=True), model, (torch.randn(2, 3, 4, 4),))
    assert sites == 1 and names(after) == ["relu.default", "mul.Tensor", "add.Tensor"]


def test_against_float64(ask):
    torch.manual_seed(2)
    model = trained(nn.Sequential(nn.Conv2d(16, 32, 3), nn.BatchNorm2d(32)))
    x = torch.randn(4, 16, 12, 12)
    _, after, _ = ask(FoldNorm(), model, (x,))
    with torch.no_grad():
        eager, ours = model(x), after(x)
        exact = model.double()(x.double())
    assert (ours - exact).abs().max() <= 2 * (eager - exact).abs().max() + 1e-6


def test_weights_are_not_written(ask):
    model = trained(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    kept = {k: v.clone() for k, v in model.state_dict().items()}
    ask(FoldNorm(), model, (torch.randn(2, 3, 8, 8),))
    assert all(torch.equal(v, kept[k]) for k, v in model.state_dict().items())
