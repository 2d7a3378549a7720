"""What a region with one matrix product and a pointwise tail computes: operands, and a row program over the result."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import sympy
import torch
from torch import fx

from ...passes.program import Program
from ...targets.target import Target
from ..base import Region
from ..plans.layout import Access, expression, merge
from ..plans.product import LINEAR, MATRIX, check_operands, operands, walks_of
from ..plans.rules import name_of
from ..plans.tail import Tail, column_parts, plan_tail, shape_of_parts
from ..plans.values import Unsupported, bound, shape
from .dots import PLAIN, WEIGHT_INT4, Dot, dot_of


@dataclass
class Border:
    """A copy of an image batch, channels last, with zeros around it.

    Attributes:
        source: walk of the image over [images, rows, columns], and along its channels.
        step: stride of the image along its channels.
        images: number of images.
        sizes: rows, columns and channels of one image.
        before: zero rows above and zero columns left of it.
        after: zero rows below and zero columns right of it.
    """

    source: Access
    step: sympy.Expr
    images: sympy.Expr
    sizes: tuple[int, int, int]
    before: tuple[int, int]
    after: tuple[int, int]

    @property
    def padded(self) -> tuple[int, int, int]:
        """Rows, columns and channels of one padded image."""
        rows, columns, channels = self.sizes
        return rows + self.before[0] + self.after[0], columns + self.before[1] + self.after[1], channels


@dataclass
class Product:
    """One matrix product per batch element, [rows, depth] x [depth, columns], with a row program over its result.

    Attributes:
        root: the product node.
        tail: what is done to each element of the result.
        left: walk of the left operand over the space, columns not counted.
        right: the same for the right one.
        left_step: stride of the left operand along the depth.
        right_steps: strides of the right operand along the depth and along the columns.
        weight: the right operand if it is a constant that is packed, None if it is taken at run time.
        extents: sizes of the space: batch, rows, columns.
        batch: how many of the extents the right operand depends on.
        depth: size of the dimension that is summed over, for one tap.
        window: (taps, stride of the left operand) of each dimension of a convolution's window.
        border: how the left operand is copied with zeros around it first, None if it is read in place.
        dot: how elements are multiplied.
        levels: nodes of scale and offset of a weight of four bits, and its number of groups along the depth.
        parts: first columns of the parts of the right operand that are put together; the space has the columns of one.
    """

    root: fx.Node
    tail: Tail
    left: Access
    right: Access
    left_step: sympy.Expr
    right_steps: tuple[sympy.Expr, sympy.Expr]
    weight: fx.Node | None
    extents: list[sympy.Expr]
    batch: int
    depth: int
    window: tuple[tuple[int, sympy.Expr], ...] = ()
    border: Border | None = None
    dot: Dot = PLAIN
    levels: tuple[fx.Node, fx.Node, int] | None = None
    parts: tuple[int, ...] = (0,)

    @property
    def steps(self) -> int:
        """Lines of a packed panel, for one tap."""
        return self.depth // 2 if self.levels is not None else -(-self.depth // self.dot.group)

    @property
    def packed(self) -> bool:
        """Whether the right operand is a packed weight."""
        return self.weight is not None

    @property
    def columns(self) -> int:
        """Number of columns of the result."""
        return int(self.extents[-1])

    @property
    def rows(self) -> int | None:
        """Number of rows that share one right operand, None if symbolic."""
        return _count(self.extents[self.batch : -1])

    @property
    def flops(self) -> int | None:
        """Floating point operations of the product, None if sizes are symbolic."""
        rows = _count(self.extents[:-1])
        return None if rows is None else 2 * rows * self.columns * len(self.parts) * self.depth * self.taps

    @property
    def taps(self) -> int:
        """Positions of the window."""
        return math.prod(count for count, _ in self.window)

    @property
    def tensors(self) -> list[torch.Tensor]:
        """Fake tensors of the parameters."""
        return self.tail.tensors


def _count(extents: Iterable[sympy.Expr]) -> int | None:
    extents = list(extents)
    return math.prod(int(e) for e in extents) if all(e.is_Integer for e in extents) else None


def plan(region: Region, program: Program | None, target: Target) -> Product:
    """The product of a region. Raises Unsupported with the reason.

    Args:
        program: tells which inputs are constant weights; without it every operand is taken at run time.
        target: tells which instructions there are.
    """
    roots = [n for n in region.nodes if name_of(n) in (*LINEAR, *MATRIX)]
    if len(roots) != 1:
        raise Unsupported("not exactly one matrix product")
    root = roots[0]
    left, right, addend = operands(root)
    check_operands(root, left, right)
    dot = dot_of(left.meta["val"].dtype, right.meta["val"].dtype, target)
    parts = column_parts(region, root)
    space = shape_of_parts(region, root, parts)
    depth, columns = shape(left)[-1], space[-1]
    if not isinstance(depth, int) or not isinstance(columns, int) or depth == 0 or 0 in space:
        raise Unsupported("a product whose depth or columns are symbolic or empty")
    packed = program is not None and len(shape(right)) == 2 and program.constant(right) is not None
    if not packed and (dot.constants > 1 or dot.stored is torch.int8):
        raise Unsupported("a product of bytes whose right operand is not a constant weight")
    scale = bound(root)["scales"] if name_of(root) == "_weight_int8pack_mm" else None
    if len(parts) > 1 and (not packed or name_of(root) == "linear_int4"):
        raise Unsupported(
            "parts of a product whose right operand is not a constant weight of whole numbers per element"
        )
    levels = _levels(root, program) if name_of(root) == "linear_int4" else None
    if (dot is WEIGHT_INT4) is not (levels is not None):
        raise Unsupported(f"a product with {right.meta['val'].dtype}")
    tail = plan_tail(region, root, addend, dot.constants if packed else 0, scale=scale, parts=parts)
    walks = walks_of(root, left, right, region, len(space))
    accesses = [*walks, *tail.loads.values(), *(o.access for o in tail.outputs)]
    extents = merge([expression(e) for e in space], accesses, False)
    batch = max((d + 1 for d in range(len(extents) - 1) if walks[1].strides[d] != 0), default=0)
    steps = [expression(s) for s in right.meta["val"].stride()[-2:]]
    right_steps = (steps[1], steps[0]) if name_of(root) in LINEAR else (steps[0], steps[1])
    left_step, weight = expression(left.meta["val"].stride(-1)), right if packed else None
    return Product(root, tail, *walks, left_step, right_steps, weight, extents, batch, depth, dot=dot, levels=levels,
                   parts=parts)  # fmt: skip


def _levels(root: fx.Node, program: Program | None) -> tuple[fx.Node, fx.Node, int]:
    scale, offset = bound(root)["scale"], bound(root)["offset"]
    if program is None or program.constant(scale) is None or program.constant(offset) is None:
        raise Unsupported("a weight of four bits whose scale or offset is not constant")
    return scale, offset, shape(scale)[1]
