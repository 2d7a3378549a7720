"""Targets by name."""

from __future__ import annotations

import difflib

from . import amd, cpu, gpu, nvidia
from .target import Target, UnknownTargetError

HOST_NAMES = ("cpu", "cuda")  # detected on this host; every other name is a documented row


def names() -> tuple[str, ...]:
    """Every name that `get` knows: this host's devices first, then the documented rows."""
    return (*HOST_NAMES, *(row.name for row in _rows()))


def get(name: str) -> Target:
    """The target of that name. ``cpu`` and ``cuda`` are detected on this host.

    Raises:
        UnknownTargetError: if there is none; the message lists near matches.
        NoDeviceError: for ``cuda`` on a host without a usable GPU.
    """
    if name == "cpu":
        return cpu.detect_cpu()
    if name == "cuda":
        return gpu.detect_cuda()
    found = {row.name: row for row in _rows()}
    if name in found:
        return found[name]
    near = difflib.get_close_matches(name, names(), n=3, cutoff=0.5) or names()
    raise UnknownTargetError(f"no target is named {name!r}; known names like it: {', '.join(near)}")


def detect() -> Target:
    """The fastest device of this host: its GPU if torch can use one, else its CPU. Imports torch."""
    import torch

    return gpu.detect_cuda() if torch.cuda.is_available() else cpu.detect_cpu()


def _rows() -> tuple[Target, ...]:
    return (*cpu.rows(), *nvidia.rows(), *amd.rows())
