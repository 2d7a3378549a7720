"""Artefacts: an executable in one checked file, and the private folder that its compiled kernels are loaded from.

Nothing is unpickled or evaluated. Loading traces and compiles nothing on the CPU that the file was saved on; on
another one, compiled kernels are compiled again from the stored graph, and the report says so. The checksums find
damage, not malice: a file may hold compiled code, so load only files that you trust, or pass ``native=False``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .. import targets
from ..passes.errors import ArtefactError, LatheError, MissingPackageError
from ..passes.placement import place_of, placed
from ..passes.program import Program
from ..targets.target import Target
from .base import Backend, Destination, Extent, Kernel, Region, Schedule
from .container import AGAIN, Part, read_container, read_json, write_atomically
from .eager import EagerBackend
from .executable import Executable
from .graph_json import DTYPES, decode_program, decode_value
from .onednn import OnednnBackend
from .save import NO_KERNEL
from .select import Choice
from .store import library_file
from .structure import decode_structure
from .symbols import DEPTH
from .triton.compile import is_here
from .versions import versions
from .weights import decode_tensors

if TYPE_CHECKING:
    from .triton.backend import TritonBackend
    from .tvm.backend import TvmBackend

Json = Any
# what decoding raises on content that has the right checksums and the wrong meaning
MALFORMED = (KeyError, ValueError, TypeError, IndexError, AttributeError, RuntimeError, RecursionError, ArithmeticError,
             SyntaxError)  # fmt: skip


def load(
    path: str | os.PathLike[str],
    *,
    native: bool = True,
    decode_report: Callable[[dict[str, Any]], Any] | None = None,
) -> Executable:
    """The executable that was saved: same answers, same errors, same report. The original model is not behind it.

    Output classes that are neither registered with torch's pytree nor shown by an imported package come back as
    `Fields` with the same field names; import the package before loading to get the class itself.

    Args:
        native: False ignores the compiled kernels of the file and compiles them again from its graph.
        decode_report: makes the report from its plain dictionary; without it `report` is that dictionary.

    Raises:
        ArtefactError: the file is missing, damaged, foreign, or needs a class or operator that is not there.
    """
    facts, parts = read_container(path)
    try:
        return _rebuild(facts, parts, native, decode_report)
    except LatheError as error:
        if isinstance(error, ArtefactError):
            raise
        raise ArtefactError(f"cannot rebuild {path}: {error.what}", next_step=error.next_step or AGAIN) from error
    except MALFORMED as error:
        reason = f"{type(error).__name__}: {str(error)[:200]}"
        raise ArtefactError(f"the contents of {path} contradict the format ({reason})", next_step=AGAIN) from error


def read_report(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The report's dictionary. Checks the manifest, the size of the file and the report; reads nothing else.

    Raises:
        ArtefactError: the file is missing or damaged, or was saved without a report.
    """
    _, parts = read_container(path, only=("report",))
    report = read_json(parts["report"].data, "the report") if "report" in parts else None
    if not isinstance(report, dict):
        raise ArtefactError(f"{path} holds no report")
    return report


