"""Group normalisation: a program normalises a group of one image, or with several programs per group a share of it.

A group that fits a tile is read once. Otherwise each lane keeps the mean and the sum of squared deviations of its own
elements, updated one by one (Welford, 1962), which are joined at the end (Chan, Golub and LeVeque, 1983); a second
walk writes the result.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import sympy
import torch

from ...passes.program import Program
from ...targets.target import Target
from ..base import Region, Schedule
from ..plans.group_norm import GroupNorm, plan
from ..plans.layout import expression, merge
from ..plans.rules import name_of
from ..plans.values import bound
from .code import Code, Launch, Sizes, function, module, parts, power_of_two
from .writer import Place, Writer, load

RESIDENT = 8192  # elements of a group that one program holds at once
MOST_SPLITS = 16


class GroupNormFamily:
    """Regions of one group normalisation and the pointwise operators after it."""

    name = "groups"

    def claims(self, region: Region) -> bool:
        """Whether a group normalisation is in the region."""
        return any(name_of(n) == "group_norm" for n in region.nodes)

    def plan(self, region: Region, program: Program | None, target: Target) -> GroupNormLowering:
        """The normalisation; the result lies in memory as its operand does. Raises Unsupported."""
        root = next(n for n in region.nodes if name_of(n) == "group_norm")
        norm = plan(region, "cuda", last=expression(bound(root)["input"].meta["val"].stride(1)) == 1)
        return GroupNormLowering(norm, _merge(norm))


def _merge(norm: GroupNorm) -> list[sympy.Expr]:
    """Sizes of the pixels when dimensions that all tensors walk as one are merged; edits the walks."""
    accesses = [norm.image, *norm.tail.loads.values(), *(o.access for o in norm.tail.outputs)]
    channel = norm.order.index(1)
    kept = [(a.strides.pop(channel), a.strides.pop(0)) for a in accesses]
    pixels = merge([n for d, n in enumerate(norm.extents) if d not in (0, channel)], accesses, True)
    channel = len(pixels) + 1 if channel > 1 else 1
    for access, (own, image) in zip(accesses, kept, strict=True):
        access.strides.insert(0, image)
        access.strides.insert(channel, own)
    return pixels


@dataclass
class GroupNormLowering:
    """A planned group normalisation, and the sizes of its pixels."""

    norm: GroupNorm
    pixels: list[sympy.Expr]

    @property
    def tensors(self) -> list[torch.Tensor]:
        """Fake tensors of the parameters."""
        return self.norm.tail.tensors

    @property
    def order(self) -> tuple[int, ...]:
        """Dimensions of the outputs from the outermost to the innermost in memory."""
        return self.norm.order

    @property
    def flops(self) -> int:
        """Rough number of operations of one call, 0 if sizes are symbolic."""
        return 8 * (self.norm.elements or 0)

    @property
    def size(self) -> sympy.Expr:
        """Elements of a group of one image."""
        return sympy.Mul(*self.pixels) * (self.norm.channels // self.norm.groups)

    def space(self, target: Target) -> Iterable[Schedule]:
        """A tile of the whole group if it fits; else tiles of several sizes, and shares where there are few groups."""
        size, found = self.size, list[tuple[int, int, int]]()
        if size.is_Integer and int(size) <= RESIDENT:
            block = power_of_two(int(size))
            warps = max(1, min(8, block // 512))
            found += [(block, warps, 1), (block, max(1, warps // 2), 1)]
        else:
            for block, warps in ((4096, 8), (2048, 4), (2048, 8)):
                found += [(block, warps, s) for s in self._splits(block, target)]
        for block, warps, splits in dict.fromkeys(found):
            yield Schedule("groups", (("block", block), ("warps", warps), ("splits", splits)))

    def _splits(self, block: int, target: Target) -> list[int]:
        """Programs of a group: as many as keep all multiprocessors busy, or one."""
        programs = self.norm.extents[0] * self.norm.groups
        if not programs.is_Integer or not self.size.is_Integer:
            return [1]
        wanted = power_of_two(max(1, 4 * target.cores // int(programs))) // 2
        splits = max(1, min(wanted, int(self.size) // (2 * block), MOST_SPLITS))
        return list(dict.fromkeys((splits, 1)))

    def constants(self, schedule: Schedule, target: Target) -> tuple[torch.Tensor, ...]:
        """None."""
        return ()

    def code(self, name: str, schedule: Schedule, target: Target) -> Code:
        """The kernel; for shares of groups, one that leaves their statistics and one that normalises."""
        return _Template(self.norm, self.pixels, self.size, name, schedule).code()


@dataclass
class _Template:
    norm: GroupNorm
    pixels: list[sympy.Expr]
    size: sympy.Expr
    name: str
    schedule: Schedule
    sizes: Sizes = field(init=False)

    def __post_init__(self) -> None:
        self.sizes = Sizes(self.norm.tail.tensors)

    @property
    def _each(self) -> int:
        """Channels of a group."""
        return self.norm.channels // self.norm.groups

    @property
    def _block(self) -> int:
        return int(self.schedule["block"])

    @property
    def _steps(self) -> sympy.Expr:
        """Tiles of a group."""
        return parts(self.size, self._block)

    @property
    def _share(self) -> sympy.Expr:
        """Tiles of a program."""
        return parts(self._steps, int(self.schedule["splits"]))

    def code(self) -> Code:
        """One kernel, or one that leaves the statistics of shares and one that joins them and normalises."""
        splits, count = int(self.schedule["splits"]), len(self.norm.tail.tensors)
        programs = self.norm.extents[0] * self.norm.groups
        texts, scratch = {self.name: self._all}, []
        if splits > 1:
            texts = {f"{self.name}_statistics": self._leave, self.name: self._join}
            scratch = [((programs, sympy.Integer(splits), sympy.Integer(2)), torch.float32)]
        written = {name: write(self._start()) for name, write in texts.items()}
        taken = tuple(range(count + (splits > 1)))
        parameters = [*(f"t{k}" for k in taken), *self.sizes.parameters]
        text = module([function(name, parameters, w.blocks[0].lines) for name, w in written.items()])
        warps = int(self.schedule["warps"])
        return self.sizes.code(text, [Launch(name, taken, self._grid, warps) for name in written], scratch)

    @property
    def _grid(self) -> tuple[sympy.Expr, sympy.Expr]:
        """Groups of all images, and shares of a group."""
        return self.norm.extents[0] * self.norm.groups, sympy.Integer(int(self.schedule["splits"]))

    def _start(self) -> Writer:
        """A kernel that knows its image and group, and its share of the tiles."""
        tensors = self.norm.tail.tensors
        w = Writer(self.sizes, tensors, self.norm.tail.loads)
        both, split = w.program(*self._grid)
        w.line(f"both = {w.long(both)}")
        w.line(f"image = both // {self.norm.groups}")
        w.line(f"group = both % {self.norm.groups}")
        steps, share = self.sizes.text(self._steps), self.sizes.text(self._share)
        w.line(f"split = {split}")
        w.line(f"first = split * {share}")
        w.line(f"last = tl.minimum(first + {share}, {steps})")
        return w

    def _all(self, w: Writer) -> Writer:
        if self._steps == 1:
            place, channel = self._place(w, "first")
            x = self._operand(w, place)
            w.line(f"mean = tl.sum({x}) / {self.size}")
            apart = f"{x} - mean" if place.rows is None else f"tl.where({place.rows}, {x} - mean, 0.0)"
            w.line(f"apart = {apart}")
            self._scale(w, "tl.sum(apart * apart)")
            self._result(w, place, channel, x)
            return w
        self._statistics(w)
        w.line("mean = centre")
        self._scale(w, "spread")
        return self._results(w)

    def _scale(self, w: Writer, squares: str) -> None:
        w.line(f"scale = tl.rsqrt({squares} / {self.sizes.text(self.size)} + {self.norm.eps!r})")

    def _leave(self, w: Writer) -> Writer:
        """The statistics of a share."""
        self._statistics(w)
        w.line(f"left = t{len(self.norm.tail.tensors)} + (both * {self.schedule['splits']} + split) * 2")
        w.line("tl.store(left, centre)")
        w.line("tl.store(left + 1, spread)")
        return w

    def _join(self, w: Writer) -> Writer:
        """The statistics of a group from those of its shares, and the result of one share."""
        splits, size = int(self.schedule["splits"]), self.sizes.text(self.size)
        each = self._share * self._block
        w.line(f"part = tl.arange(0, {power_of_two(splits)})")
        w.line(f"left = t{len(self.norm.tail.tensors)} + (both * {splits} + part) * 2")
        w.line(f"centre = tl.load(left, mask=part < {splits}, other=0)")
        w.line(f"spread = tl.load(left + 1, mask=part < {splits}, other=0)")
        w.line(f"number = tl.maximum(tl.minimum({size} - part * {self.sizes.text(each)}, {self.sizes.text(each)}), 0)")
        w.line("number = number.to(tl.float32)")
        w.line(f"mean = tl.sum(number * centre) / {size}")
        self._scale(w, "tl.sum(spread + number * (centre - mean) * (centre - mean))")
        return self._results(w)

    def _statistics(self, w: Writer) -> None:
        """Mean of a share (``centre``) and its sum of squared deviations (``spread``)."""
        for name in ("means", "squares", "count"):
            w.line(f"{name} = tl.zeros([{self._block}], tl.float32)")
        body = Writer(self.sizes, w.tensors, w.loads, count=w.count)
        place, _ = self._place(body, "step")
        x = self._operand(body, place)
        body.line(f"apart = {x} - means")
        body.line("moved = means + apart * (1.0 / (step - first + 1))")
        body.line(f"joined = squares + apart * ({x} - moved)")
        for name, new in (("means", "moved"), ("squares", "joined"), ("count", "count + 1.0")):
            body.line(f"{name} = {new}" if place.rows is None else f"{name} = tl.where({place.rows}, {new}, {name})")
        self._loop(w, body)
        w.line("centre = tl.sum(means * count) / tl.maximum(tl.sum(count), 1.0)")
        w.line("spread = tl.sum(squares + count * (means - centre) * (means - centre))")

    def _results(self, w: Writer) -> Writer:
        """Normalise a share."""
        body = Writer(self.sizes, w.tensors, w.loads, count=w.count)
        place, channel = self._place(body, "step")
        self._result(body, place, channel, self._operand(body, place))
        self._loop(w, body)
        return w

    def _loop(self, w: Writer, body: Writer) -> None:
        w.line("for step in range(first, last):")
        for line in body.blocks[0].lines:
            w.line("    " + line)
        w.count = body.count

    def _place(self, w: Writer, step: str) -> tuple[Place, str]:
        """The elements of a tile, and their channels. Elements are numbered as the result lies in memory."""
        size, each = self.size, self._each
        element = w.let(f"{step} * {self._block} + tl.arange(0, {self._block})", stem="element")
        even = size.is_Integer and int(size) % self._block == 0
        real = None if even else w.let(f"{element} < {self.sizes.text(size)}", stem="inside")
        pixels = self.sizes.text(sympy.Mul(*self.pixels))
        last = self.norm.order[-1] == 1
        own, pixel = (f"{element} % {each}", f"{element} // {each}")
        if not last:
            own, pixel = f"{element} // {pixels}", f"{element} % {pixels}"
        channel = w.let(f"group * {each} + {own}", stem="channel")
        at = w.digits(w.let(pixel, stem="pixel"), self.pixels)
        digits = ("image", *at, channel) if last else ("image", channel, *at)
        return Place(digits[:-1], digits[-1], real), channel

    def _operand(self, w: Writer, place: Place) -> str:
        image = self.norm.image
        address = f"t{image.buffer} + {w.offset(image, place)[0]}"
        return w.let(load(address, [place.rows] if place.rows else [], w.tensors[image.buffer].dtype), stem="x")

    def _result(self, w: Writer, place: Place, channel: str, x: str) -> None:
        """Normalise, scale and shift a tile, then the tail."""
        y = w.let(f"({x} - mean) * scale", stem="y")
        for operator, position in (("*", self.norm.weight), ("+", self.norm.bias)):
            if position is not None:
                masks = [place.rows] if place.rows else []
                y = w.let(
                    f"{y} {operator} {load(f't{position} + {channel}', masks, w.tensors[position].dtype)}", stem="y"
                )
        w.know(self.norm.tail.result, place, y)
        for o in self.norm.tail.outputs:
            w.store(o.access, place, w.value(o.value, place))
