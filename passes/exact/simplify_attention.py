"""simplify_attention: attention operators that are asked for no more than they need."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from ..attention import ATTENTION, MANY_KEYS, relax_layout, repeated_heads, same, shape
from ..base import Context, Pass, Refusal
from ..nodes import arguments, erase_unused
from ..program import Program
from ..values import Values, is_causal

ARGS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


@dataclass(frozen=True)
class SimplifyAttention(Pass):
    """Take from attention operators masks that hide nothing or only the future, and repeats of keys and values.

        k = view(expand(unsqueeze(k0, 2))); v = view(expand(unsqueeze(v0, 2)))      # each head for a group of queries
        y = scaled_dot_product_attention(q, k, v, tril)
        -->  y = scaled_dot_product_attention(q, k0, v0, None, is_causal=True, enable_gqa=True)

    Models spell masks out and repeat keys where their library's kernel asks for it; without both, no score of a hidden
    key is computed, and the keys are read, not copied. Assumes what `FuseAttention` assumes: products of queries and
    keys stay below 8192 in magnitude, and a key that the causal flag hides is finite. Gives up nothing.
    Source: Ainslie et al., GQA, https://arxiv.org/abs/2305.13245, for heads that share keys.
    """

    name: ClassVar[str] = "simplify-attention"

    def run(self, program: Program, ctx: Context) -> int | Refusal:
        """See the class."""
        values, sites = Values(program), 0
        nodes = [n for n in program.graph.nodes if n.target is ATTENTION]
        for node in nodes:
            changes = _mask(node, values) | _heads(node)
            if changes:
                before = [*node.all_input_nodes]
                given = arguments(node) | changes
                node.args = tuple(given.pop(k) for k in ARGS)
                node.kwargs = given
                program.infer(node)
                for operand in before:
                    erase_unused(operand)
                relax_layout(program, list(node.users))
                sites += 1
        if sites:
            return sites
        if nodes:
            return Refusal.at(nodes[0], "no constant mask hides nothing or only the future, no head is repeated")
        return Refusal("no attention operator in the program")


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


def _heads(node: fx.Node) -> dict[str, object]:
    """Keys and values before each head was repeated for its group of query heads, if both were."""
    given = arguments(node)
    if given["enable_gqa"]:
        return {}
    query, key, value = (shape(given[k]) for k in ("query", "key", "value"))
    first, second = (repeated_heads(given[k]) for k in ("key", "value"))
    if first is None or second is None or not same(shape(first)[:3], shape(second)[:3]):
        return {}
    plain = same(query[:2], key[:2]) and same(query[:2], value[:2]) and same(shape(first)[0], query[0])
    return {"key": first, "value": second, "enable_gqa": True} if plain else {}
