"""fold_constants: values of weights alone become weights; calls that return their input go, bit by bit."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from torchlathe import targets
from torchlathe.passes import FoldConstants
from torchlathe.passes.base import Context, Refusal
from torchlathe.passes.capture import capture

aten = torch.ops.aten
CTX = Context(targets.get("x86-64-v3"))


class Call(nn.Module):
    def __init__(self, function, **buffers):
        super().__init__()
        self.function = function
        for name, value in buffers.items():
            self.register_buffer(name, value)

    def forward(self, x):
        return self.function(self, x)


def calls(program):
    return [str(n.target) for n in program.graph.nodes if n.op == "call_function"]


def test_folds_a_chain_as_a_whole(ask, golden):
    model = Call(lambda m, x: x + (m.w.t() * 2).exp()[:, :1] + torch.arange(3) * 1.5, w=torch.randn(3, 3))
    before, after, sites = ask(FoldConstants(), model, (torch.randn(3, 3),))
    assert sites == 2 and len(calls(before)) == 8
    assert calls(after) == ["aten.slice.Tensor", "aten.add.Tensor", "aten.add.Tensor"]
    golden(after.text())


def test_folding_changes_no_bit():
    model = Call(lambda m, x: x * (m.w / 3).softmax(-1), w=torch.randn(5, 7))
    program = capture(model.eval(), (torch.randn(5, 7),))
    x = torch.randn(5, 7)
    assert FoldConstants().run(program, CTX) == 1 and torch.equal(program(x), model(x))


def test_views_of_weights_stay_views(ask):
    _, _, refusal = ask(
        FoldConstants(), Call(lambda m, x: x @ m.w.t()[:, :2], w=torch.randn(3, 3)), (torch.randn(3, 3),)
    )
    assert isinstance(refusal, Refusal) and "nothing depends on weights alone" in refusal.reason


def test_random_and_state_are_no_constants(ask):
    def count(m, x):
        m.n.add_(1)
        return x * (m.n * 2)

    assert isinstance(ask(FoldConstants(), Call(count, n=torch.zeros(3)), (torch.randn(3),))[2], Refusal)
    program = capture(Call(lambda m, x: x + torch.rand(3)).eval(), (torch.randn(3),))
    assert isinstance(FoldConstants().run(program, CTX), Refusal)


def test_refuses_what_grows(ask):
    model = Call(lambda m, x: x + (m.w * 2).expand(600, 600).contiguous().exp(), w=torch.randn(600))
    _, after, sites = ask(FoldConstants(), model, (torch.randn(600, 600),))
    assert sites == 1 and "aten.exp.default" in calls(after), "600 * 600 * 4 bytes from 2,400"
    model = Call(lambda m, x: x + torch.arange(600.0)[:, None] * torch.arange(600.0), w=torch.randn(1))
    assert "aten.mul.Tensor" in calls(ask(FoldConstants(), model, (torch.randn(600, 600),))[1])
    _, _, refusal = ask(FoldConstants(limit=8), Call(lambda m, x: x + m.w.exp(), w=torch.randn(3)), (torch.randn(3),))
    assert isinstance(refusal, Refusal) and "12 bytes" in refusal.reason and refusal.node == "exp"


def test_a_result_of_the_program_is_no_weight(ask):
    _, _, refusal = ask(
        FoldConstants(), Call(lambda m, x: (x.exp(), m.w.exp()[0]), w=torch.randn(3)), (torch.randn(3),)
    )
    assert isinstance(refusal, Refusal) and "caller could write" in refusal.reason


NOTHING = {
    "times one": lambda m, x: x * 1,
    "one times": lambda m, x: 1.0 * x,
    "times ones": lambda m, x: x * m.ones,
    "by one": lambda m, x: x / 1,
    "minus zero": lambda m, x: x - 0.0,
    "plus negative zero": lambda m, x: x + -0.0,
    "reshape": lambda m, x: x.view(2, 3, 4).reshape(2, 3, 4),
    "views that cancel": lambda m, x: x.view(6, 4).unsqueeze(0).view(2, 3, 4),
    "expand": lambda m, x: x.expand(2, 3, 4),
    "transposes that cancel": lambda m, x: x.transpose(1, 2).transpose(2, 1),
    "permutes that cancel": lambda m, x: x.permute(1, 2, 0).permute(1, 2, 0).permute(1, 2, 0),
    "permute of nothing": lambda m, x: x.permute(0, 1, 2),
    "slice of everything": lambda m, x: x[:, 0:],
    "cat of one": lambda m, x: torch.cat([x], 1),
    "unsqueeze squeeze": lambda m, x: x.unsqueeze(1).squeeze(1),
    "contiguous twice": lambda m, x: (x.transpose(0, 1).contiguous() * 3).contiguous().transpose(0, 1) / 3,
}
SOMETHING = {
    "plus zero": lambda m, x: x + 0.0,
    "minus negative zero": lambda m, x: x - -0.0,
    "times two": lambda m, x: x * 2,
    "from one": lambda m, x: 1 / x,
    "to double": lambda m, x: x * torch.ones(1, dtype=torch.float64),
    "broadcast": lambda m, x: x[:1] * m.ones,
    "view": lambda m, x: x.view(6, 4),
    "permute": lambda m, x: x.permute(1, 2, 0).permute(1, 2, 0),
    "reversed": lambda m, x: x.flip(0),
    "slice": lambda m, x: x[:, 1:],
    "every other": lambda m, x: x[:, ::2],
}


@pytest.mark.parametrize("name", NOTHING)
def test_drops_what_changes_nothing(ask, name):
    def around(m, x):
        return NOTHING[name](m, x.sin()).exp()

    special = torch.randn(2, 3, 4)
    special.view(-1)[:4] = torch.tensor([float("nan"), -0.0, float("inf"), -float("inf")])
    model = Call(around, ones=torch.ones(3, 4))
    _, after, sites = ask(FoldConstants(), model, (special,))
    if name != "contiguous twice":
        assert sites and calls(after) == ["aten.sin.default", "aten.exp.default"]
    bare = capture(Call(NOTHING[name], ones=torch.ones(3, 4)).eval(), (special,))
    FoldConstants().run(bare, CTX)
    assert torch.equal(bare(special).view(torch.int32), special.view(torch.int32)) or name == "contiguous twice"


@pytest.mark.parametrize("name", SOMETHING)
def test_keeps_what_changes_something(ask, name):
    x = torch.randn(2, 3, 4)
    model = Call(lambda m, x: SOMETHING[name](m, x.sin()).exp(), ones=torch.ones(2, 3, 4))
    before, after, _ = ask(FoldConstants(), model, (x,))
    assert [n for n in calls(after) if n in calls(before)] and len(calls(after)) > 2


@pytest.mark.parametrize("name", ["times one", "cat of one", "plus negative zero"])
def test_a_copy_for_the_caller_stays_a_copy(ask, name):
    x = torch.randn(2, 3, 4)
    before, after, refusal = ask(FoldConstants(), Call(NOTHING[name]), (x,))
    assert isinstance(refusal, Refusal) and after(x).data_ptr() != x.data_ptr() and before.text() == after.text()
    two = Call(lambda m, x: (y := x.sin(), NOTHING[name](m, y)))
    first, second = ask(FoldConstants(), two, (x,))[1](x)
    assert first.data_ptr() != second.data_ptr()


def test_symbolic_sizes(ask):
    def reshape(m, x):
        return x.exp().view(x.shape[0], 4).reshape(x.shape) * m.w.exp() + x.view(-1, 2).view(x.shape[0], 4)

    sizes = ({0: torch.export.Dim("n", min=2, max=64)},)
    model, x = Call(reshape, w=torch.randn(4)), torch.randn(7, 4)
    _, after, _ = ask(FoldConstants(), model, (torch.randn(6, 4),), dynamic_shapes=sizes)
    assert not any("view" in c for c in calls(after)) and calls(after).count("aten.exp.default") == 1
    assert torch.equal(after(x), model(x))
