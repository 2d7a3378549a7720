"""The triton backend: regions of one kernel family each, lowered to generated kernels for NVIDIA and AMD GPUs."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import fx

from ...passes.errors import LowerError
from ...passes.program import Program
from ...targets.target import Target, fingerprint
from ..base import Kernel, Region, Schedule
from ..container import write_atomically
from ..plans.conv import pads
from ..plans.indexed import chain
from ..plans.regions import destinations
from ..plans.rules import name_of
from ..plans.values import Unsupported, devices
from .attention import AttentionFamily
from .code import Code
from .compile import Binary, compile_launch, interpreted, is_here, resources, runner
from .conv import ConvFamily
from .group_norm import GroupNormFamily
from .matmul import MatmulFamily
from .rows import RowFamily
from .stored import decode, encode
from .tokens import TokenFamily
from .windows import WindowFamily

LARGEST = 48  # operators of one kernel
Made = tuple[Code, list[Binary | None]]


@functools.cache
def _compilers() -> ThreadPoolExecutor:
    """Threads that compile: the compiler works outside of Python's lock."""
    return ThreadPoolExecutor(max(1, (os.cpu_count() or 2) - 1), "torchlathe-triton")


class Lowering(Protocol):
    """A region that a family has planned."""

    @property
    def flops(self) -> int:
        """Floating point operations of one call, 0 if sizes are symbolic."""
        ...

    @property
    def tensors(self) -> list[torch.Tensor]:
        """Fake tensors of the parameters: inputs, constants, outputs."""
        ...

    @property
    def order(self) -> tuple[int, ...] | None:
        """Dimensions of the outputs from the outermost to the innermost in memory, None if contiguous."""
        ...

    def space(self, target: Target) -> Iterable[Schedule]:
        """Schedules worth trying, the likelier first."""
        ...

    def constants(self, schedule: Schedule, target: Target) -> tuple[torch.Tensor, ...]:
        """Tensors computed at compile time."""
        ...

    def code(self, name: str, schedule: Schedule, target: Target) -> Code:
        """The kernels."""
        ...


class Family(Protocol):
    """One kind of kernel: what it can plan, and the word that its kernels are named by."""

    @property
    def name(self) -> str:
        """The word."""
        ...

    def claims(self, region: Region) -> bool:
        """Whether the region is of this kind, judged by its operators alone."""
        ...

    def plan(self, region: Region, program: Program | None, target: Target) -> Lowering:
        """Raises Unsupported with the reason."""
        ...


FAMILIES: tuple[Family, ...] = (
    TokenFamily(), AttentionFamily(), ConvFamily(), MatmulFamily(), WindowFamily(), GroupNormFamily(), RowFamily(),
)  # fmt: skip


