"""Quality: what a lossy rewrite may cost, and how answers are compared when there are no labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Quality:
    """The quality budget.

    Attributes:
        max_drop: largest accepted drop of the metric below that of the original program.
        metric: from flat outputs to a number, higher is better; None compares with the original's outputs.
    """

    max_drop: float = 0.0
    metric: Callable[[Sequence[Any]], float] | None = None


def agreement(found: Sequence[Any], wanted: Sequence[Any]) -> float:
    """Mean cosine similarity of floating point outputs, averaged over the last dimension's rows; 1 is equal.

    Integer and boolean outputs count by the share of equal elements. Rows that are equal count 1, also zero rows.
    """
    scores = []
    for a, b in zip(found, wanted, strict=True):
        if not isinstance(b, torch.Tensor) or b.numel() == 0:
            continue
        if not b.is_floating_point():
            scores.append(float((a == b).double().mean()))
            continue
        rows_a, rows_b = (t.double().nan_to_num().reshape(-1, t.shape[-1] if t.dim() else 1) for t in (a, b))
        cosine = torch.nn.functional.cosine_similarity(rows_a, rows_b, dim=-1)
        scores.append(float(torch.where((rows_a == rows_b).all(-1), 1.0, cosine).mean()))
    return sum(scores) / len(scores) if scores else 1.0
