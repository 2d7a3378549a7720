"""The end of every kernel that combines: apply the tail to what was combined, and store it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..plans.layout import Access
from ..plans.tail import Tail
from ..plans.values import Value
from .emit import Memory, Row
from .layout import Sizes
from .math import Block


def finish(tail: Tail, memory: Memory, sizes: Sizes, digits: Sequence[Any], start: Any,
           slots: Sequence[tuple[int, int]], combined: Callable[[Block, int], Any],
           apart: int = 0) -> list[Any]:  # fmt: skip
    """Statements that finish one row of the result.

    Args:
        digits: index of the row along each dimension of the space but the columns.
        start: first column.
        slots: (columns after `start`, lanes) of each vector.
        combined: the combined lanes of the vector that begins so many columns after `start`.
        apart: columns between what was combined for one part of the result and for the next.
    """
    head, known = Block(1), dict[int, Any]()

    def base(access: Access) -> Any:
        if id(access) not in known:
            known[id(access)] = head.let(sizes.offset(access, digits))
        return known[id(access)]

    def offsets(v: Value) -> tuple[Any, Any]:
        return base(tail.loads[v]), sizes.tir(tail.loads[v].strides[-1])

    lines, wide = Row(head, memory, offsets, slots[0][1], 1), list[Any]()
    for low, lanes in slots:
        b = Block(lanes)
        memo = {result: combined(b, low + k * apart) for k, result in enumerate(tail.results.values())}
        for o in tail.outputs:
            at = b.let(start + low)
            memory.store(b, o.access.buffer, base(o.access) + at, lines.element(b, o.value, at, low, memo, 0))
        wide += b.statements
    return [*head.statements, *wide]
