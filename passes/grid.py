"""What a token axis was flattened from: rows and columns of an image, frames of a video."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .axis import Axes, Dim
from .nodes import expression, operator_name
from .tokens import Tokens


@dataclass(frozen=True)
class Grid:
    """Tokens that are the elements of several axes, the last one running fastest.

    Attributes:
        axes: the outermost first.
        sizes: of them.
        first: place of the first of these tokens.
    """

    axes: Dim
    sizes: tuple[int, ...]
    first: int

    @property
    def end(self) -> int:
        """The place behind the last of these tokens."""
        return self.first + math.prod(self.sizes)

    def corners(self, windows: tuple[int, int]) -> list[int]:
        """Places of the first token of each window of so many rows and columns; the grid has two axes."""
        rows, columns = self.sizes
        return [self.first + r * columns + c for r in range(0, rows, windows[0]) for c in range(0, columns, windows[1])]


def find_grid(tokens: Tokens) -> Grid | str:
    """The grid that most tokens are, or why there is none."""
    found = _flattened(tokens.axes, tokens.axis)
    if found is None:
        return "the token axis was not made by flattening a grid"
    axes, first = found
    if not all(a.size.is_Integer for a in axes):
        return "the sizes of the grid are known at run time only"
    return Grid(axes, tuple(int(a.size) for a in axes), first)


def _flattened(axes: Axes, dim: Dim) -> tuple[Dim, int] | None:
    """The only part of a dimension that is several axes, and where it begins; other tokens may be joined to it."""
    if len(dim) > 1:
        return dim, 0
    if dim and dim[0] in axes.taken:
        part = axes.taken[dim[0]]
        inner, start = _flattened(axes, axes.resolve(part.source)), expression(part.start)
        if inner is None or not start.is_Integer or part.step != 1:
            return None
        first, size = inner[1] - int(start), math.prod(a.size for a in inner[0])
        return (inner[0], first) if first >= 0 and (dim[0].size - first - size).is_nonnegative else None
    if not dim or dim[0] not in axes.joined:
        return None
    found, offset = list[tuple[Dim, int]](), expression(0)
    for _, piece in axes.joined[dim[0]].pieces:
        inner = _flattened(axes, axes.resolve(piece))
        if inner is not None and offset.is_Integer:
            found.append((inner[0], inner[1] + int(offset)))
        offset += math.prod(a.size for a in axes.resolve(piece))
    return found[0] if len(found) == 1 else None


def find_frames(tokens: Tokens) -> Grid | str:
    """The grid whose outermost axis counts frames, or why there is none.

    Frames are a dimension of an input. Where several of them make up one token, a three-dimensional convolution does
    that, or a view; what a view takes apart counts as frames if the patches of a frame are two axes more, since rows of
    an image are taken apart in the same way.
    """
    grid, axes = find_grid(tokens), tokens.axes
    if isinstance(grid, str):
        return grid
    outer = grid.axes[0]
    dims = [d for n in (n for n in axes.graph.nodes if n.op == "placeholder") for d in axes.of(n)]
    whole, cut = (outer,) in dims, any(d[:1] == (outer,) for d in dims) and len(grid.axes) > 2
    convolutions = [n for n in axes.graph.nodes if operator_name(n) in ("conv3d", "convolution")]
    depths = [axes.of(n)[2] for n in convolutions if len(axes.of(n)) == 5]
    if whole or cut or (outer,) in depths:
        return grid
    return f"its tokens are a grid of {' x '.join(map(str, grid.sizes))} without an axis of frames"
