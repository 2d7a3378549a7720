"""Operators without a template of ours: loop nests from TVM's importer, with schedules sampled by MetaSchedule.

TVM's own tuner keeps a database that several processes may not share, and starts builders and runners of its own. Here
only its space is used (Shao et al., "Tensor Program Optimization with Probabilistic Programs", 2022): a schedule is the
seed of one sample from it, so that candidates are made, checked, timed and recorded like all others. The first sample
in a process takes some seconds, because TVM then reads its tensor intrinsics.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import tvm
from torch import fx

from ...passes.errors import LowerError
from ...targets import cost
from ...targets.target import Target
from ..base import Backend, Destination, Kernel, Region, Schedule
from ..plans.layout import contiguous
from ..plans.rules import name_of
from ..plans.values import Unsupported, dense
from . import build

SAMPLES = 24
LEAST = 2_000_000  # operations of one call below which a search is not worth its seconds
ALIGNMENT = 64  # bytes that TVM's loop nests assume


@dataclass
class MetaScheduleBackend:
    """Single operators of static size that no backend before it can lower.

    Args:
        templates: the backend whose regions need no search.
    """

    templates: Backend
    name: str = "metaschedule"
    _imported: dict[str, Any | Unsupported] = field(default_factory=dict, repr=False)
    _compiled: dict[tuple[str, str], tuple[Any, Callable[..., None], str]] = field(default_factory=dict, repr=False)

    def absorbs(self, node: fx.Node) -> bool:
        """No."""
        return False

    def supports(self, region: Region, target: Target) -> str | None:
        """None if the region can be lowered, else the reason why not."""
        if target.device != "cpu":
            return f"lowers for CPUs, {target.name} is {target.device}"
        if len(region.nodes) != 1 or name_of(region.nodes[0]) is None:
            return "not a single ATen operator"
        if self.templates.supports(region, target) is None:
            return "it has a template"
        if cost.flops(region.nodes[0]) < LEAST:
            return "too little work to search for a schedule"
        try:
            for node in (*region.inputs, *region.outputs):
                _check(node)
            self._nest(region)
        except Unsupported as reason:
            return str(reason)
        return None

    def space(self, region: Region, target: Target) -> Iterable[Schedule]:
        """Seeds of samples."""
        for seed in range(1, SAMPLES + 1):
            yield Schedule("sample", (("seed", seed),))

    def lower(self, region: Region, target: Target, schedule: Schedule) -> Kernel:
        """Sample and compile. Raises LowerError."""
        (node,), name = region.nodes, _named(region)
        key = region.digest(), str(schedule)
        try:
            if key not in self._compiled:
                chosen = _sample(self._nest(region), build.host(target), int(schedule["seed"]))
                module = build.compile_scheduled(chosen, name, build.host(target))
                self._compiled[key] = module, build.entry(module, name), chosen.script()
        except Unsupported as reason:
            raise LowerError(str(reason), node=node.name, by=self.name) from reason
        module, entry, source = self._compiled[key]
        destination = Destination(tuple(node.meta["val"].shape), node.meta["val"].dtype)
        flops, moved = cost.totals([node])
        return Kernel(name, self.name, aligned(entry), (destination,), source=source,
                      library=module.export_library, schedule=schedule, flops=flops, bytes=moved)  # fmt: skip

    def adopt(self, region: Region, schedule: Schedule, target: Target, library: Path, source: str) -> None:
        """Let `lower` take the code of this region and schedule from a library instead of compiling it."""
        module, name = build.load_module(str(library)), _named(region)
        stored = build.Stored(module, library)
        self._compiled[region.digest(), str(schedule)] = stored, build.entry(module, name), source

    def _nest(self, region: Region) -> Any:
        """The loop nest of the operator; its parameters are the inputs and the result. Raises Unsupported."""
        key = region.digest()
        if key not in self._imported:
            try:
                self._imported[key] = _import(region)
            except Unsupported as reason:
                self._imported[key] = reason
            except Exception as error:  # the importer raises whatever its assertions raise
                first = (str(error).splitlines() or [type(error).__name__])[0]
                self._imported[key] = Unsupported(f"TVM does not import it: {first[:200]}")
        if isinstance(self._imported[key], Unsupported):
            raise self._imported[key]
        return self._imported[key]


class _Alone(torch.nn.Module):
    """One operator as a module whose inputs are the region's."""

    def __init__(self, region: Region) -> None:
        super().__init__()
        self.node, self.inputs = region.nodes[0], region.inputs

    def forward(self, *values: torch.Tensor) -> torch.Tensor:
        given = dict(zip(self.inputs, values, strict=True))
        args, kwargs = fx.map_arg((self.node.args, self.node.kwargs), lambda n: given[n])
        result: torch.Tensor = self.node.target(*args, **kwargs)  # type: ignore[operator]
        return result


