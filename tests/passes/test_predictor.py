"""PruneTokens with given predictors against DynamicViT's inference written as a module, sample by sample."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from encoders import DEPTH, WIDTH, Encoder, Text, inputs, texts
from torch import nn

from torchlathe import targets
from torchlathe.passes import PruneTokens
from torchlathe.passes.base import Context, Refusal
from torchlathe.passes.capture import capture
from torchlathe.passes.lossy.predictor import Predictor
from torchlathe.passes.lossy.settings import operations
from torchlathe.passes.verify import well_formed

CONTEXT = Context(targets.get("cpu"))


class Judge(nn.Module):
    """The published predictor: [tokens, features] -> logarithms of the probabilities of keep and drop."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        c = WIDTH
        self.inner = nn.Sequential(nn.LayerNorm(c), nn.Linear(c, c), nn.GELU())
        self.head = nn.Sequential(nn.Linear(c, c // 2), nn.GELU(), nn.Linear(c // 2, c // 4), nn.GELU(),
                                  nn.Linear(c // 4, 2), nn.LogSoftmax(-1))  # fmt: skip
        for p in self.parameters():
            nn.init.normal_(p, 0.1, 0.4)  # biases and norms count too

    def forward(self, x: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        y = self.inner(x)
        shared = y[real, WIDTH // 2 :].mean(0, keepdim=True)
        return self.head(torch.cat([y[:, : WIDTH // 2], shared.expand(len(y), -1)], -1))


def judges(count: int) -> list[Judge]:
    return [Judge(seed).eval() for seed in range(count)]


def predictors(found: list[Judge]) -> tuple[Predictor, ...]:
    return tuple(Predictor(tuple(j.parameters())) for j in found)


def by_formula(model: Encoder, x: torch.Tensor, keep: float, layers: tuple[int, ...], found: list[Judge],
               mask: torch.Tensor | None = None) -> torch.Tensor:  # fmt: skip
    results, extra = [], model.extra
    for b in range(len(x)):
        y, own = model.begin(x[b : b + 1]), None if mask is None else mask[b]
        first = y.shape[1] - extra
        for number, block in enumerate(model.blocks):
            if number in layers:
                turn = layers.index(number)
                free = y[0, extra:]
                real = torch.ones(len(free), dtype=torch.bool) if own is None else own
                worth = found[turn](free, real)[:, 0]
                worth = [float(w) if r else float("-inf") for w, r in zip(worth, real, strict=True)]
                left = int(first * keep ** (turn + 1))
                best = sorted(range(len(free)), key=lambda t: -worth[t])[:left]
                places = sorted([*range(extra), *(t + extra for t in best)])
                y, own = y[:, places], None if own is None else own[places]
            bias = torch.zeros(1, 1, 1, y.shape[1])
            if own is not None:
                bias = bias.masked_fill(~own, float("-inf"))
            y = block(y, bias)
        results.append(model.finish(y, None, None if own is None else own[None]))
    return torch.cat(results)


@pytest.mark.parametrize(("family", "batch", "keep", "layers"), [
    ("plain", 3, 0.7, (1, 2, 3)), ("scaled", 1, 0.5, (0, 2)), ("qk-norm", 3, 0.6, (1, 3)),
    ("post-norm", 3, 0.8, (1, 2)),
])  # fmt: skip
@torch.no_grad()
def test_equals_the_formula(family: str, batch: int, keep: float, layers: tuple[int, ...]) -> None:
    model, args, found = Encoder(family).eval(), inputs(family, batch), judges(len(layers))
    program = capture(model, args)
    whole = operations(program)
    rewrite = PruneTokens(keep=keep, layers=layers, score="predictor", predictors=predictors(found))
    assert rewrite.run(program, CONTEXT) == len(layers)
    well_formed(program)
    assert operations(program) < whole
    wanted = by_formula(model, args[0], keep, layers, found, *args[1:])
    torch.testing.assert_close(program(*args), wanted, atol=1e-5, rtol=1e-5)


class Twice(nn.Module):
    def forward(self, x: torch.Tensor, real: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return x * 2, real & real


@pytest.mark.parametrize(("first", "padded"), [(0, False), (3, False), (0, True), (3, True)])
@torch.no_grad()
def test_scores_are_those_of_the_module(first: int, padded: bool) -> None:
    """The mean leaves out the first tokens and padding; the last tokens of the second sample are padding."""
    x, real, (judge,) = torch.randn(2, 9, WIDTH) * 3, torch.ones(2, 9, dtype=torch.bool), judges(1)
    real[1, 5:] = not padded
    program = capture(Twice(), (x, real))
    (tokens, valid), end = program.outputs, program.graph.output_node()
    score = predictors([judge])[0].score(program, tokens, first, valid if padded else None, end)
    end.args = ((score, valid),)
    counted = real & (torch.arange(9) >= first)
    wanted = torch.stack([judge(2 * x[b], counted[b])[:, 0] for b in range(2)])
    torch.testing.assert_close(program.run([x, real])[0], wanted, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_as_many_are_left_as_published() -> None:
    """int(N rho), int(N rho^2), int(N rho^3) of the N tokens of the beginning; one at least."""
    for keep, wanted in ((0.7, [25, 17, 12]), (0.5, [18, 9, 4]), (0.1, [3, 1, 1])):
        program = capture(Encoder("plain").eval(), inputs("plain", 1))
        PruneTokens(keep=keep, score="predictor", predictors=predictors(judges(3))).run(program, CONTEXT)
        chosen = [n.meta["val"].shape[1] for n in program.graph.nodes if "best_tokens" in str(n.target)]
        assert chosen == [n + 1 for n in wanted]  # and the class token


@torch.no_grad()
def test_keeping_all_changes_nothing_and_weights_are_the_programs() -> None:
    program = capture(Encoder("plain").eval(), inputs("plain", 1))
    before, own = program.text(), set(program.weights)
    given = predictors(judges(3))
    assert PruneTokens(keep=1.0, score="predictor", predictors=given).run(program, CONTEXT) == 0
    assert program.text() == before and set(program.weights) == own
    assert PruneTokens(keep=0.5, score="predictor", predictors=given).run(program, CONTEXT) == 3
    new = [program.weights[n] for n in program.weights if n not in own]
    assert len(new) == 30 and all(any(torch.equal(w, v) for v in new) for p in given for w in p.weights)


def test_it_hashes_prints_and_compares() -> None:
    one, two = predictors(judges(1)), predictors(judges(1))
    a, b = (PruneTokens(score="predictor", predictors=p) for p in (one, two))
    assert a == PruneTokens(score="predictor", predictors=one) and a != b and len({a, b}) == 2
    assert "Predictor(48 features)" in repr(a) and "tensor" not in repr(a)


SHORT = Predictor(predictors(judges(1))[0].weights[:8])
NARROW = Predictor(tuple(p for p in nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 4), nn.Linear(4, 2),
                                                  nn.Linear(2, 2)).parameters()))  # fmt: skip


@pytest.mark.parametrize(("knobs", "reason"), [
    ({"predictors": ()}, "0 predictors"), ({"predictors": predictors(judges(2))}, "2 predictors"),
    ({"predictors": predictors(judges(3)), "score": "cls"}, "takes 0"), ({"predictors": (SHORT,) * 3}, "shapes"),
    ({"predictors": (NARROW,) * 3}, "48 features"), ({"keep": 9}, "share"), ({"fuse_rest": True}, "no weights"),
    ({"layers": (DEPTH,)}, "attention layers"),
])  # fmt: skip
def test_wrong_predictors_are_refused(knobs: dict[str, Any], reason: str) -> None:
    given: dict[str, Any] = {"score": "predictor", "predictors": predictors(judges(3)), **knobs}
    outcome = PruneTokens(**given).run(capture(Encoder("plain").eval(), inputs("plain", 1)), CONTEXT)
    assert isinstance(outcome, Refusal) and reason in str(outcome), outcome


def test_open_lengths_are_refused() -> None:
    tokens = torch.export.Dim("tokens", min=2, max=64)
    program = capture(Text().eval(), texts(20), dynamic_shapes=({1: tokens}, {1: tokens}))
    rewrite = PruneTokens(keep=0.5, layers=(1,), score="predictor", predictors=predictors(judges(1)))
    outcome = rewrite.run(program, CONTEXT)
    assert isinstance(outcome, Refusal) and "run time only" in str(outcome)
