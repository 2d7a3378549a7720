"""From a row program to the statements of one TIR function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from tvm import tirx

from ..plans.values import Value
from . import math as vector
from .layout import Sizes, flat, parameter
from .math import Block

RECOMPUTE = 8  # values cheaper than this many vector instructions are computed again rather than kept per row
BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b,
    "div": lambda a, b: tirx.Div(a, b),
    "lt": lambda a, b: a < b, "le": lambda a, b: a <= b, "gt": lambda a, b: a > b, "ge": lambda a, b: a >= b,
    "eq": lambda a, b: tirx.EQ(a, b), "ne": lambda a, b: tirx.NE(a, b), "and": tirx.And, "or": tirx.Or,
}  # fmt: skip
CALLS: dict[str, Callable[[Block, Any], Any]] = {
    "exp": vector.exp, "log": vector.log, "log1p": vector.log1p, "erf": vector.erf, "tanh": vector.tanh,
    "sigmoid": vector.sigmoid, "expm1": vector.expm1_negative,
    "sqrt": lambda b, x: tirx.sqrt(x),
    "rsqrt": lambda b, x: b.const(1.0) / b.let(tirx.sqrt(x)),
    "reciprocal": lambda b, x: b.const(1.0) / x,
    "not": lambda b, x: tirx.Not(x),
}  # fmt: skip


def number(value: Value) -> float | int | bool:
    """The Python number of a constant."""
    if value.kind == "float32":
        return float(value.attr)
    return value.attr == "True" if value.kind == "bool" else int(value.attr)


def compute(b: Block, v: Value, args: Sequence[Any]) -> Any:
    """The expression of an elementwise value."""
    if v.op == "ne" and v.args[0].kind == "float32":
        return vector.differs(b, *args)
    if v.op in BINARY:
        if v.args[0] is v.args[1]:
            args = [args[0], b.let(args[1])]  # TVM would fold x - x and x != x, which are not what they seem for NaN
        return BINARY[v.op](*args)
    if v.op in CALLS:
        return CALLS[v.op](b, args[0])
    if v.op == "select":
        return tirx.Select(*args)
    if v.op == "max":
        return vector.maximum(b, *args) if v.kind == "float32" else tirx.Select(args[0] > args[1], *args)
    if v.op == "min":
        return vector.minimum(b, *args) if v.kind == "float32" else tirx.Select(args[0] < args[1], *args)
    if v.op == "neg":
        return args[0] * b.const(-1.0 if v.kind == "float32" else -1, v.kind)
    if v.op == "abs":
        if v.kind == "float32":
            return b.float_of(b.bits(args[0]) & b.const(0x7FFFFFFF, "int32"))
        return tirx.Select(args[0] < b.const(0, v.kind), args[0] * b.const(-1, v.kind), args[0])
    if v.op == "round":
        if v.attr == "float16":
            return tirx.Cast(b.dtype("float32"), b.let(tirx.Cast(b.dtype("float16"), args[0])))
        return vector.from_bfloat16(b, b.let(vector.to_bfloat16(b, args[0])))
    if v.op == "cast":
        source = v.args[0].kind
        if v.kind == "bool":
            zero = b.const(0.0 if source == "float32" else 0, source)
            return vector.differs(b, args[0], zero) if source == "float32" else tirx.NE(args[0], zero)
        if source == "bool":
            return tirx.Select(args[0], b.const(1, v.kind), b.const(0, v.kind))
        return tirx.Cast(b.dtype(v.kind), args[0])
    if v.op == "spread":
        return args[0]
    raise AssertionError(v.op)


@dataclass
class Memory:
    """The buffers of a function: flat views with their dtypes, and per-row scratch for values kept between loops."""

    views: list[Any]
    dtypes: list[torch.dtype]
    scratch: dict[Value, Any] = field(default_factory=dict)

    def load(self, b: Block, position: int, offset: Any, step: Any) -> Any:
        """Lanes of a buffer as computing values; `step` is None for one element in all lanes."""
        if step is not None and b.lanes > 1:
            raw = b.let(tirx.BufferLoad(self.views[position], [tirx.Ramp(offset, step, b.lanes)]))
        else:
            raw = b.let(b.spread(tirx.BufferLoad(self.views[position], [offset])))
        dtype = self.dtypes[position]
        if dtype is torch.bfloat16:
            return vector.from_bfloat16(b, raw)
        if dtype is torch.float16:
            return b.let(tirx.Cast(b.dtype("float32"), raw))
        return b.let(tirx.NE(raw, b.const(0, "int8"))) if dtype is torch.bool else raw

    def store(self, b: Block, position: int, offset: Any, value: Any) -> None:
        """Write lanes to consecutive elements."""
        dtype = self.dtypes[position]
        if dtype is torch.bfloat16:
            value = vector.to_bfloat16(b, value)
        elif dtype is torch.float16:
            value = tirx.Cast(b.dtype("float16"), value)
        elif dtype is torch.bool:
            value = tirx.Select(value, b.const(1, "int8"), b.const(0, "int8"))
        put(b, self.views[position], offset, value)


def put(b: Block, buffer: Any, offset: Any, value: Any) -> None:
    """Store lanes at consecutive elements of a buffer."""
    index = tirx.Ramp(offset, integer(1), b.lanes) if b.lanes > 1 else offset
    b.statements.append(tirx.BufferStore(buffer, b.let(value), [index]))


def prim_func(
    name: str, buffers: list[Any], memory: Memory, statements: list[Any], wrap: Wrap = lambda body: body
) -> Any:
    """A PrimFunc of these parameters whose statements read and write them through the flat views of `memory`."""
    views = [tirx.DeclBuffer(v, data=b.data) for v, b in zip(memory.views, buffers, strict=True)]
    func = tirx.PrimFunc(buffers, wrap(sequence([*views, *statements])))
    return func.with_attr("global_symbol", name).with_attr("tirx.noalias", True)


def parameters(tensors: Sequence[torch.Tensor], sizes: Sizes) -> tuple[list[Any], Memory]:
    """The checked buffers of the tensors that a caller passes, and flat views of them."""
    return viewed([parameter(f"t{k}", t, sizes) for k, t in enumerate(tensors)], [t.dtype for t in tensors])


def viewed(buffers: list[Any], dtypes: list[torch.dtype]) -> tuple[list[Any], Memory]:
    """Parameters with flat views in the types in which they are stored."""
    views = [flat(f"f{k}", b, d) for k, (b, d) in enumerate(zip(buffers, dtypes, strict=True))]
    return buffers, Memory(views, dtypes)


def pieces(count: int, lanes: int) -> list[tuple[int, int]]:
    """(first element, lanes) of the vectors, and at the end halves of vectors, that cover `count` elements."""
    found, done, width = [], 0, lanes
    while done < count:
        while width > count - done:
            width //= 2
        found.append((done, width))
        done += width
    return found


def take(b: Block, buffer: Any, offset: Any) -> Any:
    """Lanes at consecutive elements of a buffer."""
    return tirx.BufferLoad(buffer, [tirx.Ramp(offset, integer(1), b.lanes) if b.lanes > 1 else offset])


def integer(value: int) -> Any:
    """An int64 constant."""
    return tirx.IntImm("int64", value)


Wrap = Callable[[Any], Any]
Body = Callable[[Block, Any, int | None], None]  # block, first column, slot of the unrolled loop (None outside it)
Also = Callable[[Block, Any, Any, dict[Value, Any]], None]  # block, first column, start of the segment, known values


@dataclass
class Row:
    """Emits the statements of one row: its row values and its column loops.

    Attributes:
        block: statements of the row, one lane wide.
        memory: buffers.
        offsets: by access position of a load: (offset of the row, column step or None).
        lanes: vector width in float32 values.
        unroll: vectors per round of a column loop.
        part: which part of every pick this row reads.
    """

    block: Block
    memory: Memory
    offsets: Callable[[Value], tuple[Any, Any]]
    lanes: int
    unroll: int
    part: int = 0
    known: dict[Value, Any] = field(default_factory=dict)

    def scalar(self, v: Value) -> Any:
        """A value that is the same in the whole row, computed once."""
        if v not in self.known:
            b = self.block
            if v.op == "const":
                return b.const(number(v), v.kind)
            if v.op in ("load", "gather"):
                self.known[v] = self.memory.load(b, v.attr[0], self.offsets(v)[0], None)
            elif v.op == "pick":
                self.known[v] = self.scalar(v.args[self.part])
            else:
                self.known[v] = b.let(compute(b, v, [self.scalar(a) for a in v.args]))
        return self.known[v]

    def element(self, b: Block, v: Value, column: Any, low: Any, memo: dict[Value, Any], stage: int) -> Any:
        """A value at lanes [column, column + width) of the segment that starts at `low`."""
        if v in memo:
            return memo[v]
        if v.op == "const":
            return b.const(number(v), v.kind)
        if not v.vary:
            result = b.spread(self.scalar(v))
        elif v in self.memory.scratch and v.stage < stage:
            index = tirx.Ramp(column, integer(1), b.lanes) if b.lanes > 1 else column
            result = b.let(tirx.BufferLoad(self.memory.scratch[v], [index]))
        elif v.op in ("load", "gather"):
            offset, step = self.offsets(v)
            result = self.memory.load(b, v.attr[0], offset + column * step, step)
        elif v.op == "cat":
            part = max(k for k, bound in enumerate(v.attr) if bound <= low)
            result = self.element(b, v.args[part], column, low, memo, stage)
        elif v.op == "pick":
            result = self.element(b, v.args[self.part], column, low, memo, stage)
        else:
            args = [self.element(b, a, column, low, memo, stage) for a in v.args]
            result = b.let(compute(b, v, args))
        memo[v] = result
        return result

    def columns(self, low: int, high: int, body: Body) -> None:
        """Cover the static columns [low, high): unrolled rounds, single vectors, then halves for the rest."""
        per, column = self.lanes * self.unroll, low
        rounds = (high - low) // per
        if rounds:
            loop = tirx.Var("j", "int64")
            inner = self._slots(lambda u: integer(low + u * self.lanes) + loop * integer(per), body)
            self.block.statements.append(serial(loop, integer(rounds), inner))
            column += rounds * per
        for start, width in pieces(high - column, self.lanes):
            b = Block(width)
            body(b, integer(column + start), None)
            self.block.statements += b.statements

    def open_columns(self, low: Any, high: Any, body: Body) -> None:
        """Cover columns [low, high) of sizes known at run time only."""
        per = self.lanes * self.unroll
        for width, slots in ((per, self.unroll), (self.lanes, 1), (1, 1)):
            rounds = self.block.let(tirx.floordiv(high - low, integer(width)))
            loop, lanes, start = tirx.Var("j", "int64"), width // slots, low
            statements: list[Any] = []
            for u in range(slots):
                b = Block(lanes)
                body(b, b.let(start + loop * integer(width) + integer(u * lanes)), None)
                statements += b.statements
            self.block.statements.append(serial(loop, rounds, statements))
            low = self.block.let(low + rounds * integer(width))

    def _slots(self, column: Callable[[int], Any], body: Body) -> list[Any]:
        statements: list[Any] = []
        for u in range(self.unroll):
            b = Block(self.lanes)
            body(b, column(u), u)
            statements += b.statements
        return statements

    def reduce(self, values: Sequence[Value], segments: Sequence[tuple[int, int]], also: Also, stage: int) -> None:
        """Reduce rows of several values in one pass over the columns; `also` runs in the same pass."""
        slots = {}
        start = Block(self.lanes)
        for v in values:
            slots[v] = vector.register(start.dtype("float32"), self.unroll)
            self.block.statements.append(vector.on_stack(slots[v]))
            for u in range(self.unroll):
                self.block.statements.append(vector.assign(slots[v], start.const(NEUTRAL[v.attr]), u))
        rest: dict[Value, list[tuple[Any, int]]] = {v: [] for v in values}

        for low, high in segments:

            def body(b: Block, column: Any, slot: int | None, low: int = low) -> None:
                memo: dict[Value, Any] = {}
                for v in values:
                    x = self.element(b, v.args[0], column, low, memo, stage)
                    if slot is None:
                        rest[v].append((x, b.lanes))
                        continue
                    total = vector.combine(v.attr, b, vector.read(slots[v], slot), x)
                    b.statements.append(vector.assign(slots[v], total, slot))
                also(b, column, low, memo)

            self.columns(low, high, body)
        for v in values:
            self.known[v] = self._finish(v.attr, slots[v], rest[v])

    def _finish(self, how: str, slots: Any, rest: list[tuple[Any, int]]) -> Any:
        """The scalar that combines the accumulators of the loop and the vectors outside it."""
        parts: dict[int, list[Any]] = {self.lanes: [vector.read(slots, u) for u in range(self.unroll)]}
        for x, width in rest:
            parts.setdefault(width, []).append(x)
        total = None
        for width, vectors in sorted(parts.items(), reverse=True):
            b = Block(width)
            while len(vectors) > 1:
                pairs = zip(vectors[::2], vectors[1::2], strict=False)
                vectors = [vector.combine(how, b, x, y) for x, y in pairs] + vectors[len(vectors) & ~1 :]
            self.block.statements += b.statements
            statements, scalar = vector.horizontal(how, vectors[0], width)
            self.block.statements += statements
            total = scalar if total is None else vector.combine(how, self.block, total, scalar)
        return total


NEUTRAL = {"sum": 0.0, "max": -vector.INF, "peak": -vector.INF, "min": vector.INF}


def sequence(statements: list[Any]) -> Any:
    """The statements one after the other; TIR has no sequence of one."""
    return statements[0] if len(statements) == 1 else tirx.SeqStmt(statements)


def serial(loop: Any, extent: Any, statements: list[Any]) -> Any:
    """A loop from zero."""
    return tirx.For(loop, integer(0), extent, tirx.ForKind.SERIAL, sequence(statements))


def parallel(loop: Any, extent: Any, statements: list[Any]) -> Any:
    """A loop whose rounds are split over the threads in contiguous runs."""
    return tirx.For(loop, integer(0), extent, tirx.ForKind.PARALLEL, sequence(statements))
