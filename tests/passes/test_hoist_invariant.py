"""hoist_invariant: input-free work is done once; pointwise work is done before expanding."""

from __future__ import annotations

import torch
from torch import nn

from torchlathe.passes import FoldConstants, HoistInvariant
from torchlathe.passes.base import Refusal

aten = torch.ops.aten


def calls(program):
    return [str(n.target) for n in program.graph.nodes if n.op == "call_function"]


class Mask(nn.Module):
    def __init__(self, n=600):
        super().__init__()
        self.n = n

    def forward(self, x):
        place = torch.arange(self.n)
        return x.masked_fill(place[:, None] < place[None, :], -1.0)


class Batch(nn.Module):
    def forward(self, x, mask):
        wide = mask[:, None, None, :].float().expand(mask.shape[0], 1, x.shape[2], x.shape[3])
        return x + (1.0 - wide) * -100.0


class Own(nn.Module):
    def forward(self, x, mask):
        return (x * mask.expand(4, 3)).sin()


class Result(nn.Module):
    def forward(self, mask):
        return mask.expand(4, 3) * 2


def test_evaluates_a_mask_that_grows(ask):
    x = torch.randn(600, 600)
    assert isinstance(ask(FoldConstants(limit=1000), Mask(), (x,))[2], Refusal)
    before, after, sites = ask(HoistInvariant(), Mask(), (x,))
    assert sites == 1 and "aten.lt.Tensor" in calls(before) and calls(after) == ["aten.masked_fill.Scalar"]


def test_respects_the_limit(ask):
    _, after, found = ask(HoistInvariant(limit=600 * 600 - 1), Mask(), (torch.randn(600, 600),))
    assert isinstance(found, Refusal) and "bytes are too many" in found.reason and "aten.lt.Tensor" in calls(after)


def test_works_before_expanding(ask, golden):
    x, mask = torch.randn(2, 3, 5, 7), torch.rand(2, 7) > 0.5
    _, after, sites = ask(HoistInvariant(), Batch(), (x, mask))
    assert sites == 2
    order = calls(after)
    assert order.index("aten.expand.default") == len(order) - 2 and order[-1] == "aten.add.Tensor"
    golden(after.text())


def test_symbolic_sizes(ask):
    batch = torch.export.Dim("n", min=2, max=64)
    x, mask = torch.randn(2, 3, 5, 7), torch.rand(2, 7) > 0.5
    _, after, sites = ask(HoistInvariant(), Batch(), (x, mask), dynamic_shapes=({0: batch}, {0: batch}))
    assert sites == 2
    x, mask = torch.randn(3, 3, 5, 7), torch.rand(3, 7) > 0.5
    assert torch.equal(after(x, mask), Batch()(x, mask))


def test_leaves_rows_of_their_own_alone(ask):
    _, _, refusal = ask(HoistInvariant(), Own(), (torch.randn(4, 3), torch.randn(1, 3)))
    assert isinstance(refusal, Refusal) and refusal.reason == "another operand has every row of its own"


def test_leaves_results_of_the_program_alone(ask):
    _, _, refusal = ask(HoistInvariant(), Result(), (torch.randn(1, 3),))
    assert isinstance(refusal, Refusal) and refusal.reason == "the result leaves the program"


def test_nothing_to_do(ask):
    _, _, refusal = ask(HoistInvariant(), nn.ReLU(), (torch.randn(4),))
    assert isinstance(refusal, Refusal) and "depends on an input" in refusal.reason
