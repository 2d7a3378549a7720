"""Small causal decoders: one over features, and one over token ids with grouped heads and several kinds of masks."""

from __future__ import annotations

from typing import Any

import torch
from encoders import Encoder
from torch import nn
from torch.nn import functional as F

WIDTH, HEADS, GROUPS, SIZE, DEPTH, WORDS = 32, 4, 2, 8, 4, 64


class Causal(nn.Module):
    """A decoder with rotary positions and a computed mask, or the causal flag."""

    def __init__(self, flag: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.flag, self.inner = flag, Encoder("qk-norm")

    def layer(self, block: Any, x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        q, k, v = block.heads(block.first(x))
        angle = (places[..., None] * torch.logspace(0, -2, 8)).repeat(*[1] * places.dim(), 2)[:, None]
        turn = [t * angle.cos() + torch.cat([-t[..., 8:], t[..., :8]], -1) * angle.sin() for t in (q, k)]
        mask = None if self.flag else (places[:, :, None] >= places[:, None])[:, None]
        y = F.scaled_dot_product_attention(*turn, v, mask, is_causal=self.flag)
        return x + block.out(y.transpose(1, 2).reshape(x.shape)), turn

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.inner.embed(x)
        places = torch.arange(x.shape[1])[None]
        for block in self.inner.blocks:
            x = block.feed(self.layer(block, x, places)[0])
        return self.inner.norm(x)[:, -1]


def rotated(x: torch.Tensor) -> torch.Tensor:
    """Rotary positions of [batch, heads, tokens, size]."""
    angle = (torch.arange(x.shape[2])[:, None] * torch.logspace(0, -2, SIZE // 2)).repeat(1, 2)
    return x * angle.cos() + torch.cat([-x[..., SIZE // 2 :], x[..., : SIZE // 2]], -1) * angle.sin()


class Layer(nn.Module):
    def __init__(self, mask: str, rotary: bool) -> None:
        super().__init__()
        self.mask, self.rotary = mask, rotary
        self.first, self.second = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.q, self.out = nn.Linear(WIDTH, HEADS * SIZE), nn.Linear(HEADS * SIZE, WIDTH)
        self.k, self.v = nn.Linear(WIDTH, GROUPS * SIZE), nn.Linear(WIDTH, GROUPS * SIZE)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def heads(self, x: torch.Tensor) -> list[torch.Tensor]:
        y = self.first(x)
        q, k, v = (f(y).unflatten(-1, (-1, SIZE)).transpose(1, 2) for f in (self.q, self.k, self.v))
        return [rotated(q), rotated(k), v] if self.rotary else [q, k, v]

    def forward(self, x: torch.Tensor, given: torch.Tensor | None = None) -> torch.Tensor:
        q, k, v = self.heads(x)
        place = torch.arange(x.shape[1])
        mask: Any = None
        if self.mask == "bool":
            mask = place[:, None] >= place
        elif self.mask == "bias":
            mask = torch.where(place[:, None] >= place, 0.0, float("-inf"))
        elif self.mask == "ahead":
            mask = place[:, None] + 1 >= place
        if given is not None:
            mask = mask & given[:, None, None]
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=self.mask == "flag", enable_gqa=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.down(F.silu(self.up(self.second(x))))


class Decoder(nn.Module):
    """Logits of the last token, or of each.

    ``mask`` is flag, bool, bias, ahead (one token ahead is seen) or none; ``places`` is rotary, table (a parameter) or
    rows (an embedding of a range); ``result`` is last, kept (``[:, -1:]``), rest (the mean of all but the last, each
    with a number for its place), each, flat (samples and tokens as one) or tuple (logits of the last token, features of
    each).
    """

    def __init__(self, mask: str = "flag", places: str = "rotary", result: str = "last") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.places, self.result = places, result
        self.words, self.rows = nn.Embedding(WORDS, WIDTH), nn.Embedding(64, WIDTH)
        self.layers = nn.ModuleList(Layer(mask, places == "rotary") for _ in range(DEPTH))
        self.norm, self.head = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, WORDS)

    def begin(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.words(ids)
        if self.places == "table":
            x = x + self.rows.weight[: x.shape[1]]
        return x + self.rows(torch.arange(x.shape[1])) if self.places == "rows" else x

    def finish(self, x: torch.Tensor) -> Any:
        if self.result in ("last", "kept"):
            return self.head(self.norm(x[:, -1] if self.result == "last" else x[:, -1:]))
        if self.result == "rest":
            return self.head((self.norm(x[:, :-1]) * self.rows.weight[: x.shape[1] - 1]).mean(1))
        logits = self.head(self.norm(x))
        if self.result == "tuple":
            return logits[:, -1], x
        return logits.flatten(0, 1) if self.result == "flat" else logits

    def forward(self, ids: torch.Tensor, given: torch.Tensor | None = None) -> Any:
        x = self.begin(ids)
        for layer in self.layers:
            x = layer(x, given)
        return self.finish(x)
