"""The tvm backend: regions of one kernel family each, lowered to one vectorised and threaded function."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import fx

from ...passes.errors import LowerError
from ...passes.program import Program
from ...targets.target import Target, fingerprint
from ..base import Kernel, Region, Schedule
from ..plans.conv import pads
from ..plans.regions import destinations
from ..plans.values import Unsupported, devices
from . import build
from .attention_family import AttentionFamily
from .matmul_family import ConvFamily, MatmulFamily
from .row_family import RowFamily
from .token_family import TokenFamily
from .window_family import GroupNormFamily, WindowFamily

LARGEST = 48  # operators of one kernel: planning and compiling take more than linear time


class Lowering(Protocol):
    """A region that a family has planned.

    One whose results have sizes that follow from no size of an input alone has, besides, `made`: these as extents.
    """

    @property
    def flops(self) -> int:
        """Floating point operations of one call, 0 if sizes are symbolic."""
        ...

    @property
    def tensors(self) -> list[torch.Tensor]:
        """Fake tensors of the parameters."""
        ...

    @property
    def order(self) -> tuple[int, ...] | None:
        """Dimensions of the outputs from the outermost to the innermost in memory, None if contiguous."""
        ...

    def space(self, target: Target) -> Iterable[Schedule]:
        """Schedules worth trying, the likelier first."""
        ...

    def function(self, name: str, schedule: Schedule, target: Target) -> Any:
        """The PrimFunc; its parameters are inputs, constants, outputs."""
        ...

    def constants(self, schedule: Schedule, target: Target) -> tuple[torch.Tensor, ...]:
        """Tensors computed at compile time."""
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
    AttentionFamily(), ConvFamily(), MatmulFamily(), WindowFamily(), GroupNormFamily(), TokenFamily(),
    RowFamily(),
)  # fmt: skip


@dataclass
class TvmBackend:
    """Lowers matrix products with their pointwise tail, and rows of pointwise operators and reductions.

    Args:
        program: where constant weights are found; without it every operand is taken at run time.
        families: kinds of kernels; the first that claims a region plans it.
    """

    program: Program | None = None
    name: str = "tvm"
    families: tuple[Family, ...] = FAMILIES
    _compiled: dict[tuple[str, str], tuple[Any, Callable[..., None], str]] = field(default_factory=dict, repr=False)

    def absorbs(self, node: fx.Node) -> bool:
        """A frame of zeros around an image."""
        return pads(node)

    def supports(self, region: Region, target: Target) -> str | None:
        """None if the region can be lowered, else the reason why not."""
        if target.device != "cpu":
            return f"the tvm backend lowers for CPUs, {target.name} is {target.device}"
        if not region.nodes or not region.outputs:
            return "an empty region"
        if devices(region) - {"cpu"}:
            return "tensors that are not on the CPU"
        if len(region.nodes) > LARGEST:
            return f"more than {LARGEST} operators"
        try:
            destinations(region, self._plan(region, target))
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
        try:
            plan = self._plan(region, target)
            name = self._named(region)
            key = self._key(region, schedule, target)
            if key not in self._compiled:
                func = plan.function(name, schedule, target)
                module = build.compile_function(func, build.host(target))
                self._compiled[key] = module, build.entry(module, name), func.script()
            buffers = destinations(region, plan)
            constants = plan.constants(schedule, target)
        except Unsupported as reason:
            raise LowerError(str(reason), node=region.nodes[0].name, by=self.name) from reason
        module, entry, source = self._compiled[key]
        return Kernel(
            name, self.name, entry, buffers, constants=constants, source=source,
            library=module.export_library, schedule=schedule, flops=plan.flops, outputs=len(region.outputs),
            bytes=sum(_bytes(t) for t in plan.tensors), replaces=getattr(plan, "replaces", ()),
        )  # fmt: skip

    def _key(self, region: Region, schedule: Schedule, target: Target) -> tuple[str, str]:
        return region.key(self.program), f"{schedule} {fingerprint(target)}"

    def adopt(self, region: Region, schedule: Schedule, target: Target, library: Path, source: str) -> None:
        """Let `lower` take the code of this region and schedule from a library instead of compiling it."""
        module = build.load_module(str(library))
        name = self._named(region)
        code = build.Stored(module, library), build.entry(module, name), source
        self._compiled[self._key(region, schedule, target)] = code

    def constants(self, region: Region, target: Target, schedule: Schedule) -> tuple[torch.Tensor, ...]:
        """The tensors that a kernel of this region and schedule takes after its inputs."""
        return self._plan(region, target).constants(schedule, target)

    def _named(self, region: Region) -> str:
        return f"{self._family(region).name}_" + "_".join(dict.fromkeys(_short(n) for n in region.nodes))[:80]

    def _plan(self, region: Region, target: Target) -> Lowering:
        return self._family(region).plan(region, self.program, target)

    def _family(self, region: Region) -> Family:
        found = next((f for f in self.families if f.claims(region)), None)
        if found is None:
            raise Unsupported("no family of kernels claims it")
        return found


def _short(node: fx.Node) -> str:
    return str(node.target).split(".")[1] if "." in str(node.target) else getattr(node.target, "__name__", "")


def _bytes(tensor: torch.Tensor) -> int:
    static = all(isinstance(s, int) for s in tensor.shape)
    return math.prod(tensor.shape) * tensor.element_size() if static else 0
