"""Operators on tokens: what a merge or a choice of tokens reads and writes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from ..base import Region
from .layout import Access, contiguous, expression
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
        protected: places that are always chosen.
    """

    tensors: list[torch.Tensor]
    score: Access
    batch: sympy.Expr
    tokens: int
    chosen: int
    protected: tuple[int, ...]

    @property
    def flops(self) -> int:
        """Comparisons of one call, 0 if the batch is symbolic."""
        return int(self.batch) * self.tokens * self.tokens if self.batch.is_Integer else 0


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
        protected: places of tokens that stay alone.
    """

    tensors: list[torch.Tensor]
    input: Access
    size: Access
    metric: Access
    valid: Access | None
    outputs: tuple[int | None, ...]
    batch: sympy.Expr
    tokens: int
    left: int
    features: int
    compared: int
    protected: tuple[int, ...]

    @property
    def even(self) -> int:
        """Tokens at even places."""
        return (self.tokens + 1) // 2

    @property
    def odd(self) -> int:
        """Tokens at odd places."""
        return self.tokens // 2

    @property
    def flops(self) -> int:
        """Floating point operations of one call, 0 if the batch is symbolic."""
        if not self.batch.is_Integer:
            return 0
        return 2 * int(self.batch) * (self.even * self.odd * self.compared + self.tokens * self.features)


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
    if name_of(root) != "merge_tokens" or root in region.outputs:
        raise Unsupported("a merge of tokens together with other operators")
    return _merge(region, root, {n: n.args[1] for n in rest})


def _walk(region: Region, node: fx.Node, kind: str = "float32") -> Access:
    """How an input of the region is walked by its own dimensions."""
    value = dense(node)
    if node not in region.inputs or KINDS.get(value.dtype) != kind:
        raise Unsupported(f"{node.name} is computed here, or of {value.dtype}")
    return Access(region.inputs.index(node), [expression(s) for s in value.stride()], sympy.Integer(0))


def _static(*sizes: Any) -> None:
    if not all(isinstance(s, int) and s > 0 for s in sizes):
        raise Unsupported("a number of tokens or features that is known at run time only")


def _outputs(region: Region) -> list[torch.Tensor]:
    tensors = [dense(n) for n in region.outputs]
    if not all(map(contiguous, tensors)):
        raise Unsupported("a result that is not contiguous")
    return tensors


def _best(region: Region, root: fx.Node) -> Best:
    given = bound(root)
    (batch, tokens), chosen = given["score"].meta["val"].shape, root.meta["val"].shape[1]
    _static(tokens, chosen)
    tensors = [*(n.meta["val"] for n in region.inputs), *_outputs(region)]
    protected = tuple(sorted({p % tokens for p in given["protected"]}))
    return Best(tensors, _walk(region, given["score"]), expression(batch), tokens, chosen, protected)


def _merge(region: Region, root: fx.Node, parts: dict[fx.Node, Any]) -> Merge:
    given, outputs = bound(root), region.outputs
    (batch, tokens, features), compared = given["input"].meta["val"].shape, given["metric"].meta["val"].shape[2]
    left = root.meta["val"][0].shape[1]
    _static(tokens, features, compared, left)
    if tokens < 2 or any(not isinstance(p, int) for p in parts.values()) or len({*parts.values()}) < len(parts):
        raise Unsupported("a merge of less than two tokens, or with results taken twice")
    if given["goals"]:
        raise Unsupported("a merge into chosen places")
    position = {parts[n]: len(region.inputs) + k for k, n in enumerate(outputs)}
    valid = None if given["valid"] is None else _walk(region, given["valid"], "bool")
    tensors = [*(n.meta["val"] for n in region.inputs), *_outputs(region)]
    return Merge(
        tensors, _walk(region, given["input"]), _walk(region, given["size"]), _walk(region, given["metric"]), valid,
        tuple(map(position.get, range(4))), expression(batch), tokens, left, features, compared,
        tuple(sorted({p % tokens for p in given["protected"]})),
    )  # fmt: skip
