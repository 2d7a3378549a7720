"""The operands of a matrix product and how they are walked."""

from __future__ import annotations

import sympy
from torch import fx

from ..base import Region
from .layout import Access, expression
from .rules import name_of
from .values import Unsupported, bound, dense

LINEAR, MATRIX = (
    ("linear", "_weight_int8pack_mm", "linear_int4"),
    ("_int_mm", "mm", "addmm", "bmm", "baddbmm", "matmul"),
)
GROUPED = "_grouped_mm"  # rows in groups, each with a matrix of its own


def operands(root: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node | None]:
    """Left and right operand and what is added to the product."""
    given = bound(root)
    if given.get("alpha", 1) != 1 or given.get("beta", 1) != 1:
        raise Unsupported("the product or the addend is scaled")
    if name_of(root) == GROUPED:
        if given["bias"] is not None or given["out_dtype"] not in (None, root.meta["val"].dtype):
            raise Unsupported("a grouped product with a bias or another dtype")
        return given["self"], given["mat2"], None
    if name_of(root) in LINEAR:
        names = ("self", "mat2") if name_of(root) == "_weight_int8pack_mm" else ("input", "weight")
        return given[names[0]], given[names[1]], given.get("bias")
    if name_of(root) in ("addmm", "baddbmm"):
        left, right = [given[k] for k in (("mat1", "mat2") if name_of(root) == "addmm" else ("batch1", "batch2"))]
        return left, right, given["self"]
    left, right = [v for v in root.args[:2] if isinstance(v, fx.Node)]
    return left, right, None


def check_operands(root: fx.Node, left: fx.Node, right: fx.Node) -> None:
    """Raise Unsupported unless both are matrices, or batches of them."""
    for node in (root, left, right):
        value = dense(node)
        if value.dim() < 2 or (name_of(root) in LINEAR and node is right and value.dim() != 2):
            raise Unsupported("a product with a vector")


def walks_of(root: fx.Node, left: fx.Node, right: fx.Node, region: Region, rank: int) -> tuple[Access, Access]:
    """How both operands walk over the space of the result, without the depth."""
    walks = []
    for node, skipped in ((left, 1), (right, 2)):
        strides: list[sympy.Expr] = [sympy.Integer(0)] * rank
        value = node.meta["val"]
        own = value.dim() - skipped  # dimensions that the space shares, aligned at their ends
        shared = 0 if node is right and name_of(root) in (*LINEAR, GROUPED) else own
        for d in range(shared):
            size, stride = value.shape[d], value.stride(d)
            if not (isinstance(size, int) and size == 1):
                strides[rank - skipped - own + d] = expression(stride)
        walks.append(Access(region.inputs.index(node), strides, sympy.Integer(0)))
    return walks[0], walks[1]
