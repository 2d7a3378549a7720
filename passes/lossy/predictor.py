"""A given network that says which tokens to keep."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from ..program import Program

aten = torch.ops.aten


@dataclass(frozen=True, eq=False)
class Predictor:
    """The trained weights of one token predictor (Rao et al., "DynamicViT", 2021).

        y = gelu(linear(layer_norm(x)))                      C -> C
        y = [first half of y, mean over the tokens of its second half]
        score = log_softmax(linear(gelu(linear(gelu(linear(y))))))[keep]    C -> C/2 -> C/4 -> 2

    The first of the two last outputs is "keep". Two predictors are equal if they are the same object.

    Attributes:
        weights: weight and bias of the norm ([C] each) and of the four linear layers ([C, C], [C/2, C], [C/4, C/2],
            [2, C/4] with their biases), ten tensors, in the order in which such a module lists its parameters. They are
            converted to the dtype of the tokens.
        eps: of the norm.
    """

    weights: tuple[torch.Tensor, ...]
    eps: float = 1e-5

    def __repr__(self) -> str:
        return f"Predictor({self.weights[0].shape[0] if self.weights else 0} features)"

    def reason_against(self, features: int) -> str | None:
        """Why it cannot judge tokens of so many features, None if it can."""
        c = features
        layers = ((c, c), (c // 2, c), (c // 4, c // 2), (2, c // 4))
        wanted = [(c,), (c,), *(size for layer in layers for size in (layer, layer[:1]))]
        found = [tuple(w.shape) for w in self.weights]
        if c % 4 == 0 and found == wanted:
            return None
        return f"weights of shapes {found} are no predictor of tokens with {c} features, which takes {wanted}"

    def score(self, program: Program, tokens: fx.Node, first: int, valid: fx.Node | None, before: fx.Node) -> fx.Node:
        """Insert it before a node: the logarithm of the probability of "keep", [batch, tokens].

        Args:
            tokens: [batch, tokens, C], their number known.
            first: tokens from here on count in the mean.
            valid: [batch, tokens] bool, False for tokens that do not count either; None if all do.
        """
        call, dtype = program.call, tokens.meta["val"].dtype
        pairs = [program.weight(f"predictor_{k}", w.to(dtype)) for k, w in enumerate(self.weights)]
        norm, mix, *head = zip(pairs[::2], pairs[1::2], strict=True)
        features = int(tokens.meta["val"].shape[-1])
        y = call(aten.layer_norm.default, tokens, [features], *norm, self.eps, before=before)
        y = call(aten.gelu.default, call(aten.linear.default, y, *mix, before=before), before=before)
        own, rest = (call(aten.slice.Tensor, y, 2, a, a + features // 2, before=before) for a in (0, features // 2))
        mean, length = self._mean(program, rest, first, valid, before), tokens.meta["val"].shape[1]
        shared = call(aten.expand.default, mean, [-1, length, -1], before=before)
        y = call(aten.cat.default, [own, shared], -1, before=before)
        for k, layer in enumerate(head):
            y = call(aten.linear.default, y, *layer, before=before)
            y = call(aten.gelu.default, y, before=before) if k < 2 else y
        return call(aten.select.int, call(aten.log_softmax.int, y, -1, before=before), 2, 0, before=before)

    def _mean(self, program: Program, rest: fx.Node, first: int, valid: fx.Node | None, before: fx.Node) -> fx.Node:
        """[batch, 1, C/2]."""
        call, end = program.call, (1 << 62)
        rest = call(aten.slice.Tensor, rest, 1, first, end, before=before) if first else rest
        if valid is None:
            return call(aten.mean.dim, rest, [1], True, before=before)
        valid = call(aten.slice.Tensor, valid, 1, first, end, before=before) if first else valid
        weight = call(aten._to_copy.default, valid, before=before, dtype=rest.meta["val"].dtype)
        weight = call(aten.unsqueeze.default, weight, -1, before=before)
        total = call(aten.sum.dim_IntList, call(aten.mul.Tensor, rest, weight, before=before), [1], True, before=before)
        return call(aten.div.Tensor, total, call(aten.sum.dim_IntList, weight, [1], True, before=before), before=before)
