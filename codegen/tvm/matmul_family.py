"""The matmul family: how a product is packed, tiled and cut into tasks.

The weight is packed once into panels of `width` columns, [panels, depth, width], so that every step of the inner loop
reads consecutive memory. A right operand that is only known at run time is packed panel by panel by the task that
needs it. What follows the product (bias, activation, residual, scale, cast) is a row program that reads the
accumulators, so the result is written once.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ...passes.program import Program
from ...targets.target import Target
from ..base import Region, Schedule
from ..plans.conv import CONVOLUTIONS, order_of
from ..plans.product import LINEAR, MATRIX
from ..plans.rules import name_of
from ..plans.tail import replaceable
from ..plans.values import Unsupported
from . import conv_plan
from .depthwise import Depthwise, DepthwiseLowering
from .dots import PLAIN, pack, pack_levels, start_of
from .matmul import Form, function
from .product import Product, plan
from .row_family import lanes_of

TILES = ((6, 4), (9, 3), (8, 3), (13, 2), (12, 2))  # rows x vectors: 24 to 27 accumulators of 32 vector registers
SMALL_TILES = ((6, 2), (4, 3), (4, 2))  # 8 to 12 accumulators of 16 vector registers
MOST = ((1, 12), (4_000_000, 1), (40_000_000, 3), (math.inf, 12))  # schedules by floating point operations; 0: unknown
BLOCK_COLUMNS = 192  # of one task when rows are cut into blocks
SHARES = 4  # tasks of a core, so that a core that is slow for a while can be helped
BLOCKED_FROM = 128  # rows from which on the depth may be cut into blocks
SERIAL_BELOW = 400_000  # floating point operations that are not worth a launch on several threads


class MatmulFamily:
    """Regions of one matrix product and the pointwise operators after it."""

    name = "matmul"

    def claims(self, region: Region) -> bool:
        """Whether a matrix product is in the region."""
        return any(name_of(n) in (*LINEAR, *MATRIX) for n in region.nodes)

    def plan(self, region: Region, program: Program | None, target: Target) -> MatmulLowering:
        """The region's product and row program. Raises Unsupported."""
        return MatmulLowering(plan(region, program, target), program)


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
        found = conv_plan.plan(region, program)
        order = order_of(next(n for n in region.nodes if name_of(n) in CONVOLUTIONS))
        if isinstance(found, Depthwise):
            return DepthwiseLowering(found, program, order)
        return MatmulLowering(found, program, order)


