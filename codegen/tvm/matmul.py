"""The TIR function of a matrix product: tasks over batch, row blocks and panels, register tiles, the fused tail."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import sympy
import torch
from tvm import tirx

from . import levels
from .border import buffer_of, copy_with_zeros
from .dots import WEIGHT_INT8, prefetch, with_declaration, word
from .emit import Memory, integer, parallel, pieces, prim_func, put, sequence, serial, take, viewed
from .finish import finish
from .layout import Sizes, parameter
from .math import Block, on_stack
from .product import Product
from .tile import Tile, halvings, split

LINE = 64  # bytes of a cache line
SHORT_TAIL = 8  # vector instructions per element up to which the tail is unrolled with the tile
UNPACKED_FROM = 32  # rows from which on a panel of four-bit weights is written out as float32 before it is used
STACK = 32768  # bytes of a packed panel that may lie in the frame of a task


@dataclass(frozen=True)
class Form:
    """How a product is cut: lanes of a vector, rows and vectors of a tile, tiles and panels of a task.

    Where several parts of the right operand are put together, each has its share of a tile's vectors.
    """

    lanes: int
    rows: int
    vectors: int
    tiles: int
    panels: int
    parallel: bool
    parts: int = 1
    depth: int = 0

    @property
    def width(self) -> int:
        """Columns of a panel."""
        return self.vectors * self.lanes

    @property
    def own(self) -> int:
        """Columns of the result that a panel yields."""
        return self.width // self.parts

    def panels_of(self, columns: int) -> int:
        """Panels that yield this many columns."""
        return -(-columns // self.own)


def function(product: Product, name: str, form: Form) -> Any:
    """The complete PrimFunc; parameters are inputs, the packed weight if there is one, outputs."""
    sizes = Sizes()
    position = len(product.tensors) - len(product.tail.outputs) - product.dot.constants
    buffers: list[Any] = []
    dtypes = [t.dtype for t in product.tensors]
    stored = dict(enumerate(_stored(product, form), position)) if product.packed else {}
    for k, tensor in enumerate(product.tensors):
        if k in stored:
            shape, dtypes[k] = stored[k]
            kind = str(dtypes[k]).removeprefix("torch.")
            buffers.append(tirx.decl_buffer([integer(n) for n in shape], kind, f"packed{k - position}",
                                            data_alignment=dtypes[k].itemsize))  # fmt: skip
        else:
            buffers.append(parameter(f"t{k}", tensor, sizes))
    buffers, memory = viewed(buffers, dtypes)
    statements = _Emitter(product, form, sizes, memory, position).statements()
    return prim_func(name, buffers, memory, statements, partial(with_declaration, product.dot, form.lanes))


def _stored(product: Product, form: Form) -> list[tuple[list[int], torch.dtype]]:
    """Shapes and types of the tensors that a constant right operand becomes."""
    panels, dot = form.panels_of(product.columns), product.dot
    kind = torch.int32 if dot.group > 1 else dot.stored
    found = [([panels, product.taps * product.steps, form.width], kind)]
    if dot.shifted:
        found.append(([panels * form.width], torch.int32))
    if product.levels is not None:
        found.append(([panels, 2 * product.levels[2], form.width], torch.float32))
    return found


@dataclass
class _Emitter:
    product: Product
    form: Form
    sizes: Sizes
    memory: Memory
    packed: int
    rows: Any = None
    digits: list[Any] = field(default_factory=list)  # of the batch, in the current task
    scratch: Any = None  # the panel packed by the current task
    sums: Any = None  # of the current task, between blocks of the depth
    chunk: Any = None  # number of the current block of the depth
    corner: Any = None  # first row and panel of the current task
    left: Any = None  # flat view of the left operand, or of its copy with a border

    def statements(self) -> list[Any]:
        """The loop over tasks."""
        p, form, head = self.product, self.form, Block(1)
        lead = [self.sizes.tir(e) for e in p.extents[: p.batch]]
        self.rows = head.let(self.sizes.tir(sympy.Mul(*p.extents[p.batch : -1])))
        tiles = tirx.floordiv(self.rows + integer(form.rows - 1), integer(form.rows))
        blocks = head.let(tirx.floordiv(tiles + integer(form.tiles - 1), integer(form.tiles)))
        total = blocks * integer(self._groups)
        for size in lead:
            total = total * size
        total = head.let(total)
        task, b = tirx.Var("task", "int64"), Block(1)
        *self.digits, block, group = split(b, task, [*lead, blocks, integer(self._groups)])
        loop = parallel if form.parallel else serial
        if p.border is not None:
            self.left, frame = buffer_of(p.border, self.sizes)
            head.statements += [frame, copy_with_zeros(p.border, self.left, self.memory, self.sizes, form.lanes, loop)]
        else:
            self.left = self.memory.views[p.left.buffer]
        inner = self._task(b, block, group, blocks)
        return [*head.statements, loop(task, total, b.statements + inner)]

    @property
    def _groups(self) -> int:
        """Groups of panels."""
        return -(-self.form.panels_of(self.product.columns) // self.form.panels)

    def _task(self, b: Block, block: Any, group: Any, blocks: Any) -> list[Any]:
        """One block of rows times one group of panels."""
        form, columns = self.form, self.product.columns
        whole, last = divmod(columns, form.own)
        first = b.let(block * integer(form.tiles))
        full = b.let(tirx.floordiv(self.rows, integer(form.rows)))
        count = b.let(tirx.max(tirx.min(integer(form.tiles), full - first), integer(0)))
        ends = tirx.EQ(block, blocks - integer(1))
        panel, low = tirx.Var("panel", "int64"), b.let(group * integer(form.panels))
        high = b.let(tirx.min(low + integer(form.panels), integer(whole)))
        if form.depth:
            area = form.tiles * form.rows * form.panels * form.width
            self.sums = tirx.decl_buffer((area,), "float32", "sums", data_alignment=64)
            self.chunk, self.corner = tirx.Var("chunk", "int64"), (b.let(first * integer(form.rows)), low)

        def rows(number: Any, valid: int) -> list[Any]:
            tile = tirx.Var("tile", "int64")
            body = self._right(number, valid)
            body.append(serial(tile, count, self._tile((first + tile) * integer(form.rows), form.rows, number, valid)))
            if rest := self._rest(full * integer(form.rows), number, valid):
                body.append(tirx.IfThenElse(ends, sequence(rest), None))
            return body

        found: list[Any] = []
        if whole:
            found.append(serial(panel, high - low, rows(low + panel, form.own)))
        if last:
            alone = sequence(rows(integer(whole), last))
            final = tirx.EQ(group, integer(self._groups - 1))
            found.append(alone if self._groups == 1 else tirx.IfThenElse(final, alone, None))
        if form.depth:
            return [tirx.AllocBuffer(self.sums), serial(self.chunk, integer(self._chunks), found)]
        return found

    @property
    def _chunks(self) -> int:
        """Blocks of the depth."""
        return self.product.depth // self.form.depth if self.form.depth else 1

    def _rest(self, start: Any, panel: Any, valid: int) -> list[Any]:
        """Rows after the last whole tile: one lower tile, or tiles of halving heights where the count is not static."""
        height = self.form.rows
        if self.product.rows is not None:
            left = self.product.rows % height
            return self._tile(start, left, panel, valid) if left else []
        b, statements = Block(1), list[Any]()
        remaining = b.let(tirx.floormod(self.rows, integer(height)))
        for lower, rounds, done in halvings(b, remaining, height):
            extra = tirx.Var("extra", "int64")
            tile = self._tile(start + done + extra * integer(lower), lower, panel, valid)
            statements.append(serial(extra, rounds, tile))
        return [*b.statements, *statements]

    def _right(self, panel: Any, valid: int) -> list[Any]:
        """Statements that make the right operand's panel readable in vectors: nothing for a packed weight."""
        p, form, dot = self.product, self.form, self.product.dot
        self.scratch = None
        if p.levels is not None and (p.rows is None or p.rows >= UNPACKED_FROM):
            self.scratch = tirx.decl_buffer((p.depth * form.width,), "float32", "panel", data_alignment=64)
            return [tirx.AllocBuffer(self.scratch), self._each_input(panel, self._unpack)]
        if p.packed:
            return []
        steps = -(-p.depth // dot.group)
        kind = "float32" if dot.group == 1 else "int32"
        self.scratch = tirx.decl_buffer((steps * form.width,), kind, "panel", data_alignment=64)
        b = Block(1)
        step, across = (self.sizes.tir(s) for s in p.right_steps)
        base = b.let(self.sizes.offset(p.right, self.digits) + panel * integer(form.width) * across)
        k, column, wide = tirx.Var("k", "int64"), tirx.Var("column", "int64"), Block(form.lanes)
        done = 0
        if p.right_steps[1] == 1 and dot.group == 1:  # rows of the operand are vectors
            for v in range(valid // form.lanes):
                at = base + k * step + integer(v * form.lanes)
                value = self.memory.load(wide, p.right.buffer, at, integer(1))
                put(wide, self.scratch, k * integer(form.width) + integer(v * form.lanes), value)
            done = valid // form.lanes * form.lanes
        if done < form.width:  # column by column; what lies beyond the operand is zero
            lane, one = column + integer(done), Block(1)
            value = self._column(one, base + lane * across, k, step, lane < integer(valid))
            one.statements.append(tirx.BufferStore(self.scratch, value, [k * integer(form.width) + lane]))
            wide.statements.append(serial(column, integer(form.width - done), one.statements))
        small = steps * form.width * 4 <= STACK
        frame = on_stack(self.scratch) if small else tirx.AllocBuffer(self.scratch)
        return [frame, *b.statements, serial(k, integer(steps), wide.statements)]

    def _each_input(self, panel: Any, use: levels.Use) -> Any:
        shape = self.form.vectors, self.form.lanes
        return levels.each_input(self.product, self.memory, self.packed, panel, shape, use)

    def _unpack(self, k: Any, vector: levels.Vector) -> list[Any]:
        """Write one input's line of a panel as float32."""
        b = Block(self.form.lanes)
        for v in range(self.form.vectors):
            put(b, self.scratch, k * integer(self.form.width) + integer(v * self.form.lanes), vector(b, v))
        return b.statements

    def _column(self, one: Block, base: Any, k: Any, step: Any, inside: Any) -> Any:
        """One column of the right operand in step `k`: a number, or a group of elements in one."""
        p, dot, view = self.product, self.product.dot, self.memory.views[self.product.right.buffer]
        if dot.group == 1:
            at = tirx.if_then_else(inside, base + k * step, integer(0))
            return tirx.Select(inside, self.memory.load(one, p.right.buffer, at, None), tirx.const(0.0, "float32"))
        parts, zero = [], tirx.const(0, str(view.dtype))
        for j in range(dot.group):
            at = k * integer(dot.group) + integer(j)
            exists = tirx.And(inside, at < integer(p.depth))
            parts.append(one.let(tirx.if_then_else(exists, tirx.BufferLoad(view, [base + at * step]), zero)))
        lanes = [tirx.IntImm("int32", j) for j in range(dot.group)]
        return tirx.reinterpret("int32", tirx.Shuffle(parts, lanes))

    def _tile(self, low: Any, height: int, panel: Any, valid: int) -> list[Any]:
        """One register tile: rows [start, start + height) of one panel, `valid` columns of it, with the tail."""
        p, form, b = self.product, self.form, Block(1)
        vectors = -(-valid // form.lanes) if form.parts == 1 else form.vectors
        tile = Tile(height, vectors, form.lanes, p.dot)
        first = b.let(low)
        walks = [self._row_digits(b, first + integer(i)) for i in range(height)]
        left = [b.let(self.sizes.offset(p.left, [*self.digits, *w])) for w in walks]
        column, taps = b.let(panel * integer(form.own)), [tirx.Var(f"tap{d}", "int64") for d in range(len(p.window))]
        number, rest, vector, initial = self._operands(left, panel, taps)
        start = tile.start(initial if p.dot.shifted else None)
        whole, left_over = divmod(form.depth or p.depth, p.dot.group)
        ahead = partial(self._ahead, b, panel, first, self._tap(taps))
        if p.levels is not None and self.scratch is None:
            parts = [self._each_input(panel, lambda k, own: tile.step(number, lambda b, v, _: own(b, v), k))]
        else:
            parts = [tile.accumulate(integer(whole), number, vector, ahead)]
            parts += tile.step(rest, vector, integer(whole)) if left_over else []
        body = sequence(parts)
        for tap, (count, _) in zip(reversed(taps), reversed(p.window), strict=True):
            body = serial(tap, integer(count), [body])
        stores = self._stores(tile, first, walks, column, valid)
        if form.depth:
            held, kept = self._between(tile, first, panel)
            start.append(tirx.IfThenElse(self.chunk > integer(0), sequence(held), None))
            last = tirx.EQ(self.chunk, integer(self._chunks - 1))
            stores = [tirx.IfThenElse(last, sequence(stores), sequence(kept))]
        return [*b.statements, *start, body, *stores]

    def _between(self, tile: Tile, first: Any, panel: Any) -> tuple[list[Any], list[Any]]:
        """Statements that take the sums of a tile from where the last block of the depth left them, and leave them."""
        form, held, kept = self.form, Block(self.form.lanes), Block(self.form.lanes)
        line = integer(form.panels * form.width)
        base = (first - self.corner[0]) * line + (panel - self.corner[1]) * integer(form.width)
        for row in range(tile.rows):
            for v in range(tile.vectors):
                place = base + integer(row) * line + integer(v * form.lanes)
                held.statements.append(tile.put(row, v, take(held, self.sums, place)))
                put(kept, self.sums, place, tile.value(row, v))
        return held.statements, kept.statements

    def _operands(self, left: list[Any], panel: Any, taps: list[Any]) -> tuple[Any, Any, Any, Any]:
        """What the inner loop reads: numbers of a step, of an incomplete last step, vectors, and where sums start."""
        p, lanes, width, step = self.product, self.form.lanes, self.form.width, self.sizes.tir(self.product.left_step)
        steps = p.steps
        shift: Any = integer(0)
        for tap, (_, stride) in zip(taps, p.window, strict=True):
            shift = shift + tap * self.sizes.tir(stride)
        first = panel * integer(p.taps * steps * width) + self._tap(taps) * integer(steps * width)
        if self.form.depth:
            done = self.chunk * integer(self.form.depth)
            first, shift = first + done * integer(width), shift + done * step

        def number(one: Block, row: int, k: Any) -> Any:
            return self._number(one, left[row] + shift, k, step, p.dot.group)

        def rest(one: Block, row: int, k: Any) -> Any:
            return self._number(one, left[row] + shift, k, step, p.depth % p.dot.group)

        def vector(wide: Block, v: int, k: Any) -> Any:
            where = k * integer(width) + integer(v * lanes)
            if self.scratch is not None:
                return take(wide, self.scratch, where)
            loaded = take(wide, self.memory.views[self.packed], first + where)
            return tirx.Cast(wide.dtype("float32"), loaded) if p.dot is WEIGHT_INT8 else loaded

        def initial(wide: Block, v: int) -> Any:
            return take(wide, self.memory.views[self.packed + 1], panel * integer(width) + integer(v * lanes))

        return number, rest, vector, initial

    def _tap(self, taps: list[Any]) -> Any:
        """Number of a position of the window."""
        number: Any = integer(0)
        for tap, (count, _) in zip(taps, self.product.window, strict=True):
            number = number * integer(count) + tap
        return number

    def _ahead(self, b: Block, panel: Any, first: Any, tap: Any, k: Any) -> list[Any]:
        """Ask for a line of the next panel in each step, so that it comes from memory while this one is used."""
        p, form = self.product, self.form
        if not p.packed or self.scratch is not None:
            return []
        own = form.depth or p.taps * p.steps
        lines = own * form.width * p.dot.stored.itemsize * p.dot.group // LINE
        per = LINE // 4 if p.dot.group > 1 else LINE // p.dot.stored.itemsize
        tile, steps = tirx.floordiv(first, integer(form.rows)), integer((form.depth or p.depth) // p.dot.group)
        tile = tile - tirx.floordiv(self.corner[0], integer(form.rows)) if form.depth else tile
        number = tirx.min((tile * integer(p.taps) + tap) * steps + k, integer(lines - 1))
        at = (panel + integer(1)) * integer(lines * per * self._chunks) + number * integer(per)
        at = at + self.chunk * integer(lines * per) if form.depth else at
        return [prefetch(self.memory.views[self.packed], at)]

    def _number(self, one: Block, where: Any, k: Any, step: Any, count: int) -> Any:
        """What the left operand gives to step `k`: a float32 number, or a group of which `count` elements exist."""
        p, dot = self.product, self.product.dot
        if dot.group == 1:
            at = where + (k if p.left_step == 1 else k * step)
            if p.border is not None:
                return tirx.BufferLoad(self.left, [at])
            return self.memory.load(one, p.left.buffer, at, None)
        at = where + k * integer(dot.group) * step
        if count == dot.group and p.left_step == 1:
            return word(dot, one, tirx.BufferLoad(self.left, [tirx.Ramp(at, integer(1), dot.group)]))
        zero = tirx.const(0, str(self.left.dtype))
        parts = [tirx.BufferLoad(self.left, [at + integer(j) * step]) if j < count else zero for j in range(dot.group)]
        lanes = [tirx.IntImm("int32", j) for j in range(dot.group)]
        return word(dot, one, tirx.Shuffle([one.let(part) for part in parts], lanes))

    def _row_digits(self, b: Block, row: Any) -> list[Any]:
        p = self.product
        return split(b, b.let(row), [self.sizes.tir(e) for e in p.extents[p.batch : -1]])

    def _stores(self, tile: Tile, first: Any, walks: list[list[Any]], column: Any, valid: int) -> list[Any]:
        """The fused tail of a tile. A long one is a loop over the rows, which keeps the code small."""
        lanes = self.form.lanes
        if max(o.value.cost for o in self.product.tail.outputs) <= SHORT_TAIL:

            def own(row: int, b: Block, low: int) -> Any:
                value, start = tile.value(row, low // lanes), low % lanes
                if b.lanes == lanes:
                    return value
                return b.let(tirx.Shuffle([value], [tirx.IntImm("int32", start + i) for i in range(b.lanes)]))

            return [s for i, w in enumerate(walks) for s in self._store(partial(own, i), w, column, valid)]
        width, kind = tile.vectors * lanes, self.product.dot.accumulator
        sums, b = tirx.decl_buffer((tile.rows * width,), kind, "sums", data_alignment=64), Block(lanes)
        b.statements.append(on_stack(sums))
        for i in range(tile.rows):
            for v in range(tile.vectors):
                put(b, sums, integer(i * width + v * lanes), tile.value(i, v))
        row, inner = tirx.Var("row", "int64"), Block(1)
        digits = self._row_digits(inner, first + row)
        body = self._store(
            lambda c, low: c.let(take(c, sums, row * integer(width) + integer(low))), digits, column, valid
        )
        return [*b.statements, serial(row, integer(tile.rows), [*inner.statements, *body])]

    def _store(self, sums: Callable[[Block, int], Any], row: list[Any], column: Any, valid: int) -> list[Any]:
        """The fused tail of one row; `sums` gives the accumulated lanes from a column of the tile on."""
        slots = pieces(valid, self.form.lanes)
        return finish(
            self.product.tail, self.memory, self.sizes, [*self.digits, *row], column, slots, sums, self.form.own
        )
