"""Attention for few queries, as in decoding: features in the lanes, keys split over tasks.

With one query there is nothing to put into the lanes but features, and the time goes into reading K and V once. A task
takes one head and one run of keys: scores of as many keys as there are lanes come from partial products that are
summed by exchanging halves, log2(lanes) times; the weighted sum of V keeps several accumulators so that additions do
not wait for each other. Each task leaves its maximum, sum and result; a second loop combines the runs of a head
(Dao et al., "Flash-Decoding for long-context inference", 2023). Query heads that share keys share the reading of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm import tirx

from ..plans.attention import Attention
from .attention import LOG2_E, bias_of
from .emit import Memory, integer, parallel, parameters, prim_func, put, serial, take
from .layout import Sizes
from .math import INF, Block, assign, exchange, exp2_nonpositive, horizontal, on_stack, read, register
from .tile import split

ROWS = 4  # queries of a task: their accumulators must fit the registers
CHAINS = 4  # sums that are kept apart


@dataclass(frozen=True)
class DecodeForm:
    """Lanes of a vector, keys of a task (whole vectors of them), whether tasks are spread over threads."""

    lanes: int
    run: int
    parallel: bool


def reason_against(p: Attention, lanes: int) -> str | None:
    """Why this form does not fit."""
    if not p.queries.is_Integer or int(p.queries) * p.group > ROWS:
        return "more queries than fit the registers"
    if p.causal:
        return "causal"
    if p.heads["value"][-1][1] != p.group:
        return "keys and values with different numbers of heads"
    if p.features % lanes or p.value_features % lanes or max(p.features, p.value_features) > 8 * lanes:
        return "features that do not fill vectors"
    if any(p.steps[n][1] != 1 for n in ("query", "key", "value")):
        return "features that are not neighbours in memory"
    return None


def function(plan: Attention, name: str, form: DecodeForm) -> Any:
    """The complete PrimFunc; parameters are the region's inputs and its output."""
    sizes = Sizes()
    buffers, memory = parameters(plan.tensors, sizes)
    return prim_func(name, buffers, memory, _Emitter(plan, form, sizes, memory).statements())


