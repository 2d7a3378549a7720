"""Partition: every call in one region, regions convex and in a runnable order."""

from __future__ import annotations

import random

import pytest
import torch
from torch import nn

from torchlathe import targets
from torchlathe.codegen.base import Region
from torchlathe.codegen.partition import partition
from torchlathe.passes.capture import capture

aten = torch.ops.aten
HOST = targets.get("x86-64-v3")


class Greedy:
    """A backend that takes any number of nodes of the given operators."""

    name = "greedy"

    def __init__(self, *ops):
        self.ops = ops

    def absorbs(self, node):
        return False

    def supports(self, region, target):
        return None if all(n.target in self.ops for n in region.nodes) else "not mine"


class Diamond(nn.Module):
    """relu feeds an add directly and through a matmul, so that {relu, add} is not convex."""

    def forward(self, x):
        y = x.relu()
        return y + y @ y


def runnable(regions):
    """Whether every region's inputs exist before it runs."""
    made = set()
    for region in regions:
        for node in region.inputs:
            if node.op == "call_function" and node not in made:
                return False
        made.update(region.nodes)
    return True


def test_a_value_that_leaves_and_comes_back_keeps_regions_apart():
    program = capture(Diamond(), (torch.randn(4, 4),))
    regions = partition(program, [Greedy(aten.relu.default, aten.add.Tensor)], HOST)
    assert sorted(len(r.nodes) for r in regions) == [1, 1, 1] and runnable(regions)


def test_chains_join_and_the_rest_stays_alone():
    model = nn.Sequential(nn.ReLU(), nn.Tanh(), nn.Linear(4, 4), nn.Tanh())
    program = capture(model, (torch.randn(4, 4),))
    regions = partition(program, [Greedy(aten.relu.default, aten.tanh.default)], HOST)
    assert [[str(n.target).split(".")[1] for n in r.nodes] for r in regions] == [["relu", "tanh"], ["linear"], ["tanh"]]


def test_two_clusters_that_feed_each_other_are_not_both_merged():
    class Crossed(nn.Module):
        def forward(self, x):
            a1, b2 = x.relu(), x.tanh()
            return a1.tanh(), b2.relu()  # merging both relus and both tanhs would close a circle

    program = capture(Crossed(), (torch.randn(4),))

    class Pairs(Greedy):
        def absorbs(self, node):
            return False

        def supports(self, region, target):
            same = len({n.target for n in region.nodes}) == 1
            return None if same and super().supports(region, target) is None else "mixed"

    assert runnable(partition(program, [Pairs(aten.relu.default, aten.tanh.default)], HOST))


@pytest.mark.parametrize("seed", range(30))
def test_random_graphs_partition_completely_and_in_order(seed):
    chooser = random.Random(seed)

    class Tangle(nn.Module):
        def forward(self, x):
            values = [x]
            for _ in range(30):
                op = chooser.choice((torch.relu, torch.tanh, torch.add, torch.mul, torch.exp))
                picked = chooser.choices(values[-6:], k=2)
                values.append(op(*picked) if op in (torch.add, torch.mul) else op(picked[0]))
            return values[-1], values[chooser.randrange(len(values))] + 1

    program = capture(Tangle(), (torch.randn(3),))
    mine = Greedy(aten.relu.default, aten.add.Tensor, aten.mul.Tensor)
    regions = partition(program, [mine, Greedy(aten.tanh.default, aten.exp.default)], HOST)
    calls = [n for n in program.graph.nodes if n.op == "call_function"]
    assert sorted(n for r in regions for n in r.nodes) == calls and runnable(regions)
    assert len(regions) < len(calls)


def test_equal_regions_have_equal_digests_and_layouts_count():
    class Twice(nn.Module):
        def forward(self, x, y):
            return x.relu().tanh(), y.relu().tanh(), x.t().relu().tanh()

    program = capture(Twice(), (torch.randn(4, 4), torch.randn(4, 4)))
    calls = [n for n in program.graph.nodes if n.target is aten.tanh.default]
    digests = [Region.of([n.args[0], n]).digest() for n in calls]
    assert digests[0] == digests[1] != digests[2]
