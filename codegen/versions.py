"""What compiled code and measured times depend on besides the device."""

from __future__ import annotations

import functools
import platform
import sys
from importlib.metadata import PackageNotFoundError, version

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
