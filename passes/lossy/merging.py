"""The edits that passes which merge tokens share: insert a merge, then weigh what follows by the tokens' sizes."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import fx

from .. import ops
from ..nodes import arguments, erase_dead, expression, operator_name
from ..program import Program
from ..shorten import Shortening, Stopped, contains
from ..tokens import Site, Tokens, leading, masked, valid_tokens

aten = torch.ops.aten
REDUCTIONS = {"mean", "sum"}


def reason_against(protected: Sequence[int]) -> str | None:
    """Why these tokens cannot be protected: places further behind move when tokens before them merge, by sample."""
    if leading(protected) == len(protected):
        return None
    return f"tokens {sorted(protected)} are protected, but only those in front keep their places"


@dataclass(frozen=True)
class Merged:
    """Nodes of one merge: tokens, their sizes, the place that each had, and where each token of before went."""

    new: fx.Node
    sizes: fx.Node
    kept: fx.Node
    places: fx.Node


@dataclass
class Merging:
    """The edits of one run: merge site by site, then weigh what comes after by the sizes of the tokens.

    Attributes:
        protected: the first places of all.
        sizes: (first node that reads merged tokens, node of their sizes), in order.
    """

    program: Program
    tokens: Tokens
    protected: tuple[int, ...]
    sizes: list[tuple[fx.Node, fx.Node]] = field(default_factory=list)

    def after(self, site: Site, count: int, metric: str) -> None:
        """Insert one merge after a site and let all that follows be shorter. Raises Stopped."""
        program, at, before = self.program, site.at, site.at.next
        features = at if metric == "features" else program.call(aten.mean.dim, site.keys, [1], before=before)
        size = self.sizes[-1][1] if self.sizes else self.ones(at, before)
        found = self.call(at, size, features, count, valid_tokens(program, site, before), before)
        self.edit(at, found).apply()
        self.sizes.append((found.new, found.sizes))

    def around(self, site: Site, count: int) -> None:
        """Merge what goes into a site's branch, and give each token the result of what it became. Raises Stopped."""
        at, before = site.branch.start, site.branch.nodes[0]
        found = self.call(at, self.ones(at, before), at, count, valid_tokens(self.program, site, before), before)
        edit = self.edit(at, found, frozenset(site.branch.nodes))
        edit.apply()
        edit.restore(found.places)
        self.sizes.append((found.new, found.sizes))

    def ones(self, at: fx.Node, before: fx.Node) -> fx.Node:
        """Sizes of tokens that stand for themselves."""
        first = self.program.call(aten.select.int, at, 2, 0, before=before)
        return self.program.call(aten.ones_like.default, first, before=before, dtype=torch.float32)

    def call(self, at: fx.Node, size: fx.Node, metric: fx.Node, count: int, valid: fx.Node | None,
             before: fx.Node) -> Merged:  # fmt: skip
        """Insert the operator and take its results apart."""
        call = self.program.call
        node = call(ops.merge_tokens(), at, size, metric, count, list(self.protected), valid, before=before)
        return Merged(*(call(operator.getitem, node, k, before=before) for k in range(4)))

    def edit(self, at: fx.Node, found: Merged, inside: frozenset[fx.Node] | None = None) -> Shortening:
        """What lets readers of `at` read merged tokens."""
        tokens = self.tokens
        return Shortening(self.program, tokens.axes, tokens.axis, tokens.activations, len(self.protected),
                          at, found.new, found.kept, inside=inside)  # fmt: skip

    def weigh(self) -> None:
        """Attention counts a merged token as often as it stands for; so do means and sums over the tokens."""
        current: fx.Node | None = None
        starts = dict(self.sizes)
        for node in list(self.program.graph.nodes):
            current = starts.get(node, current)
            if current is None or node not in self.tokens.axes.values or node.op != "call_function":
                continue
            name = operator_name(node)
            if name == "scaled_dot_product_attention" and self._merged(arguments(node)["key"], current):
                self._bias(node, current)
            elif name in REDUCTIONS and self._reduces_merged(node, current):
                self._weighted(node, name, current)
        erase_dead(self.program.graph)

    def _reduces_merged(self, node: fx.Node, size: fx.Node) -> bool:
        mixed = any(contains(d, self.tokens.axis) for d in self.tokens.axes.mixed(node))
        return mixed and self._merged(arguments(node)["self"], size)

    def _merged(self, node: fx.Node, size: fx.Node) -> bool:
        """Whether a tensor carries the tokens as they are after the merge; a mask, for instance, may be as it was."""
        count, value = expression(size.meta["val"].shape[1]), node.meta["val"]
        return any(contains(d, self.tokens.axis) and expression(n) == count
                   for d, n in zip(self.tokens.axes.of(node), value.shape, strict=True))  # fmt: skip

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
