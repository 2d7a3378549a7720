"""Buffers for what a region computes: sizes that are known at run time only, as extents of its inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import sympy
from torch import fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.value_ranges import ValueRanges

from ..base import Destination, Extent, Region
from ..symbols import encode, placed
from .layout import expression
from .values import Unsupported


class Planned(Protocol):
    """A region that a family has planned.

    One whose results have sizes that follow from no size of an input alone has, besides, `made`: these as extents. One
    whose results lie in different orders has `orders`, one for each.
    """

    @property
    def order(self) -> tuple[int, ...] | None:
        """Dimensions of the outputs from the outermost to the innermost in memory, None if contiguous."""
        ...


def destinations(region: Region, plan: Planned) -> tuple[Destination, ...]:
    """A buffer for every output. Raises Unsupported for a size that does not follow from those of the inputs."""
    known: dict[sympy.Expr, Extent] = {}
    for position, source in enumerate(region.inputs):
        for dim, size in enumerate(getattr(source.meta["val"], "shape", ())):
            known.setdefault(expression(size), (position, dim))
    known |= getattr(plan, "made", {})
    found = []
    orders = getattr(plan, "orders", ()) or [plan.order] * len(region.outputs)
    for node, order in zip(region.outputs, orders, strict=True):
        value = node.meta["val"]
        shape = tuple(s if isinstance(s, int) else _extent(expression(s), known) for s in value.shape)
        found.append(Destination(shape, value.dtype, order))
    return tuple(found)


def _extent(size: sympy.Expr, known: Mapping[sympy.Expr, Extent]) -> Extent:
    try:
        places = {s.name: known[s] for s in size.free_symbols}
        return known[size] if size in known else placed(encode(size), places)  # type: ignore[no-any-return]
    except (KeyError, ValueError) as error:
        raise Unsupported(f"the size {size} does not follow from the sizes of the inputs") from error


def computed(region: Region, source: fx.Node, size: sympy.Expr,
             formula: Callable[[Any], Any]) -> dict[sympy.Expr, Extent]:  # fmt: skip
    """A symbolic size as an extent, by the formula that gives it from the second size of an input."""
    if size.is_Integer:
        return {}
    tokens, env = sympy.Symbol("t0", integer=True, positive=True), ShapeEnv()
    env.var_to_range[tokens] = ValueRanges(1, int_oo)
    found = expression(formula(env.create_symintnode(tokens, hint=None)))
    return {size: placed(encode(found), {tokens.name: (region.inputs.index(source), 1)})}
