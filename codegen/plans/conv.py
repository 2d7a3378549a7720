"""Convolutions over images: where the operands are, and the geometry of the window."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import sympy
import torch
from torch import fx

from ...passes.program import Program
from ..base import Region
from .layout import Access, expression
from .rules import name_of
from .tail import Tail
from .values import Unsupported, bound, dense

CONVOLUTIONS = ("conv1d", "conv2d", "convolution")
ZERO = sympy.Integer(0)
Pair = tuple[int, int]


@dataclass(frozen=True, eq=False)
class Convolution:
    """A convolution with constant weight; pairs are (rows, columns), and a signal is an image of one row.

    Attributes:
        root: the operator.
        image: the image that it reads, a region input.
        weight: the constant weight, [filters, channels / groups, *window].
        bias: what is added to each filter, None for nothing.
        inner: nodes of the region that come before the tail: the operator, and a frame of zeros that it reads.
        groups: into how many parts channels and filters are cut.
        sizes: of an image.
        result: sizes of a result.
        window: taps.
        stride: between windows.
        dilation: between taps.
        before: zeros above and left of the image.
        after: zeros below and right of it.
    """

    root: fx.Node
    image: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    inner: Collection[fx.Node]
    groups: int
    sizes: Pair
    result: Pair
    window: Pair
    stride: Pair
    dilation: Pair
    before: Pair
    after: Pair

    @property
    def images(self) -> sympy.Expr:
        """Number of images."""
        return expression(self.root.meta["val"].shape[0])

    @property
    def filters(self) -> int:
        """Channels of the result."""
        return int(self.root.meta["val"].shape[1])

    @property
    def channels(self) -> int:
        """Channels of an image."""
        return int(self.image.meta["val"].shape[1])

    @property
    def framed(self) -> bool:
        """Whether windows may reach beyond the image."""
        return any((*self.before, *self.after))

    @property
    def depthwise(self) -> bool:
        """Whether each filter reads the channel of its own number only."""
        return self.groups == self.channels == self.filters and self.groups > 1


def find(region: Region, program: Program, dtypes: Collection[torch.dtype] = (torch.float32,)) -> Convolution:
    """The convolution of a region. Raises Unsupported with the reason."""
    roots = [n for n in region.nodes if name_of(n) in CONVOLUTIONS]
    if len(roots) != 1:
        raise Unsupported("not exactly one convolution")
    root, given = roots[0], bound(roots[0])
    image, weight = given["input"], given["weight"]
    before, after, inner = _padding(root), _padding(root, end=True), {root}
    if image in region.nodes:
        (top, left), (bottom, right_side) = _zeros_around(image)
        before, after = (before[0] + top, before[1] + left), (after[0] + bottom, after[1] + right_side)
        inner.add(image)
        image = image.args[0]
    _check(root, image, weight, program, dtypes)
    window = weight.meta["val"].shape[2:]
    stride, dilation = (_pair(given[k], len(window)) for k in ("stride", "dilation"))
    sizes, result = (_pair(n.meta["val"].shape[2:]) for n in (image, root))
    taps = _pair(window)
    found = Convolution(root, image, weight, given["bias"], inner, given["groups"], sizes, result, taps, stride,
                        dilation, before, after)  # fmt: skip
    if found.groups > 1 and not found.depthwise:
        raise Unsupported("a grouped convolution that is not depthwise")
    return found


def walk_of(conv: Convolution, region: Region, tail: Tail) -> Access:
    """The walk of the image over [images, rows, columns, channels]; the tail of a signal walks over these as well."""
    order = order_of(conv.image)
    steps = [expression(conv.image.meta["val"].stride(d)) for d in order]
    walk = Access(region.inputs.index(conv.image), steps, ZERO)
    if len(order) == 3:
        for access in (walk, *tail.loads.values(), *(o.access for o in tail.outputs)):
            access.strides.insert(1, ZERO)
    return walk


def order_of(image: fx.Node) -> tuple[int, ...]:
    """Dimensions of images or signals from the outermost to the innermost in memory: channels last."""
    return (0, *range(2, image.meta["val"].dim()), 1)


def pads(node: fx.Node) -> bool:
    """Whether a node only puts a frame around an image that one convolution reads."""
    return name_of(node) in ("pad", "constant_pad_nd") and len(node.users) == 1


def _padding(root: fx.Node, end: bool = False) -> Pair:
    """Zeros before (or after) the rows and columns. ``same`` puts the odd one after."""
    given = bound(root)
    window = given["weight"].meta["val"].shape[2:]
    if not isinstance(given["padding"], str):
        return _pair(given["padding"], len(window), 0)
    if given["padding"] == "valid":
        return (0, 0)
    dilation = _pair(given["dilation"], len(window))
    return tuple((d * (n - 1) + end) // 2 for d, n in zip(dilation, _pair(window), strict=True))  # type: ignore[return-value]


def _check(root: fx.Node, image: fx.Node, weight: fx.Node, program: Program, dtypes: Collection[torch.dtype]) -> None:
    for node in (root, image, weight):
        value = dense(node)
        if value.dtype not in dtypes or value.dtype is not dense(root).dtype:
            raise Unsupported(f"a convolution in {value.dtype}")
        if value.dim() not in (3, 4) or value.dim() != root.meta["val"].dim():
            raise Unsupported("a convolution that is not over images or signals")
    if bound(root).get("transposed"):
        raise Unsupported("a transposed convolution")
    if program.constant(weight) is None:
        raise Unsupported("a convolution whose weight is not a constant")
    sizes = [*image.meta["val"].shape[1:], *root.meta["val"].shape[1:]]
    if not all(isinstance(s, int) and s > 0 for s in sizes) or root.meta["val"].shape[0] == 0:
        raise Unsupported("a convolution of symbolic or empty size")


def _pair(value: Sequence[int], dims: int = 1, missing: int = 1) -> Pair:
    """(rows, columns) of an argument for `dims` dimensions; a signal has one row, and `missing` is its row's."""
    if len(value) == 1:
        return (value[0], value[0]) if dims == 2 else (missing, value[0])
    return value[0], value[1]


def _zeros_around(node: fx.Node) -> tuple[Pair, Pair]:
    """What a pad operator adds before and after the (rows, columns) of an image."""
    given = bound(node)
    if not pads(node) or given.get("mode", "constant") != "constant" or (given["value"] or 0) != 0:
        raise Unsupported("the image is computed by more than a frame of zeros")
    widths = list(given["pad"]) + [0] * 4
    if any(not isinstance(w, int) or w < 0 for w in widths) or any(widths[4:]):
        raise Unsupported("a frame that is not around rows and columns")
    return (widths[2], widths[0]), (widths[3], widths[1])
