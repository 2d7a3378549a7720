"""What compiled code and measured times depend on besides the device."""

from __future__ import annotations

import functools
import hashlib
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch


@functools.cache
def versions() -> dict[str, str]:
    """Versions of everything that an artefact depends on, and the system that its libraries are for."""
    try:
        tvm = version("apache-tvm")
    except PackageNotFoundError:
        tvm = ""
    own = str(getattr(sys.modules[__name__.partition(".")[0]], "__version__", ""))
    system = f"{sys.platform} {platform.machine()}"
    return {"torchlathe": own, "torch": str(torch.__version__), "tvm": tvm, "python": platform.python_version(),
            "system": system}  # fmt: skip


@functools.cache
def fingerprint_of_code() -> str:
    """Hash of the sources that generate and run kernels: what was measured with other ones does not count."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
