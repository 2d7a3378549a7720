"""Matrix products with what follows them: tiles of the result, accumulated in float32, written once.

Few rows are served by a split of the depth: parts of the sum go to scratch memory in float32, and a second kernel adds
them up and computes what follows. With the bulk copy engine of Hopper and later, operands are read by descriptors.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import sympy
import torch

from ...passes.program import Program
from ...targets.target import Target
from ..base import Region, Schedule
from ..plans.layout import Access, contiguous
from ..plans.product import GROUPED, LINEAR, MATRIX
from ..plans.rules import name_of
from ..plans.tail import Tail
from .code import Code, Launch, Sizes, function, is_wide, module, parts, power_of_two
from .product import Product, plan
from .tiles import find_group, number_tiles
from .writer import Place, Writer

# rows, columns, depth of a tile, warps, stages; the likelier first
LARGE = ((128, 128, 64, 8, 3), (128, 256, 64, 8, 3), (128, 128, 64, 4, 4), (64, 128, 64, 4, 4), (256, 128, 64, 8, 3),
         (64, 64, 64, 4, 4), (128, 64, 64, 4, 4), (64, 256, 64, 8, 3), (128, 128, 32, 4, 4))  # fmt: skip
SMALL = ((16, 64, 128, 4, 4), (16, 128, 128, 4, 4), (16, 32, 256, 4, 4), (16, 128, 64, 8, 5), (16, 64, 256, 4, 3))
FULL = ((64, 64, 32, 4, 3), (128, 64, 16, 8, 3), (64, 32, 32, 4, 3), (32, 32, 32, 4, 3))  # float32: no matrix units
NAMES = ("rows", "columns", "depth", "warps", "stages", "splits", "tma", "programs")
FEW_ROWS = 32
SHARE = 1024  # elements of the result of one program where a product is finished


class MatmulFamily:
    """Regions of one matrix product and the pointwise operators after it."""

    name = "matmul"

    def claims(self, region: Region) -> bool:
        """Whether a matrix product is in the region."""
        return any(name_of(n) in (*LINEAR, *MATRIX, GROUPED) for n in region.nodes)

    def plan(self, region: Region, program: Program | None, target: Target) -> MatmulLowering:
        """The region's product. Raises Unsupported."""
        return MatmulLowering(plan(region))


