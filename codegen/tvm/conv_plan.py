"""Convolutions over images as products: the rows are output pixels, the depth is input channels, summed over a window.

Channels are innermost in memory: a register tile holds pixels x channels, and the window only shifts where its left
operand is read. Depthwise convolutions have a kernel of their own, for which this also plans.
"""

from __future__ import annotations

from collections.abc import Sequence

import sympy
import torch
from torch import fx

from ...passes.program import Program
from ..base import Region
from ..plans.layout import Access, expression, merge
from ..plans.rules import name_of
from ..plans.tail import Tail, plan_tail
from ..plans.values import Unsupported, bound, dense
from .depthwise import Depthwise
from .product import Border, Product

CONVOLUTIONS = ("conv1d", "conv2d", "convolution")
ZERO = sympy.Integer(0)


def plan(region: Region, program: Program) -> Product | Depthwise:
    """The convolution of a region. Raises Unsupported with the reason."""
    roots = [n for n in region.nodes if name_of(n) in CONVOLUTIONS]
    if len(roots) != 1:
        raise Unsupported("not exactly one convolution")
    root = roots[0]
    given = bound(root)
    image, weight = given["input"], given["weight"]
    before, after, inner = _padding(root), _padding(root, end=True), {root}
    if image in region.nodes:
        (top, left), (bottom, right_side) = _zeros_around(image)
        before, after = (before[0] + top, before[1] + left), (after[0] + bottom, after[1] + right_side)
        inner.add(image)
        image = image.args[0]
    _check(root, image, weight, program)
    order = order_of(image)
    tail = plan_tail(region, root, given["bias"], 1, order, inner)
    steps = [expression(image.meta["val"].stride(d)) for d in order]
    walk = Access(region.inputs.index(image), steps, ZERO)
    if len(order) == 3:  # a signal is an image of one row
        for access in (walk, *tail.loads.values(), *(o.access for o in tail.outputs)):
            access.strides.insert(1, ZERO)
    if given["groups"] > 1:
        return _depthwise(root, image, weight, walk, before, tail)
    right = Access(region.inputs.index(weight), [ZERO] * 4, ZERO)
    return _dense(root, image, weight, walk, right, (before, after), tail)


def _depthwise(root: fx.Node, image: fx.Node, weight: fx.Node, walk: Access, before: tuple[int, int],
               tail: Tail) -> Depthwise:  # fmt: skip
    given = bound(root)
    images, channels, *sizes = image.meta["val"].shape
    filters, _, *window = weight.meta["val"].shape
    stride, dilation = (_pair(given[k], len(window)) for k in ("stride", "dilation"))
    if given["groups"] != channels or filters != channels:
        raise Unsupported("a grouped convolution that is not depthwise")
    result = root.meta["val"].shape[2:]
    return Depthwise(tail, walk, weight, expression(images), int(channels), _pair(sizes), _pair(result), _pair(window),
                     stride, dilation, before)  # fmt: skip


def _dense(root: fx.Node, image: fx.Node, weight: fx.Node, walk: Access, right: Access,
           around: tuple[tuple[int, int], tuple[int, int]], tail: Tail) -> Product:  # fmt: skip
    given, channel, border = bound(root), walk.strides[-1], None
    _, depth, *window = weight.meta["val"].shape
    stride, dilation = (_pair(given[k], len(window)) for k in ("stride", "dilation"))
    if any((*around[0], *around[1])):
        border = _border(walk, image.meta["val"], *around)
        rows, across, deep = border.padded
        walk = Access(-1, [sympy.Integer(n) for n in (rows * across * deep, across * deep, deep)] + [ZERO], ZERO)
        channel = sympy.Integer(1)
    taps = tuple((int(n), walk.strides[1 + d] * dilation[d]) for d, n in enumerate(_pair(window)))
    walk = Access(walk.buffer, [walk.strides[0], walk.strides[1] * stride[0], walk.strides[2] * stride[1], ZERO], ZERO)
    images, columns, *result = root.meta["val"].shape
    accesses = [walk, right, *tail.loads.values(), *(o.access for o in tail.outputs)]
    extents = merge([expression(n) for n in (images, *_pair(result), columns)], accesses, False)
    return Product(root, tail, walk, right, channel, (ZERO, ZERO), weight, extents, 0, int(depth), taps, border)


def _padding(root: fx.Node, end: bool = False) -> tuple[int, int]:
    """Zeros before (or after) the rows and columns. ``same`` puts the odd one after."""
    given = bound(root)
    window = given["weight"].meta["val"].shape[2:]
    if not isinstance(given["padding"], str):
        return _pair(given["padding"], len(window), 0)
    if given["padding"] == "valid":
        return (0, 0)
    dilation = _pair(given["dilation"], len(window))
    return tuple((d * (n - 1) + end) // 2 for d, n in zip(dilation, _pair(window), strict=True))  # type: ignore[return-value]


def _check(root: fx.Node, image: fx.Node, weight: fx.Node, program: Program) -> None:
    for node in (root, image, weight):
        value = dense(node)
        if value.dtype is not torch.float32:
            raise Unsupported(f"a convolution in {value.dtype}")
        if value.dim() not in (3, 4) or value.dim() != root.meta["val"].dim():
            raise Unsupported("a convolution that is not over images or signals")
    given = bound(root)
    if given.get("transposed"):
        raise Unsupported("a transposed convolution")
    if program.constant(weight) is None:
        raise Unsupported("a convolution whose weight is not a constant")
    sizes = [*image.meta["val"].shape[1:], *root.meta["val"].shape[1:]]
    if not all(isinstance(s, int) and s > 0 for s in sizes) or root.meta["val"].shape[0] == 0:
        raise Unsupported("a convolution of symbolic or empty size")


def order_of(image: fx.Node) -> tuple[int, ...]:
    """Dimensions of images or signals from the outermost to the innermost in memory: channels last."""
    return (0, *range(2, image.meta["val"].dim()), 1)


def _pair(value: Sequence[int], dims: int = 1, missing: int = 1) -> tuple[int, int]:
    """(rows, columns) of an argument for `dims` dimensions; a signal has one row, and `missing` is its row's."""
    if len(value) == 1:
        return (value[0], value[0]) if dims == 2 else (missing, value[0])
    return value[0], value[1]


def _zeros_around(node: fx.Node) -> tuple[tuple[int, int], tuple[int, int]]:
    """What a pad operator adds before and after the (rows, columns) of an image."""
    given = bound(node)
    if not pads(node) or given.get("mode", "constant") != "constant" or (given["value"] or 0) != 0:
        raise Unsupported("the image is computed by more than a frame of zeros")
    widths = list(given["pad"]) + [0] * 4
    if any(not isinstance(w, int) or w < 0 for w in widths) or any(widths[4:]):
        raise Unsupported("a frame that is not around rows and columns")
    return (widths[2], widths[0]), (widths[3], widths[1])


def pads(node: fx.Node) -> bool:
    """Whether a node only puts a frame around an image that one convolution reads."""
    return name_of(node) in ("pad", "constant_pad_nd") and len(node.users) == 1


def _border(source: Access, image: torch.Tensor, before: tuple[int, int], after: tuple[int, int]) -> Border:
    channels, (rows, columns) = int(image.shape[1]), _pair([int(s) for s in image.shape[2:]])
    return Border(Access(source.buffer, list(source.strides), ZERO), source.strides[-1], expression(image.shape[0]),
                  (rows, columns, channels), before, after)  # fmt: skip
