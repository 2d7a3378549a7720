"""The token family: merging of similar tokens and choice of the best, each one kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from ...passes.nodes import expression
from ...passes.program import Program
from ...targets.target import Target
from ..base import Region, Schedule
from ..plans.layout import Access, contiguous
from ..plans.rules import name_of
from ..plans.values import KINDS, Unsupported, bound, dense
from . import best, merge
from .row_family import lanes_of, worth_threads

NAMES = ("merge_tokens", "best_tokens")


class TokenFamily:
    """Regions of one merge or choice of tokens; a merge with the nodes that take its results apart."""

    name = "tokens"

    def claims(self, region: Region) -> bool:
        """Whether one of the operators is in the region."""
        return any(name_of(n) in NAMES for n in region.nodes)

    def plan(self, region: Region, program: Program | None, target: Target) -> TokenLowering:
        """Raises Unsupported with the reason."""
        root, *rest = region.nodes
        if name_of(root) == "best_tokens":
            if rest:
                raise Unsupported("a choice of tokens together with other operators")
            choice = _best(region, root)
            return TokenLowering(choice.tensors, choice.flops, lambda *args: best.function(choice, *args))
        if name_of(root) != "merge_tokens" or root in region.outputs:
            raise Unsupported("a merge of tokens together with other operators")
        merging = _merge(region, root, {n: n.args[1] for n in rest})
        return TokenLowering(merging.tensors, merging.flops, lambda *args: merge.function(merging, *args))


@dataclass
class TokenLowering:
    """A planned choice or merge.

    Attributes:
        tensors: fake tensors of the parameters.
        flops: operations of one call, 0 if sizes are symbolic.
        make: the PrimFunc of a name, lanes, and whether it is threaded.
    """

    tensors: list[torch.Tensor]
    flops: int
    make: Callable[[str, int, bool], Any]

    @property
    def order(self) -> None:
        """Outputs are contiguous."""
        return None

    def space(self, target: Target) -> Iterable[Schedule]:
        """Threaded or not, the likelier first."""
        first = worth_threads(self.flops, target)
        for threaded in [first] if target.cores == 1 else [first, not first]:
            yield Schedule("tokens", (("parallel", threaded),))

    def function(self, name: str, schedule: Schedule, target: Target) -> Any:
        """The PrimFunc."""
        return self.make(name, lanes_of(target), bool(schedule["parallel"]))

    def constants(self, schedule: Schedule, target: Target) -> tuple[torch.Tensor, ...]:
        """None."""
        return ()


def _walk(region: Region, node: fx.Node, kind: str = "float32") -> Access:
    """How an input of the region is walked by its own dimensions."""
    value = dense(node)
    if node not in region.inputs or KINDS.get(value.dtype) != kind:
        raise Unsupported(f"{node.name} is computed here, or of {value.dtype}")
    return Access(region.inputs.index(node), [expression(s) for s in value.stride()], sympy.Integer(0))


def _static(*sizes: Any) -> None:
    if not all(isinstance(s, int) and s > 0 for s in sizes):
        raise Unsupported("a number of tokens or features that is known at run time only")


def _outputs(region: Region) -> list[torch.Tensor]:
    tensors = [dense(n) for n in region.outputs]
    if not all(map(contiguous, tensors)):
        raise Unsupported("a result that is not contiguous")
    return tensors


def _best(region: Region, root: fx.Node) -> best.Best:
    given = bound(root)
    (batch, tokens), chosen = given["score"].meta["val"].shape, root.meta["val"].shape[1]
    _static(tokens, chosen)
    tensors = [*(n.meta["val"] for n in region.inputs), *_outputs(region)]
    protected = tuple(sorted({p % tokens for p in given["protected"]}))
    return best.Best(tensors, _walk(region, given["score"]), expression(batch), tokens, chosen, protected)


def _merge(region: Region, root: fx.Node, parts: dict[fx.Node, Any]) -> merge.Merge:
    given, outputs = bound(root), region.outputs
    (batch, tokens, features), compared = given["input"].meta["val"].shape, given["metric"].meta["val"].shape[2]
    left = root.meta["val"][0].shape[1]
    _static(tokens, features, compared, left)
    if tokens < 2 or any(not isinstance(p, int) for p in parts.values()) or len({*parts.values()}) < len(parts):
        raise Unsupported("a merge of less than two tokens, or with results taken twice")
    position = {parts[n]: len(region.inputs) + k for k, n in enumerate(outputs)}
    valid = None if given["valid"] is None else _walk(region, given["valid"], "bool")
    tensors = [*(n.meta["val"] for n in region.inputs), *_outputs(region)]
    return merge.Merge(
        tensors, _walk(region, given["input"]), _walk(region, given["size"]), _walk(region, given["metric"]), valid,
        tuple(map(position.get, range(4))), expression(batch), tokens, left, features, compared,
        tuple(sorted({p % tokens for p in given["protected"]})),
    )  # fmt: skip
