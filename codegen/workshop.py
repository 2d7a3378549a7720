"""The child process in which candidates are tried: started when needed, ended when it hangs, gone when idle."""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil

BOOT = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("torchlathe", sys.argv[1] + "/__init__.py",
                                              submodule_search_locations=[sys.argv[1]])
sys.modules["torchlathe"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules["torchlathe"])
from torchlathe.codegen.worker import main
main(int(sys.argv[2]), int(sys.argv[3]))
"""

Json = Any


@functools.cache
def workshop() -> Workshop:
    """The one of this process: starting a child costs seconds, so it outlives a call of `optimize`."""
    found = Workshop()
    atexit.register(found.close)
    return found


class Workshop:
    """Hands requests to a child process, one at a time; a child that ended is replaced by the next request."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._child: _Child | None = None

    @property
    def possible(self) -> bool:
        """Whether this system has what is needed to watch and end a child."""
        return os.name == "posix"

    def close(self) -> None:
        """End the child, if there is one."""
        with self._lock:
            if self._child is not None:
                self._child.end()
                self._child = None

    def ask(self, request: Json, patience: float) -> Json:
        """The child's answer. Where it crashes or is silent for `patience` seconds, ``failed`` says how, ``trying``
        with which candidate, and ``ended`` is true."""
        with self._lock:
            if self._child is None or not self._child.alive:
                if self._child is not None:
                    self._child.end()
                self._child = _Child()
            return self._child.ask(request, patience)


class _Child:
    """The process of `worker`, in a process group of its own."""

    def __init__(self) -> None:
        root = str(Path(__file__).resolve().parents[1])
        reader, writer = os.pipe()
        memory = int(psutil.virtual_memory().total * 0.8)
        environment = os.environ | {"PYTHONWARNINGS": "ignore"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", BOOT, root, str(writer), str(memory)],
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, pass_fds=(writer,),
            start_new_session=True, env=environment,
        )  # fmt: skip
        os.close(writer)
        self.answers, self._buffer = reader, b""

    @property
    def alive(self) -> bool:
        """Whether it can take a request."""
        return self.answers >= 0 and self.process.poll() is None

    def ask(self, request: Json, patience: float) -> Json:
        """The answer; where the child crashes or hangs, it is ended and the answer says with which candidate."""
        trying = "start"
        try:
            assert self.process.stdin is not None
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            self.process.stdin.flush()
            while True:
                answer = self._line(patience)
                if "trying" not in answer:
                    return answer | {"trying": trying}
                trying = answer["trying"]
        except TimeoutError:
            reason = f"took more than {patience:.0f} s"
        except (OSError, EOFError, ValueError):
            reason = f"ended the process ({_ending(self.process)})"
        except BaseException:  # its answer would be taken for that of the next request
            self.end()
            raise
        self.end()
        return {"failed": reason, "trying": trying, "ended": True}

    def _line(self, patience: float) -> Json:
        limit = time.monotonic() + patience
        while b"\n" not in self._buffer:
            ready, _, _ = select.select([self.answers], [], [], max(0.0, limit - time.monotonic()))
            if not ready:
                raise TimeoutError
            data = os.read(self.answers, 65536)
            if not data:
                raise EOFError
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        return json.loads(line)

    def end(self) -> None:
        """End the process and what it may have started."""
        if self.answers < 0:
            return
        if self.process.poll() is None:
            with contextlib.suppress(OSError):
                os.killpg(self.process.pid, signal.SIGKILL)
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            self.process.wait(5)
        with contextlib.suppress(OSError):
            os.close(self.answers)
        self.answers = -1
        if self.process.stdin is not None:
            with contextlib.suppress(OSError):
                self.process.stdin.close()


def _ending(process: subprocess.Popen[bytes]) -> str:
    with contextlib.suppress(subprocess.TimeoutExpired):
        code = process.wait(5)
        return signal.Signals(-code).name if code < 0 else f"exit status {code}"
    return "no answer"
