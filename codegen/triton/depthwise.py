"""Depthwise convolutions: a program computes a tile of pixels x channels, tap by tap.

Neighbouring pixels read the same elements, which then come from the first cache level.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import sympy
import torch

from ...passes.program import Program
from ...targets.target import Target
from ..base import Schedule
from ..plans.conv import Convolution
from ..plans.layout import Access
from ..plans.tail import Tail
from .code import Code, Launch, Sizes, function, module, parts, power_of_two
from .taps import corner, inside, tap_lines, tap_offset
from .writer import Place, Writer

UNROLLED = 3, 8  # rows and columns of the window that are written out; more are walked by a loop
WARPS = 4
AT_ONCE = 256  # 32-bit values of a thread that AMD's compiler, which unrolls such loops entirely, may keep


@dataclass
class DepthwiseLowering:
    """A planned depthwise convolution.

    Attributes:
        conv: its geometry.
        tail: what is done to each element of the result.
        walk: of the image over [images, rows, columns, channels].
        program: holds the weight.
        order: dimensions of the outputs from the outermost to the innermost in memory.
    """

    conv: Convolution
    tail: Tail
    walk: Access
    program: Program
    order: tuple[int, ...]

    @property
    def tensors(self) -> list[torch.Tensor]:
        """Fake tensors of the parameters."""
        return self.tail.tensors

    @property
    def flops(self) -> int:
        """Floating point operations of one call, 0 if the number of images is symbolic."""
        conv = self.conv
        each = math.prod((*conv.result, conv.filters, *conv.window))
        return 2 * int(conv.images) * each if conv.images.is_Integer else 0

    def space(self, target: Target) -> Iterable[Schedule]:
        """Tiles of several shapes, channels in whole lines of memory first."""
        most, taps = power_of_two(self.conv.channels), math.prod(self.conv.window)
        shapes = ((32, 64), (16, 64), (16, 128), (64, 32), (8, 128), (64, 64))
        for rows, columns in dict.fromkeys((r * max(1, c // most), min(c, most)) for r, c in shapes):
            each = rows * columns // (WARPS * target.vector_bits)  # of a thread
            if target.vendor != "amd" or each * min(taps, 64) <= AT_ONCE:
                yield Schedule("depthwise", (("rows", rows), ("columns", columns), ("warps", WARPS)))

    def constants(self, schedule: Schedule, target: Target) -> tuple[torch.Tensor, ...]:
        """The weight, [taps, channels]."""
        weight = self.program.constant(self.conv.weight)
        assert weight is not None
        return (weight.detach().flatten(1).t().contiguous(),)

    def code(self, name: str, schedule: Schedule, target: Target) -> Code:
        """The kernel."""
        conv, tail, sizes = self.conv, self.tail, Sizes(self.tail.tensors)
        w = Writer(sizes, tail.tensors, tail.loads)
        height, width = int(schedule["rows"]), int(schedule["columns"])
        extents = [conv.images, *map(sympy.Integer, conv.result)]
        rows = sympy.Mul(*extents)
        grid = parts(rows, height), parts(sympy.Integer(conv.channels), width)
        down, side = w.program(*grid)
        row = w.let(f"{w.long(down)} * {height} + tl.arange(0, {height})[:, None]", stem="row")
        w.line(f"column = {side} * {width} + tl.arange(0, {width})[None, :]")
        real = w.let(f"{row} < {sizes.text(rows)}", stem="inside")
        across = w.let(f"column < {conv.channels}", stem="inside") if conv.channels % width else None
        place = Place(w.digits(row, extents), "column", real, across)
        w.line(f"sums = tl.zeros([{height}, {width}], tl.float32)")
        self._taps(w, place)
        w.know(tail.result, place, "sums")
        for o in tail.outputs:
            w.store(o.access, place, w.value(o.value, place))
        count = len(tail.tensors)
        parameters = [*(f"t{k}" for k in range(count)), *sizes.parameters]
        launch = Launch(name, tuple(range(count)), grid, int(schedule["warps"]))
        return sizes.code(module([function(name, parameters, w.blocks[0].lines)]), [launch])

    def _taps(self, w: Writer, place: Place) -> None:
        """The sum over the window."""
        conv = self.conv
        top, left, base = corner(w, conv, self.walk, place.digits)
        guards = [m for m in (place.rows, place.columns) if m]
        masks = " & ".join([*guards, *inside(conv, top, left)])
        guard = f", mask={place.columns}, other=0" if place.columns else ""
        address = f"t{self.walk.buffer} + {base}"
        packed = len(self.tail.tensors) - len(self.tail.outputs) - 1
        loops = ["tl.static_range" if n <= most else "range" for n, most in zip(conv.window, UNROLLED, strict=True)]
        w.line(f"for line in {loops[0]}({conv.window[0]}):")
        w.line(f"    for across in {loops[1]}({conv.window[1]}):")
        for line in (
            *tap_lines(conv, "line", "across"),
            f"a = tl.load({address} + {tap_offset(w, self.walk, 'column')}, mask={masks}, other=0)",
            f"b = tl.load(t{packed} + (line * {conv.window[1]} + across) * {conv.channels} + column{guard})",
            "sums += a.to(tl.float32) * b.to(tl.float32)",
        ):
            w.line("        " + line)
