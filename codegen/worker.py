"""The process in which candidates are made, checked and timed: a crash or an endless loop there costs one candidate.

It reads one JSON line per request from its standard input and writes JSON lines to the file descriptor that it was
given: ``{"trying": label}`` before each candidate, and ``{"trial": ...}`` or ``{"failed": text}`` at the end.
"""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from .lower import backends
from .request import decode_request
from .store import keep
from .trial import Trial, encode_trial, hold

Json = Any
IDLE = 60.0  # seconds without a request after which the process ends
ALARM = 180  # seconds that one candidate may take when the parent is gone


def main(descriptor: int, memory: int) -> None:
    """Serve requests until the input ends.

    Args:
        descriptor: where answers go.
        memory: bytes that this process may allocate.
    """
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    resource.setrlimit(resource.RLIMIT_DATA, (memory if hard < 0 else min(memory, hard), hard))
    with os.fdopen(descriptor, "w", buffering=1) as answers:
        while select.select([sys.stdin], [], [], IDLE)[0] and (line := sys.stdin.readline()):
            _serve(json.loads(line), lambda answer: print(json.dumps(answer), file=answers))


def _serve(request: Json, answer: Any) -> None:
    torch.set_num_threads(request["threads"])
    os.environ["TORCHLATHE_CACHE"] = request["folder"]
    try:
        if request["target"]["device"] == "cuda":  # its driver maps more addresses than there is memory
            hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
            resource.setrlimit(resource.RLIMIT_DATA, (hard, hard))
        answer({"trial": _tried(request, answer)})
    except Exception as error:  # the parent falls back to eager for this region, or tries candidates itself
        if not _device_works():
            os._exit(1)  # the candidate that was tried last is to blame; the next child has a device again
        answer({"failed": f"{type(error).__name__}: {error}"})
    finally:
        signal.alarm(0)
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()  # the parent needs what is left of the device's memory


def _tried(request: Json, answer: Any) -> Json:
    program, region, values, target = decode_request(request)
    rivals, _ = backends(program, target, request["search"])
    # the parent has memory that this process lacks: it tries again
    lasting = (torch.OutOfMemoryError,) if target.device == "cuda" else ()
    with torch.no_grad():
        trial = hold(region, rivals, target, values, request["budget"], skip=request["skip"], only=request["only"],
                     lasting=lasting, tell=lambda label: _begin(label, answer))  # fmt: skip
    trial.library = _stored(trial)
    return encode_trial(trial)


def _device_works() -> bool:
    """Whether a GPU that was used still answers: a fault in a kernel breaks it for the whole process."""
    try:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def _begin(label: str, answer: Any) -> None:
    """Say what is tried next, and let the system end this process if it takes for ever and nobody is watching."""
    signal.alarm(ALARM)
    answer({"trying": label})


def _stored(trial: Trial) -> str | None:
    """Keep the winner's compiled code and its source for the parent and for later; None where that is not possible."""
    kernel = trial.kernel
    if kernel is None or kernel.library is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.so"
        try:
            kernel.library(str(path))
            return keep(path.read_bytes(), kernel.source)
        except Exception:  # no compiler to link with, or none that works: the parent compiles
            return None