@dataclass
class MatmulLowering:
    """A planned product."""

    product: Product
    order: tuple[int, ...] | None = None

    @property
    def orders(self) -> Sequence[tuple[int, ...] | None]:
        """How outputs lie in memory, where they lie differently."""
        return self.product.heads.orders if self.product.heads is not None else ()

    @property
    def tensors(self) -> list[torch.Tensor]:
        """Fake tensors of the parameters."""
        return self.product.tail.tensors

    @property
    def flops(self) -> int:
        """Floating point operations of the product, 0 if sizes are symbolic."""
        sizes = [*self.product.extents, self.product.depth, sympy.Integer(len(self.product.parts))]
        return 2 * math.prod(int(s) for s in sizes) if all(s.is_Integer for s in sizes) else 0

    def constants(self, schedule: Schedule, target: Target) -> tuple[torch.Tensor, ...]:
        """None."""
        return ()

    def space(self, target: Target) -> Iterable[Schedule]:
        """Tiles that fit the target and the product, the likelier first."""
        p = self.product
        rows = int(p.rows) if p.rows.is_Integer else 4096
        columns, share = int(p.columns) if p.columns.is_Integer else 4096, len(p.parts)
        if p.dtype is torch.float32:
            tiles: Sequence[tuple[int, ...]] = FULL
        else:
            tiles = SMALL if rows <= FEW_ROWS else LARGE
        batches = math.prod(int(e) for e in p.extents[: p.batch] if e.is_Integer)
        if self._has_library():
            yield Schedule("library")
        seen = set()
        for height, width, depth, warps, stages in self._ordered(tiles, rows, columns * share, batches, target):
            height = max(16, min(height, power_of_two(rows)))
            width = max(16, min(1 << (width // share).bit_length() - 1, power_of_two(columns)))
            depth = max(16, min(depth, power_of_two(int(p.depth)))) if p.depth.is_Integer else depth
            blocks = -(-rows // height) * -(-columns // width) * batches
            splits = self._splits(blocks, depth, target)
            if not _fits(height, width * share, depth, stages, p.dtype, target):
                continue
            for split in splits:
                for tma in self._tma(target) if split == 1 and height >= 64 else (False,):
                    for programs in self._programs(blocks, target) if tma and not p.batch else (0,):
                        key = (height, width, depth, warps, stages, split, tma, programs)
                        if key not in seen:
                            seen.add(key)
                            yield Schedule("matmul", tuple(zip(NAMES, key, strict=True)))

    def _has_library(self) -> bool:
        """Whether torch's own product and one kernel for what follows are a way: a dense left operand, one weight."""
        p = self.product
        left = p.tail.tensors[p.left.buffer]
        return p.library and (p.batch == 0 or p.heads is not None) and contiguous(left) and p.depth.is_Integer

    def _programs(self, blocks: int, target: Target) -> tuple[int, ...]:
        """How many programs share the tiles; 0: one for each."""
        return (0, target.cores) if blocks > target.cores else (0,)

    def _ordered(self, tiles: Sequence[Any], rows: int, columns: int, batches: int, target: Target) -> list[Any]:
        """By the share of the multiprocessors' time that is not wasted in the last wave and at the edges."""

        def waste(tile: tuple[int, ...]) -> float:
            blocks = -(-rows // tile[0]) * -(-columns // tile[1]) * batches
            waves = -(-blocks // target.cores)
            reuse = 1 / tile[0] + 1 / tile[1]  # operands read for each element of the result
            return waves * target.cores * tile[0] * tile[1] / (rows * columns * batches) * (1 + 24 * reuse)

        return sorted(tiles, key=waste)

    def _splits(self, blocks: int, depth: int, target: Target) -> list[int]:
        """Into how many parts the depth is cut: as many as keep all multiprocessors busy, or none."""
        p = self.product
        if not p.depth.is_Integer or not all(e.is_Integer for e in p.extents) or blocks >= target.cores or p.groups:
            return [1]
        most = max(1, int(p.depth) // (2 * depth))
        wanted = min(most, power_of_two(max(1, 2 * target.cores // blocks)) // 2, 16)
        return list(dict.fromkeys(s for s in (max(1, wanted), max(1, wanted // 2), 1)))

    def _tma(self, target: Target) -> tuple[bool, ...]:
        """Whether operands may be read by descriptors: dense rows whose starts are multiples of 16 bytes."""
        p = self.product
        static = all(e.is_Integer for e in (*p.extents, p.depth, p.width))
        if "tma" not in target.features or p.dtype is torch.float32 or not static or p.groups is not None:
            return (False,)
        if (p.batch and (p.heads is None or is_wide(p.tail.tensors))) or len(p.extents) != p.batch + 2:
            return (False,)
        width = p.dtype.itemsize
        steps = [p.left.strides[p.batch], p.right_steps[0] if p.right_steps[1] == 1 else p.right_steps[1]]
        starts = [*p.parts, *([p.width] if p.heads else [])] if p.right_steps[1] == 1 else []  # where a read may begin
        dense = p.left_step == 1 and 1 in p.right_steps and all(int(s) * width % 16 == 0 for s in (*steps, *starts))
        return (True, False) if dense else (False,)

    def code(self, name: str, schedule: Schedule, target: Target) -> Code:
        """The kernel, or for a split depth the two kernels."""
        return Template(self.product, name, schedule).code()


def _fits(height: int, width: int, depth: int, stages: int, dtype: torch.dtype, target: Target) -> bool:
    """Whether the operands of all stages fit the shared memory, with room for what the compiler adds."""
    return (height + width) * depth * dtype.itemsize * max(1, stages - 1) <= target.caches[0] * 0.95


@dataclass
class Template:
    """Writes the kernels of a product."""

    product: Product
    name: str
    schedule: Schedule
    sizes: Sizes = field(init=False)

    def __post_init__(self) -> None:
        self.sizes = Sizes(self.product.tail.tensors)

    def code(self) -> Code:
        """The kernel; for a split depth or torch's own product, the two kernels."""
        p = self.product
        if self.schedule.name == "library":
            return self._library()
        splits, programs = int(self.schedule["splits"]), int(self.schedule["programs"])
        height, width = int(self.schedule["rows"]), int(self.schedule["columns"])
        batches = sympy.Mul(*p.extents[: p.batch])
        tiles = self._down(height) * parts(p.columns, width)
        warps, stages = int(self.schedule["warps"]), int(self.schedule["stages"])
        count = len(p.tail.tensors)
        parameters = tuple(range(count + (splits > 1)))
        grid = (sympy.Integer(programs),) if programs else (tiles, sympy.Integer(splits), batches)
        texts = [(self.name, self._main(splits))]
        launches = [Launch(self.name, parameters, grid, warps, stages)]
        if splits == 1:
            return self._code(texts, launches)
        texts.append((f"{self.name}_sum", self._sum(splits)))
        launches.append(Launch(f"{self.name}_sum", parameters, (parts(p.rows * p.columns, SHARE), batches), 4))
        return self._code(texts, launches)

    def _library(self) -> Code:
        """torch's own product into scratch memory, and a kernel for what follows."""
        p, name = self.product, f"{self.name}_tail"
        count, batches = len(p.tail.tensors), sympy.Mul(*p.extents[: p.batch])
        launches = [
            Launch("", (p.left.buffer, p.right.buffer, count), (sympy.Integer(1),), turned=p.turned),
            Launch(name, tuple(range(count + 1)), (parts(p.rows * p.columns, SHARE), batches), 4),
        ]
        return self._code([(name, self._sum(1))], launches)

    def _code(self, texts: Sequence[tuple[str, list[str]]], launches: Sequence[Launch]) -> Code:
        count = len(self.product.tail.tensors) + len(self._scratch)
        parameters = [*(f"t{k}" for k in range(count)), *self.sizes.parameters]
        return self.sizes.code(module([function(n, parameters, lines) for n, lines in texts]), launches, self._scratch)

    @property
    def _scratch(self) -> list[tuple[tuple[sympy.Expr, ...], torch.dtype]]:
        """Shape and dtype of the memory between the launches, if there are two."""
        p, batches = self.product, sympy.Mul(*self.product.extents[: self.product.batch])
        if self.schedule.name == "library":
            return [((p.rows, batches * p.width), p.dtype)]
        splits = int(self.schedule["splits"])
        return [((sympy.Integer(splits), batches, p.rows, p.width), torch.float32)] if splits > 1 else []

    def _writer(self) -> Writer:
        """Offsets into scratch memory of known size may be wide where none into a parameter is."""
        known = [shape for shape, _ in self._scratch if all(size.is_Integer for size in shape)]
        between = [torch.empty([int(size) for size in shape], device="meta") for shape in known]
        return Writer(self.sizes, [*self.product.tail.tensors, *between], self.product.tail.loads)

    def _main(self, splits: int) -> list[str]:
        p, w, s = self.product, self._writer(), self.schedule
        height, width, programs = int(s["rows"]), int(s["columns"]), int(s["programs"])
        rows, columns = self.sizes.text(p.rows), self.sizes.text(p.columns)
        head = self._descriptors() if bool(s["tma"]) else []
        tiles, batches = self._down(height) * parts(p.columns, width), sympy.Mul(*p.extents[: p.batch])
        split, batch = "0", "0"
        if not programs:
            tile, split, batch = w.program(tiles, splits, batches)
            w.line(f"tile = {tile}")
        number_tiles(w, self.sizes.text(self._down(height)), columns, width)
        outer = w.digits(w.long(batch), p.extents[: p.batch])
        first = f"tile_row * {height}"
        if p.groups is not None:
            find_group(w, p.groups, height)
            first = "first"
        w.line("row = " + w.long(f"({first} + tl.arange(0, {height}))[:, None]"))
        w.line("column = " + w.long(f"(tile_column * {width} + tl.arange(0, {width}))[None, :]"))
        self._accumulate(w, outer, split, splits)
        if splits > 1:
            area = f"(({split} * {self.sizes.text(batches)} + {batch}) * {rows} + row) * {self.sizes.text(p.width)}"
            inside = f"(row < {rows}) & (column < {columns})"
            for part, sums in self._parts:
                w.line(f"tl.store(t{len(p.tail.tensors)} + {area} + column{part}, {sums}, mask={inside})")
        else:
            self._finish(w, outer)
        body = w.blocks[0].lines
        if not programs:
            return [*head, *body]
        return [*head, f"for tile in tl.range(tl.program_id(0), {self.sizes.text(tiles)}, {programs}, flatten=True):",
                *(f"    {line}" for line in body)]  # fmt: skip

    def _down(self, height: int) -> sympy.Expr:
        """Tiles below each other; of rows in groups, of which no tile has two, the most that there can be."""
        groups = self.product.groups
        return parts(self.product.rows, height) + (groups.count - 1 if groups is not None else 0)

    @property
    def _parts(self) -> list[tuple[str, str]]:
        """For each part of the right operand what is added to a column, and the name of the sums."""
        starts = self.product.parts
        return [(f" + {start}" if start else "", "sums" if k == 0 else f"sums{k}") for k, start in enumerate(starts)]

    def _finish(self, w: Writer, outer: Sequence[str]) -> None:
        """What follows the product, and the stores."""
        p = self.product
        digits = (*outer, *w.digits("row", p.extents[p.batch : -1]))
        limit = "last" if p.groups is not None else self.sizes.text(p.rows)
        inside = w.let(f"row < {limit}", stem="inside")
        across = w.let(f"column < {self.sizes.text(p.columns)}", stem="inside")
        place = Place(digits, "column", inside, across)
        if p.heads is None:
            self._store(w, p.tail, place)
            return
        for k, piece in enumerate(p.heads.pieces):
            if len(p.heads.pieces) > 1:
                last = k + 1 == len(p.heads.pieces)
                w.line("else:" if last else f"{'el' if k else ''}if {outer[0]} < {piece.first + piece.count}:")
            own = Writer(w.sizes, piece.tail.tensors, piece.tail.loads, count=w.count)
            number = (own.let(f"{outer[0]} - {piece.first}"), *digits[1:]) if p.batch else digits
            self._store(own, piece.tail, replace(place, digits=number))
            indent = "    " if len(p.heads.pieces) > 1 else ""
            w.blocks[0].lines += [indent + line for line in own.blocks[0].lines]
            w.count = own.count

    def _store(self, w: Writer, tail: Tail, place: Place) -> None:
        """Compute and write the outputs of a tail."""
        for result, (_, sums) in zip(tail.results.values(), self._parts, strict=True):
            w.know(result, place, sums)
        for o in tail.outputs:
            w.store(o.access, place, w.value(o.value, place))

    def _accumulate(self, w: Writer, outer: Sequence[str], split: str, splits: int) -> None:
        p, s = self.product, self.schedule
        height, width, block = (int(s[k]) for k in ("rows", "columns", "depth"))
        depth = self.sizes.text(p.depth)
        for _, sums in self._parts:
            w.line(f"{sums} = tl.zeros([{height}, {width}], tl.float32)")
        if bool(s["tma"]):
            self._by_descriptors(w, outer, height, width, block)
            return
        w.line(f"near = row % {self.sizes.text(p.rows)}")
        w.line(f"across = column % {self.sizes.text(p.columns)}")
        lead = Place((*outer, *w.digits("near", p.extents[p.batch : -1])), "0")
        left = w.let(w.offset(_lead(p.left), lead)[0])
        if all(s == 0 for s in p.left.strides[p.batch : -1]):  # one row for all: its address must have a tile's shape
            left = w.let(f"{left} + near * 0")
        batch = Place((*outer, *["0"] * (len(p.extents) - 1 - p.batch)), "0")
        right = w.let(w.offset(_lead(p.right), batch)[0])
        if p.groups is not None:
            right = w.let(f"{right} + own.to(tl.int64) * {self.sizes.text(p.groups.stride)}")
        even = p.depth.is_Integer and int(p.depth) % (block * splits) == 0
        share = f"tl.cdiv(tl.cdiv({depth}, {block}), {splits}) * {block}"
        first, last = ("0", depth) if splits == 1 else (w.let(f"{split} * ({share})"), None)
        if last is None:
            last = w.let(f"tl.minimum({first} + {share}, {depth})")
        w.line(f"for start in range({first}, {last}, {block}):")
        w.line(f"    along = start + tl.arange(0, {block})")
        guards = ["", ""] if even else [", mask=along[None, :] < {}, other=0", ", mask=along[:, None] < {}, other=0"]
        step, (down, over) = self.sizes.text(p.left_step), map(self.sizes.text, p.right_steps)
        w.line(f"    a = tl.load(t{p.left.buffer} + {left} + along[None, :] * {step}{guards[0].format(last)})")
        for part, sums in self._parts:
            column = f"(across{part})" if part else "across"
            w.line(f"    b = tl.load(t{p.right.buffer} + {right} + along[:, None] * {down} + {column} * {over}"
                   f"{guards[1].format(last)})")  # fmt: skip
            w.line(f"    {sums} = device.dot(a, b, {sums})")

    def _descriptors(self) -> list[str]:
        """What the bulk copy engine knows of the operands."""
        p, s = self.product, self.schedule
        height, width, block = (int(s[k]) for k in ("rows", "columns", "depth"))
        rows, columns, depth = int(p.rows), int(p.width * sympy.Mul(*p.extents[: p.batch])), int(p.depth)
        flipped = p.right_steps[0] == 1
        outer, inner = (columns, depth) if flipped else (depth, columns)
        step = int(p.right_steps[1] if flipped else p.right_steps[0])
        box = [width, block] if flipped else [block, width]
        left, right = f"[{rows}, {depth}], [{int(p.left.strides[p.batch])}, 1]", f"[{outer}, {inner}], [{step}, 1]"
        return [f"left = tl.make_tensor_descriptor(t{p.left.buffer}, {left}, [{height}, {block}])",
                f"right = tl.make_tensor_descriptor(t{p.right.buffer}, {right}, {box})"]  # fmt: skip

    def _by_descriptors(self, w: Writer, outer: Sequence[str], height: int, width: int, block: int) -> None:
        """Operands by the bulk copy engine, which fills what lies outside with zeros."""
        p = self.product
        flipped = p.right_steps[0] == 1  # the weight of a linear layer: [columns, depth]
        w.line(f"for start in range(0, {int(p.depth)}, {block}):")
        w.line(f"    a = left.load([tile_row * {height}, start])")
        for part, sums in self._parts:
            first = f"tile_column * {width}{part}" + (f" + {outer[0]} * {int(p.width)}" if p.batch else "")
            w.line(f"    b = right.load({f'[{first}, start]).T' if flipped else f'[start, {first}])'}")
            w.line(f"    {sums} = device.dot(a, b, {sums})")

    def _sum(self, splits: int) -> list[str]:
        """Adds up the parts of a split depth, and computes what follows."""
        p, w = self.product, self._writer()
        rows, columns = self.sizes.text(p.rows), self.sizes.text(p.columns)
        batches = sympy.Mul(*p.extents[: p.batch])
        share, batch = map(w.long, w.program(parts(p.rows * p.columns, SHARE), batches))
        outer = w.digits(batch, p.extents[: p.batch])
        w.line(f"at = {share} * {SHARE} + tl.arange(0, {SHARE})[None, :]")
        w.line(f"row = at // {columns}")
        w.line(f"column = at % {columns}")
        for _, sums in self._parts:
            w.line(f"{sums} = tl.zeros([1, {SHARE}], tl.float32)")
        w.line(f"for part in tl.static_range({splits}):")
        area = f"((part * {self.sizes.text(batches)} + {batch}) * {rows} + row) * {self.sizes.text(p.width)}"
        if self.schedule.name == "library":  # torch writes whole rows, batch elements (which are heads) side by side
            area = f"row * {self.sizes.text(batches * p.width)} + {batch} * {self.sizes.text(p.width)}"
        w.line(f"    area = {area} + column")
        for part, sums in self._parts:
            scratch = f"tl.load(t{len(p.tail.tensors)} + area{part}, mask=row < {rows}, other=0)"
            w.line(f"    {sums} += {scratch}.to(tl.float32)")
        self._finish(w, outer)
        return w.blocks[0].lines


def _lead(access: Access) -> Access:
    """The walk over the leading dimensions alone."""
    return Access(access.buffer, [*access.strides[:-1], sympy.Integer(0)], access.shift)
