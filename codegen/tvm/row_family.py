"""The row family: pointwise operators and last-dimension reductions over rows, with layout views that keep the rows."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from ...passes.program import Program
from ...targets.target import Target
from ..base import Region, Schedule
from ..plans.rows import VIEWS, Plan, elements, make
from ..plans.rules import name_of
from . import rows

# A launch on the shared pool costs about 1 us when its threads are awake and several when they sleep; below this many
# vector instructions (about 5 us on one core) one thread is faster.
SERIAL_BELOW = 16_000


class RowFamily:
    """Takes every region that no other family claims."""

    name = "rows"

    def claims(self, region: Region) -> bool:
        """Always: a region without a row program is refused by `plan`."""
        return True

    def plan(self, region: Region, program: Program | None, target: Target) -> RowLowering:
        """The region as a row program. Raises Unsupported."""
        return RowLowering(make(region), all(name_of(n) in VIEWS for n in region.nodes))


@dataclass
class RowLowering:
    """A planned row region; `free` says that eager does it by changing strides alone."""

    plan: Plan
    free: bool

    @property
    def tensors(self) -> list[torch.Tensor]:
        """Fake tensors of the parameters."""
        return self.plan.tensors

    @property
    def order(self) -> tuple[int, ...] | None:
        """Dimensions of the outputs in memory."""
        return self.plan.order

    @property
    def flops(self) -> int:
        """Rough number of operations of one call, 0 if sizes are symbolic."""
        return (elements(self.plan) or 0) * self.plan.weight

    def space(self, target: Target) -> Iterable[Schedule]:
        """Threaded or not (the likelier first), with two widths of unrolling; nothing for what eager does for free."""
        if self.free:
            return
        work = self._work(target)
        first = worth_threads(self.flops, target)
        threaded = [first] if target.cores == 1 or work is None or work > 64 * SERIAL_BELOW else [first, not first]
        for parallel in threaded:
            for unroll in (4, 2):
                yield Schedule("rows", (("parallel", parallel), ("unroll", unroll)))

    def function(self, name: str, schedule: Schedule, target: Target) -> Any:
        """The PrimFunc."""
        threshold = 0
        if self._work(target) is None:
            last = self.plan.extents[-1]
            columns = int(last) if last.is_Integer else 4096
            threshold = max(2, math.ceil(SERIAL_BELOW * lanes_of(target) / (columns * self.plan.weight)))
        form = rows.Form(lanes_of(target), int(schedule["unroll"]), bool(schedule["parallel"]), threshold)
        return rows.function(self.plan, name, form)

    def constants(self, schedule: Schedule, target: Target) -> tuple[torch.Tensor, ...]:
        """None."""
        return ()

    def _work(self, target: Target) -> int | None:
        """Vector instructions of one call, None if sizes are symbolic."""
        count = elements(self.plan)
        return None if count is None else count * self.plan.weight // lanes_of(target)


def worth_threads(flops: int, target: Target) -> bool:
    """Whether so many operations (0: not known) of no product are worth a launch on several threads."""
    return target.cores > 1 and (not flops or flops // lanes_of(target) >= SERIAL_BELOW)


def lanes_of(target: Target) -> int:
    """float32 values of one vector register."""
    return max(4, target.vector_bits // 32)
