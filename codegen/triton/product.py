"""One matrix product with what follows it: operands, how they are walked, and a row program over the result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import sympy
import torch
from torch import fx

from ..base import Region
from ..plans.heads import Heads, by_heads, plan_heads
from ..plans.layout import Access, expression, merge
from ..plans.product import GROUPED, LINEAR, MATRIX, check_operands, operands, walks_of
from ..plans.rules import name_of
from ..plans.tail import Tail, column_parts, plan_tail, shape_of_parts
from ..plans.values import FLOATS, Unsupported, bound, shape


@dataclass(frozen=True)
class Groups:
    """Rows in groups, each of which has a right operand of its own.

    Attributes:
        ends: parameter number of the rows at which the groups end, int32 [count], not decreasing.
        count: number of groups.
        step: stride of the ends.
        stride: elements between two right operands.
    """

    ends: int
    count: int
    step: sympy.Expr
    stride: sympy.Expr


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
        groups: how rows choose their right operand, None if there is one for all of a batch element.
        heads: what is done to which columns, where they are heads; each head is then a batch element, with a right
            operand of its own, and the parts are its halves.
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
    groups: Groups | None = None
    heads: Heads | None = None

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
    roots = [n for n in region.nodes if name_of(n) in (*LINEAR, *MATRIX, GROUPED)]
    if len(roots) != 1:
        raise Unsupported("not exactly one matrix product")
    (root,) = roots
    if name_of(root) not in ("linear", "mm", "addmm", "bmm", "baddbmm", "matmul", GROUPED):
        raise Unsupported(f"{root.target} has no template")
    left, right, addend = operands(root)
    check_operands(root, left, right)
    dtype = left.meta["val"].dtype
    if dtype not in FLOATS or right.meta["val"].dtype is not dtype:
        raise Unsupported(f"a product of {dtype} and {right.meta['val'].dtype}")
    if any(isinstance(s, int) and s == 0 for s in (*shape(root), *shape(left))):
        raise Unsupported("a product without elements")
    if by_heads(region, root):
        return _of_heads(region, root, left, right, addend)
    parts = column_parts(region, root)
    space = shape_of_parts(region, root, parts)
    tail = plan_tail(region, root, addend, 0, device="cuda", parts=parts)
    walks = walks_of(root, left, right, region, len(space))
    product = _with(root, left, right, walks, [tail], [expression(e) for e in space])
    product.parts, product.library = parts, len(region.nodes) > 1 and name_of(root) != GROUPED
    product.groups = _groups(region, root, right) if name_of(root) == GROUPED else None
    return product


def _of_heads(region: Region, root: fx.Node, left: fx.Node, right: fx.Node, addend: fx.Node | None) -> Product:
    """The product of a region whose columns are heads. Raises Unsupported."""
    if right.meta["val"].dim() != 2:
        raise Unsupported("heads of a product of batches")
    heads = plan_heads(region, root, addend)
    walks = walks_of(root, left, right, region, len(shape(root)))
    walks[0].strides.insert(0, sympy.Integer(0))
    step = expression(right.meta["val"].stride(0 if name_of(root) in LINEAR else 1))
    walks[1].strides.insert(0, step * heads.features)
    half, count = heads.features // 2, shape(root)[-1] // heads.features
    space = [expression(e) for e in (count, *shape(root)[:-1], half)]
    product = _with(root, left, right, walks, [piece.tail for piece in heads.pieces], space)
    if len(heads.pieces) > 1 and product.batch == 0:
        raise Unsupported("heads that share one weight")
    product.parts, product.library, product.heads = (0, half), True, heads
    product.width = sympy.Integer(heads.features)
    return product


def _with(root: fx.Node, left: fx.Node, right: fx.Node, walks: tuple[Access, Access], tails: Sequence[Tail],
          space: list[sympy.Expr]) -> Product:  # fmt: skip
    """A product whose space has no needless dimensions."""
    stepping = [walks[0], *(o.access for t in tails for o in t.outputs)]
    staying = [walks[1], *(a for t in tails for a in t.loads.values())]
    extents = merge(space, [*stepping, *staying], False)
    batch = max((d + 1 for d in range(len(extents) - 1) if walks[1].strides[d] != 0), default=0)
    own_row(extents, batch, stepping, staying)
    steps = [expression(s) for s in right.meta["val"].stride()[-2:]]
    right_steps = (steps[1], steps[0]) if name_of(root) in LINEAR else (steps[0], steps[1])
    return Product(tails[0], *walks, expression(left.meta["val"].stride(-1)), right_steps, extents, batch,
                   expression(shape(left)[-1]), left.meta["val"].dtype, expression(shape(root)[-1]),
                   name_of(root) in LINEAR)  # fmt: skip


def _groups(region: Region, root: fx.Node, right: fx.Node) -> Groups:
    """The groups of the rows. Raises Unsupported where not the rows but the columns or the depth are in groups."""
    ends, value = bound(root)["offs"], right.meta["val"]
    if ends is None or value.dim() != 3 or len(shape(root)) != 2 or not isinstance(value.shape[0], int):
        raise Unsupported("a grouped product whose groups are not rows")
    step = expression(ends.meta["val"].stride(0))
    return Groups(region.inputs.index(ends), value.shape[0], step, expression(value.stride(0)))


def own_row(extents: list[sympy.Expr], batch: int, stepping: Sequence[Access], staying: Sequence[Access]) -> None:
    """Give a single row a dimension, so that addresses have the shape of a tile. Edits the extents and accesses."""
    if len(extents) - 1 > batch:
        return
    extents.insert(batch, sympy.Integer(1))
    for step, accesses in ((1, stepping), (0, staying)):
        for access in accesses:
            access.strides.insert(batch, sympy.Integer(step))
