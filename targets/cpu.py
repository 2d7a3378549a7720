"""CPUs: this host, detected, and documented rows to compile for other hosts."""

from __future__ import annotations

import hashlib
import os
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .peaks import METHOD, cached_peaks, measure_peaks
from .target import Target

KIB, MIB, GIB = 2**10, 2**20, 2**30
SYSTEM_CPUS = Path("/sys/devices/system/cpu")
ABI = "x86-64 psABI, microarchitecture levels"

X86_V3 = frozenset({"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe"})
X86_V4 = X86_V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
# Names as the Linux kernel prints them; only those that decide which code can run or pays off.
INTERESTING = X86_V4 | {
    *("sse4_1", "sse4_2", "avx_vnni", "avx512_vnni", "avx512_bf16", "avx512_fp16", "avx512vbmi", "avx512ifma"),
    *("amx_tile", "amx_int8", "amx_bf16", "amx_fp16"),
    *("asimd", "asimdhp", "asimddp", "bf16", "i8mm", "sve", "sve2", "sme"),
}
# Operations per float32 operation of the widest instruction that multiplies and adds this dtype.
FASTER = {
    "float16": {"avx512_fp16": 2.0, "asimdhp": 2.0},
    "bfloat16": {"amx_bf16": 16.0, "avx512_bf16": 2.0, "bf16": 2.0},
    "int8": {"amx_int8": 32.0, "avx512_vnni": 4.0, "avx_vnni": 4.0, "asimddp": 4.0},
}


@dataclass(frozen=True)
class Chip:
    """What the operating system says about the processor."""

    vendor: str
    model: str
    flags: frozenset[str]


