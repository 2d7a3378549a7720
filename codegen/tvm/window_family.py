"""Families that reduce along other dimensions than the last: windows (pooling among them) and group normalisation."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from ...passes.program import Program
from ...targets.target import Target
from ..base import Region, Schedule
from ..plans.group_norm import GroupNorm
from ..plans.group_norm import plan as plan_groups
from ..plans.rules import name_of
from ..plans.windows import WindowPlan, plan, reduces_windows
from . import group_norm, window
from .group_norm import WIDEST
from .row_family import lanes_of, worth_threads


class WindowFamily:
    """Regions of one pooling or reduction over windows."""

    name = "windows"

    def claims(self, region: Region) -> bool:
        """Whether a reduction over windows is in the region."""
        return any(map(reduces_windows, region.nodes))

    def plan(self, region: Region, program: Program | None, target: Target) -> WindowLowering:
        """The windows. Raises Unsupported."""
        return WindowLowering(plan(region))


@dataclass
class WindowLowering:
    """A planned reduction over windows."""

    windows: WindowPlan

    @property
    def tensors(self) -> list[torch.Tensor]:
        """Fake tensors of the parameters."""
        return self.windows.tail.tensors

    @property
    def order(self) -> tuple[int, ...] | None:
        """Dimensions of the outputs from the outermost to the innermost in memory."""
        return self.windows.order

    @property
    def flops(self) -> int:
        """Rough number of operations of one call, 0 if sizes are symbolic."""
        return self.windows.work or 0

    def space(self, target: Target) -> Iterable[Schedule]:
        """Threaded or not (the likelier first), with two widths of a task."""
        first = worth_threads(self.flops, target)
        for parallel in [first] if target.cores == 1 else [first, not first]:
            for vectors in (4, 2):
                yield Schedule("windows", (("parallel", parallel), ("vectors", vectors)))

    def function(self, name: str, schedule: Schedule, target: Target) -> Any:
        """The PrimFunc."""
        vectors, parallel = int(schedule["vectors"]), bool(schedule["parallel"])
        return window.function(self.windows, name, window.Form(lanes_of(target), vectors, parallel))

    def constants(self, schedule: Schedule, target: Target) -> tuple[torch.Tensor, ...]:
        """None."""
        return ()


class GroupNormFamily:
    """Regions of one group normalisation and the pointwise operators after it."""

    name = "groups"

    def claims(self, region: Region) -> bool:
        """Whether a group normalisation is in the region."""
        return any(name_of(n) == "group_norm" for n in region.nodes)

    def plan(self, region: Region, program: Program | None, target: Target) -> GroupNormLowering:
        """The normalisation. Raises Unsupported."""
        return GroupNormLowering(plan_groups(region))


@dataclass
class GroupNormLowering:
    """A planned group normalisation."""

    norm: GroupNorm

    @property
    def tensors(self) -> list[torch.Tensor]:
        """Fake tensors of the parameters."""
        return self.norm.tail.tensors

    @property
    def order(self) -> tuple[int, ...]:
        """Channels are innermost."""
        return self.norm.order

    @property
    def flops(self) -> int:
        """Rough number of operations of one call, 0 if sizes are symbolic."""
        return 8 * (self.norm.elements or 0)

    def space(self, target: Target) -> Iterable[Schedule]:
        """Groups of a task: as many as fit, and fewer where that gives each core a task."""
        norm, each = self.norm, self.norm.channels // self.norm.groups
        fitting = [g for g in range(norm.groups, 0, -1) if norm.groups % g == 0 and (g == 1 or g * each <= WIDEST)]
        threaded = worth_threads(self.flops, target)
        for groups in fitting[:3]:
            yield Schedule("groups", (("parallel", threaded), ("groups", groups)))

    def function(self, name: str, schedule: Schedule, target: Target) -> Any:
        """The PrimFunc."""
        groups, parallel = int(schedule["groups"]), bool(schedule["parallel"])
        return group_norm.function(self.norm, name, group_norm.Form(lanes_of(target), groups, parallel))

    def constants(self, schedule: Schedule, target: Target) -> tuple[torch.Tensor, ...]:
        """None."""
        return ()
