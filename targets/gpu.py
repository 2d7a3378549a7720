"""This host's GPU, as torch sees it, matched with the documented row of its architecture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from . import amd, nvidia
from .target import NoDeviceError, Target


def detect_cuda(index: int = 0) -> Target:
    """The GPU that torch calls ``cuda:<index>``, as the target named ``cuda``. Imports torch.

    Sizes and counts come from the device. Peak rates come from the row of its architecture, or of the nearest older
    one, scaled by the number of multiprocessors; the bandwidth from the device's memory clock where torch reports it.

    Raises:
        NoDeviceError: if torch sees no GPU.
    """
    import torch

    if not torch.cuda.is_available():
        raise NoDeviceError(
            "this host has no GPU that torch can use; to compile ahead of time for one, name its architecture as the "
            "target, such as nvidia-sm90 or amd-gfx942 (`torchlathe targets` lists all)"
        )
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        return _from_amd(properties)
    return _from_nvidia(properties)


def _from_nvidia(properties: Any) -> Target:
    capability = (properties.major, properties.minor)
    known = [row for row in nvidia.rows() if _capability(row) <= capability]
    row = known[-1] if known else nvidia.rows()[0]
    has = nvidia.features(*capability)
    shared = getattr(properties, "shared_memory_per_multiprocessor", row.caches[0])
    found = _merge(row, properties, mcpu=f"sm_{capability[0]}{capability[1]}", caches=(shared, *row.caches[1:]))
    return replace(found, features=has, dtypes=nvidia.dtypes(has))


def _from_amd(properties: Any) -> Target:
    arch = str(properties.gcnArchName).split(":")[0]
    rows = amd.rows()
    row = next((r for r in rows if r.mcpu == arch), rows[0])
    return _merge(row, properties, mcpu=arch, caches=row.caches)


def _capability(row: Target) -> tuple[int, int]:
    digits = row.mcpu.removeprefix("sm_")
    return int(digits[:-1]), int(digits[-1])


def _merge(row: Target, properties: Any, *, mcpu: str, caches: Sequence[int]) -> Target:
    cores = int(properties.multi_processor_count)
    level2 = int(getattr(properties, "L2_cache_size", 0)) or caches[1]
    bandwidth, bandwidth_source = _bandwidth(row, properties)
    device = "torch.cuda.get_device_properties"
    return replace(
        row,
        name="cuda",
        cores=cores,
        flops={dtype: value * cores / row.cores for dtype, value in row.flops.items()},
        bandwidth=bandwidth,
        caches=(caches[0], level2, *caches[2:]),
        memory=int(properties.total_memory),
        mcpu=mcpu,
        model=str(properties.name),
        source={
            "flops": f"{row.name} ({row.source['flops']}), scaled by the number of multiprocessors",
            "bandwidth": bandwidth_source,
            **dict.fromkeys(("cores", "caches", "memory"), device),
        },
    )


def _bandwidth(row: Target, properties: Any) -> tuple[float, str]:
    kilohertz = int(getattr(properties, "memory_clock_rate", 0))
    bits = int(getattr(properties, "memory_bus_width", 0))
    if kilohertz and bits:
        return 2 * kilohertz * 1e3 * bits / 8, "memory clock and bus width of the device, double data rate"
    return row.bandwidth, f"{row.name} ({row.source['bandwidth']})"
