"""Saving: a program and its kernels in one checked file."""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .. import targets
from ..passes.errors import ArtefactError, LatheError
from ..passes.program import Program
from ..targets.target import Target
from .base import Destination, Kernel
from .container import Part, write_container
from .graph_json import encode_program, encode_value
from .select import Choice
from .structure import encode_structure
from .versions import versions
from .weights import encode_tensors

Json = Any
# what exporting, loading and compiling kernels raise when tvm is missing, older, or cannot do it
NO_KERNEL = (ImportError, OSError, RuntimeError, AttributeError, TypeError, ValueError, LatheError)


def save(
    program: Program,
    choices: Sequence[Choice],
    path: str | os.PathLike[str],
    *,
    target: Target | None = None,
    report: Any = None,
    counts: Mapping[str, int] | None = None,
    weights_budget: int | None = None,
) -> None:
    """Write a program and the kernels chosen for it as one file, whole or not at all.

    Args:
        target: what the kernels were lowered for; this host's CPU if it is left out.
        report: the report, as a dictionary or with `to_dict`.
        counts: fallbacks and recompilations so far.
        weights_budget: bytes of device memory that weights may take where the file is loaded.

    Raises:
        ArtefactError: the program holds something without a stored form (control flow, sparse weights, custom
            operators); the error names it.
        OSError: the file cannot be written.
    """
    _refuse_shared_state(program)
    graph = encode_program(program)
    tensors = {f"weight:{name}": value for name, value in program.weights.items()}
    plan, libraries = _encode_plan(program, choices)
    weights, index = encode_tensors(tensors)
    plan |= {"counts": dict(counts or {}), "weights budget": weights_budget}
    report = report.to_dict() if hasattr(report, "to_dict") else report
    structure = {"in": encode_structure(program.in_spec), "out": encode_structure(program.out_spec)}
    documents = {"graph": graph, "plan": plan, "tensors": index, "structure": structure, "report": report}
    parts = [Part(k, "json", json.dumps(v, allow_nan=False).encode()) for k, v in documents.items()]
    parts.append(Part("weights", "weights", weights))
    parts += [Part(f"library:{i}", "library", data) for i, data in enumerate(libraries)]
    target = target or targets.get("cpu")
    facts = {"versions": versions(), "target": {"name": target.name, "fingerprint": targets.fingerprint(target)}}
    write_container(path, facts, parts)


def _refuse_shared_state(program: Program) -> None:
    """A carried tensor that shares memory with another weight would come back as two independent ones."""
    slots = {s.slot for s in program.state}
    tensors = {k: v for k, v in program.weights.items() if isinstance(v, torch.Tensor) and v.layout is torch.strided}
    for name in slots & tensors.keys():
        storage = tensors[str(name)].untyped_storage().data_ptr()
        others = [k for k, v in tensors.items() if k != name and storage and v.untyped_storage().data_ptr() == storage]
        if others:
            raise ArtefactError(f"the carried tensor {name} shares memory with {others[0]}, which has no stored form",
                                next_step="give the model a buffer of its own for it")  # fmt: skip


def _encode_plan(program: Program, choices: Sequence[Choice]) -> tuple[Json, list[bytes]]:
    """The regions in order and the distinct libraries."""
    nodes = [n for n in program.graph.nodes if n.op != "output"]
    place = {n: i for i, n in enumerate(nodes)}
    libraries: list[bytes] = []
    known: dict[int, int | None] = {}
    regions = []
    for choice in choices:
        kernel = choice.kernel  # packed weights are made again from the weights on load
        if id(kernel.call) not in known:
            known[id(kernel.call)] = _library_index(kernel, libraries)
        schedule = [kernel.schedule.name, encode_value(kernel.schedule.params)]
        destinations = kernel.destinations
        regions.append({
            "nodes": [place[n] for n in choice.region.nodes], "backend": kernel.backend, "name": kernel.name,
            "schedule": schedule, "library": known[id(kernel.call)], "constants": len(kernel.constants),
            "flops": int(kernel.flops),
            "bytes": int(kernel.bytes), "seconds": encode_value(kernel.seconds),
            "destinations": None if destinations is None else [_encode_destination(d) for d in destinations],
        })  # fmt: skip
    return {"regions": regions}, libraries


def _encode_destination(destination: Destination) -> Json:
    shape = list(destination.shape)  # JSON makes lists of the tuples in it
    order = None if destination.order is None else list(destination.order)
    return [shape, str(destination.dtype).removeprefix("torch."), order]


def _library_index(kernel: Kernel, libraries: list[bytes]) -> int | None:
    """Position of the kernel's library, added if it is new; None if the kernel cannot be exported."""
    if kernel.library is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.so"
        try:
            kernel.library(str(path))
            data = path.read_bytes()
        except NO_KERNEL as error:
            warnings.warn(f"the kernel {kernel.name} cannot be exported and will be compiled again on load: {error}",
                          stacklevel=4)  # fmt: skip
            return None
    if data not in libraries:
        libraries.append(data)
    return libraries.index(data)
