"""Fewer tokens in the middle of the network only: an hourglass."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar, Self

from torch import fx

from .. import ops
from ..base import Context, Fidelity, Pass, Refusal
from ..program import Program
from ..shorten import Stopped
from ..tokens import Tokens, find_tokens, valid_tokens
from .merging import Merged, Merging

DEFAULT = 0.5


@dataclass(frozen=True)
class PruneAndRestore(Pass):
    """Between two attention layers every group of similar tokens is one; then each token is itself again.

        x                         ->      y = merged x
        blocks of x               ->      blocks of y
        x'                        ->      x + (y' - y)[group of each token]

    Groups come from bipartite soft matching, repeated until few enough are left. A token gets back the difference to
    its group that it had, and takes over what the blocks added to the group. After Li et al., "Hourglass Tokenizer for
    Efficient Transformer-Based 3D Human Pose Estimation" (2024), whose recovery is trained; this one is not.

    Assumes that the middle blocks treat similar tokens alike. Gives up what they would have told apart.

    Attributes:
        keep: share of the tokens, or their number, in the middle. None is a half; with a quality budget it is the
            smallest share within the budget.
        start: attention layer before which tokens are merged; None is a quarter of the layers.
        stop: attention layer before which all tokens are back; None is three quarters of the layers.
    """

    name: ClassVar[str] = "prune-and-restore"
    fidelity: ClassVar[Fidelity] = Fidelity.LOSSY

    keep: float | int | None = None
    start: int | None = None
    stop: int | None = None

    def space(self, program: Program, ctx: Context) -> Iterable[Self]:
        """Shares to keep, from most tokens to few."""
        yield from [self] if self.keep is not None else [replace(self, keep=k / 10) for k in range(9, 0, -1)]

    def run(self, program: Program, ctx: Context) -> int | Refusal:
        """Rewrite `program`."""
        tokens = find_tokens(program)
        if isinstance(tokens, Refusal):
            return tokens
        layers = len(tokens.sites)
        start = layers // 4 if self.start is None else self.start
        stop = 3 * layers // 4 if self.stop is None else self.stop
        if not 0 <= start < stop < layers:
            return Refusal(f"from layer {start} to layer {stop} of {layers} attention layers")
        keep = DEFAULT if self.keep is None else self.keep
        left = math.ceil(keep * tokens.length) if isinstance(keep, float) else keep
        if not 0 < left <= tokens.length or left < len(tokens.protected):
            return Refusal(f"{left} of {tokens.length} tokens cannot be kept, {len(tokens.protected)} are protected")
        if left == tokens.length:
            return 0
        try:
            return self._merge(program, tokens, start, stop, left)
        except Stopped as stop:
            return Refusal.at(stop.node, str(stop))

    def _merge(self, program: Program, tokens: Tokens, start: int, stop: int, left: int) -> int | Refusal:
        first, last = tokens.sites[start].branch, tokens.sites[stop].branch.start
        at, before = first.start, first.nodes[0]
        if not isinstance(at.meta["val"].shape[1], int):
            return Refusal.at(at, "the number of tokens is known at run time only")
        nodes = list(program.graph.nodes)
        inside = frozenset(nodes[nodes.index(before) : nodes.index(last) + 1])
        edit = Merging(program, tokens, tokens.protected)
        found = self._groups(edit, at, valid_tokens(program, tokens.sites[start], before), left, before)
        if found is None:
            return Refusal(f"at best so many tokens cannot be merged that {left} are left")
        shortening = edit.edit(at, found.new, found.kept, inside)
        shortening.apply()
        shortening.restore(found.places, residual=True)
        edit.sizes.append((found.new, found.sizes))
        edit.weigh()
        return stop - start

    def _groups(self, edit: Merging, at: fx.Node, valid: fx.Node | None, left: int, before: fx.Node) -> Merged | None:
        """Merge again and again; None if that ends with too many tokens."""
        call, take = edit.program.call, ops.take()
        found, size, tokens = None, edit.ones(at, before), at
        while (count := tokens.meta["val"].shape[1] - left) > 0:
            new = edit.call(tokens, size, tokens, count, valid, before, found is None)
            if new.new.meta["val"].shape[1] == tokens.meta["val"].shape[1]:
                return None
            valid = None if valid is None else call(take, valid, 1, new.kept, before=before)
            if found is not None:
                kept = call(take, found.kept, 1, new.kept, before=before)
                new = Merged(new.new, new.sizes, kept, call(take, new.places, 1, found.places, before=before))
            found, size, tokens = new, new.sizes, new.new
        return found
