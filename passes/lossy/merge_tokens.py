"""Merge similar tokens between attention and feed-forward, block by block."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import fx

from .. import ops
from ..base import Context, Fidelity, Pass, Refusal
from ..nodes import arguments, operator_name
from ..program import Program
from ..shorten import Shortening, Stopped, contains
from ..tokens import Site, Tokens, find_tokens, leading, masked, valid_tokens

aten = torch.ops.aten
REDUCTIONS = {"mean", "sum"}


@dataclass(frozen=True)
class MergeTokens(Pass):
    """Bipartite soft matching: after each attention the most similar tokens become one.

        add = x + attention(norm(x))                   size-weighted mean of the r best pairs of `add`
        norm(add)                              ->      norm(merged)
        ... attention(q, k, v)                         attention(q, k, v, log(size))

    Assumes that tokens may change places: an operator that tells them apart by place stops it by name. Positions and
    masks that carry the token axis are taken at the tokens that stay; padding is never merged with real tokens; tokens
    that are parameters stay alone and in front; means and sums over the tokens are weighted by size.

    Gives up the difference between tokens that are alike. Source: Bolya et al., "Token Merging: Your ViT But Faster"
    (2023); places of the result are in rising order, not [unmerged, destinations].

    Attributes:
        r: tokens to merge away in each block: one number; a number for each block; or (number, slope) with a float,
            from number * (1 - slope) in the first block rising or falling linearly with that mean.
        metric: what is compared: ``keys`` (mean over the heads) or ``features`` of the stream.
        protect: places of tokens that stay alone; None finds those that are parameters.
    """

    name: ClassVar[str] = "merge-tokens"
    fidelity: ClassVar[Fidelity] = Fidelity.LOSSY

    r: int | tuple[int, ...] | tuple[int, float] = 8
    metric: str = "keys"
    protect: tuple[int, ...] | None = None

    def run(self, program: Program, ctx: Context) -> int | Refusal:
        """Rewrite `program`."""
        tokens = find_tokens(program)
        if isinstance(tokens, Refusal):
            return tokens
        counts = amounts(self.r, len(tokens.sites))
        if isinstance(counts, str):
            return Refusal(counts)
        kept = tokens.protected if self.protect is None else self.protect
        edit = _Merging(program, tokens, kept, self.metric)
        try:
            for site, count in zip(tokens.sites, counts, strict=True):
                if count:
                    edit.merge(site, count)
            edit.weigh()
        except Stopped as stop:
            return Refusal.at(stop.node, str(stop))
        return sum(c > 0 for c in counts)


def amounts(r: int | Sequence[float], layers: int) -> list[int] | str:
    """Tokens to merge away in each layer, or what is wrong with `r`."""
    if isinstance(r, int):
        found = [r] * layers
    elif len(r) == 2 and isinstance(r[1], float):
        first = int(r[0] * (1.0 - r[1]))
        last, steps = 2 * int(r[0]) - first, max(1, layers - 1)
        found = [int(first + (last - first) * k / steps) for k in range(layers)]
    else:
        if len(r) > layers:
            return f"{len(r)} numbers of tokens for {layers} attention layers"
        found = [*map(int, r), *[0] * (layers - len(r))]
    return "a negative number of tokens" if any(c < 0 for c in found) else found


@dataclass
class _Merging:
    """The edits of one run: merge site by site, then weigh what comes after by the sizes of the tokens.

    Attributes:
        sizes: (first node that reads merged tokens, node of their sizes), in order.
    """

    program: Program
    tokens: Tokens
    protected: tuple[int, ...]
    metric: str
    sizes: list[tuple[fx.Node, fx.Node]] = field(default_factory=list)

    def merge(self, site: Site, count: int) -> None:
        """Insert one merge after a site and let all that follows be shorter. Raises Stopped."""
        program, at = self.program, site.at
        length = at.meta["val"].shape[1]
        if isinstance(length, int) and 2 * count > length - len(self.protected):
            raise Stopped(at, f"{count} of {length} tokens cannot be merged away, {len(self.protected)} are protected")
        before = at.next
        if self.sizes:
            size = self.sizes[-1][1]
        else:
            first = program.call(aten.select.int, at, 2, 0, before=before)
            size = program.call(aten.ones_like.default, first, before=before, dtype=torch.float32)
        metric = at if self.metric == "features" else program.call(aten.mean.dim, site.keys, [1], before=before)
        valid = valid_tokens(program, site, before)
        node = program.call(ops.merge_tokens(), at, size, metric, count, list(self.protected), valid, before=before)
        new, sizes, kept = (program.call(operator.getitem, node, k, before=before) for k in range(3))
        Shortening(program, self.tokens.axes, self.tokens.axis, self.tokens.activations, leading(self.protected),
                   at, new, kept).apply()  # fmt: skip
        self.sizes.append((new, sizes))

    def weigh(self) -> None:
        """Attention counts a merged token as often as it stands for; so do means and sums over the tokens."""
        current = None
        starts = dict(self.sizes)
        for node in list(self.program.graph.nodes):
            current = starts.get(node, current)
            if current is None or node not in self.tokens.axes.values or node.op != "call_function":
                continue
            name = operator_name(node)
            if name == "scaled_dot_product_attention" and self._over_tokens(arguments(node)["key"], -2):
                self._bias(node, current)
            elif name in REDUCTIONS and any(contains(d, self.tokens.axis) for d in self.tokens.axes.mixed(node)):
                self._weighted(node, name, current)

    def _over_tokens(self, node: fx.Node, dim: int) -> bool:
        return contains(self.tokens.axes.of(node)[dim], self.tokens.axis)

    def _bias(self, node: fx.Node, size: fx.Node) -> None:
        """Add the logarithm of the sizes to the scores of the keys."""
        call, given = self.program.call, arguments(node)
        dtype = given["query"].meta["val"].dtype
        bias = call(aten.log.default, size, before=node)
        bias = call(aten.unsqueeze.default, call(aten.unsqueeze.default, bias, 1, before=node), 1, before=node)
        bias = self._for_heads(node, given["key"], bias)
        if dtype is not torch.float32:
            bias = call(aten._to_copy.default, bias, before=node, dtype=dtype)
        bias = masked(self.program, given["attn_mask"], bias, node)
        node.kwargs = {k: v for k, v in node.kwargs.items() if k != "attn_mask"}
        node.args = (*node.args[:3], bias, *node.args[4:])

    def _for_heads(self, node: fx.Node, key: fx.Node, bias: fx.Node) -> fx.Node:
        """[batch, 1, 1, tokens] for keys of [batch, heads, ...], or of [1, batch x heads, ...]. Raises Stopped."""
        batch = self.tokens.axes.of(self.tokens.sites[0].at)[0]
        first, heads = self.tokens.axes.of(key)[:2]
        if first == batch or not batch:
            return bias
        sizes = [*key.meta["val"].shape[:2], *bias.meta["val"].shape]
        if first or heads[: len(batch)] != batch or not all(isinstance(n, int) for n in sizes):
            raise Stopped(node, "attention whose batch cannot be told from its heads")
        many, samples, length = sizes[1], sizes[2], sizes[-1]
        bias = self.program.call(aten.expand.default, bias, [samples, many // samples, 1, length], before=node)
        return self.program.call(aten.reshape.default, bias, [1, many, 1, length], before=node)

    def _weighted(self, node: fx.Node, name: str, size: fx.Node) -> None:
        """A sum over tokens times their sizes; a mean is that over the number of original tokens."""
        call, given = self.program.call, arguments(node)
        source, dims = given["self"], given["dim"]
        rank = source.meta["val"].dim()
        listed = [d % rank for d in ([dims] if isinstance(dims, int) else dims or range(rank))]
        places = [k for k, d in enumerate(self.tokens.axes.of(source)) if contains(d, self.tokens.axis)]
        if listed != places or len(places) != 1 or places[0] == 0:
            raise Stopped(node, "tokens are reduced together with other dimensions")
        weight = size
        for _ in range(places[0] - 1):
            weight = call(aten.unsqueeze.default, weight, 1, before=node)
        for _ in range(rank - 1 - places[0]):
            weight = call(aten.unsqueeze.default, weight, -1, before=node)
        dtype = source.meta["val"].dtype
        if dtype is not torch.float32:
            weight = call(aten._to_copy.default, weight, before=node, dtype=dtype)
        product = call(aten.mul.Tensor, source, weight, before=node)
        keep = bool(given.get("keepdim"))
        total = call(aten.sum.dim_IntList, product, listed, keep, before=node)
        if name == "mean":
            total = call(
                aten.div.Tensor, total, call(aten.sum.dim_IntList, weight, listed, keep, before=node), before=node
            )
        node.replace_all_uses_with(total)
