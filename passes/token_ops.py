"""Operators on tokens: which are alike, what they become together, and taking chosen ones.

Bipartite soft matching follows Bolya et al., "Token Merging: Your ViT But Faster" (2023).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

TAKE = "take(Tensor input, int dim, Tensor index) -> Tensor"
MERGE = (
    "merge_tokens(Tensor input, Tensor size, Tensor metric, int count, int[] protected, Tensor? valid=None)"
    " -> (Tensor, Tensor, Tensor)"
)
BEST = "best_tokens(Tensor score, int count, int[] protected) -> Tensor"


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


def merged(tokens: Any, count: Any, protected: Sequence[int]) -> Any:
    """How many of so many tokens are merged away when `count` are asked for: at most half of those not protected."""
    return torch.sym_max(0, torch.sym_min(count, (tokens - len(protected)) // 2))


def merge_tokens(input: torch.Tensor, size: torch.Tensor, metric: torch.Tensor, count: int, protected: Sequence[int],
                 valid: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Merge the most similar pairs of tokens.

    Tokens at even places look for the most similar one at odd places; the `count` with the best match become one with
    it, the mean weighted by size. The others keep their order.

    Args:
        input: [batch, tokens, features].
        size: how many original tokens each stands for, [batch, tokens] float32.
        metric: what similarity is the cosine of, [batch, tokens, any].
        count: tokens to merge away, clamped to half of those that are not protected.
        protected: places of tokens that stay alone.
        valid: False for padding, [batch, tokens]; padding and real tokens are never merged.

    Returns:
        The tokens, their sizes, and the place that each had (of a merged pair, the odd one's).
    """
    batch, tokens, _ = input.shape
    places = torch.arange(tokens, device=input.device).expand(batch, tokens)
    gone = int(merged(tokens, count, protected))
    if gone == 0:
        return input.clone(), size.clone(), places.clone()
    source, target = _pairs(metric, gone, protected, valid)
    stays = torch.ones_like(places, dtype=torch.bool).scatter(1, source, False)
    place = stays.cumsum(1) - 1
    place = place.scatter(1, source, place.gather(1, target))
    left = tokens - gone
    total = size.new_zeros(batch, left).scatter_add(1, place, size)
    weighted = input.to(torch.float32) * size[..., None]
    sums = weighted.new_zeros(batch, left, input.shape[2]).scatter_add(
        1, place[..., None].expand_as(weighted), weighted
    )
    kept = torch.where(stays, places, tokens).sort(1).values[:, :left]
    return (sums / total[..., None]).to(input.dtype), total, kept


def _pairs(metric: torch.Tensor, gone: int, protected: Sequence[int],
           valid: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Places of the tokens that are merged away, and of those that they become part of."""
    metric = metric.to(torch.float32)
    unit = metric / metric.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    scores = unit[:, ::2] @ unit[:, 1::2].transpose(1, 2)
    for place in protected:
        (scores[:, place // 2] if place % 2 == 0 else scores[:, :, place // 2]).fill_(-torch.inf)
    if valid is not None:
        scores.masked_fill_(valid[:, ::2, None] != valid[:, None, 1::2], -torch.inf)
    best, partner = scores.max(-1)
    order = best.sort(dim=1, descending=True, stable=True).indices[:, :gone]
    return 2 * order, 2 * partner.gather(1, order) + 1


def merge_shapes(input: torch.Tensor, size: torch.Tensor, metric: torch.Tensor, count: int, protected: Sequence[int],
                 valid: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """The shapes of `merge_tokens`."""
    batch, tokens, features = input.shape
    left = tokens - merged(tokens, count, protected)
    return (input.new_empty(batch, left, features), size.new_empty(batch, left),
            input.new_empty(batch, left, dtype=torch.int64))  # fmt: skip


def best_tokens(score: torch.Tensor, count: int, protected: Sequence[int]) -> torch.Tensor:
    """Places of the `count` tokens of the highest score, and of protected ones, in order: [batch, chosen]."""
    score = score.to(torch.float32).clone()
    score[:, list(protected)] = torch.inf
    order = score.sort(dim=1, descending=True, stable=True).indices  # of equal scores the first place wins
    return order[:, : count + len(protected)].sort(1).values


def best_shape(score: torch.Tensor, count: int, protected: Sequence[int]) -> torch.Tensor:
    """The shape of `best_tokens`."""
    return score.new_empty(score.shape[0], torch.sym_min(count + len(protected), score.shape[1]), dtype=torch.int64)
