"""The arena: one block of memory for all intermediate results that our kernels write, planned at compile time.

A fresh allocation of a large result costs page faults, often more than computing it. Here every result of static size
gets an offset in one block, so that results alive at the same time never overlap, save that a kernel may write a sum
where a residual lies that nothing reads after it; results that the caller may keep are allocated anew in each call.
Offsets are given largest first at the lowest place that is free for a result's lifetime (greedy by size: Pisarchyk and
Lee, "Efficient Memory Management for Deep Neural Net Inference", 2020). `verify` checks a plan by replaying it, and
shares no code with `plan`.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from ..passes.nodes import may_share
from ..passes.program import Program
from ..targets.cost import is_free
from .base import Destination
from .pages import on_large_pages
from .select import Choice
from .source import READS_LAYOUT, fast_callable

CPU = torch.device("cpu")
ALIGNMENT = 64  # bytes: a cache line and a vector register


@dataclass
class Slot:
    """A result in the arena.

    Attributes:
        node: whose value it is.
        destination: shape, dtype and memory order.
        size: bytes, rounded up to the alignment.
        first: step that writes it.
        last: last step that reads it or a view of it.
        offset: where it begins in the arena, in bytes.
        over: the result in whose place it is written.
    """

    node: fx.Node
    destination: Destination
    size: int
    first: int
    last: int
    offset: int = 0
    over: Slot | None = None


def plan(program: Program, choices: Sequence[Choice]) -> list[Slot]:
    """The results that may lie in the arena, with offsets."""
    origins = _origins(choices)
    kept = {o for n in program.outputs if isinstance(n, fx.Node) for o in origins.get(n, ())}
    last: dict[fx.Node, int] = {}
    for step, choice in enumerate(choices):
        for node in (*choice.region.inputs, *choice.region.nodes):
            for origin in origins.get(node, ()):
                last[origin] = step
    slots = []
    for step, choice in enumerate(choices):
        for node, d in zip(choice.region.outputs, choice.kernel.destinations or (), strict=False):
            if node not in kept and all(isinstance(e, int) for e in d.shape):
                slots.append(Slot(node, d, _rounded(d.bytes), step, last.get(node, step)))
    _put_over(slots, choices, origins)
    ends = {s.over.node: s for s in slots if s.over is not None}
    placed: list[Slot] = []
    for slot in sorted((s for s in slots if s.over is None), key=lambda s: (-s.size, s.first)):
        chain = [slot]
        while chain[-1].node in ends:
            chain.append(ends[chain[-1].node])
        whole = replace(slot, last=chain[-1].last)
        whole.offset = _lowest(whole, placed)
        placed.append(whole)
        for member in chain:
            member.offset = whole.offset
    return slots


def _put_over(slots: Sequence[Slot], choices: Sequence[Choice], origins: Mapping[fx.Node, frozenset[fx.Node]]) -> None:
    """Let results be written in the place of inputs that their kernels may replace and nothing reads after them.

    An input that is a view of the replaced one is read by other tasks of the same kernel: then nothing is replaced.
    """
    known = {s.node: s for s in slots}
    for step, choice in enumerate(choices):
        inputs, outputs = choice.region.inputs, choice.region.outputs
        for read, written in choice.kernel.replaces:
            before, after = known.get(inputs[read]), known.get(outputs[written])
            if before is None or after is None or before.last != step or before.size != after.size:
                continue
            if not any(before.node in origins.get(n, ()) for k, n in enumerate(inputs) if k != read):
                after.over = before


def _rounded(size: int) -> int:
    return max(ALIGNMENT, -(-size // ALIGNMENT) * ALIGNMENT)


def _lowest(slot: Slot, placed: Sequence[Slot]) -> int:
    """The lowest offset at which a slot overlaps no placed one that lives at the same time."""
    offset = 0
    for other in sorted(placed, key=lambda s: s.offset):
        if other.first <= slot.last and slot.first <= other.last and other.offset < offset + slot.size:
            offset = max(offset, other.offset + other.size)
    return offset


def _origins(choices: Sequence[Choice]) -> dict[fx.Node, frozenset[fx.Node]]:
    """For each value, the kernel results whose memory it may share."""
    found: dict[fx.Node, frozenset[fx.Node]] = {}
    for choice in choices:
        region = choice.region
        if choice.kernel.backend == "eager":
            for node in region.nodes:
                shared = may_share(node)
                found[node] = frozenset(o for n in node.all_input_nodes for o in found.get(n, ()) if shared)
            continue
        for node in region.outputs:
            own = choice.kernel.destinations is not None
            found[node] = frozenset([node]) if own else frozenset()
    return found


def verify(slots: Sequence[Slot], choices: Sequence[Choice]) -> int:
    """Replay the steps and check that no result is overwritten while it is needed; the size of the arena in bytes.

    A step may overwrite what it reads for the last time, if its kernel says that it can.

    Raises:
        AssertionError: two results overlap in memory and time, or a slot is too small or unaligned.
    """
    live: list[Slot] = []
    for step in range(len(choices)):
        live = [s for s in live if s.last >= step]
        for slot in (s for s in slots if s.first == step):
            values = slot.destination.dtype.itemsize
            for extent in slot.destination.shape:
                values *= extent if isinstance(extent, int) else 1 << 62
            assert slot.offset % ALIGNMENT == 0 and slot.offset >= 0 and values <= slot.size, (
                f"{slot.node} does not fit"
            )
            end = slot.offset + slot.size
            for other in live:
                apart = end <= other.offset or other.offset + other.size <= slot.offset
                assert apart or (other.last == step and _may_replace(choices[step], other, slot)), (
                    f"{slot.node} overwrites {other.node}"
                )
            live.append(slot)
    return max((s.offset + s.size for s in slots), default=0)


def _may_replace(choice: Choice, old: Slot, new: Slot) -> bool:
    pairs = [(choice.region.inputs[i], choice.region.outputs[o]) for i, o in choice.kernel.replaces]
    if (old.node, new.node) not in pairs or (old.offset, old.size) != (new.offset, new.size):
        return False
    stack = [n for n in choice.region.inputs if n is not old.node]
    while stack:  # back along views: is it read by another name as well?
        node = stack.pop()
        if node is old.node:
            return False
        stack += node.all_input_nodes if may_share(node) else []
    return True


class Arenas:
    """Blocks for calls that run at the same time: a call takes one and gives it back.

    Args:
        slots: results, with offsets.
        views: nodes whose values are views of results, and of views before them; they are made once per block.
        device: where the blocks are.
    """

    def __init__(self, slots: Sequence[Slot], views: Sequence[fx.Node] = (), device: torch.device = CPU) -> None:
        self.slots, self.views, self.device = list(slots), list(views), device
        self.size = max((s.offset + s.size for s in slots), default=0)
        self._free: list[tuple[torch.Tensor, ...]] = []
        self._lock = threading.Lock()

    def take(self) -> tuple[torch.Tensor, ...]:
        """The results of one call and the views, as tensors into one block, in the order of the slots and views."""
        with self._lock:
            if self._free:
                return self._free.pop()
        with torch.inference_mode(False):
            block = on_large_pages(torch.empty(self.size + ALIGNMENT, dtype=torch.uint8, device=self.device))
            start = -block.data_ptr() % ALIGNMENT
            made: list[Any] = [_view(block[start + s.offset :][: s.size], s.destination) for s in self.slots]
            values = dict(zip([s.node for s in self.slots], made, strict=True))
            for node in self.views:
                values[node] = evaluate_view(node, values)
                made.append(values[node])
        return tuple(made)

    def give(self, block: tuple[torch.Tensor, ...]) -> None:
        """Return what `take` gave."""
        self._free.append(block)  # atomic


def views_of(slots: Sequence[Slot], choices: Sequence[Choice], device: torch.device = CPU) -> list[fx.Node]:
    """Eager nodes whose values are views of results in the arena, the same in every call.

    An operator that may copy, such as ``reshape``, counts where it gave a view on tensors that lie as the results do.
    """
    results = Arenas(slots, device=device).take()
    values: dict[fx.Node, Any] = dict(zip([s.node for s in slots], results, strict=True))
    memory = {r.untyped_storage().data_ptr() for r in results}
    found = []
    for choice in choices:
        for node in choice.region.nodes if choice.kernel.backend == "eager" else ():
            known = all(n in values for n in node.all_input_nodes) and bool(node.all_input_nodes)
            if not known or not is_free(node) or str(node.target) in READS_LAYOUT:
                continue
            value = evaluate_view(node, values)
            tensors = value if isinstance(value, (list, tuple)) else [value]
            if all(isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() in memory for t in tensors):
                values[node] = value
                found.append(node)
    return found


def evaluate_view(node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
    """The value of a node on these values, computed as an executable does."""
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: values[n])
    return fast_callable(node.target)(*args, **kwargs)


def _view(memory: torch.Tensor, d: Destination) -> torch.Tensor:
    sizes = [e for e in d.stored() if isinstance(e, int)]
    flat = memory.view(d.dtype)[: math.prod(sizes)].view(sizes)
    return flat if d.order is None else flat.permute(d.seen())