@dataclass
class _Loader:
    """Makes the kernels of a stored plan and counts what had to be made anew."""

    program: Program
    host: Target
    parts: Mapping[str, Part]
    tensors: Mapping[str, torch.Tensor]
    native: bool
    counts: dict[str, int]
    notes: list[str] = field(default_factory=list)
    _functions: dict[tuple[Any, str], Callable[..., Any]] = field(default_factory=dict)
    _kernels: dict[tuple[str, str], Kernel] = field(default_factory=dict)
    _made: TvmBackend | None = None
    _gpu: TritonBackend | None = None

    def choices(self, stored: Json) -> list[Choice]:
        """A kernel for every stored region; together they must cover each call once."""
        nodes = [n for n in self.program.graph.nodes if n.op != "output"]
        found = []
        for row in stored:
            members = [nodes[i] for i in row["nodes"] if type(i) is int and 0 <= i < len(nodes)]
            if not members or len(members) != len(row["nodes"]):
                raise ValueError("a region names nodes that are not there")
            region = Region.of(members)
            found.append(Choice(region, self.kernel(region, row)))
        covered = [n for c in found for n in c.region.nodes]
        if sorted(covered) != [n for n in nodes if n.op == "call_function"]:
            raise ValueError("the regions do not cover every call once")
        return found

    def kernel(self, region: Region, row: Json) -> Kernel:
        """The kernel of one region: loaded, repacked or compiled again; eager where none of these is possible."""
        schedule = Schedule(str(row["schedule"][0]), decode_value(row["schedule"][1]))
        name, library = str(row["backend"]), row["library"]
        kernel = None
        if name == "onednn":
            kernel = self._lowered(OnednnBackend(self.program), region, schedule)
        elif name == "tvm":
            kernel = self._loaded(region, row, schedule) if library is not None and self.native else None
            kernel = kernel or self._compiled(region, schedule)
        elif name == "triton":
            kernel = self._triton(region, row, schedule)
        elif name == "metaschedule" and library is not None and self.native:
            kernel = self._loaded(region, row, schedule)
            kernel = kernel and replace(kernel, backend=name, call=_aligned()(kernel.call))
        elif name not in ("eager", "metaschedule"):
            self.notes.append(f"no backend is called {name}: its regions run eagerly")
        if kernel is None:
            kernel = EagerBackend().lower(region, self.host, Schedule())
            if name != "eager":
                self.counts["eager fallbacks"] = self.counts.get("eager fallbacks", 0) + 1
        seconds = decode_value(row["seconds"])
        kernel.seconds = seconds if kernel.backend == name and isinstance(seconds, float) else None
        return kernel

    def _triton(self, region: Region, row: Json, schedule: Schedule) -> Kernel | None:
        """A kernel of a GPU: from its machine code, or compiled again where another version of Triton made that."""
        backend = self._gpu_backend()
        if row["library"] is not None and self.native:
            try:
                backend.adopt_bytes(region, schedule, self.host, self.parts[f"library:{row['library']}"].data)
            except (ArtefactError, ImportError, *MALFORMED) as error:
                self.notes.append(f"compiled kernels do not load, and are compiled again: {_first_line(error)}")
                self.counts["recompilations"] = self.counts.get("recompilations", 0) + 1
        try:
            return self._lowered(backend, region, schedule)
        except NO_KERNEL as error:
            self.notes.append(f"a region of triton runs eagerly: {_first_line(error)}")
            return None

    def _gpu_backend(self) -> TritonBackend:
        from .triton.backend import TritonBackend

        if self._gpu is None:
            self._gpu = TritonBackend(self.program)
        return self._gpu

    def _lowered(self, backend: Backend, region: Region, schedule: Schedule) -> Kernel | None:
        reason = backend.supports(region, self.host)
        if reason is None:
            return backend.lower(region, self.host, schedule)
        self.notes.append(f"{backend.name} does not take a region that it was saved with: {reason}")
        return None

    def _loaded(self, region: Region, row: Json, schedule: Schedule) -> Kernel | None:
        data, name = self.parts[f"library:{row['library']}"].data, str(row["name"])
        key = row["library"], name
        if key not in self._functions:
            try:
                self._functions[key] = _load_function(data, name)
            except NO_KERNEL as error:
                self.notes.append(f"the compiled kernel {name} does not load: {_first_line(error)}")
                return None
        destinations = row["destinations"]
        made = None if destinations is None else tuple(_destination(d, region) for d in destinations)
        constants = self._backend().constants(region, self.host, schedule) if row["constants"] else ()
        return Kernel(
            name, "tvm", self._functions[key], made, len(region.outputs), constants, schedule=schedule,
            library=lambda path: write_atomically(Path(path), [data]), flops=int(row["flops"]), bytes=int(row["bytes"]),
        )  # fmt: skip

    def _backend(self) -> TvmBackend:
        if self._made is None:
            self._made = _tvm(self.program)
        return self._made

    def _compiled(self, region: Region, schedule: Schedule) -> Kernel | None:
        """Equal regions share one kernel, unless weights are baked into it."""
        key = region.key(self.program), repr(schedule)
        if key in self._kernels:
            return replace(self._kernels[key])
        self.counts["recompilations"] = self.counts.get("recompilations", 0) + 1
        try:
            kernel = self._lowered(self._backend(), region, schedule)
        except NO_KERNEL as error:
            self.notes.append(f"a region of tvm runs eagerly: {_first_line(error)}")
            return None
        if kernel is not None and kernel.destinations is not None and not kernel.constants:
            self._kernels[key] = kernel
        return kernel


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _destination(stored: Json, region: Region) -> Destination:
    shape = tuple(_extent(e, region) for e in stored[0])
    if any(isinstance(e, int) and e < 0 for e in shape):
        raise ValueError(f"{str(stored[0])[:80]} is no shape")
    order = stored[2]
    if order is not None and sorted(order) != list(range(len(shape))):
        raise ValueError(f"{str(order)[:80]} is not an order of dimensions")
    made = Destination(shape, DTYPES[stored[1]], None if order is None else tuple(order))
    made.text([""] * len(region.inputs))  # raises for an operator that is not in the table
    return made


