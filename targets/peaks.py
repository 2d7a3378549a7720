"""Measured peak rates of this host's CPU, remembered on disk so that they are measured once per machine."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
import tempfile
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

from .folder import cache_folder

if TYPE_CHECKING:
    import torch

FORMAT = 1  # part of the digest
METHOD = "packed products"  # part of the key that callers form: figures of another method are measured again
REPEATABLE = 1.2  # two measurements further apart than this saw a busy machine


@dataclass(frozen=True)
class Peaks:
    """Rates that plain code reaches.

    Attributes:
        flops: float32 operations per second of matrix products on one core, times the cores.
        bandwidth: bytes per second of adding two arrays that lie in main memory, on all cores.
    """

    flops: float
    bandwidth: float


def cached_peaks(key: str, measure: Callable[[], tuple[Peaks, bool]], folder: Path | None = None) -> Peaks:
    """The rates stored under `key`, else those that `measure` gives, which are then stored.

    A damaged file costs one warning and a new measurement. Where the folder cannot be used, nothing is stored.

    Args:
        key: names the machine; part of the file name.
        measure: gives the rates and whether they may be stored.
        folder: where to store; default: `torchlathe/` in the user's cache folder.
    """
    folder = folder if folder is not None else cache_folder()
    path = folder / f"cpu-{key[:32]}.json"
    if _private(folder):
        found = _read(path, key)
        if found is not None:
            return found
    peaks, repeatable = measure()
    if repeatable:
        with contextlib.suppress(OSError):  # an unwritable cache costs time, never the answer
            _write(path, key, peaks)
    return peaks


def measure_peaks(cores: int, cache_bytes: int, memory: int) -> tuple[Peaks, bool]:
    """Measure within about 0.3 s, and say whether a second measurement agreed with the first.

    The best of many short samples is taken, because other work on the machine only ever lowers a rate. If the best of
    every other sample still differs by more than 20% from the rest, the machine was too busy to keep the figure.
    """
    samples = (_matmul_rates(cores, 0.1), _add_rates(cores, cache_bytes, memory, 0.1))
    repeatable = True
    for rates in samples:
        first, second = max(rates[::2]), max(rates[1::2])
        repeatable &= max(first, second) <= REPEATABLE * min(first, second)
    return Peaks(flops=max(samples[0]), bandwidth=max(samples[1])), repeatable


def _matmul_rates(cores: int, seconds: float) -> list[float]:
    import torch

    # On one thread, times the cores: while another process has one of the cores, products that are spread over a
    # thread pool were seen to run at a twentieth of their rate. oneDNN's packed product is taken where there is one,
    # because torch's own goes through a library that reaches less than half of the peak on some processors.
    a = torch.ones(192, 256)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        call = _packed_product(a)
        return _rates(call, 2.0 * 192 * 256 * 256 * cores, seconds)
    finally:
        torch.set_num_threads(threads)


def _packed_product(a: torch.Tensor) -> Callable[[], object]:
    import torch

    b = torch.ones(256, 256)
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(b, a.shape[0])
        linear = torch.ops.mkldnn._linear_pointwise.default
        linear(a, packed, None, "none", [], "")
    except (RuntimeError, AttributeError):
        return lambda: torch.mm(a, b)
    return lambda: linear(a, packed, None, "none", [], "")


def _add_rates(cores: int, cache_bytes: int, memory: int, seconds: float) -> list[float]:
    import numpy as np

    total = min(max(3 * cache_bytes, 48 * 2**20), 2**30, max(memory // 8, 2**20))
    count = total // (3 * 4 * cores)

    def touch(_: int) -> list[np.ndarray[tuple[int], np.dtype[np.float32]]]:
        return [np.ones(count, np.float32) for _ in range(3)]

    with ThreadPoolExecutor(cores) as pool:
        slabs = list(pool.map(touch, range(cores)))
        return _rates(
            lambda: list(pool.map(lambda slab: np.add(slab[0], slab[1], out=slab[2]), slabs)),
            3.0 * 4 * count * cores,
            seconds,
        )


def _rates(call: Callable[[], object], work: float, seconds: float) -> list[float]:
    call()
    rates: list[float] = []
    start = perf_counter()
    while len(rates) < 2 or perf_counter() - start < seconds:
        before = perf_counter()
        call()
        rates.append(work / max(perf_counter() - before, 1e-9))
    return rates


def _private(folder: Path) -> bool:
    """Whether the folder exists, is no link, and nobody else can write to it."""
    try:
        status = folder.lstat()
    except OSError:
        return False
    if os.name != "posix":
        return stat.S_ISDIR(status.st_mode)
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o022


def _digest(key: str, rates: dict[str, float]) -> str:
    return hashlib.sha256(json.dumps([FORMAT, key, sorted(rates.items())]).encode()).hexdigest()


def _read(path: Path, key: str) -> Peaks | None:
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
    except OSError:
        return None
    try:
        with os.fdopen(descriptor, encoding="utf-8") as file:
            content = json.load(file)
        peaks = Peaks(**{name: float(content["rates"][name]) for name in ("flops", "bandwidth")})
        if content["digest"] != _digest(key, asdict(peaks)):
            raise ValueError("the digest does not fit the content")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        warnings.warn(f"measuring this CPU again, because {path} is damaged: {error!r}", RuntimeWarning, stacklevel=4)
        return None
    return peaks


def _write(path: Path, key: str, peaks: Peaks) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not _private(path.parent):
        return
    path.parent.chmod(0o700)
    rates = asdict(peaks)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".tmp")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump({"rates": rates, "digest": _digest(key, rates)}, file)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(path)
    except OSError:
        Path(temporary).unlink(missing_ok=True)
        raise
