"""Detection against what the operating system says, and the parsers on recorded text."""

from __future__ import annotations

import os
import re
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from torchlathe.targets import cpu
from torchlathe.targets.cpu import (
    Chip,
    available_cores,
    detect_cpu,
    level,
    llvm_cpu,
    peak_rates,
    read_caches,
    read_chip,
)
from torchlathe.targets.target import Target, fingerprint

linux = pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="reads /proc/cpuinfo")

ZEN = """\
processor\t: 0
vendor_id\t: AuthenticAMD
cpu family\t: 25
model\t\t: 17
model name\t: AMD EPYC 9R14
stepping\t: 1
flags\t\t: fpu sse2 sse4_1 sse4_2 movbe avx f16c abm bmi1 avx2 bmi2 fma avx512f avx512dq avx512cd avx512bw avx512vl avx512_bf16
processor\t: 1
vendor_id\t: AuthenticAMD
flags\t\t: fpu
"""  # noqa: E501
GRAVITON = """\
processor\t: 0
BogoMIPS\t: 2100.00
Features\t: fp asimd aes asimdhp asimddp sve bf16 i8mm
CPU implementer\t: 0x41
CPU architecture: 8
CPU part\t: 0xd40
"""


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Target:
    return detect_cpu(tmp_path_factory.mktemp("cache") / "torchlathe")


@linux
def test_features_are_those_of_the_operating_system(host: Target) -> None:
    text = Path("/proc/cpuinfo").read_text().lower()
    flags = set(re.search(r"^(?:flags|features)\s*:(.*)$", text, re.MULTILINE)[1].split())  # type: ignore[index]
    assert host.features == flags & cpu.INTERESTING
    if "avx512f" in flags:
        assert host.vector_bits == 512
    if {"avx2", "fma"} <= flags:
        assert host.mcpu in ("x86-64-v3", "x86-64-v4")


def test_detected_figures_are_plausible(host: Target) -> None:
    assert (host.name, host.device) == ("cpu", "cpu")
    assert 1 <= host.cores <= (os.cpu_count() or 1)
    assert list(host.caches) == sorted(host.caches) and 8 * 2**10 <= host.caches[0] <= 2**20
    assert host.memory > 2**28
    assert 1e8 < host.bandwidth < 1e13 and 1e8 < host.flops["float32"] < 1e15
    assert set(host.dtypes) == set(host.flops) >= {"float32", "float64"}
    assert host.backends[-1] == "eager"
    assert {"flops", "bandwidth", "caches"} <= set(host.source)


@linux
def test_memory_is_that_of_the_operating_system(host: Target) -> None:
    kilobytes = int(re.search(r"MemTotal:\s+(\d+)", Path("/proc/meminfo").read_text())[1])  # type: ignore[index]
    assert host.memory == kilobytes * 1024


@linux
def test_second_detection_is_fast_and_equal(tmp_path: Path) -> None:
    first = detect_cpu(tmp_path / "c")
    start = time.thread_time()  # not the time for which others hold the cores, or threads of the first call still spin
    second = detect_cpu(tmp_path / "c")
    took = time.thread_time() - start
    assert fingerprint(first) == fingerprint(second)
    if list((tmp_path / "c").glob("*.json")):  # a machine that is too busy stores nothing
        assert took < 0.1
        assert second == first


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs process affinity")
def test_cores_follow_the_affinity_of_the_process() -> None:
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert available_cores() == 1
    finally:
        os.sched_setaffinity(0, allowed)
    assert available_cores() <= len(allowed)


def test_hardware_threads_of_one_core_count_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, siblings in enumerate(("0,2", "1,3", "0,2", "1,3")):
        folder = tmp_path / f"cpu{number}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(siblings + "\n")
    monkeypatch.setattr(cpu, "SYSTEM_CPUS", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)
    assert available_cores() == 2
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 2, 9}, raising=False)
    assert available_cores() == 2  # the unknown one counts as a core of its own


