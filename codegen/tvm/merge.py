"""The TIR function of token merging: similarity, choice, and weighted means in four loops of one kernel.

Similarity is summed in float64 and rounded to float32, so that duplicates tie exactly whatever the order of the sum,
and so that this kernel and torch choose the same tokens: a choice cannot be off by a rounding.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from tvm import tirx

from ...passes import token_ops
from ..plans.layout import Access
from ..plans.tokens import Merge
from .emit import Memory, integer, parallel, parameters, pieces, prim_func, put, serial, take
from .layout import Sizes
from .math import Block, assign, horizontal, on_stack, read, register
from .ranking import MASKED, Scratch, count_of, load, mark_best, store
from .tile import split

HEIGHT = 4  # even tokens of a tile
VECTORS = 4  # vectors of odd tokens of a tile: 16 accumulators
WIDE = 8  # float64 numbers of a vector; where a vector holds fewer, the code generator takes several
RUN = 8  # tokens of one task where tokens are averaged


def function(merge: Merge, name: str, lanes: int, threaded: bool) -> Any:
    """The complete PrimFunc."""
    sizes = Sizes()
    buffers, memory = parameters(merge.tensors, sizes)
    return prim_func(name, buffers, memory, _Emitter(merge, lanes, threaded, sizes, memory).statements())


@dataclass
class _Counts:
    """Int64 expressions: samples, tokens before and after, those at even and at odd places, tiles of odd ones, and
    elements from one of their features to the next: no power of two, which would share cache sets."""

    batch: Any
    tokens: Any
    left: Any
    even: Any
    odd: Any
    blocks: Any
    pitch: Any

    @classmethod
    def of(cls, merge: Merge, sizes: Sizes, b: Block) -> _Counts:
        """Computed in `b`."""
        batch, tokens, left = (count_of(b, sizes.tir(n)) for n in (merge.batch, merge.tokens, merge.left))
        even, odd = (count_of(b, tirx.floordiv(tokens + integer(k), integer(2))) for k in (1, 0))
        blocks = count_of(b, tirx.floordiv(odd + integer(WIDE * VECTORS - 1), integer(WIDE * VECTORS)))
        pitch = count_of(b, blocks * integer(WIDE * VECTORS) + integer(WIDE))
        return cls(batch, tokens, left, even, odd, blocks, pitch)


@dataclass
class _Emitter:
    """Emits the loops; scratch buffers hold for each sample:

    odd [compared, pitch] and row [even, compared] of the metric, inverse [tokens] of its lengths, kind [tokens] (-1
    protected, 0 padding, 1 other), best and partner [even], gone [even], place [tokens], total and start [left], next
    and member [tokens].
    """

    merge: Merge
    lanes: int
    threaded: bool
    sizes: Sizes
    memory: Memory
    scratch: Scratch = field(default_factory=Scratch)
    head: Block = field(default_factory=lambda: Block(1))

    def __post_init__(self) -> None:
        self.counts = _Counts.of(self.merge, self.sizes, self.head)

    def statements(self) -> list[Any]:
        """Allocate, then one loop after the other."""
        n, compared = self.counts, integer(self.merge.compared)
        for name, dtype, count in (
            ("odd", "float64", compared * n.pitch), ("row", "float64", compared * n.even),
            ("inverse", "float64", n.tokens), ("kind", "int32", n.tokens),
            ("best", "float32", n.even), ("partner", "int32", n.even), ("gone", "int32", n.even),
            ("place", "int32", n.tokens), ("total", "float32", n.left), ("start", "int32", n.left + integer(1)),
            ("next", "int32", n.left), ("member", "int32", n.tokens),
        ):  # fmt: skip
            self.head.statements.append(self.scratch.make(name, dtype, n.batch * count))
        tiles = tirx.floordiv(n.even + integer(HEIGHT - 1), integer(HEIGHT))
        runs = tirx.floordiv(n.left + integer(RUN - 1), integer(RUN))
        return [
            *self.head.statements,
            self._loop(n.tokens, self._measure),
            self._loop(tiles, self._compare),
            self._loop(integer(1), self._choose),
            *([] if self.merge.outputs[0] is None else [self._loop(runs, self._average)]),
        ]

    def _loop(self, each: Any, body: Callable[[Any, Any], list[Any]]) -> Any:
        task, b = tirx.Var("task", "int64"), Block(1)
        sample, number = split(b, task, [self.counts.batch, each])
        loop = parallel if self.threaded else serial
        return loop(task, self.counts.batch * each, [*b.statements, *body(sample, number)])

    def _value(self, b: Block, access: Access, *digits: Any) -> Any:
        """One element, as a computing value."""
        return self.memory.load(b, access.buffer, self.sizes.offset(access, digits), None)

    def _measure(self, sample: Any, token: Any) -> list[Any]:
        """Of one token: its kind, the inverse length of its metric, and its metric's column if its place is odd."""
        m, b = self.merge, Block(1)
        at = b.let(sample * self.counts.tokens + token)
        kind: Any = tirx.const(1, "int32")
        if m.valid is not None:
            valid = self._value(b, m.valid, sample, token)
            kind = tirx.Select(valid, kind, tirx.const(0, "int32"))
        for place in m.protected:
            protected = integer(place) if place >= 0 else self.counts.tokens + integer(place)
            kind = tirx.Select(tirx.EQ(token, protected), tirx.const(-1, "int32"), kind)
        b.statements.append(store(self.scratch["kind"], at, kind))
        wide, rest = register(f"float64x{WIDE}"), register("float64")
        b.statements += [on_stack(wide), assign(wide, Block(WIDE).const(0.0, "float64")),
                         on_stack(rest), assign(rest, Block(1).const(0.0, "float64"))]  # fmt: skip
        copies = [tirx.SeqStmt(self._copy(sample, token, odd, wide, rest)) for odd in (True, False)]
        odd = tirx.EQ(tirx.floormod(token, integer(2)), integer(1))
        b.statements.append(tirx.IfThenElse(odd, *copies))
        statements, total = horizontal("sum", read(wide), WIDE)
        b.statements += statements
        least = tirx.const(float(torch.finfo(torch.float32).tiny), "float64")
        length = b.let(tirx.max(tirx.sqrt(b.let(total + read(rest))), least))
        b.statements.append(store(self.scratch["inverse"], at, tirx.Div(tirx.const(1.0, "float64"), length)))
        return b.statements

    def _copy(self, sample: Any, token: Any, odd: bool, wide: Any, rest: Any) -> list[Any]:
        """Store a token's metric as a column (odd places) or a row, and add its squares up."""
        m, statements = self.merge, list[Any]()
        half, step = tirx.floordiv(token, integer(2)), self.sizes.tir(m.metric.strides[-1])
        for first, lanes, count, total in ((0, WIDE, m.compared // WIDE, wide),
                                           (m.compared // WIDE * WIDE, 1, m.compared % WIDE, rest)):  # fmt: skip
            d, b = tirx.Var("d", "int64"), Block(lanes)
            feature = integer(first) + d * integer(lanes)
            x = self.memory.load(b, m.metric.buffer, self.sizes.offset(m.metric, (sample, token, feature)), step)
            exact = b.let(tirx.Cast(b.dtype("float64"), x))
            b.statements.append(assign(total, read(total) + exact * exact))
            if odd:
                at = (sample * integer(m.compared) + feature) * self.counts.pitch + half
                index = at if lanes == 1 else tirx.Ramp(at, self.counts.pitch, lanes)
                b.statements.append(tirx.BufferStore(self.scratch["odd"], exact, [index]))
            else:
                at = (sample * self.counts.even + half) * integer(m.compared) + feature
                put(b, self.scratch["row"], at, exact)
            statements.append(serial(d, integer(count), b.statements))
        return statements

    def _compare(self, sample: Any, tile: Any) -> list[Any]:
        """Of some even tokens: the most similar odd one."""
        b = Block(1)
        last = self.counts.even - integer(1)
        rows = [b.let(tirx.min(tile * integer(HEIGHT) + integer(r), last)) for r in range(HEIGHT)]
        best = [register(f"float32x{WIDE}") for _ in rows]
        partner = [register(f"int32x{WIDE}") for _ in rows]
        wide = Block(WIDE)
        for x, y in zip(best, partner, strict=True):
            b.statements += [on_stack(x), on_stack(y), assign(x, wide.const(token_ops.APART)),
                             assign(y, wide.const(0, "int32"))]  # fmt: skip
        of = sample * self.counts.tokens
        kinds = [b.let(load(self.scratch["kind"], of + row * integer(2))) for row in rows]
        inverse = [b.let(load(self.scratch["inverse"], of + row * integer(2))) for row in rows]
        block = tirx.Var("block", "int64")
        body = self._products(sample, rows, block * integer(WIDE * VECTORS), inverse, kinds, best, partner)
        b.statements.append(serial(block, self.counts.blocks, body))
        for row, kind, x, y in zip(rows, kinds, best, partner, strict=True):
            b.statements += self._joined(sample * self.counts.even + row, kind, x, y)
        return b.statements

    def _products(self, sample: Any, rows: list[Any], first: Any, inverse: list[Any], kinds: list[Any],
                  best: list[Any], partner: list[Any]) -> list[Any]:  # fmt: skip
        """Scores of some rows with one block of odd tokens, and what they change in the best ones."""
        m, start, d = self.merge, Block(WIDE), tirx.Var("d", "int64")
        sums = [[register(f"float64x{WIDE}") for _ in range(VECTORS)] for _ in rows]
        for total in itertools.chain(*sums):
            start.statements += [on_stack(total), assign(total, start.const(0.0, "float64"))]
        inner, one = Block(WIDE), Block(1)
        base = one.let((sample * integer(m.compared) + d) * self.counts.pitch + first)
        columns = [inner.let(take(inner, self.scratch["odd"], base + integer(v * WIDE))) for v in range(VECTORS)]
        for row, totals in zip(rows, sums, strict=True):
            at = (sample * self.counts.even + row) * integer(m.compared) + d
            x = inner.spread(one.let(load(self.scratch["row"], at)))
            for total, column in zip(totals, columns, strict=True):
                inner.statements.append(assign(total, read(total) + x * column))
        loop = serial(d, integer(m.compared), [*one.statements, *inner.statements])
        ends: list[Any] = []
        for v in range(VECTORS):
            ends += self._update(sample, first + integer(v * WIDE), v, sums, inverse, kinds, best, partner)
        return [*start.statements, loop, *ends]

    def _update(self, sample: Any, first: Any, v: int, sums: list[list[Any]], inverse: list[Any], kinds: list[Any],
                best: list[Any], partner: list[Any]) -> list[Any]:  # fmt: skip
        """Compare one vector of scores of every row with the best so far; the first of equal ones stays."""
        b, k = Block(WIDE), tirx.Var("k", "int64")
        place = sample * self.counts.tokens + integer(1)
        lengths = tirx.decl_buffer((WIDE,), "float64", "lengths", data_alignment=64)
        others = tirx.decl_buffer((WIDE,), "int32", "others", data_alignment=64)
        at = tirx.min(first + k, self.counts.odd - integer(1)) * integer(2) + place
        inside = first + k < self.counts.odd
        gather = serial(k, integer(WIDE), [
            store(lengths, k, load(self.scratch["inverse"], at)),
            store(others, k, tirx.Select(inside, load(self.scratch["kind"], at), tirx.const(-1, "int32"))),
        ])  # fmt: skip
        scale, kind = b.let(take(b, lengths, integer(0))), b.let(take(b, others, integer(0)))
        index = b.let(tirx.Cast(b.dtype("int32"), tirx.Ramp(first, integer(1), WIDE)))
        for row, totals in enumerate(sums):
            score = b.let(read(totals[v]) * b.spread(inverse[row]) * scale)
            score = b.let(tirx.Cast(b.dtype("float32"), score))
            better = tirx.And(tirx.EQ(kind, b.spread(kinds[row])), score > read(best[row]))
            chosen = b.let(tirx.Select(better, index, read(partner[row])))
            higher = b.let(tirx.Select(better, score, read(best[row])))
            b.statements += [assign(partner[row], chosen), assign(best[row], higher)]
        return [on_stack(lengths), on_stack(others), gather, *b.statements]

    def _joined(self, at: Any, kind: Any, best: Any, partner: Any) -> list[Any]:
        """The best lane of a row: the highest score, of equal ones the lowest place. Protected rows never merge."""
        lane, b = tirx.Var("lane", "int64"), Block(1)
        scores = tirx.decl_buffer((WIDE,), "float32", "scores", data_alignment=64)
        places = tirx.decl_buffer((WIDE,), "int32", "places", data_alignment=64)
        wide = Block(WIDE)
        put(wide, scores, integer(0), read(best))
        put(wide, places, integer(0), read(partner))
        high, low = register("float32"), register("int32")
        score, place = b.let(load(scores, lane)), b.let(load(places, lane))
        tie = tirx.And(tirx.EQ(score, read(high)), place < read(low))
        better = tirx.Or(score > read(high), tie)
        b.statements.append(tirx.IfThenElse(better, tirx.SeqStmt([assign(high, score), assign(low, place)]), None))
        alone = kind < tirx.const(0, "int32")
        return [
            on_stack(scores), on_stack(places), *wide.statements, on_stack(high), on_stack(low),
            assign(high, load(scores, integer(0))), assign(low, load(places, integer(0))),
            serial(lane, integer(WIDE), b.statements),
            store(self.scratch["best"], at, tirx.Select(alone, Block(1).const(MASKED), read(high))),
            store(self.scratch["partner"], at, read(low)),
        ]  # fmt: skip

    def _choose(self, sample: Any, _only: Any) -> list[Any]:
        """Of one sample: which even tokens go, where to, and who makes up each token that is left."""
        counts, scratch = self.counts, self.scratch
        even, tokens, left = (sample * n for n in (counts.even, counts.tokens, counts.left))
        ranked = mark_best(
            scratch["best"], even, counts.even, counts.tokens - counts.left, scratch["gone"], even, self.lanes
        )
        return [
            *ranked,
            *self._stay(sample, even, tokens, left),
            self._go(sample, even, tokens, left),
            *self._list(sample, tokens, left),
        ]

    def _stay(self, sample: Any, even: Any, tokens: Any, left: Any) -> list[Any]:
        """Places of the tokens that stay, in order; `next` counts who makes up each."""
        scratch, outputs, b, inner = self.scratch, self.merge.outputs, Block(1), Block(1)
        count, t = register("int64"), tirx.Var("t", "int64")
        half, odd = tirx.floordiv(t, integer(2)), tirx.EQ(tirx.floormod(t, integer(2)), integer(1))
        mark = b.let(load(scratch["gone"], even + half))
        place = inner.let(read(count))
        inner.statements += [
            store(scratch["place"], tokens + t, tirx.Cast("int32", place)),
            store(scratch["next"], left + place, tirx.const(1, "int32")),
            store(scratch["total"], left + place, self._value(inner, self.merge.size, sample, t)),
            assign(count, place + integer(1)),
        ]
        if outputs[2] is not None:
            self.memory.store(inner, outputs[2], left + place, t)
        stays = tirx.Or(odd, tirx.EQ(mark, tirx.const(0, "int32")))
        b.statements.append(tirx.IfThenElse(stays, tirx.SeqStmt(inner.statements), None))
        return [on_stack(count), assign(count, integer(0)), serial(t, self.counts.tokens, b.statements)]

    def _go(self, sample: Any, even: Any, tokens: Any, left: Any) -> Any:
        """Every token that goes takes the place of its partner and adds its size."""
        scratch, b, inner, i = self.scratch, Block(1), Block(1), tirx.Var("i", "int64")
        mark = b.let(load(scratch["gone"], even + i))
        partner = inner.let(tirx.Cast("int64", load(scratch["partner"], even + i)))
        place = inner.let(load(scratch["place"], tokens + partner * integer(2) + integer(1)))
        at = inner.let(left + tirx.Cast("int64", place))
        size = self._value(inner, self.merge.size, sample, i * integer(2))
        inner.statements += [
            store(scratch["place"], tokens + i * integer(2), place),
            store(scratch["next"], at, load(scratch["next"], at) + tirx.const(1, "int32")),
            store(scratch["total"], at, load(scratch["total"], at) + size),
        ]
        goes = tirx.EQ(mark, tirx.const(1, "int32"))
        b.statements.append(tirx.IfThenElse(goes, tirx.SeqStmt(inner.statements), None))
        return serial(i, self.counts.even, b.statements)

    def _list(self, sample: Any, tokens: Any, left: Any) -> list[Any]:
        """`member` from start[p] to start[p + 1]: the tokens that make up token p of the result, in order."""
        scratch, m, p, t = self.scratch, self.merge, tirx.Var("p", "int64"), tirx.Var("t", "int64")
        starts, one = sample * (self.counts.left + integer(1)), tirx.const(1, "int32")
        b, count = Block(1), register("int32")
        begin, own = b.let(read(count)), b.let(load(scratch["next"], left + p))
        b.statements += [
            store(scratch["next"], left + p, begin), assign(count, begin + own),
            store(scratch["start"], starts + p + integer(1), begin + own),
        ]  # fmt: skip
        if m.outputs[1] is not None:
            self.memory.store(b, m.outputs[1], left + p, load(scratch["total"], left + p))
        fill_in = Block(1)
        own = fill_in.let(tirx.Cast("int64", load(scratch["place"], tokens + t)))
        if m.outputs[3] is not None:
            self.memory.store(fill_in, m.outputs[3], tokens + t, own)
        place = fill_in.let(left + own)
        at = fill_in.let(load(scratch["next"], place))
        fill_in.statements += [
            store(scratch["member"], tokens + tirx.Cast("int64", at), tirx.Cast("int32", t)),
            store(scratch["next"], place, at + one),
        ]
        return [
            on_stack(count), assign(count, tirx.const(0, "int32")),
            store(scratch["start"], starts, tirx.const(0, "int32")),
            serial(p, self.counts.left, b.statements), serial(t, self.counts.tokens, fill_in.statements),
        ]  # fmt: skip

    def _average(self, sample: Any, run: Any) -> list[Any]:
        """Some tokens of the result: means of those that make them up, weighted by size."""
        m, b, p = self.merge, Block(1), tirx.Var("p", "int64")
        first = run * integer(RUN)
        place, starts = first + p, sample * (self.counts.left + integer(1))
        bounds = [b.let(tirx.Cast("int64", load(self.scratch["start"], starts + place + integer(k)))) for k in (0, 1)]
        total = b.let(load(self.scratch["total"], sample * self.counts.left + place))
        width, group = self.lanes * VECTORS, tirx.Var("group", "int64")
        whole = m.features // width
        if whole:
            slots = [(v * self.lanes, self.lanes) for v in range(VECTORS)]
            body = self._means(sample, place, bounds, total, group * integer(width), slots)
            b.statements.append(serial(group, integer(whole), body))
        if rest := m.features - whole * width:
            b.statements += self._means(sample, place, bounds, total, integer(whole * width), pieces(rest, self.lanes))
        count = tirx.min(integer(RUN), self.counts.left - first)
        return [serial(p, count, b.statements)]

    def _means(self, sample: Any, place: Any, bounds: list[Any], total: Any, first: Any,
               slots: list[tuple[int, int]]) -> list[Any]:  # fmt: skip
        """Some features of one token of the result."""
        m, one, k = self.merge, Block(1), tirx.Var("k", "int64")
        assert m.outputs[0] is not None
        member = load(self.scratch["member"], sample * self.counts.tokens + bounds[0] + k)
        token = one.let(tirx.Cast("int64", member))
        weight = one.let(tirx.Div(self._value(one, m.size, sample, token), total))
        base = one.let(self.sizes.offset(m.input, (sample, token, first)))
        step = self.sizes.tir(m.input.strides[-1])
        before, inner, after = list[Any](), list[Any](), list[Any]()
        out = (sample * self.counts.left + place) * integer(m.features) + first
        for low, lanes in slots:
            b, kept = Block(lanes), register(Block(lanes).dtype("float32"))
            before += [on_stack(kept), assign(kept, b.const(0.0))]
            x = self.memory.load(b, m.input.buffer, base + integer(low) * step, step)
            inner += [*b.statements, assign(kept, read(kept) + x * b.spread(weight))]
            end = Block(lanes)
            self.memory.store(end, m.outputs[0], out + integer(low), read(kept))
            after += end.statements
        return [*before, serial(k, bounds[1] - bounds[0], [*one.statements, *inner]), *after]
