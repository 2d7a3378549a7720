"""Pointwise operators and reductions over rows: a program computes a tile of rows and columns."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import sympy
import torch

from ...passes.program import Program
from ...targets.target import Target
from ..base import Region, Schedule
from ..plans.rows import VIEWS, Plan, elements, make
from ..plans.rules import name_of
from .code import Code, Launch, Sizes, function, module, parts, power_of_two
from .writer import COMBINE, NEUTRAL, Block, Place, Writer, masked, reduced

RESIDENT = 65536  # columns of a row that one program holds at once
TILE = 2048  # elements of a tile that is not bound by the length of a row


class RowFamily:
    """Takes every region that no other family claims."""

    name = "rows"

    def claims(self, region: Region) -> bool:
        """Always: a region without a row program is refused by `plan`."""
        return True

    def plan(self, region: Region, program: Program | None, target: Target) -> RowLowering:
        """The region as a row program. Raises Unsupported."""
        return RowLowering(make(region, "cuda"), all(name_of(n) in VIEWS for n in region.nodes))


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
        """Tiles of several heights; nothing for what eager does for free."""
        if self.free:
            return
        columns = self.plan.extents[-1]
        known = int(columns) if columns.is_Integer else TILE
        if self.plan.reductions:
            wide = power_of_two(known)
            blocks = [wide, 8192] if 8192 < wide <= RESIDENT else [wide if wide <= RESIDENT else 8192]
            tiles = (TILE, 4096, 1024, 8192)
            sizes = list(dict.fromkeys((max(1, min(64, size // block)), block) for block in blocks for size in tiles))
        else:
            block = min(power_of_two(known), TILE)
            sizes = list(dict.fromkeys((max(1, size // block), min(block, size)) for size in (1024, 2048, 512, 4096)))
        rows = sympy.Mul(*self.plan.extents[:-1])
        high = power_of_two(int(rows)) if rows.is_Integer else TILE
        for height, width in dict.fromkeys((min(height, high), width) for height, width in sizes):
            most = 32 if target.vendor == "nvidia" else 16
            warps = max(1, min(most if width > 8192 else 8, height * width // (8 * 32)))
            for w in dict.fromkeys((warps, max(1, warps // 2))):
                yield Schedule("rows", (("rows", height), ("columns", width), ("warps", w)))

    def constants(self, schedule: Schedule, target: Target) -> tuple[torch.Tensor, ...]:
        """None."""
        return ()

    def code(self, name: str, schedule: Schedule, target: Target) -> Code:
        """The kernel."""
        height, width = int(schedule["rows"]), int(schedule["columns"])
        plan, sizes = self.plan, Sizes(self.plan.tensors)
        writer = Writer(sizes, plan.tensors, plan.loads)
        rows, columns = sympy.Mul(*plan.extents[:-1]), plan.extents[-1]
        looped = bool(plan.reductions) and int(columns) > width
        grid = parts(rows, height), sympy.Integer(1) if plan.reductions else parts(columns, width)
        down, across = writer.program(*grid)
        row = writer.let(f"{writer.long(down)} * {height} + tl.arange(0, {height})[:, None]", stem="row")
        digits = writer.digits(row, plan.extents[:-1])
        place = Place(digits, "column", writer.let(f"{row} < {sizes.text(rows)}", stem="inside"))
        if looped:
            _looped(writer, plan, place, height, width)
        else:
            start = "0" if plan.reductions else f"{writer.long(across)} * {width}"
            writer.line(f"column = {start} + tl.arange(0, {width})[None, :]")
            if plan.reductions or not (columns.is_Integer and int(columns) % width == 0):
                place = replace(place, columns=writer.let(f"column < {sizes.text(columns)}", stem="inside"))
            for o in plan.outputs:
                at = replace(place, columns=None) if o.per_row else place
                writer.store(o.access, at, writer.value(o.value, place), o.per_row)
        parameters = [*(f"t{k}" for k in range(len(plan.tensors))), *sizes.parameters]
        text = module([function(name, parameters, writer.blocks[0].lines)])
        launch = Launch(name, tuple(range(len(plan.tensors))), grid, int(schedule["warps"]))
        return sizes.code(text, [launch])


def _looped(writer: Writer, plan: Plan, place: Place, height: int, width: int) -> None:
    """Rows that are longer than a tile: one loop over their columns for each stage of reductions, one to write."""
    columns = int(plan.extents[-1])
    for stage in range(plan.stages):
        reductions = plan.reductions.get(stage, [])
        ready = [o for o in plan.outputs if not o.per_row and o.value.stage == stage]
        if not reductions and not ready:
            continue
        outer, inner = writer.blocks[0], Block()
        shape = f"[{height}, {width}]"
        sums = [writer.let(f"tl.full({shape}, {NEUTRAL[v.attr]}, tl.float32)", False, "sum") for v in reductions]
        writer.blocks.append(inner)
        writer.line(f"column = start + tl.arange(0, {width})[None, :]")
        at = replace(place, columns=writer.let(f"column < {columns}", stem="inside"))
        for name, v in zip(sums, reductions, strict=True):
            part = masked(writer.value(v.args[0], at), v.attr, at)
            writer.line(f"{name} = {COMBINE[v.attr].format(name, part)}")
        for o in ready:
            writer.store(o.access, at, writer.value(o.value, at))
        writer.blocks.pop()
        outer.lines.append(f"for start in range(0, {columns}, {width}):")
        outer.lines.extend(f"    {line}" for line in inner.lines)
        for name, v in zip(sums, reductions, strict=True):
            writer.know(v, place, writer.let(reduced(v, name), False))
    for o in plan.outputs:
        if o.per_row:
            writer.store(o.access, replace(place, columns=None), writer.value(o.value, place), True)
