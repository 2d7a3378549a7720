"""Texts that say where the taps of a window lie in an image."""

from __future__ import annotations

from collections.abc import Sequence

from ..plans.conv import ZERO, Convolution
from ..plans.layout import Access
from .writer import Place, Writer


def corner(w: Writer, conv: Convolution, walk: Access, digits: Sequence[str]) -> tuple[str, str, str]:
    """Row and column of the first tap of each output pixel, which may lie before the image, and its offset."""
    image, *pixel = digits
    top, left = (w.let(f"{times(at, step)} - {before}", stem=stem) for at, step, before, stem in
                 zip(pixel, conv.stride, conv.before, ("top", "left"), strict=True))  # fmt: skip
    at = Access(walk.buffer, [*walk.strides[:-1], ZERO], walk.shift)
    return top, left, w.let(w.offset(at, Place((image, top, left), "0"))[0], stem="base")


def tap_lines(conv: Convolution, down: str, over: str) -> list[str]:
    """Lines that say how far (y, x) a tap of the window is from the first one."""
    return [f"y = {times(down, conv.dilation[0])}", f"x = {times(over, conv.dilation[1])}"]


def tap_offset(w: Writer, walk: Access, channel: str) -> str:
    """Offset of a channel of the tap (y, x) from the first tap."""
    down, over, deep = (w.sizes.text(e) for e in walk.strides[1:])
    return f"({times('y', down)} + {times('x', over)}) + {times(channel, deep)}"


def inside(conv: Convolution, top: str, left: str) -> list[str]:
    """Conditions under which the tap (y, x) lies inside the image."""
    if not conv.framed:
        return []
    rows, columns = conv.sizes
    return [f"({top} + y >= 0)", f"({top} + y < {rows})", f"({left} + x >= 0)", f"({left} + x < {columns})"]


def times(text: str, factor: int | str) -> str:
    """A product as text."""
    return text if str(factor) == "1" else f"{text} * {factor}"
