"""The TIR function of attention: online softmax over tiles of queries, with the queries in the lanes.

One task computes the result of a tile of queries of one head. Scores are computed transposed, [keys, queries]: K is
read as numbers that are broadcast against lanes of queries, so K and V are read in whatever layout their producer
left, maxima and sums need no step across lanes, and the probabilities are already the vector operand of the product
with V. Only the query tile and the result are transposed, in registers. Over blocks of keys the softmax is carried
along (Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018; Dao et al., "FlashAttention", 2022):
with running maximum m and sum l, a new block rescales what was summed by 2**(m_old - m_new). Scores are kept in base 2.
Memory per task: one tile of queries, scores for one block of keys, one tile of results.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from tvm import tirx

from ..plans.attention import Attention
from .emit import Memory, integer, parallel, parameters, pieces, prim_func, put, sequence, serial, take
from .layout import Sizes
from .math import INF, Block, assign, exp2_nonpositive, on_stack, read, register, transpose
from .tile import Tile, halvings, split
from .transposed import Rows, is_one, load_transposed

LOG2_E = 1.4426950408889634


@dataclass(frozen=True)
class Form:
    """Lanes of a vector, vectors of a query tile, rows of a score tile, rows of a result tile, keys of a block."""

    lanes: int
    vectors: int
    keys: int
    features: int
    block: int
    parallel: bool


def function(plan: Attention, name: str, form: Form) -> Any:
    """The complete PrimFunc; parameters are the region's inputs and its output."""
    sizes = Sizes()
    buffers, memory = parameters(plan.tensors, sizes)
    return prim_func(name, buffers, memory, _Emitter(plan, form, sizes, memory).statements())


@dataclass
class _Task:
    """What the statements of one query tile refer to."""

    vectors: int
    head: list[Any]  # digits of batch and head
    first: Any  # number of the first query
    queries: Any = None  # scratch [features, lanes]
    scores: Any = None  # scratch [keys of a block, lanes]
    result: Any = None  # scratch [features, lanes]
    peak: list[Any] = field(default_factory=list)
    total: list[Any] = field(default_factory=list)


