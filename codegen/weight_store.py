"""The weight store: weights beyond a budget of device bytes stay in host memory and are copied while a call runs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from ..passes.errors import InputError
from ..passes.nodes import may_share
from ..passes.program import Program
from .arena import CPU
from .select import Choice
from .source import Source
from .stream_plan import Unit, Visit, plan, verify

ALIGNMENT = 256  # bytes: what cuBLAS looks for in an address
ELEMENT = 16  # bytes of the largest element


@dataclass
class Memory:
    """Bytes that move as one: a tensor, or several that overlap (tied weights, views of one tensor).

    Attributes:
        name: of one of them.
        size: bytes, a multiple of the alignment.
        tensors: the tensors, and where each begins in these bytes; no place for one that has no plain strided memory.
    """

    name: str
    size: int
    tensors: list[tuple[torch.Tensor, int | None]] = field(default_factory=list)

    @property
    def plain(self) -> bool:
        """Whether the tensors are views of bytes that can be copied as such."""
        return all(place is not None for _, place in self.tensors)

    def copied(self, device: torch.device, pinned: bool = False) -> torch.Tensor:
        """A copy of the bytes."""
        flat = torch.empty(self.size, dtype=torch.uint8, device=device, pin_memory=pinned)
        for tensor, place in self.tensors:
            begin, size = tensor.storage_offset() * tensor.element_size(), _reach(tensor)
            given = torch.empty(0, dtype=torch.uint8, device=tensor.device)
            flat[place:][:size].copy_(given.set_(tensor.untyped_storage(), begin, (size,), (1,)))
        return flat

    def views(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """The tensors as views of a copy of the bytes."""
        memory, begin, made = flat.untyped_storage(), flat.storage_offset(), []
        for tensor, place in self.tensors:
            assert place is not None
            empty = torch.empty(0, dtype=tensor.dtype, device=flat.device)
            offset = (begin + place) // tensor.element_size()
            made.append(empty.set_(memory, offset, tensor.shape, tensor.stride()))
        return made


def memories(named: Iterable[tuple[str, torch.Tensor]]) -> list[Memory]:
    """The tensors grouped by overlap in memory, in their order."""
    distinct = list({id(t): (name, t) for name, t in named}.values())
    place = {id(t): k for k, (_, t) in enumerate(distinct)}
    spans = sorted((_span(n, t) for n, t in distinct if _is_plain(t)), key=lambda s: s[:3])
    found: list[Memory] = []
    before, low, high = "", 0, 0
    for device, begin, end, name, tensor in spans:
        if device != before or begin >= high:
            before, low, high = device, begin // ELEMENT * ELEMENT, end
            found.append(Memory(name, 0))
        high = max(high, end)
        found[-1].size = -(-(high - low) // ALIGNMENT) * ALIGNMENT
        found[-1].tensors.append((tensor, begin - low))
    others = [(n, t) for n, t in distinct if not _is_plain(t)]
    found += [Memory(n, t.numel() * t.element_size(), [(t, None)]) for n, t in others]
    return sorted(found, key=lambda m: min(place[id(t)] for t, _ in m.tensors))


def _is_plain(tensor: torch.Tensor) -> bool:
    dense = type(tensor) in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer) and tensor.layout is torch.strided
    return dense and not (tensor.is_quantized or tensor.is_conj() or tensor.is_neg()) and tensor.numel() > 0


def _span(name: str, tensor: torch.Tensor) -> tuple[str, int, int, str, torch.Tensor]:
    begin = tensor.data_ptr()
    return str(tensor.device), begin, begin + _reach(tensor), name, tensor


def _reach(tensor: torch.Tensor) -> int:
    """Bytes from the first element to the end of the last one in memory."""
    elements = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return elements * tensor.element_size()


class WeightStore:
    """The weights of one executable, within a budget of device bytes.

    Generated code calls `begin` once its inputs are checked, `take(step)` before a step that begins to read streamed
    weights, and `release(step)` after a step whose end makes room for copies. Calls must not overlap: `alone` sees to
    it.

    Attributes:
        plan: what stays and what is streamed.
        weights: the program's weights as they are now: on the device, or in host memory.

    Args:
        program: its weights may be anywhere.
        choices: a kernel for every region, in order; packed weights of kernels count as weights.
        budget: bytes of device memory for weights; intermediate results come on top.
        device: where the program runs.

    Raises:
        InputError: the weights of one step exceed the budget.
    """

    def __init__(self, program: Program, choices: Sequence[Choice], budget: int, device: torch.device) -> None:
        named = {str(n.target): program.weights[str(n.target)] for n in program.graph.nodes if n.op == "get_attr"}
        tensors = [(k, v) for k, v in named.items() if isinstance(v, torch.Tensor)]
        tensors += [(f"a packed weight of {c.kernel.name}", t) for c in choices for t in c.kernel.constants]
        parts = memories(tensors)
        self._unit = {id(t): k for k, m in enumerate(parts) for t, _ in m.tensors}
        visits, exposed = needs(program, choices, self._unit)
        units = [Unit(m.name, m.size, k in exposed or not m.plain) for k, m in enumerate(parts)]
        self.plan = plan(units, visits, budget)
        verify(self.plan, units, visits, budget)
        with torch.inference_mode(False), torch.no_grad():
            self._place(parts, device)
        self.weights = {**program.weights, **{k: self._now[id(v)] for k, v in tensors if k in named}}
        self._lock = threading.Lock()
        self._names = {id(t): t for _, t in tensors}  # keeps the ids theirs

    def _place(self, parts: Sequence[Memory], device: torch.device) -> None:
        """Copy resident memory to the device and the rest to the host; make the ring and all views of it."""
        self._now: dict[int, torch.Tensor] = {}
        host: dict[int, torch.Tensor] = {}
        for k, part in enumerate(parts):
            given = [t for t, _ in part.tensors]
            if k in self.plan.streamed:
                host[k] = part.copied(CPU, pinned=device.type == "cuda")  # so that the copies run beside the rest
                moved = part.views(host[k])
            elif all(t.device == device for t in given):
                moved = given
            else:
                moved = part.views(part.copied(device)) if part.plain else [t.to(device) for t in given]
            self._now |= {id(t): m for t, m in zip(given, moved, strict=True)}
        self.ring = torch.empty(self.plan.ring, dtype=torch.uint8, device=device)
        self._ids: dict[int, list[int]] = {}
        self._taken: dict[int, list[torch.Tensor]] = {}
        self._pairs: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        self._starts: dict[int, list[int]] = {}
        for load in self.plan.loads:
            part, step = parts[load.visit.unit], load.visit.first
            flat = self.ring[load.offset :][: part.size]
            self._ids.setdefault(step, []).extend(id(t) for t, _ in part.tensors)
            self._taken.setdefault(step, []).extend(part.views(flat))
            self._pairs.setdefault(step, []).append((flat, host[load.visit.unit]))
            if step not in self._starts.setdefault(load.start, []):
                self._starts[load.start].append(step)
        self._copies = SideStream(device, self._pairs) if device.type == "cuda" else Copies()

    def streams(self, tensor: Any) -> bool:
        """Whether a weight, or a packed one, is read through `take`."""
        return self._unit.get(id(tensor)) in self.plan.streamed

    def resident(self, value: Any) -> Any:
        """What stands on the device for a weight that is not streamed; other values are themselves."""
        return self._now.get(id(value), value)

    def taken(self, step: int) -> list[int]:
        """The ids of the given tensors whose values on the device `take` returns, in this order."""
        return self._ids.get(step, [])

    def frees(self, step: int) -> bool:
        """Whether copies wait for the end of a step."""
        return step + 1 in self._starts

    def begin(self) -> None:
        """Queue the copies that wait for nothing."""
        self._copies.begin()
        self.release(-1)

    def take(self, step: int) -> list[torch.Tensor]:
        """The weights that a step begins to read, on the device; work queued from now on finds them there."""
        self._copies.wait(step)
        return self._taken[step]

    def release(self, step: int) -> None:
        """Queue the copies to where a step, whose work is queued, was the last to read."""
        for later in self._starts.get(step + 1, ()):
            self._copies.queue(later, self._pairs[later])

    def alone(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """A function that calls `run`, one call at a time, whichever thread calls: they share the ring."""

        def call(*flat: Any) -> Any:
            with self._lock:
                try:
                    return run(*flat)
                finally:
                    self._copies.end()

        return call


class WeightNames:
    """How the text of a program names its weights: bound once if they are there, local if they are streamed."""

    def __init__(self, source: Source, program: Program, store: WeightStore | None) -> None:
        self._source, self._store = source, store
        self._local: dict[int, str] = {}
        self._nodes: dict[int, list[fx.Node]] = {}
        for node in program.graph.nodes:
            if node.op == "get_attr":
                self._nodes.setdefault(id(program.weights[str(node.target)]), []).append(node)

    def bind(self, value: Any) -> str:
        """The name of a weight or packed weight; the last one that `before` gave if it is streamed."""
        if id(value) in self._local:
            return self._local[id(value)]
        return self._source.bind(value if self._store is None else self._store.resident(value), "w")

    def begin(self, program: Program, names: dict[fx.Node, str]) -> None:
        """Name the weights that are there; the line that queues the first copies."""
        for node in program.graph.nodes:
            if node.op == "get_attr":
                value = program.weights[str(node.target)]
                if self._store is None or not self._store.streams(value):
                    names[node] = self.bind(value)
        if self._store is not None and self._store.plan.loads:
            self._source.lines.append(f"{self._source.bind(self._store.begin, 'begin')}()")

    def before(self, step: int, names: dict[fx.Node, str]) -> None:
        """The line that takes what a step begins to read."""
        if self._store is not None and (taken := self._store.taken(step)):
            self._local |= {key: f"s{step}_{k}" for k, key in enumerate(taken)}
            names.update({n: self._local[key] for key in taken for n in self._nodes.get(key, ())})
            made = ", ".join(self._local[key] for key in taken)
            self._source.lines.append(f"{made}, = {self._source.bind(self._store.take, 'take')}({step})")

    def after(self, step: int) -> None:
        """The line that says that a step has read."""
        if self._store is not None and self._store.frees(step):
            self._source.lines.append(f"{self._source.bind(self._store.release, 'release')}({step})")


class Copies:
    """Copies within one memory, done at once: what `SideStream` is where there is no GPU."""

    def begin(self) -> None:
        """A call begins."""

    def queue(self, step: int, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Copy what a step reads, each pair from the second to the first, after all work that was queued so far."""
        for there, here in pairs:
            there.copy_(here)

    def wait(self, step: int) -> None:
        """Work queued from now on begins when the copies for this step are done."""

    def end(self) -> None:
        """A call has queued all its work, or failed."""


