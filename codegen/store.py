"""Compiled kernels on disk: files named by the hash of their content, in a folder that only this user can write."""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..targets.folder import cache_folder, private_folder
from .container import write_atomically


@contextmanager
def library_file(data: bytes) -> Iterator[Path]:
    """A file with this content that only this user can write: in the cache folder, or else in a temporary one."""
    digest = keep(data)
    if digest is not None:
        yield _path(digest)
        return
    with tempfile.TemporaryDirectory() as temporary:  # a loaded library outlives its file
        path = Path(temporary) / f"{hashlib.sha256(data).hexdigest()}.so"
        write_atomically(path, [data])
        yield path


def keep(data: bytes, source: str = "") -> str | None:
    """Store a library, and beside it the text it was made from; its name, or None where the folder cannot be used."""
    if private_folder(cache_folder() / "kernels") is None:
        return None
    digest = hashlib.sha256(data).hexdigest()
    path = _path(digest)
    if not _holds(path, digest):
        with suppress(OSError):
            write_atomically(path, [data])
    if source:
        with suppress(OSError):
            write_atomically(path.with_suffix(".txt"), [source.encode()])
    return digest if _holds(path, digest) else None


def kept(digest: str) -> tuple[Path, str] | None:
    """The library of that name and its source, None if it is missing or damaged."""
    if not digest.isalnum() or private_folder(cache_folder() / "kernels") is None or not _holds(_path(digest), digest):
        return None
    try:
        source = _path(digest).with_suffix(".txt").read_text(errors="replace")
    except OSError:
        source = ""
    return _path(digest), source


def _path(digest: str) -> Path:
    return cache_folder() / "kernels" / f"{digest}.so"


def _holds(path: Path, digest: str) -> bool:
    """Whether the path is a regular file with this content; a damaged one is reported once and then replaced."""
    try:
        file = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    except OSError:
        return False
    with os.fdopen(file, "rb") as opened:
        regular = stat.S_ISREG(os.fstat(file).st_mode)
        good = regular and hashlib.sha256(opened.read()).hexdigest() == digest
    if not good:
        warnings.warn(f"the cached kernel {path} is damaged and is written again", stacklevel=3)
    return good
