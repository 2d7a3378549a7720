"""merge_reparam: summed parallel branches become one layer when their kernels line up."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from torchlathe.passes import FoldNorm, MergeReparam
from torchlathe.passes.base import Refusal

aten = torch.ops.aten


class Sum(nn.Module):
    """The sum of branches of one value, as left-to-right additions."""

    def __init__(self, *branches, identity=False):
        super().__init__()
        self.branches, self.identity = nn.ModuleList(branches), identity

    def forward(self, x):
        x = x.sin()
        parts = [branch(x) for branch in self.branches] + ([x] if self.identity else [])
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total.exp()


def names(program):
    return [str(n.target).removeprefix("aten.") for n in program.graph.nodes if n.op == "call_function"]


C = nn.Conv2d
MERGED = {
    "repvgg": (lambda: Sum(C(4, 4, 3, padding=1), C(4, 4, 1), identity=True), (2, 4, 7, 7)),
    "stride": (lambda: Sum(C(4, 6, 3, padding=1, stride=2), C(4, 6, 1, stride=2, bias=False)), (2, 4, 8, 8)),
    "groups": (lambda: Sum(C(4, 4, 3, padding=1, groups=2), C(4, 4, 1, groups=2), identity=True), (2, 4, 7, 7)),
    "depthwise": (lambda: Sum(C(4, 4, 5, padding=2, groups=4), C(4, 4, 3, padding=1, groups=4), identity=True),
                  (2, 4, 7, 7)),
    "asymmetric": (lambda: Sum(C(4, 4, (1, 3), padding=(0, 1)), C(4, 4, (3, 1), padding=(1, 0)),
                               C(4, 4, 3, padding=1)), (2, 4, 7, 7)),
    "dilated": (lambda: Sum(C(4, 4, 3, padding=2, dilation=2), C(4, 4, 1)), (2, 4, 7, 7)),
    "same": (lambda: Sum(C(4, 4, 3, padding="same"), C(4, 4, 1)), (2, 4, 7, 7)),
    "two of a size": (lambda: Sum(C(4, 4, 3, padding=1), C(4, 4, 3, padding=1, bias=False)), (2, 4, 7, 7)),
    "conv1d": (lambda: Sum(nn.Conv1d(4, 4, 3, padding=1), nn.Conv1d(4, 4, 1), identity=True), (2, 4, 7)),
    "conv3d": (lambda: Sum(nn.Conv3d(2, 2, 3, padding=1), nn.Conv3d(2, 2, 1)), (1, 2, 4, 4, 4)),
    "linear": (lambda: Sum(nn.Linear(4, 6), nn.Linear(4, 6, bias=False), nn.Linear(4, 6)), (3, 4)),
}  # fmt: skip


@pytest.mark.parametrize("name", MERGED)
def test_merges_to_one_layer(ask, name):
    torch.manual_seed(0)
    make, shape = MERGED[name]
    before, after, sites = ask(MergeReparam(), make(), (torch.randn(shape),))
    assert sites == 1 and len(names(after)) == 3 and "add.Tensor" in names(before) and "add.Tensor" not in names(after)


def trained(model):
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.2, 3)
            module.weight.data.normal_()
            module.bias.data.normal_()
    return model.eval()


def test_repvgg_with_norms_needs_fold_norm_first(ask, golden):
    torch.manual_seed(0)
    branches = [
        nn.Sequential(C(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)),
        nn.Sequential(C(4, 4, 1), nn.BatchNorm2d(4)),
        nn.BatchNorm2d(4),
    ]
    model = trained(Sum(*branches))
    x = torch.randn(2, 4, 7, 7)
    first = trained(Sum(C(4, 4, 3, padding=1), branches[1]))
    _, _, refusal = ask(MergeReparam(), first, (x,))
    assert isinstance(refusal, Refusal) and "run fold-norm first" in refusal.reason
    _, folded, _ = ask(FoldNorm(), model, (x,))
    assert MergeReparam().run(folded, None) == 1 and names(folded) == ["sin.default", "conv2d.default", "exp.default"]
    with torch.no_grad():
        torch.testing.assert_close(folded(x), model(x))
    golden(folded.text())


REFUSED = {
    "differ in stride": (lambda: Sum(C(4, 4, 3, padding=1, stride=2), C(4, 4, 2, stride=1)), (2, 4, 2, 2)),
    "differ in groups": (lambda: Sum(C(4, 4, 3, padding=1), C(4, 4, 1, groups=2)), (2, 4, 7, 7)),
    "differ in dilation": (lambda: Sum(C(4, 4, 3, padding=2, dilation=2), C(4, 4, 3, padding=1)), (2, 4, 7, 7)),
    "no branch's kernel covers": (lambda: Sum(C(4, 4, (1, 3), padding=(0, 1)), C(4, 4, (3, 1), padding=(1, 0))),
                                  (2, 4, 7, 7)),
    "pads its sides unequally": (lambda: Sum(C(4, 4, 2, padding="same"), C(4, 4, 1)), (2, 4, 7, 7)),
    "no two linear branches": (lambda: Sum(C(4, 4, 1), nn.Sequential(nn.ReLU(), C(4, 4, 1))), (2, 4, 7, 7)),
}  # fmt: skip


@pytest.mark.parametrize("reason", REFUSED)
def test_refuses_with_the_reason(ask, reason):
    make, shape = REFUSED[reason]
    _, _, refusal = ask(MergeReparam(), make(), (torch.randn(shape),))
    assert isinstance(refusal, Refusal) and reason in refusal.reason


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x, y):
        return self.a(x) + y + self.c(y.exp()) + self.b(x)


class Kept(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        a = self.a(x)
        return a + self.b(x), a.relu()


def test_merges_what_lies_apart_in_a_sum(ask):
    _, after, sites = ask(MergeReparam(), Mixed(), (torch.randn(3, 4), torch.randn(3, 4)))
    assert sites == 1 and names(after).count("linear.default") == 2 and names(after).count("add.Tensor") == 2


def test_refuses_a_branch_that_is_used_elsewhere(ask):
    _, _, refusal = ask(MergeReparam(), Kept(), (torch.randn(3, 4),))
    assert isinstance(refusal, Refusal) and "also used outside the sum" in refusal.reason


def test_symbolic_sizes(ask):
    sizes = ({0: torch.export.Dim("n", min=2, max=16)},)
    model = Sum(C(4, 4, 3, padding=1), C(4, 4, 1), identity=True)

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            return self.model(x)

    _, after, sites = ask(MergeReparam(), Wrapped(), (torch.randn(2, 4, 7, 7),), dynamic_shapes=sizes)
    assert sites == 1
    x = torch.randn(5, 4, 7, 7)
    torch.testing.assert_close(after(x), model(x))


def test_a_nan_stays_where_it_was(ask):
    torch.manual_seed(0)
    model = Sum(C(2, 2, 3, padding=1), C(2, 2, 1), identity=True)
    _, after, _ = ask(MergeReparam(), model, (torch.randn(1, 2, 7, 7),))
    x = torch.randn(1, 2, 7, 7)
    x[0, 0, 3, 3] = float("nan")
    with torch.no_grad():
        assert torch.equal(after(x).isfinite(), model(x).isfinite())
