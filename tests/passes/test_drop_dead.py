"""drop_dead: what no output needs goes, what changes state or is random stays."""

from __future__ import annotations

import torch
from torch import nn

from torchlathe import targets
from torchlathe.passes import DropDead
from torchlathe.passes.base import Context, Refusal
from torchlathe.passes.capture import capture

aten = torch.ops.aten
CTX = Context(targets.get("x86-64-v3"))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.other = nn.Linear(4, 4), nn.Linear(4, 4)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        self.count.add_(1)
        return self.used(x)


def with_dead_code(op=aten.relu.default):
    program = capture(Model().eval(), (torch.randn(2, 4),))
    last = next(n for n in program.graph.nodes if n.target is aten.linear.default)
    weight = program.weight("dead.weight", torch.randn(4, 4))
    node = program.call(aten.linear.default, last, weight, before=program.graph.output_node())
    program.call(op, node, before=program.graph.output_node())
    return program


def test_drops_calls_and_weights(golden):
    program = with_dead_code()
    x = torch.randn(2, 4)
    wanted = program(x)
    assert DropDead().run(program, CTX) == 3
    assert "dead.weight" not in program.weights and "count" in program.weights
    assert torch.equal(program(x), wanted)
    golden(program.text())
    again = DropDead().run(program, CTX)
    assert isinstance(again, Refusal) and again.reason == "every node is used"


def test_keeps_what_is_random():
    program = with_dead_code(aten.rand_like.default)
    before = program.text()
    assert isinstance(DropDead().run(program, CTX), Refusal) and program.text() == before


def test_leaves_a_clean_program_alone(ask):
    before, after, refusal = ask(DropDead(), Model(), (torch.randn(2, 4),))
    assert isinstance(refusal, Refusal) and before.text() == after.text()
