"""Operators on tokens: which are alike, what they become together, and taking chosen ones.

Bipartite soft matching follows Bolya et al., "Token Merging: Your ViT But Faster" (2023).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import sympy
import torch
from torch.utils._sympy.value_ranges import ValueRanges

TAKE = "take(Tensor input, int dim, Tensor index) -> Tensor"
MERGE = (
    "merge_tokens(Tensor input, Tensor size, Tensor metric, int count, int[] protected, Tensor? valid=None,"
    " int[] goals=[]) -> (Tensor, Tensor, Tensor, Tensor)"
)
BEST = "best_tokens(Tensor score, int count, int[] protected, int divisor=0) -> Tensor"
APART = -2.0  # the similarity of tokens that may not merge: below every cosine, above that of protected tokens


def take(input: torch.Tensor, dim: int, index: torch.Tensor) -> torch.Tensor:
    """Elements along a dimension, chosen anew in each sample: index is [batch, chosen], input [batch or 1, ...]."""
    shape = [index.shape[0], *input.shape[1:]]
    shape[dim] = index.shape[1]
    view = [index.shape[0], *[1] * (input.dim() - 1)]
    view[dim] = index.shape[1]
    return input.expand(index.shape[0], *input.shape[1:]).gather(dim, index.view(view).expand(shape))


def take_shape(input: torch.Tensor, dim: int, index: torch.Tensor) -> torch.Tensor:
    """The shape of `take`."""
    shape = [index.shape[0], *input.shape[1:]]
    shape[dim] = index.shape[1]
    return input.new_empty(shape)


def own_size(size: Any) -> Any:
    """A symbol for a size that an operator computes: the same computation gets the same symbol.

    Spelled out, a number of tokens names the one before it three times: twelve merges in a row would print as half a
    million terms. Numbers, symbols, and sizes without an example stay as they are. Adds no guard.
    """
    if not isinstance(size, torch.SymInt) or size.node.expr.is_Symbol or not size.node.has_hint():
        return size
    formula, env = size.node.expr, size.node.shape_env
    digest = int(hashlib.sha256(str(formula).encode()).hexdigest(), 16)
    symbol = sympy.Symbol(f"s{digest % 10**9}", integer=True, positive=True)
    if symbol not in env.var_to_range:
        # as tracing does with inputs: at least 2, so that nothing takes it for the size of a broadcast dimension
        limits = env.bound_sympy(formula)
        env.var_to_range[symbol] = ValueRanges(2, sympy.Max(2, limits.upper))
        env.backed_var_to_val[symbol] = sympy.Max(2, size.node.hint)
    return env.create_symintnode(symbol, hint=None)


def merged(tokens: Any, count: Any, protected: Sequence[int], padded: bool, goals: Sequence[int] = ()) -> Any:
    """How many of so many tokens are merged away when `count` are asked for.

    At most half of those that are not protected, and as many as there are at even places (of protected ones that are
    counted from the end, as many as can be are taken to be at even places); one less with padding, so that a token
    which may merge with none can stay. With `goals`, all others may go, as long as one goal is free.
    """
    if goals:
        alone, ends = ({p % tokens for p in places} for places in (protected, goals))
        return max(0, min(count, tokens - len(alone | ends))) if ends - alone else 0
    behind = [p % 2 for p in protected if p < 0]
    even = sum(p % 2 == 0 for p in protected if p >= 0) + max(sum(behind), len(behind) - sum(behind)) + padded
    # of the two bounds the lower one, which is the same for all numbers of tokens: a symbolic one is written once
    most = (tokens - len(protected)) // 2 if 2 * even <= len(protected) + 1 else (tokens + 1) // 2 - even
    return torch.sym_max(0, torch.sym_min(count, most))


def merge_tokens(input: torch.Tensor, size: torch.Tensor, metric: torch.Tensor, count: int, protected: Sequence[int],
                 valid: torch.Tensor | None = None,
                 goals: Sequence[int] = ()) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """Merge the most similar pairs of tokens.

    Tokens at even places look for the most similar one at odd places; the `count` with the best match become one with
    it, the mean weighted by size. With `goals`, all other tokens look for the most similar one of these (Bolya and
    Hoffman, "Token Merging for Fast Stable Diffusion", 2023). Tokens that stay keep their order. Similarity is computed
    in float64 and rounded to float32: no other order of the sum gives another choice, and duplicates tie. Of equal ones
    the first is taken.

    Args:
        input: [batch, tokens, features].
        size: how many original tokens each stands for, [batch, tokens] float32.
        metric: what similarity is the cosine of, [batch, tokens, any].
        count: tokens to merge away, clamped as `merged` says.
        protected: places of tokens that stay alone; those below zero are counted from the last token.
        valid: False for padding, [batch, tokens]; padding and real tokens are never merged.
        goals: places that tokens may become part of; none means the odd ones.

    Returns:
        The tokens, their sizes, the place that each had (of merged ones, the goal's), and for each token of the input
        its place in the result.

    Raises:
        ValueError: goals together with padding, for which there may be no goal of its kind.
    """
    batch, tokens, _ = input.shape
    if goals and valid is not None:
        raise ValueError("tokens cannot be merged into chosen places where some of them are padding")
    places = torch.arange(tokens, device=input.device).expand(batch, tokens)
    gone = int(merged(tokens, count, protected, valid is not None, goals))
    if gone == 0:
        return input.clone(), size.clone(), places.clone(), places.clone()
    source, target = _pairs(metric, gone, protected, valid, goals)
    stays = torch.ones_like(places, dtype=torch.bool).scatter(1, source, False)
    place = stays.cumsum(1) - 1
    place = place.scatter(1, source, place.gather(1, target))
    left = tokens - gone
    total = size.new_zeros(batch, left).scatter_add(1, place, size)
    weighted = input.to(torch.float32) * (size / total.gather(1, place))[..., None]
    means = weighted.new_zeros(batch, left, input.shape[2]).scatter_add(
        1, place[..., None].expand_as(weighted), weighted
    )
    kept = torch.where(stays, places, tokens).sort(1).values[:, :left]
    return means.to(input.dtype), total, kept, place


def _pairs(metric: torch.Tensor, gone: int, protected: Sequence[int], valid: torch.Tensor | None,
           goals: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Places of the tokens that are merged away, and of those that they become part of."""
    every, alone = torch.arange(metric.shape[1], device=metric.device), metric.new_zeros(metric.shape[1])
    alone = alone.bool().index_fill(0, every[list(protected)], True)
    is_goal = every % 2 == 1
    if goals:
        is_goal = torch.zeros_like(is_goal).index_fill(0, every[list(goals)], True)
    sources, targets = every[~is_goal], every[is_goal]
    metric = metric.to(torch.float64)
    unit = metric / metric.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    scores = (unit[:, sources] @ unit[:, targets].transpose(1, 2)).to(torch.float32)
    scores.masked_fill_(scores.isnan() | alone[targets], APART)
    if valid is not None:
        scores.masked_fill_(valid[:, sources, None] != valid[:, None, targets], APART)
    best, partner = scores.max(-1)
    best = best.masked_fill(alone[sources], -torch.inf)
    order = best.sort(dim=1, descending=True, stable=True).indices[:, :gone]
    return sources[order], targets[partner.gather(1, order)]


def merge_shapes(input: torch.Tensor, size: torch.Tensor, metric: torch.Tensor, count: int, protected: Sequence[int],
                 valid: torch.Tensor | None = None,
                 goals: Sequence[int] = ()) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """The shapes of `merge_tokens`."""
    batch, tokens, features = input.shape
    left = own_size(tokens - merged(tokens, count, protected, valid is not None, goals))
    kept, places = (input.new_empty(batch, n, dtype=torch.int64) for n in (left, tokens))
    return input.new_empty(batch, left, features), size.new_empty(batch, left), kept, places


def chosen(tokens: Any, count: int, protected: Sequence[int], divisor: int) -> Any:
    """How many of so many tokens are chosen: `count`, or this part of a `divisor` of those that are not protected."""
    free = tokens - len(protected)
    wanted = (free * count + divisor - 1) // divisor if divisor else count
    return torch.sym_min(wanted, free) + len(protected)


def best_tokens(score: torch.Tensor, count: int, protected: Sequence[int], divisor: int = 0) -> torch.Tensor:
    """Places of the tokens of the highest score, and of protected ones, in order: [batch, chosen].

    Args:
        score: [batch, tokens]; NaN counts as the lowest.
        count: tokens to choose besides the protected ones, as far as there are so many.
        protected: places; those below zero are counted from the last token.
        divisor: choose count / divisor of the tokens that are not protected, rounded up; 0 takes `count` as it is.
    """
    score = score.to(torch.float32)
    score = torch.where(score.isnan(), -torch.inf, score)
    score[:, list(protected)] = torch.inf
    order = score.sort(dim=1, descending=True, stable=True).indices  # of equal scores the first place wins
    return order[:, : int(chosen(score.shape[1], count, protected, divisor))].sort(1).values


def best_shape(score: torch.Tensor, count: int, protected: Sequence[int], divisor: int = 0) -> torch.Tensor:
    """The shape of `best_tokens`."""
    places = own_size(chosen(score.shape[1], count, protected, divisor))
    return score.new_empty(score.shape[0], places, dtype=torch.int64)
