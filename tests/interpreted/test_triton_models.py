"""Small models of five families and a mixture of experts, optimized for a GPU and run by Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import torchlathe

FREE = {"expand", "view", "_unsafe_view", "reshape", "unsqueeze", "squeeze", "permute", "transpose", "slice", "select"}
Model = tuple[torch.nn.Module, tuple[torch.Tensor, ...]]
TEXT = {"vocab_size": 90, "hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64,
        "max_position_embeddings": 32}  # fmt: skip


class First(torch.nn.Module):
    def __init__(self, inner: torch.nn.Module, **options: Any) -> None:
        super().__init__()
        self.inner, self.options = inner, options

    def forward(self, *args: torch.Tensor) -> torch.Tensor:
        found = self.inner(*args, **self.options)
        return found[0]


def of(name: str, config: str, **settings: Any) -> torch.nn.Module:
    import transformers

    torch.manual_seed(0)
    return getattr(transformers, name)(getattr(transformers, config)(**settings)).eval()


def texts() -> tuple[torch.Tensor, ...]:
    return (torch.randint(0, 90, (2, 11)),)


def vit() -> Model:
    settings = {k: v for k, v in TEXT.items() if k not in ("vocab_size", "max_position_embeddings")}
    inner = of("ViTForImageClassification", "ViTConfig", image_size=32, patch_size=8, num_labels=7, **settings)
    return First(inner), (torch.randn(2, 3, 32, 32),)


def bert() -> Model:
    return First(of("BertModel", "BertConfig", **TEXT)), texts()


def gpt2() -> Model:
    inner = of("GPT2LMHeadModel", "GPT2Config", vocab_size=90, n_embd=48, n_layer=1, n_head=4, n_positions=32)
    return First(inner, use_cache=False), texts()


def llama() -> Model:
    inner = of("LlamaForCausalLM", "LlamaConfig", num_key_value_heads=2, **TEXT)
    return First(inner, use_cache=False), texts()


def resnet() -> Model:
    settings = {"embedding_size": 8, "hidden_sizes": [16, 24], "depths": [1, 1], "num_labels": 7}
    return First(of("ResNetForImageClassification", "ResNetConfig", **settings)), (torch.randn(2, 3, 32, 32),)


def mixtral() -> Model:
    inner = of("MixtralForCausalLM", "MixtralConfig", num_key_value_heads=2, num_local_experts=4, **TEXT)
    inner.set_experts_implementation("grouped_mm")
    return First(inner.bfloat16(), use_cache=False), texts()


@pytest.mark.parametrize("build", [vit, bert, gpt2, llama, resnet])
def test_end_to_end(build: Callable[[], Model]) -> None:
    model, args = build()
    fast = torchlathe.optimize(model, args, target="nvidia-sm90", aot=True)
    with torch.no_grad():
        torch.testing.assert_close(fast(*args), model(*args), rtol=1e-4, atol=1e-4)
        other = tuple(a.flip(0) for a in args)
        torch.testing.assert_close(fast(*other), model(*other), rtol=1e-4, atol=1e-4)
    kernels = fast.report.kernels
    assert any(k.backend == "triton" for k in kernels)
    for kernel in kernels:
        assert kernel.backend == "triton" or set(kernel.region) <= FREE, f"{kernel.name} is left to {kernel.backend}"


def test_queries_and_keys_are_rotated_by_the_product_of_a_llama() -> None:
    model, args = llama()
    fast = torchlathe.optimize(model, args, target="nvidia-sm90", aot=True)
    (kernel,) = (k for k in fast.report.kernels if {"linear", "cat", "neg"} <= set(k.region))
    assert kernel.backend == "triton" and list(kernel.region).count("cat") == 2


def test_a_mixture_of_experts() -> None:
    model, args = mixtral()
    fast = torchlathe.optimize(model, args, target="nvidia-sm90", aot=True)
    grouped = [k for k in fast.report.kernels if "_grouped_mm" in k.region]
    assert len(grouped) == 2 and all(k.backend == "triton" for k in grouped)
    assert "silu" in grouped[0].region and "mul" in grouped[1].region
    with torch.no_grad():
        ours, eager = fast(*args).float(), model(*args).float()
    assert (ours - eager).abs().max() < 0.02 * eager.abs().max()


class Reshaped(torch.nn.Module):
    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        return y.reshape(8, 6, 16).sinh()  # eager writes heads outside of queries, the kernel inside


def test_views_of_results_that_lie_otherwise() -> None:
    args = tuple(torch.randn(2, 4, 6, 16) for _ in range(3))
    fast = torchlathe.optimize(Reshaped().eval(), args, target="nvidia-sm90", aot=True)
    torch.testing.assert_close(fast(*args), Reshaped()(*args), rtol=1e-4, atol=1e-4)