def detect_cpu(folder: Path | None = None) -> Target:
    """This host's CPU, as the target named ``cpu``.

    Peak rates are measured once (about 0.3 s) and stored in `folder`, by default the user's cache folder.
    """
    import psutil

    chip = read_chip()
    cores = available_cores()
    caches, caches_source = read_caches()
    memory = int(psutil.virtual_memory().total)
    facts = [chip.model, sorted(chip.flags), cores, caches, memory // GIB, platform.machine(), METHOD]
    key = hashlib.sha256(repr(facts).encode()).hexdigest()
    in_caches = caches[-1] + cores * sum(caches[1:-1])
    peaks = cached_peaks(key, lambda: measure_peaks(cores, in_caches, memory), folder)
    flops = peak_rates(peaks.flops, chip.flags)
    return Target(
        name="cpu",
        device="cpu",
        vendor=chip.vendor,
        cores=cores,
        flops=flops,
        bandwidth=peaks.bandwidth,
        caches=caches,
        memory=memory,
        dtypes=tuple(flops),
        features=chip.flags & INTERESTING,
        backends=("tvm", "eager"),
        vector_bits=vector_bits(chip.flags),
        mcpu=level(chip.flags),
        source={
            "flops": "float32: measured on one core, times the cores; others: by the width of their instructions",
            "bandwidth": "measured addition of two arrays larger than the caches",
            "caches": caches_source,
            "features": "operating system",
            "cores": "process affinity",
            "memory": "operating system",
        },
        model=chip.model,
    )


def llvm_cpu() -> str:
    """LLVM's name of this host's processor, such as ``znver4``. Imports tvm (seconds); without it, the ISA level."""
    try:
        from tvm.target import codegen
    except ImportError:
        return level(read_chip().flags)
    return str(codegen.llvm_get_system_cpu())


def read_chip(cpuinfo: Path = Path("/proc/cpuinfo")) -> Chip:
    """Vendor, model name and instruction sets, from Linux, else from py-cpuinfo (about a second)."""
    try:
        text = cpuinfo.read_text(errors="replace")
    except OSError:
        return _chip_elsewhere()
    first = dict[str, str]()
    for line in text.splitlines():
        name, _, value = line.partition(":")
        first.setdefault(name.strip().lower(), value.strip())
    flags = frozenset((first.get("flags") or first.get("features") or "").lower().split())
    identity = first.get("vendor_id") or first.get("cpu implementer") or ""
    model = first.get("model name") or f"{identity} part {first.get('cpu part', 'unknown')}"
    detail = [first.get(name, "?") for name in ("cpu family", "model", "stepping")]
    return Chip(_vendor(identity), f"{model} ({'/'.join(detail)})" if "cpu family" in first else model, flags)


def available_cores() -> int:
    """Physical cores that this process may run on (hardware threads of one core count once)."""
    try:
        allowed = os.sched_getaffinity(0)
    except AttributeError:  # only Linux has affinities
        import psutil

        return int(psutil.cpu_count(logical=False) or os.cpu_count() or 1)
    siblings = set[str]()
    for cpu in allowed:
        try:
            siblings.add((SYSTEM_CPUS / f"cpu{cpu}/topology/thread_siblings_list").read_text().strip())
        except OSError:
            siblings.add(str(cpu))
    return len(siblings)


def read_caches(folder: Path = SYSTEM_CPUS / "cpu0/cache") -> tuple[tuple[int, ...], str]:
    """Sizes in bytes of the data caches of one core, from L1 outwards, and where they were read."""
    sizes = dict[int, int]()
    for index in sorted(folder.glob("index*")):
        try:
            kind, level_text, size = ((index / name).read_text().strip() for name in ("type", "level", "size"))
        except OSError:
            continue
        match = re.fullmatch(r"(\d+)([KMG]?)", size)
        if kind in ("Data", "Unified") and match:
            sizes[int(level_text)] = int(match[1]) * {"": 1, "K": KIB, "M": MIB, "G": GIB}[match[2]]
    if sizes:
        return tuple(size for _, size in sorted(sizes.items())), "operating system"
    return (32 * KIB, 512 * KIB, 4 * MIB), "assumed, because the operating system does not say"


def peak_rates(float32: float, flags: frozenset[str]) -> dict[str, float]:
    """Peaks by dtype name, from that of float32 and the widths of the instructions that are there."""
    rates = {"float64": float32 / 2, "float32": float32}
    for dtype, factors in FASTER.items():
        factor = max((f for flag, f in factors.items() if flag in flags), default=0.0)
        if factor:
            rates[dtype] = float32 * factor
    return rates


def vector_bits(flags: frozenset[str]) -> int:
    """Width of the vector registers that code for these instruction sets uses."""
    if "avx512f" in flags:
        return 512
    return 256 if "avx" in flags else 128  # SVE code that must run on any width is compiled for 128


def level(flags: frozenset[str]) -> str:
    """The most specific LLVM processor name that the instruction sets alone prove safe."""
    # the kernel calls LZCNT, which level 3 asks for, abm
    if flags >= X86_V3 | {"abm"}:
        return "x86-64-v4" if flags >= X86_V4 else "x86-64-v3"
    return "x86-64" if "sse2" in flags else "generic"


def rows() -> tuple[Target, ...]:
    """Documented rows. Peaks: cores x base clock x operations per cycle of the vector units, in closed form."""
    return (
        _row(
            "x86-64-v3",
            ("amd", "EPYC 7763 (Zen 3)", X86_V3 | {"sse4_1", "sse4_2"}),
            clock=(64, 2.45e9, 32),
            memory=(204.8e9, 4096 * GIB),
            caches=(32 * KIB, 512 * KIB, 32 * MIB),
            source={
                "cores": "AMD EPYC 7763 product page (64 cores, 2.45 GHz base)",
                "flops": "two 256-bit FMA per cycle: Software Optimization Guide for AMD Family 19h Processors",
                "bandwidth": "AMD EPYC 7763 product page (per socket)",
                "memory": "AMD EPYC 7003 series product brief (maximum per socket)",
                "caches": "Software Optimization Guide for AMD Family 19h Processors (L3: of one core complex)",
                "features": ABI,
            },
        ),
        _row(
            "x86-64-v4",
            ("intel", "Xeon Platinum 8380 (Ice Lake)", X86_V4 | {"sse4_1", "sse4_2"}),
            clock=(40, 2.3e9, 64),
            memory=(204.8e9, 6144 * GIB),
            caches=(48 * KIB, 1280 * KIB, 60 * MIB),
            source={
                "cores": "Intel ARK, Xeon Platinum 8380 (40 cores, 2.3 GHz base)",
                "flops": "two 512-bit FMA per cycle: Intel ARK, Xeon Platinum 8380",
                "bandwidth": "eight channels of DDR4-3200: Intel ARK, Xeon Platinum 8380",
                "memory": "Intel ARK, Xeon Platinum 8380 (maximum)",
                "caches": "Intel 64 and IA-32 Optimization Reference Manual, Ice Lake server; L3: Intel ARK",
                "features": ABI,
            },
        ),
        _row(
            "aarch64-neoverse",
            ("arm", "Neoverse V1 (AWS Graviton3)", frozenset({"asimd", "asimdhp", "asimddp", "bf16", "i8mm", "sve"})),
            clock=(64, 2.6e9, 32),
            memory=(307.2e9, 128 * GIB),
            caches=(64 * KIB, MIB, 32 * MIB),
            source={
                "cores": "AWS, Amazon EC2 C7g instances (64 cores, 2.6 GHz)",
                "flops": "two 256-bit SVE FMLA per cycle: Arm Neoverse V1 Software Optimization Guide",
                "bandwidth": "eight channels of DDR5-4800: AWS re:Invent 2021, Graviton3",
                "memory": "AWS, c7g.16xlarge",
                "caches": "Arm Neoverse V1 Technical Reference Manual; L3: AWS Graviton technical guide",
                "features": "Arm Neoverse V1 Technical Reference Manual",
            },
            mcpu="neoverse-v1",
            vector=256,
        ),
    )


def _row(
    name: str,
    chip: tuple[str, str, frozenset[str]],
    *,
    clock: tuple[int, float, int],
    memory: tuple[float, int],
    caches: tuple[int, ...],
    source: Mapping[str, str],
    mcpu: str = "",
    vector: int = 0,
) -> Target:
    vendor, model, flags = chip
    cores, hertz, per_cycle = clock
    flops = peak_rates(cores * hertz * per_cycle, flags)
    return Target(
        name=name,
        device="cpu",
        vendor=vendor,
        cores=cores,
        flops=flops,
        bandwidth=memory[0],
        caches=caches,
        memory=memory[1],
        dtypes=tuple(flops),
        features=flags,
        backends=("tvm", "eager"),
        vector_bits=vector or vector_bits(flags),
        mcpu=mcpu or name,
        source=source,
        model=model,
    )


def _vendor(identity: str) -> str:
    known = {"authenticamd": "amd", "genuineintel": "intel", "0x41": "arm", "hygongenuine": "amd"}
    return known.get(identity.lower(), "generic")


def _chip_elsewhere() -> Chip:
    import cpuinfo

    info = cpuinfo.get_cpu_info()
    flags = frozenset(str(flag).lower() for flag in info.get("flags", ()))
    identity = str(info.get("vendor_id_raw", ""))
    vendor = "arm" if str(info.get("arch", "")).upper().startswith("ARM") else _vendor(identity)
    return Chip(vendor, str(info.get("brand_raw", platform.processor() or "unknown")), flags)
