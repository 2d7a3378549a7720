"""Copying images, channels last, into a buffer with zeros around them."""

from __future__ import annotations

from typing import Any

from tvm import tirx

from .emit import Memory, integer, pieces, put, sequence, serial, take
from .layout import Sizes
from .math import Block
from .product import Border
from .tile import split


def buffer_of(border: Border, sizes: Sizes) -> tuple[Any, Any]:
    """The padded buffer, and the statement that allocates it."""
    rows, columns, channels = border.padded
    count = sizes.tir(border.images) * integer(rows * columns * channels)
    buffer = tirx.decl_buffer((count,), "float32", "padded", data_alignment=64)
    return buffer, tirx.AllocBuffer(buffer)


def copy_with_zeros(border: Border, into: Any, memory: Memory, sizes: Sizes, lanes: int, loop: Any) -> Any:
    """The loop over padded rows that fills the buffer; `loop` makes it serial or parallel."""
    rows, columns, channels = border.padded
    line, b = tirx.Var("line", "int64"), Block(1)
    image, row = split(b, line, [sizes.tir(border.images), integer(rows)])
    start = b.let(line * integer(columns * channels))
    own = row - integer(border.before[0])
    inside = tirx.And(own >= integer(0), own < integer(border.sizes[0]))
    left, right = border.before[1] * channels, border.after[1] * channels
    body = [
        *_zeros(into, start, left, lanes),
        *_pixels(border, into, start + integer(left), image, own, memory, sizes, lanes),
        *_zeros(into, start + integer(columns * channels - right), right, lanes),
    ]
    zeros = _zeros(into, start, columns * channels, lanes)
    choose = tirx.IfThenElse(inside, sequence(body), sequence(zeros))
    return loop(line, sizes.tir(border.images) * integer(rows), [*b.statements, choose])


def _zeros(into: Any, start: Any, count: int, lanes: int) -> list[Any]:
    return _vectors(count, lanes, lambda b, at: put(b, into, start + at, b.const(0.0)))


def _vectors(count: int, lanes: int, body: Any) -> list[Any]:
    """Cover `count` elements in vectors and halves of vectors."""
    statements, whole = list[Any](), count // lanes
    if whole:
        k, b = tirx.Var("k", "int64"), Block(lanes)
        body(b, k * integer(lanes))
        statements.append(serial(k, integer(whole), b.statements))
    for start, width in pieces(count, lanes)[whole:]:
        b = Block(width)
        body(b, integer(start))
        statements += b.statements
    return statements


def _pixels(border: Border, into: Any, start: Any, image: Any, row: Any, memory: Memory, sizes: Sizes,
            lanes: int) -> list[Any]:  # fmt: skip
    """One row of an image."""
    _, columns, channels = border.sizes
    steps = [sizes.tir(s) for s in border.source.strides[:3]]
    source, b = memory.views[border.source.buffer], Block(1)
    base = b.let(image * steps[0] + row * steps[1])
    if border.step == 1 and border.source.strides[2] == channels:  # a row of pixels is one run of memory
        return [*b.statements, *_vectors(columns * channels, lanes, _copy(source, base, into, start))]
    x = tirx.Var("x", "int64")
    at, to = base + x * steps[2], start + x * integer(channels)
    if border.step == 1:
        return [*b.statements, serial(x, integer(columns), _vectors(channels, lanes, _copy(source, at, into, to)))]
    c = tirx.Var("c", "int64")
    value = tirx.BufferLoad(source, [at + c * sizes.tir(border.step)])
    inner = serial(c, integer(channels), [tirx.BufferStore(into, value, [to + c])])
    return [*b.statements, serial(x, integer(columns), [inner])]


def _copy(source: Any, base: Any, into: Any, start: Any) -> Any:
    return lambda b, at: put(b, into, start + at, take(b, source, base + at))
