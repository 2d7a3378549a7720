"""Convolutions over images as products: the rows are output pixels, the depth is input channels, summed over a window.

Channels are innermost in memory: a register tile holds pixels x channels, and the window only shifts where its left
operand is read. Depthwise convolutions have a kernel of their own, for which this also plans.
"""

from __future__ import annotations

import sympy

from ...passes.program import Program
from ..base import Region
from ..plans.conv import ZERO, Convolution, find, order_of, walk_of
from ..plans.layout import Access, merge
from ..plans.tail import Tail, plan_tail
from .depthwise import Depthwise
from .product import Border, Product


def plan(region: Region, program: Program) -> Product | Depthwise:
    """The convolution of a region. Raises Unsupported with the reason."""
    conv = find(region, program)
    tail = plan_tail(region, conv.root, conv.bias, 1, order_of(conv.image), conv.inner)
    walk = walk_of(conv, region, tail)
    if conv.depthwise:
        return Depthwise(tail, walk, conv.weight, conv.images, conv.channels, conv.sizes, conv.result, conv.window,
                         conv.stride, conv.dilation, conv.before)  # fmt: skip
    return _dense(conv, walk, Access(region.inputs.index(conv.weight), [ZERO] * 4, ZERO), tail)


def _dense(conv: Convolution, walk: Access, right: Access, tail: Tail) -> Product:
    channel, border = walk.strides[-1], None
    if conv.framed:
        border = Border(Access(walk.buffer, list(walk.strides), ZERO), channel, conv.images,
                        (*conv.sizes, conv.channels), conv.before, conv.after)  # fmt: skip
        rows, across, deep = border.padded
        walk = Access(-1, [sympy.Integer(n) for n in (rows * across * deep, across * deep, deep)] + [ZERO], ZERO)
        channel = sympy.Integer(1)
    taps = tuple((n, walk.strides[1 + d] * conv.dilation[d]) for d, n in enumerate(conv.window))
    strides = [walk.strides[0], walk.strides[1] * conv.stride[0], walk.strides[2] * conv.stride[1], ZERO]
    walk = Access(walk.buffer, strides, ZERO)
    accesses = [walk, right, *tail.loads.values(), *(o.access for o in tail.outputs)]
    extents = merge([conv.images, *map(sympy.Integer, (*conv.result, conv.filters))], accesses, False)
    return Product(conv.root, tail, walk, right, channel, (ZERO, ZERO), conv.weight, extents, 0, conv.channels, taps,
                   border)  # fmt: skip
