"""Products of bfloat16, float16, bytes and packed weights, with and without the instructions made for them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("tvm")

from torchlathe import targets
from torchlathe.codegen.base import Region
from torchlathe.codegen.plans.values import Unsupported
from torchlathe.codegen.trial import run_kernel
from torchlathe.codegen.tvm.backend import TvmBackend
from torchlathe.codegen.tvm.dots import BFLOAT16, BYTES, PLAIN, WORDS, WORDS_256, dot_of
from torchlathe.passes import ops
from torchlathe.passes.capture import capture
from torchlathe.passes.ops import pack_int4, unpack_int4
from torchlathe.targets.target import Target

HOST = targets.get("cpu")
BARE = Target("cpu", "cpu", "generic", 2, {}, 0.0, (32768, 1 << 20), 0, (), vector_bits=256)
AVX2 = replace(BARE, features=frozenset({"avx2"}))
WIDE = replace(BARE, vector_bits=512, features=frozenset({"avx2", "avx512f", "avx512bw", "avx512vl"}))
BEST = replace(WIDE, features=WIDE.features | {"avx512_vnni", "avx512_bf16"})
NARROW = replace(BEST, vector_bits=256)


def runs(target: Target) -> bool:
    """Whether this machine executes what is compiled for a target."""
    return target.features <= HOST.features and target.vector_bits <= HOST.vector_bits


class Net(torch.nn.Module):
    def __init__(self, function: Any, **constants: torch.Tensor) -> None:
        super().__init__()
        self.function = function
        for name, value in constants.items():
            self.register_buffer(name, value)

    def forward(self, *args: torch.Tensor) -> Any:
        return self.function(self, *args)


def outputs(net: Net, args: tuple[torch.Tensor, ...], target: Target) -> list[torch.Tensor]:
    """What every schedule computes."""
    program = capture(net, args)
    region = Region.of(n for n in program.graph.nodes if n.op == "call_function")
    backend = TvmBackend(program)
    assert backend.supports(region, target) is None, backend.supports(region, target)
    env = dict(zip(program.inputs, args, strict=True))
    inputs = [env[n] if n in env else program.weights[str(n.target)] for n in region.inputs]
    return [run_kernel(backend.lower(region, target, s), inputs)[0] for s in backend.space(region, target)]


@pytest.mark.parametrize("target", [BARE, WIDE, NARROW, BEST], ids=["bare", "wide", "narrow", "best"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("depth", [1, 2, 33, 64])
def test_half_precision_linear(target: Target, dtype: torch.dtype, depth: int) -> None:
    if not runs(target):
        pytest.skip("this processor lacks the instructions of the target")
    torch.manual_seed(depth)
    x, w, b = (torch.randn(s).to(dtype) for s in ((3, 13, depth), (41, depth), (41,)))
    net = Net(lambda s, x: F.gelu(F.linear(x, s.w, s.b)), w=w, b=b)
    exact = F.gelu(F.linear(x.double(), w.double(), b.double()))
    limit = 2 * (net(x).double() - exact).abs().max() + torch.finfo(dtype).eps * exact.abs().max()
    for ours in outputs(net, (x,), target):
        assert ours.dtype is dtype and (ours.double() - exact).abs().max() <= limit


@pytest.mark.parametrize("target", [BARE, NARROW, BEST], ids=["bare", "narrow", "best"])
def test_half_precision_operands_known_at_run_time(target: Target) -> None:
    if not runs(target):
        pytest.skip("this processor lacks the instructions of the target")
    x, y = torch.randn(2, 9, 21).bfloat16(), torch.randn(2, 21, 35).bfloat16()
    exact = x.double() @ y.double()
    for ours in outputs(Net(lambda s, x, y: x @ y), (x, y), target):
        assert (ours.double() - exact).abs().max() <= 2**-7 * exact.abs().max()


@pytest.mark.parametrize("target", [AVX2, WIDE, NARROW, BEST], ids=["avx2", "wide", "narrow", "best"])
@pytest.mark.parametrize("depth", [1, 3, 4, 7, 66])
def test_bytes_are_exact(target: Target, depth: int) -> None:
    if not runs(target):
        pytest.skip("this processor lacks the instructions of the target")
    torch.manual_seed(depth)
    w = torch.randint(-128, 128, (depth, 40), dtype=torch.int8)
    x = torch.randint(-128, 128, (18, depth), dtype=torch.int8)
    wanted = (x.long() @ w.long()).to(torch.int32)
    for ours in outputs(Net(lambda s, x: torch._int_mm(x, s.w), w=w), (x,), target):
        assert ours.dtype is torch.int32 and torch.equal(ours, wanted)


@pytest.mark.parametrize("target", [AVX2, WIDE, BEST], ids=["avx2", "wide", "best"])
def test_extremes_of_bytes_do_not_saturate(target: Target) -> None:
    if not runs(target):
        pytest.skip("this processor lacks the instructions of the target")
    extremes = torch.tensor([-128, -127, -1, 0, 1, 126, 127], dtype=torch.int8)
    left = torch.cartesian_prod(extremes, extremes)  # every pair of neighbours along the depth
    x = left.repeat(1, 4)[:48]
    w = left.repeat(1, 4)[:48].t().contiguous()
    wanted = (x.long() @ w.long()).to(torch.int32)
    for ours in outputs(Net(lambda s, x: torch._int_mm(x, s.w), w=w), (x,), target):
        assert torch.equal(ours, wanted)


def test_bytes_are_dequantised_in_the_store() -> None:
    w, scale = torch.randint(-128, 128, (64, 40), dtype=torch.int8), torch.rand(40)
    x = torch.randint(-128, 128, (18, 64), dtype=torch.int8)
    target = BEST if runs(BEST) else AVX2
    net = Net(lambda s, x: torch.relu(torch._int_mm(x, s.w).to(torch.float32) * s.scale), w=w, scale=scale)
    for ours in outputs(net, (x,), target):
        torch.testing.assert_close(ours, net(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 5, 40])
def test_weights_of_bytes(dtype: torch.dtype, rows: int) -> None:
    w, scale = torch.randint(-128, 128, (48, 64), dtype=torch.int8), torch.rand(48).to(dtype)
    x = torch.randn(rows, 64).to(dtype)
    exact = (x.double() @ w.double().t()) * scale.double()
    net = Net(lambda s, x: torch._weight_int8pack_mm(x, s.w, s.scale), w=w, scale=scale)
    for ours in outputs(net, (x,), BARE):
        assert ours.dtype is dtype
        assert (ours.double() - exact).abs().max() <= 16 * torch.finfo(dtype).eps * exact.abs().max()


def four_bits(outputs: int, inputs: int, groups: int) -> dict[str, torch.Tensor]:
    levels = torch.randint(0, 16, (outputs, inputs))
    return {"w": pack_int4(levels), "scale": torch.rand(outputs, groups), "offset": torch.randn(outputs, groups)}


@pytest.mark.parametrize("target", [BARE, WIDE], ids=["bare", "wide"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize("groups", [1, 4])
def test_weights_of_four_bits(target: Target, dtype: torch.dtype, rows: int, groups: int) -> None:
    if not runs(target):
        pytest.skip("this processor has narrower vectors")
    torch.manual_seed(0)
    op, constants = ops.linear_int4(), four_bits(53, 64, groups)
    x, bias = torch.randn(2, rows, 64).to(dtype), torch.randn(53).to(dtype)
    exact = (
        x.double() @ unpack_int4(constants["w"], constants["scale"], constants["offset"]).double().t() + bias.double()
    )
    net = Net(lambda s, x: torch.relu(op(x, s.w, s.scale, s.offset, s.bias)), bias=bias, **constants)
    for ours in outputs(net, (x,), target):
        assert ours.dtype is dtype
        wanted = exact.clamp_min(0)
        assert (ours.double() - wanted).abs().max() <= 8 * torch.finfo(dtype).eps * wanted.abs().max()


def test_weights_of_four_bits_with_rows_known_late() -> None:
    op, constants = ops.linear_int4(), four_bits(40, 32, 2)
    net, rows = Net(lambda s, x: op(x, s.w, s.scale, s.offset), **constants), torch.export.Dim("rows", min=1, max=99)
    program = capture(net, (torch.randn(4, 32),), dynamic_shapes={"args": ({0: rows},)})
    region = Region.of(n for n in program.graph.nodes if "int4" in str(n.target))
    backend = TvmBackend(program)
    kernel = backend.lower(region, BARE, next(iter(backend.space(region, BARE))))
    weights = {str(n.target): program.weights[str(n.target)] for n in region.inputs if n.op == "get_attr"}
    for count in (1, 7, 50):
        x = torch.randn(count, 32)
        (ours,) = run_kernel(kernel, [weights.get(str(n.target), x) for n in region.inputs])
        torch.testing.assert_close(ours, net(x), atol=1e-4, rtol=1e-4)


def test_four_bits_whose_scale_is_an_input_are_refused() -> None:
    op, constants = ops.linear_int4(), four_bits(8, 12, 2)
    net = Net(lambda s, x, scale: op(x, s.w, scale, s.offset), **constants)
    program = capture(net, (torch.randn(2, 12), constants["scale"]))
    region = Region.of(n for n in program.graph.nodes if n.op == "call_function")
    assert "not constant" in (TvmBackend(program).supports(region, BARE) or "")


@pytest.mark.parametrize(("dtype", "target", "wanted"), [
    (torch.float32, BEST, PLAIN), (torch.bfloat16, BEST, BFLOAT16), (torch.bfloat16, WIDE, PLAIN),
    (torch.float16, BEST, PLAIN), (torch.int8, BEST, BYTES), (torch.int8, WIDE, WORDS), (torch.int8, AVX2, WORDS_256),
], ids=lambda v: v.name if isinstance(v, Target) else str(v))  # fmt: skip
def test_the_target_decides_the_instruction(dtype: torch.dtype, target: Target, wanted: Any) -> None:
    assert dot_of(dtype, dtype, target) is wanted


def test_without_an_instruction_the_reason_is_named() -> None:
    with pytest.raises(Unsupported, match="no instruction"):
        dot_of(torch.int8, torch.int8, BARE)
