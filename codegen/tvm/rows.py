"""The TIR function of a planned region: parameters, the loop over rows, and the passes over each row."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import sympy
from tvm import tirx
from tvm.ir import StringImm

from ..plans.layout import Access, expression
from ..plans.rows import CHUNK, Plan
from ..plans.values import Value
from .emit import RECOMPUTE, Also, Memory, Row, integer, parallel, parameters, prim_func, put, sequence, serial
from .layout import Sizes
from .math import Block, assign, on_stack, read, register

ROWS_PER_TASK = 4  # rows that share one scratch row
STACK = 65536  # bytes of scratch that may lie in the frame of a task


@dataclass(frozen=True)
class Form:
    """How a region is laid out in loops: lanes of a vector, vectors per round, and from how many tasks on to thread."""

    lanes: int
    unroll: int
    parallel: bool
    threshold: int = 0


def function(plan: Plan, name: str, form: Form) -> Any:
    """The complete PrimFunc."""
    sizes = Sizes()
    buffers, memory = parameters(plan.tensors, sizes)
    return prim_func(name, buffers, memory, _Emitter(plan, form, sizes, memory).statements())


def scratch_of(plan: Plan) -> list[Value]:
    """Values that are kept for a later pass over the row because computing them again is dear."""
    kept: dict[Value, None] = {}

    def walk(v: Value, stage: int) -> None:
        if not v.vary:
            return
        if v.stage < stage and v.cost > RECOMPUTE and v.kind == "float32":
            kept[v] = None
            return
        for a in v.args:
            walk(a, stage)

    for stage, values in plan.reductions.items():
        for v in values:
            walk(v.args[0], stage)
    for o in plan.outputs:
        walk(o.value, o.value.stage)
    return list(kept)


@dataclass
class _Emitter:
    plan: Plan
    form: Form
    sizes: Sizes
    memory: Memory

    def statements(self) -> list[Any]:
        """The loop over tasks, threaded or not."""
        plan, head = self.plan, Block(1)
        rows = head.let(self.sizes.tir(sympy.Mul(*plan.extents[:-1])))
        head.statements += self._check_entries(rows)
        if not plan.segments:
            per, tasks = 1, head.let(rows * self._chunks())
        else:
            per = ROWS_PER_TASK if scratch_of(plan) else 1
            tasks = head.let(tirx.floordiv(rows + integer(per - 1), integer(per)))
        if not self.form.parallel:
            return [*head.statements, self._tasks(tasks, rows, per, serial)]
        threaded = self._tasks(tasks, rows, per, parallel)
        if self.form.threshold <= 1:
            return [*head.statements, threaded]
        alone = self._tasks(tasks, rows, per, serial)
        return [*head.statements, tirx.IfThenElse(tasks >= integer(self.form.threshold), threaded, alone)]

    def _chunks(self) -> Any:
        columns = self.sizes.tir(self.plan.extents[-1])
        return tirx.floordiv(columns + integer(CHUNK - 1), integer(CHUNK))

    def _tasks(self, tasks: Any, rows: Any, per: int, loop_of: Any) -> Any:
        task = tirx.Var("task", "int64")
        if not self.plan.segments:
            b = Block(1)
            chunks = b.let(self._chunks())
            row, low = b.let(tirx.floordiv(task, chunks)), b.let(tirx.floormod(task, chunks) * integer(CHUNK))
            high = b.let(tirx.min(low + integer(CHUNK), self.sizes.tir(self.plan.extents[-1])))
            return loop_of(task, tasks, b.statements + self._row(row, low, high))
        if per == 1:
            return loop_of(task, tasks, self._row(task))
        b, local = Block(1), tirx.Var("row", "int64")
        small = int(self.plan.extents[-1]) * len(scratch_of(self.plan)) <= STACK // 4
        for v in scratch_of(self.plan):
            size = int(self.plan.extents[-1])
            self.memory.scratch[v] = tirx.decl_buffer((size,), "float32", "kept", data_alignment=64)
            b.statements.append(on_stack(self.memory.scratch[v]) if small else tirx.AllocBuffer(self.memory.scratch[v]))
        count = b.let(tirx.min(integer(per), rows - task * integer(per)))
        inner = serial(local, count, self._row(task * integer(per) + local))
        return loop_of(task, tasks, [*b.statements, inner])

    def _row(self, index: Any, low: Any = None, high: Any = None) -> list[Any]:
        """The row with this number: all passes, for the part that its picks read."""
        block, pick = Block(1), self.plan.pick
        digits = self._digits(block, block.let(index))
        if pick is None:
            return [*block.statements, *self._passes(digits, 0, low, high)]
        place, bounds = block.let(self.sizes.offset(self.plan.loads[pick], digits)), pick.attr[1]
        chain = sequence(self._passes(digits, len(bounds) - 1, low, high))
        for part in reversed(range(len(bounds) - 1)):
            own = sequence(self._passes(digits, part, low, high))
            chain = tirx.IfThenElse(place < integer(bounds[part + 1]), own, chain)
        return [*block.statements, chain]

    def _passes(self, digits: list[Any], part: int, low: Any, high: Any) -> list[Any]:
        block, bases, entries = Block(1), dict[str, Any](), dict[Value, Any]()

        def offset(a: Access) -> Any:
            key = str((a.strides[:-1], a.shift))
            if key not in bases:
                bases[key] = block.let(self.sizes.offset(a, digits))
            return bases[key]

        def offsets(v: Value) -> tuple[Any, Any]:
            a = self.plan.loads[v]
            if v.op == "load":
                return offset(a), self.sizes.tir(a.strides[-1])
            if v not in entries:
                entry = tirx.Cast("int64", row.scalar(v.args[0]))
                entries[v] = block.let(offset(a) + entry * self.sizes.tir(self._table_step(v)))
            return entries[v], self.sizes.tir(a.strides[-1])

        row = Row(block, self.memory, offsets, self.form.lanes, self.form.unroll, part)
        for stage in range(self.plan.stages):
            self._pass(row, stage, offset, low, high)
        for o in self.plan.outputs:
            if o.per_row:
                self.memory.store(block, o.access.buffer, offset(o.access), row.scalar(o.value))
        return block.statements

    def _table_step(self, v: Value) -> sympy.Expr:
        return expression(self.plan.tensors[v.attr[0]].stride(v.attr[2]))

    def _check_entries(self, rows: Any) -> list[Any]:
        """Stop before the first row if a row looks up an entry that its table does not have.

        The threads of the loop cannot raise an error in the caller, so one thread looks first.
        """
        if not self.plan.gathers:
            return []
        bad, index, b = register("int32"), tirx.Var("row", "int64"), Block(1)
        digits = self._digits(b, index)
        row = Row(b, self.memory, lambda v: (self.sizes.offset(self.plan.loads[v], digits), None), 1, 1)
        for v, size in self.plan.gathers:
            entry = tirx.Cast("int64", row.scalar(v.args[0]))
            wrong = tirx.Or(entry < integer(0), entry >= self.sizes.tir(size))
            b.statements.append(assign(bad, tirx.Select(wrong, tirx.const(1, "int32"), read(bad))))
        fine, text = tirx.EQ(read(bad), tirx.const(0, "int32")), StringImm("index out of range in self")
        told = tirx.AssertStmt(fine, StringImm("IndexError"), [text])  # TVM names these in another order
        return [on_stack(bad), assign(bad, tirx.const(0, "int32")), serial(index, rows, b.statements), told]

    def _digits(self, b: Block, index: Any) -> list[Any]:
        """The row number as one index per merged row dimension."""
        digits: list[Any] = []
        for extent in reversed(self.plan.extents[1:-1]):
            size = self.sizes.tir(extent)
            digits.append(b.let(tirx.floormod(index, size)))
            index = b.let(tirx.floordiv(index, size))
        return [*reversed([*digits, index])][: len(self.plan.extents) - 1] if len(self.plan.extents) > 1 else []

    def _pass(self, row: Row, stage: int, offset: Any, low: Any, high: Any) -> None:
        """One pass over the columns: reductions, values to keep, and outputs that are ready."""
        kept = [v for v in self.memory.scratch if v.stage == stage]
        ready = [(o, offset(o.access)) for o in self.plan.outputs if not o.per_row and o.value.stage == stage]

        def also(b: Block, column: Any, start: Any, memo: dict[Value, Any]) -> None:
            for v in kept:
                put(b, self.memory.scratch[v], column, row.element(b, v, column, start, memo, stage))
            for o, base in ready:
                value = row.element(b, o.value, column, start, memo, stage)
                self.memory.store(b, o.access.buffer, base + column, value)

        if self.plan.reductions.get(stage):
            row.reduce(self.plan.reductions[stage], self.plan.segments, also, stage)
        elif not (kept or ready):
            return
        elif self.plan.segments:
            for start, stop in self.plan.segments:
                row.columns(start, stop, partial(_at, also, start))
        else:
            row.open_columns(low, high, partial(_at, also, 0))


def _at(also: Also, start: Any, b: Block, column: Any, _slot: int | None) -> None:
    also(b, column, start, {})
