"""Operators of this package: their meaning against formulas written out, their shapes, and wrong arguments."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from torchlathe.passes import ops


def test_levels_survive_packing() -> None:
    levels = torch.arange(16).repeat(3, 2)
    found = ops.unpack_int4(ops.pack_int4(levels), torch.ones(3, 1), torch.zeros(3, 1))
    assert torch.equal(found, levels.float())


def test_linear_int4_is_what_its_formula_says() -> None:
    torch.manual_seed(0)
    levels, scale, offset = torch.randint(0, 16, (5, 12)), torch.rand(5, 3), torch.randn(5, 3)
    x, bias = torch.randn(2, 7, 12, dtype=torch.float64).float(), torch.randn(5)
    wanted = torch.zeros(2, 7, 5, dtype=torch.float64)
    for o in range(5):
        for i in range(12):
            weight = levels[o, i] * scale[o, i // 4].double() + offset[o, i // 4].double()
            wanted[..., o] += x[..., i].double() * weight
    found = ops.linear_int4()(x, ops.pack_int4(levels), scale, offset, bias)
    torch.testing.assert_close(found.double(), wanted + bias, atol=1e-5, rtol=1e-5)


def test_shapes_are_known_without_values() -> None:
    with torch.device("meta"):
        x, w, s = torch.empty(2, 3, 8, dtype=torch.bfloat16), torch.empty(6, 4, dtype=torch.uint8), torch.empty(6, 2)
    found = ops.linear_int4()(x, w, s, s)
    assert found.shape == (2, 3, 6) and found.dtype is torch.bfloat16


@pytest.mark.parametrize("scale", [(6, 3), (5, 2)])
def test_shapes_that_do_not_fit_are_an_error(scale: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="linear_int4"):
        ops.linear_int4()(torch.randn(2, 8), torch.zeros(6, 4, dtype=torch.uint8), torch.ones(scale), torch.ones(scale))


def test_importing_defines_nothing() -> None:
    code = "import torch, torchlathe.passes.ops; print(hasattr(torch.ops.torchlathe, 'linear_int4'))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"