def test_chips_are_read_from_recorded_text(tmp_path: Path) -> None:
    path = tmp_path / "cpuinfo"
    path.write_text(ZEN)
    chip = read_chip(path)
    assert (chip.vendor, chip.model) == ("amd", "AMD EPYC 9R14 (25/17/1)")
    assert {"avx512_bf16", "fma"} <= chip.flags and level(chip.flags) == "x86-64-v4"
    path.write_text(GRAVITON)
    chip = read_chip(path)
    assert (chip.vendor, level(chip.flags)) == ("arm", "generic")
    assert "0xd40" in chip.model and cpu.vector_bits(chip.flags) == 128
    path.write_text("")
    assert read_chip(path) == Chip("generic", " part unknown", frozenset())


def test_elsewhere_py_cpuinfo_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = {"vendor_id_raw": "GenuineIntel", "brand_raw": "Core i7", "flags": ["AVX2", "fma"]}
    monkeypatch.setitem(sys.modules, "cpuinfo", SimpleNamespace(get_cpu_info=lambda: answer))
    assert read_chip(tmp_path / "missing") == Chip("intel", "Core i7", frozenset({"avx2", "fma"}))


def test_levels_ask_for_all_their_instruction_sets() -> None:
    full = cpu.X86_V4 | {"abm", "sse2"}
    assert level(full) == "x86-64-v4"
    assert level(full - {"avx512vl"}) == "x86-64-v3"
    assert level(full - {"bmi2"}) == "x86-64"
    assert level(full - {"abm"}) == "x86-64"


def test_caches_are_read_from_recorded_folders(tmp_path: Path) -> None:
    entries = [("1", "Data", "48K"), ("1", "Instruction", "32K"), ("2", "Unified", "2048K"), ("3", "Unified", "1G")]
    for number, values in enumerate(entries):
        folder = tmp_path / f"index{number}"
        folder.mkdir()
        for name, value in zip(("level", "type", "size"), values, strict=True):
            (folder / name).write_text(value + "\n")
    assert read_caches(tmp_path) == ((48 * 2**10, 2 * 2**20, 2**30), "operating system")
    sizes, source = read_caches(tmp_path / "missing")
    assert len(sizes) == 3 and "assumed" in source


def test_peaks_follow_the_widest_instructions() -> None:
    assert peak_rates(8.0, frozenset()) == {"float64": 4.0, "float32": 8.0}
    rates = peak_rates(8.0, frozenset({"avx512_vnni", "avx512_bf16", "amx_int8"}))
    assert rates["bfloat16"] == 16.0 and rates["int8"] == 256.0


def test_llvm_names_this_processor_and_does_without_tvm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tvm", None)
    monkeypatch.setitem(sys.modules, "tvm.target", None)
    assert llvm_cpu() == level(read_chip().flags)


def test_llvm_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    codegen = SimpleNamespace(llvm_get_system_cpu=lambda: "znver5")
    monkeypatch.setitem(sys.modules, "tvm", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "tvm.target", SimpleNamespace(codegen=codegen))
    assert llvm_cpu() == "znver5"


def test_fingerprint_depends_on_the_machine_and_not_on_measurements(host: Target) -> None:
    base = fingerprint(host)
    assert re.fullmatch(r"[0-9a-f]{64}", base)
    assert fingerprint(replace(host, flops={"float32": 1.0}, bandwidth=2.0)) == base
    reordered = frozenset(sorted(host.features, reverse=True))
    assert fingerprint(replace(host, features=reordered)) == base
    changes = [
        {"vendor": "x"},
        {"model": "x"},
        {"cores": 999},
        {"mcpu": "x"},
        {"features": host.features | {"x"}},
        {"vector_bits": 64},
        {"caches": (1, 2, 3)},
        {"device": "cuda"},
    ]
    assert len({base, *(fingerprint(replace(host, **change)) for change in changes)}) == 1 + len(changes)  # type: ignore[arg-type]
