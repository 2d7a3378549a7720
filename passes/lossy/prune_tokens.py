"""Keep only the tokens of the highest score from some layers on."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, ClassVar, Self

import torch
from torch import fx

from .. import ops
from ..base import Context, Fidelity, Pass, Refusal
from ..nodes import arguments, erase_dead, expression
from ..program import Program
from ..shorten import WHOLE, Shortening, Stopped
from ..tokens import Site, Tokens, find_tokens, leading, masked, middle, products, trailing, valid_tokens
from .predictor import Predictor
from .settings import run_within

aten = torch.ops.aten
DEFAULT = 0.7
SCORES = ("cls", "last_query", "received", "norm", "predictor")


@dataclass(frozen=True)
class PruneTokens(Pass):
    """After chosen attention layers the tokens that matter least are dropped.

        add = x + attention(norm(x))           ->      add.gather(best(score))

    The score of a token is what the class token attends to it with (``cls``: Liang et al., "EViT", 2022), what the
    last token does (``last_query``: Chen et al., "FastV", 2024), the mean over all queries (``received``), or the
    length of its features (``norm``), or what a given network says before the layer (``predictor``: Rao et al.,
    "DynamicViT", 2021). Attention stays one operator; the probabilities of the rows that are needed are
    computed beside it. Tokens that stay keep their order, positions and masks; those that are parameters, or that are
    read one by one later, always stay, and padding is dropped first.

    Assumes that no later operator needs all tokens. Gives up what the dropped ones would have added.

    Attributes:
        keep: share of the tokens that are not protected, or their number. None is 0.7; with a quality budget it is
            the smallest share within the budget. With predictors int(n * keep**i) of the first n are left from the i-th
            chosen layer on, at least one.
        flops: in place of keep, the share of the program's operations that may be left.
        layers: attention layers after which (``predictor``: before which) tokens are dropped; None takes those at a
            quarter, half and three quarters.
        score: see above.
        fuse_rest: whether the dropped tokens, added up by their scores, stay as one more (EViT).
        predictors: for the score ``predictor``, one for each of `layers`.
    """

    name: ClassVar[str] = "prune-tokens"
    fidelity: ClassVar[Fidelity] = Fidelity.LOSSY

    keep: float | int | None = None
    flops: float | None = None
    layers: tuple[int, ...] | None = None
    score: str = "cls"
    fuse_rest: bool = False
    predictors: tuple[Predictor, ...] = ()

    def space(self, program: Program, ctx: Context) -> Iterable[Self]:
        """Shares to keep, from most tokens to few."""
        given = self.keep is not None or self.flops is not None
        yield from [self] if given else [replace(self, keep=k / 10) for k in range(9, 1, -1)]

    def run(self, program: Program, ctx: Context) -> int | Refusal:
        """Rewrite `program`."""
        if self.flops is not None:
            if self.keep is not None:
                return Refusal("keep and flops are given, one of them would do")
            settings = [replace(self, keep=k / 50, flops=None) for k in range(49, 0, -1)]
            return run_within(self.flops, settings, program, ctx)
        keep = DEFAULT if self.keep is None else self.keep
        tokens = find_tokens(program, in_order=not self.fuse_rest)
        if isinstance(tokens, Refusal):
            return tokens
        count = len(tokens.sites)
        layers = sorted({count // 4, count // 2, 3 * count // 4}) if self.layers is None else self.layers
        if (reason := self._reason_against(tokens, layers, keep)) is not None:
            return Refusal(reason)
        if keep == 1.0 and isinstance(keep, float):
            return 0
        edit = _Pruning(program, tokens, self, keep)
        try:
            for number, layer in enumerate(layers):
                edit.prune(tokens.sites[layer], number)
        except Stopped as stop:
            return Refusal.at(stop.node, str(stop))
        erase_dead(program.graph)
        return len(layers)

    def _reason_against(self, tokens: Tokens, layers: Any, keep: float | int) -> str | None:
        if self.score not in SCORES:
            return f"no score is called {self.score!r}; there are {', '.join(SCORES)}"
        if self.fuse_rest and self.score in ("norm", "predictor"):
            return f"scores of {self.score!r} are no weights by which dropped tokens could be added up"
        if any(not 0 <= layer < len(tokens.sites) for layer in layers):
            return f"layers {layers} of {len(tokens.sites)} attention layers"
        if (isinstance(keep, float) and not 0 < keep <= 1) or (keep < 1 and isinstance(keep, int)):
            return f"{keep} of the tokens cannot be kept"
        if self.score == "cls" and 0 not in tokens.protected:
            return "there is no class token: none is a parameter, and none is read by its place"
        if len(layers) > 1 and (inner := middle(tokens.protected)):
            return f"tokens {inner} are protected, which the first layer moves to other places in every sample"
        if self.fuse_rest and trailing(tokens.protected):
            return "the token of the dropped ones would stand behind protected ones"
        return self._reason_against_predictors(tokens, len(layers), keep)

    def _reason_against_predictors(self, tokens: Tokens, layers: int, keep: float | int) -> str | None:
        wanted = layers if self.score == "predictor" else 0
        if len(self.predictors) != wanted:
            return f"{len(self.predictors)} predictors are given, the score {self.score!r} takes {wanted} here"
        if not wanted:
            return None
        length, features = tokens.sites[0].at.meta["val"].shape[1:]
        if not isinstance(length, int):
            return "the number of tokens is known at run time only, predictors keep a share of it"
        if isinstance(keep, int):
            return f"with predictors keep is a share with a decimal point, not {keep}"
        if leading(tokens.protected) != len(tokens.protected):
            return f"predictors leave out the first tokens at most, tokens {sorted(tokens.protected)} are protected"
        return next((r for p in self.predictors if (r := p.reason_against(int(features))) is not None), None)


@dataclass
class _Pruning:
    program: Program
    tokens: Tokens
    knobs: PruneTokens
    keep: float | int

    def prune(self, site: Site, number: int) -> None:
        """Insert one selection after a site (a predictor's: before it), and let all that follows be shorter.

        Args:
            number: how many selections there are before this one.

        Raises:
            Stopped: see `Shortening`.
        """
        predictor = self.knobs.predictors[number] if self.knobs.predictors else None
        program, at = self.program, site.at if predictor is None else site.branch.start
        before = at.next if predictor is None else site.branch.nodes[0]
        length, protected, keep = at.meta["val"].shape[1], list(self.tokens.protected), self.keep
        last = self.knobs.score == "last_query"
        if last and -1 not in protected:
            protected.append(-1)
        share = Fraction(keep).limit_denominator(1000)
        count, divisor = (share.numerator, share.denominator) if isinstance(keep, float) else (keep, 0)
        if predictor is not None:
            count, divisor = max(1, int((self.tokens.length - len(protected)) * keep ** (number + 1))), 0
        if isinstance(length, int) and not divisor and count > length - len(protected):
            free = length - len(protected)
            raise Stopped(at, f"{count} tokens to keep of {free}, {len(protected)} are protected")
        valid = valid_tokens(program, site, before)
        score = self._score(site, before) if predictor is None else predictor.score(
            program, at, len(protected), valid, before)  # fmt: skip
        if valid is not None:
            lowest = -1.0 if predictor is None else float("-inf")
            score = program.call(aten.where.ScalarOther, valid, score, lowest, before=before)
        kept = program.call(ops.best_tokens(), score, count, protected, divisor, before=before)
        new, whole = program.call(ops.take(), at, 1, kept, before=before), True
        if self.knobs.fuse_rest and expression(new.meta["val"].shape[1]) != expression(length):
            (new, kept), whole = self._with_rest(at, new, kept, score, before), False
        fixed = {p: p for p in [*range(leading(protected)), *range(-trailing(protected) if whole else 0, 0)]}
        Shortening(program, self.tokens.axes, self.tokens.axis, self.tokens.activations, fixed, at, new, kept,
                   in_order=whole).apply()  # fmt: skip

    def _with_rest(self, at: fx.Node, new: fx.Node, kept: fx.Node, score: fx.Node,
                   before: fx.Node) -> tuple[fx.Node, fx.Node]:  # fmt: skip
        """One more token: the dropped ones, added up by score. It takes the place of the best of them."""
        call, dtype = self.program.call, at.meta["val"].dtype
        dropped = call(aten.scatter.value, score, 1, kept, float("-inf"), before=before)
        place = call(aten.argmax.default, dropped, 1, True, before=before)  # of padding, if nothing else is dropped
        weight = call(aten.clamp_min.default, dropped, 0.0, before=before)
        if weight.meta["val"].dtype is not dtype:
            weight = call(aten._to_copy.default, weight, before=before, dtype=dtype)
        rest = call(aten.matmul.default, call(aten.unsqueeze.default, weight, 1, before=before), at, before=before)
        cat = aten.cat.default
        return call(cat, [new, rest], 1, before=before), call(cat, [kept, place], 1, before=before)

    def _score(self, site: Site, before: fx.Node) -> fx.Node:
        """[batch, tokens] float32."""
        program, call, given = self.program, self.program.call, arguments(site.attention)
        if self.knobs.score == "norm":
            return call(aten.linalg_vector_norm.default, site.at, 2, [-1], before=before)
        mask, rows = given["attn_mask"], {"cls": (0, 1), "last_query": (-1, WHOLE)}.get(self.knobs.score)
        if given["is_causal"] and self.knobs.score != "last_query":
            raise Stopped(site.attention, f"attention is causal: the score {self.knobs.score!r} means nothing there")
        if rows is not None and mask is not None and mask.meta["val"].dim() > 1 and mask.meta["val"].shape[-2] != 1:
            mask = call(aten.slice.Tensor, mask, mask.meta["val"].dim() - 2, *rows, before=before)
        scores = products(program, site.attention, rows, before)
        scale = given["scale"] if given["scale"] is not None else 1 / math.sqrt(given["query"].meta["val"].shape[-1])
        scores = call(aten.mul.Tensor, scores, scale, before=before)
        shares = call(aten.softmax.int, masked(program, mask, scores, before), -1, before=before)
        return call(aten.mean.dim, shares, [1, 2], before=before)
