"""MergeTokens against the formulas of the paper written out, on encoders of several families."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from torchlathe import targets
from torchlathe.passes import ops
from torchlathe.passes.base import Context, Refusal
from torchlathe.passes.capture import capture
from torchlathe.passes.lossy.merge_tokens import MergeTokens, amounts
from torchlathe.passes.program import Program
from torchlathe.passes.verify import well_formed

CONTEXT = Context(targets.get("cpu"))
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


def by_formula(model: Encoder, x: torch.Tensor, counts: list[int], mask: torch.Tensor | None = None) -> torch.Tensor:
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


def merge_one(x: Any, size: Any, metric: Any, count: int, protected: int, mask: Any) -> tuple[Any, ...]:
    tokens = len(x)
    sources = [t for t in range(0, tokens, 2) if t >= protected]
    goals = [t for t in range(1, tokens, 2) if t >= protected]
    best = []
    for s in sources:
        options = [(float(metric[s] @ metric[g]), g) for g in goals if mask is None or mask[s] == mask[g]]
        if options:
            score, goal = max(options, key=lambda o: (o[0], -o[1]))
            best.append((score, s, goal))
    count = min(count, (tokens - protected) // 2)
    chosen = sorted(best, key=lambda b: (-b[0], b[1]))[:count]
    into: dict[int, list[int]] = {}
    for _, s, g in chosen:
        into.setdefault(g, []).append(s)
    gone = {s for _, s, _ in chosen}
    rows, sizes, masks = [], [], []
    for t in range(tokens):
        if t in gone:
            continue
        group = [t, *into.get(t, [])]
        total = size[group].sum()
        rows.append((x[group] * size[group][:, None]).sum(0) / total)
        sizes.append(total)
        masks.append(mask[t] if mask is not None else torch.tensor(True))
    return torch.stack(rows), torch.stack(sizes), torch.stack(masks)


def merged(model: nn.Module, args: tuple[torch.Tensor, ...], **knobs: Any) -> Program:
    program = capture(model.eval(), args)
    outcome = MergeTokens(**knobs).run(program, CONTEXT)
    assert not isinstance(outcome, Refusal), outcome
    well_formed(program)
    return program


def arguments(family: str, batch: int) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(batch)
    x = torch.randn(batch, PATCHES, 12)
    if family != "post-norm":
        return (x,)
    mask = torch.ones(batch, PATCHES, dtype=torch.bool)
    mask[-1, 20:] = False
    return x, mask


@pytest.mark.parametrize("family", ["plain", "scaled", "qk-norm", "post-norm"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("r", [1, 4, 7, (3, 0, 5, 1), (4, -1.0)], ids=str)
@torch.no_grad()
def test_equals_the_formula(family: str, batch: int, r: Any) -> None:
    model, args = Encoder(family).eval(), arguments(family, batch)
    program = merged(model, args, r=r)
    counts = amounts(r, DEPTH)
    assert isinstance(counts, list)
    torch.testing.assert_close(program(*args), by_formula(model, args[0], counts, *args[1:]), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_nothing_to_merge_changes_nothing() -> None:
    model, args = Encoder("plain").eval(), arguments("plain", 2)
    program = capture(model, args)
    before = program.text()
    assert MergeTokens(r=0).run(program, CONTEXT) == 0
    assert program.text() == before


@torch.no_grad()
def test_equal_tokens_merge_without_loss() -> None:
    model = Encoder("plain").eval()
    model.place.zero_()
    x = torch.randn(2, PATCHES // 2, 12).repeat_interleave(2, 1)
    program = merged(model, (x,), r=(PATCHES // 2, 0, 0, 0))
    torch.testing.assert_close(program(x), model(x), atol=1e-5, rtol=1e-5)


def test_samples_choose_for_themselves() -> None:
    model, (x,) = Encoder("plain").eval(), arguments("plain", 3)
    program = merged(model, (x,), r=5)
    with torch.no_grad():
        together = program(x)
        for b in range(3):
            torch.testing.assert_close(merged(model, (x[b : b + 1],), r=5)(x[b : b + 1])[0], together[b])


@pytest.mark.parametrize(("r", "reason"), [
    (40, "cannot be merged"), ((20, 0, 0, 0), "cannot be merged"), ((1, 2, 3, 4, 5), "attention layers"),
    (-1, "negative"),
])  # fmt: skip
def test_impossible_numbers_are_refused(r: Any, reason: str) -> None:
    program = capture(Encoder("plain").eval(), arguments("plain", 1))
    outcome = MergeTokens(r=r).run(program, CONTEXT)
    assert isinstance(outcome, Refusal) and reason in str(outcome)


class Causal(Encoder):
    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        x = self.begin(x)
        for block in self.blocks:
            q, k, v = block.heads(block.first(x))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = block.feed(x + block.out(y.transpose(1, 2).reshape(x.shape)))
        return self.norm(x)


class Masked(Encoder):
    """Causal by a mask that is computed."""

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        x, t = self.begin(x), torch.arange(x.shape[1])
        bias = torch.where(t[:, None] >= t, 0.0, float("-inf"))[None, None]
        for block in self.blocks:
            x = block(x, bias)
        return self.norm(x)


class Dense(Encoder):
    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        x = self.begin(x)
        for block in self.blocks:
            x = block(x, None)
        return self.norm(x).transpose(1, 2).reshape(x.shape[0], WIDTH, 6, 6).mean((2, 3))


class Mixed(Encoder):
    def __init__(self) -> None:
        super().__init__("qk-norm")
        self.mix = nn.Linear(PATCHES, PATCHES)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        x = self.begin(x)
        for block in self.blocks:
            x = block(x, None)
        return self.mix(x.transpose(1, 2))


@pytest.mark.parametrize(("model", "reason"), [
    (Causal("qk-norm"), "causal"), (Masked("qk-norm"), "query to query"), (Dense("qk-norm"), "apart"),
    (Mixed(), "along the axis|carries the axis|of its own"),
    (nn.Sequential(nn.Linear(12, 8), nn.GELU()), "residual"),
])  # fmt: skip
def test_models_whose_tokens_must_keep_their_places_are_refused(model: nn.Module, reason: str) -> None:
    program = capture(model.eval(), (torch.randn(2, PATCHES, 12),))
    outcome = MergeTokens(r=2).run(program, CONTEXT)
    assert isinstance(outcome, Refusal)
    assert any(r in str(outcome) for r in reason.split("|")), outcome


def test_the_operator_clamps_what_is_asked_for() -> None:
    x, size = torch.randn(2, 9, 4), torch.ones(2, 9)
    y, sizes, kept = ops.merge_tokens()(x, size, x, 100, [0])
    assert y.shape == (2, 5, 4) and sizes.sum(1).tolist() == [9.0, 9.0] and (kept[:, 0] == 0).all()
    y, _, kept = ops.merge_tokens()(x[:, :1], size[:, :1], x[:, :1], 3, [0])
    assert torch.equal(y, x[:, :1])
    with torch.device("meta"):
        shape = ops.merge_tokens()(torch.empty(2, 9, 4), torch.empty(2, 9), torch.empty(2, 9, 4), 100, [0])[0].shape
    assert shape == (2, 5, 4)
