"""Matrix-product kernels against torch in float64: every schedule, edge sizes, strides, fused tails, dynamic rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.export import Dim
from torch.nn import functional as F

pytest.importorskip("tvm")

from torchlathe.codegen.base import Region
from torchlathe.codegen.eager import op_name
from torchlathe.codegen.select import run_kernel
from torchlathe.codegen.tvm import matmul_family
from torchlathe.codegen.tvm.backend import TvmBackend
from torchlathe.codegen.tvm.dots import PLAIN, pack
from torchlathe.passes.capture import capture
from torchlathe.passes.program import Program
from torchlathe.targets.target import Target

TARGETS = {bits: Target("cpu", "cpu", "generic", 2, {}, 0.0, (32768, 1 << 20), 0, (), vector_bits=bits)
           for bits in (128, 256)}  # fmt: skip
VIEWS = ("sym_size", "transpose", "select", "expand", "view", "permute", "slice")


class Net(torch.nn.Module):
    """A function of inputs and of constant tensors."""

    def __init__(self, function: Callable[..., Any], **constants: torch.Tensor) -> None:
        super().__init__()
        self.function = function
        for name, value in constants.items():
            self.register_buffer(name, value)

    def forward(self, *args: torch.Tensor) -> Any:
        return self.function(self, *args)


def prepared(net: Net, args: tuple[Any, ...], dynamic: Any = None) -> tuple[Program, Region]:
    program = capture(net, args, dynamic_shapes=dynamic)
    calls = [n for n in program.graph.nodes if n.op == "call_function" and not op_name(n).startswith(VIEWS)]
    return program, Region.of(calls)


def inputs_of(program: Program, region: Region, args: tuple[Any, ...]) -> list[Any]:
    """Values of the region's inputs: arguments, weights, and views of them computed eagerly."""
    env: dict[Any, Any] = dict(zip(program.inputs, args, strict=True))
    for n in program.graph.nodes:
        if n.op == "get_attr":
            env[n] = program.weights[str(n.target)]
        elif n.op == "call_function" and n not in region.nodes and all(s in env for s in n.all_input_nodes):
            env[n] = n.target(*torch.fx.node.map_arg(n.args, env.__getitem__), **n.kwargs)
    return [env[n] for n in region.inputs]


def check(function: Callable[..., Any], *args: torch.Tensor, bits: int = 256, **constants: torch.Tensor) -> int:
    """Compare every schedule with eager in float64; returns how many there were."""
    net, target = Net(function, **constants), TARGETS[bits]
    program, region = prepared(net, args)
    backend = TvmBackend(program)
    assert backend.supports(region, target) is None
    double = Net(function, **{k: v.double() for k, v in constants.items()})
    exact = double(*(a.double() for a in args))
    eager, schedules = net(*args), list(backend.space(region, target))
    for schedule in schedules:
        kernel = backend.lower(region, target, schedule)
        (ours,) = run_kernel(kernel, inputs_of(program, region, args))
        assert ours.shape == eager.shape and ours.dtype == eager.dtype
        limit = 2 * (eager - exact).abs().max() + 1e-5 * exact.abs().max()
        assert (ours - exact).abs().max() <= limit, str(schedule)
    return len(schedules)


