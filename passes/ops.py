"""Operators that passes introduce: schema, shapes, and what they mean in plain torch.

They are defined the first time that one is asked for, not when this module is imported.
"""

from __future__ import annotations

import functools

import torch
from torch.nn import functional as F

from . import token_ops

NAMESPACE = "torchlathe"
LINEAR_INT4 = "linear_int4(Tensor input, Tensor weight, Tensor scale, Tensor offset, Tensor? bias=None) -> Tensor"


def linear_int4() -> torch._ops.OpOverload:
    """A linear layer whose weight has four bits: weight[o, i] = level * scale[o, g] + offset[o, g].

    ``input`` is [..., inputs] in float32, bfloat16 or float16. ``weight`` is [outputs, inputs / 2] uint8, the level (0
    to 15) of an even input in the low half of a byte, that of the next one in the high half. ``scale`` and ``offset``
    are [outputs, groups] float32; group g covers inputs / groups neighbouring inputs, an even number.
    """
    return _named("linear_int4")


def pack_int4(levels: torch.Tensor) -> torch.Tensor:
    """Levels from 0 to 15, [outputs, inputs], as the weight of `linear_int4`."""
    low, high = levels.to(torch.uint8)[:, ::2], levels.to(torch.uint8)[:, 1::2]
    return low | high << 4


def unpack_int4(weight: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    """The weight of `linear_int4` in float32, [outputs, inputs]."""
    levels = torch.stack([weight & 15, weight >> 4], -1).flatten(1).to(torch.float32)
    grouped = levels.unflatten(1, (scale.shape[1], -1))
    full: torch.Tensor = grouped * scale[..., None] + offset[..., None]
    return full.flatten(1)


def take() -> torch._ops.OpOverload:
    """Elements along a dimension, chosen anew in each sample; see `token_ops.take`."""
    return _named("take")


def merge_tokens() -> torch._ops.OpOverload:
    """The most similar pairs of tokens become one; see `token_ops.merge_tokens`."""
    return _named("merge_tokens")


def best_tokens() -> torch._ops.OpOverload:
    """Places of the tokens of the highest score; see `token_ops.best_tokens`."""
    return _named("best_tokens")


def _named(name: str) -> torch._ops.OpOverload:
    _defined()
    found: torch._ops.OpOverload = getattr(torch.ops.torchlathe, name).default
    return found


def define() -> None:
    """Define all operators of this module; a second time does nothing."""
    _defined()


@functools.cache
def _defined() -> torch.library.Library:
    library = torch.library.Library(NAMESPACE, "FRAGMENT")
    meanings = {
        LINEAR_INT4: (_linear_int4, _shape_of_linear),
        token_ops.TAKE: (token_ops.take, token_ops.take_shape),
        token_ops.MERGE: (token_ops.merge_tokens, token_ops.merge_shapes),
        token_ops.BEST: (token_ops.best_tokens, token_ops.best_shape),
    }
    for schema, (meaning, shape) in meanings.items():
        library.define(schema)
        name = schema.partition("(")[0]
        library.impl(name, meaning, "CompositeExplicitAutograd")
        library.impl(name, shape, "Meta")
    return library


def _linear_int4(input: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor,
                 bias: torch.Tensor | None = None) -> torch.Tensor:  # fmt: skip
    _check(input, weight, scale, offset)
    full = F.linear(input.to(torch.float32), unpack_int4(weight, scale, offset))
    return (full if bias is None else full + bias).to(input.dtype)


def _shape_of_linear(input: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor,
                     bias: torch.Tensor | None = None) -> torch.Tensor:  # fmt: skip
    _check(input, weight, scale, offset)
    return input.new_empty((*input.shape[:-1], weight.shape[0]))


def _check(input: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor) -> None:
    outputs, half = weight.shape
    fits = scale.shape == offset.shape and scale.shape[0] == outputs and half % scale.shape[1] == 0
    if weight.dtype is not torch.uint8 or input.shape[-1] != 2 * half or not fits:
        raise ValueError(
            f"linear_int4 of an input {list(input.shape)} with a weight {list(weight.shape)} in {weight.dtype}, "
            f"scale {list(scale.shape)} and offset {list(offset.shape)}"
        )
