"""The zoo: small models of many architectures, built from configurations with fixed seeds, in eval mode.

`models()` gives builders by name; a builder returns the module, its arguments and its keyword arguments. Weights are
random: the zoo shows that answers stay right and calls stay fast, it says nothing about lossy passes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

Built = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]
Builder = Callable[[], Built]

# Models that torch.export cannot take as one graph, with the reason; torch.compile must still serve them.
BEYOND_CAPTURE = {
    "llama-cache-output": "returns a DynamicCache, which is no known tree of tensors",
    "branching": "a Python branch on the value of a tensor, and a print",
}

TEXT = {"vocab_size": 1000, "hidden_size": 192, "num_hidden_layers": 3, "num_attention_heads": 6}
ENCODER = {**TEXT, "intermediate_size": 768, "max_position_embeddings": 130}
DECODER = {**TEXT, "intermediate_size": 512, "max_position_embeddings": 256}
VISION = {"hidden_size": 192, "num_hidden_layers": 3, "num_attention_heads": 6, "intermediate_size": 768,
          "image_size": 96, "patch_size": 16}  # fmt: skip
TINY_VISION = {**VISION, "image_size": 64}
TINY_TEXT = {**TEXT, "num_hidden_layers": 2, "intermediate_size": 384, "max_position_embeddings": 32}


def models() -> dict[str, Builder]:
    """Every model of the zoo: builders by kebab-case name."""
    from zoo_nets import nets  # beside this file

    return {**encoders(), **decoders(), **pairs(), **images(), **several_modes(), **nets()}


def encoders() -> dict[str, Builder]:
    """Text encoders, with padding in the batch."""
    text = partial(tokens, padded=True)
    return {
        "bert": of("BertModel", "BertConfig", text, **ENCODER),
        "bert-eager-attention": of("BertModel", "BertConfig", text, attn_implementation="eager", **ENCODER),
        "roberta": of("RobertaModel", "RobertaConfig", text, **ENCODER),
        "distilbert": of("DistilBertModel", "DistilBertConfig", text, vocab_size=1000, dim=192, n_layers=3, n_heads=6,
                         hidden_dim=768),
        "electra": of("ElectraModel", "ElectraConfig", text, embedding_size=96, **ENCODER),
        "deberta-v2": of("DebertaV2Model", "DebertaV2Config", text, relative_attention=True,
                         pos_att_type=["c2p", "p2c"], position_buckets=32, **ENCODER),
        "albert": of("AlbertModel", "AlbertConfig", text, embedding_size=96, **ENCODER),
        "mpnet": of("MPNetModel", "MPNetConfig", text, **ENCODER),
    }  # fmt: skip


def decoders() -> dict[str, Builder]:
    """Causal language models: one forward over the whole sequence."""
    text = partial(tokens, use_cache=False)
    grouped = {**DECODER, "num_key_value_heads": 2}
    return {
        "gpt2": of("GPT2LMHeadModel", "GPT2Config", text, vocab_size=1000, n_embd=192, n_layer=3, n_head=6,
                   n_positions=128),
        "gpt2-eager-attention": of("GPT2Model", "GPT2Config", text, attn_implementation="eager", vocab_size=1000,
                                   n_embd=192, n_layer=3, n_head=6, n_positions=128),
        "gpt-neox": of("GPTNeoXForCausalLM", "GPTNeoXConfig", text, **DECODER),
        "gptj": of("GPTJForCausalLM", "GPTJConfig", text, vocab_size=1000, n_embd=192, n_layer=3, n_head=6,
                   n_positions=128, rotary_dim=16),
        "llama": of("LlamaForCausalLM", "LlamaConfig", text, **grouped),
        "llama-eager-attention": of("LlamaForCausalLM", "LlamaConfig", text, attn_implementation="eager", **grouped),
        "llama-cache-output": of("LlamaForCausalLM", "LlamaConfig", partial(tokens, use_cache=True), **grouped),
        "mistral": of("MistralForCausalLM", "MistralConfig", text, sliding_window=32, **grouped),
        "qwen2": of("Qwen2ForCausalLM", "Qwen2Config", text, **grouped),
        "phi": of("PhiForCausalLM", "PhiConfig", text, **DECODER),
        "gemma": of("GemmaForCausalLM", "GemmaConfig", text, head_dim=32, **grouped),
        "opt": of("OPTForCausalLM", "OPTConfig", text, ffn_dim=768, word_embed_proj_dim=192, **TEXT),
        "bloom": of("BloomForCausalLM", "BloomConfig", text, vocab_size=1000, hidden_size=192, n_layer=3, n_head=6),
        "falcon": of("FalconForCausalLM", "FalconConfig", text, **TEXT),
        "mixtral": of("MixtralForCausalLM", "MixtralConfig", text, num_local_experts=4, **grouped),
        "qwen2-moe": of("Qwen2MoeForCausalLM", "Qwen2MoeConfig", text, num_experts=4, num_experts_per_tok=2,
                        moe_intermediate_size=128, shared_expert_intermediate_size=256, **grouped),
        "mamba": of("MambaForCausalLM", "MambaConfig", partial(tokens, length=24, use_cache=False), vocab_size=1000,
                    hidden_size=128, num_hidden_layers=2, state_size=8),
    }  # fmt: skip


def pairs() -> dict[str, Builder]:
    """Encoder-decoder models."""
    bart = {"vocab_size": 1000, "d_model": 192, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 6,
            "decoder_attention_heads": 6, "encoder_ffn_dim": 768, "decoder_ffn_dim": 768}  # fmt: skip
    t5 = {"vocab_size": 1000, "d_model": 192, "d_kv": 32, "d_ff": 512, "num_layers": 2, "num_heads": 6}
    return {
        "t5": of("T5ForConditionalGeneration", "T5Config", two_texts, **t5),
        "t5-encoder": of("T5EncoderModel", "T5Config", tokens, **t5),
        "bart": of("BartForConditionalGeneration", "BartConfig", two_texts, **bart),
    }


def images() -> dict[str, Builder]:
    """Vision transformers and convolutional nets."""
    photo = partial(pixels, size=96)
    hierarchy = {"embed_dim": 48, "depths": [2, 2], "num_heads": [3, 6], "window_size": 4, "image_size": 64}
    return {
        "vit": of("ViTForImageClassification", "ViTConfig", photo, **VISION),
        "vit-eager-attention": of("ViTModel", "ViTConfig", photo, attn_implementation="eager", **VISION),
        "deit": of("DeiTModel", "DeiTConfig", photo, **VISION),
        "beit": of("BeitModel", "BeitConfig", photo, use_relative_position_bias=True, **VISION),
        "dinov2": of("Dinov2Model", "Dinov2Config", photo, **VISION),
        "swin": of("SwinModel", "SwinConfig", partial(pixels, size=64), **hierarchy),
        "convnext": of("ConvNextModel", "ConvNextConfig", photo, hidden_sizes=[32, 64, 96, 128], depths=[1, 1, 2, 1]),
        "resnet": of("ResNetForImageClassification", "ResNetConfig", photo, embedding_size=32,
                     hidden_sizes=[32, 64, 128], depths=[1, 1, 1]),
        "mobilenet-v2": of("MobileNetV2Model", "MobileNetV2Config", photo, depth_multiplier=0.35),
        "regnet": of("RegNetModel", "RegNetConfig", photo, embedding_size=16, hidden_sizes=[32, 64, 96, 128],
                     depths=[1, 1, 2, 1], groups_width=16),
    }  # fmt: skip


def several_modes() -> dict[str, Builder]:
    """Image with text, and sound."""
    towers = {"text_config": TINY_TEXT, "vision_config": TINY_VISION}
    wave = {"hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 192,
            "conv_dim": [64, 64], "conv_stride": [5, 4], "conv_kernel": [10, 8], "num_conv_pos_embeddings": 16,
            "num_conv_pos_embedding_groups": 4}  # fmt: skip
    whisper = {"d_model": 96, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 384,
               "decoder_layers": 1, "decoder_attention_heads": 4, "decoder_ffn_dim": 96, "max_source_positions": 150,
               "vocab_size": 1000, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
               "decoder_start_token_id": 1}  # fmt: skip
    return {
        "clip": of("CLIPModel", "CLIPConfig", captioned, projection_dim=64, **towers),
        "siglip": of("SiglipModel", "SiglipConfig", captioned, **towers),
        "whisper": of("WhisperModel", "WhisperConfig", spectrogram, **whisper),
        "wav2vec2": of("Wav2Vec2Model", "Wav2Vec2Config", waveform, **wave),
    }


def of(model: str, config: str, inputs: Callable[[], dict[str, Any]], **settings: Any) -> Builder:
    """A builder for a model class of transformers, named as text so that listing the zoo imports nothing."""

    def build() -> Built:
        import transformers

        torch.manual_seed(0)
        setting: Mapping[str, Any] = {"pad_token_id": 0, **settings} if "vocab_size" in settings else settings
        net = getattr(transformers, model)(getattr(transformers, config)(**setting)).eval()
        return net, (), inputs()

    return build


def tokens(length: int = 64, batch: int = 2, padded: bool = False, **flags: Any) -> dict[str, Any]:
    """Random token ids and a mask; with `padded` the last row is shorter."""
    mask = torch.ones(batch, length, dtype=torch.int64)
    if padded:
        mask[-1, length - length // 4 :] = 0
    return {"input_ids": torch.randint(3, 1000, (batch, length)), "attention_mask": mask, **flags}


def two_texts() -> dict[str, Any]:
    """Inputs of an encoder-decoder model."""
    return {**tokens(48), "decoder_input_ids": torch.randint(3, 1000, (2, 24)), "use_cache": False}


def pixels(size: int) -> dict[str, Any]:
    """A batch of two random images."""
    return {"pixel_values": torch.randn(2, 3, size, size)}


def captioned() -> dict[str, Any]:
    """Two images and three texts; the highest id marks the end of a text."""
    text = torch.randint(3, 999, (3, 16))
    text[:, -1] = 999
    return {"input_ids": text, **pixels(64)}


def waveform() -> dict[str, Any]:
    """Two clips of 2,000 samples."""
    return {"input_values": torch.randn(2, 2000)}


def spectrogram() -> dict[str, Any]:
    """Two log-mel spectrograms and the first ids of the transcript."""
    return {"input_features": torch.randn(2, 80, 300), "decoder_input_ids": torch.randint(3, 1000, (2, 8)),
            "use_cache": False}  # fmt: skip