class SideStream(Copies):
    """Copies that run beside the computation; events order copy, use, and the copy that reuses the space.

    Args:
        device: a GPU.
        steps: that `queue` will be called with.
    """

    def __init__(self, device: torch.device, steps: Iterable[int]) -> None:
        self._device, self._side = device, torch.cuda.Stream(device)
        self._copied = {step: torch.cuda.Event() for step in steps}
        self._done = torch.cuda.Event()

    def begin(self) -> None:
        """The ring is free when the call before has ended, on whichever stream that was."""
        if torch.cuda.is_current_stream_capturing():
            raise InputError("weights are copied from host memory while it runs, which a CUDA graph does not hold here",
                             next_step="capture without it, or optimize with a larger device_memory")  # fmt: skip
        self._side.wait_event(self._done)

    def queue(self, step: int, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """On the side stream, once the current stream has come to here."""
        self._side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._side):
            for there, here in pairs:
                there.copy_(here, non_blocking=True)
            self._copied[step].record(self._side)

    def wait(self, step: int) -> None:
        """The current stream waits, the host does not."""
        torch.cuda.current_stream(self._device).wait_event(self._copied[step])

    def end(self) -> None:
        """The current stream ends after the side stream, also where a call failed half way."""
        current = torch.cuda.current_stream(self._device)
        if not torch.cuda.is_current_stream_capturing():
            current.wait_stream(self._side)
            self._done.record(current)


