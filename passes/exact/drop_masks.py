"""drop_masks: attention without masks that hide nothing, and with a flag for those that hide the future."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from ..attention import MANY_KEYS, shape, simplify
from ..base import Context, Pass, Refusal
from ..nodes import arguments, same
from ..program import Program
from ..values import Values, is_causal


@dataclass(frozen=True)
class DropMasks(Pass):
    """Take constant masks that hide no key, or exactly the later ones, from attention operators.

        y = scaled_dot_product_attention(q, k, v, tril)
        -->  y = scaled_dot_product_attention(q, k, v, None, is_causal=True)

    Models spell masks out; with the flag no score of a hidden key is computed. Assumes what `FuseAttention` assumes:
    products of queries and keys stay below 8192 in magnitude, and a key that the causal flag hides is finite. Gives up
    nothing. Source: the operator's meaning is that of torch.nn.functional.scaled_dot_product_attention.
    """

    name: ClassVar[str] = "drop-masks"

    def run(self, program: Program, ctx: Context) -> int | Refusal:
        """See the class."""
        values = Values(program)
        return simplify(program, lambda node: _mask(node, values), "no constant mask hides nothing or only the future")


def _mask(node: fx.Node, values: Values) -> dict[str, object]:
    """What stands for a constant mask that hides no key, or exactly the later ones."""
    given = arguments(node)
    known = values.constant(given["attn_mask"])
    *lead, queries, _ = shape(given["query"])
    keys = shape(given["key"])[-2]
    if known is None or not isinstance(keys, int) or keys < MANY_KEYS or not same(tuple(lead), shape(node)[:-2]):
        return {}
    if known.dtype is torch.bool:
        known = torch.zeros(known.shape, device=known.device).masked_fill(~known, -math.inf)
    if not bool(known.any()):  # NaN counts as true
        return {"attn_mask": None}
    return {"attn_mask": None, "is_causal": True} if is_causal(known, queries, keys) else {}
