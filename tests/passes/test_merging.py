"""The edits that merging passes share: around one branch, and what counts sizes afterwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from encoders import DEPTH, PATCHES, Dense, Encoder, inputs, merge_one, merged_by_formula
from torch.nn import functional as F

from torchlathe import targets
from torchlathe.passes.base import Context, Refusal
from torchlathe.passes.capture import capture
from torchlathe.passes.lossy.merge_tokens import MergeTokens
from torchlathe.passes.program import Program
from torchlathe.passes.verify import well_formed

CONTEXT = Context(targets.get("cpu"))


def merged(model: torch.nn.Module, args: tuple[torch.Tensor, ...], **knobs: Any) -> Program:
    program = capture(model.eval(), args)
    outcome = MergeTokens(**knobs).run(program, CONTEXT)
    assert not isinstance(outcome, Refusal), outcome
    well_formed(program)
    return program


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
    wanted = merged_by_formula(model, args[0], [6] * DEPTH, *args[1:])
    program = merged(model, args, r=6)
    torch.testing.assert_close(program(*args), wanted, atol=1e-5, rtol=1e-5)
    assert all(n.users for n in program.graph.nodes if n.op == "call_function")  # nothing is left that nobody reads
