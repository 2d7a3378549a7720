"""Near regions: what won where a region with the same operators and not quite the same sizes was tried before.

A model whose layers all have other sizes, such as one that merges tokens in each block, would otherwise try every
candidate for every layer. Which schedule is fast changes slowly with the sizes: the first few of the nearest trial will
do. They are checked and timed as always, so a bad guess costs speed and nothing else.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from .trial import REFEREE, Trial

FACTOR = 1.5  # sizes that differ by no more are near
TRIED = 3  # candidates that are tried where a near trial is known
KEPT = 16  # trials of one kind that are remembered
_SIZE = re.compile(r"(?<![\w.+-])\d+(?![\w.])")  # whole numbers that are no part of a name or of another number

Json = Any


def kind_of(text: str) -> tuple[str, list[int]]:
    """A region's print with a placeholder for every size, and the sizes."""
    return _SIZE.sub("#", text), [int(n) for n in _SIZE.findall(text)]


def winners(stored: Json, sizes: Sequence[int]) -> list[str]:
    """Labels of the candidates to try, by the nearest of the stored trials; none if no trial is near, or not ours."""
    try:
        known = [(_distance(found, sizes), list(map(str, labels))) for found, labels in stored or ()]
    except (TypeError, ValueError):
        return []
    distance, labels = min(known, default=(math.inf, []))
    return labels[:TRIED] if distance < math.inf else []


def _distance(found: Sequence[int], sizes: Sequence[int]) -> float:
    """The sum of the logarithms of all ratios; infinite if one of them is above the factor."""
    if len(found) != len(sizes):
        return math.inf
    pairs = [(min(a, b), max(a, b)) for a, b in zip(found, sizes, strict=True) if a != b]
    if any(low < 1 or high > FACTOR * low for low, high in pairs):
        return math.inf
    return sum(math.log(high / low) for low, high in pairs)


def with_trial(stored: Json, sizes: Sequence[int], trial: Trial) -> Json:
    """The stored trials and this one, as plain JSON."""
    labels = sorted(trial.rivals.keys() - {REFEREE}, key=trial.rivals.__getitem__)
    return [*(stored if isinstance(stored, list) else []), [list(sizes), labels[:TRIED]]][-KEPT:]
