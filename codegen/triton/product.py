"""One matrix product with what follows it: operands, how they are walked, and a row program over the result."""

from __future__ import annotations

from dataclasses import dataclass

import sympy
import torch

from ..base import Region
from ..plans.layout import Access, expression, merge
from ..plans.product import LINEAR, MATRIX, check_operands, operands, walks_of
from ..plans.rules import name_of
from ..plans.tail import Tail, column_parts, plan_tail, shape_of_parts
from ..plans.values import FLOATS, Unsupported, shape


@dataclass
class Product:
    """One matrix product per batch element, [rows, depth] x [depth, columns], with a row program over its result.

    Attributes:
        tail: what is done to each element of the result.
        left: walk of the left operand over the space, columns not counted.
        right: the same for the right one.
        left_step: stride of the left operand along the depth.
        right_steps: strides of the right operand along the depth and along the columns.
        extents: sizes of the space: batch, rows, columns.
        batch: how many of the extents the right operand depends on.
        depth: size of the dimension that is summed over.
        dtype: of the operands.
        width: columns of the right operand.
        turned: whether the right operand is the weight of a linear layer, [columns, depth].
        library: whether something follows that torch's own product would leave to other kernels.
        parts: first columns of the parts of the right operand that are put together; the space has the columns of one.
    """

    tail: Tail
    left: Access
    right: Access
    left_step: sympy.Expr
    right_steps: tuple[sympy.Expr, sympy.Expr]
    extents: list[sympy.Expr]
    batch: int
    depth: sympy.Expr
    dtype: torch.dtype
    width: sympy.Expr
    turned: bool = False
    library: bool = False
    parts: tuple[int, ...] = (0,)

    @property
    def rows(self) -> sympy.Expr:
        """Rows that share one right operand."""
        return sympy.Mul(*self.extents[self.batch : -1])

    @property
    def columns(self) -> sympy.Expr:
        """Columns of the result."""
        return self.extents[-1]


def plan(region: Region) -> Product:
    """The product of a region. Raises Unsupported with the reason."""
    roots = [n for n in region.nodes if name_of(n) in (*LINEAR, *MATRIX)]
    if len(roots) != 1:
        raise Unsupported("not exactly one matrix product")
    (root,) = roots
    if name_of(root) not in ("linear", "mm", "addmm", "bmm", "baddbmm", "matmul"):
        raise Unsupported(f"{root.target} has no template")
    left, right, addend = operands(root)
    check_operands(root, left, right)
    dtype = left.meta["val"].dtype
    if dtype not in FLOATS or right.meta["val"].dtype is not dtype:
        raise Unsupported(f"a product of {dtype} and {right.meta['val'].dtype}")
    parts = column_parts(region, root)
    space = shape_of_parts(region, root, parts)
    if any(isinstance(s, int) and s == 0 for s in (*space, *shape(left))):
        raise Unsupported("a product without elements")
    tail = plan_tail(region, root, addend, 0, device="cuda", parts=parts)
    walks = walks_of(root, left, right, region, len(space))
    accesses = [*walks, *tail.loads.values(), *(o.access for o in tail.outputs)]
    extents = merge([expression(e) for e in space], accesses, False)
    batch = max((d + 1 for d in range(len(extents) - 1) if walks[1].strides[d] != 0), default=0)
    own_row(extents, batch, *walks, tail)
    steps = [expression(s) for s in right.meta["val"].stride()[-2:]]
    right_steps = (steps[1], steps[0]) if name_of(root) in LINEAR else (steps[0], steps[1])
    left_step = expression(left.meta["val"].stride(-1))
    return Product(tail, *walks, left_step, right_steps, extents, batch, expression(shape(left)[-1]), dtype,
                   expression(shape(root)[-1]), name_of(root) in LINEAR, len(region.nodes) > 1, parts)  # fmt: skip


def own_row(extents: list[sympy.Expr], batch: int, left: Access, right: Access, tail: Tail) -> None:
    """Give a single row a dimension, so that addresses have the shape of a tile. Edits the extents and accesses."""
    if len(extents) - 1 > batch:
        return
    extents.insert(batch, sympy.Integer(1))
    stepping = [left, *(o.access for o in tail.outputs)]
    for access in [right, *tail.loads.values(), *stepping]:
        access.strides.insert(batch, sympy.Integer(int(any(access is s for s in stepping))))
