"""Quality: what a lossy rewrite may cost, and how answers are compared when there are no labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..passes.verify import agreement


@dataclass(frozen=True)
class Quality:
    """The quality budget.

    Attributes:
        max_drop: largest accepted drop of the metric below that of the original program, on average over the batches.
        metric: from flat outputs to a number, higher is better; None compares with the original's outputs.
    """

    max_drop: float = 0.0
    metric: Callable[[Sequence[Any]], float] | None = None


@dataclass(frozen=True)
class Score:
    """What a rewritten program's answers are worth: the metric's value, and how far below the original's it lies."""

    value: float
    drop: float


def score(
    original: Callable[[Sequence[Any]], Sequence[Any]],
    rewritten: Callable[[Sequence[Any]], Sequence[Any]],
    batches: Sequence[Sequence[Any]],
    metric: Callable[[Sequence[Any]], float] | None = None,
) -> Score:
    """The mean score of a rewritten program over batches of flat inputs.

    Args:
        original: runs the original program.
        rewritten: runs the rewritten one.
        batches: flat inputs.
        metric: as in `Quality`; None scores the agreement with the original's answers, whose own score is 1.

    Raises:
        ValueError: without a metric, a result has another shape than the original's.
    """
    values, drops = [], []
    for batch in batches:
        found, wanted = rewritten(batch), original(batch)
        if metric is not None:
            values.append(float(metric(found)))
            drops.append(float(metric(wanted)) - values[-1])
            continue
        for a, b in zip(found, wanted, strict=True):
            if isinstance(b, torch.Tensor) and a.shape != b.shape:
                raise ValueError(f"a result of shape {list(b.shape)} becomes {list(a.shape)}")
        values.append(agreement(found, wanted))
        drops.append(1.0 - values[-1])
    return Score(sum(values) / len(values), sum(drops) / len(drops))