@dataclass
class TritonBackend:
    """Lowers products, convolutions and reductions with what follows them, attention, and rows of operators.

    Args:
        program: where constant weights are found; without it every operand is taken at run time.
        families: kinds of kernels; the first that claims a region plans it.
    """

    program: Program | None = None
    name: str = "triton"
    families: tuple[Family, ...] = FAMILIES
    _compiled: dict[tuple[str, str], Future[Made]] = field(default_factory=dict, repr=False)

    def absorbs(self, node: fx.Node) -> bool:
        """A frame of zeros around an image; what looks up keys or values, and views of it."""
        return pads(node) or bool(chain(node))

    def supports(self, region: Region, target: Target) -> str | None:
        """None if the region can be lowered, else the reason why not."""
        if target.device != "cuda":
            return f"the triton backend lowers for GPUs, {target.name} is {target.device}"
        if not region.nodes or not region.outputs:
            return "an empty region"
        if len(region.nodes) > LARGEST:
            return f"more than {LARGEST} operators"
        if len(devices(region)) > 1:
            return "tensors on several devices"
        try:
            plan = self._plan(region, target)
            destinations(region, plan)
            if next(iter(plan.space(target)), None) is None:
                return "no schedule that is worth a kernel"
        except Unsupported as reason:
            return str(reason)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError, RuntimeError) as error:
            return f"a rule failed on it: {type(error).__name__}: {error}"  # costs the region, not the model
        return None

    def space(self, region: Region, target: Target) -> Iterable[Schedule]:
        """What the region's family offers."""
        return self._plan(region, target).space(target)

    def lower(self, region: Region, target: Target, schedule: Schedule) -> Kernel:
        """Compile the region. Raises LowerError."""
        name = self._named(region)
        try:
            plan = self._plan(region, target)
            code, binaries = self._begun(plan, name, region, target, schedule).result()
            buffers = destinations(region, plan)
            constants = plan.constants(schedule, target)
        except Unsupported as reason:
            raise LowerError(str(reason), node=region.nodes[0].name, by=self.name) from reason
        call = runner(code, binaries, target, len(region.outputs))
        return Kernel(
            name, self.name, _without_sizes(call, region), buffers, constants=constants,
            source=code.text, schedule=schedule,
            flops=plan.flops, outputs=len(region.outputs), bytes=sum(_bytes(t) for t in plan.tensors),
            asm=_asm(binaries), spills=max((b.spills for b in binaries if b), default=0),
            library=lambda path: write_atomically(Path(path), [encode(code, binaries)]),
        )  # fmt: skip

    def prepare(self, region: Region, target: Target, schedules: Iterable[Schedule]) -> None:
        """Begin to compile these candidates at once."""
        if not interpreted():
            plan, name = self._plan(region, target), self._named(region)
            for schedule in schedules:
                self._begun(plan, name, region, target, schedule)

    def _begun(self, plan: Lowering, name: str, region: Region, target: Target, schedule: Schedule) -> Future[Made]:
        key = region.key(self.program), f"{schedule} {fingerprint(target)}"
        if key not in self._compiled:
            self._compiled[key] = _compilers().submit(self._make, plan, name, schedule, target)
        return self._compiled[key]

    def _make(self, plan: Lowering, name: str, schedule: Schedule, target: Target) -> Made:
        code = plan.code(name, schedule, target)
        if interpreted():
            return code, [None] * len(code.launches)
        dtypes = [*(t.dtype for t in plan.tensors), *(dtype for _, dtype in code.scratch)]
        binaries = [compile_launch(code, n, dtypes, target) if n.function else None for n in code.launches]
        for binary in binaries:
            if binary is not None and binary.shared > target.caches[0]:
                raise LowerError(f"{binary.shared} bytes of shared memory, {target.name} has {target.caches[0]}",
                                 by=self.name)  # fmt: skip
        return code, [b if b is None or is_here(target) else resources(b) for b in binaries]

    def adopt(self, region: Region, schedule: Schedule, target: Target, library: Path, source: str) -> None:
        """Let `lower` take the code of this region and schedule from a file instead of compiling it."""
        self.adopt_bytes(region, schedule, target, library.read_bytes())

    def adopt_bytes(self, region: Region, schedule: Schedule, target: Target, data: bytes) -> None:
        """The same with code from an artefact. Raises what malformed data raise."""
        made: Future[Made] = Future()
        made.set_result(decode(data))
        self._compiled[region.key(self.program), f"{schedule} {fingerprint(target)}"] = made

    def _named(self, region: Region) -> str:
        return f"{self._family(region).name}_" + "_".join(dict.fromkeys(_short(n) for n in region.nodes))[:80]

    def _plan(self, region: Region, target: Target) -> Lowering:
        plan = self._family(region).plan(_of_tensors(region), self.program, target)
        if hasattr(plan, "made") and _of_tensors(region) is not region:  # numbers of inputs would differ
            raise Unsupported("sizes among the inputs of a region whose results have sizes of their own")
        return plan

    def _family(self, region: Region) -> Family:
        return next(f for f in self.families if f.claims(region))


def _of_tensors(region: Region) -> Region:
    """The region without inputs that are sizes, which kernels take from the shapes of tensors."""
    inputs = tuple(n for n in region.inputs if not _is_size(n))
    return region if inputs == region.inputs else replace(region, inputs=inputs)


def _without_sizes(call: Callable[..., None], region: Region) -> Callable[..., None]:
    """A call that takes sizes among the inputs as well, and leaves them out."""
    if _of_tensors(region) is region:
        return call
    sizes = {k for k, n in enumerate(region.inputs) if _is_size(n)}
    return lambda *values: call(*(v for k, v in enumerate(values) if k not in sizes))


def _is_size(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), (int, torch.SymInt))


def _asm(made: list[Binary | None]) -> dict[str, str]:
    """Generated code of all launches by its kind; machine code itself is left out."""
    binaries = [b for b in made if b is not None]
    kinds = dict.fromkeys(k for b in binaries for k in b.compiled.asm if k in ("ttir", "ptx", "amdgcn"))
    return {k: "\n".join(b.compiled.asm[k] for b in binaries) for k in kinds}


def _short(node: fx.Node) -> str:
    return (name_of(node) or "call").lstrip("_")


def _bytes(tensor: torch.Tensor) -> int:
    sizes = [s for s in tensor.shape if isinstance(s, int)]
    return tensor.element_size() * int(torch.Size(sizes).numel()) if len(sizes) == tensor.dim() else 0
