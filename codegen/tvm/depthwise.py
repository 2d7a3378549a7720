"""Depthwise convolutions: one vector of channels at a time, several pixels of a row in registers, no copied border.

Neighbouring pixels share what they read, so a tile loads each vector of the image once per row of the window. Which
taps lie inside the image is known when the code is made for the columns, and found once per row for the rows.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import sympy
import torch
from torch import fx
from tvm import tirx

from ...passes.program import Program
from ...targets.target import Target
from ..base import Schedule
from ..plans.layout import Access
from ..plans.tail import Tail
from ..plans.windows import Window
from .dots import PLAIN, pack, prefetch, with_declaration
from .emit import Memory, integer, parallel, pieces, prim_func, serial, take, viewed
from .finish import finish
from .layout import Sizes, parameter
from .math import Block, assign, on_stack, read, register
from .row_family import lanes_of, worth_threads
from .tile import split
from .window import taps_inside


@dataclass
class Depthwise:
    """A depthwise convolution; pairs are (rows, columns).

    Attributes:
        tail: what is done to each element of the result.
        image: walk of the image over [images, rows, columns, channels].
        weight: the constant weight, [channels, 1, window rows, window columns].
        images: number of images.
        channels: number of channels.
        sizes: of an image.
        result: sizes of a result.
        window: taps.
        stride: between windows.
        dilation: between taps.
        before: zeros above and left of the image.
    """

    tail: Tail
    image: Access
    weight: fx.Node
    images: sympy.Expr
    channels: int
    sizes: tuple[int, int]
    result: tuple[int, int]
    window: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    before: tuple[int, int]

    @property
    def flops(self) -> int:
        """Floating point operations of one call, 0 if the number of images is symbolic."""
        rows, columns = self.result
        taps = self.window[0] * self.window[1]
        return 2 * int(self.images) * rows * columns * self.channels * taps if self.images.is_Integer else 0

    def inside(self, column: int) -> tuple[int, ...]:
        """Taps of a column of the result that lie inside the image."""
        first = column * self.stride[1] - self.before[1]
        return tuple(t for t in range(self.window[1]) if 0 <= first + t * self.dilation[1] < self.sizes[1])


@dataclass(frozen=True)
class Form:
    """Lanes of a vector, pixels of a tile, groups of channels that are done apart, whether tasks are threaded.

    With `ahead` each tile asks for its part of the next row: tiles of several pixels read short pieces of many rows,
    which no hardware finds in time (1.7 times as fast for 8 images of 56 x 56 x 144).
    """

    lanes: int
    pixels: int
    groups: int
    parallel: bool
    ahead: bool = False


@dataclass
class DepthwiseLowering:
    """A planned depthwise convolution and the program that holds its weight."""

    conv: Depthwise
    program: Program
    order: tuple[int, ...]

    @property
    def tensors(self) -> list[torch.Tensor]:
        """Fake tensors of the parameters."""
        return self.conv.tail.tensors

    @property
    def flops(self) -> int:
        """Floating point operations of one call, 0 if sizes are symbolic."""
        return self.conv.flops

    def space(self, target: Target) -> Iterable[Schedule]:
        """Pixels of a tile, whether cores share rows or channels, and whether rows are asked for ahead."""
        vectors = -(-self.conv.channels // lanes_of(target))
        shared = dict.fromkeys((1, min(target.cores, vectors)))
        cuts = [(1, True), (1, False)] if self._streams(target) else [(groups, False) for groups in shared]
        for pixels in (8, 4) if target.vector_bits >= 512 else (4, 6):
            for groups, ahead in cuts:
                yield Schedule("depthwise", (("pixels", pixels), ("groups", groups), ("ahead", ahead)))

    def _streams(self, target: Target) -> bool:
        """Whether the images come from further away than the cores' own caches."""
        conv = self.conv
        images = int(conv.images) if conv.images.is_Integer else 8
        return images * math.prod(conv.sizes) * conv.channels * 4 > target.cores * target.second_cache

    def function(self, name: str, schedule: Schedule, target: Target) -> Any:
        """The PrimFunc."""
        lanes = lanes_of(target)
        form = Form(
            lanes,
            int(schedule["pixels"]),
            int(schedule["groups"]),
            worth_threads(self.flops, target),
            bool(schedule.get("ahead", False)),
        )
        return function(self.conv, name, form)

    def constants(self, schedule: Schedule, target: Target) -> tuple[torch.Tensor, ...]:
        """The weight, [1, taps, channels], channels padded to whole vectors."""
        weight = self.program.constant(self.conv.weight)
        assert weight is not None
        matrix = weight.detach().flatten(1).t()
        return (pack(matrix, _padded(self.conv.channels, lanes_of(target)), PLAIN),)


