"""Reading a packed weight of four bits: two inputs in a byte, levels scaled and shifted group by group."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx

from .emit import Memory, integer, serial, take
from .math import Block
from .product import Product

Vector = Callable[[Block, int], Any]  # (block, vector) -> float32 lanes of the weight
Use = Callable[[Any, Vector], list[Any]]  # (input, its vectors) -> statements


def each_input(product: Product, memory: Memory, position: int, panel: Any, shape: tuple[int, int], use: Use) -> Any:
    """Statements that use the weight's vectors of every input in turn.

    Args:
        position: of the packed weight among the parameters; its scales and offsets come after it.
        panel: number of the panel.
        shape: vectors of a panel, and their lanes.
    """
    assert product.levels is not None
    (vectors, lanes), groups = shape, product.levels[2]
    width, each = vectors * lanes, product.depth // groups
    group, pair, head = tirx.Var("group", "int64"), tirx.Var("pair", "int64"), Block(lanes)
    line = (panel * integer(groups) + group) * integer(2 * width)
    scales, offsets = ([head.let(take(head, memory.views[position + 1], line + integer((part * vectors + v) * lanes)))
                        for v in range(vectors)] for part in (0, 1))  # fmt: skip
    first = (panel * integer(product.steps) + group * integer(each // 2) + pair) * integer(width)

    def vector(half: int) -> Vector:
        def read(b: Block, v: int) -> Any:
            level = b.let(tirx.Cast(b.dtype("int32"), take(b, memory.views[position], first + integer(v * lanes))))
            level = b.let(level >> b.const(4, "int32") if half else level & b.const(15, "int32"))
            return b.let(b.let(tirx.Cast(b.dtype("float32"), level)) * scales[v] + offsets[v])

        return read

    inner = []
    for half in (0, 1):
        inner += use(group * integer(each) + pair * integer(2) + integer(half), vector(half))
    return serial(group, integer(groups), [*head.statements, serial(pair, integer(each // 2), inner)])
