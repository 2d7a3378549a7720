"""merge_common: equal calls become one; results that leave the program do not start to share memory."""

from __future__ import annotations

import torch
from torch import nn

from torchlathe.passes import MergeCommon
from torchlathe.passes.base import Refusal

aten = torch.ops.aten


def count(program, op):
    return sum(n.target is op for n in program.graph.nodes)


class Twice(nn.Module):
    def forward(self, x):
        return torch.relu(x.exp()) + torch.relu(x.exp()) * 2.0 + x.exp() * 2


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.register_buffer("view", self.a.weight.data.view(4, 4))
        self.register_buffer("copy", self.a.weight.data.clone())

    def forward(self, x):
        return self.a(x) * x.matmul(self.view.T) - x.matmul(self.copy.T) + self.b(x)


class Pair(nn.Module):
    def forward(self, x):
        return x.exp(), x.exp()


class Random(nn.Module):
    def forward(self, x):
        return torch.rand_like(x) - torch.rand_like(x) + torch.exp(x * 1) - torch.exp(x * 1.0) + (x + 0.0) / (x + -0.0)


def test_merges_chains(ask, golden):
    before, after, sites = ask(MergeCommon(), Twice(), (torch.randn(2, 3),))
    assert sites == 3 and count(before, aten.exp.default) == 3 and count(after, aten.exp.default) == 1
    assert count(after, aten.mul.Tensor) == 2
    golden(after.text())


def test_symbolic_sizes(ask):
    sizes = ({0: torch.export.Dim("n", min=2, max=64)},)
    _, after, sites = ask(MergeCommon(), Twice(), (torch.randn(3, 3),), dynamic_shapes=sizes)
    assert sites == 3 and count(after, aten.exp.default) == 1


def test_merges_one_tensor_under_two_names_but_not_its_copy(ask):
    _, after, sites = ask(MergeCommon(), Tied(), (torch.randn(2, 4),))
    kept = [str(n.target) for n in after.graph.nodes if n.op == "get_attr"]
    assert sites == 1 and len(kept) == 3 and "copy" in kept and "b.weight" in kept


def test_two_results_stay_two_tensors(ask):
    _, _, refusal = ask(MergeCommon(), Pair(), (torch.randn(3),))
    assert isinstance(refusal, Refusal) and "must not share memory" in refusal.reason and refusal.node == "exp_1"


def test_random_and_nearly_equal_calls_stay():
    from torchlathe import targets
    from torchlathe.passes.base import Context
    from torchlathe.passes.capture import capture

    program = capture(Random().eval(), (torch.randn(3),))
    refusal = MergeCommon().run(program, Context(targets.get("x86-64-v3")))
    assert isinstance(refusal, Refusal) and refusal.reason == "no operator is called twice on the same arguments"
