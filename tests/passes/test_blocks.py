"""Blocks: the residual stream, its branches and how they repeat, in models of many shapes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from torchlathe.passes.blocks import Stream, find_stream
from torchlathe.passes.capture import capture

WIDTH, HEADS = 32, 4


class Attention(nn.Module):
    def __init__(self, groups: int = HEADS, norm: bool = False) -> None:
        super().__init__()
        size = WIDTH // HEADS
        self.q, self.k, self.v = (nn.Linear(WIDTH, n * size) for n in (HEADS, groups, groups))
        self.out, self.groups = nn.Linear(WIDTH, WIDTH), groups
        self.norm = nn.LayerNorm(size) if norm else nn.Identity()

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None, memory: torch.Tensor | None = None) -> Any:
        source = x if memory is None else memory
        q, k, v = (f(s).unflatten(-1, (n, -1)).transpose(1, 2) for f, s, n in
                   ((self.q, x, HEADS), (self.k, source, self.groups), (self.v, source, self.groups)))  # fmt: skip
        y = F.scaled_dot_product_attention(self.norm(q), self.norm(k), v, mask, enable_gqa=self.groups != HEADS)
        return self.out(y.transpose(1, 2).flatten(2))


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(WIDTH, 64), nn.Linear(WIDTH, 64), nn.Linear(64, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, 64), nn.GELU(), nn.Linear(64, WIDTH))


class Block(nn.Module):
    def __init__(self, style: str) -> None:
        super().__init__()
        self.style = style
        self.attention = Attention(groups=2 if style == "grouped" else HEADS, norm=style == "qk-norm")
        self.feed = Gated() if style == "grouped" else plain()
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.scales = nn.ParameterList(torch.full((WIDTH,), 0.5) for _ in range(2))

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        if self.style == "post-norm":
            x = self.first(x + self.attention(x, mask))
            return self.second(x + self.feed(x))
        if self.style == "parallel":
            y = self.first(x)
            return x + self.attention(y, mask) + self.feed(y)
        if self.style == "scaled":
            x = x + self.scales[0] * self.attention(self.first(x), mask)
            return x + self.scales[1] * self.feed(self.second(x))
        x = x + self.attention(self.first(x), mask)
        return x + self.feed(self.second(x))


class Encoder(nn.Module):
    def __init__(self, style: str, depth: int = 3) -> None:
        super().__init__()
        self.embed, self.place = nn.Linear(8, WIDTH), nn.Parameter(torch.randn(1, 5, WIDTH))
        self.blocks = nn.ModuleList(Block(style) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        bias = torch.where(mask[:, None, None], 0.0, -1e9)
        x = self.embed(x) + self.place
        for block in self.blocks:
            x = block(x, bias)
        return self.head(self.norm(x).mean(1))


def stream_of(model: nn.Module, *args: torch.Tensor) -> Stream:
    stream = find_stream(capture(model.eval(), args))
    assert stream is not None
    return stream


def inputs() -> tuple[torch.Tensor, ...]:
    return torch.randn(2, 5, 8), torch.ones(2, 5, dtype=torch.bool)


@pytest.mark.parametrize("style", ["pre-norm", "post-norm", "scaled", "qk-norm", "grouped"])
def test_two_branches_in_every_block(style: str) -> None:
    stream = stream_of(Encoder(style), *inputs())
    assert [[b.kind for b in block.branches] for block in stream.blocks] == [["attention", "feed-forward"]] * 3
    for block, after in zip(stream.blocks, stream.blocks[1:], strict=False):
        assert block.end is after.start
    attention = stream.blocks[1].part("attention")
    assert attention is not None and attention.attention is not None and len(attention.linears) == 4
    feed = stream.blocks[1].part("feed-forward")
    assert feed is not None and len(feed.linears) == (3 if style == "grouped" else 2)
    assert len(feed.norms) == (0 if style == "post-norm" else 1)


def test_post_norm_blocks_end_with_their_norm() -> None:
    stream = stream_of(Encoder("post-norm"), *inputs())
    assert all("layer_norm" in str(block.end.target) for block in stream.blocks)


def test_parallel_branches_are_one() -> None:
    stream = stream_of(Encoder("parallel"), *inputs())
    assert [[b.kind for b in block.branches] for block in stream.blocks] == [["parallel"]] * 3
    block = stream.blocks[0]
    assert block.part("attention") is block.part("feed-forward") is block.branches[0]


def test_a_block_that_differs_is_not_part_of_the_run() -> None:
    model = Encoder("pre-norm", depth=4)
    model.blocks[0].feed = Gated()
    stream = stream_of(model, *inputs())
    assert len(stream.branches) == 8 and len(stream.blocks) == 3


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleList(Block("pre-norm") for _ in range(2))
        self.own, self.cross = (nn.ModuleList(Attention() for _ in range(3)) for _ in range(2))
        self.feed, self.norm = nn.ModuleList(plain() for _ in range(3)), nn.LayerNorm(WIDTH)

    def forward(self, source: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        for block in self.encoder:
            source = block(source)
        for own, cross, feed in zip(self.own, self.cross, self.feed, strict=True):
            x = x + own(self.norm(x))
            x = x + cross(self.norm(x), memory=source)
            x = x + feed(self.norm(x))
        return self.norm(x)


def test_the_decoder_of_a_pair() -> None:
    stream = stream_of(Decoder(), torch.randn(2, 7, WIDTH), torch.randn(2, 5, WIDTH))
    assert [[b.kind for b in block.branches] for block in stream.blocks] == [
        ["attention", "attention", "feed-forward"]
    ] * 3


class Stage(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 1, stride=2)
        pair = [nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 1)) for _ in range(3)]
        self.short = nn.ModuleList(pair)
        self.wide = nn.Conv2d(8, 16, 3, stride=2, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.short:
            x = torch.relu(x + block(x))
        return self.down(x) + self.wide(x)


def test_stages_of_convolutions() -> None:
    stream = stream_of(Stage(), torch.randn(1, 3, 8, 8))
    assert [b.kind for b in stream.branches] == ["convolution"] * 4
    assert len(stream.blocks) == 3


def test_no_stream() -> None:
    assert find_stream(capture(nn.Sequential(nn.Linear(8, 8), nn.ReLU()).eval(), (torch.randn(2, 8),))) is None
