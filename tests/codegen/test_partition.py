"""Partition: every call in one region, regions convex and in a runnable order."""

from __future__ import annotations

import functools
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


class Rooted(Greedy):
    """A backend that takes one tanh or exp with any pointwise operators around it."""

    ROOTS = (aten.tanh.default, aten.exp.default)

    def __init__(self, first=None):
        super().__init__(*self.ROOTS, aten.mul.Tensor, aten.add.Tensor, aten._to_copy.default)
        self.first = first  # what a region of several nodes must begin with, unless it begins with exp

    def supports(self, region, target):
        roots = sum(n.target in self.ROOTS for n in region.nodes)
        begins = region.nodes[0].target in (self.first, aten.exp.default) or len(region.nodes) == 1
        return "not mine" if roots > 1 or (self.first and not begins) else super().supports(region, target)


def words(regions):
    return [[str(n.target).split(".")[1] for n in r.nodes] for r in regions]


def stream(x, y):
    summed = x.tanh() + y
    return (summed * summed).exp() * summed


def stream_returned(x, y):
    summed = x.tanh() + y
    square = summed * summed
    return square.exp() * summed, square


def stream_shared(x, y):
    summed = x.tanh() + y
    square = summed * summed
    return square.exp() * summed, square.tanh() * summed


def widened(x, y):
    wide = (x.tanh() + y).double()
    return (wide * wide).exp() * wide


def narrowed(x, y):
    return (x.tanh() + y).half().exp()


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.forward = function


@pytest.mark.parametrize(("function", "wanted"), [
    (stream, [["tanh", "add"], ["mul", "exp", "mul"]]),
    (widened, [["tanh", "add"], ["_to_copy", "mul", "exp", "mul"]]),
    (narrowed, [["tanh", "add", "_to_copy"], ["exp"]]),
    (stream_returned, [["tanh", "add", "mul"], ["exp", "mul"]]),
    (stream_shared, [["tanh", "add", "mul"], ["exp", "mul"], ["tanh", "mul"]]),
])  # fmt: skip
def test_regions_end_where_the_fewest_bytes_lie_between(function, wanted):
    program = capture(Function(function), (torch.randn(4, 4), torch.randn(4, 4)))
    assert words(partition(program, [Rooted()], HOST)) == wanted


class Cut(nn.Module):
    """A value that is read in parts by one region."""

    def __init__(self, parts):
        super().__init__()
        self.parts = parts

    def forward(self, x):
        y = x.tanh() + 1
        return functools.reduce(torch.mul, [y[:, a:b] for a, b in self.parts])


class Whole(Rooted):
    """Takes slices too, but a root and one slice only together with a product."""

    def __init__(self):
        super().__init__()
        self.ops = (*self.ops, aten.slice.Tensor)

    def supports(self, region, target):
        words = [n.target for n in region.nodes]
        apart = aten.tanh.default in words and aten.slice.Tensor in words and aten.mul.Tensor not in words
        return "not yet" if apart else super().supports(region, target)


@pytest.mark.parametrize(("parts", "joined"), [
    (((0, 4), (4, 8)), True), (((0, 3), (3, 6)), True), (((0, 6), (2, 8)), False), (((0, 7), (1, 8)), False),
])  # fmt: skip
def test_what_is_read_in_parts_joins_its_reader_unless_it_were_computed_twice(parts, joined):
    program = capture(Cut(parts), (torch.randn(4, 8),))
    regions = partition(program, [Whole()], HOST)
    assert (len(regions) == 1) is joined and runnable(regions)


def test_what_is_returned_as_well_stays_apart():
    class Returned(Cut):
        def forward(self, x):
            y = x.tanh() + 1
            return y[:, :4] * y[:, 4:], y

    regions = partition(capture(Returned(()), (torch.randn(4, 8),)), [Whole()], HOST)
    assert words(regions)[0] == ["tanh", "add"] and runnable(regions)


def test_a_node_only_moves_where_it_is_supported():
    program = capture(Function(stream), (torch.randn(4, 4), torch.randn(4, 4)))
    regions = partition(program, [Rooted(first=aten.tanh.default)], HOST)
    assert words(regions) == [["tanh", "add", "mul"], ["exp", "mul"]]


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
    calls = [n for n in program.graph.nodes if n.op == "call_function"]
    for backends in ([mine, Greedy(aten.tanh.default, aten.exp.default)], [Rooted(), Greedy(aten.relu.default)]):
        regions = partition(program, backends, HOST)
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
