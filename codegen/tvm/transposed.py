"""Reading rows of a tensor as columns: squares of vectors are transposed in registers, what is left goes one by one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm import tirx

from .emit import Memory, integer, put, serial
from .math import Block, transpose

Change = Callable[[Block, Any], Any]  # what is done to the values on the way


@dataclass(frozen=True)
class Rows:
    """Rows of a parameter: row i, element k lies at base + min(first + i, last) * step + k * across."""

    memory: Memory
    position: int
    base: Any
    first: Any
    last: Any
    step: Any
    across: Any

    def offset(self, b: Block, row: Any) -> Any:
        """Where a row begins; rows beyond the last one repeat it."""
        return self.base + b.let(tirx.min(self.first + row, self.last)) * self.step


def load_transposed(rows: Rows, into: Any, vectors: int, lanes: int, count: Any, change: Change) -> list[Any]:
    """Statements that fill `into` as [count, vectors * lanes]: element k of every row side by side.

    `count` is an int or an expression.
    """
    static, width = isinstance(count, int), vectors * lanes
    whole: Any = 0
    if is_one(rows.across):
        whole = count // lanes if static else tirx.floordiv(count, integer(lanes))
    whole = integer(whole) if isinstance(whole, int) else whole
    statements: list[Any] = []
    if not isinstance(whole, tirx.IntImm) or int(whole.value):
        square, b = tirx.Var("square", "int64"), Block(lanes)
        for v in range(vectors):
            starts = [rows.offset(b, integer(v * lanes + i)) + square * integer(lanes) for i in range(lanes)]
            loaded = [change(b, rows.memory.load(b, rows.position, s, integer(1))) for s in starts]
            for k, value in enumerate(transpose(b, loaded)):
                put(b, into, (square * integer(lanes) + integer(k)) * integer(width) + integer(v * lanes), value)
        statements.append(serial(square, whole, b.statements))
    if static and count == int(whole.value) * lanes:
        return statements
    k, row, b = tirx.Var("k", "int64"), tirx.Var("row", "int64"), Block(1)
    done = whole * integer(lanes)
    value = change(b, rows.memory.load(b, rows.position, rows.offset(b, row) + (done + k) * rows.across, None))
    put(b, into, (done + k) * integer(width) + row, value)
    left = (integer(count) if static else count) - done
    return [*statements, serial(k, left, [serial(row, integer(width), b.statements)])]


def is_one(stride: Any) -> bool:
    """Whether a stride is statically one."""
    return isinstance(stride, tirx.IntImm) and int(stride.value) == 1
