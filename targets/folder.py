"""The folder that outlives a process: measured peaks, records of measurements, compiled kernels."""

from __future__ import annotations

import os
import stat
from pathlib import Path


def cache_folder() -> Path:
    """``TORCHLATHE_CACHE`` if it is set, else ``torchlathe`` in the user's cache folder. It may not exist yet."""
    named = os.environ.get("TORCHLATHE_CACHE")
    if named:
        return Path(named)
    import platformdirs  # not needed, and not demanded, where the folder is named

    return platformdirs.user_cache_path("torchlathe", appauthor=False)


def private_folder(folder: Path) -> Path | None:
    """The folder, made if needed, if it is a real one of this user's that nobody else can write; None otherwise."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        facts = folder.lstat()
        if not stat.S_ISDIR(facts.st_mode) or (hasattr(os, "getuid") and facts.st_uid != os.getuid()):
            return None
        if facts.st_mode & 0o077:
            folder.chmod(0o700)
    except OSError:
        return None
    return folder if os.access(folder, os.W_OK) else None