@dataclass
class _Emitter:
    plan: Attention
    form: Form
    sizes: Sizes
    memory: Memory

    def statements(self) -> list[Any]:
        """The loop over tasks: heads times tiles of queries."""
        p, form, head = self.plan, self.form, Block(1)
        width = form.vectors * form.lanes
        lead = [self.sizes.tir(e) for e in p.lead]
        rows = self.sizes.tir(p.queries)
        tiles = head.let(tirx.floordiv(rows + integer(width - 1), integer(width)))
        total = tiles
        for size in lead:
            total = total * size
        total = head.let(total)
        task, b = tirx.Var("task", "int64"), Block(1)
        *digits, tile = split(b, task, [*lead, tiles])
        first = b.let(tile * integer(width))
        body = self._variants(b, digits, first, tile, tiles)
        loop = parallel if form.parallel else serial
        return [*head.statements, loop(task, total, [*b.statements, *body])]

    def _variants(self, b: Block, digits: list[Any], first: Any, tile: Any, tiles: Any) -> list[Any]:
        """A whole tile, and a narrower one where the last tile of a static number of queries needs fewer vectors."""
        form, queries = self.form, self.plan.queries
        whole = _Task(form.vectors, digits, first)
        rest = int(queries) % (form.vectors * form.lanes) if queries.is_Integer else 0
        need = -(-rest // form.lanes)
        if not rest or need == form.vectors:
            return self._tile(whole)
        narrow = self._tile(_Task(need, digits, first))
        if int(queries) < form.vectors * form.lanes:
            return narrow
        return [tirx.IfThenElse(tirx.EQ(tile, tiles - integer(1)), sequence(narrow), sequence(self._tile(whole)))]

    def _tile(self, task: _Task) -> list[Any]:
        p, form = self.plan, self.form
        width = task.vectors * form.lanes
        rounded = -(-p.value_features // form.lanes) * form.lanes
        sizes = {"queries": p.features * width, "scores": form.block * width, "result": rounded * width}
        b = Block(form.lanes)
        for what, size in sizes.items():
            buffer = tirx.decl_buffer((size,), "float32", what, data_alignment=64)
            setattr(task, what, buffer)
            b.statements.append(on_stack(buffer))
        for group, start in ((task.peak, -INF), (task.total, 0.0)):
            for _ in range(task.vectors):
                group.append(register(b.dtype("float32")))
                b.statements += [on_stack(group[-1]), assign(group[-1], b.const(start))]
        b.statements += self._load_queries(task)
        keys = b.let(self._last_key(task))
        if p.keys.is_Integer and int(p.keys) <= form.block:
            b.statements += self._block(task, integer(0), keys, None)
        else:
            b.statements.append(self._zero(task.result, rounded * task.vectors))
            block, inner = tirx.Var("block", "int64"), Block(1)
            start = inner.let(block * integer(form.block))
            count = inner.let(tirx.min(keys - start, integer(form.block)))
            inner.statements += self._block(task, start, count, block)
            blocks = tirx.floordiv(keys + integer(form.block - 1), integer(form.block))
            b.statements.append(serial(block, blocks, self._if_visible(task, block, inner.statements)))
        return [*b.statements, *self._store(task)]

    def _if_visible(self, task: _Task, block: Any, statements: list[Any]) -> list[Any]:
        """The statements, left out where a known mask hides the block from all queries of the tile."""
        p, form = self.plan, self.form
        if p.known_mask is None:
            return statements
        tile = tirx.floordiv(task.first, integer(form.vectors * form.lanes))
        table = self.memory.views[len(p.tensors) - 2]
        seen = tirx.BufferLoad(table, [tile * integer(-(-int(p.keys) // form.block)) + block])
        return [tirx.IfThenElse(tirx.NE(seen, tirx.const(0, "int8")), sequence(statements), None)]

    def _last_key(self, task: _Task) -> Any:
        """Number of keys that any query of the tile may see."""
        keys = self.sizes.tir(self.plan.keys)
        if not self.plan.causal:
            return keys
        # lanes beyond the last query see what the last one sees, since they store the same row
        seen = tirx.min(self.sizes.tir(self.plan.queries), task.first + integer(task.vectors * self.form.lanes))
        return tirx.min(keys, seen)

    def _zero(self, buffer: Any, vectors: int) -> Any:
        b, k = Block(self.form.lanes), tirx.Var("k", "int64")
        put(b, buffer, k * integer(b.lanes), b.const(0.0))
        return serial(k, integer(vectors), b.statements)

    def _row(self, b: Block, query: Any) -> Any:
        """The number of an existing query: lanes beyond the last one repeat it, and store the same result."""
        return b.let(tirx.min(query, self.sizes.tir(self.plan.queries) - integer(1)))

    def _base(self, which: str, head: list[Any]) -> Any:
        """Offset of a tensor's first element of this head."""
        base: Any = integer(0)
        for digit, (stride, group) in zip(head, self.plan.heads[which], strict=True):
            if stride != 0:
                own = digit if group == 1 else tirx.floordiv(digit, integer(group))
                base = base + own * self.sizes.tir(stride)
        return base

    def _load_queries(self, task: _Task) -> list[Any]:
        """The query tile, scaled, as [features, lanes]."""
        b, scale = Block(1), self.plan.scale * LOG2_E
        rows = self._rows(b, task, "query", integer(0))
        change = partial(_times, scale)
        body = load_transposed(rows, task.queries, task.vectors, self.form.lanes, self.plan.features, change)
        return [*b.statements, *body]

    def _rows(self, b: Block, task: _Task, which: str, start: Any) -> Rows:
        """The rows of the tile's queries in a tensor, from element `start` on."""
        row, column = (self.sizes.tir(s) for s in self.plan.steps[which])
        base = b.let(self._base(which, task.head) + start * column)
        last = b.let(self.sizes.tir(self.plan.queries) - integer(1))
        return Rows(self.memory, self.plan.position[which], base, task.first, last, row, column)

    def _block(self, task: _Task, start: Any, count: Any, block: Any) -> list[Any]:
        """Scores, softmax and weighted sum for keys [start, start + count)."""
        form, p = self.form, self.plan
        b = Block(form.lanes)
        old = [b.let(read(r)) for r in task.peak]
        b.statements += self._bias(task, start, count)
        b.statements += self._scores(task, start, count)
        shift, factor = [], []
        for v in range(task.vectors):
            peak = read(task.peak[v])
            shift.append(b.select(tirx.EQ(peak, b.const(-INF)), b.const(0.0), peak))
            if block is not None:
                factor.append(exp2_nonpositive(b, b.let(old[v] - shift[v])))
                b.statements.append(assign(task.total[v], read(task.total[v]) * factor[v]))
        b.statements.append(self._probabilities(task, count, shift))
        base = b.let(self._base("value", task.head) + start * self.sizes.tir(p.steps["value"][0]))
        whole, left = divmod(p.value_features, form.features)
        tile = tirx.Var("tile", "int64")
        body = self._weighted(task, base, tile * integer(form.features), form.features, count, factor)
        b.statements.append(serial(tile, integer(whole), body))
        if left:
            b.statements += self._weighted(task, base, integer(whole * form.features), left, count, factor)
        return b.statements

    def _scores(self, task: _Task, start: Any, count: Any) -> list[Any]:
        """K times the query tile, with mask, into the scratch; the running maximum grows with it."""
        form, p, b = self.form, self.plan, Block(1)
        row, column = (self.sizes.tir(s) for s in p.steps["key"])
        base = b.let(self._base("key", task.head) + start * row)
        tile = tirx.Var("tile", "int64")
        whole = b.let(tirx.floordiv(count, integer(form.keys)))
        body = self._score_tile(task, base, start, tile * integer(form.keys), form.keys, row, column)
        statements, loops = [*b.statements, serial(tile, whole, body)], list[Any]()
        done = whole * integer(form.keys)
        if p.keys.is_Integer and int(p.keys) <= form.block and not p.causal:
            left = int(p.keys) % form.keys
            return statements + (self._score_tile(task, base, start, done, left, row, column) if left else [])
        rest = Block(1)
        for height, rounds, before in halvings(rest, rest.let(count - done), form.keys):
            number = tirx.Var("rest", "int64")
            where = done + before + number * integer(height)
            loops.append(serial(number, rounds, self._score_tile(task, base, start, where, height, row, column)))
        return [*statements, *rest.statements, *loops]

    def _score_tile(self, task: _Task, base: Any, start: Any, low: Any, height: int, row: Any,
                    column: Any) -> list[Any]:  # fmt: skip
        """Scores of `height` keys."""
        p, form, b = self.plan, self.form, Block(self.form.lanes)
        first = b.let(low)
        keys = [b.let(base + (first + integer(i)) * row) for i in range(height)]
        width = task.vectors * form.lanes
        tile = Tile(height, task.vectors, form.lanes)
        queries, key_at = task.queries, p.position["key"]

        def number(one: Block, i: int, k: Any) -> Any:
            return self.memory.load(one, key_at, keys[i] + (k if is_one(column) else k * column), None)

        def vector(wide: Block, v: int, k: Any) -> Any:
            return take(wide, queries, k * integer(width) + integer(v * form.lanes))

        b.statements += [*tile.start(), tile.accumulate(integer(p.features), number, vector)]
        for i in range(height):
            for v in range(task.vectors):
                at = (first + integer(i)) * integer(width) + integer(v * form.lanes)
                score = self._masked(b, task, tile.value(i, v), start + first + integer(i), v, at)
                put(b, task.scores, at, score)
                peak = read(task.peak[v])
                b.statements.append(assign(task.peak[v], tirx.Select(score > peak, score, peak)))
        return b.statements

    def _masked(self, b: Block, task: _Task, score: Any, key: Any, v: int, at: Any) -> Any:
        """A score with its bias, and minus infinity where a causal query may not see the key."""
        p = self.plan
        if p.mask_per_query:
            score = b.let(score + take(b, task.scores, at))
        elif p.masked:
            where = self._base("mask", task.head) + key * self.sizes.tir(p.steps["mask"][1])
            one = Block(1)
            bias = bias_of(self.plan, one, self.memory.load(one, p.position["mask"], where, None))
            b.statements += one.statements
            score = b.let(score + b.spread(bias))
        if p.causal:
            query = task.first + integer(v * b.lanes)
            ahead = b.let(tirx.Cast("int32", key - query))
            lane = tirx.Ramp(tirx.IntImm("int32", 0), tirx.IntImm("int32", 1), b.lanes)
            score = b.select(lane >= b.spread(ahead), score, b.const(-INF))
        return b.let(score)

    def _bias(self, task: _Task, start: Any, count: Any) -> list[Any]:
        """A mask that differs by query, transposed into the scratch that the scores will take."""
        p = self.plan
        if not p.mask_per_query:
            return []
        b = Block(1)
        rows = self._rows(b, task, "mask", start)
        body = load_transposed(rows, task.scores, task.vectors, self.form.lanes, count, partial(bias_of, self.plan))
        return [*b.statements, *body]

    def _probabilities(self, task: _Task, count: Any, shift: list[Any]) -> Any:
        """Scores to powers of two, in place; their sum grows with it."""
        b, key = Block(self.form.lanes), tirx.Var("key", "int64")
        width = task.vectors * b.lanes
        for v in range(task.vectors):
            at = key * integer(width) + integer(v * b.lanes)
            score = take(b, task.scores, at)
            power = exp2_nonpositive(b, b.let(score - shift[v]))
            put(b, task.scores, at, power)
            b.statements.append(assign(task.total[v], read(task.total[v]) + power))
        return serial(key, count, b.statements)

    def _weighted(self, task: _Task, base: Any, low: Any, height: int, count: Any, factor: list[Any]) -> list[Any]:
        """Features [low, low + height) of the sum over the keys of a block, added to the rescaled result so far."""
        p, form, b = self.plan, self.form, Block(self.form.lanes)
        row, column = (self.sizes.tir(s) for s in p.steps["value"])
        width, position = task.vectors * form.lanes, p.position["value"]
        tile, first, into = (
            Tile(height, task.vectors, form.lanes),
            b.let(base + low * column),
            b.let(low * integer(width)),
        )

        def number(one: Block, i: int, k: Any) -> Any:
            return self.memory.load(one, position, first + k * row + integer(i) * column, None)

        def vector(wide: Block, v: int, k: Any) -> Any:
            return take(wide, task.scores, k * integer(width) + integer(v * form.lanes))

        b.statements += [*tile.start(), tile.accumulate(count, number, vector)]
        for i in range(height):
            for v in range(task.vectors):
                at = into + integer(i * width + v * form.lanes)
                value = tile.value(i, v)
                if factor:
                    value = b.let(value + take(b, task.result, at) * factor[v])
                put(b, task.result, at, value)
        return b.statements

    def _store(self, task: _Task) -> list[Any]:
        """The result tile divided by the sums, transposed into the output rows; a row that sees no key is zero."""
        p, form, b = self.plan, self.form, Block(self.form.lanes)
        lanes = form.lanes
        row, column = (self.sizes.tir(s) for s in p.steps["output"])
        assert is_one(column)
        base = b.let(self._base("output", task.head))
        for v in range(task.vectors):
            total = read(task.total[v])
            share = b.select(tirx.EQ(total, b.const(0.0)), b.const(0.0), b.const(1.0) / total)
            rows = [b.let(base + self._row(b, task.first + integer(v * lanes + i)) * row) for i in range(lanes)]
            whole, left = divmod(p.value_features, lanes)
            square = tirx.Var("square", "int64")
            low, inner = square * integer(lanes), Block(lanes)
            self._store_square(inner, task, v, low, lanes, share, rows)
            b.statements.append(serial(square, integer(whole), inner.statements))
            if left:
                self._store_square(b, task, v, integer(whole * lanes), left, share, rows)
        return b.statements

    def _store_square(self, b: Block, task: _Task, v: int, low: Any, valid: int, share: Any, rows: list[Any]) -> None:
        """Features [low, low + valid) of one vector of queries."""
        lanes = b.lanes
        at = [(low + integer(i)) * integer(task.vectors * lanes) + integer(v * lanes) for i in range(lanes)]
        square = [b.let(take(b, task.result, a) * share) for a in at]
        for target, value in zip(rows, transpose(b, square), strict=True):
            self._store_row(b, target + low, value, valid)

    def _store_row(self, b: Block, offset: Any, value: Any, valid: int) -> None:
        """The first `valid` lanes of a vector."""
        for done, width in pieces(valid, b.lanes):
            part = Block(width)
            lanes = [tirx.IntImm("int32", done + i) for i in range(width)]
            piece = value if width == b.lanes else part.let(tirx.Shuffle([value], lanes))
            self.memory.store(part, self.plan.position["output"], offset + integer(done), piece)
            b.statements += part.statements


def bias_of(plan: Attention, b: Block, value: Any) -> Any:
    """What an element of the mask adds to a score in base 2."""
    if plan.tensors[plan.position["mask"]].dtype is torch.bool:
        return b.select(value, b.const(0.0), b.const(-INF))
    return b.let(value * b.const(LOG2_E))


def _times(scale: float, b: Block, value: Any) -> Any:
    return value * b.const(scale)
