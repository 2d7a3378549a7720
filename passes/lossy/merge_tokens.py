"""Merge similar tokens between attention and feed-forward, block by block."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

from ..base import Context, Fidelity, Pass, Refusal
from ..program import Program
from ..shorten import Stopped
from ..tokens import find_tokens, placed
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
        r: tokens to merge away in each block, as far as there are so many: one number; a number for each block; or
            (number, slope) with a float, from number * (1 - slope) in the first block rising or falling linearly with
            that mean. None is 8; with a quality budget it is the largest number within the budget.
        flops: in place of r, the share of the program's operations that may be left.
        metric: what is compared: ``keys`` (mean over the heads) or ``features`` of the stream. None is the keys; the
            features with restore.
        restore: merge only what goes into each attention, and give every token the result of the one that it became
            part of, for models with a result for each token (Bolya and Hoffman, "Token Merging for Fast Stable
            Diffusion", 2023; here attention counts sizes, so that equal tokens merge without loss).
        protect: places of tokens that stay alone; None finds those that are parameters.
    """

    name: ClassVar[str] = "merge-tokens"
    fidelity: ClassVar[Fidelity] = Fidelity.LOSSY

    r: int | tuple[int, ...] | tuple[int, float] | None = None
    flops: float | None = None
    metric: str | None = None
    restore: bool = False
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
        if self.flops is not None:
            if self.r is not None:
                return Refusal("r and flops are given, one of them would do")
            most = max(1, (tokens.length - len(tokens.protected)) // 2)
            settings = [replace(self, r=r, flops=None) for r in range(1, most + 1)]
            return run_within(self.flops, settings, program, ctx)
        if self.metric not in (None, "keys", "features") or (self.restore and self.metric == "keys"):
            return Refusal(f"{self.metric!r} cannot be compared{' before attention' if self.restore else ''}")
        counts = amounts(DEFAULT if self.r is None else self.r, len(tokens.sites))
        if isinstance(counts, str):
            return Refusal(counts)
        length = tokens.sites[0].at.meta["val"].shape[1]
        static = isinstance(length, int)
        kept = tokens.protected if self.protect is None else placed(self.protect, length)
        if static and not all(-length <= p < length for p in self.protect or ()):
            return Refusal(f"tokens {self.protect} of {length} cannot be protected")
        if static and 2 * max(counts) > tokens.length - len(kept):
            return Refusal(f"{max(counts)} of {tokens.length} tokens cannot be merged away, {len(kept)} are protected")
        edit = Merging(program, tokens, kept)
        try:
            for site, count in zip(tokens.sites, counts, strict=True):
                if count and self.restore:
                    edit.around(site, count)
                elif count:
                    edit.after(site, count, self.metric or "keys")
            edit.weigh()
        except Stopped as stop:
            return Refusal.at(stop.node, str(stop))
        return sum(c > 0 for c in counts)


def amounts(r: int | Sequence[float], layers: int) -> list[int] | str:
    """Tokens to merge away in each layer, or what is wrong with `r`."""
    if isinstance(r, int):
        found = [r] * layers
    elif len(r) == 2 and isinstance(r[1], float):
        first = int(r[0] * (1.0 - r[1]))
        last, steps = 2 * int(r[0]) - first, max(1, layers - 1)
        found = [int(first + (last - first) * k / steps) for k in range(layers)]
    else:
        if len(r) > layers:
            return f"{len(r)} numbers of tokens for {layers} attention layers"
        found = [*map(int, r), *[0] * (layers - len(r))]
    return "a negative number of tokens" if any(c < 0 for c in found) else found
