"""SelectPrompt against its formula with the eager model, on decoders of several kinds; what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as T
from decoders import DEPTH, GROUPS, HEADS, WORDS, Causal, Decoder
from torch import nn

from torchlathe import targets
from torchlathe.passes import FuseAttention, SelectPrompt
from torchlathe.passes.base import Context, Refusal
from torchlathe.passes.capture import capture
from torchlathe.passes.lossy.settings import operations
from torchlathe.passes.program import Program
from torchlathe.passes.verify import well_formed

CONTEXT = Context(targets.get("cpu"))
LENGTH = 24


def prompts(batch: int, length: int = LENGTH) -> torch.Tensor:
    torch.manual_seed(batch + length)
    return torch.randint(3, WORDS, (batch, length))


def selected(model: nn.Module, args: tuple[torch.Tensor, ...], **knobs: Any) -> Program:
    program = capture(model.eval(), args)
    assert SelectPrompt(**knobs).run(program, CONTEXT) == 1
    well_formed(program)
    return program


def best(query: torch.Tensor, keys: torch.Tensor, keep: int, pool: int) -> list[int]:
    """Places for the last query [heads, size] and the keys [heads, tokens, size] of one sample, number by number."""
    raw = [sum(float(q @ k[t]) for q, k in zip(query, keys, strict=True)) for t in range(keys.shape[1])]
    around = [raw[max(0, t - pool // 2) : t + pool // 2 + 1] for t in range(len(raw))]
    order = sorted(range(len(raw) - 1), key=lambda t: -sum(around[t]) / pool)
    return sorted([*order[: keep - 1], len(raw) - 1])


def kept_ids(model: Decoder, ids: torch.Tensor, layer: int, keep: int, pool: int) -> torch.Tensor:
    rows = []
    for sample in ids:
        x = model.begin(sample[None])
        for block in model.layers[:layer]:
            x = block(x)
        q, k, _ = model.layers[layer].heads(x)
        rows.append(sample[best(q[0, :, -1], k[0].repeat_interleave(HEADS // GROUPS, 0), keep, pool)])
    return torch.stack(rows)


@pytest.mark.parametrize(("mask", "places", "layer", "keep", "pool", "batch"), [
    ("flag", "rotary", 0, 8, 5, 3), ("bool", "rotary", 1, 12, 1, 1), ("bias", "table", 3, 5, 7, 3),
    ("bool", "rows", 2, 1, 5, 3),
])  # fmt: skip
@torch.no_grad()
def test_equals_the_formula(mask: str, places: str, layer: int, keep: int, pool: int, batch: int) -> None:
    model, ids = Decoder(mask, places).eval(), prompts(batch)
    program = selected(model, (ids,), layer=layer, keep=keep, pool=pool)
    wanted = model(kept_ids(model, ids, layer, keep, pool))
    torch.testing.assert_close(program(ids), wanted, atol=1e-5, rtol=1e-5)
    other = prompts(batch, 2 * LENGTH)[:, LENGTH:]
    wanted = model(kept_ids(model, other, layer, keep, pool))
    torch.testing.assert_close(program(other), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("result", ["kept", "each", "flat", "tuple"])
@pytest.mark.parametrize("outputs", ["whole", "last", "short"])
@torch.no_grad()
def test_results_of_each_token(result: str, outputs: str) -> None:
    model, ids = Decoder(result=result).eval(), prompts(3)
    program = capture(model, (ids,))
    outcome = SelectPrompt(layer=1, keep=8, outputs=outputs).run(program, CONTEXT)
    if result != "kept" and (outputs == "whole" or (result, outputs) == ("flat", "last")):
        reason = "flattened" if outputs == "last" else "an element for each token"
        assert isinstance(outcome, Refusal) and reason in str(outcome)
        return
    assert outcome == 1
    well_formed(program)
    wanted, found = model(kept_ids(model, ids, 1, 8, 5)), program(ids)
    if result == "tuple":
        assert found[1].shape == (3, 1 if outputs == "last" else 8, 32)
        torch.testing.assert_close(found[0], wanted[0], atol=1e-5, rtol=1e-5)
        wanted, found = wanted[1], found[1]
    wanted = wanted[:, -1:] if outputs == "last" else wanted
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("mask", "places", "keep"), [
    ("flag", "rotary", 8), ("bool", "rotary", 0.5), ("flag", "rows", 0.5),
])  # fmt: skip
@torch.no_grad()
def test_lengths_known_at_run_time_only(mask: str, places: str, keep: float) -> None:
    model, ids = Decoder(mask, places).eval(), prompts(2)
    length = torch.export.Dim("length", min=2, max=64)
    program = capture(model, (ids,), dynamic_shapes=({1: length},))
    assert SelectPrompt(layer=1, keep=keep).run(program, CONTEXT) == 1
    well_formed(program)
    for tokens in (4, 7, 8, 9, 24, 41):
        ids = prompts(2, tokens)
        left = 1 + -(-(tokens - 1) // 2) if isinstance(keep, float) else min(keep, tokens)
        wanted = model(kept_ids(model, ids, 1, left, 5))
        torch.testing.assert_close(program(ids), wanted, atol=1e-5, rtol=1e-5)
        if tokens == left:
            assert torch.equal(program(ids), model(ids))


@pytest.mark.parametrize("dynamic", [False, True])
@torch.no_grad()
def test_a_part_without_the_last_token_has_new_places_too(dynamic: bool) -> None:
    model, ids = Decoder(result="rest").eval(), prompts(2)
    length = torch.export.Dim("length", min=4, max=64)
    program = capture(model, (ids,), dynamic_shapes=({1: length},) if dynamic else None)
    assert SelectPrompt(layer=1, keep=0.5).run(program, CONTEXT) == 1
    well_formed(program)
    for tokens in (9, 24, 40) if dynamic else (LENGTH,):
        ids = prompts(2, tokens)
        wanted = model(kept_ids(model, ids, 1, 1 + -(-(tokens - 1) // 2), 5))
        torch.testing.assert_close(program(ids), wanted, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_hand_written_decoder() -> None:
    inner = Causal(True).eval()
    model = Prompted(inner).eval()
    ids = prompts(2, 20)
    program = selected(model, (ids,), layer=2, keep=6, pool=3)
    rows = []
    for sample in ids:
        x, places = inner.inner.embed(model.words(sample[None])), torch.arange(20)[None]
        for block in inner.inner.blocks[:2]:
            x = block.feed(inner.layer(block, x, places)[0])
        _, (q, k) = inner.layer(inner.inner.blocks[2], x, places)
        rows.append(sample[best(q[0, :, -1], k[0], 6, 3)])
    torch.testing.assert_close(program(ids), model(torch.stack(rows)), atol=1e-5, rtol=1e-5)


class Prompted(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.words, self.inner = nn.Embedding(WORDS, 12), inner

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.inner(self.words(ids))


SIZES = {"vocab_size": WORDS, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}  # fmt: skip


def llama(attention: str = "sdpa") -> Any:
    torch.manual_seed(0)
    return T.LlamaForCausalLM(T.LlamaConfig(**SIZES, attn_implementation=attention)).eval()


@pytest.mark.parametrize(("attention", "batch"), [("sdpa", 1), ("sdpa", 3), ("eager", 3)])
@torch.no_grad()
def test_a_llama(attention: str, batch: int) -> None:
    """Its last logits are those of the eager model on the chosen ids, which hooks on its projections find."""
    model, ids = llama(attention), prompts(batch)
    program = capture(model, (), {"input_ids": ids, "use_cache": False, "logits_to_keep": 1})
    FuseAttention().run(program, CONTEXT)
    assert SelectPrompt(layer=1, keep=8).run(program, CONTEXT) == 1
    well_formed(program)
    seen: dict[str, torch.Tensor] = {}
    layer = model.model.layers[1].self_attn
    for name in ("q_proj", "k_proj"):
        getattr(layer, name).register_forward_hook(lambda _, __, y, name=name: seen.update({name: y}))
    model(input_ids=ids, use_cache=False)
    q, k = (y.unflatten(-1, (-1, 12)).transpose(1, 2) for y in (seen["q_proj"], seen["k_proj"]))
    cos, sin = model.model.rotary_emb(q, torch.arange(LENGTH)[None])
    q, k = T.models.llama.modeling_llama.apply_rotary_pos_emb(q, k, cos, sin)
    k = k.repeat_interleave(2, 1)
    short = torch.stack([row[best(q[b, :, -1], k[b], 8, 5)] for b, row in enumerate(ids)])
    wanted = model(input_ids=short, use_cache=False).logits[:, -1:]
    found = program(input_ids=ids, use_cache=False, logits_to_keep=1).logits
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_keeping_all_changes_nothing() -> None:
    program = capture(Decoder().eval(), (prompts(2),))
    before = program.text()
    for keep in (LENGTH, LENGTH + 5, 1.0):
        assert SelectPrompt(layer=1, keep=keep).run(program, CONTEXT) == 0
        assert program.text() == before


@torch.no_grad()
def test_work_falls_and_nothing_dead_is_left() -> None:
    program = capture(Decoder(result="each").eval(), (prompts(1, 48),))
    whole = operations(program)
    assert SelectPrompt(layer=1, keep=12, outputs="last").run(program, CONTEXT) == 1
    assert operations(program) < 0.6 * whole  # a quarter in all layers, and one layer and a bit on the whole prompt
    assert all(n.users for n in program.graph.nodes if n.op == "call_function")


def test_settings_go_from_little_to_much() -> None:
    program = capture(Decoder().eval(), (prompts(1),))
    assert [s.keep for s in SelectPrompt().space(program, CONTEXT)] == [k / 10 for k in range(9, 0, -1)]
    assert list(SelectPrompt(keep=3).space(program, CONTEXT)) == [SelectPrompt(keep=3)]


@pytest.mark.parametrize(("knobs", "reason"), [
    ({"layer": DEPTH}, "attention layers"), ({"layer": -1}, "attention layers"), ({"keep": 0}, "cannot be kept"),
    ({"keep": -2}, "cannot be kept"), ({"keep": 0.0}, "cannot be kept"), ({"keep": 1.5}, "cannot be kept"),
    ({"pool": 4}, "odd"), ({"pool": 0}, "odd"), ({"outputs": "all"}, "there are whole"),
])  # fmt: skip
def test_impossible_knobs_are_refused(knobs: dict[str, Any], reason: str) -> None:
    program = capture(Decoder().eval(), (prompts(1),))
    outcome = SelectPrompt(**knobs).run(program, CONTEXT)
    assert isinstance(outcome, Refusal) and reason in str(outcome)


class Positioned(Decoder):
    def forward(self, ids: torch.Tensor, positions: torch.Tensor) -> Any:
        x = self.begin(ids) + self.rows(positions)
        for layer in self.layers:
            x = layer(x)
        return self.finish(x)


class Counted(Decoder):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, ids: torch.Tensor) -> Any:  # type: ignore[override]
        self.calls.add_(1)
        return super().forward(ids)


class Turned(Decoder):
    def finish(self, x: torch.Tensor) -> Any:
        return super().finish(x.flip(1))


@pytest.mark.parametrize(("model", "args", "reason"), [
    (Decoder("none"), (), "not causal"), (Decoder("ahead"), (), "not causal"),
    (Decoder("bool"), (torch.ones(2, LENGTH, dtype=torch.bool),), "padding"),
    (Positioned(), (torch.arange(LENGTH).expand(2, -1),), "besides the token ids"),
    (Counted(), (), "state"), (Turned(), (), "flip"),
], ids=["none", "ahead", "padding", "positions", "state", "turned"])  # fmt: skip
def test_programs_that_are_refused(model: nn.Module, args: tuple[torch.Tensor, ...], reason: str) -> None:
    outcome = SelectPrompt(layer=1, keep=8).run(capture(model.eval(), (prompts(2), *args)), CONTEXT)
    assert isinstance(outcome, Refusal) and reason in str(outcome), outcome


def test_features_are_no_token_ids() -> None:
    program = capture(Causal(True).eval(), (torch.randn(2, 20, 12),))
    outcome = SelectPrompt(layer=1, keep=8).run(program, CONTEXT)
    assert isinstance(outcome, Refusal) and "no input holds token ids" in str(outcome)


def test_padding_of_a_llama_is_refused() -> None:
    kwargs = {"input_ids": prompts(2), "attention_mask": torch.ones(2, LENGTH, dtype=torch.int64), "use_cache": False}
    outcome = SelectPrompt(layer=1, keep=8, outputs="last").run(capture(llama(), (), kwargs), CONTEXT)
    assert isinstance(outcome, Refusal) and "padding" in str(outcome)
