"""Names, documented rows, and the detection of GPUs on recorded device properties."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from torchlathe.targets import NoDeviceError, Target, UnknownTargetError, detect, get, names
from torchlathe.targets.gpu import detect_cuda

ROWS = [name for name in names() if name not in ("cpu", "cuda")]


def test_names() -> None:
    assert set(names()) == {
        *("cpu", "cuda", "x86-64-v3", "x86-64-v4", "aarch64-neoverse"),
        *(f"nvidia-sm{capability}" for capability in (75, 80, 86, 89, 90, 100)),
        *("amd-gfx90a", "amd-gfx942"),
    }


@pytest.mark.parametrize("name", ROWS)
def test_every_row_is_complete_and_sourced(name: str) -> None:
    row = get(name)
    assert row.name == name and row.model and row.mcpu
    assert row.device == ("cpu" if row.vendor in ("intel", "arm") or name.startswith("x86") else "cuda")
    assert set(row.flops) <= set(row.dtypes) and {"float32", "float64"} <= set(row.flops)
    assert all(1e11 < value < 1e16 for value in row.flops.values())
    assert 1e11 < row.bandwidth < 1e13
    assert list(row.caches) == sorted(row.caches) and len(row.caches) >= 2
    assert row.memory >= 16 * 2**30 and row.cores > 8
    assert row.backends[-1] == "eager"
    assert {"flops", "bandwidth", "memory", "cores"} <= set(row.source) and all(row.source.values())


@pytest.mark.parametrize(
    ("name", "dtype", "per_core_per_cycle", "hertz"),
    [
        # the same peaks from the other end: multiprocessors x operations per cycle x boost clock
        ("nvidia-sm75", "float16", 1024, 1.59e9),
        ("nvidia-sm80", "bfloat16", 2048, 1.41e9),
        ("nvidia-sm80", "int8", 4096, 1.41e9),
        ("nvidia-sm86", "float32", 256, 1.695e9),
        ("nvidia-sm86", "bfloat16", 512, 1.695e9),
        ("nvidia-sm89", "float32", 256, 2.52e9),
        ("nvidia-sm89", "bfloat16", 512, 2.52e9),
        ("nvidia-sm90", "bfloat16", 4096, 1.83e9),
        ("nvidia-sm90", "float8_e4m3fn", 8192, 1.83e9),
        ("amd-gfx90a", "float16", 1024, 1.7e9),
        ("amd-gfx942", "bfloat16", 2048, 2.1e9),
        ("x86-64-v3", "float32", 32, 2.45e9),
        ("x86-64-v4", "float32", 64, 2.3e9),
        ("aarch64-neoverse", "float32", 32, 2.6e9),
    ],
)
def test_peaks_are_cores_times_rate_times_clock(name: str, dtype: str, per_core_per_cycle: int, hertz: float) -> None:
    row = get(name)
    assert row.flops[dtype] == pytest.approx(row.cores * per_core_per_cycle * hertz, rel=0.01)


def test_features_grow_with_the_capability() -> None:
    assert "bf16" not in get("nvidia-sm75").features and "bfloat16" not in get("nvidia-sm75").dtypes
    assert "bf16" in get("nvidia-sm80").features and "fp8" not in get("nvidia-sm86").features
    assert "fp8" in get("nvidia-sm89").features and "tma" not in get("nvidia-sm89").features
    assert {"tma", "wgmma", "fp8"} <= get("nvidia-sm90").features
    assert "tcgen05" in get("nvidia-sm100").features and "wgmma" not in get("nvidia-sm100").features


def test_unknown_name_lists_near_matches() -> None:
    with pytest.raises(UnknownTargetError, match=r"no target is named 'nvidia-sm9'.*nvidia-sm90") as caught:
        get("nvidia-sm9")
    assert isinstance(caught.value, KeyError) and not str(caught.value).startswith('"')
    with pytest.raises(UnknownTargetError, match="aarch64-neoverse"):
        get("zzz")  # nothing is near: all are listed


def test_without_a_gpu_the_error_names_the_way_ahead_of_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(NoDeviceError, match=r"ahead of time.*nvidia-sm90"):
        get("cuda")
    monkeypatch.setattr("torchlathe.targets.cpu.detect_cpu", lambda: get("x86-64-v3"))
    assert detect().device == "cpu"


def with_gpu(monkeypatch: pytest.MonkeyPatch, hip: str | None = None, **properties: object) -> Target:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(**properties))
    return detect_cuda()


H200 = {
    "name": "NVIDIA H200",
    "major": 9,
    "minor": 0,
    "multi_processor_count": 132,
    "total_memory": 150 * 10**9,
    "L2_cache_size": 60 * 2**20,
    "shared_memory_per_multiprocessor": 233472,
}


def test_a_gpu_is_matched_with_its_row(monkeypatch: pytest.MonkeyPatch) -> None:
    row = get("nvidia-sm90")
    found = with_gpu(monkeypatch, **H200)
    assert (found.name, found.device, found.mcpu, found.model) == ("cuda", "cuda", "sm_90", "NVIDIA H200")
    assert found.flops == row.flops and found.bandwidth == row.bandwidth
    assert (found.memory, found.caches) == (150 * 10**9, (233472, 60 * 2**20))
    assert found.features == row.features
    half = with_gpu(monkeypatch, **{**H200, "multi_processor_count": 66})
    assert half.flops["bfloat16"] == pytest.approx(row.flops["bfloat16"] / 2)
    assert detect() == half


def test_bandwidth_comes_from_the_memory_clock_where_it_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    found = with_gpu(monkeypatch, **H200, memory_clock_rate=3_201_000, memory_bus_width=6016)
    assert found.bandwidth == pytest.approx(4.8e12, rel=0.01)
    assert "clock" in found.source["bandwidth"]


def test_a_capability_without_a_row_takes_the_nearest_older_one(monkeypatch: pytest.MonkeyPatch) -> None:
    newer = with_gpu(monkeypatch, **{**H200, "major": 12, "minor": 0})
    assert newer.mcpu == "sm_120" and "nvidia-sm100" in newer.source["flops"]
    assert "tcgen05" not in newer.features and "tma" in newer.features
    between = with_gpu(monkeypatch, **{**H200, "major": 8, "minor": 7})
    assert between.mcpu == "sm_87" and "nvidia-sm86" in between.source["flops"]
    older = with_gpu(monkeypatch, **{**H200, "major": 6, "minor": 1})
    assert older.mcpu == "sm_61" and "tensor_cores" not in older.features and "int8" not in older.dtypes


def test_amd_devices_are_matched_by_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = {**H200, "name": "AMD Instinct MI300X", "gcnArchName": "gfx942:sramecc+:xnack-"}
    found = with_gpu(monkeypatch, hip="6.2", **{**properties, "multi_processor_count": 304, "L2_cache_size": 4 * 2**20})
    assert (found.name, found.vendor, found.mcpu, found.vector_bits) == ("cuda", "amd", "gfx942", 64)
    assert found.flops == get("amd-gfx942").flops


def test_importing_and_listing_targets_is_cheap() -> None:
    code = (
        "import torchlathe.targets as t, sys; t.names(); t.get('nvidia-sm90'); "
        "heavy = {'torch', 'tvm', 'triton', 'numpy'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
