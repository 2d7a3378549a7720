"""Register tile: the inner product loop that matrix products, attention and convolutions share.

A tile holds `rows` x `vectors` accumulators in registers. Each step of the loop loads `vectors` vectors of one operand
and multiplies each with `rows` numbers of the other, every number broadcast to all lanes. This is the outer-product
form of Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication" (2008).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tvm import tirx

from .dots import PLAIN, Dot, multiply_add
from .emit import integer, serial
from .math import Block, assign, on_stack, read, register

Number = Callable[[Block, int, Any], Any]  # (block, row, step) -> float32 scalar of the broadcast operand
Vector = Callable[[Block, int, Any], Any]  # (block, vector, step) -> float32 lanes of the other operand


@dataclass
class Tile:
    """Accumulators of one register tile.

    Attributes:
        rows: numbers that are broadcast in each step.
        vectors: vectors that are loaded in each step.
        lanes: float32 values of a vector.
    """

    rows: int
    vectors: int
    lanes: int
    dot: Dot = PLAIN
    registers: list[Any] = field(default_factory=list)

    def start(self, initial: Callable[[Block, int], Any] | None = None) -> list[Any]:
        """Statements that allocate the accumulators and set each to zero, or to what `initial` gives for its vector."""
        b, kind = Block(self.lanes), self.dot.accumulator
        firsts = [b.let(initial(b, v)) if initial else b.const(0.0 if kind == "float32" else 0, kind)
                  for v in range(self.vectors)]  # fmt: skip
        self.registers = [register(b.dtype(kind)) for _ in range(self.rows * self.vectors)]
        for k, r in enumerate(self.registers):
            b.statements += [on_stack(r), assign(r, firsts[k % self.vectors])]
        return b.statements

    def accumulate(self, depth: Any, number: Number, vector: Vector,
                   also: Callable[[Any], list[Any]] = lambda step: []) -> Any:  # fmt: skip
        """The loop that adds `depth` outer products of numbers and vectors; `also` gives more to do in each step."""
        k = tirx.Var("k", "int64")
        return serial(k, depth, [*also(k), *self.step(number, vector, k)])

    def step(self, number: Number, vector: Vector, k: Any) -> list[Any]:
        """One outer product."""
        b = Block(self.lanes)
        loaded = [b.let(vector(b, v, k)) for v in range(self.vectors)]
        for row in range(self.rows):
            one = Block(1)
            value = number(one, row, k)
            b.statements += one.statements
            factor = b.let(b.spread(value))
            for v in range(self.vectors):
                total = multiply_add(self.dot, b, self.value(row, v), factor, loaded[v])
                b.statements.append(self.put(row, v, total))
        return b.statements

    def value(self, row: int, vector: int) -> Any:
        """One accumulator."""
        return read(self._at(row, vector))

    def put(self, row: int, vector: int, value: Any) -> Any:
        """The statement that sets one accumulator."""
        return assign(self._at(row, vector), value)

    def _at(self, row: int, vector: int) -> Any:
        return self.registers[row * self.vectors + vector]


def split(b: Block, index: Any, sizes: list[Any]) -> list[Any]:
    """An index over a grid of these sizes (the last one fastest) as one index per dimension."""
    digits: list[Any] = []
    for size in reversed(sizes[1:]):
        digits.append(b.let(tirx.floormod(index, size)))
        index = b.let(tirx.floordiv(index, size))
    return [index, *reversed(digits)] if sizes else []


def halvings(b: Block, count: Any, height: int) -> list[tuple[int, Any, Any]]:
    """(tile height, rounds, rows before it) of tiles that cover `count` < `height` rows: powers of two, falling."""
    found, done, power = [], integer(0), 1 << (height - 1).bit_length() >> 1
    while power:
        rounds = b.let(tirx.floordiv(count - done, integer(power)))
        found.append((power, rounds, done))
        done, power = b.let(done + rounds * integer(power)), power // 2
    return found
