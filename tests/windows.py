"""Merging into the corners of windows of a grid, as a formula."""

from __future__ import annotations

from typing import Any

import torch


def by_formula(x: torch.Tensor, count: int, windows: tuple[int, int], grid: tuple[int, int], more: int = 0) -> Any:
    """The `count` tokens most similar to a corner of a window become part of it: tokens, sizes, where each went.

    Args:
        grid: rows and columns of the tokens after the first `more`, which stay alone.
    """
    found: list[tuple[Any, ...]] = []
    for sample in x:
        unit = sample / sample.norm(dim=-1, keepdim=True)
        rows, columns = grid
        goals = [more + r * columns + c for r in range(0, rows, windows[0]) for c in range(0, columns, windows[1])]
        others = [t for t in range(more, len(sample)) if t not in goals]
        best = {t: max(goals, key=lambda g: float(unit[t] @ unit[g])) for t in others}
        gone = sorted(others, key=lambda t: -float(unit[t] @ unit[best[t]]))[:count]
        left = [t for t in range(len(sample)) if t not in gone]
        groups = [[t, *(s for s in gone if best[s] == t)] for t in left]
        places = [left.index(best[t] if t in gone else t) for t in range(len(sample))]
        means = torch.stack([sample[g].mean(0) for g in groups])
        found.append((means, torch.tensor([float(len(g)) for g in groups]), places))
    return torch.stack([f[0] for f in found]), torch.stack([f[1] for f in found]), [f[2] for f in found]
