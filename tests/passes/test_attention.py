"""Attention is found in other people's code: transformers models and Inductor's list of spellings."""

import inspect

import pytest
import torch
from torch import nn

from torchlathe.passes.base import Refusal
from torchlathe.passes.capture import capture
from torchlathe.passes.exact.fuse_attention import FuseAttention
from torchlathe.passes.values import Values


class Call(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)


def operators(program):
    return [n for n in program.graph.nodes if "scaled_dot_product" in str(n.target)]


def check_fires(ask, model, args, sites, **options):
    before, after, found = ask(FuseAttention(), model, args, **options)
    assert found == sites, str(found)
    assert sum("softmax" in str(n.target) for n in before.graph.nodes) == sites and not operators(before)
    assert not any("softmax" in str(n.target) for n in after.graph.nodes) and len(operators(after)) == sites
    return after


def models():
    import transformers as t

    ids = torch.randint(0, 99, (2, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, 4:] = 0
    tokens = {"input_ids": ids, "attention_mask": mask}
    image = {"pixel_values": torch.randn(2, 3, 32, 32)}
    bert = {
        "vocab_size": 99,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
    }
    vit = {k: v for k, v in bert.items() if k != "vocab_size"} | {"image_size": 32, "patch_size": 8}
    small = {"attn_implementation": "eager"}
    cache = {"use_cache": False, "bos_token_id": 0, "eos_token_id": 0}
    t5 = {"vocab_size": 99, "d_model": 64, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    swin = {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
    return {
        "bert": (lambda: t.BertModel(t.BertConfig(**bert, **small)), tokens, 2),
        "vit": (lambda: t.ViTModel(t.ViTConfig(**vit, **small)), image, 2),
        "gpt2": (
            lambda: t.GPT2Model(t.GPT2Config(vocab_size=99, n_embd=64, n_layer=2, n_head=4, **cache, **small)),
            tokens,
            2,
        ),
        "llama": (
            lambda: t.LlamaModel(t.LlamaConfig(**bert, num_key_value_heads=2, **cache, **small)),
            tokens,
            2,
        ),
        "llama without mask": (
            lambda: t.LlamaModel(t.LlamaConfig(**bert, num_key_value_heads=2, **cache, **small)),
            {"input_ids": ids.repeat(1, 20 // ids.shape[1] + 1)},
            2,
        ),
        "t5": (
            lambda: t.T5Model(t.T5Config(**t5, **small, use_cache=False)),
            tokens | {"decoder_input_ids": ids},
            6,
        ),
        "clip": (lambda: t.CLIPTextModel(t.CLIPTextConfig(**bert, **small, eos_token_id=0, bos_token_id=0)), tokens, 2),
        "swin": (lambda: t.SwinModel(t.SwinConfig(**swin, **small)), image, 4),
    }


@pytest.mark.parametrize("name", ["bert", "vit", "gpt2", "llama", "llama without mask", "t5", "clip", "swin"])
def test_transformers_models(ask, name):
    pytest.importorskip("transformers")
    build, inputs, sites = models()[name]
    torch.manual_seed(0)
    after = check_fires(ask, build(), (), sites=sites, kwargs=inputs)
    if name.startswith("llama"):
        assert operators(after)[0].kwargs["enable_gqa"]
    if name == "llama without mask":
        assert operators(after)[0].args[5] is True
    if name == "vit":
        assert operators(after)[0].args[3] is None


def test_torch_multihead_attention(ask):
    class Weighted(nn.Module):
        def __init__(self, **options):
            super().__init__()
            self.inner, self.options = nn.MultiheadAttention(8, 2, batch_first=True), options

        def forward(self, x):
            return self.inner(x, x, x, **self.options)[0]

    x = torch.randn(2, 6, 8)
    check_fires(ask, Weighted(), (x,), sites=1)
    padding = torch.zeros(2, 6, dtype=torch.bool)
    padding[0, 4:] = True
    check_fires(
        ask, Weighted(key_padding_mask=padding, attn_mask=torch.ones(6, 6, dtype=torch.bool).triu(1)), (x,), sites=1
    )
    _, _, found = ask(FuseAttention(), Weighted(need_weights=False), (x,))
    assert isinstance(found, Refusal) and "already one operator" in found.reason


def test_float32_is_as_close_to_float64_as_eager(ask):
    """Against the closed form in float64, the operator's error is at most twice that of eager."""
    q, k, v = (torch.randn(2, 4, 64, 16) for _ in range(3))

    def attention(q, k, v):
        return (q @ k.mT / 4).softmax(-1) @ v

    after = check_fires(ask, Call(attention), (q, k, v), sites=1)
    exact = attention(q.double(), k.double(), v.double())
    mine, eager = ((x.double() - exact).abs().max() for x in (after(q, k, v), attention(q, k, v)))
    assert mine <= 2 * eager


def test_sizes_may_vary(ask):
    def flat(q, k, v, keep):
        b, h, s, d = q.shape
        scores = torch.bmm(q.reshape(b * h, s, d), k.reshape(b * h, s, d).mT).view(b, h, s, s) * 0.5
        scores = scores.masked_fill(~keep[:, None, None, :], -float("inf"))
        out = torch.bmm(scores.softmax(-1).view(b * h, s, s), v.reshape(b * h, s, d))
        return out.view(b, h, s, d).transpose(1, 2).reshape(b, s, h * d)

    def some(batch, length):
        return [torch.randn(batch, 3, length, 4).double() for _ in range(3)]

    b, s = torch.export.Dim("b", min=2, max=64), torch.export.Dim("s", min=2, max=64)
    shapes = ({0: b, 2: s}, {0: b, 2: s}, {0: b, 2: s}, {0: b, 1: s})
    keep = torch.ones(2, 5, dtype=torch.bool)
    keep[0, 3:] = False
    after = check_fires(ask, Call(flat), (*some(2, 5), keep), sites=1, dynamic_shapes=(shapes,))
    other = (*some(3, 9), torch.rand(3, 9) > 0.3)
    torch.testing.assert_close(after(*other), flat(*other))


def inductor_patterns():
    """Inductor's own list of attention spellings: independent of this package."""
    from torch._inductor.fx_passes import fuse_attention

    return {
        int(name.rsplit("_", 1)[1]): function
        for name, function in vars(fuse_attention).items()
        if name.startswith("_sfdp_pattern_")
    }


PLAIN = {1, 2, 3, 4, 5, 6, 19, 24, 28}  # these take [batch, heads, length, features], the others swap the middle two


def pattern_call(number, function, dropout):
    """The pattern with its inputs bound, numbers in place of the scale, and dropout of the given rate."""
    generator = torch.Generator().manual_seed(number)
    sizes = (6, 8, 16) if number == 13 else (2, 4, 8, 16) if number in PLAIN else (2, 8, 4, 16)
    tensors, numbers = [], {}
    for name in inspect.signature(function).parameters:
        if name in ("query", "key", "value"):
            tensors.append(torch.randn(sizes, generator=generator))
        elif name == "causal_mask":
            tensors.append(torch.ones(1, 1, 8, 8, dtype=torch.bool).tril())
        elif name.endswith("mask"):
            tensors.append(torch.rand((2, 8) if number in (15, 17, 20) else (2, 1, 8, 8), generator=generator).round())
        else:
            numbers[name] = dropout if name == "dropout_p" else 0.66666
    return tensors, lambda *args: function(*args, **numbers)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_inductor_patterns(ask, dropout):
    """All are found; those with dropout at work are refused."""
    calls = [
        pattern_call(number, function, dropout)
        for number, function in inductor_patterns().items()
        if dropout == 0 or "dropout_p" in inspect.signature(function).parameters
    ]
    assert len(calls) >= 14
    inputs = [tensors for tensors, _ in calls]

    def together(inputs):
        return [function(*args) for args, (_, function) in zip(inputs, calls, strict=True)]

    if dropout == 0:
        check_fires(ask, Call(together), (inputs,), sites=len(calls))
    else:
        found = FuseAttention().run(capture(Call(together).eval(), (inputs,)), None)
        assert isinstance(found, Refusal) and "dropout is active" in found.reason


def test_constants_and_spans_hold_what_the_program_computes():
    """Every node's value on random inputs lies in the spans that were found for it, and constants are exact."""

    def masks(keep, bias, scores):
        causal = torch.ones(6, 6, dtype=torch.bool).tril()
        finite = torch.zeros([]).where(keep[:, None, :] & causal, torch.finfo(torch.float32).min)
        table = self.weight[(torch.arange(6)[:, None] - torch.arange(6)).clamp(min=0)]
        return (
            finite + table,
            (1.0 - keep.float()) * -1e4,
            bias + 1,
            finite.to(torch.bfloat16),
            (scores @ scores.mT) / 4,
        )

    self = Call(masks)
    self.register_parameter("weight", nn.Parameter(torch.linspace(-2, 3, 6), requires_grad=False))
    args = (torch.rand(2, 6) > 0.4, torch.randn(6), torch.randn(6, 6))
    program = capture(self, args)
    values, known, bounded = Values(program), 0, 0

    def watch(node, value):
        nonlocal known, bounded
        constant, spans = values.constant(node), values.spans(node)
        if constant is not None:
            known += 1
            assert torch.equal(constant, value)
        if spans is not None:
            bounded += 1
            inside = torch.zeros(value.shape, dtype=torch.bool)
            for low, high in spans:
                inside |= (value.double() >= low) & (value.double() <= high)
            assert inside.all(), f"{node} leaves {spans}"

    program.run(list(args), watch)
    assert known >= 5 and bounded >= 12
    results = [values.spans(node) for node in program.outputs]
    lowest = float(torch.finfo(torch.float32).min)
    assert results[0] == [(lowest, lowest), (-2.0, 3.0)] and results[1] == [(-1e4, -1e4), (0.0, 0.0)]
    assert results[2] is None and results[3][0][0] == -float("inf")


def test_a_size_that_varies_does_not_hide_a_constant():
    """A causal mask that is only expanded over the batch is as good as constant."""

    def causal(x):
        hidden = torch.ones(4, 4, dtype=torch.bool).triu(1)[None].expand(x.shape[0], 4, 4)
        return x.masked_fill(hidden, 0.0), torch.cat([hidden, hidden])

    program = capture(Call(causal), (torch.randn(3, 4, 4),), dynamic_shapes=(({0: torch.export.Dim("b")},),))
    values = Values(program)
    expanded = next(n for n in program.graph.nodes if "expand" in str(n.target))
    assert values.constant(expanded).shape == (1, 4, 4)
    assert all(values.constant(result) is None for result in program.outputs)
