"""NVIDIA GPUs: one row per compute capability, for compiling ahead of time and for estimates."""

from __future__ import annotations

from .target import Target

GIB = 2**30
TABLE = "CUDA C++ Programming Guide, table of technical specifications per compute capability"


def rows() -> tuple[Target, ...]:
    """All rows. Peaks are dense (no sparsity), with float32 accumulation where the document distinguishes."""
    return (_turing(), _ampere(), _ampere_desktop(), _ada(), _hopper(), _blackwell())


def features(major: int, minor: int) -> frozenset[str]:
    """What a compute capability offers to kernels.

    Source: PTX ISA reference, the target notes of mma, cp.async, cp.async.bulk.tensor, wgmma and tcgen05.
    """
    capability = (major, minor)
    since = {
        (7, 0): {"tensor_cores"},
        (7, 5): {"int8_mma"},
        (8, 0): {"bf16", "tf32", "cp_async"},
        (8, 9): {"fp8"},
        (9, 0): {"tma", "clusters"},
        (10, 0): {"fp4"},
    }
    found = {name for first, names in since.items() if capability >= first for name in names}
    found |= {9: {"wgmma"}, 10: {"tcgen05"}}.get(major, set())  # these two were not carried on to later families
    return frozenset(found)


def dtypes(capability_features: frozenset[str]) -> tuple[str, ...]:
    """Names of the dtypes that a GPU with these features computes in."""
    names = ["float64", "float32", "float16"]
    optional = (("tf32", "tfloat32"), ("bf16", "bfloat16"), ("int8_mma", "int8"), ("fp8", "float8_e4m3fn"))
    return tuple(names + [dtype for feature, dtype in optional if feature in capability_features])


def _row(
    capability: tuple[int, int],
    *,
    model: str,
    cores: int,
    tera: dict[str, float],
    gigabytes_per_second: float,
    caches: tuple[int, ...],
    memory: int,
    document: str,
    notes: dict[str, str] | None = None,
) -> Target:
    major, minor = capability
    has = features(major, minor)
    source = dict.fromkeys(("flops", "bandwidth", "memory", "cores", "L2"), document)
    source |= {"shared memory": TABLE, "features": "PTX ISA reference, target notes of the instructions"}
    return Target(
        name=f"nvidia-sm{major}{minor}",
        device="cuda",
        vendor="nvidia",
        cores=cores,
        flops={dtype: value * 1e12 for dtype, value in tera.items()},
        bandwidth=gigabytes_per_second * 1e9,
        caches=caches,
        memory=memory,
        dtypes=dtypes(has),
        features=has,
        backends=("triton", "eager"),
        vector_bits=32,
        mcpu=f"sm_{major}{minor}",
        source=source | (notes or {}),
        model=model,
    )


def _turing() -> Target:
    return _row(
        (7, 5),
        model="T4",
        cores=40,
        tera={"float64": 0.254, "float32": 8.1, "float16": 65, "int8": 130},
        gigabytes_per_second=320,
        caches=(64 * 2**10, 4 * 2**20),
        memory=16 * GIB,
        document="NVIDIA T4 Tensor Core GPU product brief and data sheet",
        notes={
            "L2": "NVIDIA Turing GPU Architecture whitepaper, TU104",
            "float64": "1/32 of float32: NVIDIA Turing GPU Architecture whitepaper",
        },
    )


def _ampere() -> Target:
    return _row(
        (8, 0),
        model="A100 SXM 80GB",
        cores=108,
        tera={"float64": 19.5, "float32": 19.5, "tfloat32": 156, "bfloat16": 312, "float16": 312, "int8": 624},
        gigabytes_per_second=2039,
        caches=(164 * 2**10, 40 * 2**20),
        memory=80 * GIB,
        document="NVIDIA A100 Tensor Core GPU data sheet; NVIDIA A100 Tensor Core GPU Architecture whitepaper",
        notes={"float64": "tensor cores; 9.7 without"},
    )


def _ampere_desktop() -> Target:
    return _row(
        (8, 6),
        model="GeForce RTX 3090",
        cores=82,
        tera={"float64": 0.556, "float32": 35.6, "tfloat32": 35.6, "bfloat16": 71, "float16": 71, "int8": 284},
        gigabytes_per_second=936,
        caches=(100 * 2**10, 6 * 2**20),
        memory=24 * GIB,
        document="NVIDIA Ampere GA102 GPU Architecture whitepaper, appendix table of the GeForce RTX 3090",
        notes={"float64": "1/64 of float32: the same whitepaper"},
    )


def _ada() -> Target:
    return _row(
        (8, 9),
        model="GeForce RTX 4090",
        cores=128,
        tera={
            "float64": 1.29,
            "float32": 82.6,
            "tfloat32": 82.6,
            "bfloat16": 165.2,
            "float16": 165.2,
            "float8_e4m3fn": 330.3,
            "int8": 660.6,
        },
        gigabytes_per_second=1008,
        caches=(100 * 2**10, 72 * 2**20),
        memory=24 * GIB,
        document="NVIDIA Ada GPU Architecture whitepaper, appendix table of the GeForce RTX 4090",
        notes={"float64": "1/64 of float32: the same whitepaper"},
    )


def _hopper() -> Target:
    return _row(
        (9, 0),
        model="H100 SXM5",
        cores=132,
        tera={
            "float64": 67,
            "float32": 67,
            "tfloat32": 494.5,
            "bfloat16": 989.5,
            "float16": 989.5,
            "float8_e4m3fn": 1979,
            "int8": 1979,
        },
        gigabytes_per_second=3350,
        caches=(228 * 2**10, 50 * 2**20),
        memory=80 * GIB,
        document="NVIDIA H100 Tensor Core GPU data sheet (figures with sparsity halved)",
        notes={
            "float64": "tensor cores; 34 without",
            "cores": "NVIDIA H100 Tensor Core GPU Architecture whitepaper",
            "L2": "NVIDIA H100 Tensor Core GPU Architecture whitepaper",
        },
    )


def _blackwell() -> Target:
    return _row(
        (10, 0),
        model="B200",
        cores=148,
        tera={
            "float64": 37,
            "float32": 75,
            "tfloat32": 1100,
            "bfloat16": 2250,
            "float16": 2250,
            "float8_e4m3fn": 4500,
            "int8": 4500,
        },
        gigabytes_per_second=8000,
        caches=(228 * 2**10, 126 * 2**20),
        memory=180 * GIB,
        document="NVIDIA HGX B200 specifications, one of eight GPUs (figures with sparsity halved)",
        notes={
            "bandwidth": "NVIDIA Blackwell Architecture technical brief (up to 8 TB/s)",
            "cores": "CUDA device properties of a B200; NVIDIA publishes no figure",
            "L2": "CUDA device properties of a B200; NVIDIA publishes no figure",
        },
    )
