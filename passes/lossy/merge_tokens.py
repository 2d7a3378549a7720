"""Merge similar tokens between attention and feed-forward, block by block."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

from ..base import Context, Fidelity, Pass, Refusal
from ..grid import find_grid
from ..program import Program
from ..shorten import Stopped
from ..token_ops import merged
from ..tokens import Tokens, find_tokens, placed
from .merging import Merging
from .settings import run_within

DEFAULT = 8


@dataclass(frozen=True)
class MergeTokens(Pass):
    """Bipartite soft matching: after each attention the most similar tokens become one.

        add = x + attention(norm(x))                   size-weighted mean of the r best pairs of `add`
        norm(add)                              ->      norm(merged)
        ... attention(q, k, v)                         attention(q, k, v, log(size))

    Assumes that tokens may change places: an operator that tells them apart by place stops it by name. Positions and
    masks that carry the token axis are taken at the tokens that stay; padding is never merged with real tokens; tokens
    that are parameters stay alone and in front; means and sums over the tokens are weighted by size.

    Gives up the difference between tokens that are alike. Source: Bolya et al., "Token Merging: Your ViT But Faster"
    (2023); places of the result are in rising order, not [unmerged, destinations].

    Attributes:
        r: tokens to merge away in each block, as far as there are so many: one number; a float below one, the share of
            all tokens; a number for each block; or (number, slope) with a float, from number * (1 - slope) in the first
            block rising or falling linearly with that mean. None is 8; with a quality budget it is the largest number
            within the budget.
        flops: in place of r, the share of the program's operations that may be left.
        metric: what is compared: ``keys`` (mean over the heads) or ``features`` of the stream. None is the keys; the
            features with restore.
        restore: merge only what goes into each attention, and give every token the result of the one that it became
            part of, for models with a result for each token (Bolya and Hoffman, "Token Merging for Fast Stable
            Diffusion", 2023; here attention counts sizes, so that equal tokens merge without loss).
        windows: with restore, on tokens that are a grid: only the first token of each window of so many rows and
            columns takes others in, and all others look for the most similar one of these (as in that paper, without
            its random choice).
        protect: places of tokens that stay alone, those below zero counted from the last; None finds those that are
            parameters or are read by their place.
    """

    name: ClassVar[str] = "merge-tokens"
    fidelity: ClassVar[Fidelity] = Fidelity.LOSSY

    r: float | tuple[int, ...] | tuple[int, float] | None = None
    flops: float | None = None
    metric: str | None = None
    restore: bool = False
    windows: tuple[int, int] | None = None
    protect: tuple[int, ...] | None = None

    def space(self, program: Program, ctx: Context) -> Iterable[Self]:
        """Numbers of tokens, from few to so many that one in three is left in the middle of the network."""
        tokens = find_tokens(program) if self.r is None and self.flops is None else Refusal("given")
        if isinstance(tokens, Refusal):
            yield self
            return
        each = tokens.length / len(tokens.sites)
        yield from (replace(self, r=r) for r in sorted({max(1, round(each * k / 8)) for k in range(1, 11)}))

    def run(self, program: Program, ctx: Context) -> int | Refusal:
        """Rewrite `program`."""
        tokens = find_tokens(program)
        if isinstance(tokens, Refusal):
            return tokens
        goals = self._goals(tokens)
        if isinstance(goals, str):
            return Refusal(goals)
        length = tokens.sites[0].at.meta["val"].shape[1]
        kept = tokens.protected if self.protect is None else placed(self.protect, length)
        if self.flops is not None:
            if self.r is not None:
                return Refusal("r and flops are given, one of them would do")
            most = int(merged(tokens.length, tokens.length, kept, False, goals))
            settings = [replace(self, r=r, flops=None) for r in range(1, max(1, most) + 1)]
            return run_within(self.flops, settings, program, ctx)
        counts = amounts(DEFAULT if self.r is None else self.r, len(tokens.sites), tokens.length)
        if (reason := self._reason_against(tokens, kept, counts, goals)) is not None or isinstance(counts, str):
            return Refusal(reason or str(counts))
        edit = Merging(program, tokens, kept)
        try:
            for site, count in zip(tokens.sites, counts, strict=True):
                if count and self.restore:
                    edit.around(site, count, goals)
                elif count:
                    edit.after(site, count, self.metric or "keys")
            edit.weigh()
        except Stopped as stop:
            return Refusal.at(stop.node, str(stop))
        return sum(c > 0 for c in counts)

    def _goals(self, tokens: Tokens) -> list[int] | str:
        """Places that tokens may become part of, none without windows; or why there are no windows."""
        if self.windows is None:
            return []
        if not self.restore:
            return "windows of merged tokens are none: they need restore"
        if len(self.windows) != 2 or min(self.windows) < 1:
            return f"windows of {self.windows} tokens"
        grid = find_grid(tokens)
        if isinstance(grid, str):
            return grid
        if len(grid.sizes) != 2:
            return f"its tokens are a grid of {' x '.join(map(str, grid.sizes))}, not of rows and columns"
        return grid.corners(self.windows)

    def _reason_against(
        self, tokens: Tokens, kept: Sequence[int], counts: list[int] | str, goals: Sequence[int]
    ) -> str | None:
        if self.metric not in (None, "keys", "features") or (self.restore and self.metric == "keys"):
            return f"{self.metric!r} cannot be compared{' before attention' if self.restore else ''}"
        length = tokens.sites[0].at.meta["val"].shape[1]
        if isinstance(counts, str) or not isinstance(length, int):
            return None
        if not all(-length <= p < length for p in self.protect or ()):
            return f"tokens {self.protect} of {length} cannot be protected"
        most = merged(length, length, kept, False, goals) if goals else (length - len(kept)) // 2
        if max(counts) > most:
            return f"{max(counts)} of {length} tokens cannot be merged away, {len(kept)} are protected"
        return None


def amounts(r: float | Sequence[float], layers: int, tokens: int = 0) -> list[int] | str:
    """Tokens to merge away in each layer of so many tokens, or what is wrong with `r`."""
    if isinstance(r, (int, float)):
        found = [r if isinstance(r, int) else int(r * tokens)] * layers
    elif len(r) == 2 and isinstance(r[1], float):
        first = int(r[0] * (1.0 - r[1]))
        last, steps = 2 * int(r[0]) - first, max(1, layers - 1)
        found = [int(first + (last - first) * k / steps) for k in range(layers)]
    else:
        if len(r) > layers:
            return f"{len(r)} numbers of tokens for {layers} attention layers"
        found = [*map(int, r), *[0] * (layers - len(r))]
    return "a negative number of tokens" if any(c < 0 for c in found) else found
