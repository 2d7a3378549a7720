"""The edits that passes which merge tokens share: insert a merge, then weigh what follows by the tokens' sizes."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import fx

from .. import ops
from ..axis import Dim
from ..nodes import arguments, erase_dead, expression, operator_name
from ..program import Program
from ..shorten import WHOLE, Shortening, Stopped
from ..tokens import Site, Tokens, leading, masked, middle, trailing, valid_tokens

aten = torch.ops.aten
REDUCTIONS = {"mean", "sum"}


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
        protected: places of tokens that stay alone, named as `placed` does. Those in the middle would go to other
            places in every sample: the first merge takes them behind those in front, where they stay.
        sizes: (first node that reads merged tokens, node of their sizes), in order.
        edits: so far.
    """

    program: Program
    tokens: Tokens
    protected: tuple[int, ...]
    sizes: list[tuple[fx.Node, fx.Node]] = field(default_factory=list)
    edits: list[Shortening] = field(default_factory=list)

    def after(self, site: Site, count: int, metric: str) -> None:
        """Insert one merge after a site and let all that follows be shorter. Raises Stopped."""
        program, at, before = self.program, site.at, site.at.next
        features = at if metric == "features" else program.call(aten.mean.dim, site.keys, [1], before=before)
        first = not self.sizes
        size = self.ones(at, before) if first else self.sizes[-1][1]
        found = self.call(at, size, features, count, valid_tokens(program, site, before), before, first)
        self.edit(at, found.new, found.kept, first=first).apply()
        self.sizes.append((found.new, found.sizes))

    def around(self, site: Site, count: int, goals: Sequence[int] = ()) -> None:
        """Merge what goes into a site's branch, and give each token the result of what it became. Raises Stopped."""
        at, before = site.branch.start, site.branch.nodes[0]
        valid = valid_tokens(self.program, site, before)
        if valid is not None and goals:
            raise Stopped(site.attention, "its mask hides tokens, which may have no partner of their kind")
        found = self.call(at, self.ones(at, before), at, count, valid, before, goals=goals)
        edit = self.edit(at, found.new, found.kept, frozenset(site.branch.nodes))
        edit.apply()
        edit.restore(found.places)
        self.sizes.append((found.new, found.sizes))

    def ones(self, at: fx.Node, before: fx.Node) -> fx.Node:
        """Sizes of tokens that stand for themselves."""
        first = self.program.call(aten.select.int, at, 2, 0, before=before)
        return self.program.call(aten.ones_like.default, first, before=before, dtype=torch.float32)

    def call(self, at: fx.Node, size: fx.Node, metric: fx.Node, count: int, valid: fx.Node | None,
             before: fx.Node, first: bool = True, goals: Sequence[int] = ()) -> Merged:  # fmt: skip
        """Insert the operator and take its results apart.

        Args:
            first: whether protected tokens are where they were at first.
            goals: places that tokens may become part of, where they are at first.
        """
        call, order = self.program.call, self._order(at) if first else None
        if order is not None:
            index = self.program.weight("order", torch.tensor(order, device=at.meta["val"].device))
            at, size, metric = (call(aten.index_select.default, n, 1, index, before=before) for n in (at, size, metric))
            valid = None if valid is None else call(aten.index_select.default, valid, 1, index, before=before)
            goals = [order.index(g) for g in goals]
        front, back = leading(self.protected) + len(middle(self.protected)), trailing(self.protected)
        alone = [*range(front), *range(-back, 0)]
        node = call(ops.merge_tokens(), at, size, metric, count, alone, valid, goals, before=before)
        found = Merged(*(call(operator.getitem, node, k, before=before) for k in range(4)))
        if order is None:
            return found
        inverse = torch.tensor(order, device=at.meta["val"].device).argsort()
        index_of = self.program.weight("order", inverse)
        kept = call(aten.index.Tensor, index, [found.kept], before=before)
        places = call(aten.index_select.default, found.places, 1, index_of, before=before)
        return Merged(found.new, found.sizes, kept, places)

    def _order(self, at: fx.Node) -> list[int] | None:
        """Places of all tokens in an order that has the protected ones at the ends; None if it is theirs. Raises
        Stopped."""
        inner, length = middle(self.protected), at.meta["val"].shape[1]
        if not inner:
            return None
        if not isinstance(length, int):
            raise Stopped(at, f"tokens {inner} are protected in the middle of others whose number is not known")
        front = leading(self.protected)
        return [*range(front), *inner, *(p for p in range(front, length) if p not in inner)]

    def in_groups(self, site: Site, count: int, groups: int, grid: tuple[int, int], goals: Sequence[int]) -> None:
        """After a site whose mask hides nothing, merge tokens inside groups of neighbours only. Raises Stopped.

        Args:
            count: tokens to merge away in each group.
            groups: their number, all of the same size.
            grid: first place of the groups and the place behind them.
            goals: places in a group that its tokens may become part of; none as for the operator.
        """
        call, at, before, (first, end) = self.program.call, site.at, site.at.next, grid
        size = self.sizes[-1][1] if self.sizes else self.ones(at, before)
        metric = call(aten.mean.dim, site.keys, [1], before=before)
        ones = call(aten.ones_like.default, size, before=before, dtype=torch.int64)
        places = call(aten.sub.Tensor, call(aten.cumsum.default, ones, 1, before=before), 1, before=before)

        def grouped(node: fx.Node) -> fx.Node:
            part = call(aten.slice.Tensor, node, 1, first, end, before=before)
            return call(aten.reshape.default, part, [-1, (end - first) // groups, *node.meta["val"].shape[2:]],
                        before=before)  # fmt: skip

        def whole(node: fx.Node, source: fx.Node) -> fx.Node:
            _, left, *rest = node.meta["val"].shape
            middle = call(aten.reshape.default, node, [-1, groups * left, *rest], before=before)
            front = [call(aten.slice.Tensor, source, 1, 0, first, before=before)] if first else []
            back = [call(aten.slice.Tensor, source, 1, end, WHOLE, before=before)]
            back = back if back[0].meta["val"].shape[1] else []
            return call(aten.cat.default, [*front, middle, *back], 1, before=before)

        node = call(ops.merge_tokens(), *map(grouped, (at, size, metric)), count, [], None, goals, before=before)
        new, sizes, kept = (call(operator.getitem, node, k, before=before) for k in range(3))
        kept = call(ops.take(), grouped(places), 1, kept, before=before)
        found, sizes, kept = whole(new, at), whole(sizes, size), whole(kept, places)
        self.edit(at, found, kept).apply()
        self.sizes.append((found, sizes))

    def edit(self, at: fx.Node, new: fx.Node, kept: fx.Node, inside: frozenset[fx.Node] | None = None,
             first: bool = True) -> Shortening:  # fmt: skip
        """What lets readers of `at` read merged tokens."""
        tokens, front = self.tokens, leading(self.protected)
        inner = middle(self.protected)
        after = range(front, front + len(inner))
        fixed = {p: p for p in self.protected if p < front} | dict(zip(inner if first else after, after, strict=True))
        self.edits.append(Shortening(self.program, tokens.axes, tokens.axis, tokens.activations, fixed,
                                     at, new, kept, inside=inside))  # fmt: skip
        return self.edits[-1]

    def weigh(self) -> None:
        """Attention counts a merged token as often as it stands for; so do means and sums over the tokens."""
        current: fx.Node | None = None
        starts = dict(self.sizes)
        own = {node: sizes for edit, (_, sizes) in zip(self.edits, self.sizes, strict=True)
               for node in edit.inside or ()}  # branches may stand interleaved in the graph  # fmt: skip
        for node in list(self.program.graph.nodes):
            current = own.get(node) if own else starts.get(node, current)
            if current is None or node not in self.tokens.axes.values or node.op != "call_function":
                continue
            name = operator_name(node)
            if name == "scaled_dot_product_attention":
                weight = self._size_of(arguments(node)["key"], current, node)
                if weight is not None:
                    self._bias(node, weight)
            elif name in REDUCTIONS and any(map(self._span, self.tokens.axes.mixed(node))):
                weight = self._size_of(arguments(node)["self"], current, node)
                if weight is not None:
                    self._weighted(node, name, weight)
        erase_dead(self.program.graph)

    def _span(self, dim: Dim) -> Dim | None:
        """The dimension of tokens, or of a slice of them, that this one is made of."""
        return next((s for s in (e.span(dim) for e in self.edits) if s is not None), None)

    def _size_of(self, node: fx.Node, size: fx.Node, before: fx.Node) -> fx.Node | None:
        """Sizes of the tokens that a tensor carries if it does as they are after the merge; a mask may be as it was."""
        spans = {s: ends for e in self.edits for s, ends in e.spans.items()}
        count, value = expression(size.meta["val"].shape[1]), node.meta["val"]
        for dim, n in zip(self.tokens.axes.of(node), value.shape, strict=True):
            first, last = spans.get(self._span(dim) or (), (0, 0))
            if self._span(dim) is not None and expression(n) == count - first - last:
                whole = not first and not last
                return size if whole else self.program.call(aten.slice.Tensor, size, 1, first, -last or WHOLE,
                                                            before=before)  # fmt: skip
        return None

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
        places = [k for k, d in enumerate(self.tokens.axes.of(source)) if self._span(d)]
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
