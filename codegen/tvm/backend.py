"""The tvm backend: fused pointwise and row-reduction regions on the CPU, one vectorised and threaded kernel each."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import fx

from ...passes.errors import LowerError
from ...targets.target import Target
from ..base import Destination, Extent, Kernel, Region, Schedule
from . import build, rows
from .layout import expression
from .plan import Plan, elements, make
from .rules import name_of
from .values import Unsupported

# A launch on the shared pool costs about 1 us when its threads are awake and several when they sleep; below this many
# vector instructions (about 5 us on one core) one thread is faster.
SERIAL_BELOW = 16_000

LARGEST = 48  # operators of one kernel: planning and compiling take more than linear time

MOVES = frozenset(("unsqueeze", "squeeze", "permute", "transpose", "slice", "expand"))  # eager only changes strides


class TvmBackend:
    """Lowers rows of pointwise operators, last-dimension reductions and layout views that keep the rows."""

    name = "tvm"

    def supports(self, region: Region, target: Target) -> str | None:
        """None if the region can be lowered, else the reason why not."""
        if target.device != "cpu":
            return f"the tvm backend lowers for CPUs, {target.name} is {target.device}"
        if not region.nodes or not region.outputs:
            return "an empty region"
        if len(region.nodes) > LARGEST:
            return f"more than {LARGEST} operators"
        try:
            make(region)
        except Unsupported as reason:
            return str(reason)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError, RuntimeError) as error:
            return f"a rule failed on it: {type(error).__name__}: {error}"  # costs the region, not the model
        return None

    def space(self, region: Region, target: Target) -> Iterable[Schedule]:
        """Threaded or not (the likelier first), with two widths of unrolling; nothing for what eager does for free."""
        if all(name_of(n) in MOVES for n in region.nodes):
            return
        plan = make(region)
        work = _work(plan, target)
        first = target.cores > 1 and (work is None or work >= SERIAL_BELOW)
        threaded = [first] if target.cores == 1 or work is None or work > 64 * SERIAL_BELOW else [first, not first]
        for parallel in threaded:
            for unroll in (4, 2):
                yield Schedule("rows", (("parallel", parallel), ("unroll", unroll)))

    def lower(self, region: Region, target: Target, schedule: Schedule) -> Kernel:
        """Compile the region. Raises LowerError."""
        try:
            plan = make(region)
            name = "rows_" + "_".join(dict.fromkeys(name_of(n) or "" for n in region.nodes))[:80]
            func = rows.function(plan, name, _form(plan, target, schedule))
            destinations = tuple(_destination(node, region) for node in region.outputs)
        except Unsupported as reason:
            raise LowerError(str(reason), node=region.nodes[0].name, by=self.name) from reason
        module = build.compile_function(func, build.host(target))
        count = elements(plan) or 0
        return Kernel(
            name, self.name, build.entry(module, name), destinations,
            source=func.script(), library=module.export_library, schedule=schedule,
            flops=count * plan.weight, bytes=sum(_bytes(t) for t in plan.tensors),
        )  # fmt: skip


def _lanes(target: Target) -> int:
    return max(4, target.vector_bits // 32)


def _work(plan: Plan, target: Target) -> int | None:
    """Vector instructions of one call, None if sizes are symbolic."""
    count = elements(plan)
    return None if count is None else count * plan.weight // _lanes(target)


def _form(plan: Plan, target: Target, schedule: Schedule) -> rows.Form:
    threshold = 0
    if _work(plan, target) is None:
        columns = int(plan.extents[-1]) if plan.extents[-1].is_Integer else 4096
        threshold = max(2, math.ceil(SERIAL_BELOW * _lanes(target) / (columns * plan.weight)))
    return rows.Form(_lanes(target), int(schedule["unroll"]), bool(schedule["parallel"]), threshold)


def _destination(node: fx.Node, region: Region) -> Destination:
    shape: list[Extent] = []
    for size in node.meta["val"].shape:
        shape.append(size if isinstance(size, int) else _find(size, region))
    return Destination(tuple(shape), node.meta["val"].dtype)


def _find(size: torch.SymInt, region: Region) -> tuple[int, int]:
    for position, source in enumerate(region.inputs):
        for dim, found in enumerate(source.meta["val"].shape):
            if expression(found) == expression(size):
                return position, dim
    raise Unsupported(f"the size {size} is not the size of an input")


def _bytes(tensor: torch.Tensor) -> int:
    static = all(isinstance(s, int) for s in tensor.shape)
    return math.prod(tensor.shape) * tensor.element_size() if static else 0
