"""Axes: which dimensions are the same, which are mixed, what is taken apart, joined or unknown."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import sympy
import torch
from scripts import load
from torch import nn
from torch.export import Dim
from torch.nn import functional as F

from torchlathe.passes.axis import Axes
from torchlathe.passes.capture import capture
from torchlathe.passes.nodes import expression


class Net(nn.Module):
    def __init__(self, function: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(part) if isinstance(part, torch.Tensor) else part)

    def forward(self, *args: torch.Tensor) -> Any:
        return self.function(self, *args)


def axes_of(function: Callable[..., Any], *args: torch.Tensor, dynamic: Any = None, **parts: Any) -> Axes:
    shapes = None if dynamic is None else {"args": dynamic}
    return capture(Net(function, **parts).eval(), args, dynamic_shapes=shapes).axes()


def node(axes: Axes, name: str) -> Any:
    """The last node whose name begins so."""
    return [n for n in axes.graph.nodes if n.name.startswith(name)][-1]


def inputs(axes: Axes) -> list[Any]:
    return [n for n in axes.graph.nodes if n.op == "placeholder"]


def dims(axes: Axes, name: str) -> list[Any]:
    return axes.of(node(axes, name))


def sizes_agree(axes: Axes) -> None:
    """Every dimension is as long as its axes together."""
    for n, found in axes.values.items():
        if isinstance(found, list):
            value = n.meta["val"]
            for size, dim in zip(value.shape, found, strict=True):
                product = sympy.Mul(*(a.size for a in axes.resolve(dim)))
                assert (product - expression(size)).simplify() == 0, (n, dim)


def attend(m: Any, x: torch.Tensor) -> torch.Tensor:
    b, t, c = x.shape
    q, k, v = m.qkv(x).view(b, t, 3, 4, c // 4).permute(2, 0, 3, 1, 4).unbind(0)
    p = torch.softmax(q @ k.transpose(-1, -2), -1)
    return x + m.out((p @ v).transpose(1, 2).reshape(b, t, c))


def test_attention_mixes_its_tokens_and_nothing_else() -> None:
    axes = axes_of(attend, torch.randn(2, 5, 32), qkv=nn.Linear(32, 96), out=nn.Linear(32, 32))
    sizes_agree(axes)
    batch, tokens, _ = axes.of(inputs(axes)[0])
    scores = dims(axes, "softmax")
    assert scores[0] == batch and scores[2] == tokens and scores[3] == tokens
    assert axes.mixed(node(axes, "softmax")) == [tokens]
    result = dims(axes, "add")
    assert result[:2] == [batch, tokens]
    assert tokens not in [d for n in axes.mixes if "linear" in n.name for d in axes.mixed(n)]


def test_batch_and_tokens_flattened_together() -> None:
    axes = axes_of(lambda m, x: m.w(x.reshape(-1, 8)).view(3, 5, 8) + x, torch.randn(3, 5, 8), w=nn.Linear(8, 8))
    sizes_agree(axes)
    (batch,), (tokens,), _ = axes.of(inputs(axes)[0])
    assert dims(axes, "linear")[0] == (batch, tokens)


def test_windows_take_an_axis_apart_everywhere() -> None:
    def windows(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = x.view(2, 2, 4, 2, 4, 3).permute(0, 1, 3, 2, 4, 5).reshape(8, 16, 3)
        return torch.softmax(y, 1).sum() + x.mean()

    axes = axes_of(windows, torch.randn(2, 8, 8, 3))
    sizes_agree(axes)
    batch, rows, columns, _ = axes.of(inputs(axes)[0])
    assert [len(d) for d in (batch, rows, columns)] == [1, 2, 2]
    assert dims(axes, "softmax")[:2] == [(*batch, rows[0], columns[0]), (rows[1], columns[1])]


def test_grouped_heads() -> None:
    def grouped(m: Any, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, k, enable_gqa=True)

    axes = axes_of(grouped, torch.randn(2, 6, 5, 8), torch.randn(2, 2, 5, 8))
    sizes_agree(axes)
    q, k = (axes.of(n) for n in inputs(axes))
    assert len(q[1]) == 2 and q[1][:1] == k[1] and q[3] == k[3] and q[2] != k[2]


def test_repeated_heads_are_the_same_groups() -> None:
    def repeated(m: Any, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        k = k[:, :, None].expand(2, 2, 3, 5, 8).reshape(2, 6, 5, 8)
        return q @ k.transpose(-1, -2)

    axes = axes_of(repeated, torch.randn(2, 6, 5, 8), torch.randn(2, 2, 5, 8))
    sizes_agree(axes)
    q, k = (axes.of(n) for n in inputs(axes))
    assert q[1][:1] == k[1]


def test_a_class_token_and_what_is_cut_off_again() -> None:
    def classify(m: Any, x: torch.Tensor) -> Any:
        y = torch.cat([m.token.expand(2, 1, 8), x], 1) + m.place
        return y[:, 0], y[:, 1:] * 2

    axes = axes_of(classify, torch.randn(2, 9, 8), token=torch.randn(1, 1, 8), place=torch.randn(1, 10, 8))
    sizes_agree(axes)
    (joined,) = dims(axes, "cat")[1]
    pieces = axes.joined[joined].pieces
    assert [len(axes.resolve(d)) for _, d in pieces] == [0, 1] and pieces[1][1] == axes.of(inputs(axes)[0])[1]
    place = next(n for n in axes.graph.nodes if n.op == "get_attr" and "place" in str(n.target))
    assert axes.of(place)[1] == (joined,)
    assert axes.mixed(node(axes, "select")) == [(joined,)]
    (rest,) = dims(axes, "mul")[1]
    assert axes.taken[rest].start == 1 and axes.resolve(axes.taken[rest].source) == (joined,)


def test_masks_and_positions_made_from_arange_are_tokens_too() -> None:
    def causal(m: Any, x: torch.Tensor) -> torch.Tensor:
        t = torch.arange(x.shape[1])
        return (x @ x.transpose(1, 2)).masked_fill(t[:, None] < t, 0.0) + torch.cos(t * 0.1)

    for dynamic in (None, ({1: Dim("tokens", min=2, max=64)},)):
        axes = axes_of(causal, torch.randn(2, 6, 8), dynamic=dynamic)
        sizes_agree(axes)
        tokens = axes.of(inputs(axes)[0])[1]
        assert dims(axes, "arange") == [tokens] and dims(axes, "lt") == [tokens, tokens]


def test_an_image_becomes_tokens() -> None:
    axes = axes_of(lambda m, x: m.patch(x).flatten(2).transpose(1, 2) + m.place, torch.randn(2, 3, 8, 8),
                   patch=nn.Conv2d(3, 16, 2, 2), place=torch.randn(1, 16, 16))  # fmt: skip
    sizes_agree(axes)
    tokens = dims(axes, "add")[1]
    assert len(tokens) == 2 and tokens == tuple(d[0] for d in dims(axes, "conv2d")[2:])


def test_mixing_is_told_for_each_operator() -> None:
    x = torch.randn(2, 5, 8)
    cases: list[tuple[Any, list[int]]] = [
        (lambda m, x: F.layer_norm(x, (8,)), [2]), (lambda m, x: x.mean((0, 1)), [0, 1]),
        (lambda m, x: x.cumsum(1), [1]), (lambda m, x: x.flip(1), [1]), (lambda m, x: x.roll(1, 1), [1]),
        (lambda m, x: x.topk(2, 1).values, [1]), (lambda m, x: torch.fft.fft(x, dim=1).real, [1]),
        (lambda m, x: F.pad(x, (0, 0, 1, 0)), [1]), (lambda m, x: torch.einsum("bic,bjc->bij", x, x), [2]),
        (lambda m, x: F.conv1d(x, torch.ones(4, 5, 3)), [1, 2]), (lambda m, x: x.exp() * 2, []),
    ]  # fmt: skip
    for function, wanted in cases:
        axes = axes_of(function, x)
        sizes_agree(axes)
        own = axes.of(inputs(axes)[0])
        mixed = [d for n in axes.mixes for d in axes.mixed(n)]
        assert sorted({own.index(d) for d in mixed if d in own}) == wanted, (function, str(axes))


def test_what_has_no_rule_is_unknown_and_named() -> None:
    axes = axes_of(lambda m, x: F.unfold(x, 2).cumsum(-1), torch.randn(1, 3, 8, 8))
    (reason,) = axes.unknown.values()
    assert "im2col" in reason or "unfold" in reason
    assert "test_axes.py" in reason
    sizes_agree(axes)


def test_a_view_that_cuts_through_an_axis_is_unknown() -> None:
    axes = axes_of(lambda m, x: x.view(4, 6), torch.randn(3, 8))
    assert "cuts an axis" in next(iter(axes.unknown.values()))


def test_the_text_names_axes() -> None:
    text = str(axes_of(attend, torch.randn(2, 5, 32), qkv=nn.Linear(32, 96), out=nn.Linear(32, 32)))
    assert "softmax [" in text and "mixes" in text and "=5" in text


def zoo() -> Any:
    load("zoo_nets")
    return load("zoo")


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(zoo().models()) - set(zoo().BEYOND_CAPTURE)))
def test_the_zoo_is_understood(name: str) -> None:
    model, args, kwargs = zoo().models()[name]()
    axes = capture(model.eval(), args, kwargs).axes()
    sizes_agree(axes)
    allowed = ("lstm", "gru", "embedding_bag", "unfold", "grouped_mm", "histc", "index by a mask", "transposed", "diff")
    assert all(any(a in reason for a in allowed) for reason in axes.unknown.values()), axes.unknown