def needs(program: Program, choices: Sequence[Choice], unit: dict[int, int]) -> tuple[list[Visit], set[int]]:
    """When each unit of memory is read, and the units that must stay: carried state and what outputs may share.

    Args:
        unit: numbers by the ids of tensors.
    """
    shares: dict[fx.Node, frozenset[int]] = {}
    for node in program.graph.nodes:
        if node.op == "get_attr" and id(program.weights[str(node.target)]) in unit:
            shares[node] = frozenset([unit[id(program.weights[str(node.target)])]])
    made: dict[fx.Node, int] = {}  # step that made a view of a weight: the weight lies still while the view is needed
    spans: dict[int, list[tuple[int, int]]] = {}
    for step, choice in enumerate(choices):
        for node in choice.region.inputs:
            for k in shares.get(node, ()):
                spans.setdefault(k, []).append((made.get(node, step), step))
        for constant in choice.kernel.constants:
            spans.setdefault(unit[id(constant)], []).append((step, step))
        for node in choice.region.nodes if choice.kernel.backend == "eager" else ():
            if may_share(node):
                shares[node] = frozenset(k for n in node.all_input_nodes for k in shares.get(n, ()))
                made[node] = step
    carried = [program.weights[s.slot] for s in program.state if isinstance(s.slot, str)]
    exposed = {unit[id(t)] for t in carried if id(t) in unit}
    exposed |= {k for n in program.outputs if isinstance(n, fx.Node) for k in shares.get(n, ())}
    return [Visit(k, *span) for k, found in spans.items() for span in _joined(found)], exposed


def _joined(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Spans of steps, those that overlap or follow each other as one."""
    found: list[tuple[int, int]] = []
    for first, last in sorted(spans):
        if found and first <= found[-1][1] + 1:
            first, last = found[-1][0], max(last, found.pop()[1])
        found.append((first, last))
    return found
