"""The same token passes on models of many families, without a line for any of them; refusals by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as T
from torch.utils import _pytree as pytree

from torchlathe import targets
from torchlathe.passes import FuseAttention, MergeTokens, PruneTokens
from torchlathe.passes.base import Context, Pass, Refusal
from torchlathe.passes.capture import capture
from torchlathe.passes.program import Program
from torchlathe.passes.verify import well_formed

CONTEXT = Context(targets.get("cpu"))
SIZES = {"hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 192}
IMAGE = {**SIZES, "image_size": 64, "patch_size": 16}
VIDEO = {**SIZES, "image_size": 32, "num_frames": 4}
TEXT = {**SIZES, "vocab_size": 100, "max_position_embeddings": 64, "pad_token_id": 0}


def image() -> dict[str, Any]:
    return {"pixel_values": torch.randn(2, 3, 64, 64)}


def video() -> dict[str, Any]:
    return {"pixel_values": torch.randn(2, 4, 3, 32, 32)}


def text() -> dict[str, Any]:
    mask = torch.ones(2, 24, dtype=torch.int64)
    mask[1, 15:] = 0
    return {"input_ids": torch.randint(3, 100, (2, 24)), "attention_mask": mask}


# model, configuration, settings, inputs, tokens (None: no result has them), whether there is a class token
FAMILIES: dict[str, tuple[str, str, dict[str, Any], Callable[[], dict[str, Any]], int | None, bool]] = {
    "vit": ("ViTModel", "ViTConfig", IMAGE, image, 17, True),
    "deit": ("DeiTForImageClassificationWithTeacher", "DeiTConfig", IMAGE, image, None, True),
    "dinov2": ("Dinov2Model", "Dinov2Config", IMAGE, image, 17, True),
    "dinov2-registers": ("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", IMAGE, image, 21, True),
    "clip": ("CLIPVisionModel", "CLIPVisionConfig", IMAGE, image, 17, True),
    "siglip": ("SiglipVisionModel", "SiglipVisionConfig", IMAGE, image, 16, False),
    "vivit": ("VivitModel", "VivitConfig", {**VIDEO, "tubelet_size": [2, 16, 16]}, video, 9, True),
    "videomae": ("VideoMAEModel", "VideoMAEConfig", VIDEO, video, 8, False),
    "bert": ("BertModel", "BertConfig", TEXT, text, 24, True),
    "distilbert": ("DistilBertModel", "DistilBertConfig", {"vocab_size": 100, "dim": 96, "n_layers": 3, "n_heads": 3,
                   "hidden_dim": 192}, text, 24, False),
}  # fmt: skip


def program_of(name: str) -> tuple[Program, list[Any], torch.nn.Module, dict[str, Any]]:
    model, config, settings, make, *_ = FAMILIES[name]
    torch.manual_seed(0)
    net, kwargs = getattr(T, model)(getattr(T, config)(**settings)).eval(), make()
    program = capture(net, (), kwargs)
    FuseAttention().run(program, CONTEXT)
    return program, pytree.tree_leaves(((), kwargs)), net, kwargs


def changed(name: str, rewrite: Pass) -> tuple[list[Any], list[Any]]:
    """Results before and after a pass that must fire in all three layers."""
    program, flat, *_ = program_of(name)
    with torch.no_grad():
        before = program.run(flat)
        assert rewrite.run(program, CONTEXT) == 3
        well_formed(program)
        return before, program.run(flat)


@pytest.mark.parametrize("name", FAMILIES)
def test_merging_fires_everywhere(name: str) -> None:
    before, after = changed(name, MergeTokens(r=1))
    tokens = FAMILIES[name][4]
    for a, b in zip(before, after, strict=True):
        assert b.isfinite().all() and a.dim() == b.dim()
    if tokens is not None:
        assert before[0].shape[1] == tokens and after[0].shape[1] == tokens - 3


@pytest.mark.parametrize("name", FAMILIES)
def test_keeping_every_token_by_its_index_changes_no_bit(name: str) -> None:
    """All tensors that carry tokens are taken at their places: whatever is left behind or taken wrongly would show."""
    tokens, protected = FAMILIES[name][4] or 18, {"deit": 2, "dinov2-registers": 5}.get(name, int(FAMILIES[name][5]))
    before, after = changed(name, PruneTokens(keep=tokens - protected, layers=(0, 1, 2), score="received"))
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_pruning_by_the_class_token(name: str) -> None:
    program, _, *_ = program_of(name)
    outcome = PruneTokens(keep=0.5, score="cls").run(program, CONTEXT)
    if FAMILIES[name][5]:
        assert not isinstance(outcome, Refusal), outcome
        well_formed(program)
    else:
        assert isinstance(outcome, Refusal) and "no class token" in str(outcome)


@pytest.mark.parametrize(("model", "config", "settings", "inputs", "reason"), [
    ("SwinModel", "SwinConfig", {"embed_dim": 24, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4,
     "image_size": 64}, image, "not over the tokens"),
    ("ConvNextModel", "ConvNextConfig", {"hidden_sizes": [16] * 4, "depths": [1] * 4}, image, "no attention"),
    ("BeitModel", "BeitConfig", {**IMAGE, "use_relative_position_bias": True}, image, "query to query"),
    ("GPT2Model", "GPT2Config", {"vocab_size": 100, "n_embd": 48, "n_layer": 2, "n_head": 3}, text, "query to query"),
], ids=["swin", "convnext", "beit", "gpt2"])  # fmt: skip
def test_models_whose_tokens_have_places_are_refused(
    model: str, config: str, settings: dict[str, Any], inputs: Callable[[], dict[str, Any]], reason: str
) -> None:
    flags = {"use_cache": False} if model == "GPT2Model" else {}
    program = capture(getattr(T, model)(getattr(T, config)(**settings)).eval(), (), {**inputs(), **flags})
    FuseAttention().run(program, CONTEXT)
    outcome = MergeTokens(r=1).run(program, CONTEXT)
    assert isinstance(outcome, Refusal) and reason in str(outcome), outcome
