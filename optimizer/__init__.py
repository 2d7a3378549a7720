"""The front door. Names are loaded on first use, so that importing the package costs nothing."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "optimize": ".api",
    "explain": ".api",
    "Quality": ".quality",
    "Report": ".report",
    "load": ".api",
    "Executable": "..codegen.executable",
}
__all__ = ["Executable", "Quality", "Report", "explain", "load", "optimize"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name], __package__), name)
