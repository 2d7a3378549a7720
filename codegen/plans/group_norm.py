"""Group normalisation: where its operands are, and what follows it."""

from __future__ import annotations

from dataclasses import dataclass

import sympy
from torch import fx

from ..base import Region
from .layout import Access, expression
from .rules import name_of
from .tail import Tail, plan_tail
from .values import KINDS, Unsupported, bound, dense, shape


@dataclass
class GroupNorm:
    """A group normalisation.

    Attributes:
        image: walk of the input over [images, pixels ..., channels], in the order in which the result lies in memory.
        weight: position of the input that scales channels, None if there is none.
        bias: position of the input that is added to channels.
        groups: number of groups.
        eps: added to the variance.
        extents: sizes of that space.
        tail: what is done to each element of the result.
        order: dimensions of the result in memory.
    """

    image: Access
    weight: int | None
    bias: int | None
    groups: int
    eps: float
    extents: list[sympy.Expr]
    tail: Tail
    order: tuple[int, ...]

    @property
    def channels(self) -> int:
        """Number of channels."""
        return int(self.extents[self.order.index(1)])

    @property
    def elements(self) -> int | None:
        """Elements of the input, None if symbolic."""
        total = sympy.Mul(*self.extents)
        return int(total) if total.is_Integer else None


def plan(region: Region, device: str = "cpu", last: bool = True) -> GroupNorm:
    """The group normalisation of a region. Raises Unsupported with the reason.

    Args:
        device: kind of device that the kernel runs on.
        last: whether channels are innermost in the result; otherwise its dimensions keep their order.
    """
    roots = [n for n in region.nodes if name_of(n) == "group_norm"]
    if len(roots) != 1:
        raise Unsupported("not exactly one group normalisation")
    root = roots[0]
    given, rank = bound(root), len(shape(root))
    source, channels = given["input"], shape(root)[1]
    dense(source)
    if rank < 3 or source not in region.inputs or KINDS.get(source.meta["val"].dtype) != "float32":
        raise Unsupported("a group normalisation of a computed operand or without pixels")
    if not isinstance(channels, int) or any(isinstance(n, int) and n == 0 for n in shape(root)):
        raise Unsupported("a group normalisation of symbolic or no channels")
    order = (0, *range(2, rank), 1) if last else tuple(range(rank))
    tail = plan_tail(region, root, None, 0, order, device=device)
    strides = [expression(source.meta["val"].stride(d)) for d in order]
    image = Access(region.inputs.index(source), strides, sympy.Integer(0))
    extents = [expression(shape(root)[d]) for d in order]
    weight, bias = (_vector(region, given.get(k)) for k in ("weight", "bias"))
    return GroupNorm(image, weight, bias, given["num_groups"], given["eps"], extents, tail, order)


def _vector(region: Region, node: fx.Node | None) -> int | None:
    if node is None:
        return None
    value = dense(node)
    if node not in region.inputs or value.stride() != (1,) or KINDS.get(value.dtype) != "float32":
        raise Unsupported("a scale or shift of channels that is not a plain vector")
    return region.inputs.index(node)
