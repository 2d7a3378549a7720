"""The child processes of gpu.py: each does one row or one section, so that a crash or a hang costs one row.

A child reads its request as JSON from its arguments and writes messages, one JSON object a line, to a pipe of its own.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import select
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Message = dict[str, Any]
POISONED = 3  # exit status after an error that leaves the device unusable for this process
HUGE = "2^31"  # in the label of a case that needs tens of GiB
START = 90.0  # seconds until a child must have said something


class Child:
    """A process that works on one request, in a process group of its own."""

    def __init__(self, request: Mapping[str, Any], log: Path) -> None:
        reader, writer = os.pipe()
        with log.open("a") as out:
            self.process = subprocess.Popen(
                [sys.executable, str(Path(__file__).resolve()), json.dumps(request), str(writer)],
                stdin=subprocess.PIPE, stdout=out, stderr=out, pass_fds=(writer,), start_new_session=True,
            )  # fmt: skip
        os.close(writer)
        self.reader, self.buffer = reader, b""

    def message(self, until: float) -> Message | None:
        """The next message, None when the child has ended. Raises TimeoutError at `until` (of `time.time`)."""
        while b"\n" not in self.buffer:
            over = self.process.poll() is not None  # asked first: what it wrote before its end is still read
            if not select.select([self.reader], [], [], max(0.0, min(0.5, until - time.time())))[0]:
                if over:  # a process that it forked may keep the pipe open
                    return None
                if time.time() >= until:
                    raise TimeoutError
                continue
            if not (data := os.read(self.reader, 65536)):
                return None
            self.buffer += data
        line, _, self.buffer = self.buffer.partition(b"\n")
        found: Message = json.loads(line)
        return found

    def go(self, until: float = 0.0) -> None:
        """Let a child that waits go on, and say until when it may."""
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):
            self.process.stdin.write(f"{until}\n".encode())
            self.process.stdin.flush()

    def end(self) -> str:
        """End the process and what it started, if it has not ended by itself. Returns how it ended."""
        if self.reader >= 0:
            os.close(self.reader)
            self.reader = -1
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(0.5)
        ended = self.process.poll()
        with contextlib.suppress(OSError):
            os.killpg(self.process.pid, signal.SIGKILL)  # compile workers too, where the child itself is gone
        self.process.wait()
        return "was ended" if ended is None else f"ended with status {ended}"


def run_cases(request: Mapping[str, Any], until: float, patience: float, log: Path, keep: Callable[[Message], None],
              first: Child | None = None) -> bool:  # fmt: skip
    """Run cases in a child; one that crashes or hangs is named, and the next child goes on behind it.

    Args:
        until: when to stop (of `time.time`).
        patience: seconds of one case.
        keep: called with each result: ``row`` and ``label``, or ``failed`` and ``why``.
        first: a child that was started for this request and waits.

    Returns:
        Whether all cases were run.
    """
    skip = 0
    while time.time() < until:
        child = first or Child({**request, "skip": skip}, log)
        label, limit, first = None, START, None
        child.go(until)
        try:
            while (message := child.message(min(until, time.time() + limit))) is not None:
                limit = patience
                if "done" in message:
                    return bool(message["all"])
                if "begin" in message:
                    label, skip = message["begin"], message["number"] + 1
                elif "started" not in message:
                    keep(message)
                    label = None
            how = "the process " + child.end()
        except TimeoutError:
            how = "no time was left" if time.time() >= until else f"took more than {limit:.0f} s"
        finally:
            child.end()
        if label is not None:
            keep({"failed": label, "why": how})
        elif not how.endswith(f"status {POISONED}"):  # it failed between cases: another one would, too
            keep({"failed": str(request.get("section", request["kind"])), "why": f"{how}, see the log"})
            return False
    return False


def _serve_cases(request: Mapping[str, Any], emit: Callable[[Message], None], wait: Callable[[], float]) -> None:
    from gpu_ours import compilers, interpreted

    if not interpreted():
        compilers()
    import torch

    if request["kind"] == "check":
        from gpu_check import cases as listed
    else:
        from gpu_kernels import cases as listed
    found = listed(request)
    _idle(torch)
    emit({"started": True})
    until = wait()
    for number, (label, make) in enumerate(found):
        if number < request["skip"] or request["match"] not in label or not _mine(number, label, request):
            continue
        if time.time() > until:
            emit({"done": True, "all": False})
            return
        emit({"begin": label, "number": number})
        start = time.time()
        try:
            emit({"row": make(), "label": label, "took": time.time() - start})
        except Exception as error:  # whatever it is, it costs this case
            emit({"failed": label, "why": f"{type(error).__name__}: {' '.join(str(error).split())[:600]}"})
            traceback.print_exc()
            try:
                _idle(torch)
            except Exception:
                os._exit(POISONED)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    emit({"done": True, "all": True})


def _mine(number: int, label: str, request: Mapping[str, Any]) -> bool:
    """Whether a case belongs to this one of several processes; the first has all cases that need much memory."""
    share, shares = request.get("share", 0), request.get("shares", 1)
    if shares == 1:
        return True
    return share == (0 if HUGE in label else 1 + number % (shares - 1))


def _idle(torch: Any) -> None:
    """Raises where an earlier error has made the device unusable for this process."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.ones(1, device="cuda").sum().item()


def _ceilings(request: Mapping[str, Any], emit: Callable[[Message], None]) -> None:
    import torch
    from gpu_clock import ceilings

    facts = {"device": "CPU, a dry run under Triton's interpreter", "torch": torch.__version__}
    if request["device"] == "cuda":
        found = torch.cuda.get_device_properties(0)
        facts |= {"device": found.name, "memory": found.total_memory, "multiprocessors": found.multi_processor_count,
                  "cuda": torch.version.cuda or torch.version.hip}  # fmt: skip
    with contextlib.suppress(ImportError):
        import triton

        facts["triton"] = triton.__version__
    emit({"facts": facts, "ceilings": ceilings(request["device"])})


def main() -> None:
    """Serve one request."""
    request, pipe = json.loads(sys.argv[1]), os.fdopen(int(sys.argv[2]), "w", buffering=1)
    os.set_inheritable(pipe.fileno(), False)

    def emit(message: Message) -> None:
        print(json.dumps(message), file=pipe, flush=True)

    def wait() -> float:
        return float(sys.stdin.readline())

    if request["kind"] == "model":
        from gpu_models import serve

        serve(request, emit, wait)
    elif request["kind"] == "ceilings":
        _ceilings(request, emit)
    else:
        _serve_cases(request, emit, wait)
    os._exit(0)  # pools of compile threads would take their time


if __name__ == "__main__":
    main()
