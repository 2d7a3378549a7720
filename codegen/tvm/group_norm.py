"""Group normalisation with channels in the lanes: two passes over the pixels for the statistics, one for the result.

A task normalises some groups of one image. Sums are kept per channel and joined per group between the passes, so that
channels innermost in memory, the layout of our convolutions, are read in vectors whatever the size of a group. The
second pass also measures how far the mean was rounded and corrects it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm import tirx

from ..plans.group_norm import GroupNorm
from .emit import Memory, integer, parallel, parameters, pieces, prim_func, put, serial, take
from .finish import finish
from .layout import Sizes
from .math import Block, assign, on_stack, read, register
from .tile import split

WIDEST = 128  # channels of a task, unless one group has more


@dataclass(frozen=True)
class Form:
    """Lanes of a vector, groups of a task, and whether tasks are threaded."""

    lanes: int
    groups: int
    parallel: bool


def function(norm: GroupNorm, name: str, form: Form) -> Any:
    """The complete PrimFunc."""
    sizes = Sizes()
    buffers, memory = parameters(norm.tail.tensors, sizes)
    return prim_func(name, buffers, memory, _Emitter(norm, form, sizes, memory).statements())


@dataclass
class _Emitter:
    norm: GroupNorm
    form: Form
    sizes: Sizes
    memory: Memory

    @property
    def _each(self) -> int:
        """Channels of a group."""
        return self.norm.channels // self.norm.groups

    @property
    def _slots(self) -> list[tuple[int, int]]:
        return pieces(self.form.groups * self._each, self.form.lanes)

    def statements(self) -> list[Any]:
        """The loop over images and groups."""
        norm, form, task, b = self.norm, self.form, tirx.Var("task", "int64"), Block(1)
        blocks, images = integer(norm.groups // form.groups), self.sizes.tir(norm.extents[0])
        image, block = split(b, task, [images, blocks])
        width = form.groups * self._each
        first = b.let(block * integer(width))
        base = b.let(image * self.sizes.tir(norm.image.strides[0]) + first * self.sizes.tir(norm.image.strides[-1]))
        kept = {k: tirx.decl_buffer((width,), "float32", k, data_alignment=64) for k in ("total", "square", "mean")}
        body = [on_stack(buffer) for buffer in kept.values()]
        body += self._filled(kept["mean"])
        body += self._sums(base, {"total": kept["total"]}, kept["mean"], lambda b, x: [x])
        body += self._means(kept)
        body += self._sums(
            base, {k: kept[k] for k in ("total", "square")}, kept["mean"], lambda b, x: [x, b.let(x * x)]
        )
        body += self._scales(kept)
        body += self._results(image, first, base, kept)
        loop = parallel if form.parallel else serial
        return [loop(task, images * blocks, [*b.statements, *body])]

    def _filled(self, buffer: Any) -> list[Any]:
        statements: list[Any] = []
        for low, lanes in self._slots:
            b = Block(lanes)
            put(b, buffer, integer(low), b.const(0.0))
            statements += b.statements
        return statements

    def _pixels(self, body: Callable[[Any, list[Any]], list[Any]]) -> list[Any]:
        """Loops over the pixels; `body` gets their offset in the input and their indices. The innermost is first."""
        count = len(self.norm.extents) - 2
        taps = [tirx.Var(f"p{d}", "int64") for d in range(count)]
        offset: Any = integer(0)
        for tap, stride in zip(taps, self.norm.image.strides[1:-1], strict=True):
            offset = offset + tap * self.sizes.tir(stride)
        statements = body(offset, list(taps))
        for tap, size in zip(reversed(taps), reversed(self.norm.extents[1:-1]), strict=True):
            statements = [serial(tap, self.sizes.tir(size), statements)]
        return statements

    def _sums(self, base: Any, into: dict[str, Any], mean: Any, terms: Callable[[Block, Any], list[Any]]) -> list[Any]:
        """Sums of terms of the centred input over all pixels, per channel; a row of pixels is summed by itself."""
        names = list(into)
        rows, parts = ({(k, low): register(Block(lanes).dtype("float32")) for low, lanes in self._slots for k in names}
                       for _ in range(2))  # fmt: skip
        clear: dict[int, list[Any]] = {}
        for number, group in enumerate((rows, parts)):
            clear[number] = []
            for low, lanes in self._slots:
                clear[number] += [assign(group[k, low], Block(lanes).const(0.0)) for k in names]
        means = dict[int, Any]()
        join, store, wide = list[Any](), list[Any](), list[Any]()
        for low, lanes in self._slots:
            b = Block(lanes)
            means[low] = b.let(take(b, mean, integer(low)))
            wide += b.statements

        def body(offset: Any, taps: list[Any]) -> list[Any]:
            statements: list[Any] = []
            for low, lanes in self._slots:
                b = Block(lanes)
                x = b.let(self._load(b, base + offset, low) - means[low])
                for k, term in zip(names, terms(b, x), strict=True):
                    b.statements.append(assign(parts[k, low], read(parts[k, low]) + term))
                statements += b.statements
            last = self.sizes.tir(self.norm.extents[-2]) - integer(1)
            return [*statements, tirx.IfThenElse(tirx.EQ(taps[-1], last), tirx.SeqStmt([*join, *clear[1]]), None)]

        for low, lanes in self._slots:
            for k in names:
                join.append(assign(rows[k, low], read(rows[k, low]) + read(parts[k, low])))
                b = Block(lanes)
                put(b, into[k], integer(low), read(rows[k, low]))
                store += b.statements
        frames = [on_stack(r) for group in (rows, parts) for r in group.values()]
        return [*frames, *clear[0], *clear[1], *wide, *self._pixels(body), *store]

    def _load(self, b: Block, offset: Any, low: int) -> Any:
        step = self.norm.image.strides[-1]
        at = offset + integer(low) * self.sizes.tir(step)
        return self.memory.load(b, self.norm.image.buffer, at, self.sizes.tir(step))

    def _count(self, b: Block) -> Any:
        """Elements of a group as a float32 number."""
        pixels: Any = integer(self._each)
        for size in self.norm.extents[1:-1]:
            pixels = pixels * self.sizes.tir(size)
        return b.let(tirx.Cast("float32", pixels))

    def _means(self, kept: dict[str, Any]) -> list[Any]:
        """Every channel's mean is that of its group."""

        def finish(b: Block, sums: dict[str, Any]) -> dict[str, Any]:
            return {"mean": b.let(tirx.Div(sums["total"], self._count(b)))}

        return self._joined(kept, ["total"], finish)

    def _scales(self, kept: dict[str, Any]) -> list[Any]:
        """The corrected mean, and in place of the squares the inverse deviation."""

        def finish(b: Block, sums: dict[str, Any]) -> dict[str, Any]:
            count = self._count(b)
            error, square = b.let(tirx.Div(sums["total"], count)), b.let(tirx.Div(sums["square"], count))
            variance = b.let(square - b.let(error * error))
            deviation = b.let(tirx.sqrt(b.let(variance + b.const(self.norm.eps))))
            return {"total": error, "square": b.let(tirx.Div(b.const(1.0), deviation))}

        return self._joined(kept, ["total", "square"], finish)

    def _joined(self, kept: dict[str, Any], names: list[str], finish: Any) -> list[Any]:
        """For each group: the sums over its channels, then what `finish` makes of them for each of its channels."""
        group, one, two = tirx.Var("group", "int64"), tirx.Var("i", "int64"), tirx.Var("j", "int64")
        b, add, spread = Block(1), Block(1), Block(1)
        start = b.let(group * integer(self._each))
        totals = {k: register("float32") for k in names}
        for k, total in totals.items():
            b.statements += [on_stack(total), assign(total, b.const(0.0))]
            add.statements.append(assign(total, read(total) + take(add, kept[k], start + one)))
        b.statements.append(serial(one, integer(self._each), add.statements))
        for k, value in finish(b, {k: b.let(read(t)) for k, t in totals.items()}).items():
            put(spread, kept[k], start + two, value)
        b.statements.append(serial(two, integer(self._each), spread.statements))
        return [serial(group, integer(self.form.groups), b.statements)]

    def _results(self, image: Any, first: Any, base: Any, kept: dict[str, Any]) -> list[Any]:
        """Normalise, scale and shift every pixel, then the tail."""
        norm, factors, statements = self.norm, dict[int, tuple[Any, Any, Any, Any]](), list[Any]()
        for low, lanes in self._slots:
            b = Block(lanes)
            mean, error, scale = (b.let(take(b, kept[k], integer(low))) for k in ("mean", "total", "square"))
            at = first + integer(low)
            if norm.weight is not None:
                scale = b.let(scale * self.memory.load(b, norm.weight, at, integer(1)))
            shift = None if norm.bias is None else self.memory.load(b, norm.bias, at, integer(1))
            factors[low] = mean, error, scale, shift
            statements += b.statements

        def body(offset: Any, taps: list[Any]) -> list[Any]:
            def normal(b: Block, low: int) -> Any:
                mean, error, scale, shift = factors[low]
                x = b.let((self._load(b, base + offset, low) - mean - error) * scale)
                return x if shift is None else b.let(x + shift)

            return finish(norm.tail, self.memory, self.sizes, [image, *taps], first, self._slots, normal)

        return [*statements, *self._pixels(body)]
