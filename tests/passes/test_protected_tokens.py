"""Tokens that stay alone behind the others or among them, and what reads them by their place."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from encoders import PATCHES, WIDTH, Encoder, merge_one
from torch import nn
from torch.nn import functional as F

from torchlathe import targets
from torchlathe.passes.base import Context, Pass, Refusal
from torchlathe.passes.capture import capture
from torchlathe.passes.lossy.merge_tokens import MergeTokens
from torchlathe.passes.lossy.prune_and_restore import PruneAndRestore
from torchlathe.passes.lossy.prune_tokens import PruneTokens
from torchlathe.passes.program import Program
from torchlathe.passes.verify import well_formed

CONTEXT = Context(targets.get("cpu"))


class Placed(Encoder):
    """Reads some tokens by their place.

    ``behind``: class token in front, registers and distillation token behind; ``sep``: the last token of the input;
    ``slice``: the mean of all but the class token and two registers behind; ``plain-slice``: that of all but the first
    and the last token of the input; ``among``: registers between the patches; ``count``: the last token and the mean of
    all but the first and the last, by places counted from the first; ``far``: two tokens in the middle.
    """

    def __init__(self, kind: str) -> None:
        super().__init__("qk-norm")
        self.kind, self.more = kind, nn.Parameter(torch.randn(1, 3, WIDTH))

    def alone(self, tokens: int) -> list[int]:
        return {"behind": [0, *range(tokens - 3, tokens)], "sep": [tokens - 1], "slice": [0, tokens - 2, tokens - 1],
                "plain-slice": [0, tokens - 1], "among": [0, 11, 12, 13], "count": [0, tokens - 1],
                "far": [2, 33]}[self.kind]  # fmt: skip

    def begin(self, x: torch.Tensor) -> torch.Tensor:
        x, b = self.embed(x), x.shape[0]
        token, more = self.token.expand(b, -1, -1), self.more.expand(b, -1, -1)
        if self.kind == "behind":
            return torch.cat([token, x, more], 1)
        if self.kind == "slice":
            return torch.cat([token, x, more[:, :2]], 1)
        return torch.cat([token, x[:, :10], more, x[:, 10:]], 1) if self.kind == "among" else x

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        x = self.begin(x)
        for block in self.blocks:
            x = block(x, None)
        x = self.norm(x)
        if self.kind == "behind":
            return self.head(x[:, 0] + 2 * x[:, -1] + 3 * x[:, -3:-1].mean(1))
        if self.kind == "sep":
            return self.head(x[:, -1])
        if self.kind == "among":
            return self.head(x[:, 0] + 2 * x[:, 12] + 3 * x[:, 11:14].amax(1))
        if self.kind == "count":
            return self.head(x[:, x.shape[1] - 1] + 2 * x[:, 1 : x.shape[1] - 1].mean(1))
        if self.kind == "far":
            return self.head(x[:, 2] + 2 * x[:, 33])
        return self.head((x[:, 1:-2] if self.kind == "slice" else x[:, 1:-1]).mean(1))

    def read(self, x: torch.Tensor, size: torch.Tensor, place: Mapping[int, int], tokens: int) -> torch.Tensor:
        """The same of merged tokens [tokens, features]; `place` says where those are that stay alone."""
        x = self.norm(x)
        first, *rest = (x[place[p]] for p in self.alone(tokens))
        if self.kind == "behind":
            return self.head(first + 2 * rest[2] + 3 * (rest[0] + rest[1]) / 2)
        if self.kind == "sep":
            return self.head(first)
        if self.kind == "among":
            return self.head(first + 2 * rest[1] + 3 * torch.stack(rest).amax(0))
        if self.kind == "far":
            return self.head(first + 2 * rest[0])
        others = [k for k in range(len(x)) if k not in place.values()]
        mean = (x[others] * size[others, None]).sum(0) / size[others].sum()
        return self.head(rest[0] + 2 * mean if self.kind == "count" else mean)


KINDS = ["behind", "sep", "slice", "plain-slice", "among", "count", "far"]


def program_of(model: nn.Module, args: tuple[torch.Tensor, ...], rewrite: Pass, **how: Any) -> Program:
    program = capture(model.eval(), args, **how)
    outcome = rewrite.run(program, CONTEXT)
    assert not isinstance(outcome, Refusal), outcome
    well_formed(program)
    return program


def in_order(alone: list[int], tokens: int) -> list[int]:
    """Places before the first merge: protected ones in the middle go behind those in front."""
    front = next(k for k in range(tokens) if k not in alone)
    last = next(k for k in range(1, tokens) if tokens - k not in alone) - 1
    inner = [p for p in alone if front <= p < tokens - last]
    return [*range(front), *inner, *(p for p in range(front, tokens) if p not in inner)]


def merged(x: Any, size: Any, metric: Any, count: int, place: dict[int, int]) -> tuple[Any, ...]:
    x, size, _, places = merge_one(x, size, F.normalize(metric, dim=-1), count, set(place.values()), None)
    return x, size, {p: places[k] for p, k in place.items()}, places


def most(place: dict[int, int], tokens: int) -> int:
    """How many of so many tokens can go: as many as are at even places, if protected ones behind are at such, too."""
    front = next(k for k in range(tokens + 1) if k not in place.values())
    return max(0, min((tokens - len(place)) // 2, (tokens + 1) // 2 - (front + 1) // 2 - (len(place) - front + 1) // 2))


def by_formula(model: Placed, x: torch.Tensor, count: int) -> torch.Tensor:
    """Merging after every attention, sample by sample."""
    results = []
    for sample in model.begin(x):
        order = in_order(model.alone(len(sample)), len(sample))
        y, size, tokens = sample[order], torch.ones(len(sample)), len(sample)
        place = {p: order.index(p) for p in model.alone(tokens)}
        for block in model.blocks:
            y, keys = block.after_attention(y[None], size.log()[None])
            y, size, place, _ = merged(y[0], size, keys[0].mean(0), min(count, most(place, len(size))), place)
            y = block.feed(y)
        results.append(model.read(y, size, place, tokens))
    return torch.stack(results)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch", [pytest.param(1, marks=pytest.mark.slow), 3])
@pytest.mark.parametrize("r", [pytest.param(1, marks=pytest.mark.slow), 5])
@torch.no_grad()
def test_merging_equals_the_formula(kind: str, batch: int, r: int) -> None:
    torch.manual_seed(batch)
    model, x = Placed(kind).eval(), torch.randn(batch, PATCHES, 12)
    program = program_of(model, (x,), MergeTokens(r=r))
    torch.testing.assert_close(program(x), by_formula(model, x, r), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_pruning_and_restoring_equals_the_formula(kind: str) -> None:
    torch.manual_seed(1)
    model, x = Placed(kind).eval(), torch.randn(3, PATCHES, 12)
    program = program_of(model, (x,), PruneAndRestore(keep=0.4, start=1, stop=3))
    results = []
    for sample in model.begin(x):
        tokens, y = len(sample), model.blocks[0](sample[None], None)[0]
        left, order = math.ceil(0.4 * tokens), in_order(model.alone(tokens), tokens)
        few, size, places = y[order], torch.ones(tokens), list(range(tokens))
        place = {p: order.index(p) for p in model.alone(tokens)}
        while len(few) > left:
            count = min(len(few) - left, most(place, len(few)))
            few, size, place, now = merged(few, size, few, count, place)
            places = [now[k] for k in places]
        z = few[None]
        for block in model.blocks[1:3]:
            z = block(z, size.log()[None])
        change = (z[0] - few)[[places[order.index(p)] for p in range(tokens)]]
        y = model.blocks[3]((y + change)[None], None)[0]
        results.append(model.read(y, torch.ones(tokens), {p: p for p in model.alone(tokens)}, tokens))
    torch.testing.assert_close(program(x), torch.stack(results), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_restoring_around_attention_equals_the_formula(kind: str) -> None:
    torch.manual_seed(2)
    model, x = Placed(kind).eval(), torch.randn(2, PATCHES, 12)
    program = program_of(model, (x,), MergeTokens(r=9, restore=True))
    results = []
    for sample in model.begin(x):
        y, tokens = sample, len(sample)
        order = in_order(model.alone(tokens), tokens)
        for block in model.blocks:
            few, size, _, places = merged(y[order], torch.ones(tokens), y[order], 9,
                                          {p: order.index(p) for p in model.alone(tokens)})  # fmt: skip
            result = block.attend(block.first(few[None]), size.log()[None])[0][0]
            y = block.feed(y + result[[places[order.index(p)] for p in range(tokens)]])
        results.append(model.read(y, torch.ones(tokens), {p: p for p in model.alone(tokens)}, tokens))
    torch.testing.assert_close(program(x), torch.stack(results), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["behind", "sep", "slice", "plain-slice"])
@torch.no_grad()
def test_lengths_known_at_run_time_only(kind: str) -> None:
    model = Placed(kind).eval()
    program = program_of(model, (torch.randn(2, 20, 12),), MergeTokens(r=3),
                         dynamic_shapes=({1: torch.export.Dim("tokens", min=4, max=64)},))  # fmt: skip
    for length in (4, 9, 30, 41):
        x = torch.randn(2, length, 12)
        torch.testing.assert_close(program(x), by_formula(model, x, 3), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_keeping_every_token_by_its_index_changes_no_bit(kind: str) -> None:
    model, x = Placed(kind).eval(), torch.randn(2, PATCHES, 12)
    tokens = model.begin(x).shape[1]
    keep = PruneTokens(keep=tokens - len(model.alone(tokens)), layers=(1,), score="received")
    if kind in ("among", "far"):  # the order is kept, and with it the places would differ from sample to sample
        outcome = keep.run(capture(model, (x,)), CONTEXT)
        assert isinstance(outcome, Refusal) and "along the axis" in str(outcome)
    else:
        assert torch.equal(program_of(model, (x,), keep)(x), model(x))


class Beside(Placed):
    """All but the first and the last token meet numbers for their places."""

    def __init__(self) -> None:
        super().__init__("plain-slice")
        self.table = nn.Parameter(torch.randn(PATCHES, WIDTH))

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        x = self.begin(x)
        for block in self.blocks:
            x = block(x, None)
        return self.head((self.norm(x)[:, 1:-1] * self.table[: x.shape[1] - 2]).mean(1))


@torch.no_grad()
def test_what_meets_a_slice_is_taken_at_the_chosen_places() -> None:
    torch.manual_seed(3)
    model, x = Beside().eval(), torch.randn(3, PATCHES, 12)
    program = program_of(model, (x,), PruneTokens(keep=20, layers=(1,), score="norm"))
    results = []
    for y in model.blocks[1].after_attention(model.blocks[0](model.begin(x), None), None)[0]:
        best = y.norm(dim=-1)[1:-1].argsort(descending=True)[:20]
        inner = best.sort().values
        z = model.blocks[1].feed(y[[0, *(inner + 1).tolist(), PATCHES - 1]])[None]
        for block in model.blocks[2:]:
            z = block(z, None)
        results.append(model.head((model.norm(z[0])[1:-1] * model.table[inner]).mean(0)))
    torch.testing.assert_close(program(x), torch.stack(results), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_protected_by_hand() -> None:
    model, x = Encoder("qk-norm").eval(), torch.randn(2, PATCHES, 12)
    program = program_of(model, (x,), MergeTokens(r=2, protect=(0, 5, -1)))
    place = {0: 0, 5: 5, PATCHES - 1: PATCHES - 1}
    order, results = in_order([*place], PATCHES), []
    for sample in model.begin(x):
        y, size, alone = sample[order], torch.ones(PATCHES), {p: order.index(p) for p in place}
        for block in model.blocks:
            y, keys = block.after_attention(y[None], size.log()[None])
            y, size, alone, _ = merged(y[0], size, keys[0].mean(0), 2, alone)
            y = block.feed(y)
        results.append(model.finish(y[None], size[None], None)[0])
    torch.testing.assert_close(program(x), torch.stack(results), atol=1e-5, rtol=1e-5)
    outcome = MergeTokens(r=2, protect=(0, PATCHES)).run(capture(model, (x,)), CONTEXT)
    assert isinstance(outcome, Refusal) and "cannot be protected" in str(outcome)


class Differences(Placed):
    """Parts of the tokens that are not the same meet."""

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        x = self.begin(x)
        for block in self.blocks:
            x = block(x, None)
        return self.head((x[:, 1:] - x[:, :-1]).abs().mean(1))


class Cut(Placed):
    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        x = self.begin(x)
        for block in self.blocks:
            x = block(x, None)
        return self.head(x.unbind(1)[3])


@pytest.mark.parametrize(("model", "reason"), [
    (Differences("sep"), "different parts"), (Cut("sep"), "unbind works along the axis"),
])  # fmt: skip
def test_places_that_cannot_be_followed_are_refused(model: Placed, reason: str) -> None:
    outcome = MergeTokens(r=2).run(capture(model.eval(), (torch.randn(2, PATCHES, 12),)), CONTEXT)
    assert isinstance(outcome, Refusal) and reason in str(outcome), outcome
