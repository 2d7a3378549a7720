"""Lower a program: which backends compete on a target, and the way from a Program to an Executable."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
from collections.abc import Callable, Sequence
from typing import Any

from ..passes.errors import LowerError
from ..passes.program import Program
from ..targets.target import Target
from .base import Backend, Kernel, Region, Schedule
from .eager import EagerBackend
from .executable import Executable
from .onednn import OnednnBackend
from .partition import partition
from .select import Choice, follow, note_orders, select
from .tuner import Tuner

CANDIDATES = 4  # schedules that are compiled where none can be timed


def backends(program: Program, target: Target, search: bool = False) -> tuple[list[Backend], list[str]]:
    """Backends that compete with eager on a target, in the order in which they claim nodes; notes on absent ones.

    Args:
        search: whether schedules are searched for operators that have no template.
    """
    found: list[Backend] = []
    notes: list[str] = []
    searched: list[Backend] = []
    if target.device == "cpu":
        if not _has_tvm():
            notes.append(
                "tvm is not installed: pointwise and row regions run eagerly; install torchlathe with its dependencies"
            )
        else:
            from .tvm.backend import TvmBackend

            found.append(TvmBackend(program))
            if search:
                from .tvm.metaschedule import MetaScheduleBackend

                searched = [MetaScheduleBackend(found[0])]
        found.append(OnednnBackend(program))
        found += searched
    elif target.device == "cuda":
        if importlib.util.find_spec("triton") is None:
            notes.append("triton is not installed: every region runs eagerly; pip install 'torchlathe[gpu]'")
        else:
            from .triton.backend import TritonBackend

            found.append(TritonBackend(program))
    return found, notes


def _has_tvm() -> bool:
    return importlib.util.find_spec("tvm") is not None


def lower(
    program: Program,
    target: Target,
    inputs: Sequence[Any],
    tuner: Tuner,
    progress: Callable[[str], None] | None = None,
) -> tuple[list[Choice], list[str]]:
    """The measured best kernel for each region of the program, and notes for the report.

    Args:
        inputs: flat example inputs, used for timing and for checking every kernel against eager.
        tuner: decides between candidates.
    """
    rivals, notes = backends(program, target, search=tuner.level == "max")
    regions = partition(program, rivals, target)
    return select(program, regions, rivals, target, inputs, tuner, progress), [*notes, *tuner.notes]


def lower_unmeasured(program: Program, target: Target) -> list[Choice]:
    """Kernels chosen without timing: our own for operators of our own, prepacked linear and convolution, eager."""
    rivals: list[Backend] = [OnednnBackend(program)] if target.device == "cpu" else []
    if rivals and _has_tvm():
        from .tvm.backend import TvmBackend
        from .tvm.token_family import TokenFamily

        rivals.append(TvmBackend(program, families=(TokenFamily(),)))
    return _likely(program, rivals, target)


def lower_ahead(program: Program, target: Target) -> tuple[list[Choice], list[str]]:
    """The likeliest kernel for each region, for a device that need not be here; notes on what is missing."""
    rivals, notes = backends(program, target)
    return _likely(program, rivals, target), notes


def _likely(program: Program, rivals: Sequence[Backend], target: Target) -> list[Choice]:
    eager, choices = EagerBackend(), []
    for region in partition(program, rivals, target):
        kernel = eager.lower(region, target, Schedule())
        for backend in rivals:
            if backend.supports(region, target) is None:
                with contextlib.suppress(LowerError):
                    kernel = _likeliest(backend, region, target)
        if kernel.backend == eager.name and any("traced" in n.meta for n in region.inputs):
            follow(program, region)
        note_orders(region, kernel)
        choices.append(Choice(region, kernel))
    return choices


def _likeliest(backend: Backend, region: Region, target: Target) -> Kernel:
    """The first schedule whose kernel keeps its values in registers; of the first few the one that spills least."""
    kernels = []
    for schedule in itertools.islice(backend.space(region, target), CANDIDATES):
        kernel = backend.lower(region, target, schedule)
        if kernel.spills == 0:
            return kernel
        kernels.append(kernel)
    return min(kernels, key=lambda k: k.spills)


def lower_eager(program: Program, target: Target) -> list[Choice]:
    """Every node as torch runs it."""
    eager = EagerBackend()
    return [Choice(r, eager.lower(r, target, Schedule())) for r in partition(program, [], target)]


def trial(program: Program, target: Target) -> Executable:
    """An executable that is quick to build, for judging rewrites by their time."""
    return Executable(program, lower_unmeasured(program, target), target=target)
