"""Facts about hardware: one frozen row per target."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Target:
    """What the compiler may know about one kind of hardware.

    Attributes:
        name: text name, such as ``x86-64-v4`` or ``nvidia-sm90``.
        device: the torch device type, ``cpu`` or ``cuda``.
        vendor: ``intel``, ``amd``, ``arm``, ``nvidia`` or ``generic``.
        cores: CPU cores, or streaming multiprocessors / compute units.
        flops: peak floating point (or integer) operations per second by dtype name, dense; no entry where unknown.
        bandwidth: main memory bandwidth in bytes per second.
        caches: sizes in bytes from the innermost level outwards (L1d, L2, L3; on GPUs shared memory and L2).
        memory: size of the main memory in bytes.
        dtypes: dtype names that the hardware computes in.
        features: instruction sets or capabilities, such as ``avx512f`` or ``tma``.
        backends: text names of the backends that can lower for it, best first.
        vector_bits: width of one vector register (CPU) or warp size in lanes (GPU).
        mcpu: processor name for LLVM (CPU), or architecture name (GPU), such as ``sm_90`` or ``gfx942``.
        source: where each figure comes from.
        model: the chip that the figures belong to.
    """

    name: str
    device: str
    vendor: str
    cores: int
    flops: Mapping[str, float]
    bandwidth: float
    caches: tuple[int, ...]
    memory: int
    dtypes: tuple[str, ...]
    features: frozenset[str] = frozenset()
    backends: tuple[str, ...] = ("eager",)
    vector_bits: int = 128
    mcpu: str = ""
    source: Mapping[str, str] = field(default_factory=dict)
    model: str = ""

    @property
    def second_cache(self) -> int:
        """Bytes of the second level of cache; a megabyte where it is not known."""
        return self.caches[1] if len(self.caches) > 1 else 1 << 20


class UnknownTargetError(KeyError):
    """No target of that name; the message lists near matches."""

    def __str__(self) -> str:  # KeyError would print the repr of the message
        return str(self.args[0])


class NoDeviceError(RuntimeError):
    """This host lacks the device that was asked for; the message names a way that works without it."""


def fingerprint(target: Target) -> str:
    """Hash of everything that compiled code and measured times depend on: 64 hexadecimal digits.

    Measured figures (`flops`, `bandwidth`) are left out, because they differ from run to run on one machine, and so
    is `memory`, whose reported size changes with the kernel version.
    """
    facts = {
        "name": target.name,
        "device": target.device,
        "vendor": target.vendor,
        "model": target.model,
        "cores": target.cores,
        "caches": list(target.caches),
        "features": sorted(target.features),
        "vector_bits": target.vector_bits,
        "mcpu": target.mcpu,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
