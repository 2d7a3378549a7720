"""Records: an append-only log of measurements that many processes may share.

One line per record: the CRC-32 of the rest of the line, a space, and a JSON object with a key and a value. Appending
takes a file lock, writes all lines of a batch at once and waits until they are on the disk, so a record that
`add` returned for survives the end of the process. Reading continues where the last reading stopped. Lines that are
torn or damaged are set aside in a file of their own, with one warning, and the log is written again without them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import warnings
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from .folder import private_folder

LOCK_SECONDS = 10.0  # to wait for another process; a batch takes milliseconds
NAME = "measurements.jsonl"

Value = Any  # plain JSON


def key_of(*parts: Any) -> str:
    """Content hash of plain values: the key of what they describe."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:40]


@dataclass
class Records:
    """The log in `folder`; None keeps records in memory only.

    Attributes:
        folder: a private folder; it is made if it is missing.
        problem: why nothing is written, None if records are kept on disk.
        found: number of keys that were looked up and present.
        missed: number of keys that were looked up and absent.
    """

    folder: Path | None = None
    problem: str | None = None
    found: int = 0
    missed: int = 0
    _known: dict[str, Value] = field(default_factory=dict, repr=False)
    _read: tuple[int, int] = (0, 0)  # inode and size of what has been read

    def __post_init__(self) -> None:
        if self.folder is None:
            self.problem = "records are kept in memory only"
            return
        if private_folder(self.folder) is None:
            self.problem = f"measurements are not recorded: {self.folder} is no folder that only this user can write"
        self._refresh()

    def get(self, key: str) -> Value | None:
        """The latest value of a key, None if there is none."""
        if key not in self._known:
            self._refresh()
        if key in self._known:
            self.found += 1
        else:
            self.missed += 1
        return self._known.get(key)

    def add(self, values: Mapping[str, Value]) -> None:
        """Append a batch. Where the disk refuses, records stay in memory and `problem` says why."""
        self._known.update(values)
        if self.problem is not None or self.folder is None or not values:
            return
        data = b"".join(_line(k, v) for k, v in values.items())
        try:
            with self._locked(), (self.folder / NAME).open("ab") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except (OSError, Timeout) as error:
            self.problem = f"measurements are not recorded: {error}"

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        assert self.folder is not None
        with FileLock(self.folder / f"{NAME}.lock", timeout=LOCK_SECONDS, mode=0o600):
            yield

    def _refresh(self) -> None:
        """Read what was appended since the last time."""
        if self.folder is None:
            return
        path = self.folder / NAME
        try:
            facts = path.stat()
            same_file = self._read[0] == facts.st_ino and self._read[1] <= facts.st_size
            done = self._read[1] if same_file else 0
            if done == facts.st_size:
                return
            with path.open("rb") as file:
                file.seek(done)
                data = file.read()
        except OSError:
            return  # no log yet, or none that may be read
        whole = data.rfind(b"\n") + 1  # a line without end may still be being written
        good, bad = _parse(data[:whole])
        self._known.update(good)
        self._read = (facts.st_ino, done + whole)
        if bad or (whole < len(data) and not self._being_written()):
            self._repair()

    def _being_written(self) -> bool:
        """Whether another process holds the lock."""
        try:
            with FileLock(f"{self.folder}/{NAME}.lock", timeout=0, mode=0o600):
                return False
        except (Timeout, OSError):
            return True

    def _repair(self) -> None:
        """Keep the damaged log aside and write one with its good lines."""
        assert self.folder is not None
        if self.problem is not None:
            return
        path = self.folder / NAME
        try:
            with self._locked():
                data = path.read_bytes()
                good, bad = _parse(data)
                if not bad and (not data or data.endswith(b"\n")):
                    return  # another process was faster
                aside = tempfile.NamedTemporaryFile(prefix=f"{NAME}.damaged-", dir=self.folder, delete=False)  # noqa: SIM115
                with aside:
                    aside.write(data)
                fresh = self.folder / f"{NAME}.new"
                with fresh.open("wb") as file:
                    file.write(b"".join(_line(k, v) for k, v in good.items()))
                    file.flush()
                    os.fsync(file.fileno())
                fresh.replace(path)
        except (OSError, Timeout) as error:
            self.problem = f"the damaged log of measurements cannot be repaired: {error}"
            return
        self._known.update(good)
        self._read = (path.stat().st_ino, path.stat().st_size)
        kept = Path(aside.name).name
        warnings.warn(f"{max(bad, 1)} damaged lines in {path}: the log was set aside as {kept} and rebuilt",
                      stacklevel=4)  # fmt: skip


def _line(key: str, value: Value) -> bytes:
    text = json.dumps({"key": key, "value": value}, allow_nan=False, separators=(",", ":")).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def _parse(data: bytes) -> tuple[dict[str, Value], int]:
    """Records by key, and the number of damaged lines."""
    good: dict[str, Value] = {}
    bad = 0
    for line in data.split(b"\n")[: None if data and not data.endswith(b"\n") else -1]:
        checksum, _, text = line.partition(b" ")
        try:
            if int(checksum, 16) != zlib.crc32(text):
                raise ValueError
            entry = json.loads(text)
            good[str(entry["key"])] = entry["value"]
        except (ValueError, KeyError, TypeError):
            bad += 1
    return good, bad
