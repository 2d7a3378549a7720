"""The attention family: what one attention operator computes, and how it may be tiled."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import fx

from ...passes.program import Program
from ..base import Region, in_memory
from .indexed import Look, Walk, look
from .layout import expression
from .rules import name_of
from .values import FLOATS, Unsupported, bound, dense, same

OPERATOR = "scaled_dot_product_attention"
WIDEST = 256  # features of a head

Heads = list[tuple[sympy.Expr, int]]  # for each leading dimension: stride, and how many heads share one element


@dataclass(frozen=True)
class Indexed:
    """Where the index of keys or values lies.

    Attributes:
        position: parameter number of the index.
        heads: walk of the index over the leading dimensions.
        step: stride of the index from one entry to the next.
        look: what its entries mean.
    """

    position: int
    heads: Heads
    step: sympy.Expr
    look: Look


@dataclass
class Attention:
    """softmax(query key^T scale + mask) value for every head.

    Attributes:
        tensors: fake tensors of the parameters: inputs, then the output.
        position: parameter number of query, key, value, mask and output.
        lead: sizes of the leading dimensions, heads last.
        heads: walk of each tensor over the leading dimensions.
        steps: stride of each tensor along its last two dimensions.
        queries: number of queries.
        keys: number of keys.
        features: features of query and key.
        value_features: features of value and output.
        scale: what scores are multiplied with.
        causal: whether query i sees keys 0 to i only.
        masked: whether there is a mask.
        mask_per_query: whether the mask differs from query to query.
        known_mask: a mask that differs from query to query and is a constant; which blocks of keys a tile of queries
            sees is then found at compile time, and passed as one more parameter, "visible".
        looks: how keys and values that are read through an index are found; their walks and steps are then those inside
            a page of what is read.
    """

    tensors: list[torch.Tensor]
    position: dict[str, int]
    lead: list[sympy.Expr]
    heads: dict[str, Heads]
    steps: dict[str, tuple[sympy.Expr, sympy.Expr]]
    queries: sympy.Expr
    keys: sympy.Expr
    features: int
    value_features: int
    scale: float
    causal: bool
    masked: bool
    mask_per_query: bool
    known_mask: torch.Tensor | None = None
    looks: dict[str, Indexed] = field(default_factory=dict)

    @property
    def group(self) -> int:
        """Query heads that read the same keys."""
        return self.heads["key"][-1][1]

    @property
    def flops(self) -> int:
        """Floating point operations of both products, 0 if sizes are symbolic."""
        sizes = [*self.lead, self.queries, self.keys]
        if not all(s.is_Integer for s in sizes):
            return 0
        full = 2 * math.prod(int(s) for s in sizes) * (self.features + self.value_features)
        return full // 2 if self.causal and self.queries == self.keys else full


def visible_blocks(plan: Attention, width: int, block: int) -> torch.Tensor:
    """[tiles of queries, blocks of keys] int8: 1 where some query of the tile sees some key of the block.

    A hidden block is never read, so that NaN in its keys does not spread, as with a causal flag.
    """
    mask, queries, keys = plan.known_mask, int(plan.queries), int(plan.keys)
    assert mask is not None
    seen = mask if mask.dtype is torch.bool else mask != -math.inf
    seen = seen.flatten(0, -3).any(0) if seen.dim() > 2 else seen
    whole = torch.zeros(-(-queries // width) * width, -(-keys // block) * block, dtype=torch.bool)
    whole[:queries, :keys] = seen.expand(queries, keys)
    found = whole.view(-1, width, whole.shape[1] // block, block).any(3).any(1)
    return found.to(torch.int8)


def plan(region: Region, program: Program | None, indexed: bool = False) -> Attention:
    """The attention of a region. Raises Unsupported with the reason.

    Args:
        program: tells whether the mask is a constant.
        indexed: whether keys and values may be looked up by the region itself.
    """
    node = next((n for n in region.nodes if name_of(n) == OPERATOR), None)
    if node is None or region.outputs != (node,) or (len(region.nodes) > 1 and not indexed):
        raise Unsupported("attention with other operators")
    given = bound(node)
    if given["dropout_p"]:
        raise Unsupported("attention with dropout")
    operands = {"query": given["query"], "key": given["key"], "value": given["value"]}
    looks = {n: look(region, operands[n]) for n in ("key", "value") if operands[n] in region.nodes}
    if {node, *(n for found in looks.values() for n in found.nodes)} != set(region.nodes):
        raise Unsupported("attention with other operators")
    if given["attn_mask"] is not None:
        operands["mask"] = given["attn_mask"]
        if given["is_causal"]:
            raise Unsupported("attention with a mask that is also causal")
    for name, operand in operands.items():
        _check(name, operand, node)
    output = in_memory(node.meta["val"], memory_order(node.meta["val"].dim()))
    query, key, value = (operands[n].meta["val"] for n in ("query", "key", "value"))
    features, own = query.shape[-1], value.shape[-1]
    if not isinstance(features, int) or not isinstance(own, int) or not 0 < max(features, own) <= WIDEST:
        raise Unsupported(f"attention heads of {features} features")
    if query.dim() < 3 or any(t.dim() != query.dim() for t in (key, value)):
        raise Unsupported("attention operands of different ranks")
    tensors = {**{n: operands[n].meta["val"] for n in operands}, "output": output}
    walks = {n: looks[n].own if n in looks else t for n, t in tensors.items()}
    grouped = bool(given.get("enable_gqa"))
    heads = {n: _heads(t, query, grouped) for n, t in walks.items()}
    steps = {n: (expression(t.stride(-2)), expression(t.stride(-1))) for n, t in walks.items()}
    per_query = False
    if "mask" in tensors:
        sizes = tensors["mask"].shape[-2:]
        steps["mask"] = tuple(sympy.Integer(0) if _is_one(n) else s  # type: ignore[assignment]
                              for n, s in zip(sizes, steps["mask"], strict=True))  # fmt: skip
        per_query = steps["mask"][0] != 0
    scale = given["scale"] if given["scale"] is not None else 1 / math.sqrt(features)
    known = None
    if per_query and program is not None and all(isinstance(n, int) for n in (query.shape[-2], key.shape[-2])):
        known = program.constant(operands["mask"])
    own_tensors = [n.meta["val"] for n in region.inputs] + ([] if known is None else [torch.empty(0, dtype=torch.int8)])
    sources = operands | {n: found.source for n, found in looks.items()}
    position = {n: region.inputs.index(source) for n, source in sources.items()} | {"output": len(own_tensors)}
    entries = {n: Indexed(region.inputs.index(found.index), _heads(found.entries, query, grouped),
                          found.entries.stride(-2), found) for n, found in looks.items()}  # fmt: skip
    return Attention(
        [*own_tensors, output], position, [expression(s) for s in query.shape[:-2]],
        heads, steps, expression(query.shape[-2]), expression(key.shape[-2]), features, own, float(scale),
        bool(given["is_causal"]), "mask" in tensors, per_query, known, entries,
    )  # fmt: skip


def memory_order(rank: int) -> tuple[int, ...]:
    """Dimensions of an attention result from the outermost to the innermost in memory."""
    return (*range(rank - 3), rank - 2, rank - 3, rank - 1)


def _check(name: str, operand: Any, node: fx.Node) -> None:
    value = dense(operand)
    own: torch.Tensor = node.meta["val"]
    if value.dtype not in (FLOATS if name != "mask" else (*FLOATS, torch.bool)):
        raise Unsupported(f"attention with {name} in {value.dtype}")
    if name != "mask" and value.dtype is not own.dtype:
        raise Unsupported("attention operands of different dtypes")
    if any(isinstance(s, int) and s == 0 for s in value.shape):
        raise Unsupported("attention without elements")


def _is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1


def _heads(tensor: torch.Tensor | Walk, query: torch.Tensor, grouped: bool) -> Heads:
    """Walk of a tensor over the query's leading dimensions, aligned at the end, broadcast where it has one element."""
    lead, found = query.shape[:-2], Heads()
    own = list(tensor.shape[:-2])
    for d, size in enumerate(lead):
        at = d - (len(lead) - len(own))
        if at < 0 or _is_one(own[at]):
            found.append((sympy.Integer(0), 1))
        elif same(own[at], size):
            found.append((expression(tensor.stride(at)), 1))
        elif grouped and d == len(lead) - 1 and isinstance(size, int) and isinstance(own[at], int):
            found.append((expression(tensor.stride(at)), size // own[at]))
        else:
            raise Unsupported("attention operands with different batch sizes")
    return found
