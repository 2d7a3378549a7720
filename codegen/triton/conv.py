"""Convolutions over images as products: rows are output pixels, columns are filters, the depth is window x channels.

The image is read in place: each step of the depth computes where its taps lie, and masks those beyond the border. The
weight is packed once to [depth, filters] in whole blocks of the depth, so that no step of it needs a mask. A window of
one pixel is a plain product.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import sympy
import torch

from ...passes.program import Program
from ...targets.target import Target
from ..base import Region, Schedule
from ..plans.conv import CONVOLUTIONS, ZERO, Convolution, find, order_of, walk_of
from ..plans.layout import Access, merge
from ..plans.rules import name_of
from ..plans.tail import Tail, plan_tail
from ..plans.values import FLOATS, Unsupported
from .code import Code, power_of_two
from .depthwise import DepthwiseLowering
from .matmul import MatmulLowering, Template
from .product import Product, own_row
from .taps import corner, inside, tap_lines, tap_offset
from .writer import Writer

FEW_CHANNELS = 16  # below this a block of the depth runs over several taps


class ConvFamily:
    """Regions of one convolution over images with constant weight and the pointwise operators after it."""

    name = "conv"

    def claims(self, region: Region) -> bool:
        """Whether a convolution is in the region."""
        return any(name_of(n) in CONVOLUTIONS for n in region.nodes)

    def plan(self, region: Region, program: Program | None, target: Target) -> MatmulLowering | DepthwiseLowering:
        """The convolution as a product, or channel by channel. Raises Unsupported."""
        if program is None:
            raise Unsupported("a convolution whose weight is not a constant")
        conv = find(region, program, FLOATS)
        order, weight = order_of(conv.image), conv.weight.meta["val"]
        plain = conv.window == (1, 1) and not conv.framed and not conv.depthwise
        tail = plan_tail(region, conv.root, conv.bias, 0 if plain else 1, order, conv.inner, device="cuda")
        walk = walk_of(conv, region, tail)
        if plain:
            right = Access(region.inputs.index(conv.weight), [ZERO] * 4, ZERO)
            return MatmulLowering(_product(conv, tail, walk, right, weight.stride()[1::-1]), order)
        packed = len(region.inputs)
        tail.tensors[packed] = torch.empty(0, dtype=weight.dtype)
        if conv.depthwise:
            return DepthwiseLowering(conv, tail, walk, program, order)
        product = _product(conv, tail, walk, Access(packed, [ZERO] * 4, ZERO), (conv.filters, 1))
        return ConvLowering(product, order, conv=conv, walk=walk, program=program)


def _product(conv: Convolution, tail: Tail, walk: Access, right: Access, steps: Sequence[int]) -> Product:
    """The convolution as a product; `steps` are the strides of the right operand along depth and filters."""
    rows, columns = (stride * step for stride, step in zip(walk.strides[1:3], conv.stride, strict=True))
    left = Access(walk.buffer, [walk.strides[0], rows, columns, ZERO], ZERO)
    extents = [conv.images, *map(sympy.Integer, (*conv.result, conv.filters))]
    if conv.window == (1, 1):
        extents = merge(extents, [left, right, *tail.loads.values(), *(o.access for o in tail.outputs)], False)
        own_row(extents, 0, [left, *(o.access for o in tail.outputs)], [right, *tail.loads.values()])
    down, over = (sympy.Integer(s) for s in steps)
    depth = sympy.Integer(conv.channels * conv.window[0] * conv.window[1])
    dtype = conv.weight.meta["val"].dtype
    return Product(tail, left, right, walk.strides[-1], (down, over), extents, 0, depth, dtype, extents[-1])


@dataclass(kw_only=True)
class ConvLowering(MatmulLowering):
    """A planned convolution.

    Attributes:
        conv: its geometry.
        walk: of the image over [images, rows, columns, channels].
        program: holds the weight.
    """

    conv: Convolution
    walk: Access
    program: Program

    def space(self, target: Target) -> Iterable[Schedule]:
        """Tiles of products whose blocks of the depth stay inside one tap, if there are channels enough."""
        found: dict[Schedule, None] = {}
        for schedule in super().space(target):
            params = dict(schedule.params) | {"tma": False, "programs": 0}
            params["depth"] = _block(self.conv.channels, int(params["depth"]))
            found[Schedule("conv", tuple(params.items()))] = None
        return list(found)

    def constants(self, schedule: Schedule, target: Target) -> tuple[torch.Tensor, ...]:
        """The weight, [depth, filters]: rows, columns and channels of the window, filled up to whole blocks."""
        weight = self.program.constant(self.conv.weight)
        assert weight is not None
        steps = _Steps(self.conv, int(schedule["depth"]))
        matrix = weight.detach().movedim((1, 0), (-2, -1))  # [*window, channels, filters]
        if not steps.flat:
            matrix = _filled(matrix, -2, steps.blocks * steps.block)
        matrix = matrix.reshape(-1, self.conv.filters)
        return (_filled(matrix, 0, steps.count * steps.block).contiguous(),)

    def code(self, name: str, schedule: Schedule, target: Target) -> Code:
        """The kernel, or for a split depth the two kernels."""
        return _ConvTemplate(self.product, name, schedule, conv=self.conv, walk=self.walk).code()


def _block(channels: int, wanted: int) -> int:
    """Size of a block of the depth: without a rest of channels, if that leaves it wide enough for matrix units."""
    if channels < FEW_CHANNELS:
        return min(wanted, 64)
    block = min(wanted, power_of_two(channels))
    while channels % block and block > 32:
        block //= 2
    return block


def _filled(matrix: torch.Tensor, dim: int, size: int) -> torch.Tensor:
    """The tensor with zeros after its last element along a dimension."""
    shape = list(matrix.shape)
    shape[dim] = size - shape[dim]
    return torch.cat((matrix, matrix.new_zeros(shape)), dim)


@dataclass(frozen=True)
class _Steps:
    """How the depth of a convolution is cut into blocks.

    Attributes:
        flat: whether a block runs over several taps, with channels innermost; otherwise it has channels of one tap.
    """

    conv: Convolution
    block: int

    @property
    def flat(self) -> bool:
        return self.conv.channels < FEW_CHANNELS

    @property
    def blocks(self) -> int:
        """Blocks of one tap."""
        return -(-self.conv.channels // self.block)

    @property
    def taps(self) -> int:
        return self.conv.window[0] * self.conv.window[1]

    @property
    def count(self) -> int:
        """Blocks of the whole depth."""
        return -(-self.taps * self.conv.channels // self.block) if self.flat else self.taps * self.blocks


@dataclass(kw_only=True)
class _ConvTemplate(Template):
    conv: Convolution
    walk: Access

    def _accumulate(self, w: Writer, outer: Sequence[str], split: str, splits: int) -> None:
        p, s, conv = self.product, self.schedule, self.conv
        height, width, block = (int(s[k]) for k in ("rows", "columns", "depth"))
        steps = _Steps(conv, block)
        w.line(f"sums = tl.zeros([{height}, {width}], tl.float32)")
        w.line(f"near = row % {self.sizes.text(p.rows)}")
        w.line(f"across = column % {conv.filters}")
        top, left, base = corner(w, conv, self.walk, w.digits("near", p.extents[:-1]))
        first, last = "0", str(steps.count)
        if splits > 1:
            share = -(-steps.count // splits)
            first = w.let(f"{split} * {share}")
            last = w.let(f"tl.minimum({first} + {share}, {steps.count})")
        w.line(f"for step in range({first}, {last}):")
        masks = []
        if steps.flat:
            w.line(f"    along = step * {block} + tl.arange(0, {block})[None, :]")
            w.line(f"    tap = along // {conv.channels}")
            w.line(f"    channel = along % {conv.channels}")
            masks += [f"(tap < {steps.taps})"] * (steps.count * block != steps.taps * conv.channels)
        else:
            w.line(f"    tap = step // {steps.blocks}")
            w.line(f"    channel = step % {steps.blocks} * {block} + tl.arange(0, {block})[None, :]")
            masks += [f"(channel < {conv.channels})"] * (conv.channels % block != 0)
        for line in tap_lines(conv, f"tap // {conv.window[1]}", f"tap % {conv.window[1]}"):
            w.line("    " + line)
        masks = [*inside(conv, top, left), *masks]
        guard = f", mask={' & '.join(masks)}, other=0" if masks else ""
        w.line(f"    a = tl.load(t{p.left.buffer} + {base} + {tap_offset(w, self.walk, 'channel')}{guard})")
        w.line(f"    depth = step * {block} + tl.arange(0, {block})[:, None]")
        w.line(f"    b = tl.load(t{p.right.buffer} + depth * {conv.filters} + across)")
        w.line("    sums = device.dot(a, b, sums)")
