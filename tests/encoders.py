"""Small encoders of several families: class token and registers, LayerScale, QK-norm, post-norm with padding."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

WIDTH, HEADS, DEPTH, PATCHES = 48, 3, 4, 36


class Block(nn.Module):
    def __init__(self, family: str) -> None:
        super().__init__()
        self.family = family
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qn, self.kn = nn.LayerNorm(WIDTH // HEADS), nn.LayerNorm(WIDTH // HEADS)
        self.scales = nn.Parameter(torch.rand(2, WIDTH))

    def heads(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        b, t, _ = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4).unbind(0)
        return (self.qn(q), self.kn(k), v) if self.family == "qk-norm" else (q, k, v)

    def attend(self, x: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        q, k, v = self.heads(x)
        y = F.scaled_dot_product_attention(q, k, v, bias)
        return self.out(y.transpose(1, 2).reshape(x.shape[0], -1, WIDTH)), k

    def after_attention(self, x: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """The stream after the residual addition, and the keys."""
        post = self.family == "post-norm"
        y, k = self.attend(x if post else self.first(x), bias)
        return x + (y * self.scales[0] if self.family == "scaled" else y), k

    def feed(self, x: torch.Tensor) -> torch.Tensor:
        if self.family == "post-norm":
            x = self.first(x)
            return self.second(x + self.down(F.gelu(self.up(x))))
        y = self.down(F.gelu(self.up(self.second(x))))
        return x + (y * self.scales[1] if self.family == "scaled" else y)

    def forward(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return self.feed(self.after_attention(x, bias)[0])


class Encoder(nn.Module):
    """An image or text encoder: class token and registers where the family has them, a mask where texts are padded."""

    def __init__(self, family: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.family, self.extra = family, {"plain": 1, "scaled": 5, "qk-norm": 0, "post-norm": 0}[family]
        self.embed = nn.Linear(12, WIDTH)
        self.token, self.registers = nn.Parameter(torch.randn(1, 1, WIDTH)), nn.Parameter(torch.randn(1, 4, WIDTH))
        self.place = nn.Parameter(torch.randn(1, PATCHES + min(1, self.extra), WIDTH))
        self.blocks = nn.ModuleList(Block(family) for _ in range(DEPTH))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 10)

    def begin(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        if self.extra:
            x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1)
        x = x + self.place
        if self.extra > 1:
            x = torch.cat([x[:, :1], self.registers.expand(x.shape[0], -1, -1), x[:, 1:]], 1)
        return x

    def finish(self, x: torch.Tensor, weight: torch.Tensor | None, mask: torch.Tensor | None) -> torch.Tensor:
        x = self.norm(x)
        if self.extra:
            return self.head(x[:, 0])
        weight = torch.ones_like(x[..., 0]) if weight is None else weight
        if mask is not None:
            weight = weight * mask
            return self.head((x * weight[..., None]).sum(1))
        return self.head((x * weight[..., None]).sum(1) / weight.sum(1, keepdim=True))

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        bias = None if mask is None else torch.where(mask[:, None, None], 0.0, float("-inf"))
        x = self.begin(x)
        for block in self.blocks:
            x = block(x, bias)
        if self.extra:
            return self.head(self.norm(x)[:, 0])
        if mask is not None:
            return self.head((self.norm(x) * mask[..., None]).sum(1))
        return self.head(self.norm(x).mean(1))


class Dense(Encoder):
    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        x = self.begin(x)
        for block in self.blocks:
            x = block(x, None)
        return self.norm(x).transpose(1, 2).reshape(x.shape[0], WIDTH, 6, 6).mean((2, 3))


class Text(Encoder):
    """A post-norm encoder of texts of any length, with a mask."""

    def __init__(self) -> None:
        super().__init__("post-norm")
        self.rows = nn.Embedding(64, WIDTH)

    def begin(self, x: torch.Tensor) -> torch.Tensor:
        return self.embed(x) + self.rows(torch.arange(x.shape[1]))


def texts(length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two texts, one of them padded."""
    torch.manual_seed(length)
    mask = torch.ones(2, length, dtype=torch.bool)
    mask[1, 1 + length // 2 :] = False
    return torch.randn(2, length, 12), mask


def inputs(family: str, batch: int) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(batch)
    x = torch.randn(batch, PATCHES, 12)
    if family != "post-norm":
        return (x,)
    mask = torch.ones(batch, PATCHES, dtype=torch.bool)
    mask[-1, 20:] = False
    return x, mask


def merge_one(x: Any, size: Any, metric: Any, count: int, protected: int | set[int], mask: Any) -> tuple[Any, ...]:
    """The paper's matching of one sample, token by token: tokens, sizes, mask, and where each token went.

    The first `protected` tokens, or those of this set, stay alone.
    """
    tokens = len(x)
    alone = set(range(protected)) if isinstance(protected, int) else protected
    sources = [t for t in range(0, tokens, 2) if t not in alone]
    goals = [t for t in range(1, tokens, 2) if t not in alone]
    best = []
    for s in sources:
        options = [(float(metric[s] @ metric[g]), g) for g in goals if mask is None or mask[s] == mask[g]]
        if options:
            score, goal = max(options, key=lambda o: (o[0], -o[1]))
            best.append((score, s, goal))
    count = min(count, (tokens - len(alone)) // 2, len(sources) - (mask is not None))
    chosen = sorted(best, key=lambda b: (-b[0], b[1]))[:count]
    into: dict[int, list[int]] = {}
    for _, s, g in chosen:
        into.setdefault(g, []).append(s)
    gone = {s for _, s, _ in chosen}
    rows, sizes, masks, places = [], [], [], [0] * tokens
    for t in range(tokens):
        if t in gone:
            continue
        group = [t, *into.get(t, [])]
        for member in group:
            places[member] = len(rows)
        total = size[group].sum()
        rows.append((x[group] * size[group][:, None]).sum(0) / total)
        sizes.append(total)
        masks.append(mask[t] if mask is not None else torch.tensor(True))
    return torch.stack(rows), torch.stack(sizes), torch.stack(masks), places


def merged_by_formula(
    model: Encoder, x: torch.Tensor, counts: list[int], mask: torch.Tensor | None = None
) -> torch.Tensor:
    """The paper's algorithm, token by token."""
    x = model.begin(x)
    size = torch.ones(x.shape[:2])
    for block, count in zip(model.blocks, counts, strict=True):
        bias = size.log()[:, None, None]
        if mask is not None:
            bias = bias.masked_fill(~mask[:, None, None], float("-inf"))
        x, keys = block.after_attention(x, bias)
        metric = F.normalize(keys.mean(1), dim=-1)
        found = [merge_one(x[b], size[b], metric[b], count, model.extra, None if mask is None else mask[b])
                 for b in range(x.shape[0])]  # fmt: skip
        x, size = (torch.stack([f[k] for f in found]) for k in (0, 1))
        mask = None if mask is None else torch.stack([f[2] for f in found])
        x = block.feed(x)
    return model.finish(x, size, mask)
