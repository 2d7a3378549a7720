"""Operations and bytes against closed forms, and against torch's own flop counter where that covers an operator."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from torchlathe.targets import get
from torchlathe.targets.cost import bytes_moved, flops, seconds, totals

aten = torch.ops.aten
Arguments = tuple[Any, ...]


def node_of(op: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """One node of a graph that calls `op`; tensors (possibly in lists) become placeholders."""
    graph, mode = fx.Graph(), FakeTensorMode()

    def fake(value: torch.Tensor) -> fx.Node:
        node = graph.placeholder("x")
        node.meta["val"] = mode.from_tensor(value)
        return node

    inputs, named = torch.utils._pytree.tree_map_only(torch.Tensor, fake, (args, kwargs))
    node = graph.call_function(op, inputs, named)
    with mode:
        node.meta["val"] = op(*fx.node.map_arg(inputs, _value), **fx.node.map_arg(named, _value))
    return node


def _value(node: fx.Node) -> Any:
    return node.meta["val"]


def t(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype)


FLOPS: list[tuple[str, Any, Arguments, int]] = [
    ("linear", aten.linear.default, (t(4, 5, 16), t(8, 16), t(8)), 2 * 20 * 8 * 16),
    ("linear of a vector", aten.linear.default, (t(16), t(8, 16)), 2 * 8 * 16),
    ("mm", aten.mm.default, (t(3, 4), t(4, 5)), 2 * 3 * 4 * 5),
    ("addmm", aten.addmm.default, (t(5), t(3, 4), t(4, 5)), 2 * 3 * 4 * 5),
    ("bmm", aten.bmm.default, (t(7, 3, 4), t(7, 4, 5)), 2 * 7 * 3 * 4 * 5),
    ("baddbmm", aten.baddbmm.default, (t(7, 3, 5), t(7, 3, 4), t(7, 4, 5)), 2 * 7 * 3 * 4 * 5),
    ("addbmm", aten.addbmm.default, (t(3, 5), t(7, 3, 4), t(7, 4, 5)), 2 * 7 * 3 * 4 * 5),
    ("matmul, broadcast", aten.matmul.default, (t(2, 1, 3, 4), t(6, 4, 5)), 2 * 12 * 3 * 4 * 5),
    ("matmul of vectors", aten.matmul.default, (t(9), t(9)), 2 * 9),
    ("conv1d", aten.conv1d.default, (t(2, 6, 10), t(4, 6, 3), None, [1], [1]), 2 * 2 * 4 * 10 * 6 * 3),
    ("conv2d, groups", aten.conv2d.default, (t(2, 8, 9, 9), t(4, 4, 3, 3), None, [2, 2], [0, 0], [1, 1], 2),
     2 * 2 * 4 * 16 * 4 * 9),
    ("conv3d", aten.conv3d.default, (t(1, 2, 4, 4, 4), t(3, 2, 2, 2, 2)), 2 * 3 * 27 * 2 * 8),
    ("depthwise", aten.conv2d.default, (t(1, 8, 5, 5), t(8, 1, 3, 3), None, [1, 1], [1, 1], [1, 1], 8), 2 * 8 * 25 * 9),
    ("convolution", aten.convolution.default,
     (t(1, 3, 8, 8), t(6, 3, 3, 3), None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1), 2 * 6 * 64 * 27),
    ("conv_transpose2d", aten.conv_transpose2d.input, (t(1, 3, 4, 4), t(3, 6, 2, 2), None, [2, 2]), 2 * 3 * 16 * 6 * 4),
    ("transposed convolution", aten.convolution.default,
     (t(1, 3, 4, 4), t(3, 6, 2, 2), None, [2, 2], [0, 0], [1, 1], True, [0, 0], 1), 2 * 3 * 16 * 6 * 4),
    ("attention", aten.scaled_dot_product_attention.default, (t(2, 3, 5, 8), t(2, 3, 7, 8), t(2, 3, 7, 4)),
     2 * 3 * 5 * 7 * (2 * 8 + 2 * 4 + 5)),
    ("einsum, matmul", aten.einsum.default, ("bij,bjk->bik", [t(2, 3, 4), t(2, 4, 5)]), 2 * 2 * 3 * 4 * 5),
    ("einsum, ellipsis", aten.einsum.default, ("...i,ji->...j", [t(2, 3, 4), t(5, 4)]), 2 * 6 * 5 * 4),
    ("einsum, outer", aten.einsum.default, ("i,j->ij", [t(3), t(4)]), 12),
    ("einsum, implicit", aten.einsum.default, ("ij,jk", [t(3, 4), t(4, 5)]), 2 * 60),
    ("einsum, chain", aten.einsum.default, ("ij,jk,kl->il", [t(2, 3), t(3, 4), t(4, 5)]), 2 * 24 + 2 * 40),
    ("add, broadcast", aten.add.Tensor, (t(4, 5), t(5)), 20),
    ("gelu", aten.gelu.default, (t(4, 5),), 20),
    ("sum", aten.sum.dim_IntList, (t(4, 5), [1]), 20),
    ("amax", aten.amax.default, (t(4, 5), [1]), 20),
    ("softmax", aten.softmax.int, (t(4, 5), -1), 5 * 20),
    ("layer_norm", aten.layer_norm.default, (t(4, 5), [5], t(5), t(5)), 7 * 20),
    ("max_pool2d", aten.max_pool2d.default, (t(1, 3, 8, 8), [2, 2]), 3 * 16 * 4),
    ("avg_pool2d, one size", aten.avg_pool2d.default, (t(1, 3, 8, 8), [2]), 3 * 16 * 4),
    ("clone", aten.clone.default, (t(4, 5),), 0),
    ("embedding", aten.embedding.default, (t(100, 8), t(6, dtype=torch.int64)), 0),
]  # fmt: skip


@pytest.mark.parametrize(("op", "args", "expected"), [case[1:] for case in FLOPS], ids=[case[0] for case in FLOPS])
def test_flops_are_the_closed_form(op: Any, args: Arguments, expected: int) -> None:
    assert flops(node_of(op, *args)) == expected


FREE: list[tuple[Any, Arguments]] = [
    (aten.view.default, (t(4, 6), [2, 12])),
    (aten.reshape.default, (t(4, 6), [2, 12])),
    (aten._unsafe_view.default, (t(4, 6), [2, 12])),
    (aten.transpose.int, (t(4, 6), 0, 1)),
    (aten.permute.default, (t(4, 6), [1, 0])),
    (aten.t.default, (t(4, 6),)),
    (aten.expand.default, (t(1, 6), [4, 6])),
    (aten.slice.Tensor, (t(4, 6), 0, 1, 3)),
    (aten.select.int, (t(4, 6), 0, 1)),
    (aten.unsqueeze.default, (t(4, 6), 0)),
    (aten.squeeze.dim, (t(1, 6), 0)),
    (aten.detach.default, (t(4, 6),)),
    (aten.alias.default, (t(4, 6),)),
    (aten.split.Tensor, (t(4, 6), 2)),
    (aten.chunk.default, (t(4, 6), 2)),
    (aten.contiguous.default, (t(4, 6),)),
    (aten.to.dtype, (t(4, 6), torch.float32)),
    (aten.sym_size.int, (t(4, 6), 0)),
]


@pytest.mark.parametrize(("op", "args"), FREE, ids=[str(op) for op, _ in FREE])
def test_views_cost_nothing(op: Any, args: Arguments) -> None:
    node = node_of(op, *args)
    assert (flops(node), bytes_moved(node)) == (0, 0)


BYTES: list[tuple[str, Any, Arguments, int]] = [
    ("linear", aten.linear.default, (t(3, 16), t(8, 16), t(8)), 4 * (3 * 16 + 8 * 16 + 8 + 3 * 8)),
    ("half", aten.relu.default, (t(10, dtype=torch.bfloat16),), 2 * 20),
    ("compare", aten.gt.Tensor, (t(10), t(10)), 4 * 20 + 10),
    ("embedding reads its rows only", aten.embedding.default, (t(1000, 8), t(6, dtype=torch.int64)),
     2 * 4 * 6 * 8 + 8 * 6),
    ("several outputs", aten.native_layer_norm.default, (t(4, 5), [5], t(5), t(5), 1e-5), 4 * (20 + 10 + 20 + 8)),
    ("a conversion", aten.to.dtype, (t(10), torch.float16), 10 * (4 + 2)),
    ("a real copy", aten.contiguous.default, (t(4, 6).t(),), 4 * 24 * 2),
    ("expanded input", aten.neg.default, (t(1, 6).expand(100, 6),), 4 * (6 + 600)),
    ("empty", aten.neg.default, (t(0, 6),), 0),
    ("filled", aten.full.default, ([3, 4], 1.0), 4 * 12),
]  # fmt: skip


@pytest.mark.parametrize(("op", "args", "expected"), [case[1:] for case in BYTES], ids=[case[0] for case in BYTES])
def test_bytes_are_the_closed_form(op: Any, args: Arguments, expected: int) -> None:
    assert bytes_moved(node_of(op, *args)) == expected


def test_an_input_used_twice_is_read_once() -> None:
    graph, mode = fx.Graph(), FakeTensorMode()
    x = graph.placeholder("x")
    x.meta["val"] = mode.from_tensor(t(10))
    square = graph.call_function(aten.mul.Tensor, (x, x))
    square.meta["val"] = mode.from_tensor(t(10))
    assert bytes_moved(square) == 2 * 40
    assert (flops(x), bytes_moved(x)) == (0, 0)
    assert totals([x, square, square]) == (20, 160)


def _convolutional(x: torch.Tensor, w: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.conv2d(F.conv2d(x, w, padding=1).relu(), w, groups=1).flatten(1) @ v


@pytest.mark.parametrize(
    ("function", "inputs"),
    [
        (_convolutional, (t(2, 8, 6, 6), t(8, 8, 3, 3), t(8 * 16, 5))),
        (lambda a, b: torch.einsum("bhid,bhjd->bhij", a, b), (t(2, 3, 5, 8), t(2, 3, 7, 8))),
        (lambda x, w: F.linear(x, w) @ w, (t(2, 5, 16), t(8, 16))),
    ],
)
def test_matrix_work_agrees_with_torch(function: Callable[..., torch.Tensor], inputs: Arguments) -> None:
    graph = make_fx(function, tracing_mode="fake")(*inputs).graph
    with FlopCounterMode(display=False) as counter:
        function(*inputs)
    products = [n for n in graph.nodes if any(p in str(n.target) for p in ("mm", "conv"))]
    assert sum(flops(node) for node in products) == counter.get_total_flops() > 0


def test_symbolic_sizes_count_with_their_hint_and_stay_dynamic() -> None:
    class Net(torch.nn.Module):
        def forward(self, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
            return F.linear(x, w).relu()

    batch = torch.export.Dim("batch", min=2, max=64)
    exported = torch.export.export(Net(), (t(6, 16), t(8, 16)), dynamic_shapes=({0: batch}, None))
    linear, relu = [node for node in exported.graph.nodes if node.op == "call_function"]
    before = list(linear.meta["val"].shape[0].node.shape_env.guards)
    assert isinstance(linear.meta["val"].shape[0], torch.SymInt)
    assert flops(linear) == 2 * 6 * 8 * 16
    assert (flops(relu), bytes_moved(relu)) == (48, 2 * 4 * 48)
    assert list(linear.meta["val"].shape[0].node.shape_env.guards) == before


def test_sizes_that_depend_on_data_count_as_one() -> None:
    class Net(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.nonzero().float().relu()

    exported = torch.export.export(Net(), (torch.ones(5),))
    relu = [node for node in exported.graph.nodes if node.target is aten.relu.default]
    assert [flops(node) for node in relu] == [1]


def test_seconds_is_the_roofline() -> None:
    target = replace(get("x86-64-v4"), flops={"float32": 1e9, "bfloat16": 4e9}, bandwidth=1e6)
    heavy = node_of(aten.mm.default, t(512, 512), t(512, 512))
    light = node_of(aten.relu.default, t(1000))
    assert seconds(heavy, replace(target, bandwidth=1e12)) == pytest.approx(2 * 512**3 / 1e9)
    assert seconds(light, target) == pytest.approx(8000 / 1e6)
    half = node_of(aten.mm.default, t(64, 64, dtype=torch.bfloat16), t(64, 64, dtype=torch.bfloat16))
    assert seconds(half, replace(target, bandwidth=math.inf)) == pytest.approx(2 * 64**3 / 4e9)
    assert seconds(light, replace(target, flops={}, bandwidth=0)) == 0


def test_nodes_that_return_nothing_cost_nothing() -> None:
    graph = fx.Graph()
    check = graph.call_function(aten._assert_async.default, ())
    output = graph.output(())
    assert totals([check, output]) == (0, 0)


def test_a_node_without_a_value_is_an_error() -> None:
    node = fx.Graph().call_function(aten.relu.default, ())
    with pytest.raises(ValueError, match="fake tensor"):
        flops(node)
