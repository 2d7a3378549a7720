"""Facts about hardware, cost estimates and measuring. Importing this package imports neither torch nor numpy."""

from __future__ import annotations

from .catalog import detect, get, names
from .target import NoDeviceError, Target, UnknownTargetError, fingerprint

__all__ = ["NoDeviceError", "Target", "UnknownTargetError", "detect", "fingerprint", "get", "names"]
