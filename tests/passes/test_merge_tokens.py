"""MergeTokens against the formulas of the paper written out, on encoders of several families."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from encoders import DEPTH, PATCHES, Dense, Encoder, Text, inputs, merged_by_formula, texts
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


def merged(model: nn.Module, args: tuple[torch.Tensor, ...], **knobs: Any) -> Program:
    program = capture(model.eval(), args)
    outcome = MergeTokens(**knobs).run(program, CONTEXT)
    assert not isinstance(outcome, Refusal), outcome
    well_formed(program)
    return program


@pytest.mark.parametrize("family", ["plain", "scaled", "qk-norm", "post-norm"])
@pytest.mark.parametrize("batch", [pytest.param(1, marks=pytest.mark.slow), 3])
@pytest.mark.parametrize("r", [1, 7, 16, (3, 0, 5, 1), (4, -1.0)], ids=str)
@torch.no_grad()
def test_equals_the_formula(family: str, batch: int, r: Any) -> None:
    model, args = Encoder(family).eval(), inputs(family, batch)
    program = merged(model, args, r=r)
    counts = amounts(r, [0] * DEPTH)
    assert isinstance(counts, list)
    torch.testing.assert_close(
        program(*args), merged_by_formula(model, args[0], counts, *args[1:]), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("r", [4, 12])
@torch.no_grad()
def test_lengths_known_at_run_time_only(r: int) -> None:
    model = Text().eval()
    tokens = torch.export.Dim("tokens", min=2, max=64)
    program = capture(model, texts(20), dynamic_shapes=({1: tokens}, {1: tokens}))
    assert MergeTokens(r=r).run(program, CONTEXT) == DEPTH
    well_formed(program)
    for length in (2, 3, 9, 20, 41):  # shorter than the reduction, too: it is clamped
        args = texts(length)
        wanted = merged_by_formula(model, args[0], [r] * DEPTH, args[1])
        torch.testing.assert_close(program(*args), wanted, atol=1e-5, rtol=1e-5)


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
