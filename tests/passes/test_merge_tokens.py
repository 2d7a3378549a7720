"""MergeTokens against the formulas of the paper written out, on encoders of several families."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from encoders import DEPTH, PATCHES, Dense, Encoder, inputs, merge_one
from torch import nn
from torch.nn import functional as F

from torchlathe import targets
from torchlathe.passes import ops
from torchlathe.passes.base import Context, Refusal
from torchlathe.passes.capture import capture
from torchlathe.passes.lossy.merge_tokens import MergeTokens, amounts
from torchlathe.passes.lossy.settings import operations
from torchlathe.passes.program import Program
from torchlathe.passes.verify import well_formed

CONTEXT = Context(targets.get("cpu"))


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


def merged(model: nn.Module, args: tuple[torch.Tensor, ...], **knobs: Any) -> Program:
    program = capture(model.eval(), args)
    outcome = MergeTokens(**knobs).run(program, CONTEXT)
    assert not isinstance(outcome, Refusal), outcome
    well_formed(program)
    return program


@pytest.mark.parametrize("family", ["plain", "scaled", "qk-norm", "post-norm"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("r", [1, 7, 16, (3, 0, 5, 1), (4, -1.0)], ids=str)
@torch.no_grad()
def test_equals_the_formula(family: str, batch: int, r: Any) -> None:
    model, args = Encoder(family).eval(), inputs(family, batch)
    program = merged(model, args, r=r)
    counts = amounts(r, DEPTH)
    assert isinstance(counts, list)
    torch.testing.assert_close(program(*args), by_formula(model, args[0], counts, *args[1:]), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_nothing_to_merge_changes_nothing() -> None:
    model, args = Encoder("plain").eval(), inputs("plain", 2)
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


def around_by_formula(model: Encoder, x: torch.Tensor, count: int, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Every attention sees merged tokens; every token gets the result of the one that it became."""
    results = []
    for b in range(len(x)):
        y, own = model.begin(x[b : b + 1]), None if mask is None else mask[b]
        for block in model.blocks:
            few, size, valid, places = merge_one(y[0], torch.ones(y.shape[1]), F.normalize(y[0], dim=-1), count,
                                                 model.extra, own)  # fmt: skip
            bias = size.log()[None, None, None]
            if own is not None:
                bias = bias.masked_fill(~valid, float("-inf"))
            few = few[None] if model.family == "post-norm" else block.first(few[None])
            result = block.attend(few, bias)[0][:, places]
            y = block.feed(y + (result * block.scales[0] if model.family == "scaled" else result))
        results.append(model.finish(y, None, own[None] if own is not None else None))
    return torch.cat(results)


