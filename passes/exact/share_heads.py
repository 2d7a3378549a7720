"""share_heads: attention that reads keys and values once for a group of query heads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from ..attention import repeated_heads, shape, simplify
from ..base import Context, Pass, Refusal
from ..nodes import arguments, same
from ..program import Program


@dataclass(frozen=True)
class ShareHeads(Pass):
    """Read keys and values as they were before each head was repeated for its group of query heads.

        k = view(expand(unsqueeze(k0, 2))); v = view(expand(unsqueeze(v0, 2)))
        y = scaled_dot_product_attention(q, k, v)   -->   y = scaled_dot_product_attention(q, k0, v0, enable_gqa=True)

    Models repeat heads where their library's kernel asks for it; without that nothing is copied. Assumes nothing, gives
    up nothing. Source: Ainslie et al., GQA, https://arxiv.org/abs/2305.13245, for heads that share keys.
    """

    name: ClassVar[str] = "share-heads"

    def run(self, program: Program, ctx: Context) -> int | Refusal:
        """See the class."""
        return simplify(program, _heads, "no head of keys and values is repeated")


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