@dataclass
class MatmulLowering:
    """A planned product, the program that holds its weight, and how its outputs lie in memory."""

    product: Product
    program: Program | None
    order: tuple[int, ...] | None = None

    @property
    def tensors(self) -> list[torch.Tensor]:
        """Fake tensors of the parameters."""
        return self.product.tensors

    @property
    def replaces(self) -> tuple[tuple[int, int], ...]:
        """A residual may be overwritten by the sum: no tile is computed twice, and each reads its own elements only."""
        p = self.product
        border = [p.border.source.buffer] if p.border is not None else []
        return replaceable(p.tail, [p.left.buffer, p.right.buffer, *border])

    @property
    def flops(self) -> int:
        """Floating point operations of the product, 0 if sizes are symbolic."""
        return self.product.flops or 0

    def space(self, target: Target) -> Iterable[Schedule]:
        """Tile shapes and cuts of the work, the likelier first; fewer for little work, where compiling costs more."""
        return itertools.islice(self._all(target), next(most for flops, most in MOST if self.flops <= flops))

    def _all(self, target: Target) -> Iterable[Schedule]:
        product, rows, parts = self.product, self.product.rows, len(self.product.parts)
        seen = set()
        for height, vectors in _tiles(target, rows):
            vectors = min(max(1, vectors // parts), -(-product.columns // lanes_of(target))) * parts
            height = max(1, min(height, _budget(target) // vectors))
            panels = -(-product.columns * parts // (vectors * lanes_of(target)))
            whole = _cuts(product, height, panels, target)
            blocks = _blocks(product, height, panels, vectors * lanes_of(target), target)
            for tiles, group, depth in (*((*cut, 0) for cut in whole), *blocks):
                key = (height, vectors, tiles, group, depth)
                if key not in seen:
                    seen.add(key)
                    names = ("rows", "vectors", "tiles", "panels", "depth")
                    yield Schedule("matmul", tuple(zip(names, key, strict=True)))

    def function(self, name: str, schedule: Schedule, target: Target) -> Any:
        """The PrimFunc."""
        flops = self.product.flops
        threaded = target.cores > 1 and (flops is None or flops >= SERIAL_BELOW)
        rows, vectors, tiles, panels = (int(schedule[k]) for k in ("rows", "vectors", "tiles", "panels"))
        depth = int(schedule.get("depth", 0))
        form = Form(lanes_of(target), rows, vectors, tiles, panels, threaded, len(self.product.parts), depth)
        return function(self.product, name, form)

    def constants(self, schedule: Schedule, target: Target) -> tuple[torch.Tensor, ...]:
        """The packed weight, if the right operand is one."""
        product, program = self.product, self.program
        weight = None if program is None else program.constant(product.weight)
        if program is None or weight is None:
            return ()
        width, dot = int(schedule["vectors"]) * lanes_of(target), product.dot
        if product.levels is not None:
            scale, offset = (program.constant(n) for n in product.levels[:2])
            assert scale is not None and offset is not None
            return pack_levels(weight, scale, offset, width)
        matrix = _side_by_side(_matrix(product.root, weight), product, width)
        packed = pack(matrix, width, dot)
        return (packed, start_of(matrix, width)) if dot.shifted else (packed,)


def _matrix(root: fx.Node, weight: torch.Tensor) -> torch.Tensor:
    """A weight as [depth, columns]; the depth of a convolution runs over window rows, window columns, channels."""
    weight = weight.detach()
    if name_of(root) in CONVOLUTIONS:
        return weight.movedim((1, 0), (-2, -1)).reshape(-1, weight.shape[0])
    return weight.t() if name_of(root) in LINEAR else weight


def _side_by_side(matrix: torch.Tensor, product: Product, width: int) -> torch.Tensor:
    """Columns in an order in which each panel has the same columns of all parts, with zeros where a part ends."""
    if len(product.parts) == 1:
        return matrix
    own, columns = width // len(product.parts), product.columns
    parts = torch.stack([matrix[:, start : start + columns] for start in product.parts], 1)
    padded = torch.nn.functional.pad(parts, (0, -columns % own))
    return padded.reshape(*padded.shape[:2], -1, own).transpose(1, 2).flatten(1)


def _budget(target: Target) -> int:
    """Registers for accumulators."""
    return 28 if target.vector_bits >= 512 else 12


def _tiles(target: Target, rows: int | None) -> tuple[tuple[int, int], ...]:
    wide, budget = target.vector_bits >= 512, _budget(target)
    if rows is not None and rows < 6:  # few rows: more vectors keep enough sums in flight
        return tuple(dict.fromkeys((rows, v) for v in (8, budget // rows, 4) if rows * v <= budget))
    found = TILES if wide else SMALL_TILES
    if rows is None:
        return found
    # rows that a tile computes for nothing, in steps of 2%: less than that decides nothing between tiles
    return tuple(sorted(found, key=lambda t: (-(-rows // t[0]) * t[0] - rows) * 50 // rows))


def _cuts(product: Product, height: int, panels: int, target: Target) -> Iterable[tuple[int, int]]:
    """(tiles of a task, panels of a task): all in one task, an even share of the panels, or blocks that fit a cache."""
    rows, flops, cores = product.rows, product.flops, target.cores
    tiles = 1 << 20 if rows is None else -(-rows // height)
    if cores == 1 or (flops is not None and flops < SERIAL_BELOW):
        yield tiles, panels
        return
    if product.batch:
        yield tiles, panels
    if panels >= cores:
        if panels >= SHARES * cores:
            yield tiles, -(-panels // (SHARES * cores))
        yield tiles, -(-panels // cores)
    if rows is None or tiles >= 2 * cores:
        block = max(1, target.second_cache // 2 // (4 * product.depth * product.taps * height))
        rounds = -(-tiles // block)
        rounds = -(-rounds // cores) * cores  # as many blocks for each core
        width = -(-product.columns // panels)
        yield -(-tiles // rounds), max(1, min(panels, BLOCK_COLUMNS // width))


def _blocks(product: Product, height: int, panels: int, width: int,
            target: Target) -> Iterable[tuple[int, int, int]]:  # fmt: skip
    """(tiles of a task, panels of a task, block of the depth) where a whole panel does not fit the first cache.

    The part of a panel fits most of that, and rows and sums of a task half of the second one.
    """
    most, rows = target.caches[0] * 4 // 5 // (4 * width), product.rows
    plain = product.packed and product.dot is PLAIN and product.levels is None and product.taps == 1
    if not plain or product.batch or product.depth <= 1.5 * most or (rows is not None and rows < BLOCKED_FROM):
        return
    depth = next((d for d in range(most, most // 3, -1) if product.depth % d == 0), 0)
    if not depth:
        return
    group = max(1, min(panels, BLOCK_COLUMNS // width))
    tiles = max(1, target.second_cache // 2 // (4 * height * (depth + group * width)))
    if rows is not None:
        rounds = -(-rows // (height * tiles))
        tiles = -(-rows // (height * -(-rounds // target.cores) * target.cores))
    yield tiles, group, depth
