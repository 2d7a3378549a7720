"""The token family: merging of similar tokens and choice of the best, each one kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import sympy
import torch

from ...passes.program import Program
from ...targets.target import Target
from ..base import Extent, Region, Schedule
from ..plans import tokens
from . import best, merge
from .row_family import lanes_of, worth_threads


class TokenFamily:
    """Regions of one merge or choice of tokens; a merge with the nodes that take its results apart."""

    name = "tokens"

    def claims(self, region: Region) -> bool:
        """Whether one of the operators is in the region."""
        return tokens.claims(region)

    def plan(self, region: Region, program: Program | None, target: Target) -> TokenLowering:
        """Raises Unsupported with the reason."""
        found = tokens.plan(region)
        if isinstance(found, tokens.Best):
            choice = found
            return TokenLowering(choice, lambda *args: best.function(choice, *args))
        merging = found
        return TokenLowering(merging, lambda *args: merge.function(merging, *args))


@dataclass
class TokenLowering:
    """A planned choice or merge.

    Attributes:
        plan: the operator.
        make: the PrimFunc of a name, lanes, and whether it is threaded.
    """

    plan: tokens.Best | tokens.Merge
    make: Callable[[str, int, bool], Any]

    @property
    def tensors(self) -> list[torch.Tensor]:
        """Fake tensors of the parameters."""
        return self.plan.tensors

    @property
    def flops(self) -> int:
        """Operations of one call, 0 if sizes are symbolic."""
        return self.plan.flops

    @property
    def made(self) -> dict[sympy.Expr, Extent]:
        """The size that the operator computes, if it is symbolic."""
        return self.plan.made

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
