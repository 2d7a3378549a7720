"""PruneTokens against the formulas written out, on encoders of several families and a causal one."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from decoders import Causal
from encoders import DEPTH, PATCHES, WIDTH, Encoder, Text, inputs, texts
from torch import nn

from torchlathe import targets
from torchlathe.passes import ops
from torchlathe.passes.base import Context, Refusal
from torchlathe.passes.capture import capture
from torchlathe.passes.lossy.prune_tokens import PruneTokens
from torchlathe.passes.program import Program
from torchlathe.passes.verify import well_formed

CONTEXT = Context(targets.get("cpu"))


def pruned(model: nn.Module, args: tuple[torch.Tensor, ...], **knobs: Any) -> Program:
    program = capture(model.eval(), args)
    outcome = PruneTokens(**knobs).run(program, CONTEXT)
    assert not isinstance(outcome, Refusal), outcome
    well_formed(program)
    return program


def by_formula(model: Encoder, x: torch.Tensor, keep: float, layers: tuple[int, ...], score: str,
               mask: torch.Tensor | None = None, rest: bool = False) -> torch.Tensor:  # fmt: skip
    """Sample by sample, with the attention's probabilities spelled out."""
    results = []
    for b in range(len(x)):
        y, own = model.begin(x[b : b + 1]), None if mask is None else mask[b : b + 1]
        for number, block in enumerate(model.blocks):
            bias = torch.zeros(1, 1, 1, y.shape[1])
            if own is not None:
                bias = bias.masked_fill(~own[:, None, None], float("-inf"))
            source = y if model.family == "post-norm" else block.first(y)
            q, k, _ = block.heads(source)
            shares = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(WIDTH // 3) + bias, -1).mean(1)[0]
            y, _ = block.after_attention(y, bias)
            if number in layers:
                worth = {"cls": shares[0], "received": shares.mean(0), "norm": y[0].norm(dim=-1)}[score]
                if own is not None:
                    worth = torch.where(own[0], worth, -1.0)
                free = [t for t in range(y.shape[1]) if t >= model.extra]
                best = sorted(free, key=lambda t: -float(worth[t]))[: math.ceil(keep * len(free))]
                kept = sorted([*range(model.extra), *best])
                gone = [t for t in free if t not in best]
                place = [max(gone, key=lambda t: float(worth[t]))] if rest and gone else []
                fused = sum(worth[t].clamp_min(0) * y[:, t : t + 1] for t in gone) if place else y[:, :0]
                y, own = torch.cat([y[:, kept], fused], 1), None if own is None else own[:, [*kept, *place]]
            y = block.feed(y)
        results.append(model.finish(y, None, own))
    return torch.cat(results)


@pytest.mark.parametrize(("family", "score"), [
    ("plain", "cls"), ("scaled", "cls"), ("plain", "received"), ("qk-norm", "received"), ("qk-norm", "norm"),
    ("post-norm", "received"), ("post-norm", "norm"),
])  # fmt: skip
@pytest.mark.parametrize("keep", [0.7, 0.3])
@pytest.mark.parametrize("batch", [pytest.param(1, marks=pytest.mark.slow), 3])
@torch.no_grad()
def test_equals_the_formula(family: str, score: str, keep: float, batch: int) -> None:
    model, args = Encoder(family).eval(), inputs(family, batch)
    program = pruned(model, args, keep=keep, layers=(1, 2), score=score)
    wanted = by_formula(model, args[0], keep, (1, 2), score, *args[1:])
    torch.testing.assert_close(program(*args), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("family", "score"), [("plain", "cls"), ("scaled", "received"), ("post-norm", "received")])
@torch.no_grad()
def test_what_is_dropped_is_added_up(family: str, score: str) -> None:
    model, args = Encoder(family).eval(), inputs(family, 3)
    program = pruned(model, args, keep=0.5, layers=(1, 2), score=score, fuse_rest=True)
    wanted = by_formula(model, args[0], 0.5, (1, 2), score, *args[1:], rest=True)
    torch.testing.assert_close(program(*args), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rest", [False, True])
@torch.no_grad()
def test_lengths_known_at_run_time_only(rest: bool) -> None:
    model = Text().eval()
    tokens = torch.export.Dim("tokens", min=2, max=64)
    program = capture(model, texts(20), dynamic_shapes=({1: tokens}, {1: tokens}))
    knobs: dict[str, Any] = {"keep": 0.5, "layers": (1, 2), "score": "received", "fuse_rest": rest}
    assert PruneTokens(**knobs).run(program, CONTEXT) == 2
    well_formed(program)
    for length in (4, 9, 20, 41):
        args = texts(length)
        wanted = by_formula(model, args[0], 0.5, (1, 2), "received", args[1], rest)
        torch.testing.assert_close(program(*args), wanted, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_keeping_all_changes_nothing() -> None:
    model, args = Encoder("plain").eval(), inputs("plain", 2)
    program = capture(model, args)
    before = program.text()
    assert PruneTokens(keep=1.0).run(program, CONTEXT) == 0
    assert program.text() == before
    whole = pruned(model, args, keep=PATCHES, layers=(0, 2))
    assert torch.equal(whole(*args), model(*args))


@pytest.mark.parametrize("flag", [False, True])
@torch.no_grad()
def test_a_causal_model_keeps_positions_and_its_last_token(flag: bool) -> None:
    model, x = Causal(flag).eval(), torch.randn(2, 20, 12)
    program = pruned(model, (x,), keep=0.5, layers=(1,), score="last_query")
    results = []
    for b in range(2):
        y, places = model.inner.embed(x[b : b + 1]), torch.arange(20)[None]
        for number, block in enumerate(model.inner.blocks):
            y, (q, k) = model.layer(block, y, places)
            if number == 1:
                worth = torch.softmax((q[:, :, -1:] @ k.transpose(-1, -2)) / 4, -1).mean((1, 2))[0]
                best = sorted(range(19), key=lambda t: -float(worth[t]))[:10]
                kept = sorted([*best, 19])
                y, places = y[:, kept], places[:, kept]
            y = block.feed(y)
        results.append(model.inner.norm(y)[:, -1])
    torch.testing.assert_close(program(x), torch.cat(results), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("knobs", "reason"), [
    ({"keep": 0.0}, "cannot be kept"), ({"keep": 1.5}, "cannot be kept"), ({"keep": PATCHES + 1}, "to keep of"),
    ({"score": "norm", "fuse_rest": True}, "no weights"), ({"flops": 0.7, "keep": 0.5}, "one of them"),
    ({"layers": (DEPTH,)}, "attention layers"), ({"score": "luck"}, "no score"),
])  # fmt: skip
def test_impossible_knobs_are_refused(knobs: dict[str, Any], reason: str) -> None:
    outcome = PruneTokens(**knobs).run(capture(Encoder("plain").eval(), inputs("plain", 1)), CONTEXT)
    assert isinstance(outcome, Refusal) and reason in str(outcome)


def test_models_without_a_class_token_or_with_the_wrong_score_are_refused() -> None:
    outcome = PruneTokens().run(capture(Encoder("qk-norm").eval(), inputs("qk-norm", 1)), CONTEXT)
    assert isinstance(outcome, Refusal) and "class token" in str(outcome)
    program = capture(Causal(True).eval(), (torch.randn(2, 20, 12),))
    outcome = PruneTokens(score="received").run(program, CONTEXT)
    assert isinstance(outcome, Refusal) and "causal" in str(outcome)


def test_the_operator_keeps_protected_tokens_and_order() -> None:
    score = torch.tensor([[0.1, 0.9, 0.3, 0.8], [0.9, 0.1, 0.8, 0.3]])
    assert ops.best_tokens()(score, 1, [0]).tolist() == [[0, 1], [0, 2]]
    assert ops.best_tokens()(score, 9, []).tolist() == [[0, 1, 2, 3]] * 2
    assert torch.equal(score, torch.tensor([[0.1, 0.9, 0.3, 0.8], [0.9, 0.1, 0.8, 0.3]]))
