"""Attention by tiles of queries with a running maximum and sum, so that no score is ever written to memory.

Few queries are served by a split of the keys: each part leaves its maximum, its sum and its mean of values in scratch
memory, and a second kernel puts them together. Query heads that share keys are then rows of one tile.

Milakov & Gimelshein, "Online normalizer calculation for softmax" (2018); Dao et al., "FlashAttention" (2022).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import sympy
import torch

from ...passes.program import Program
from ...targets.target import Target
from ..base import Region, Schedule
from ..plans.attention import OPERATOR, Attention, Heads, memory_order, plan
from ..plans.rules import name_of
from .code import Code, Launch, Sizes, function, long, module, parts, power_of_two
from .writer import Writer

# queries, keys of a tile, warps, stages; the likelier first
TILES = ((128, 64, 4, 3), (128, 128, 8, 2), (64, 64, 4, 3), (128, 64, 8, 3), (64, 128, 4, 2), (64, 32, 4, 4))
FULL = ((32, 32, 4, 2), (64, 32, 8, 2), (64, 64, 8, 2))  # float32
DECODE = ((64, 4, 2), (128, 4, 2), (32, 2, 3))  # keys, warps, stages
FEW_QUERIES = 16
LOG2E = 1 / math.log(2)


class AttentionFamily:
    """Regions of one scaled dot product attention."""

    name = "attention"

    def claims(self, region: Region) -> bool:
        """Whether an attention operator is in the region."""
        return any(name_of(n) == OPERATOR for n in region.nodes)

    def plan(self, region: Region, program: Program | None, target: Target) -> AttentionLowering:
        """The attention. Raises Unsupported."""
        return AttentionLowering(plan(region, program, indexed=True))


@dataclass
class AttentionLowering:
    """A planned attention."""

    attention: Attention

    def __post_init__(self) -> None:
        if self.attention.known_mask is not None:  # the lists of blocks
            self.attention.tensors[-2] = torch.empty(0, dtype=torch.int32)

    @property
    def tensors(self) -> list[torch.Tensor]:
        """Fake tensors of the parameters."""
        return self.attention.tensors

    @property
    def order(self) -> tuple[int, ...]:
        """Heads inside queries: what the product after it reads as it lies."""
        return memory_order(len(self.attention.lead) + 2)

    @property
    def flops(self) -> int:
        """Floating point operations of both products, 0 if sizes are symbolic."""
        return self.attention.flops

    def constants(self, schedule: Schedule, target: Target) -> tuple[torch.Tensor, ...]:
        """For a known mask, which blocks of keys each tile of queries sees."""
        if self.attention.known_mask is None:
            return ()
        return (block_lists(self.attention, int(schedule["queries"]), int(schedule["keys"])),)

    def space(self, target: Target) -> Iterable[Schedule]:
        """Tiles that fit; for few queries, splits of the keys."""
        p = self.attention
        queries = int(p.queries) if p.queries.is_Integer else 1024
        names = ("queries", "keys", "warps", "stages", "splits", "pack")
        dtype = p.tensors[p.position["query"]].dtype
        if queries <= FEW_QUERIES and p.known_mask is None and not p.causal:
            pack = p.group if p.heads["value"][-1][1] == p.group and queries * p.group <= 64 else 1
            rows = max(16, power_of_two(queries * pack))
            for keys, warps, stages in DECODE:
                for splits in self._splits(keys, pack, target):
                    yield Schedule("decode", tuple(zip(names, (rows, keys, warps, stages, splits, pack), strict=True)))
            return
        wide = max(p.features, p.value_features) > 128
        for rows, keys, warps, stages in FULL if dtype is torch.float32 else TILES:
            rows = max(16, min(rows, power_of_two(queries)))
            if wide and (rows > 64 or keys > 64):
                continue
            yield Schedule("attention", tuple(zip(names, (rows, keys, warps, stages, 1, 1), strict=True)))

    def _splits(self, keys: int, pack: int, target: Target) -> list[int]:
        p = self.attention
        if not all(e.is_Integer for e in (*p.lead, p.keys)):
            return [8]
        heads = math.prod(int(e) for e in p.lead) // pack
        most = max(1, int(p.keys) // (2 * keys))
        wanted = max(1, min(most, 2 * target.cores // heads, 64))
        return list(dict.fromkeys((wanted, max(1, wanted // 2))))

    def code(self, name: str, schedule: Schedule, target: Target) -> Code:
        """The kernel, or for a split of the keys the two kernels."""
        return _Template(self.attention, name, schedule).code()


def block_lists(plan: Attention, width: int, block: int) -> torch.Tensor:
    """For each tile of queries the blocks of keys that it sees, int32 [tiles, 2 + blocks].

    In each row: how many blocks need the mask, how many are seen whole, and the numbers of both kinds, in this order.
    """
    mask, queries, keys = plan.known_mask, int(plan.queries), int(plan.keys)
    assert mask is not None
    seen, whole = (mask, mask) if mask.dtype is torch.bool else (mask != -math.inf, mask == 0)
    tiles, blocks = -(-queries // width), -(-keys // block)

    def by_block(values: torch.Tensor, rows: bool) -> torch.Tensor:
        """[tiles, blocks, elements], filled up with `rows` below and with False on the right."""
        full = torch.full((tiles * width, blocks * block), rows, device=values.device)
        full[:queries, :keys] = values
        full[:, keys:] = False
        return full.view(tiles, width, blocks, block).transpose(1, 2).flatten(2)

    lead = seen.expand(*seen.shape[:-2], queries, keys).reshape(-1, queries, keys)
    some = by_block(lead.any(0), False).any(-1)
    lead = whole.expand(*whole.shape[:-2], queries, keys).reshape(-1, queries, keys)
    entire = by_block(lead.all(0), True).all(-1)
    order = torch.where(entire, 1, torch.where(some, 0, 2)).sort(dim=1, stable=True).indices
    counts = torch.stack(((some & ~entire).sum(1), entire.sum(1)), 1)
    return torch.cat((counts, order), 1).to(torch.int32)


@dataclass
class _Template:
    attention: Attention
    name: str
    schedule: Schedule
    sizes: Sizes = field(init=False)

    def __post_init__(self) -> None:
        self.sizes = Sizes(self.attention.tensors)

    def code(self) -> Code:
        p, s = self.attention, self.schedule
        splits, count = int(s["splits"]), len(p.tensors)
        split = splits > 1
        texts = [(self.name, self._main())]
        tensors = tuple(range(count + 2 * split))
        warps, stages = int(s["warps"]), int(s["stages"])
        launches = [Launch(self.name, tensors, self._grid, warps, stages)]
        scratch = []
        if split:
            area = (sympy.Integer(splits), self._heads, self._rows)
            last = sympy.Integer(p.value_features), sympy.Integer(2)
            scratch = [((*area, n), torch.float32) for n in last]
            texts.append((f"{self.name}_sum", self._join()))
            launches.append(Launch(f"{self.name}_sum", tensors, (self._rows, self._heads), 1))
        parameters = [*(f"t{k}" for k in tensors), *self.sizes.parameters]
        return self.sizes.code(module([function(n, parameters, lines) for n, lines in texts]), launches, scratch)

    @property
    def _heads(self) -> sympy.Expr:
        """Heads, of which packed ones count once."""
        return sympy.Mul(*self.attention.lead) / int(self.schedule["pack"])

    @property
    def _rows(self) -> sympy.Expr:
        """Rows of a head: its queries, times the heads that are packed."""
        return self.attention.queries * int(self.schedule["pack"])

    @property
    def _grid(self) -> tuple[sympy.Expr, sympy.Expr, sympy.Expr]:
        """Tiles of queries, heads, parts of the keys."""
        tiles = parts(self._rows, int(self.schedule["queries"]))
        return tiles, self._heads, sympy.Integer(int(self.schedule["splits"]))

    def _start(self, w: Writer, row: str) -> tuple[list[str], list[str], str]:
        """Indices of the first packed head, of a row's head, and of its query; a row is [R, 1] or a scalar."""
        p, pack = self.attention, int(self.schedule["pack"])
        *outer, last = w.digits("head", [*p.lead[:-1], p.lead[-1] / pack])
        if pack == 1:
            return [*outer, last], [*outer, last], row
        queries = self.sizes.text(p.queries)
        first = w.let(f"{last} * {pack}")
        own = w.let(f"{first} + {row} // {queries}")
        return [*outer, first], [*outer, own], w.let(f"{row} % {queries}")

    def _base(self, w: Writer, heads: Heads, digits: Sequence[str]) -> str:
        terms = []
        for digit, (stride, group) in zip(digits, heads, strict=True):
            if stride != 0:
                index = f"({digit} // {group})" if group > 1 else digit
                terms.append(f"{index} * {self.sizes.text(stride)}")
        return w.let(" + ".join(terms) or "0", stem="base")

    def _address(self, tensor: str, base: str, along: str, feature: str) -> str:
        outer, inner = (self.sizes.text(e) for e in self.attention.steps[tensor])
        if tensor in self.attention.looks:
            found = self.attention.looks[tensor].look
            base += f" + {tensor}_entry * {self.sizes.text(found.stride)}"
            along = "0" if found.page == 1 else f"({along} % {self.sizes.text(found.page)})"
        place = f"{long(along, self.attention.tensors)} * {outer} + {feature} * {inner}"
        return f"t{self.attention.position[tensor]} + {base} + {place}"

    def _entry(self, tensor: str, bases: dict[str, str], along: str, edge: bool) -> list[str]:
        """Look up where a block of keys or values lies, if an index says so."""
        p = self.attention
        if tensor not in p.looks:
            return []
        found = p.looks[tensor]
        page, step, count = (self.sizes.text(e) for e in (found.look.page, found.step, found.look.count))
        number = along if found.look.page == 1 else f"({along} // {page})"
        guard = f", mask={along} < {self.sizes.text(p.keys)}, other=0" if edge else ""
        entry, place = f"{tensor}_entry", f"{long(number, p.tensors)} * {step}"
        return [
            f"{entry} = tl.load(t{found.position} + {bases[f'{tensor}_entry']} + {place}{guard}).to(tl.int64)",
            *[f"{entry} = tl.where({entry} < 0, {entry} + {count}, {entry})"] * found.look.wraps,
            f"{tensor}_known = ({entry} >= 0) & ({entry} < {count})",
        ]

    def _main(self) -> list[str]:
        p, s, w = self.attention, self.schedule, Writer(self.sizes, self.attention.tensors, {})
        rows, splits = (int(s[k]) for k in ("queries", "splits"))
        wide, own = power_of_two(max(16, p.features)), power_of_two(max(16, p.value_features))
        tile, head, part = w.program(*self._grid)
        for line in (f"tile = {tile}", f"head = {w.long(head)}", f"part = {part}"):
            w.line(line)
        w.line(f"row = (tile * {rows} + tl.arange(0, {rows}))[:, None]")
        shared, digits, query = self._start(w, "row")  # keys and values do not depend on the row
        w.line(f"real = row < {self.sizes.text(self._rows)}")
        bases = {n: self._base(w, p.heads[n], shared if n in ("key", "value") else digits) for n in p.position}
        bases |= {f"{n}_entry": self._base(w, found.heads, shared) for n, found in p.looks.items()}
        w.line(f"down = tl.arange(0, {wide})[:, None]")
        w.line(f"feature = tl.arange(0, {wide})[None, :]")
        w.line(f"own = tl.arange(0, {own})[None, :]")
        mask = "real" if wide == p.features else f"real & (feature < {p.features})"
        w.line(f"q = tl.load({self._address('query', bases['query'], query, 'feature')}, mask={mask}, other=0)")
        w.line(f'peak = tl.full([{rows}, 1], float("-inf"), tl.float32)')
        w.line(f"total = tl.zeros([{rows}, 1], tl.float32)")
        w.line(f"sums = tl.zeros([{rows}, {own}], tl.float32)")
        self._loops(w, bases, query, wide, own)
        if splits > 1:
            self._leave(w, own)
        else:
            w.line("mean = sums / tl.where(total == 0.0, 1.0, total)")
            inside = "real" if own == p.value_features else f"real & (own < {p.value_features})"
            w.line(f"tl.store({self._address('output', bases['output'], query, 'own')}, mean, mask={inside})")
        return w.blocks[0].lines

    def _loops(self, w: Writer, bases: dict[str, str], query: str, wide: int, own: int) -> None:
        """Blocks of keys that need no look at the edge or the diagonal, then those that do."""
        p, s = self.attention, self.schedule
        rows, block, splits = (int(s[k]) for k in ("queries", "keys", "splits"))
        keys = self.sizes.text(p.keys)
        first, last = "0", keys
        if p.known_mask is not None:
            self._listed(w, bases, query, wide, own)
            return
        if splits > 1:
            share = f"tl.cdiv(tl.cdiv({keys}, {block}), {splits}) * {block}"
            first = w.let(f"part * ({share})")
            last = w.let(f"tl.minimum({first} + {share}, {keys})")
        elif p.causal:
            last = w.let(f"tl.minimum((tile + 1) * {rows}, {keys})")
        even = p.keys.is_Integer and int(p.keys) % block == 0
        if even and not p.causal:
            self._loop(w, bases, query, wide, own, (first, last), False)
            return
        full = f"tl.minimum(tile * {rows}, {keys})" if p.causal else last
        middle = w.let(f"tl.maximum({full} // {block} * {block}, {first})")
        self._loop(w, bases, query, wide, own, (first, middle), False)
        self._loop(w, bases, query, wide, own, (middle, last), True)

    def _listed(self, w: Writer, bases: dict[str, str], query: str, wide: int, own: int) -> None:
        """The blocks of keys that a known mask leaves to this tile."""
        p, block = self.attention, int(self.schedule["keys"])
        w.line(f"blocks = t{len(p.tensors) - 2} + tile * {2 + int(parts(p.keys, block))}")
        w.line("partial = tl.load(blocks)")
        w.line("whole = tl.load(blocks + 1)")
        for reach, masked in (("0, partial", True), ("partial, partial + whole", False)):
            w.line(f"for number in range({reach}):")
            w.line(f"    start = tl.load(blocks + 2 + number) * {block}")
            self._block(w, bases, query, wide, own, masked, masked)

    def _loop(self, w: Writer, bases: dict[str, str], query: str, wide: int, own: int, reach: tuple[str, str],
              edge: bool) -> None:  # fmt: skip
        w.line(f"for start in range({reach[0]}, {reach[1]}, {int(self.schedule['keys'])}):")
        self._block(w, bases, query, wide, own, edge, self.attention.masked)

    def _block(self, w: Writer, bases: dict[str, str], query: str, wide: int, own: int, edge: bool,
               masked: bool) -> None:  # fmt: skip
        for line in (*self._scores(bases, query, wide, edge, masked), *self._update(bases, own, edge)):
            w.line("    " + line)

    def _scores(self, bases: dict[str, str], query: str, wide: int, edge: bool, masked: bool) -> list[str]:
        p, block = self.attention, int(self.schedule["keys"])
        keys, rows = self.sizes.text(p.keys), int(self.schedule["queries"])
        conditions = [f"(key < {keys})"] * edge + [f"(down < {p.features})"] * (wide != p.features)
        conditions += ["key_known"] * ("key" in p.looks)
        guard = f", mask={' & '.join(conditions)}, other=0" if conditions else ""
        lines = [
            f"key = start + tl.arange(0, {block})[None, :]",
            *self._entry("key", bases, "key", edge),
            f"k = tl.load({self._address('key', bases['key'], 'key', 'down')}{guard})",
            f"scores = device.dot(q, k, tl.zeros([{rows}, {block}], tl.float32)) * {p.scale * LOG2E!r}",
        ]
        hide = 'float("-inf")'
        if "key" in p.looks:  # eager raises for an entry that is none; a kernel cannot, but must not return a number
            lines.append('scores = tl.where(key_known, scores, float("nan"))')
        if masked:
            per_query = p.mask_per_query
            guards = [f"(key < {keys})"] * edge + ["real"] * per_query
            guard = f", mask={' & '.join(guards)}, other=0" if guards else ""
            lines.append(
                f"m = tl.load({self._address('mask', bases['mask'], query if per_query else '0', 'key')}{guard})"
            )
            if p.tensors[p.position["mask"]].dtype is torch.bool:
                lines.append(f"scores = tl.where(m, scores, {hide})")
            else:
                lines.append(f"scores += m.to(tl.float32) * {LOG2E!r}")
        if edge:
            seen = f"(key < {keys})" + (f" & (key <= {query})" if p.causal else "")
            lines.append(f"scores = tl.where({seen}, scores, {hide})")
        return lines

    def _update(self, bases: dict[str, str], own: int, edge: bool) -> list[str]:
        p, block = self.attention, int(self.schedule["keys"])
        value = p.tensors[p.position["value"]].dtype
        conditions = [f"(place < {self.sizes.text(p.keys)})"] * edge
        conditions += [f"(own < {p.value_features})"] * (own != p.value_features)
        conditions += ["value_known"] * ("value" in p.looks)
        guard = f", mask={' & '.join(conditions)}, other=0" if conditions else ""
        kind = {torch.float32: "tl.float32", torch.float16: "tl.float16", torch.bfloat16: "tl.bfloat16"}[value]
        return [
            "high = tl.maximum(peak, tl.max(scores, 1, keep_dims=True))",
            'safe = tl.where(high == float("-inf"), 0.0, high)',  # a row that sees no key yet
            "weight = tl.exp2(scores - safe)",
            "shrink = tl.exp2(peak - safe)",
            "total = total * shrink + tl.sum(weight, 1, keep_dims=True)",
            f"place = start + tl.arange(0, {block})[:, None]",
            *self._entry("value", bases, "place", edge),
            f"v = tl.load({self._address('value', bases['value'], 'place', 'own')}{guard})",
            *['v = tl.where(value_known, v, float("nan"))'] * ("value" in p.looks),
            f"sums = device.dot(weight.to({kind}), v, sums * shrink)",
            "peak = high",
        ]

    def _area(self, part: str) -> str:
        """Number of a row in the scratch memory of a part."""
        return f"({part} * {self.sizes.text(self._heads)} + head) * {self.sizes.text(self._rows)} + row"

    def _leave(self, w: Writer, own: int) -> None:
        """Write the sums, the maximum and the total of one part."""
        p = self.attention
        k, features = len(p.tensors), p.value_features
        w.line(f"area = {self._area('part')}")
        w.line(f"tl.store(t{k} + area * {features} + own, sums, mask=real & (own < {features}))")
        w.line(f"tl.store(t{k + 1} + area * 2, peak, mask=real)")
        w.line(f"tl.store(t{k + 1} + area * 2 + 1, total, mask=real)")

    def _join(self) -> list[str]:
        """One row of the result from its parts."""
        p, s, w = self.attention, self.schedule, Writer(self.sizes, self.attention.tensors, {})
        splits, k, features = int(s["splits"]), len(p.tensors), p.value_features
        most, own = power_of_two(splits), power_of_two(features)
        row, head = w.program(self._rows, self._heads)
        w.line(f"row = {row}")
        w.line(f"head = {w.long(head)}")
        _, digits, query = self._start(w, "row")
        base = self._base(w, p.heads["output"], digits)
        w.line(f"own = tl.arange(0, {own})[None, :]")
        w.line(f"part = tl.arange(0, {most})[:, None]")
        w.line(f"area = {self._area('part')}")
        w.line(f"known = part < {splits}")
        w.line(f'peak = tl.load(t{k + 1} + area * 2, mask=known, other=float("-inf"))')
        w.line(f"total = tl.load(t{k + 1} + area * 2 + 1, mask=known, other=0)")
        w.line(f"sums = tl.load(t{k} + area * {features} + own, mask=known & (own < {features}), other=0)")
        w.line("high = tl.max(peak, 0, keep_dims=True)")
        w.line('shrink = tl.exp2(peak - tl.where(high == float("-inf"), 0.0, high))')
        w.line("whole = tl.sum(total * shrink, 0, keep_dims=True)")
        w.line("mean = tl.sum(sums * shrink, 0, keep_dims=True) / tl.where(whole == 0.0, 1.0, whole)")
        w.line(f"tl.store({self._address('output', base, query, 'own')}, mean, mask=own < {features})")
        return w.blocks[0].lines
