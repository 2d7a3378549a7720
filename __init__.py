"""torchlathe: a compiler-pass based graph optimizer for PyTorch inference."""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Load the folders, and the public names of the optimizer, on first use: importing the package is cheap."""
    if name.startswith("_") or name == "pytest_plugins":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in ("optimizer", "passes", "codegen", "targets"):
        return import_module(f".{name}", __name__)
    try:
        return getattr(import_module(".optimizer", __name__), name)
    except AttributeError:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None


def __dir__() -> list[str]:
    return sorted([*globals(), *import_module(".optimizer", __name__).__all__])
