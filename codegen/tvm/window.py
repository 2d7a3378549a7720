"""The TIR function of a reduction over windows: columns in lanes, loops over the taps, the tail on the result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm import tirx

from ..plans.layout import Access
from ..plans.values import Value
from ..plans.windows import Window, WindowPlan
from . import math as vector
from .emit import NEUTRAL, Memory, Row, integer, parallel, parameters, pieces, prim_func, serial
from .finish import finish
from .layout import Sizes
from .math import Block, assign, on_stack, read, register
from .tile import split

RUN = 64  # taps that are summed before they are added to the total, so that long sums lose little


@dataclass(frozen=True)
class Form:
    """Lanes of a vector, vectors of a task, and whether tasks are threaded."""

    lanes: int
    vectors: int
    parallel: bool


def function(plan: WindowPlan, name: str, form: Form) -> Any:
    """The complete PrimFunc."""
    sizes = Sizes()
    buffers, memory = parameters(plan.tail.tensors, sizes)
    return prim_func(name, buffers, memory, _Emitter(plan, form, sizes, memory).statements())


@dataclass
class _Emitter:
    plan: WindowPlan
    form: Form
    sizes: Sizes
    memory: Memory

    def statements(self) -> list[Any]:
        """The loop over rows of the result and blocks of columns."""
        width, head, task, b = self.form.vectors * self.form.lanes, Block(1), tirx.Var("task", "int64"), Block(1)
        whole, rest = divmod(self.plan.columns, width)
        blocks, total = whole + (rest > 0), integer(1)
        lead = [self.sizes.tir(e) for e in self.plan.extents[:-1]]
        for size in lead:
            total = total * size
        *digits, block = split(b, task, [*lead, integer(blocks)])
        start = b.let(block * integer(width))
        body = tirx.SeqStmt(self._block(digits, start, width)) if whole else None
        if rest:
            last = tirx.SeqStmt(self._block(digits, start, rest))
            body = last if body is None else tirx.IfThenElse(tirx.EQ(block, integer(whole)), last, body)
        loop, tasks = parallel if self.form.parallel else serial, head.let(total * integer(blocks))
        return [*head.statements, loop(task, tasks, [*b.statements, body])]

    def _block(self, digits: list[Any], start: Any, count: int) -> list[Any]:
        """One row, `count` columns from `start` on."""
        plan, head = self.plan, Block(1)
        slots = pieces(count, self.form.lanes)
        totals = self._registers(slots, head)
        places = [integer(0) if k is None else digits[k] for k in plan.rows]
        ranges = [taps_inside(head, w, at, self.sizes) for w, at in zip(plan.windows[:-1], places, strict=True)]
        starts = [head.let(at * integer(w.stride) - integer(w.before))
                  for w, at in zip(plan.windows[:-1], places, strict=True)]  # fmt: skip
        bases = {v: head.let(self.sizes.offset(a, starts)) for v, a in plan.loads.items()}
        loops = [k for k, w in enumerate(plan.windows[:-1]) if w.taps != 1]
        head.statements += self._nest(loops, {}, ranges, bases, start, slots, totals)
        return [*head.statements, *self._finish(digits, ranges, start, slots, totals)]

    def _registers(self, slots: list[tuple[int, int]], head: Block) -> list[Any]:
        """One accumulator per vector, set to what changes nothing."""
        found = []
        for _, lanes in slots:
            b = Block(lanes)
            found.append(register(b.dtype("float32")))
            head.statements += [on_stack(found[-1]), assign(found[-1], b.const(NEUTRAL[self.plan.how]))]
        return found

    def _nest(self, loops: list[int], taps: dict[int, Any], ranges: list[tuple[Any, Any]], bases: dict[Value, Any],
              start: Any, slots: list[tuple[int, int]], totals: list[Any]) -> list[Any]:  # fmt: skip
        """Loops over the taps; long innermost ones run by run."""
        if not loops:
            return self._add(taps, bases, start, slots, totals)
        first, *rest = loops
        (low, high), tap = ranges[first], tirx.Var(f"tap{first}", "int64")

        def inside(at: Any, into: list[Any]) -> list[Any]:
            return self._nest(rest, taps | {first: at}, ranges, bases, start, slots, into)

        return self._run(low, high, self._spans(first, rest), tap, inside, slots, totals)

    def _spans(self, dim: int, rest: list[int]) -> list[int]:
        """Lengths of the runs of taps that are summed apart, from long to short."""
        taps = self.plan.windows[dim].taps
        if rest or self.plan.how != "sum" or (taps.is_Integer and taps <= RUN):
            return []
        return [RUN] if taps.is_Integer and taps <= RUN * RUN else [RUN * RUN, RUN]

    def _run(self, low: Any, high: Any, spans: list[int], tap: Any, inside: Callable[[Any, list[Any]], list[Any]],
             slots: list[tuple[int, int]], into: list[Any]) -> list[Any]:  # fmt: skip
        """Add the taps [low, high) to `into`, run by run."""
        if not spans:
            return [serial(tap, high - low, inside(low + tap, into))]
        run, b, span = tirx.Var("run", "int64"), Block(1), integer(spans[0])
        at = b.let(low + run * span)
        end = b.let(tirx.min(at + span, high))
        partial = self._registers(slots, b)
        body = [*b.statements, *self._run(at, end, spans[1:], tap, inside, slots, partial)]
        return [
            serial(run, tirx.floordiv(high - low + span - integer(1), span), body + self._join(slots, into, partial))
        ]

    def _join(self, slots: list[tuple[int, int]], totals: list[Any], parts: list[Any]) -> list[Any]:
        statements: list[Any] = []
        for (_, lanes), total, part in zip(slots, totals, parts, strict=True):
            b = Block(lanes)
            b.statements.append(assign(total, vector.combine("sum", b, read(total), read(part))))
            statements += b.statements
        return statements

    def _add(self, taps: dict[int, Any], bases: dict[Value, Any], start: Any, slots: list[tuple[int, int]],
             totals: list[Any]) -> list[Any]:  # fmt: skip
        """Combine one tap of every column into its accumulator."""
        head = Block(1)
        shifts = [taps.get(k, integer(0)) * integer(w.dilation) for k, w in enumerate(self.plan.windows[:-1])]
        moved = {v: head.let(bases[v] + self.sizes.offset(a, shifts, shift=False)) for v, a in self.plan.loads.items()}
        lines = Row(head, self.memory, self._reader(moved, self.plan.loads), self.form.lanes, 1)
        wide: list[Any] = []
        for (low, lanes), total in zip(slots, totals, strict=True):
            b = Block(lanes)
            x = lines.element(b, self.plan.operand, b.let(start + integer(low)), low, {}, 0)
            b.statements.append(assign(total, vector.combine(self.plan.how, b, read(total), x)))
            wide += b.statements
        return [*head.statements, *wide]

    def _finish(self, digits: list[Any], ranges: list[tuple[Any, Any]], start: Any, slots: list[tuple[int, int]],
                totals: list[Any]) -> list[Any]:  # fmt: skip
        """Divide, apply the tail, store."""
        head, registers = Block(1), dict(zip([low for low, _ in slots], totals, strict=True))
        factor = self._factor(head, ranges)

        def combined(b: Block, low: int) -> Any:
            total = read(registers[low])
            return total if factor is None else b.let(tirx.Div(total, b.spread(factor)))

        rest = finish(self.plan.tail, self.memory, self.sizes, digits, start, slots, combined)
        return [*head.statements, *rest]

    def _factor(self, b: Block, ranges: list[tuple[Any, Any]]) -> Any:
        """What sums are divided by."""
        divisor = self.plan.divisor
        if divisor is None or divisor == 1.0:
            return None
        if isinstance(divisor, float):
            return b.const(divisor)
        count: Any = integer(1)
        for low, high in ranges:
            count = count * (high - low)
        return b.let(tirx.Cast("float32", count))

    def _reader(self, bases: dict[Value, Any], loads: dict[Value, Access]) -> Callable[[Value], tuple[Any, Any]]:
        return lambda v: (bases[v], self.sizes.tir(loads[v].strides[-1]))


def taps_inside(b: Block, window: Window, place: Any, sizes: Sizes) -> tuple[Any, Any]:
    """First tap inside the operand, and the one after the last."""
    taps = sizes.tir(window.taps)
    if not window.clipped:
        return integer(0), taps
    step, before = integer(window.dilation), integer(window.before)
    origin = b.let(place * integer(window.stride) - before)
    low = b.let(tirx.max(integer(0), tirx.floordiv(step - integer(1) - origin, step)))
    high = tirx.floordiv(sizes.tir(window.size) - origin + step - integer(1), step)
    return low, b.let(tirx.max(low, tirx.min(taps, high)))
