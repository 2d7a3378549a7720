"""MergeTokens around each attention of a U-Net, whose tokens differ from resolution to resolution."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from windows import by_formula

import torchlathe
from torchlathe import targets
from torchlathe.passes.base import Context, Refusal
from torchlathe.passes.blocks import attention_branches
from torchlathe.passes.capture import capture
from torchlathe.passes.lossy import merge_tokens
from torchlathe.passes.lossy.merge_tokens import MergeTokens
from torchlathe.passes.lossy.settings import operations
from torchlathe.passes.verify import well_formed

CONTEXT, HEADS, TEXT = Context(targets.get("cpu")), 2, 24
Merged = Callable[[torch.Tensor], tuple[Any, ...]]


class Attention(nn.Module):
    """Over the tokens themselves, or over those of a text."""

    def __init__(self, width: int, source: int) -> None:
        super().__init__()
        self.q, self.o = nn.Linear(width, width, bias=False), nn.Linear(width, width)
        self.k, self.v = (nn.Linear(source, width, bias=False) for _ in range(2))

    def forward(self, x: torch.Tensor, text: torch.Tensor, size: torch.Tensor | None = None) -> torch.Tensor:
        b, n, width = x.shape
        q, k, v = (
            y.view(b, -1, HEADS, width // HEADS).transpose(1, 2) for y in (self.q(x), self.k(text), self.v(text))
        )
        bias = None if size is None else size.log()[:, None, None]
        return self.o(F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).reshape(b, n, width))


class Spatial(nn.Module):
    """Pixels as tokens: attention over themselves, over the text, and a gated feed-forward, `depth` times."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.norm, self.into, self.back = nn.GroupNorm(4, width), nn.Conv2d(width, width, 1), nn.Conv2d(width, width, 1)
        self.layers = nn.ModuleList(
            nn.ModuleList([*(nn.LayerNorm(width) for _ in range(3)), Attention(width, width), Attention(width, TEXT),
                           nn.Linear(width, 4 * width), nn.Linear(2 * width, width)])
            for _ in range(depth)
        )  # fmt: skip

    def forward(self, image: torch.Tensor, text: torch.Tensor, merged: Merged | None) -> torch.Tensor:
        b, width, h, w = image.shape
        x = self.into(self.norm(image)).permute(0, 2, 3, 1).reshape(b, h * w, width)
        for first, second, third, own, cross, up, down in self.layers:
            few, size, places = merged(x) if merged else (x, None, None)
            y = own(first(few), first(few), size)
            x = x + (y if places is None else torch.stack([row[p] for row, p in zip(y, places, strict=True)]))
            x = x + cross(second(x), text)
            value, gate = up(third(x)).chunk(2, -1)
            x = x + down(value * F.gelu(gate))
        return self.back(x.reshape(b, h, w, width).permute(0, 3, 1, 2)) + image


