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
from ..tokens import Tokens, find_local_tokens, find_tokens, placed
from .merging import Merging
from .settings import run_within

DEFAULT = 8
STEPS = 64  # shares that are tried


@dataclass(frozen=True)
class Plan:
    """What is merged: so many tokens at each site, into these places if any are named, but none of those kept."""

    counts: list[int]
    goals: list[int]
    kept: tuple[int, ...]


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
            Diffusion", 2023; here attention counts sizes, so that equal tokens merge without loss). Attentions need not
            be over the same tokens then, as in a U-Net; shares of them are what r should be there.
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
        groups = self._groups(program) if self.r is None and self.flops is None else Refusal("given")
        if isinstance(groups, Refusal):
            yield self
            return
        if len(groups) > 1:
            yield from (replace(self, r=k / 16) for k in range(1, 12))
            return
        each = groups[0].length / len(groups[0].sites)
        yield from (replace(self, r=r) for r in sorted({max(1, round(each * k / 8)) for k in range(1, 11)}))

    def run(self, program: Program, ctx: Context) -> int | Refusal:
        """Rewrite `program`."""
        groups = self._groups(program)
        if isinstance(groups, Refusal):
            return groups
        if self.flops is not None:
            if self.r is not None:
                return Refusal("r and flops are given, one of them would do")
            return run_within(self.flops, self._settings(groups), program, ctx)
        lengths = {site.attention: tokens.length for tokens in groups for site in tokens.sites}
        order = sorted(lengths)  # in which they are computed
        counts = amounts(DEFAULT if self.r is None else self.r, [lengths[n] for n in order])
        if isinstance(counts, str):
            return Refusal(counts)
        each = dict(zip(order, counts, strict=True))
        plans = []
        for tokens in groups:  # all of them first: a refusal leaves the program as it was
            plan = self._plan(tokens, [each[site.attention] for site in tokens.sites])
            if isinstance(plan, str):
                return Refusal(plan)
            plans.append(plan)
        try:
            for tokens, plan in zip(groups, plans, strict=True):
                self._merge(Merging(program, tokens, plan.kept), plan)
        except Stopped as stop:
            return Refusal.at(stop.node, str(stop))
        return sum(c > 0 for c in counts)

    def _groups(self, program: Program) -> list[Tokens] | Refusal:
        """The tokens of the stream; where there are none, with restore, those of each attention by itself."""
        tokens = find_tokens(program)
        if isinstance(tokens, Tokens):
            return [tokens]
        local = find_local_tokens(program) if self.restore else tokens
        return tokens if isinstance(local, Refusal) else local

    def _kept(self, tokens: Tokens) -> tuple[int, ...]:
        """Places of tokens that stay alone."""
        length = tokens.sites[0].at.meta["val"].shape[1]
        return tokens.protected if self.protect is None else placed(self.protect, length)

    def _settings(self, groups: list[Tokens]) -> list[Self]:
        """Numbers of tokens, or shares if there are several lengths, from the smallest to the largest."""
        room = [(tokens.length, max(1, self._most(tokens))) for tokens in groups]
        if len({length for length, _ in room}) > 1:
            steps = int(STEPS * min(most / length for length, most in room))
            return [replace(self, r=k / STEPS, flops=None) for k in range(1, max(1, steps) + 1)]
        return [replace(self, r=r, flops=None) for r in range(1, min(most for _, most in room) + 1)]

    def _most(self, tokens: Tokens) -> int:
        """How many tokens can be merged at a site."""
        goals = self._goals(tokens)
        return int(
            merged(tokens.length, tokens.length, self._kept(tokens), False, [] if isinstance(goals, str) else goals)
        )

    def _plan(self, tokens: Tokens, counts: list[int]) -> Plan | str:
        """What to merge at each site, or why that cannot be."""
        goals, kept = self._goals(tokens), self._kept(tokens)
        if isinstance(goals, str):
            return goals
        return self._reason_against(tokens, kept, counts, goals) or Plan(counts, goals, kept)

    def _merge(self, edit: Merging, plan: Plan) -> None:
        """Merge at each site. Raises Stopped."""
        for site, count in zip(edit.tokens.sites, plan.counts, strict=True):
            if count and self.restore:
                edit.around(site, count, plan.goals)
            elif count:
                edit.after(site, count, self.metric or "keys")
        edit.weigh()

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
        self, tokens: Tokens, kept: Sequence[int], counts: list[int], goals: Sequence[int]
    ) -> str | None:
        if self.metric not in (None, "keys", "features") or (self.restore and self.metric == "keys"):
            return f"{self.metric!r} cannot be compared{' before attention' if self.restore else ''}"
        length = tokens.sites[0].at.meta["val"].shape[1]
        if not isinstance(length, int):
            return None
        if not all(-length <= p < length for p in self.protect or ()):
            return f"tokens {self.protect} of {length} cannot be protected"
        most = merged(length, length, kept, False, goals) if goals else (length - len(kept)) // 2
        if max(counts) > most:
            return f"{max(counts)} of {length} tokens cannot be merged away, {len(kept)} are protected"
        return None


def amounts(r: float | Sequence[float], lengths: Sequence[int]) -> list[int] | str:
    """Tokens to merge away in each layer, given how many each has at first, or what is wrong with `r`."""
    layers = len(lengths)
    if isinstance(r, (int, float)):
        found = [r if isinstance(r, int) else int(r * length) for length in lengths]
    elif len(r) == 2 and isinstance(r[1], float):
        first = int(r[0] * (1.0 - r[1]))
        last, steps = 2 * int(r[0]) - first, max(1, layers - 1)
        found = [int(first + (last - first) * k / steps) for k in range(layers)]
    else:
        if len(r) > layers:
            return f"{len(r)} numbers of tokens for {layers} attention layers"
        found = [*map(int, r), *[0] * (layers - len(r))]
    return "a negative number of tokens" if any(c < 0 for c in found) else found