@dataclass
class _Emitter:
    plan: Attention
    form: DecodeForm
    sizes: Sizes
    memory: Memory
    part: Any = None  # scratch: [heads of keys, runs, queries, maximum and sum in a vector each, then the result]

    @property
    def rows(self) -> int:
        """Queries that read the same keys."""
        return int(self.plan.queries) * self.plan.group

    @property
    def stride(self) -> int:
        """Elements that one query of one run leaves."""
        return self.plan.value_features + 2 * self.form.lanes

    def statements(self) -> list[Any]:
        """Both loops: over heads and runs of keys, then over heads."""
        p, form, head = self.plan, self.form, Block(1)
        lead = [self.sizes.tir(e) for e in p.lead]
        lead[-1] = tirx.floordiv(lead[-1], integer(p.group))
        runs = head.let(tirx.floordiv(self.sizes.tir(p.keys) + integer(form.run - 1), integer(form.run)))
        heads: Any = integer(1)
        for size in lead:
            heads = heads * size
        heads = head.let(heads)
        count = heads * runs * integer(self.rows * self.stride)
        self.part = tirx.decl_buffer((count,), "float32", "part", data_alignment=64)
        loop = parallel if form.parallel else serial
        task, b = tirx.Var("task", "int64"), Block(1)
        *digits, run = split(b, task, [*lead, runs])
        first = loop(task, heads * runs, [*b.statements, *self._run(digits, run, task)])
        number, c = tirx.Var("head", "int64"), Block(1)
        digits = split(c, number, lead)
        second = loop(number, heads, [*c.statements, *self._combine(digits, number, runs)])
        return [*head.statements, tirx.AllocBuffer(self.part), first, second]

    def _base(self, which: str, digits: list[Any], row: int = 0) -> Any:
        """Offset of a query row, or of the keys and values that it reads, or of its mask."""
        p = self.plan
        queries = int(p.queries)
        grouped = which in ("query", "output", "mask")
        base: Any = integer(0)
        for d, (digit, (stride, group)) in enumerate(zip(digits, p.heads[which], strict=True)):
            if stride == 0:
                continue
            own = digit
            if d == len(digits) - 1:
                own = digit * integer(p.group) + integer(row // queries) if grouped else digit
                own = tirx.floordiv(own, integer(group)) if grouped and group > 1 else own
            base = base + own * self.sizes.tir(stride)
        return base + integer(row % queries) * self.sizes.tir(p.steps[which][0]) if grouped else base

    def _run(self, digits: list[Any], run: Any, task: Any) -> list[Any]:
        """Maximum, sum and result of one run of keys for every query row."""
        p, form, b = self.plan, self.form, Block(self.form.lanes)
        start = b.let(run * integer(form.run))
        count = b.let(tirx.min(self.sizes.tir(p.keys) - start, integer(form.run)))
        scores = tirx.decl_buffer((self.rows * form.run,), "float32", "scores", data_alignment=64)
        b.statements.append(on_stack(scores))
        peaks = [register(b.dtype("float32")) for _ in range(self.rows)]
        for r in peaks:
            b.statements += [on_stack(r), assign(r, b.const(-INF))]
        b.statements += self._scores(digits, start, count, scores, peaks)
        rest = [b.let(task * integer(self.rows * self.stride) + integer(r * self.stride)) for r in range(self.rows)]
        for r in range(self.rows):
            statements, peak = horizontal("peak", read(peaks[r]), form.lanes)
            b.statements += statements
            one = Block(1)
            shift = one.select(tirx.EQ(peak, one.const(-INF)), one.const(0.0), peak)
            b.statements += one.statements
            total = self._powers(b, scores, r, count, shift)
            put(b, self.part, rest[r], b.spread(peak))
            put(b, self.part, rest[r] + integer(form.lanes), b.spread(total))
        return [*b.statements, *self._weighted(digits, start, count, scores, rest)]

    def _scores(self, digits: list[Any], start: Any, count: Any, scores: Any, peaks: list[Any]) -> list[Any]:
        """Scores of all keys of the run, `lanes` at a time; keys beyond the last one repeat it and count nothing."""
        p, lanes, b = self.plan, self.form.lanes, Block(self.form.lanes)
        vectors = p.features // lanes
        scale = b.const(p.scale * LOG2_E)
        rows = []
        for r in range(self.rows):
            base = b.let(self._base("query", digits, r))
            at = [base + integer(v * lanes) for v in range(vectors)]
            rows.append([b.let(self.memory.load(b, p.position["query"], a, integer(1)) * scale) for a in at])
        step, keys = self.sizes.tir(p.steps["key"][0]), b.let(self._base("key", digits))
        group, inner = tirx.Var("group", "int64"), Block(lanes)
        first = group * integer(lanes)
        parts: list[list[Any]] = [[] for _ in range(self.rows)]
        for k in range(lanes):
            number = inner.let(tirx.min(first + integer(k), count - integer(1)))
            at = inner.let(keys + (start + number) * step)
            loaded = [inner.let(self.memory.load(inner, p.position["key"], at + integer(v * lanes), integer(1)))
                      for v in range(vectors)]  # fmt: skip
            for r in range(self.rows):
                total = inner.let(rows[r][0] * loaded[0])
                for v in range(1, vectors):
                    total = inner.let(total + rows[r][v] * loaded[v])
                parts[r].append(total)
        lane = tirx.Ramp(tirx.IntImm("int32", 0), tirx.IntImm("int32", 1), lanes)
        left = inner.let(tirx.Cast("int32", count - first))
        for r in range(self.rows):
            score = self._biased(inner, digits, r, start + first, count - first, sum_each(inner, parts[r]))
            score = inner.select(lane < inner.spread(left), score, inner.const(-INF))
            put(inner, scores, integer(r * self.form.run) + first, score)
            peak = read(peaks[r])
            inner.statements.append(assign(peaks[r], tirx.Select(score > peak, score, peak)))
        groups = tirx.floordiv(count + integer(lanes - 1), integer(lanes))
        return [*b.statements, serial(group, groups, inner.statements)]

    def _biased(self, b: Block, digits: list[Any], row: int, key: Any, left: Any, score: Any) -> Any:
        """Scores plus the mask of these keys."""
        p = self.plan
        if not p.masked:
            return score
        position, step = p.position["mask"], self.sizes.tir(p.steps["mask"][1])
        bias = tirx.decl_buffer((b.lanes,), "float32", "bias", data_alignment=64)
        b.statements.append(on_stack(bias))
        base, lane, one = b.let(self._base("mask", digits, row) + key * step), tirx.Var("lane", "int64"), Block(1)
        inside = tirx.min(lane, left - integer(1))
        value = self.memory.load(one, position, base + inside * step, None)
        put(one, bias, lane, bias_of(p, one, value))
        b.statements.append(serial(lane, integer(b.lanes), one.statements))
        return b.let(score + take(b, bias, integer(0)))

    def _powers(self, b: Block, scores: Any, row: int, count: Any, shift: Any) -> Any:
        """Scores of a row to powers of two, in place; their sum."""
        lanes, group, inner = self.form.lanes, tirx.Var("group", "int64"), Block(self.form.lanes)
        total = register(b.dtype("float32"))
        b.statements += [on_stack(total), assign(total, b.const(0.0))]
        at = integer(row * self.form.run) + group * integer(lanes)
        power = exp2_nonpositive(inner, inner.let(take(inner, scores, at) - inner.spread(shift)))
        put(inner, scores, at, power)
        inner.statements.append(assign(total, read(total) + power))
        groups = tirx.floordiv(count + integer(lanes - 1), integer(lanes))
        b.statements.append(serial(group, groups, inner.statements))
        statements, result = horizontal("sum", read(total), lanes)
        b.statements += statements
        return result

    def _weighted(self, digits: list[Any], start: Any, count: Any, scores: Any, rest: list[Any]) -> list[Any]:
        """The sum of the run's values, weighted, for every query row."""
        p, lanes, b = self.plan, self.form.lanes, Block(self.form.lanes)
        vectors = p.value_features // lanes
        chains = max(1, CHAINS // self.rows)
        sums = [[[register(b.dtype("float32")) for _ in range(vectors)] for _ in range(self.rows)]
                for _ in range(chains)]  # fmt: skip
        for r in (x for chain in sums for row in chain for x in row):
            b.statements += [on_stack(r), assign(r, b.const(0.0))]
        step = self.sizes.tir(p.steps["value"][0])
        base = b.let(self._base("value", digits) + start * step)

        def add(inner: Block, key: Any, chain: int) -> None:
            at = inner.let(base + key * step)
            loaded = [inner.let(self.memory.load(inner, p.position["value"], at + integer(v * lanes), integer(1)))
                      for v in range(vectors)]  # fmt: skip
            for r in range(self.rows):
                weight = inner.let(inner.spread(tirx.BufferLoad(scores, [integer(r * self.form.run) + key])))
                for v in range(vectors):
                    own = sums[chain][r][v]
                    inner.statements.append(assign(own, read(own) + weight * loaded[v]))

        key, many, alone = tirx.Var("key", "int64"), Block(lanes), Block(lanes)
        for chain in range(chains):
            add(many, key * integer(chains) + integer(chain), chain)
        whole = b.let(tirx.floordiv(count, integer(chains)))
        b.statements.append(serial(key, whole, many.statements))
        left = tirx.Var("left", "int64")
        add(alone, whole * integer(chains) + left, 0)
        b.statements.append(serial(left, count - whole * integer(chains), alone.statements))
        for r in range(self.rows):
            for v in range(vectors):
                total = read(sums[0][r][v])
                for chain in range(1, chains):
                    total = b.let(total + read(sums[chain][r][v]))
                put(b, self.part, rest[r] + integer((2 + v) * lanes), total)
        return b.statements

    def _combine(self, digits: list[Any], number: Any, runs: Any) -> list[Any]:
        """The runs of one head put together: each is scaled by 2**(its maximum - the largest one)."""
        p, lanes, b = self.plan, self.form.lanes, Block(self.form.lanes)
        vectors = p.value_features // lanes
        for r in range(self.rows):

            def at(run: Any, place: int, r: int = r) -> Any:
                own = (number * runs + run) * integer(self.rows * self.stride)
                return own + integer(r * self.stride + place * lanes)

            peak, total = register(b.dtype("float32")), register(b.dtype("float32"))
            sums = [register(b.dtype("float32")) for _ in range(vectors)]
            b.statements += [on_stack(peak), assign(peak, b.const(-INF))]
            for x in (total, *sums):
                b.statements += [on_stack(x), assign(x, b.const(0.0))]
            run, c = tirx.Var("run", "int64"), Block(lanes)
            own = c.let(take(c, self.part, at(run, 0)))
            c.statements.append(assign(peak, tirx.Select(own > read(peak), own, read(peak))))
            b.statements.append(serial(run, runs, c.statements))
            run, c = tirx.Var("run", "int64"), Block(lanes)
            shift = b.select(tirx.EQ(read(peak), b.const(-INF)), b.const(0.0), read(peak))
            factor = exp2_nonpositive(c, c.let(take(c, self.part, at(run, 0)) - shift))
            c.statements.append(assign(total, read(total) + factor * take(c, self.part, at(run, 1))))
            for v, x in enumerate(sums):
                c.statements.append(assign(x, read(x) + factor * take(c, self.part, at(run, 2 + v))))
            b.statements.append(serial(run, runs, c.statements))
            share = b.select(tirx.EQ(read(total), b.const(0.0)), b.const(0.0), b.const(1.0) / read(total))
            base = b.let(self._base("output", digits, r))
            for v, x in enumerate(sums):
                self.memory.store(b, p.position["output"], base + integer(v * lanes), read(x) * share)
        return b.statements


def sum_each(b: Block, vectors: list[Any]) -> Any:
    """The sums of as many vectors as they have lanes, vector k's in lane k: halves are exchanged and added."""
    distance, rows = b.lanes // 2, list(vectors)
    while distance:
        pairs = [exchange(b, rows[i], rows[i + distance], distance) for i in range(distance)]
        rows, distance = [b.let(one + two) for one, two in pairs], distance // 2
    return rows[0]
