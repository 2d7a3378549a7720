"""Whole models at their usual sizes compile ahead of time for GPUs, on a machine without one."""

from __future__ import annotations

import pytest
from scripts import load

pytest.importorskip("triton")
pytest.importorskip("transformers")

import torchlathe

LIBRARIES = {"convolution", "mm", "addmm", "bmm", "linear", "conv2d"}  # what torch may compute as well
FREE = {"expand", "view", "reshape", "unsqueeze", "squeeze", "permute", "transpose", "slice", "select"}  # no kernel
TOKENS = 48  # of texts: eager computes in float16 slowly on CPUs


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("target", ["nvidia-sm90", "amd-gfx942"])
@pytest.mark.parametrize("name", ["vit-s", "bert-base", "gpt2", "llama-110m", "resnet-50"])
def test_all_but_products_and_convolutions_are_generated(name: str, target: str) -> None:
    model, (x,) = load("peers_models").build(name, 1)
    x = x.half() if x.is_floating_point() else x[:, :TOKENS]
    fast = torchlathe.optimize(model.half(), (x,), target=target, aot=True, level="fast")
    kernels = fast.report.kernels
    made = [k for k in kernels if k.backend == "triton"]
    kind = "ptx" if target.startswith("nvidia") else "amdgcn"
    assert made and all("@triton.jit" in k.source and k.asm[kind] for k in made)
    for kernel in kernels:
        if kernel.backend != "triton":
            assert kernel.region and set(kernel.region) <= LIBRARIES | FREE, (
                f"{kernel.name} is left to {kernel.backend}"
            )
