"""Every kind of Triton kernel compiles for every GPU target, on a machine without a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attends import paged, rotated
from reference import region_of

pytest.importorskip("triton")

from torchlathe import targets
from torchlathe.codegen.base import Kernel
from torchlathe.codegen.triton.backend import TritonBackend
from torchlathe.codegen.triton.compile import Binary
from torchlathe.passes import ops
from torchlathe.passes.errors import LatheError

TARGETS = ("nvidia-sm75", "nvidia-sm80", "nvidia-sm86", "nvidia-sm89", "nvidia-sm90", "nvidia-sm100", "amd-gfx90a",
           "amd-gfx942")  # fmt: skip
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
NO_SPILLS = ("nvidia-sm80", "nvidia-sm90")


def normal(*sizes: int) -> Callable[[torch.dtype], torch.Tensor]:
    return lambda dtype: torch.randn(sizes).to(dtype)


def of(dtype: torch.dtype, *sizes: int) -> Callable[[torch.dtype], torch.Tensor]:
    return lambda _: torch.zeros(sizes, dtype=dtype)


sdpa, tokens = F.scaled_dot_product_attention, normal(4, 197, 384)
heads = (normal(2, 4, 512, 64),) * 3


def rotary(x: torch.Tensor, w: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, ...]:
    y = F.linear(x, w)
    q = y[..., :512].view(4, 197, 8, 64).transpose(1, 2)
    return y[..., 512:], rotated(q, cos, sin)


pools = (normal(400, 16, 2, 64),) * 2
REGIONS: dict[str, tuple[Callable[..., Any], tuple[Callable[[torch.dtype], torch.Tensor], ...]]] = {
    "pointwise": (lambda x, y: F.gelu(x) * y + x.tanh(), (tokens, normal(384))),
    "norm": (lambda x, w, b: F.layer_norm(x + 1, (384,), w, b), (tokens, normal(384), normal(384))),
    "softmax of long rows": (lambda x: F.softmax(x, -1), (normal(2, 20000),)),
    "cat": (lambda x, y: torch.cat([x, y], 1) * 2, (tokens, normal(4, 1, 384))),
    "embedding": (lambda i, w: F.embedding(i, w) + 1, (of(torch.int64, 4, 64), normal(1000, 384))),
    "product": (lambda x, w, b: F.gelu(F.linear(x, w, b)), (tokens, normal(1536, 384), normal(1536))),
    "gated product": (
        lambda x, w: (lambda y: F.silu(y[..., :1024]) * y[..., 1024:])(F.linear(x, w)), (tokens, normal(2048, 384)),
    ),
    "product and rotary embedding": (rotary, (tokens, normal(768, 384), normal(1, 1, 197, 64), normal(1, 1, 197, 64))),
    "grouped product": (
        lambda x, w, ends: F.silu(torch._grouped_mm(x, w, offs=ends)),
        (normal(512, 384), normal(8, 384, 1024), of(torch.int32, 8)),
    ),
    "product of few rows": (lambda x, w: F.relu(F.linear(x, w)), (normal(2, 4096), normal(512, 4096))),
    "batched product": (lambda x, y: torch.bmm(x, y), (normal(8, 256, 64), normal(8, 64, 256))),
    "attention": (lambda q, k, v: sdpa(q, k, v), heads),
    "causal attention": (lambda q, k, v: sdpa(q, k, v, is_causal=True), heads),
    "masked attention": (lambda q, k, v, m: sdpa(q, k, v, attn_mask=m), (*heads, of(torch.bool, 2, 1, 512, 512))),
    "decode": (
        lambda q, k, v: sdpa(q, k, v, enable_gqa=True), (normal(2, 8, 1, 64), *(normal(2, 2, 3000, 64),) * 2),
    ),
    "attention of pages": (paged, (normal(2, 8, 200, 64), *pools, of(torch.int64, 2, 50))),
    "decode of pages": (paged, (normal(2, 8, 1, 64), *pools, of(torch.int64, 2, 150))),
    "merge": (
        lambda x, s, m: tuple(ops.merge_tokens()(x, s, m, 13, [0])),
        (tokens, of(torch.float32, 4, 197), normal(4, 197, 64)),
    ),
    "choice": (lambda s: ops.best_tokens()(s, 50, [0]), (normal(4, 197),)),
    "take": (lambda x, i: ops.take()(x, 1, i), (tokens, of(torch.int64, 4, 50))),
}  # fmt: skip


def compiled(name: str, dtype: torch.dtype, target: str) -> tuple[Kernel, list[Binary]]:
    """A region's likeliest kernel of ours alone, and what each of its launches became."""
    function, makers = REGIONS[name]
    region, _ = region_of(function, tuple(make(dtype) for make in makers))
    for node in region.outputs:
        node.meta["kept"] = False  # nobody relies on how results lie in memory
    backend, row = TritonBackend(), targets.get(target)
    assert (reason := backend.supports(region, row)) is None, reason
    kernel = backend.lower(region, row, next(s for s in backend.space(region, row) if s.name != "library"))
    ((_, binaries),) = (made.result() for made in backend._compiled.values())
    assert all(binaries)
    return kernel, [b for b in binaries if b is not None]


def check(name: str, dtype: torch.dtype, target: str) -> None:
    kernel, binaries = compiled(name, dtype, target)
    assert kernel.asm["ttir"] and kernel.asm["amdgcn" if target.startswith("amd") else "ptx"]
    assert kernel.source.count("@triton.jit") == len(binaries) > 0
    for binary in binaries:
        assert 0 < binary.registers <= (512 if target.startswith("amd") else 255)
        assert binary.shared <= targets.get(target).caches[0]
        if target in NO_SPILLS:
            assert binary.spills == 0


def has(target: str, dtype: torch.dtype) -> bool:
    return str(dtype).removeprefix("torch.") in targets.get(target).dtypes


def traces(name: str, dtype: torch.dtype) -> bool:
    """torch traces grouped products in bfloat16 only."""
    return name != "grouped product" or dtype is torch.bfloat16


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", ["norm", "product", "attention"])
def test_every_target(name: str, target: str) -> None:
    check(name, torch.float16, target)


@pytest.mark.parametrize("name", [n for n in REGIONS if n not in ("norm", "product", "attention")])
def test_every_kind(name: str) -> None:
    check(name, torch.float16 if traces(name, torch.float16) else torch.bfloat16, "nvidia-sm90")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "target", "dtype"),
    [(n, t, d) for n in REGIONS for t in TARGETS for d in DTYPES if has(t, d) and traces(n, d)],
)
def test_every_kind_for_every_target(name: str, target: str, dtype: torch.dtype) -> None:
    check(name, dtype, target)


def test_what_was_compiled_for_an_absent_gpu_says_so() -> None:
    kernel, _ = compiled("choice", torch.float32, "amd-gfx942")
    with pytest.raises(LatheError, match="not in this host"):
        kernel.call(torch.randn(4, 197), torch.empty(4, 51, dtype=torch.int64))
