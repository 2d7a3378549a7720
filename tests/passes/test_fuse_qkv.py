"""fuse_qkv: parallel linears become one; layouts and results of the program stay valid."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from torchlathe.passes import FuseQkv, values
from torchlathe.passes.base import Refusal

aten = torch.ops.aten


def names(program):
    return [str(n.target).removeprefix("aten.") for n in program.graph.nodes if n.op == "call_function"]


def products(program):
    return sum(n in ("linear.default", "addmm.default", "mm.default", "matmul.default") for n in names(program))


class Attention(nn.Module):
    def __init__(self, bias=(True, True, True), kv=8):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(8, 8, bias[0]), nn.Linear(8, kv, bias[1]), nn.Linear(8, kv, bias[2])
        self.out = nn.Linear(8, 8)

    def forward(self, x):
        q, k, v = (f(x).view(*x.shape[:2], -1, 4).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1])
        return self.out(y.transpose(1, 2).reshape(*x.shape))


@pytest.mark.parametrize("bias", [(True, True, True), (False, False, False), (True, False, True)])
def test_fuses_three_into_one(ask, bias):
    torch.manual_seed(0)
    before, after, sites = ask(FuseQkv(), Attention(bias), (torch.randn(2, 5, 8),))
    assert sites == 1 and products(before) == 4 and products(after) == 2 and names(after).count("slice.Tensor") == 3


def test_golden_with_fewer_kv_heads(ask, golden):
    golden(ask(FuseQkv(), Attention((True, False, True), kv=4), (torch.randn(2, 5, 8),))[1].text())


def test_symbolic_sizes(ask):
    model = Attention()
    shapes = {"x": {0: torch.export.Dim("b", min=2, max=16), 1: torch.export.Dim("s", min=2, max=64)}}
    _, after, sites = ask(FuseQkv(), model, (torch.randn(2, 5, 8),), dynamic_shapes=shapes)
    assert sites == 1
    x = torch.randn(3, 9, 8)
    torch.testing.assert_close(after(x), model(x))


class Products(nn.Module):
    def __init__(self):
        super().__init__()
        self.w, self.v, self.b = (nn.Parameter(torch.randn(s)) for s in ((8, 4), (8, 6), (4,)))

    def forward(self, x):
        return torch.addmm(self.b, x, self.w).relu(), torch.mm(x, self.v).relu(), x.matmul(self.v).relu()


class Flat(nn.Module):
    """Views that a strided slice does not allow."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 6), nn.Linear(8, 6)

    def forward(self, x):
        return self.a(x).view(-1).exp() + self.b(x).view(3, 10).flatten().exp()


class Computed(nn.Module):
    def __init__(self):
        super().__init__()
        self.w, self.v = (nn.Parameter(torch.randn(6, 8)) for _ in range(2))

    def forward(self, x):
        return nn.functional.linear(x, self.w * 2), nn.functional.linear(x, self.v.tanh())


class Results(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 6), nn.Linear(8, 6)

    def forward(self, x):
        return self.a(x), self.b(x).view(-1, 3, 2).transpose(0, 1)


class Apart(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 6), nn.Linear(8, 6)

    def forward(self, x):
        return self.a(x) + self.b(x.exp())


def test_fuses_every_spelling_of_a_product(ask):
    _, after, sites = ask(FuseQkv(), Products(), (torch.randn(3, 8),))
    assert sites == 1 and products(after) == 1


def test_a_view_that_no_longer_fits_becomes_a_reshape(ask):
    _, after, sites = ask(FuseQkv(), Flat(), (torch.randn(5, 8),))
    assert sites == 1 and "reshape.default" in names(after)


def test_results_of_the_program_keep_memory_and_layout_of_their_own(ask):
    model, x = Results(), torch.randn(3, 8)
    _, after, sites = ask(FuseQkv(), model, (x,))
    assert sites == 1 and names(after).count("clone.default") == 2
    found, wanted = after(x), model(x)
    assert [f.stride() for f in found] == [w.stride() for w in wanted]
    assert found[0].untyped_storage().data_ptr() != found[1].untyped_storage().data_ptr()


def test_layouts_in_the_graph_are_those_at_run_time(ask):
    x = torch.randn(2, 5, 8)
    _, after, _ = ask(FuseQkv(), Attention(), (x,))
    seen = {}
    after.run([x], lambda node, value: seen.update({node: value.stride()}) if node.op == "call_function" else None)
    assert seen and all(node.meta["val"].stride() == stride for node, stride in seen.items())


def test_fuses_weights_that_are_computed_however_large_they_are(ask, monkeypatch):
    monkeypatch.setattr(values, "LARGEST", 16)  # elements of a constant whose numbers are looked at
    before, after, sites = ask(FuseQkv(), Computed(), (torch.randn(3, 8),))
    assert sites == 1 and products(before) == 2 and products(after) == 1


def test_refuses_with_the_reason(ask):
    _, _, refusal = ask(FuseQkv(), Apart(), (torch.randn(3, 8),))
    assert isinstance(refusal, Refusal) and refusal.reason.startswith("no two linears")
    _, _, refusal = ask(FuseQkv(smallest=4), Attention(), (torch.randn(2, 5, 8),))
    assert isinstance(refusal, Refusal) and "at most 3 linears" in refusal.reason
