"""How results lie in memory inside whole programs: what callers see, images between convolutions, copies, views."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from reference import Wrapped, region_of
from torch import nn
from torch.export import Dim
from torch.nn import functional as F

pytest.importorskip("tvm")

import torchlathe
from torchlathe.codegen.base import Region, Schedule
from torchlathe.codegen.plans.layout import order_in_memory
from torchlathe.codegen.tvm.backend import TvmBackend
from torchlathe.passes.capture import capture
from torchlathe.targets.target import Target

LAST = (0, 2, 3, 1)
TARGET = Target("cpu", "cpu", "generic", 2, {}, 0.0, (), 0, ("float32",), vector_bits=256)


class Gated(nn.Module):
    """A convolution, a gate that no convolution takes in, and what `tail` makes of it."""

    def __init__(self, tail: Callable[..., Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.next = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 8, 1)
        self.tokens, self.all, self.tail = nn.Linear(16, 8), nn.Linear(16 * 30, 8), tail

    def forward(self, x: torch.Tensor) -> Any:
        y = self.conv(x)
        return self.tail(self, y * torch.sigmoid(F.adaptive_avg_pool2d(y, 1)))


def ours(net: nn.Module, *args: torch.Tensor, others: Any = (), **options: Any) -> list[Any]:
    """What runs the program: name of the last node, backend and order. The answers and their strides are eager's."""
    with torch.no_grad():
        fast = torchlathe.optimize(net.eval(), args, level="fast", **options)
        for values in (args, *others):
            found, wanted = fast(*values), net(*values)
            for a, b in zip(*((v,) if isinstance(v, torch.Tensor) else v for v in (found, wanted)), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
                assert a.stride() == b.stride()
    rows = [(c.region.nodes[-1].name, c.kernel.backend, c.kernel.destinations) for c in fast.choices]
    return [(name, backend, None if places is None else places[0].order) for name, backend, places in rows]


def test_a_gate_between_convolutions_keeps_channels_last() -> None:
    x = torch.randn(2, 3, 6, 5)
    assert ours(Gated(lambda s, y: s.next(y)), x)[-2:] == [("mul", "tvm", LAST), ("conv2d_1", "tvm", LAST)]
    (gate,) = [r for r in ours(Gated(lambda s, y: y), x) if r[0] == "mul"]
    assert gate == ("mul", "tvm", None)  # callers see what eager gives for such an image


@pytest.mark.parametrize("tail", [
    lambda s, y: s.tokens(y.permute(0, 2, 3, 1)),
    lambda s, y: s.all(y.flatten(1)),
], ids=["tokens", "flat"])  # fmt: skip
@pytest.mark.parametrize("last", [False, True])
def test_what_wants_another_layout_gets_it(tail: Callable[..., Any], last: bool) -> None:
    x = torch.randn(2, 3, 6, 5)
    found = ours(Gated(tail), x.contiguous(memory_format=torch.channels_last) if last else x)
    assert [r for r in found if r[1] == "tvm" and r[2] is None and "linear" not in r[0]]
    assert all(backend != "eager" or "view" in name or "reshape" in name for name, backend, _ in found)


def test_what_lies_otherwise_than_the_trace_says() -> None:
    """torch traces a roll as contiguous and leaves channels last."""
    net, others = Gated(lambda s, y: s.next(torch.roll(y, 1, 2)[:, :, 1:] * 2)), [(torch.randn(5, 3, 6, 5),)]
    with torch.no_grad():
        x = torch.randn(2, 3, 6, 5)
        fast = torchlathe.optimize(
            net.eval(), (x,), dynamic_shapes={"x": {0: Dim("batch", min=1, max=64)}}, level="fast"
        )
        for values in ((x,), *others):
            torch.testing.assert_close(fast(*values), net(*values), rtol=1e-4, atol=1e-5)
    assert fast.choices[-1].kernel.backend == "tvm"


def test_readers_of_views_of_any_number_of_images_keep_their_kernels() -> None:
    """A view of what is now channels last has other strides than the trace says, and they are followed."""
    net, others = Gated(lambda s, y: s.tokens(y.flatten(2).transpose(1, 2))), [(torch.randn(5, 3, 6, 5),)]
    found = ours(net, torch.randn(2, 3, 6, 5), others=others, dynamic_shapes={"x": {0: Dim("batch", min=1, max=64)}})
    assert ("mul", "tvm", LAST) in [(name.partition("_")[0], *rest) for name, *rest in found]
    assert found[-1][:2] == ("linear", "tvm")


def test_foreign_code_gets_what_the_trace_says() -> None:
    @torch.library.custom_op("layouts::strict", mutates_args=())
    def strict(x: torch.Tensor) -> torch.Tensor:
        assert x.is_contiguous()
        return x.clone()

    strict.register_fake(lambda x: torch.empty(x.shape))
    assert ours(Gated(lambda s, y: strict(y)), torch.randn(2, 3, 6, 5))
    last = torch.randn(2, 3, 6, 5).contiguous(memory_format=torch.channels_last)
    assert ours(Gated(lambda s, y: strict(y.contiguous())), last)


def test_a_view_that_is_returned_is_not_written_anew() -> None:
    def keys(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        k = x.transpose(1, 2)
        return k, (k * 2 + 1).sigmoid()

    x = torch.randn(2, 7, 3, 16)
    assert ours(Wrapped(keys), x)[-1][1:] == ("tvm", (0, 2, 1, 3))
    assert torchlathe.optimize(Wrapped(keys), (x,), level="fast")(x)[0].data_ptr() == x.data_ptr()


def test_equal_code_of_which_callers_see_one_result() -> None:
    """The two are different kernels, also in an artefact and in records."""

    def body(x: torch.Tensor) -> torch.Tensor:
        return (x.transpose(1, 2) * 2 + 1).sigmoid()

    def both(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return body(x), torch.roll(body(y), 1, 0)

    args = torch.randn(2, 7, 3, 12), torch.randn(2, 7, 3, 12)
    orders = [order for name, backend, order in ours(Wrapped(both), *args) if backend == "tvm"]
    assert orders == [(0, 2, 1, 3), None]
    one, other = (region_of(f, args[:1])[0] for f in (body, body))
    other.outputs[0].meta["kept"] = False
    assert one.key(None) != other.key(None)


def test_schedules_of_older_artefacts_still_compile() -> None:
    net = nn.Conv2d(8, 8, 3, padding=1, groups=8).eval()
    x = torch.randn(1, 8, 6, 5)
    program = capture(net, (x,))
    region = Region.of(n for n in program.graph.nodes if n.op == "call_function")
    kernel = TvmBackend(program).lower(region, TARGET, Schedule("depthwise", (("pixels", 4), ("groups", 1))))
    assert kernel.destinations is not None


@pytest.mark.parametrize(("shape", "order"), [
    ((4, 16, 1, 33), LAST), ((1, 16, 5, 6), LAST), ((3, 4, 5, 6), (1, 3, 0, 2)),
])  # fmt: skip
def test_order_of_dimensions_of_size_one(shape: tuple[int, ...], order: tuple[int, ...]) -> None:
    """Strides are those of the tensor, also where a dimension of size one could lie anywhere."""
    there = torch.empty([shape[d] for d in order]).permute([order.index(d) for d in range(4)])
    found = order_in_memory(there)
    assert found is not None
    again = torch.empty([shape[d] for d in found]).permute([found.index(d) for d in range(4)])
    assert again.stride() == there.stride()
    assert order_in_memory(there[..., ::2]) is None or shape[3] == 1


def test_artefact_of_equal_code(tmp_path: Path) -> None:
    def both(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return (x.transpose(1, 2) * 2).exp(), torch.roll((y.transpose(1, 2) * 2).exp(), 1, 0)

    args = torch.randn(2, 7, 3, 12), torch.randn(2, 7, 3, 12)
    torchlathe.optimize(Wrapped(both), args, level="fast").save(tmp_path / "both.lathe")
    for native in (True, False):
        for a, b in zip(torchlathe.load(tmp_path / "both.lathe", native=native)(*args), both(*args), strict=True):
            torch.testing.assert_close(a, b)
