"""Reductions over windows: pooling, and reductions over other dimensions than the last.

Of small windows a program computes a tile of results, and walks the taps one by one. Of large ones it computes one row
of results, and the rows of its tile are taps.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import sympy
import torch

from ...passes.program import Program
from ...targets.target import Target
from ..base import Region, Schedule
from ..plans.layout import equal
from ..plans.windows import Window, WindowPlan, plan, reduces_windows
from .code import Code, Launch, Sizes, function, is_wide, module, parts, power_of_two
from .taps import times
from .writer import COMBINE, NEUTRAL, REDUCE, Place, Writer, masked

LARGE = 32  # taps of a window from which on they are the rows of a tile
UNROLLED = 16  # steps that are written out
WARPS = 4


class WindowFamily:
    """Regions of one pooling or reduction over windows, and the pointwise operators around it."""

    name = "windows"

    def claims(self, region: Region) -> bool:
        """Whether a reduction over windows is in the region."""
        return any(map(reduces_windows, region.nodes))

    def plan(self, region: Region, program: Program | None, target: Target) -> WindowLowering:
        """The windows. Raises Unsupported."""
        found = plan(region, "cuda")
        _merge(found)
        return WindowLowering(found)


def _merge(found: WindowPlan) -> None:
    """Make one dimension of neighbours that are reduced as a whole and lie in memory as one."""
    windows = found.windows
    for d in reversed(range(len(windows) - 2)):
        a, b = windows[d], windows[d + 1]
        whole = all(x.result == 1 and x.taps == x.size and not x.clipped for x in (a, b))
        if whole and all(equal(v.strides[d], v.strides[d + 1] * b.size) for v in found.loads.values()):
            windows[d + 1] = Window(a.size * b.size, b.result, a.taps * b.taps)
            del windows[d], found.rows[d]
            for access in found.loads.values():
                del access.strides[d]


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

    @property
    def _taps(self) -> sympy.Expr:
        return sympy.Mul(*(w.taps for w in self.windows.windows[:-1]))

    def space(self, target: Target) -> Iterable[Schedule]:
        """Tiles of several shapes."""
        most, taps = power_of_two(self.windows.columns), self._taps
        spread = not taps.is_Integer or int(taps) >= LARGE
        if spread:
            tall = power_of_two(int(taps)) if taps.is_Integer else 4096
            shapes: Sequence[tuple[int, int]] = ((32, 64), (16, 64), (64, 32), (16, 128), (64, 64))
        else:
            tall, shapes = 4096, ((16, 64), (8, 128), (32, 64), (8, 64), (32, 32))
        for rows, columns in dict.fromkeys((min(tall, r * max(1, c // most)), min(c, most)) for r, c in shapes):
            yield Schedule("windows", (("rows", rows), ("columns", columns), ("spread", spread), ("warps", WARPS)))

    def constants(self, schedule: Schedule, target: Target) -> tuple[torch.Tensor, ...]:
        """None."""
        return ()

    def code(self, name: str, schedule: Schedule, target: Target) -> Code:
        """The kernel."""
        found, tensors, sizes = self.windows, self.tensors, Sizes(self.tensors)
        w = Writer(sizes, tensors, found.tail.loads)
        height, width, spread = int(schedule["rows"]), int(schedule["columns"]), bool(schedule["spread"])
        rows = sympy.Mul(*found.extents[:-1])
        grid = rows if spread else parts(rows, height), parts(sympy.Integer(found.columns), width)
        row, side = map(w.long, w.program(*grid))
        real = None
        if not spread:
            row = w.let(f"{row} * {height} + tl.arange(0, {height})[:, None]", stem="row")
            real = w.let(f"{row} < {sizes.text(rows)}", stem="inside")
        w.line(f"column = {side} * {width} + tl.arange(0, {width})[None, :]")
        across = w.let(f"column < {found.columns}", stem="inside") if found.columns % width else None
        place = Place(w.digits(row, found.extents[:-1]), "column", real, across)
        self._reduce(w, place, height, width, spread)
        w.know(found.tail.result, place, "result")
        for o in found.tail.outputs:
            w.store(o.access, place, w.value(o.value, place))
        parameters = [*(f"t{k}" for k in range(len(tensors))), *sizes.parameters]
        launch = Launch(name, tuple(range(len(tensors))), grid, int(schedule["warps"]))
        return sizes.code(module([function(name, parameters, w.blocks[0].lines)]), [launch])

    def _reduce(self, w: Writer, place: Place, height: int, width: int, spread: bool) -> None:
        """The reduced windows, named ``result``."""
        found, taps = self.windows, self._taps
        counted = found.divisor == "taps"
        w.line(f"sums = tl.full([{height}, {width}], {NEUTRAL[found.how]}, tl.float32)")
        if counted:
            w.line(f"count = tl.zeros([{height}, 1], tl.float32)")
        step = height if spread else 1
        steps = parts(taps, step)
        unrolled = steps.is_Integer and int(steps) <= UNROLLED and not is_wide(w.tensors)
        w.line(f"for start in tl.{'static_' if unrolled else ''}range(0, {w.sizes.text(taps)}, {step}):")
        body = Writer(w.sizes, w.tensors, found.loads, count=w.count)
        tap = body.let(f"start + tl.arange(0, {height})[:, None]" if spread else body.long("start"), stem="tap")
        guards = [place.rows] if place.rows else []
        if spread and not (taps.is_Integer and int(taps) % height == 0):
            guards.append(body.let(f"{tap} < {w.sizes.text(taps)}", stem="inside"))
        operand = self._operand(body, place, tap, guards)
        part = masked(body.value(found.operand, operand), found.how, operand)
        body.line(f"sums = {COMBINE[found.how].format('sums', part)}")
        if counted:
            body.line(f"count += tl.where({operand.rows}, 1.0, 0.0)" if operand.rows else "count += 1.0")
        for line in body.blocks[0].lines:
            w.line("    " + line)
        w.count = body.count
        if spread:
            w.line(f"sums = {REDUCE[found.how].format('sums', 0)}")
            if counted:
                w.line(f"count = {REDUCE['sum'].format('count', 0)}")
        divisor = "count" if counted else found.divisor
        w.line("result = sums" if divisor is None else f"result = sums / {divisor}")

    def _operand(self, w: Writer, place: Place, tap: str, guards: list[str]) -> Place:
        """Where a tap of a window is in the operand."""
        windows = self.windows.windows[:-1]
        moving = [x.taps for x in windows if x.taps != 1]
        taps, at = iter(w.digits(tap, moving)), []
        for x, number in zip(windows, self.windows.rows, strict=True):
            terms = [] if number is None or x.result == 1 else [times(place.digits[number], x.stride)]
            terms += [times(next(taps), x.dilation)] if x.taps != 1 else []
            text = " + ".join(terms) or "0"
            index = w.let(f"{text} - {x.before}" if x.before else text, stem="at")
            if x.clipped:
                guards += [f"({index} >= 0)", f"({index} < {w.sizes.text(x.size)})"]
            at.append(index)
        return Place(tuple(at), "column", " & ".join(guards) or None, place.columns)
