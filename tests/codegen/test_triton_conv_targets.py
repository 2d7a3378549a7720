"""Kernels of convolutional nets compile for GPUs that are not here, and spill no registers at the first schedule."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("triton")

from torchlathe import targets
from torchlathe.codegen.base import Region
from torchlathe.codegen.triton.backend import TritonBackend
from torchlathe.passes.capture import capture

NETS = {
    "stem": (nn.Conv2d(3, 64, 7, 2, 3), (8, 3, 224, 224)),
    "3x3": (nn.Sequential(nn.Conv2d(64, 64, 3, 1, 1), nn.ReLU()), (8, 64, 56, 56)),
    "1x1": (nn.Conv2d(256, 64, 1), (8, 256, 56, 56)),
    "depthwise 3x3": (nn.Conv2d(96, 96, 3, 1, 1, groups=96), (8, 96, 56, 56)),
    "depthwise 7x7": (nn.Conv2d(96, 96, 7, 1, 3, groups=96), (8, 96, 56, 56)),
    "max": (nn.MaxPool2d(3, 2, 1), (8, 64, 112, 112)),
    "global": (nn.AdaptiveAvgPool2d(1), (8, 2048, 7, 7)),
    "groups": (nn.Sequential(nn.GroupNorm(32, 320), nn.SiLU()), (2, 320, 64, 64)),
}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("target", ["nvidia-sm80", "nvidia-sm90", "amd-gfx942"])
@pytest.mark.parametrize("name", NETS)
def test_no_register_is_spilled(name: str, target: str, dtype: torch.dtype) -> None:
    net, shape = NETS[name]
    x: Any = torch.empty(shape, dtype=dtype).to(memory_format=torch.channels_last)
    program = capture(net.to(dtype).eval(), (x,))
    region = Region.of(n for n in program.graph.nodes if n.op == "call_function")
    backend, gpu = TritonBackend(program), targets.get(target)
    kernel = backend.lower(region, gpu, next(iter(backend.space(region, gpu))))
    assert kernel.asm["amdgcn" if gpu.vendor == "amd" else "ptx"]
    ((_, binaries),) = (made.result() for made in backend._compiled.values())
    assert all(b is not None and b.registers > 0 and b.spills == 0 for b in binaries)
