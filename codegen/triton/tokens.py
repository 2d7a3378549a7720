"""Merging of similar tokens and choice of the best.

A merge is four kernels: metrics of unit length, the most similar token of every token at an even place, the choice of
those that go, and the weighted means. Similarity is summed in float64 and rounded to float32, as the operator's
meaning says, so that duplicates tie whatever the order of the sum. The sum is written as products of columns and rows,
because Triton's matrix product in float64 is young: version 3.6 cannot compile it for gfx942. What one program chooses
from, the scores of one sample, is in its registers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import sympy
import torch

from ...passes.program import Program
from ...passes.token_ops import APART
from ...targets.target import Target
from ..base import Region, Schedule
from ..plans import tokens
from ..plans.layout import Access
from ..plans.tokens import Best, Merge
from ..plans.values import Unsupported
from .code import Code, Launch, Sizes, function, module, parts, power_of_two
from .writer import Place, Writer

TILES = ((32, 64, 4), (32, 32, 4), (64, 64, 8), (16, 64, 2))  # even tokens, odd tokens, warps; the likelier first
PANEL = (16, 128)  # tokens and features that are brought to unit length at once
RUN = 2048  # elements of the means that one program computes
MOST = 8192  # scores of one sample that a program holds
WIDEST = 2048  # features of a token that a program holds
SHORTEST = float(torch.finfo(torch.float32).tiny)  # length of a metric that counts as none


class TokenFamily:
    """Regions of one merge or choice of tokens; a merge with the nodes that take its results apart."""

    name = "tokens"

    def claims(self, region: Region) -> bool:
        """Whether one of the operators is in the region."""
        return tokens.claims(region)

    def plan(self, region: Region, program: Program | None, target: Target) -> BestLowering | MergeLowering:
        """Raises Unsupported with the reason."""
        found = tokens.plan(region)
        if found.made or not found.tokens.is_Integer:
            raise Unsupported("a number of tokens that is known at run time only")
        if (found.tokens if isinstance(found, Best) else found.even) > MOST:
            raise Unsupported("more tokens than one program can choose from")
        found = replace(found, protected=tuple(sorted({p % int(found.tokens) for p in found.protected})))
        if isinstance(found, Best):
            return BestLowering(found)
        if found.left == found.tokens:
            raise Unsupported("a merge that leaves all tokens as they are")
        return MergeLowering(found)


@dataclass
class _Lowering:
    """What choices and merges share."""

    plan: Best | Merge

    @property
    def tensors(self) -> list[torch.Tensor]:
        """Fake tensors of the parameters."""
        return self.plan.tensors

    @property
    def order(self) -> None:
        """Outputs are contiguous."""
        return None

    @property
    def flops(self) -> int:
        """Operations of one call, 0 if sizes are symbolic."""
        return self.plan.flops

    def constants(self, schedule: Schedule, target: Target) -> tuple[torch.Tensor, ...]:
        """None."""
        return ()


@dataclass
class BestLowering(_Lowering):
    """A planned choice."""

    plan: Best

    def space(self, target: Target) -> Iterable[Schedule]:
        """More threads or fewer."""
        wide = power_of_two(self.plan.tokens)
        for warps in dict.fromkeys((_warps(wide), _warps(2 * wide), _warps(wide // 2))):
            yield Schedule("best", (("warps", warps),))

    def code(self, name: str, schedule: Schedule, target: Target) -> Code:
        """The kernel: one program chooses for one sample."""
        p, sizes = self.plan, Sizes(self.plan.tensors)
        w = Writer(sizes, p.tensors, {})
        _start(w, p)
        w.line(f"token = tl.arange(0, {power_of_two(p.tokens)})")
        w.line(f"exists = token < {p.tokens}")
        w.line(_load("score", w, p.score, ("sample",), "token", "exists", 'float("-inf")') + ".to(tl.float32)")
        w.line('score = tl.where(score == score, score, float("-inf"))')
        if p.protected:
            w.line(f'score = tl.where({_among("token", p.protected)}, float("inf"), score)')
        w.line(f"chosen = device.largest(score, exists, {p.chosen})")
        w.line("place = tl.cumsum(chosen.to(tl.int32), 0) - 1")
        w.line(f"tl.store(t1 + sample * {p.chosen} + place, token, mask=chosen)")
        text = function(name, ["t0", "t1", *sizes.parameters], w.blocks[0].lines)
        return sizes.code(module([text]), [Launch(name, (0, 1), (p.batch,), int(schedule["warps"]))])


@dataclass
class MergeLowering(_Lowering):
    """A planned merge."""

    plan: Merge

    def space(self, target: Target) -> Iterable[Schedule]:
        """Tiles of several sizes."""
        seen = set()
        for rows, columns, warps in TILES:
            key = (min(rows, power_of_two(self.plan.even)), min(columns, power_of_two(self.plan.odd)), warps)
            if key not in seen:
                seen.add(key)
                yield Schedule("merge", tuple(zip(("rows", "columns", "warps"), key, strict=True)))

    def code(self, name: str, schedule: Schedule, target: Target) -> Code:
        """The four kernels; the last one only if somebody reads what it computes."""
        return _Template(self.plan, name, schedule).code()


@dataclass
class _Template:
    """Writes the kernels, which leave in scratch tensors: metrics of unit length, [even, features] and [features, odd];
    best and partner of each even token; the goal of those that go (-1: stays); and the places of the tokens that are
    left, if these are not a result."""

    merge: Merge
    name: str
    schedule: Schedule
    sizes: Sizes = field(init=False)
    scratch: list[tuple[tuple[sympy.Expr, ...], torch.dtype]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.sizes = Sizes(self.merge.tensors)

    def code(self) -> Code:
        m, batch, even = self.merge, self.merge.batch, sympy.Integer(self.merge.even)
        self.rows, self.columns = (self._tensor(torch.float64, n, m.compared) for n in (m.even, m.odd))
        self.best = self._tensor(torch.float32, m.even)
        self.partner, self.goal = (self._tensor(torch.int32, m.even) for _ in range(2))
        self.kept = self._tensor(torch.int64, m.left) if m.outputs[2] is None else f"t{m.outputs[2]}"
        tensors = tuple(range(len(m.tensors) + len(self.scratch)))
        rows, wide = int(self.schedule["rows"]), min(WIDEST, power_of_two(m.features))
        height = max(1, min(RUN // wide, power_of_two(m.left), 8 * MOST // power_of_two(m.even)))
        across = parts(sympy.Integer(m.features), wide) if m.outputs[0] is not None else sympy.Integer(1)
        found = [
            (self._measure(), Launch(f"{self.name}_measure", tensors, (parts(even, PANEL[0]), batch))),
            (self._match(rows), Launch(f"{self.name}_match", tensors, (parts(even, rows), batch),
                                       int(self.schedule["warps"]))),
            (self._choose(), Launch(f"{self.name}_choose", tensors, (batch,), _warps(power_of_two(m.even)))),
        ]  # fmt: skip
        if any(m.outputs[k] is not None for k in (0, 1, 3)):
            launch = Launch(f"{self.name}_average", tensors, (across, parts(sympy.Integer(m.left), height), batch))
            found.append((self._average(height, wide, across), launch))
        parameters = [*(f"t{k}" for k in tensors), *self.sizes.parameters]
        text = module([function(launch.function, parameters, lines) for lines, launch in found])
        return self.sizes.code(text, [launch for _, launch in found], self.scratch)

    def _tensor(self, dtype: torch.dtype, *sizes: int) -> str:
        """The name of one more scratch tensor, [batch, sizes]."""
        self.scratch.append(((self.merge.batch, *map(sympy.Integer, sizes)), dtype))
        return f"t{len(self.merge.tensors) + len(self.scratch) - 1}"

    def _writer(self, *grid: sympy.Expr | int) -> tuple[Writer, list[str]]:
        """A kernel of one sample, and the numbers of its program in a grid inside the sample."""
        w = Writer(self.sizes, self.merge.tensors, {})
        return w, _start(w, self.merge, *grid)

    def _measure(self) -> list[str]:
        """Metrics in float64, divided by their lengths; those of odd tokens as columns."""
        m, (height, wide) = self.merge, PANEL
        w, (tile,) = self._writer(-(-m.even // height))
        w.line(f"half = ({tile} * {height} + tl.arange(0, {height}))[:, None]")
        where = (f"{self.rows} + (sample * {m.even} + half) * {m.compared} + feature",
                 f"{self.columns} + (sample * {m.compared} + feature) * {m.odd} + half")  # fmt: skip
        for odd in (0, 1):
            load = [
                f"feature = start + tl.arange(0, {wide})[None, :]",
                f"known = (half < {m.odd if odd else m.even}) & (feature < {m.compared})",
                _load("x", w, m.metric, ("sample", f"(half * 2 + {odd})"), "feature", "known", "0"),
                "x = x.to(tl.float64)",
            ]
            w.line(f"total = tl.zeros([{height}, 1], tl.float64)")
            _loop(w, m.compared, wide, [*load, "total += tl.sum(x * x, 1, keep_dims=True)"])
            w.line(f"length = tl.maximum(tl.sqrt(total), {SHORTEST!r})")
            _loop(w, m.compared, wide, [*load, f"tl.store({where[odd]}, x / length, mask=known)"])
        return w.blocks[0].lines

    def _match(self, rows: int) -> list[str]:
        """Of some even tokens: the most similar odd one."""
        m, columns = self.merge, int(self.schedule["columns"])
        w, (tile,) = self._writer(-(-m.even // rows))
        w.line(f"row = ({tile} * {rows} + tl.arange(0, {rows}))[:, None]")
        w.line(f"exists = row < {m.even}")
        w.line(f"left = {self.rows} + (sample * {m.even} + tl.minimum(row, {m.even - 1})) * {m.compared}")
        if m.valid is not None:
            w.line(_load("real", w, m.valid, ("sample",), "row * 2", "exists", "0"))
        w.line(f'best = tl.full([{rows}, 1], float("-inf"), tl.float32)')
        w.line(f"partner = tl.zeros([{rows}, 1], tl.int32)")
        _loop(w, m.odd, columns, [
            *self._similarities(rows, columns),
            "high = tl.max(score, 1, keep_dims=True)",
            f"place = tl.min(tl.where(score == high, column, {m.odd}), 1, keep_dims=True)",
            "partner = tl.where(high > best, place, partner)",  # of equal ones the first
            "best = tl.maximum(high, best)",
        ])  # fmt: skip
        if alone := [p // 2 for p in m.protected if p % 2 == 0]:
            w.line(f'best = tl.where({_among("row", alone)}, float("-inf"), best)')
        w.line(f"tl.store({self.best} + sample * {m.even} + row, best, mask=exists)")
        w.line(f"tl.store({self.partner} + sample * {m.even} + row, partner, mask=exists)")
        return w.blocks[0].lines

    def _similarities(self, rows: int, columns: int) -> list[str]:
        """Lines for the scores of a tile, [rows, columns]; -inf where there is no token."""
        m, w = self.merge, Writer(self.sizes, self.merge.tensors, {})
        unroll = next(k for k in (4, 2, 1) if m.compared % k == 0)
        w.line(f"column = (start + tl.arange(0, {columns}))[None, :]")
        w.line(f"inside = column < {m.odd}")
        w.line(f"right = {self.columns} + sample * {m.compared * m.odd} + tl.minimum(column, {m.odd - 1})")
        w.line(f"sums = tl.zeros([{rows}, {columns}], tl.float64)")
        w.line(f"for feature in range(0, {m.compared}, {unroll}):")
        for k in range(unroll):
            w.line(f"    sums += tl.load(left + feature + {k}) * tl.load(right + (feature + {k}) * {m.odd})")
        w.line("score = sums.to(tl.float32)")
        w.line(f"score = tl.where(score == score, score, {APART})")
        if alone := [p // 2 for p in m.protected if p % 2]:
            w.line(f"score = tl.where({_among('column', alone)}, {APART}, score)")
        if m.valid is not None:
            w.line(_load("other", w, m.valid, ("sample",), "(column * 2 + 1)", "inside", "0"))
            w.line(f"score = tl.where(real == other, score, {APART})")
        w.line('score = tl.where(inside, score, float("-inf"))')
        return w.blocks[0].lines

    def _choose(self) -> list[str]:
        """Of one sample: which even tokens go, and where the others are afterwards."""
        m, (w, _) = self.merge, self._writer()
        w.line(f"half = tl.arange(0, {power_of_two(m.even)})")
        w.line(f"exists = half < {m.even}")
        w.line(f"at = sample * {m.even} + half")
        w.line(f'best = tl.load({self.best} + at, mask=exists, other=float("-inf"))')
        w.line(f"partner = tl.load({self.partner} + at, mask=exists, other=0)")
        w.line(f"goes = device.largest(best, exists, {m.tokens - m.left})")
        w.line(f"tl.store({self.goal} + at, tl.where(goes, partner, -1), mask=exists)")
        w.line("stays = exists & (goes == 0)")
        w.line("before = tl.cumsum(stays.to(tl.int32), 0)")  # even tokens that stay, up to the own place
        w.line("even, odd = half + before - 1, half + before")
        w.line(f"another = half < {m.odd}")
        w.line(f"tl.store({self.kept} + sample * {m.left} + even, half * 2, mask=stays)")
        w.line(f"tl.store({self.kept} + sample * {m.left} + odd, half * 2 + 1, mask=another)")
        if m.outputs[3] is not None:
            where = f"t{m.outputs[3]} + sample * {m.tokens} + half * 2"
            w.line(f"tl.store({where}, even, mask=stays)")
            w.line(f"tl.store({where} + 1, odd, mask=another)")
        return w.blocks[0].lines

    def _average(self, height: int, wide: int, across: sympy.Expr) -> list[str]:
        """Of some tokens that are left: sizes, and means of those that make them up, weighted by size."""
        m, most = self.merge, power_of_two(self.merge.even)
        w, (side, tile) = self._writer(across, -(-m.left // height))
        w.line(f"row = ({tile} * {height} + tl.arange(0, {height}))[:, None]")
        w.line(f"inside = row < {m.left}")
        w.line(f"token = tl.load({self.kept} + sample * {m.left} + row, mask=inside, other=0).to(tl.int32)")
        w.line(f"half = tl.arange(0, {most})[None, :]")
        w.line(f"goal = tl.load({self.goal} + sample * {m.even} + half, mask=half < {m.even}, other=-1)")
        w.line("joins = inside & (token % 2 == 1) & (goal == token // 2)")
        first = f"tl.min(tl.where(joins, half, {most}), 1, keep_dims=True)"
        following = f"tl.min(tl.where(joins & (half > member), half, {most}), 1, keep_dims=True)"
        w.line(_load("own", w, m.size, ("sample",), "token", "inside", "1"))
        w.line("total = own")
        size = _load("size", w, m.size, ("sample",), "(member * 2)", f"member < {most}", "0")
        each = ["total += size"]
        if m.outputs[3] is not None:
            where = f"t{m.outputs[3]} + sample * {m.tokens} + member * 2"
            each.append(f"tl.store({where}, row, mask=member < {most})")
        _members(w, first, following, most, [size, *each])
        if m.outputs[1] is not None:
            w.line(f"tl.store(t{m.outputs[1]} + sample * {m.left} + row, total, mask=inside)")
        if m.outputs[0] is not None:
            w.line(f"feature = {side} * {wide} + tl.arange(0, {wide})[None, :]")
            known = f" & (feature < {m.features})" if m.features % wide else ""
            w.line(_load("x", w, m.input, ("sample", "token"), "feature", f"inside{known}", "0"))
            w.line("sums = x.to(tl.float32) * (own / total)")
            x = _load("x", w, m.input, ("sample", "(member * 2)"), "feature", f"(member < {most}){known}", "0")
            _members(w, first, following, most, [size, x, "sums += x.to(tl.float32) * (size / total)"])
            out = f"t{m.outputs[0]} + (sample * {m.left} + row) * {m.features} + feature"
            w.line(f"tl.store({out}, sums, mask=inside{known})")
        return w.blocks[0].lines


def _members(w: Writer, first: str, following: str, most: int, each: Sequence[str]) -> None:
    """Lines for every token that becomes part of another one, in order; `most` stands for none."""
    w.line(f"member = {first}")
    w.line(f"while tl.min(member) < {most}:")
    for line in (*each, f"member = {following}"):
        w.line(f"    {line}")


def _loop(w: Writer, end: int, step: int, each: Sequence[str]) -> None:
    w.line(f"for start in range(0, {end}, {step}):")
    for line in each:
        w.line(f"    {line}")


def _start(w: Writer, plan: Best | Merge, *grid: sympy.Expr | int) -> list[str]:
    """Say which sample this is; the numbers of the program in a grid inside the sample."""
    *inside, sample = w.program(*grid, plan.batch)
    w.line(f"sample = {w.long(sample)}")
    return inside


def _load(name: str, w: Writer, access: Access, digits: tuple[str, ...], column: str, mask: str, other: str) -> str:
    where = w.offset(access, Place(digits, column))[0]
    return f"{name} = tl.load(t{access.buffer} + {where}, mask={mask}, other={other})"


def _among(name: str, places: Sequence[int]) -> str:
    return " | ".join(f"({name} == {p})" for p in places)


def _warps(wide: int) -> int:
    """Groups of threads that hold a vector of so many elements."""
    return max(1, min(16, wide // 256))