def _extent(stored: Json, region: Region, depth: int = 0) -> Extent:
    """A stored size; its text becomes part of a program, so only numbers, places and names of operators may pass."""
    if type(stored) is int:
        return stored
    if not isinstance(stored, list) or not stored or depth > DEPTH:
        raise ValueError(f"{str(stored)[:80]} is not a size")
    if isinstance(stored[0], str):
        return (stored[0], *(_extent(e, region, depth + 1) for e in stored[1:]))
    position, dim = stored
    if type(position) is not int or type(dim) is not int or dim < 0 or not 0 <= position < len(region.inputs):
        raise ValueError(f"{str(stored)[:80]} is not a size")
    return position, dim


def _aligned() -> Any:
    from .tvm.metaschedule import aligned

    return aligned


def _tvm(program: Program) -> TvmBackend:
    try:
        from .tvm.backend import TvmBackend
    except ImportError as error:
        raise MissingPackageError(f"tvm cannot be imported: {error}", next_step="pip install apache-tvm") from error
    return TvmBackend(program)


def _rebuild(
    facts: Mapping[str, Any], parts: Mapping[str, Part], native: bool, decode_report: Callable[..., Any] | None
) -> Executable:
    json_parts = {k: read_json(p.data, f"the part {k}") for k, p in parts.items() if p.kind == "json"}
    tensors = decode_tensors(parts["weights"].data, json_parts["tensors"])
    weights = {k.removeprefix("weight:"): v for k, v in tensors.items() if k.startswith("weight:")}
    structure, plan = json_parts["structure"], json_parts["plan"]
    specs = decode_structure(structure["in"], inputs=True), decode_structure(structure["out"], inputs=False)
    program = decode_program(json_parts["graph"], weights, *specs)
    host, budget = _target_of(facts), plan.get("weights budget")
    if host.device == "cuda" and is_here(host) and place_of(program).type == "cpu":
        program = placed(program, torch.device("cuda", torch.cuda.current_device()), weights=budget is None)
    foreign = _foreign(facts, host)
    counts = {str(k): int(v) for k, v in plan["counts"].items()}
    loader = _Loader(program, host, parts, tensors, native and foreign is None, counts)
    choices = loader.choices(plan["regions"])
    notes = list(dict.fromkeys(loader.notes))
    if foreign is not None and any(row["library"] is not None for row in plan["regions"]):
        notes.insert(0, f"saved {foreign}: its compiled kernels were compiled again here")
    report = json_parts["report"]
    if isinstance(report, dict):
        if notes:
            report["notes"] = [*report.get("notes", ()), *notes]
        if counts != plan["counts"]:
            report["counts"] = {**report.get("counts", {}), **counts}
        report = decode_report(report) if decode_report is not None else report
    result = Executable(program, choices, report=report, target=host, weights_budget=budget)
    result.counts.update(counts)
    return result


def _target_of(facts: Mapping[str, Any]) -> Target:
    """The target that a file's kernels run on: the GPU that it names, else this host's CPU."""
    name = str(facts["target"]["name"])
    gpus = [n for n in targets.names() if n == "cuda" or n.startswith(("nvidia-", "amd-"))]
    try:
        return targets.get(name) if name in gpus else targets.get("cpu")
    except targets.NoDeviceError as error:
        raise ArtefactError(f"the file was made on a GPU, and this host has none: {error}") from error


def _foreign(facts: Mapping[str, Any], host: Target) -> str | None:
    """What differs from the machine that compiled the kernels of a file, None if they run here as they are."""
    made, here = facts["versions"], versions()
    if facts["target"]["fingerprint"] != targets.fingerprint(host):
        return f"on another {'CPU' if host.device == 'cpu' else 'GPU'}"
    return next((f"with {k} {made[k]} (here: {here[k]})" for k in ("tvm", "system") if made[k] != here[k]), None)


# --- compiled kernels on disk


def _load_function(data: bytes, name: str) -> Callable[..., Any]:
    """The function of a shared library, loaded from a private file whose content was just verified."""
    from .tvm.build import load_library

    with library_file(data) as path:
        return load_library(str(path), name)
