"""The attention family: tiles that fit the registers, and a block of keys whose scores fit the cache."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch

from ...passes.program import Program
from ...targets.target import Target
from ..base import Region, Schedule
from ..plans.attention import OPERATOR, Attention, memory_order, plan, visible_blocks
from ..plans.rules import name_of
from . import attention_decode
from .attention import Form, function
from .row_family import lanes_of

HEIGHTS = {4: 6, 3: 8, 2: 12, 1: 16}  # rows of a tile by its vectors: 24 accumulators of 32 vector registers
SMALL_HEIGHTS = {2: 6, 3: 4, 1: 12}  # 12 accumulators of 16 vector registers
BLOCK = 512  # keys whose scores are kept at once
SPARSE = (128, 64)  # the same where a mask hides whole blocks
RUN, MOST = 256, 2048  # keys of a task in decoding: where sizes are symbolic, and at most
SERIAL_BELOW = 200_000  # floating point operations that are not worth a launch on several threads


class AttentionFamily:
    """Regions of one scaled dot product attention."""

    name = "attention"

    def claims(self, region: Region) -> bool:
        """Whether an attention operator is in the region."""
        return any(name_of(n) == OPERATOR for n in region.nodes)

    def plan(self, region: Region, program: Program | None, target: Target) -> AttentionLowering:
        """The attention. Raises Unsupported."""
        return AttentionLowering(plan(region, program))


@dataclass
class AttentionLowering:
    """A planned attention."""

    attention: Attention

    @property
    def tensors(self) -> list[torch.Tensor]:
        """Fake tensors of the parameters."""
        return self.attention.tensors

    @property
    def order(self) -> tuple[int, ...]:
        """Heads inside queries."""
        return memory_order(len(self.attention.lead) + 2)

    @property
    def flops(self) -> int:
        """Floating point operations of both products, 0 if sizes are symbolic."""
        return self.attention.flops

    def space(self, target: Target) -> Iterable[Schedule]:
        """For few queries, runs of keys; then query tiles of several widths, score tiles to match."""
        lanes, queries, keys = lanes_of(target), self.attention.queries, self.attention.keys
        if attention_decode.reason_against(self.attention, lanes) is None:
            yield from (Schedule("decode", (("run", run),)) for run in self._runs(target))
        registers = 28 if target.vector_bits >= 512 else 12
        most = -(-int(queries) // lanes) if queries.is_Integer else 4
        longest = min(int(keys), BLOCK) if keys.is_Integer else BLOCK
        for vectors in dict.fromkeys(min(v, most) for v in ((4, 3, 2) if registers > 12 else (2, 3))):
            height = HEIGHTS[vectors] if registers > 12 else SMALL_HEIGHTS[vectors]
            names = ("vectors", "rows", "block")
            for block in dict.fromkeys((longest, *self._sparse_blocks(vectors * lanes))):
                yield Schedule("attention", tuple(zip(names, (vectors, height, block), strict=True)))

    def _sparse_blocks(self, width: int) -> list[int]:
        """Blocks of keys of which a known mask hides enough to pay for going through them one by one."""
        if self.attention.known_mask is None:
            return []
        shares = {block: visible_blocks(self.attention, width, block).float().mean().item() for block in SPARSE}
        return [block for block, share in shares.items() if block < self.attention.keys and share < 0.9]

    def _runs(self, target: Target) -> Iterable[int]:
        """Keys of a task: all of a head, or as few as give each core several tasks."""
        p = self.attention
        if not all(e.is_Integer for e in (*p.lead, p.keys)):
            yield RUN
            return
        keys, heads = int(p.keys), math.prod(int(e) for e in p.lead) // p.group
        share = -(-keys // max(1, -(-4 * target.cores // heads)))
        runs = min(keys, MOST), min(keys, max(64, share))
        yield from dict.fromkeys(-(-run // 16) * 16 for run in runs)  # whole vectors of any width

    def function(self, name: str, schedule: Schedule, target: Target) -> Any:
        """The PrimFunc."""
        p = self.attention
        if p.known_mask is not None:
            tensors = list(p.tensors)
            (tensors[-2],) = self.constants(schedule, target)
            p = replace(p, tensors=tensors)
        if schedule.name == "decode":
            threaded = target.cores > 1 and (p.flops == 0 or p.flops >= SERIAL_BELOW // 4)
            form = attention_decode.DecodeForm(lanes_of(target), int(schedule["run"]), threaded)
            return attention_decode.function(p, name, form)
        vectors, height, block = (int(schedule[k]) for k in ("vectors", "rows", "block"))
        features = -(-p.value_features // -(-p.value_features // height))  # tiles of equal height
        threaded = target.cores > 1 and (p.flops == 0 or p.flops >= SERIAL_BELOW)
        return function(p, name, Form(lanes_of(target), vectors, height, features, block, threaded))

    def constants(self, schedule: Schedule, target: Target) -> tuple[torch.Tensor, ...]:
        """For a known mask, which blocks of keys each tile of queries sees."""
        if self.attention.known_mask is None:
            return ()
        return (visible_blocks(self.attention, *_tiling(schedule, lanes_of(target))),)


def _tiling(schedule: Schedule, lanes: int) -> tuple[int, int]:
    """Queries of a tile and keys of a block."""
    return (lanes, BLOCK) if schedule.name == "decode" else (int(schedule["vectors"]) * lanes, int(schedule["block"]))