def _padded(channels: int, lanes: int) -> int:
    return -(-channels // lanes) * lanes


def function(conv: Depthwise, name: str, form: Form) -> Any:
    """The complete PrimFunc; parameters are inputs, the packed weight, outputs."""
    sizes = Sizes()
    tensors = conv.tail.tensors
    position = len(tensors) - len(conv.tail.outputs) - 1
    buffers = [parameter(f"t{k}", t, sizes) if k != position else None for k, t in enumerate(tensors)]
    extent = [1, conv.window[0] * conv.window[1], _padded(conv.channels, form.lanes)]
    buffers[position] = tirx.decl_buffer([integer(n) for n in extent], "float32", "packed", data_alignment=1)
    dtypes = [t.dtype for t in tensors]
    dtypes[position] = torch.float32
    buffers, memory = viewed(buffers, dtypes)
    return prim_func(
        name,
        buffers,
        memory,
        _Emitter(conv, form, sizes, memory, position).statements(),
        partial(with_declaration, PLAIN, form.lanes),
    )


Taps = list[tuple[int, ...]]  # for each pixel of a tile, which columns of the window lie inside the image


@dataclass
class _Emitter:
    conv: Depthwise
    form: Form
    sizes: Sizes
    memory: Memory
    packed: int

    def statements(self) -> list[Any]:
        """The loop over groups of channels, images and rows."""
        conv, task, b = self.conv, tirx.Var("task", "int64"), Block(1)
        groups, images, rows = integer(self.form.groups), self.sizes.tir(conv.images), integer(conv.result[0])
        group, image, row = split(b, task, [groups, images, rows])
        low, high = self._row_taps(b, row)
        vectors = conv.channels // self.form.lanes
        per = -(-vectors // self.form.groups)
        first = b.let(group * integer(per))
        count = b.let(tirx.max(integer(0), tirx.min(integer(per), integer(vectors) - first)))
        body = self._row(image, row, (low, high), first, count, group)
        loop = parallel if self.form.parallel else serial
        return [loop(task, groups * images * rows, [*b.statements, *body])]

    def _row_taps(self, b: Block, row: Any) -> tuple[Any, Any]:
        """First row of the window inside the image, and the one after the last."""
        conv = self.conv
        size, result, taps = (sympy.Integer(n[0]) for n in (conv.sizes, conv.result, conv.window))
        window = Window(size, result, taps, conv.stride[0], conv.dilation[0], conv.before[0])
        return taps_inside(b, window, row, self.sizes)

    def _row(self, image: Any, row: Any, taps: tuple[Any, Any], first: Any, count: Any, group: Any) -> list[Any]:
        """One row of the result: tiles of pixels with all taps in a loop, the others written out."""
        conv, pixels, statements = self.conv, self.form.pixels, list[Any]()
        whole = [x for x in range(conv.result[1]) if len(conv.inside(x)) == conv.window[1]]
        tiles = len(whole) // pixels
        full = [tuple(range(conv.window[1]))] * pixels
        place = (image, row, taps, first, count, group)
        if tiles:
            tile, b = tirx.Var("tile", "int64"), Block(1)
            x = b.let(tile * integer(pixels) + integer(whole[0]))
            statements.append(serial(tile, integer(tiles), [*b.statements, *self._channels(x, full, *place)]))
        rest = [*range(whole[0] if whole else conv.result[1]), *whole[tiles * pixels :],
                *range(whole[-1] + 1 if whole else conv.result[1], conv.result[1])]  # fmt: skip
        for run in _runs(rest, pixels):
            statements += self._channels(integer(run[0]), [conv.inside(x) for x in run], *place)
        return statements

    def _channels(self, x: Any, inside: Taps, image: Any, row: Any, taps: tuple[Any, Any], first: Any, count: Any,
                  group: Any) -> list[Any]:  # fmt: skip
        """All vectors of channels of one tile of pixels."""
        lanes, number, b = self.form.lanes, tirx.Var("vector", "int64"), Block(1)
        channel = b.let((first + number) * integer(lanes))
        body = [*b.statements, *self._tile(x, inside, image, row, taps, channel, lanes)]
        statements = [serial(number, count, body)]
        done = self.conv.channels // lanes * lanes
        last: list[Any] = []
        for low, width in pieces(self.conv.channels - done, lanes):
            last += self._tile(x, inside, image, row, taps, integer(done + low), width)
        if last:
            statements.append(tirx.IfThenElse(tirx.EQ(group, integer(0)), tirx.SeqStmt(last), None))
        return statements

    def _tile(self, x: Any, inside: Taps, image: Any, row: Any, taps: tuple[Any, Any], channel: Any,
              lanes: int) -> list[Any]:  # fmt: skip
        """Some pixels of a row, one vector of channels."""
        conv, start = self.conv, Block(lanes)
        steps = [self.sizes.tir(s) for s in conv.image.strides]
        sums = [register(start.dtype("float32")) for _ in inside]
        for total in sums:
            start.statements += [on_stack(total), assign(total, start.const(0.0))]
        tap, b = tirx.Var("tap", "int64"), Block(lanes)
        y = taps[0] + tap
        line = (row * integer(conv.stride[0]) - integer(conv.before[0]) + y * integer(conv.dilation[0])) * steps[1]
        left = (x * integer(conv.stride[1]) - integer(conv.before[1])) * steps[2]
        base, inner = self.sizes.tir(conv.image.shift) + image * steps[0] + line + left + channel * steps[3], Block(1)
        base = inner.let(base)
        weights = inner.let(y * integer(conv.window[1] * _padded(conv.channels, self.form.lanes)) + channel)
        seen = dict[int, Any]()
        factors = {t: self._weight(b, weights, t) for t in sorted({t for taken in inside for t in taken})}
        for pixel, taken in enumerate(inside):
            for t in taken:
                at = pixel * conv.stride[1] + t * conv.dilation[1]
                if at not in seen:
                    seen[at] = self.memory.load(b, conv.image.buffer, base + integer(at) * steps[2], steps[3])
                b.statements.append(assign(sums[pixel], read(sums[pixel]) + seen[at] * factors[t]))
        loop = serial(tap, taps[1] - taps[0], [*inner.statements, *b.statements])
        ends = [finish(conv.tail, self.memory, self.sizes, [image, row, x + integer(k)], channel, [(0, lanes)],
                       partial(_summed, total)) for k, total in enumerate(sums)]  # fmt: skip
        asks = self.form.ahead and lanes == self.form.lanes
        ahead = self._ahead(image, row, left, channel, len(inside)) if asks else []
        return [*start.statements, *ahead, loop, *itertools.chain(*ends)]

    def _ahead(self, image: Any, row: Any, left: Any, channel: Any, pixels: int) -> list[Any]:
        """Ask for what the next row of the result will read first, so that it comes from memory meanwhile."""
        conv, b = self.conv, Block(1)
        steps = [self.sizes.tir(s) for s in conv.image.strides]
        stride = conv.stride[0]
        y = (row + integer(1)) * integer(stride) + integer((conv.window[0] - 1) * conv.dilation[0] - conv.before[0])
        base = self.sizes.tir(conv.image.shift) + image * steps[0] + y * steps[1] + left + channel * steps[3]
        view = self.memory.views[conv.image.buffer]
        for line in range(min(stride, conv.window[0])):
            at = b.let(base - integer(line) * steps[1])
            b.statements += [prefetch(view, at + integer(c) * steps[2]) for c in range(pixels * conv.stride[1])]
        return b.statements

    def _weight(self, b: Block, base: Any, tap: int) -> Any:
        at = base + integer(tap * _padded(self.conv.channels, self.form.lanes))
        return b.let(take(b, self.memory.views[self.packed], at))


def _summed(total: Any, b: Block, low: int) -> Any:
    return read(total)


def _runs(columns: list[int], most: int) -> list[list[int]]:
    """Neighbouring columns together, at most so many."""
    found: list[list[int]] = []
    for x in columns:
        if found and found[-1][-1] == x - 1 and len(found[-1]) < most:
            found[-1].append(x)
        else:
            found.append([x])
    return found
