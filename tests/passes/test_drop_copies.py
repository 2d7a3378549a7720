"""drop_copies: copies that nobody can tell from the original go, those that reach the caller stay."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from torchlathe import targets
from torchlathe.passes import DropCopies
from torchlathe.passes.base import Context, Refusal
from torchlathe.passes.capture import capture

aten = torch.ops.aten
CTX = Context(targets.get("x86-64-v3"))


class Merge(nn.Module):
    """Heads side by side, as models write it: the view needs a copy."""

    def forward(self, x):
        return torch.relu(x.transpose(1, 2).reshape(x.shape[0], x.shape[2], -1))


def targets_of(program):
    return [n.target for n in program.graph.nodes if n.op == "call_function"]


def test_copies_only_where_it_must(golden):
    x = torch.randn(2, 3, 4, 5)
    program = capture(Merge(), (x,))
    wanted = program(x)
    assert targets_of(program).count(aten.clone.default) == 1
    assert DropCopies().run(program, CTX) == 1
    assert targets_of(program).count(aten.clone.default) == 0
    assert targets_of(program).count(aten.contiguous.default) == 1
    assert torch.equal(program(x), wanted)
    golden(program.text())
    assert isinstance(DropCopies().run(program, CTX), Refusal)


@pytest.mark.parametrize("form", [None, torch.preserve_format])
def test_a_plain_copy_is_the_value_itself(form):
    x = torch.randn(3, 4)
    program = capture(nn.ReLU(), (x,))
    relu = next(n for n in program.graph.nodes if n.target is aten.relu.default)
    copy = program.call(aten.clone.default, relu, before=program.graph.output_node(), memory_format=form)
    last = program.call(aten.neg.default, copy, before=program.graph.output_node())
    program.graph.output_node().args = ((last,),)
    assert DropCopies().run(program, CTX) == 1
    assert targets_of(program) == [aten.relu.default, aten.neg.default]
    assert torch.equal(program(x), -torch.relu(x))


class Copies(nn.Module):
    def forward(self, x):
        return x.clone(), x.clone().view(-1)


def test_what_the_caller_may_write_into_is_its_own(ask):
    x = torch.randn(3, 4)
    before, after, refusal = ask(DropCopies(), Copies(), (x,))
    assert isinstance(refusal, Refusal) and before.text() == after.text()
    first, second = after(x)
    first.add_(1), second.add_(1)
    assert torch.equal(x + 1, first) and torch.equal((x + 1).view(-1), second)


def test_another_layout_is_still_made():
    x = torch.randn(2, 3, 4, 5)
    program = capture(nn.ReLU(), (x,))
    relu = next(n for n in program.graph.nodes if n.target is aten.relu.default)
    copy = program.call(aten.clone.default, relu, before=program.graph.output_node(), memory_format=torch.channels_last)
    last = program.call(aten.neg.default, copy, before=program.graph.output_node())
    program.graph.output_node().args = ((last,),)
    assert isinstance(DropCopies().run(program, CTX), Refusal)
    assert program(x).is_contiguous(memory_format=torch.channels_last)