def weights(columns: int, depth: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(columns + depth)
    return {"w": torch.randn(columns, depth) / depth**0.5, "b": torch.randn(columns)}


@pytest.mark.parametrize("columns", [1, 7, 16, 41, 100])
@pytest.mark.parametrize("rows", [1, 2, 5, 13, 38])
def test_linear_of_any_size(rows: int, columns: int) -> None:
    check(lambda s, x: F.linear(x, s.w, s.b), torch.randn(rows, 33), **weights(columns, 33))


@pytest.mark.parametrize("bits", [128, 256])
def test_blocks_of_rows_and_columns_cover_everything(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul_family, "MOST", ((float("inf"), 9),))
    count = check(lambda s, x: F.linear(x, s.w, s.b), torch.randn(3, 61, 64), bits=bits, **weights(200, 64))
    assert count >= 4  # several tiles, each with several cuts


@pytest.mark.parametrize("bits", [128, 256])
@pytest.mark.parametrize(("rows", "columns", "depth"), [(131, 33, 1152), (150, 70, 1536), (257, 96, 3072)])
def test_blocks_of_the_depth(bits: int, rows: int, columns: int, depth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A panel that does not fit the first cache is used part by part; sums wait in memory, and the tail comes once."""
    monkeypatch.setattr(matmul_family, "MOST", ((float("inf"), 99),))
    torch.manual_seed(0)
    w, b = torch.randn(columns, depth) / depth**0.5, torch.randn(columns)
    x, y = torch.randn(rows, depth), torch.randn(rows, columns)
    function = lambda s, x, y: F.gelu(F.linear(x, s.w, s.b)) + y  # noqa: E731
    program, region = prepared(Net(function, w=w, b=b), (x, y))
    depths = [int(s["depth"]) for s in TvmBackend(program).space(region, TARGETS[bits])]
    assert any(depths) and not all(depths) and all(d == 0 or depth % d == 0 for d in depths)
    check(function, x, y, bits=bits, w=w, b=b)


def test_blocks_of_the_depth_with_a_gate_and_rows_known_at_run_time() -> None:
    torch.manual_seed(0)
    w = torch.randn(2 * 40, 1024) / 32
    net = Net(lambda s, x: (lambda y: F.silu(y[:, :40]) * y[:, 40:])(F.linear(x, s.w)), w=w)
    args = torch.randn(140, 1024), torch.randn(300, 1024)
    program, _ = prepared(net, args[:1], (({0: Dim("rows", min=2, max=999)},),))
    calls = (n for n in program.graph.nodes if n.op == "call_function" and not op_name(n).startswith("sym_size"))
    region = Region.of(calls)
    backend, target = TvmBackend(program), TARGETS[256]
    blocked = [s for s in backend.space(region, target) if s["depth"]]
    assert blocked
    for schedule in blocked:
        kernel = backend.lower(region, target, schedule)
        for x in args:
            (ours,) = run_kernel(kernel, inputs_of(program, region, (x,)))
            torch.testing.assert_close(ours.double(), net.double()(x.double()), rtol=1e-4, atol=1e-5)
            net.float()


def test_tail_is_fused() -> None:
    residual, scale = torch.randn(2, 19, 41), torch.randn(41)
    check(lambda s, x, r: r + F.gelu(F.linear(x, s.w, s.b)) * s.g, torch.randn(2, 19, 30), residual,
          g=scale, **weights(41, 30))  # fmt: skip


def test_two_results_of_one_product() -> None:
    net = Net(lambda s, x: (lambda y: (y, torch.relu(y)))(F.linear(x, s.w, s.b)), **weights(20, 30))
    x = torch.randn(9, 30)
    program, region = prepared(net, (x,))
    backend, target = TvmBackend(program), TARGETS[256]
    kernel = backend.lower(region, target, next(iter(backend.space(region, target))))
    ours = run_kernel(kernel, inputs_of(program, region, (x,)))
    for a, b in zip(ours, net(x), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("function", "shapes"), [
    (lambda s, x, y: x @ y, [(2, 3, 17, 30), (2, 3, 30, 41)]),
    (lambda s, x, y: x @ y.transpose(-1, -2), [(2, 3, 17, 30), (2, 3, 41, 30)]),
    (lambda s, x, y: x @ y, [(2, 3, 17, 30), (3, 30, 41)]),
    (lambda s, x, y: x @ y, [(4, 1, 17, 30), (1, 5, 30, 9)]),
    (lambda s, x, y: torch.baddbmm(y[:, :1], x, y), [(3, 8, 8), (3, 8, 8)]),
    (lambda s, x, y: F.linear(x[:, 3], y), [(5, 7, 20), (11, 20)]),
    (lambda s, x, y: F.linear(x.transpose(1, 2), y), [(5, 20, 7), (11, 20)]),
], ids=["batched", "transposed", "broadcast", "outer", "baddbmm", "slice", "permuted"])  # fmt: skip
def test_operands_known_at_run_time(function: Callable[..., Any], shapes: list[tuple[int, ...]]) -> None:
    torch.manual_seed(1)
    check(function, *(torch.randn(s) for s in shapes))


def test_mm_and_addmm_with_constant_weight() -> None:
    w = torch.randn(30, 41)
    check(lambda s, x: x @ s.w, torch.randn(2, 9, 30), w=w)
    check(lambda s, x: torch.addmm(s.b, x, s.w), torch.randn(9, 30), w=w, b=torch.randn(41))


def test_rows_known_at_run_time() -> None:
    net = Net(lambda s, x: F.silu(F.linear(x, s.w, s.b)), **weights(41, 30))
    dims = {0: Dim("batch", min=2, max=50), 1: Dim("length", min=2, max=90)}
    program, region = prepared(net, (torch.randn(3, 5, 30),), ((dims,),))
    backend, target = TvmBackend(program), TARGETS[256]
    for schedule in backend.space(region, target):
        kernel = backend.lower(region, target, schedule)
        for shape in [(2, 2, 30), (3, 7, 30), (2, 37, 30), (5, 64, 30)]:
            x = torch.randn(shape)
            (ours,) = run_kernel(kernel, inputs_of(program, region, (x,)))
            torch.testing.assert_close(ours, net(x))


def test_nan_and_infinity_reach_their_row_only() -> None:
    w = weights(20, 30)
    net, x = Net(lambda s, x: F.linear(x, s.w, s.b), **w), torch.randn(8, 30)
    x[2, 3], x[5, 1] = float("nan"), float("inf")
    program, region = prepared(net, (x,))
    backend, target = TvmBackend(program), TARGETS[256]
    kernel = backend.lower(region, target, next(iter(backend.space(region, target))))
    (ours,) = run_kernel(kernel, inputs_of(program, region, (x,)))
    assert torch.equal(ours.isnan(), net(x).isnan()) and torch.equal(ours.isinf(), net(x).isinf())


def test_equal_regions_share_code_and_not_weights() -> None:
    first, second = weights(20, 30), {"w": torch.randn(20, 30), "b": torch.randn(20)}
    x, kernels = torch.randn(9, 30), []
    net = Net(lambda s, x: (F.linear(x, s.w, s.b), F.linear(x, s.w2, s.b2)), **first,
              **{f"{k}2": v for k, v in second.items()})  # fmt: skip
    program = capture(net, (x,))
    backend, target = TvmBackend(program), TARGETS[256]
    for node, wanted in zip([n for n in program.graph.nodes if op_name(n) == "linear"], net(x), strict=True):
        region = Region.of([node])
        kernels.append(backend.lower(region, target, next(iter(backend.space(region, target)))))
        (ours,) = run_kernel(kernels[-1], inputs_of(program, region, (x,)))
        torch.testing.assert_close(ours, wanted)
    assert kernels[0].call is kernels[1].call


@pytest.mark.parametrize(("function", "args", "reason"), [
    (lambda s, x: x.double() @ x.double(), (torch.randn(4, 4),), "float64"),
    (lambda s, x: torch.addmm(x, x, x, alpha=2), (torch.randn(4, 4),), "scaled"),
    (lambda s, x: torch.softmax(x @ x, -1), (torch.randn(4, 4),), "not pointwise"),
    (lambda s, x: (x @ x).transpose(0, 1) + x, (torch.randn(4, 4),), "other elements"),
    (lambda s, x: (x @ x) @ x, (torch.randn(4, 4),), "exactly one"),
])  # fmt: skip
def test_refusals_name_the_reason(function: Callable[..., Any], args: tuple[torch.Tensor, ...], reason: str) -> None:
    program = capture(Net(function), args)
    region = Region.of(n for n in program.graph.nodes if n.op == "call_function" and op_name(n) not in ("_to_copy",))
    assert reason in str(TvmBackend(program).supports(region, TARGETS[256]))


def test_pack_pads_the_last_panel_with_zeros() -> None:
    weight = torch.arange(12.0).view(4, 3)  # [columns, depth]
    packed = pack(weight.t(), 3, PLAIN)
    assert packed.shape == (2, 3, 3)
    assert torch.equal(packed[0], weight[:3].t())
    assert torch.equal(packed[1], torch.stack([weight[3], torch.zeros(3), torch.zeros(3)]).t())
