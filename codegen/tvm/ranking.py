"""Choosing the best of many scores: each one's rank is counted, so that equal scores keep the order of their places.

Counting takes a comparison for every pair, in vectors; for some hundred scores that is a few microseconds, without the
branches and the moves of sorting.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tvm import tirx

from . import math as vector
from .emit import integer, serial, take
from .math import Block, assign, on_stack, read, register

MASKED = -vector.INF  # a score that is never chosen before others


@dataclass
class Scratch:
    """Buffers that one call of a kernel allocates, all of them flat."""

    buffers: dict[str, Any] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Any:
        return self.buffers[name]

    def make(self, name: str, dtype: str, count: Any) -> Any:
        """The statement that allocates a buffer."""
        self.buffers[name] = tirx.decl_buffer((count,), dtype, name, data_alignment=64)
        return tirx.AllocBuffer(self.buffers[name])


def load(buffer: Any, at: Any) -> Any:
    """One element."""
    return tirx.BufferLoad(buffer, [at])


def store(buffer: Any, at: Any, value: Any) -> Any:
    """The statement that writes one element."""
    return tirx.BufferStore(buffer, value, [at])


def count_of(b: Block, value: Any) -> Any:
    """A number in a register of its own; one that is known stays a constant, also within the tasks of threads."""
    return value if isinstance(value, tirx.IntImm) else b.let(value)


def mark_best(scores: Any, base: Any, count: Any, chosen: Any, marks: Any, marks_base: Any, lanes: int) -> list[Any]:
    """Set marks[marks_base + k] to 1 for the `chosen` largest of scores[base + k], k < count, and to 0 for the others.

    Of equal scores the first are chosen. Counts are int64 expressions. Scores are float32 without NaN, marks int32.
    """
    place, b = tirx.Var("place", "int64"), Block(1)
    own = b.let(load(scores, base + place))
    ahead, rank, wide = register(f"float32x{lanes}"), register("float32"), Block(lanes)
    b.statements += [on_stack(ahead), assign(ahead, wide.const(0.0)), on_stack(rank)]
    whole = tirx.floordiv(count, integer(lanes))
    step, body = tirx.Var("step", "int64"), Block(lanes)
    first = step * integer(lanes)
    more = _before(body, take(body, scores, base + first), first, own, place)
    body.statements.append(assign(ahead, read(ahead) + more))
    statements, total = vector.horizontal("sum", read(ahead), lanes)
    b.statements += [serial(step, whole, body.statements), *statements, assign(rank, total)]
    other, last = tirx.Var("other", "int64"), Block(1)
    at = whole * integer(lanes) + other
    more = _before(last, load(scores, base + at), at, own, place)
    last.statements.append(assign(rank, read(rank) + more))
    b.statements.append(serial(other, count - whole * integer(lanes), last.statements))
    better = tirx.Cast("int64", read(rank)) < chosen
    b.statements.append(store(marks, marks_base + place,
                              tirx.Select(better, tirx.const(1, "int32"), tirx.const(0, "int32"))))  # fmt: skip
    return [serial(place, count, b.statements)]


def _before(b: Block, others: Any, first: Any, own: Any, place: Any) -> Any:
    """1.0 in the lanes whose scores come before the own one."""
    others, own = b.let(others), b.spread(own)
    lanes = first if b.lanes == 1 else tirx.Ramp(first, integer(1), b.lanes)
    earlier = tirx.And(tirx.EQ(others, own), lanes < b.spread(place))
    return b.select(tirx.Or(others > own, earlier), b.const(1.0), b.const(0.0))
