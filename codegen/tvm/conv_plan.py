"""Convolutions over images as products: the rows are output pixels, the depth is input channels, summed over a window.

Channels are innermost in memory: a register tile holds pixels x channels, and the window only shifts where its left
operand is read. A depthwise convolution has depth 1 and reads vectors of channels instead of broadcast numbers.
"""

from __future__ import annotations

import sympy
import torch
from torch import fx

from ...passes.program import Program
from ..base import Region
from .layout import Access, expression, merge
from .product import Border, Product
from .rules import name_of
from .tail import plan_tail
from .values import Unsupported, bound, dense

CONVOLUTIONS = ("conv2d", "convolution")
ORDER = (0, 2, 3, 1)  # images, rows, columns, channels
ZERO = sympy.Integer(0)


def plan(region: Region, program: Program | None, lanes: int) -> Product:
    """The convolution of a region. Raises Unsupported with the reason."""
    roots = [n for n in region.nodes if name_of(n) in CONVOLUTIONS]
    if len(roots) != 1:
        raise Unsupported("not exactly one convolution")
    root = roots[0]
    given = bound(root)
    image, weight = given["input"], given["weight"]
    stride, padding, dilation = (_pair(given[k]) for k in ("stride", "padding", "dilation"))
    before, after, inner = padding, padding, {root}
    if image in region.nodes:
        (top, left), (bottom, right_side) = _zeros_around(image)
        before, after = (before[0] + top, before[1] + left), (after[0] + bottom, after[1] + right_side)
        inner.add(image)
        image = image.args[0]
    _check(root, image, weight, program)
    own = image.meta["val"]
    columns, per_group, *window = weight.meta["val"].shape
    depthwise = given["groups"] > 1
    if depthwise and (given["groups"] != own.shape[1] or columns != own.shape[1]):
        raise Unsupported("a grouped convolution that is not depthwise")
    tail = plan_tail(region, root, given["bias"], 1, ORDER, inner)
    border = None
    steps = [expression(s) for s in own.stride()]
    walk = Access(region.inputs.index(image), [steps[0], steps[2], steps[3], ZERO], ZERO)
    channel = steps[1]
    if any((*before, *after)) or (depthwise and (channel != 1 or columns % lanes)):
        border = _border(walk, channel, own, before, after)
        rows, across, deep = border.padded
        walk = Access(-1, [sympy.Integer(n) for n in (rows * across * deep, across * deep, deep)] + [ZERO], ZERO)
        channel = sympy.Integer(1)
    taps = tuple((int(n), walk.strides[1 + d] * dilation[d]) for d, n in enumerate(window))
    walk.strides = [walk.strides[0], walk.strides[1] * stride[0], walk.strides[2] * stride[1], ZERO]
    right = Access(region.inputs.index(weight), [ZERO] * 4, ZERO)
    sizes = root.meta["val"].shape
    accesses = [walk, right, *tail.loads.values(), *(o.access for o in tail.outputs)]
    extents = merge([expression(sizes[d]) for d in ORDER], accesses, False)
    depth = 1 if depthwise else int(per_group)
    return Product(root, tail, walk, right, channel, (ZERO, ZERO), weight, extents, 0, depth, taps, border,
                   not depthwise)  # fmt: skip


def _check(root: fx.Node, image: fx.Node, weight: fx.Node, program: Program | None) -> None:
    for node in (root, image, weight):
        value = dense(node)
        if value.dtype is not torch.float32:
            raise Unsupported(f"a convolution in {value.dtype}")
        if value.dim() != 4:
            raise Unsupported("a convolution that is not over images")
    given = bound(root)
    if given.get("transposed"):
        raise Unsupported("a transposed convolution")
    if isinstance(given["padding"], str):
        raise Unsupported("a convolution with padding by name")
    if program is None or program.constant(weight) is None:
        raise Unsupported("a convolution whose weight is not a constant")
    sizes = [*image.meta["val"].shape[1:], *root.meta["val"].shape[1:]]
    if not all(isinstance(s, int) and s > 0 for s in sizes) or root.meta["val"].shape[0] == 0:
        raise Unsupported("a convolution of symbolic or empty size")


def _pair(value: list[int]) -> tuple[int, int]:
    return (value[0], value[0]) if len(value) == 1 else (value[0], value[1])


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


def _border(source: Access, channel: sympy.Expr, image: torch.Tensor, before: tuple[int, int],
            after: tuple[int, int]) -> Border:  # fmt: skip
    channels, rows, columns = (int(s) for s in image.shape[1:])
    return Border(Access(source.buffer, list(source.strides), ZERO), channel, expression(image.shape[0]),
                  (rows, columns, channels), before, after)  # fmt: skip
