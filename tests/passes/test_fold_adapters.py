"""fold_adapters: LoRA and DoRA as peft exports them, and by hand, become the adapted layer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from torchlathe.passes import FoldAdapters
from torchlathe.passes.base import Refusal

aten = torch.ops.aten
LAYERS = ("aten.linear.default", "aten.addmm.default", "aten.embedding.default", "aten.conv2d.default")


class Transposed(nn.Module):
    """GPT-2's linear: [in, out] weight, applied by addmm to flattened rows."""

    def __init__(self, n_in, n_out):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(n_in, n_out) / 4), nn.Parameter(torch.randn(n_out))

    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], -1)


class Lora(nn.Module):
    def __init__(self, base, n_in, n_out, adapters=1, rank=2):
        super().__init__()
        self.base, self.scale = base, 2.5
        self.down = nn.ModuleList(nn.Linear(n_in, rank, bias=False) for _ in range(adapters))
        self.up = nn.ModuleList(nn.Linear(rank, n_out, bias=False) for _ in range(adapters))

    def forward(self, x):
        y = self.base(x)
        for down, up in zip(self.down, self.up, strict=True):
            y = y + up(down(nn.functional.dropout(x, 0.1, self.training))) * self.scale
        return y


def layers(program):
    return [str(n.target) for n in program.graph.nodes if str(n.target) in LAYERS]


@pytest.mark.parametrize("adapters", [1, 3])
@pytest.mark.parametrize("base", [nn.Linear, Transposed])
def test_folds_low_rank_adapters(ask, base, adapters):
    torch.manual_seed(0)
    model = Lora(base(8, 6), 8, 6, adapters)
    before, after, sites = ask(FoldAdapters(), model, (torch.randn(2, 5, 8),))
    assert sites == adapters and len(layers(before)) == 1 + 2 * adapters and layers(after) == ["aten.linear.default"]
    layer = next(n for n in after.graph.nodes if n.target is aten.linear.default)
    weight = after.constant(layer.args[1])
    base_weight = model.base.weight if base is nn.Linear else model.base.weight.T
    wanted = base_weight.double() + sum(
        2.5 * u.weight.double() @ d.weight.double() for u, d in zip(model.up, model.down, strict=True)
    )
    torch.testing.assert_close(weight.double(), wanted, rtol=3e-7, atol=3e-7)


def test_golden(ask, golden):
    golden(ask(FoldAdapters(), Lora(nn.Linear(8, 6), 8, 6), (torch.randn(2, 8),))[1].text())


def test_symbolic_sizes(ask):
    model = Lora(nn.Linear(8, 6), 8, 6)
    shapes = {"x": {0: torch.export.Dim("b", min=2, max=16), 1: torch.export.Dim("s", min=2, max=64)}}
    _, after, sites = ask(FoldAdapters(), model, (torch.randn(2, 5, 8),), dynamic_shapes=shapes)
    assert sites == 1
    x = torch.randn(3, 7, 8)
    torch.testing.assert_close(after(x), model(x))


class Peft(nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.q, self.e, self.c = nn.Linear(8, 8), nn.Embedding(10, 8), nn.Conv2d(1, 4, 3, padding=1)
        self.to(dtype)

    def forward(self, x, i):
        return self.q(x).relu() + self.e(i), self.c(x[:, None])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}, {"lora_bias": True}], ids=str)
def test_folds_what_peft_makes(ask, options, dtype):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    targets = ["q", "c"] if "lora_bias" in options else ["q", "e", "c"]
    config = peft.LoraConfig(
        r=2, lora_alpha=8, target_modules=targets, lora_dropout=0.1, init_lora_weights=False, **options
    )
    model = peft.get_peft_model(Peft(dtype), config)
    args = (torch.randn(2, 5, 8, dtype=dtype), torch.arange(5).expand(2, 5))
    before, after, sites = ask(FoldAdapters(), model, args)
    assert sites == len(targets) and len(layers(before)) > 5
    assert sorted(layers(after)) == ["aten.conv2d.default", "aten.embedding.default", "aten.linear.default"]
    assert not [n for n in after.graph.nodes if n.target is aten._to_copy.default]


def test_folds_two_layers_without_an_activation_between_if_that_is_smaller(ask):
    wide = nn.Sequential(nn.Linear(8, 32), nn.Linear(32, 8), nn.ReLU())
    assert len(layers(ask(FoldAdapters(), wide, (torch.randn(3, 8),))[1])) == 1
    narrow = nn.Sequential(nn.Linear(8, 2), nn.Linear(2, 8), nn.ReLU())
    _, _, refusal = ask(FoldAdapters(), narrow, (torch.randn(3, 8),))
    assert isinstance(refusal, Refusal) and refusal.reason.startswith("no layer has another one behind it")


class Watched(Lora):
    def forward(self, x):
        y, small = self.base(x), self.down[0](x)
        return y + self.up[0](small), small.relu()


class Gated(Lora):
    def forward(self, x):
        return self.base(x) + self.up[0](self.down[0](x).relu())


class Spatial(nn.Module):
    def __init__(self):
        super().__init__()
        self.base, self.down, self.up = nn.Conv2d(4, 4, 3, padding=2), nn.Conv2d(4, 1, 1), nn.Conv2d(1, 4, 3, padding=2)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


REFUSED = {
    "is also used by relu": (lambda: Watched(nn.Linear(8, 6), 8, 6), (3, 8)),
    "no layer has another one behind it": (lambda: Gated(nn.Linear(8, 6), 8, 6), (3, 8)),
    "reads more than one of its positions": (Spatial, (2, 4, 6, 6)),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_refuses_with_the_reason(ask, reason):
    make, shape = REFUSED[reason]
    _, _, refusal = ask(FoldAdapters(), make(), (torch.randn(shape),))
    assert isinstance(refusal, Refusal) and reason in refusal.reason


def test_error_against_float64(ask):
    torch.manual_seed(3)
    model = Lora(nn.Linear(64, 64), 64, 64, rank=8)
    x = torch.randn(128, 64)
    _, after, _ = ask(FoldAdapters(), model, (x,))
    with torch.no_grad():
        eager, ours = model(x), after(x)
        exact = model.double()(x.double())
    assert (ours - exact).abs().max() <= 2 * (eager - exact).abs().max() + 1e-6