def _check(node: fx.Node) -> None:
    value = dense(node)
    if value.dtype is not torch.float32 or not all(isinstance(s, int) and s > 0 for s in value.shape):
        raise Unsupported(f"{node.name} is not float32 of static size")
    if not contiguous(value):
        raise Unsupported(f"{node.name} is not contiguous")


def _import(region: Region) -> Any:
    from tvm import relax
    from tvm.relax.frontend.torch import from_exported_program

    examples = tuple(torch.zeros(tuple(n.meta["val"].shape)) for n in region.inputs)
    with torch.no_grad():
        module = from_exported_program(torch.export.export(_Alone(region), examples))
    steps = (relax.transform.LegalizeOps(), relax.transform.AnnotateTIROpPattern(), relax.transform.FuseOps(),
             relax.transform.FuseTIR())  # fmt: skip
    for step in steps:
        module = step(module)
    nests = [f for _, f in module.functions_items() if isinstance(f, tvm.tirx.PrimFunc)]
    calls = [b.value for block in module["main"].body.blocks for b in block.bindings if isinstance(b.value, relax.Call)]
    calls = [c for c in calls if c.op == tvm.ir.Op.get("relax.call_tir")]
    if len(nests) != 1 or len(calls) != 1:
        raise Unsupported("it is more than one loop nest")
    parameters = list(module["main"].params)
    order = [parameters.index(a) for a in calls[0].args[1].fields]
    if sorted(order) != list(range(len(parameters))):
        raise Unsupported("its loop nest does not take every input once")
    *inputs, result = nests[0].params
    return tvm.tirx.PrimFunc([*(inputs[order.index(k)] for k in range(len(order))), result], nests[0].body,
                             nests[0].ret_type, nests[0].attrs)  # fmt: skip


def _sample(nest: Any, target: Any, seed: int) -> Any:
    """One schedule of a loop nest, the same for the same seed. Raises Unsupported."""
    _frames_known()
    from tvm.s_tir import meta_schedule

    module = tvm.IRModule({"main": nest.with_attr("global_symbol", "main")})
    with _quiet():
        context = meta_schedule.TuneContext(mod=module, target=target, space_generator="post-order-apply",
                                            search_strategy="replay-trace", num_threads=1, rand_state=seed)  # fmt: skip
        spaces = context.generate_design_space()
        context.pre_tuning(max_trials=1, num_trials_per_iter=1, design_spaces=spaces, database=None, cost_model=None)
        found = context.generate_measure_candidates()
    if not found:
        raise Unsupported("the sample is not a valid schedule")
    return found[0].sch.mod["main"]


def _frames_known() -> None:
    """Tell `inspect` which modules the frames of this call, of imports and of parsed text belong to.

    TVM looks at the whole stack for each of its hundreds of intrinsics, and `inspect` searches all modules of the
    process for each frame whose file it cannot place: two minutes where many modules are loaded.
    """
    known = {f"<{name}>": "" for name in ("frozen importlib._bootstrap", "frozen importlib._bootstrap_external", "ast")}
    frame = inspect.currentframe()
    while frame is not None:
        known.setdefault(frame.f_code.co_filename, frame.f_globals.get("__name__", ""))
        frame = frame.f_back
    for file, module in known.items():
        inspect.modulesbyfile.setdefault(file, module)  # type: ignore[attr-defined]


@contextlib.contextmanager
def _quiet() -> Any:
    logger = logging.getLogger("tvm.s_tir.meta_schedule")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _named(region: Region) -> str:
    return f"search_{name_of(region.nodes[0])}"


def aligned(entry: Callable[..., None]) -> Callable[..., None]:
    """The function on tensors that may begin anywhere: those that are not aligned as the nest assumes are copied."""

    def call(*values: torch.Tensor) -> None:
        *inputs, result = values
        taken = [v if v.data_ptr() % ALIGNMENT == 0 else v.clone() for v in inputs]
        if result.data_ptr() % ALIGNMENT == 0:
            entry(*taken, result)
        else:
            fresh = torch.empty_like(result)
            entry(*taken, fresh)
            result.copy_(fresh)

    return call
