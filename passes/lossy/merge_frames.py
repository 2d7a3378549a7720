"""Merge similar tokens of a video: inside each frame, then between neighbouring frames."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar, Self

from ..base import Context, Fidelity, Pass, Refusal
from ..grid import Grid, find_frames
from ..program import Program
from ..shorten import Stopped
from ..tokens import Tokens, find_tokens, may_hide
from .merging import Merging

DEFAULT = 0.25


@dataclass(frozen=True)
class MergeFrames(Pass):
    """After one attention tokens of the same frame merge, after a later one tokens of neighbouring frames.

        add = x + attention(norm(x))           ->      merged, with the patches of each frame as a batch of their own
        norm(add)                              ->      norm(merged)
        ... attention(q, k, v)                         attention(q, k, v, log(size))

    Inside a frame, patches at even places merge with those at odd places by bipartite soft matching. Of `window`
    neighbouring frames, the tokens of the first one take in the most similar ones of the others. What is compared are
    the keys, averaged over the heads; merged tokens count by their sizes, as in MergeTokens.

    Assumes that the tokens are the patches of all frames, frame by frame, with other tokens only in front or behind,
    and that they may change places afterwards. Gives up the difference between tokens that are alike. Sources: Shen et
    al., "TempMe: Video Temporal Token Merging for Efficient Text-Video Retrieval" (2024), which trains and merges clips
    step by step; Tao et al., "DyCoke: Dynamic Compression of Tokens for Fast Video Large Language Models" (2024), which
    compares tokens of neighbouring frames only (here: ratio = (0, share)).

    Attributes:
        ratio: share of the patches that are merged away in each step, or one for frames (at most a half) and one for
            windows (at most the part of all frames but the first). None is 0.25; with a quality budget it is the
            largest within the budget. 0 changes nothing.
        window: neighbouring frames that merge with each other.
        layers: attention layers after which the two steps are done, in rising order; None is the first one and the one
            in the middle.
    """

    name: ClassVar[str] = "merge-frames"
    fidelity: ClassVar[Fidelity] = Fidelity.LOSSY

    ratio: float | tuple[float, float] | None = None
    window: int = 2
    layers: tuple[int, int] | None = None

    def space(self, program: Program, ctx: Context) -> Iterable[Self]:
        """Shares, from little to much."""
        yield from [self] if self.ratio is not None else [replace(self, ratio=k / 20) for k in range(1, 11)]

    def run(self, program: Program, ctx: Context) -> int | Refusal:
        """Rewrite `program`."""
        tokens = find_tokens(program)
        if isinstance(tokens, Refusal):
            return tokens
        frames = find_frames(tokens)
        if isinstance(frames, str):
            return Refusal(frames)
        ratio = DEFAULT if self.ratio is None else self.ratio
        shares = ratio if isinstance(ratio, tuple) else (ratio, ratio)
        if not any(shares):
            return 0
        layers = (0, max(1, len(tokens.sites) // 2)) if self.layers is None else self.layers
        if (reason := self._reason_against(tokens, frames, shares, layers)) is not None:
            return Refusal(reason)
        masked = next((s.attention for s in tokens.sites if may_hide(program, s.mask)), None)
        if masked is not None:
            return Refusal.at(masked, "its mask hides tokens, which may have no partner of their kind")
        try:
            return self._merge(Merging(program, tokens, tokens.protected), frames, shares, layers)
        except Stopped as stop:
            return Refusal.at(stop.node, str(stop))

    def _reason_against(
        self, tokens: Tokens, frames: Grid, shares: tuple[float, float], layers: tuple[int, int]
    ) -> str | None:
        count, most = frames.sizes[0], (0.5, 1 - 1 / max(1, self.window))
        if len(shares) != 2 or any(not 0 <= s <= m for s, m in zip(shares, most, strict=True)):
            return f"{shares} cannot be merged away, at most {most[0]} of a frame and {most[1]:.2f} of a window"
        if self.window < 2 or count % self.window:
            return f"{count} frames are no windows of {self.window}"
        if not 0 <= layers[0] < layers[1] < len(tokens.sites):
            return f"layers {layers} of {len(tokens.sites)} attention layers"
        inside = [p for p in tokens.protected if frames.first <= p % tokens.length < frames.end]
        return f"tokens {inside} of the frames are read by their place" if inside else None

    def _merge(self, edit: Merging, frames: Grid, shares: tuple[float, float], layers: tuple[int, int]) -> int:
        """The number of steps that were done. Raises Stopped."""
        count, each = frames.sizes[0], (frames.end - frames.first) // frames.sizes[0]
        sites = edit.tokens.sites
        gone = int(shares[0] * each)
        if gone:
            edit.in_groups(sites[layers[0]], gone, count, (frames.first, frames.end), ())
        each -= gone
        across = int(shares[1] * self.window * each)
        if across:
            grid = frames.first, frames.first + count * each
            edit.in_groups(sites[layers[1]], across, count // self.window, grid, range(each))
        edit.weigh()
        return (gone > 0) + (across > 0)
