"""PruneAndRestore against the formula written out, and what it refuses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from encoders import DEPTH, PATCHES, Dense, Encoder, inputs, merge_one
from torch.nn import functional as F

from torchlathe import targets
from torchlathe.passes.base import Context, Refusal
from torchlathe.passes.capture import capture
from torchlathe.passes.lossy.prune_and_restore import PruneAndRestore
from torchlathe.passes.lossy.settings import operations
from torchlathe.passes.verify import well_formed

CONTEXT = Context(targets.get("cpu"))


def by_formula(model: Encoder, x: torch.Tensor, left: int, start: int, stop: int,
               mask: torch.Tensor | None = None) -> torch.Tensor:  # fmt: skip
    results = []
    for b in range(len(x)):
        y, own = model.begin(x[b : b + 1]), None if mask is None else mask[b]
        whole = valid = places = before = size = None
        for number, block in enumerate(model.blocks):
            if number == stop:
                y, valid, size = whole + (y - before)[:, places], own, None
            if number == start:
                whole, few, size, valid, places = y, y[0], torch.ones(y.shape[1]), own, list(range(y.shape[1]))
                while len(few) > left:
                    few, size, kept, now = merge_one(few, size, F.normalize(few, dim=-1), len(few) - left, model.extra,
                                                     valid)  # fmt: skip
                    valid, places = None if own is None else kept, [now[p] for p in places]
                y = before = few[None]
            bias = torch.zeros(1, 1, 1, y.shape[1]) if size is None else size.log()[None, None, None]
            if own is not None:
                bias = bias.masked_fill(~(own if number < start else valid), float("-inf"))
            y = block.feed(block.after_attention(y, bias)[0])
        results.append(model.finish(y, None, None if own is None else own[None]))
    return torch.cat(results)


@pytest.mark.parametrize("family", ["plain", "scaled", "qk-norm", "post-norm"])
@pytest.mark.parametrize(("keep", "start", "stop"), [(0.5, 1, 3), (0.3, 0, 2), (11, 1, 2)])
@torch.no_grad()
def test_equals_the_formula(family: str, keep: float, start: int, stop: int) -> None:
    model, args = Encoder(family).eval(), inputs(family, 3)
    program = capture(model, args)
    assert PruneAndRestore(keep=keep, start=start, stop=stop).run(program, CONTEXT) == stop - start
    well_formed(program)
    tokens = PATCHES + model.extra
    left = math.ceil(keep * tokens) if isinstance(keep, float) else keep
    wanted = by_formula(model, args[0], left, start, stop, *args[1:])
    torch.testing.assert_close(program(*args), wanted, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_result_for_each_token_stays_one() -> None:
    model, x = Dense("qk-norm").eval(), torch.randn(2, PATCHES // 2, 12).repeat_interleave(2, 1)
    model.place.zero_()
    program = capture(model, (x,))
    whole = operations(program)
    assert PruneAndRestore(keep=0.5).run(program, CONTEXT) == DEPTH // 2
    assert operations(program) < 0.8 * whole
    torch.testing.assert_close(program(x), model(x), atol=1e-5, rtol=1e-5)  # equal tokens: nothing is lost


@torch.no_grad()
def test_keeping_all_changes_nothing() -> None:
    model, args = Encoder("plain").eval(), inputs("plain", 2)
    program = capture(model, args)
    before = program.text()
    assert PruneAndRestore(keep=1.0).run(program, CONTEXT) == 0
    assert program.text() == before


@pytest.mark.parametrize(("knobs", "reason"), [
    ({"keep": 0}, "cannot be kept"), ({"keep": PATCHES + 9}, "cannot be kept"), ({"keep": 1.2}, "cannot be kept"),
    ({"start": 3, "stop": 2}, "attention layers"), ({"stop": DEPTH}, "attention layers"),
])  # fmt: skip
def test_impossible_knobs_are_refused(knobs: dict[str, Any], reason: str) -> None:
    outcome = PruneAndRestore(**knobs).run(capture(Encoder("plain").eval(), inputs("plain", 1)), CONTEXT)
    assert isinstance(outcome, Refusal) and reason in str(outcome)