@pytest.mark.parametrize("family", ["plain", "scaled", "qk-norm", "post-norm"])
@pytest.mark.parametrize("r", [3, 16])
@torch.no_grad()
def test_restored_equals_the_formula(family: str, r: int) -> None:
    model, args = Encoder(family).eval(), inputs(family, 3)
    program = merged(model, args, r=r, restore=True)
    wanted = around_by_formula(model, args[0], r, *args[1:])
    torch.testing.assert_close(program(*args), wanted, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_models_with_a_result_for_each_token_can_merge_around_attention() -> None:
    model = Dense("qk-norm").eval()
    x = torch.randn(2, PATCHES // 2, 12).repeat_interleave(2, 1)
    model.place.zero_()
    program = merged(model, (x,), r=PATCHES // 2, restore=True)
    torch.testing.assert_close(program(x), model(x), atol=1e-5, rtol=1e-5)


class Averaged(Encoder):
    """Divides by the number of real tokens, counted in the mask."""

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        assert mask is not None
        bias = torch.where(mask[:, None, None], 0.0, float("-inf"))
        x = self.begin(x)
        for block in self.blocks:
            x = block(x, bias)
        weight = mask[..., None].to(x.dtype)
        return self.head((self.norm(x) * weight).sum(1) / weight.sum(1))

    def finish(self, x: torch.Tensor, weight: torch.Tensor | None, mask: torch.Tensor | None) -> torch.Tensor:
        assert weight is not None and mask is not None
        weight = (weight * mask)[..., None]
        return self.head((self.norm(x) * weight).sum(1) / weight.sum(1))


@torch.no_grad()
def test_the_number_of_real_tokens_is_that_before_the_merge() -> None:
    model, args = Averaged("post-norm").eval(), inputs("post-norm", 3)
    wanted = by_formula(model, args[0], [6] * DEPTH, *args[1:])
    program = merged(model, args, r=6)
    torch.testing.assert_close(program(*args), wanted, atol=1e-5, rtol=1e-5)
    assert all(n.users for n in program.graph.nodes if n.op == "call_function")  # nothing is left that nobody reads


def test_a_share_of_the_operations_is_reached_with_the_smallest_number() -> None:
    model, args = Encoder("plain").eval(), inputs("plain", 1)
    program = capture(model, args)

    def left(**knobs: Any) -> int:
        fork = program.fork()
        assert isinstance(MergeTokens(**knobs).run(fork, CONTEXT), int)
        return operations(fork)

    whole, found = operations(program), left(flops=0.7)
    reached = [left(r=r) for r in range(1, 19)]
    assert found == max(n for n in reached if n <= 0.7 * whole)
    assert found > 0.6 * whole


@pytest.mark.parametrize(("knobs", "reason"), [({"flops": 0.1}, "at best"), ({"flops": 0.7, "r": 3}, "one of them")])
def test_shares_that_cannot_be_reached_are_refused(knobs: dict[str, Any], reason: str) -> None:
    outcome = MergeTokens(**knobs).run(capture(Encoder("plain").eval(), inputs("plain", 1)), CONTEXT)
    assert isinstance(outcome, Refusal) and reason in str(outcome)


def test_settings_go_from_little_to_much() -> None:
    program = capture(Encoder("plain").eval(), inputs("plain", 1))
    numbers = [s.r for s in MergeTokens().space(program, CONTEXT)]
    assert numbers == sorted(set(numbers)) and numbers[0] == 1 and len(numbers) > 5
    assert list(MergeTokens(r=3).space(program, CONTEXT)) == [MergeTokens(r=3)]


def test_samples_choose_for_themselves() -> None:
    model, (x,) = Encoder("plain").eval(), inputs("plain", 3)
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
    program = capture(Encoder("plain").eval(), inputs("plain", 1))
    outcome = MergeTokens(r=r).run(program, CONTEXT)
    assert isinstance(outcome, Refusal) and reason in str(outcome)


@pytest.mark.parametrize(("knobs", "reason"), [
    ({"metric": "luck"}, "cannot be compared"), ({"metric": "keys", "restore": True}, "before attention"),
    ({"protect": (0, 5)}, "in front"),
])  # fmt: skip
def test_knobs_that_mean_nothing_are_refused(knobs: dict[str, Any], reason: str) -> None:
    outcome = MergeTokens(r=2, **knobs).run(capture(Encoder("plain").eval(), inputs("plain", 1)), CONTEXT)
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
    y, sizes, kept, places = ops.merge_tokens()(x, size, x, 100, [0])
    assert y.shape == (2, 5, 4) and sizes.sum(1).tolist() == [9.0, 9.0] and (kept[:, 0] == 0).all()
    assert torch.equal(torch.zeros(2, 5).scatter_add(1, places, size), sizes)
    y, _, kept, _ = ops.merge_tokens()(x[:, :1], size[:, :1], x[:, :1], 3, [0])
    assert torch.equal(y, x[:, :1])
    with torch.device("meta"):
        shape = ops.merge_tokens()(torch.empty(2, 9, 4), torch.empty(2, 9), torch.empty(2, 9, 4), 100, [0])[0].shape
    assert shape == (2, 5, 4)
