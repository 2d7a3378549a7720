"""AMD GPUs: one row per architecture, for compiling ahead of time and for estimates."""

from __future__ import annotations

from .target import Target

GIB = 2**30
ROCM = "ROCm documentation, accelerator and GPU hardware specifications"


def rows() -> tuple[Target, ...]:
    """All rows. Peaks are dense matrix-core figures, without sparsity."""
    return (_gfx90a(), _gfx942())


def _gfx90a() -> Target:
    sheet = "AMD Instinct MI250X data sheet, half of the module: one of its two dies, which is one device to programs"
    tera = {"float64": 47.85, "float32": 47.85, "bfloat16": 191.5, "float16": 191.5, "int8": 191.5}
    return Target(
        name="amd-gfx90a",
        device="cuda",  # torch names ROCm devices so
        vendor="amd",
        cores=110,
        flops={dtype: value * 1e12 for dtype, value in tera.items()},
        bandwidth=1638.4e9,
        caches=(64 * 2**10, 8 * 2**20),
        memory=64 * GIB,
        dtypes=("float64", "float32", "float16", "bfloat16", "int8"),
        features=frozenset({"mfma", "bf16", "int8_mma"}),
        backends=("triton", "eager"),
        vector_bits=64,
        mcpu="gfx90a",
        source={"flops": sheet, "bandwidth": sheet, "memory": sheet, "cores": sheet, "caches": ROCM},
        model="MI250X, one die",
    )


def _gfx942() -> Target:
    sheet = "AMD Instinct MI300X data sheet"
    tera = {
        "float64": 163.4,
        "float32": 163.4,
        "tfloat32": 653.7,
        "bfloat16": 1307.4,
        "float16": 1307.4,
        "float8_e4m3fnuz": 2614.9,
        "int8": 2614.9,
    }
    return Target(
        name="amd-gfx942",
        device="cuda",  # torch names ROCm devices so
        vendor="amd",
        cores=304,
        flops={dtype: value * 1e12 for dtype, value in tera.items()},
        bandwidth=5300e9,
        # the L2 is 4 MiB on each of eight dies; behind it lies a shared memory-side cache
        caches=(64 * 2**10, 32 * 2**20, 256 * 2**20),
        memory=192 * GIB,
        dtypes=("float64", "float32", "float16", "tfloat32", "bfloat16", "int8", "float8_e4m3fnuz"),
        features=frozenset({"mfma", "bf16", "int8_mma", "tf32", "fp8"}),
        backends=("triton", "eager"),
        vector_bits=64,
        mcpu="gfx942",
        source={"flops": sheet, "bandwidth": sheet, "memory": sheet, "cores": sheet, "caches": ROCM},
        model="MI300X",
    )