class UNet(nn.Module):
    """Two resolutions, and a connection between the halves of the larger one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Conv2d(4, 16, 3, padding=1), nn.Conv2d(32, 4, 3, padding=1)
        self.down, self.up = nn.Conv2d(16, 32, 3, 2, 1), nn.Conv2d(32, 16, 3, padding=1)
        self.large, self.small, self.joined = Spatial(16, 2), Spatial(32, 1), Spatial(32, 1)

    def forward(self, x: torch.Tensor, text: torch.Tensor, merged: Merged | None = None) -> torch.Tensor:
        x = self.large(self.first(x), text, merged)
        y = self.small(self.down(F.silu(x)), text, merged)
        y = self.up(F.interpolate(y, scale_factor=2, mode="nearest"))
        return self.last(self.joined(torch.cat([y, x], 1), text, merged))


def inputs(batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(batch)
    return torch.randn(batch, 4, 8, 12), torch.randn(batch, 5, TEXT)


@pytest.mark.parametrize(("batch", "share"), [(3, 0.5), (1, 0.75)])
@torch.no_grad()
def test_equals_the_formula_at_every_resolution(batch: int, share: float) -> None:
    model, args = UNet().eval(), inputs(batch)
    program = capture(model, args)
    whole = operations(program)
    assert MergeTokens(r=share, restore=True, windows=(2, 2)).run(program, CONTEXT) == 4
    well_formed(program)
    assert operations(program) < whole

    def merged(x: torch.Tensor) -> Any:
        grid = (8, 12) if x.shape[1] == 96 else (4, 6)
        return by_formula(x, int(share * x.shape[1]), (2, 2), grid)

    torch.testing.assert_close(program(*args), model(*args, merged), atol=1e-5, rtol=1e-5)


def test_numbers_for_each_attention_and_what_they_must_leave() -> None:
    program = capture(UNet().eval(), inputs(1))
    before = program.text()
    outcome = MergeTokens(r=30, restore=True).run(program, CONTEXT)
    assert isinstance(outcome, Refusal) and "30 of 24 tokens" in str(outcome) and program.text() == before
    assert MergeTokens(r=(30, 48, 0, 30), restore=True).run(program.fork(), CONTEXT) == 3, "the third one has 24 tokens"
    assert MergeTokens(r=(30, 0, 12), restore=True).run(program, CONTEXT) == 2
    assert isinstance(MergeTokens(r=2).run(program, CONTEXT), Refusal), "places of pixels cannot be given up"


class Streams(nn.Module):
    """Two streams over one image side by side, each with an attention of its own; or both attentions in one branch."""

    def __init__(self, together: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.together, self.into = together, nn.Conv2d(4, 16, 1)
        self.norm = nn.LayerNorm(8)
        self.first, self.second = (Attention(8, 8) for _ in range(2))

    def forward(self, x: torch.Tensor, merged: Merged | None = None) -> torch.Tensor:
        a, b = self.into(x).flatten(2).transpose(1, 2).chunk(2, -1)
        if self.together:
            y = self.norm(a)
            return a + (self.first(y, y) + self.second(y, y))
        few, other = (merged(t) if merged else (t, None, None) for t in (a, b))
        y, z = self.norm(few[0]), self.norm(other[0])
        y, z = self.first(y, y, few[1]), self.second(z, z, other[1])
        if merged:
            y, z = (torch.stack([r[p] for r, p in zip(t, places, strict=True)])
                    for t, places in ((y, few[2]), (z, other[2])))  # fmt: skip
        return torch.cat([a + y, b + z], -1)


@torch.no_grad()
def test_branches_side_by_side_keep_their_own_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merge_tokens, "find_tokens", lambda program: Refusal("no stream"))  # else one of them is it
    torch.manual_seed(1)
    model, x = Streams(False).eval(), torch.randn(2, 4, 6, 8)
    program = capture(model, (x,))
    assert MergeTokens(r=0.5, restore=True, windows=(2, 2)).run(program, CONTEXT) == 2
    wanted = model(x, lambda t: by_formula(t, 24, (2, 2), (6, 8)))
    torch.testing.assert_close(program(x), wanted, atol=1e-5, rtol=1e-5)


def test_two_attentions_in_one_branch_are_left_alone() -> None:
    program = capture(Streams(True).eval(), (torch.randn(2, 4, 6, 8),))
    assert len(attention_branches(program)) == 0
    assert len(attention_branches(capture(Streams(False).eval(), (torch.randn(2, 4, 6, 8),)))) == 2


def test_a_share_of_the_operations_is_reached() -> None:
    program = capture(UNet().eval(), inputs(1))
    whole = operations(program)
    assert MergeTokens(flops=0.95, restore=True).run(program, CONTEXT) == 4
    assert 0.9 < operations(program) / whole <= 0.95


@torch.no_grad()
def test_equal_pixels_merge_without_loss() -> None:
    model, (x, text) = UNet().eval(), inputs(2)
    flat = (torch.ones_like(x), text)  # all pixels that are not near the border are alike
    fast = torchlathe.optimize(model, flat, passes=[MergeTokens(r=0.2, restore=True)], level="fast")
    assert fast.report.steps[0].kept
    torch.testing.assert_close(fast(*flat), model(*flat), atol=1e-4, rtol=1e-4)
