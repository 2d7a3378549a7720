"""Operators on tokens: what a merge or a choice of tokens reads and writes."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import fx

from ...passes import token_ops
from ..base import Extent, Region
from .layout import Access, contiguous, expression
from .regions import computed
from .rules import name_of
from .values import KINDS, Unsupported, bound, dense

NAMES = ("merge_tokens", "best_tokens")


@dataclass
class Best:
    """The best tokens of each sample.

    Attributes:
        tensors: of the parameters: the scores, then the chosen places.
        score: walk of [batch, tokens].
        batch: number of samples.
        tokens: number of scores.
        chosen: number of results.
        protected: places that are always chosen; those below zero are counted from the last token.
        made: the number of results as an extent, if it is symbolic.
    """

    tensors: list[torch.Tensor]
    score: Access
    batch: sympy.Expr
    tokens: sympy.Expr
    chosen: sympy.Expr
    protected: tuple[int, ...]
    made: dict[sympy.Expr, Extent] = field(default_factory=dict)

    @property
    def flops(self) -> int:
        """Comparisons of one call, 0 if sizes are symbolic."""
        count = self.batch * self.tokens * self.tokens
        return int(count) if count.is_Integer else 0


@dataclass
class Merge:
    """A token merging over [batch, tokens, features] with a metric of its own number of features.

    Attributes:
        tensors: of the parameters: inputs, then outputs.
        input, size, metric: walks of [batch, tokens(, features)].
        valid: the walk of [batch, tokens], None without padding.
        outputs: positions of the parameters for the four results; None for one that nobody reads.
        batch: number of samples.
        tokens: before.
        left: after.
        features: of a token.
        compared: features of the metric.
        protected: places of tokens that stay alone; those below zero are counted from the last token.
        made: the number of tokens after as an extent, if it is symbolic.
    """

    tensors: list[torch.Tensor]
    input: Access
    size: Access
    metric: Access
    valid: Access | None
    outputs: tuple[int | None, ...]
    batch: sympy.Expr
    tokens: sympy.Expr
    left: sympy.Expr
    features: int
    compared: int
    protected: tuple[int, ...]
    made: dict[sympy.Expr, Extent] = field(default_factory=dict)

    @property
    def even(self) -> sympy.Expr:
        """Tokens at even places."""
        return (self.tokens + 1) // 2

    @property
    def odd(self) -> sympy.Expr:
        """Tokens at odd places."""
        return self.tokens // 2

    @property
    def flops(self) -> int:
        """Floating point operations of one call, 0 if sizes are symbolic."""
        count = 2 * self.batch * (self.even * self.odd * self.compared + self.tokens * self.features)
        return int(count) if count.is_Integer else 0


def claims(region: Region) -> bool:
    """Whether a merge or a choice of tokens is in the region."""
    return any(name_of(n) in NAMES for n in region.nodes)


def plan(region: Region) -> Best | Merge:
    """The choice, or the merge with the nodes that take its results apart. Raises Unsupported with the reason."""
    root, *rest = region.nodes
    if name_of(root) == "best_tokens":
        if rest:
            raise Unsupported("a choice of tokens together with other operators")
        return _best(region, root)
    parts = [n for n in rest if n.target is operator.getitem and n.args[0] is root]
    if name_of(root) != "merge_tokens" or root in region.outputs or len(parts) < len(rest):
        raise Unsupported("a merge of tokens together with other operators")
    return _merge(region, root, {n: n.args[1] for n in parts})


def _walk(region: Region, node: fx.Node, kind: str = "float32") -> Access:
    """How an input of the region is walked by its own dimensions."""
    value = dense(node)
    if node not in region.inputs or KINDS.get(value.dtype) != kind:
        raise Unsupported(f"{node.name} is computed here, or of {value.dtype}")
    return Access(region.inputs.index(node), [expression(s) for s in value.stride()], sympy.Integer(0))


def _outputs(region: Region) -> list[torch.Tensor]:
    tensors = [dense(n) for n in region.outputs]
    if not all(map(contiguous, tensors)):
        raise Unsupported("a result that is not contiguous")
    return tensors


def _best(region: Region, root: fx.Node) -> Best:
    given = bound(root)
    (batch, tokens), chosen = given["score"].meta["val"].shape, expression(root.meta["val"].shape[1])
    tensors = [*(n.meta["val"] for n in region.inputs), *_outputs(region)]
    made = computed(region, given["score"], chosen, lambda n: token_ops.chosen(
        n, given["count"], given["protected"], given["divisor"]))  # fmt: skip
    protected = tuple(sorted({*given["protected"]}))
    return Best(tensors, _walk(region, given["score"]), expression(batch), expression(tokens), chosen, protected, made)


def _merge(region: Region, root: fx.Node, parts: dict[fx.Node, Any]) -> Merge:
    given, outputs = bound(root), region.outputs
    (batch, tokens, features), compared = given["input"].meta["val"].shape, given["metric"].meta["val"].shape[2]
    left = expression(root.meta["val"][0].shape[1])
    if not isinstance(features, int) or not isinstance(compared, int):
        raise Unsupported("a number of features that is known at run time only")
    if any(not isinstance(p, int) for p in parts.values()) or len({*parts.values()}) < len(parts):
        raise Unsupported("a merge with results taken twice")
    if given["goals"]:
        raise Unsupported("a merge into chosen places")
    position = {parts[n]: len(region.inputs) + k for k, n in enumerate(outputs)}
    if not left.is_Integer and position.keys() <= {3}:
        raise Unsupported("a merge of which only the places are read")  # kernels have the size from the others
    valid = None if given["valid"] is None else _walk(region, given["valid"], "bool")
    tensors = [*(n.meta["val"] for n in region.inputs), *_outputs(region)]
    made = computed(region, given["input"], left, lambda n: n - token_ops.merged(
        n, given["count"], given["protected"], valid is not None))  # fmt: skip
    return Merge(
        tensors, _walk(region, given["input"]), _walk(region, given["size"]), _walk(region, given["metric"]), valid,
        tuple(map(position.get, range(4))), expression(batch), expression(tokens), left, features, compared,
        tuple(sorted({*given["protected"]})), made,
    )  # fmt: skip
