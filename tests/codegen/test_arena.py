"""The arena: no result is overwritten while it is needed, the caller's results lie outside, calls may overlap."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from threads import in_threads
from torch.nn import functional as F

pytest.importorskip("tvm")

from torchlathe import targets
from torchlathe.codegen import arena
from torchlathe.codegen.arena import ALIGNMENT, Arenas, Slot, plan, verify
from torchlathe.codegen.base import Destination
from torchlathe.codegen.eager import EagerBackend
from torchlathe.codegen.executable import Executable
from torchlathe.codegen.lower import backends, lower
from torchlathe.codegen.partition import partition
from torchlathe.codegen.select import Choice
from torchlathe.codegen.tuner import Tuner
from torchlathe.passes.capture import capture
from torchlathe.passes.errors import InputError
from torchlathe.targets.cost import is_free

HOST = targets.get("cpu")


def compiled(model: torch.nn.Module, args: tuple[torch.Tensor, ...], **options: Any) -> Executable:
    """Lowered by guess, so that our kernels run wherever they can."""
    program = capture(model.eval(), args, **options)
    choices, _ = lower(program, HOST, args, Tuner(level="fast"))
    return Executable(program, choices)


class Residual(torch.nn.Module):
    """A chain in which early values are needed late."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(32, 32) for _ in range(4))

    def forward(self, x: torch.Tensor) -> Any:
        kept = first = F.gelu(self.layers[0](x))
        for layer in self.layers[1:]:
            x = F.layer_norm(layer(kept) + x, (32,))
            kept = x * first
        return kept, first.transpose(0, 1), x[:1]


def test_results_of_a_call_survive_the_next_one() -> None:
    model, x = Residual(), torch.randn(16, 32)
    run = compiled(model, (x,))
    slots = plan(run.program, run.choices)
    assert len(slots) >= 3
    first = run(x)
    wanted = [v.clone() for v in first]
    run(torch.randn(16, 32))
    for value, before, eager in zip(first, wanted, model(x), strict=True):
        assert torch.equal(value, before)
        torch.testing.assert_close(value, eager)


def test_slots_are_reused_and_smaller_than_all_results_together() -> None:
    model = torch.nn.Sequential(*(m for _ in range(8) for m in (torch.nn.Linear(64, 64), torch.nn.LayerNorm(64))))
    run = compiled(model, (torch.randn(32, 64),))
    slots = plan(run.program, run.choices)
    size = verify(slots, run.choices)
    assert len(slots) == 15 and size == 2 * 32 * 64 * 4  # only two results live at a time


def test_views_keep_their_memory() -> None:
    class Views(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = torch.nn.Linear(32, 32), torch.nn.Linear(32, 32)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            view = self.one(x).view(4, 4, 32).transpose(0, 1)[1:]
            other = torch.relu(self.two(x)) * self.two(x + 1)
            return view.sum() + other

    model, x = Views(), torch.randn(16, 32)
    torch.testing.assert_close(compiled(model, (x,))(x), model(x))


@pytest.mark.parametrize(("operator", "shares"), [
    (torch.ops.aten.view.default, True), (torch.ops.aten._unsafe_view.default, True),
    (torch.ops.aten.unsafe_split.Tensor, True), (torch.ops.aten.dropout.default, True),
    (torch.ops.aten.add.Tensor, False), (torch.ops.aten.clone.default, False),
], ids=str)  # fmt: skip
def test_operators_that_may_share_memory_are_known(operator: Any, shares: bool) -> None:
    node = torch.fx.Graph().create_node("call_function", operator)
    assert arena.may_share(node) is shares


def test_calls_at_the_same_time_have_memory_of_their_own() -> None:
    model = Residual()
    inputs = [torch.randn(16, 32) for _ in range(4)]
    run = compiled(model, (inputs[0],))
    wanted, wrong = [model(x)[0] for x in inputs], []

    def work(k: int) -> None:
        for _ in range(50):
            if not torch.allclose(run(inputs[k])[0], wanted[k], atol=1e-5):
                wrong.append(k)

    in_threads(work, range(4))
    assert not wrong


def test_a_call_that_fails_leaves_the_next_one_unharmed() -> None:
    model, x = Residual(), torch.randn(16, 32)
    run = compiled(model, (x,))
    with pytest.raises(InputError):
        run(torch.randn(3, 32))
    torch.testing.assert_close(run(x)[0], model(x)[0])


def test_blocks_are_aligned_and_shaped() -> None:
    node: Any = object()
    slots = [Slot(node, Destination((2, 3, 5), torch.float32, (0, 2, 1)), 128, 0, 1, 0),
             Slot(node, Destination((7,), torch.bfloat16), 64, 1, 2, 128)]  # fmt: skip
    arenas = Arenas(slots)
    a, b = block = arenas.take()
    assert a.shape == (2, 3, 5) and a.permute(0, 2, 1).is_contiguous() and b.dtype is torch.bfloat16
    assert a.data_ptr() % ALIGNMENT == 0 and b.data_ptr() - a.data_ptr() == 128
    assert arenas.take()[0].data_ptr() != a.data_ptr()
    arenas.give(block)
    assert arenas.take()[0] is a


STEP: Any = SimpleNamespace(region=None, kernel=SimpleNamespace(replaces=()))


class Stream(torch.nn.Module):
    """Sums on a residual stream; `late` reads the first of them again at the end, `own` feeds a layer its residual."""

    def __init__(self, late: bool = False, own: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.late, self.own = late, own
        self.layers = torch.nn.ModuleList(torch.nn.Linear(40, 40) for _ in range(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = y = torch.tanh(self.layers[0](x))
        for layer in self.layers[1:4]:
            y = y + layer(y if self.own else F.layer_norm(y, (40,)))
        return self.layers[4](y + first if self.late else y)


@pytest.mark.parametrize(("options", "replaced"), [({}, 3), ({"late": True}, 2), ({"own": True}, 0)])
def test_a_sum_is_written_where_its_residual_lies(options: dict[str, bool], replaced: int) -> None:
    model, x = Stream(**options), torch.randn(37, 40)
    run = compiled(model, (x,))
    slots = plan(run.program, run.choices)
    assert sum(s.over is not None for s in slots) == replaced
    assert all(s.over is None or s.over.offset == s.offset for s in slots)
    for _ in range(2):
        torch.testing.assert_close(run(x), model(x), rtol=1e-4, atol=1e-5)


class Turned(torch.nn.Module):
    """The second layer reads its residual once more by a view, whose rows other tasks need."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(40, 40) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.tanh(self.layers[0](x))
        return self.layers[2](y + self.layers[1](y.transpose(0, 1)))


def test_a_residual_that_a_view_reads_as_well_is_not_overwritten() -> None:
    model, x = Turned().eval(), torch.randn(30, 30, 40)
    program = capture(model, (x,))
    rivals = backends(program, HOST)[0]
    choices = []
    for region in partition(program, rivals, HOST):
        backend = EagerBackend() if len(region.nodes) == 1 and is_free(region.nodes[0]) else rivals[0]
        schedule = next(iter(backend.space(region, HOST)))
        if isinstance(backend, EagerBackend):
            program.infer(region.nodes[0])  # a view, where the kernel would have made a copy
        choices.append(Choice(region, backend.lower(region, HOST, schedule)))
    run = Executable(program, choices)
    slots = plan(program, choices)
    assert any(c.kernel.replaces for c in choices) and all(s.over is None for s in slots)
    torch.testing.assert_close(run(x), model(x), rtol=1e-4, atol=1e-5)
    residual = next(s for s in slots if s.node.name == "tanh")
    after = next(s for s in slots if s.first == residual.last)
    after.offset = residual.offset
    with pytest.raises(AssertionError, match="overwrites"):
        verify(slots, choices)


def test_the_verifier_sees_what_no_kernel_allows() -> None:
    model, x = Stream(), torch.randn(37, 40)
    run = compiled(model, (x,))
    slots = plan(run.program, run.choices)
    over = next(s for s in slots if s.over is not None)
    run.choices[over.first].kernel.replaces = ()
    with pytest.raises(AssertionError, match="overwrites"):
        verify(slots, run.choices)


def slot(first: int, last: int, size: int, offset: int) -> Slot:
    node: Any = f"{first}-{last}"
    return Slot(node, Destination((size,), torch.uint8), size, first, last, offset)


@pytest.mark.parametrize("other", [slot(1, 3, 128, 64), slot(2, 2, 64, 0), slot(0, 5, 64, 32)])
def test_the_verifier_sees_overlaps(other: Slot) -> None:
    steps = [STEP] * 6
    assert verify([slot(0, 2, 128, 0), slot(3, 4, 128, 0)], steps) == 128
    with pytest.raises(AssertionError):
        verify([slot(0, 2, 128, 0), other], steps)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 6), st.integers(1, 9)), min_size=1, max_size=25))
def test_every_plan_passes_the_verifier(lives: list[tuple[int, int, int]]) -> None:
    slots = [slot(first, first + length, size * ALIGNMENT, 0) for first, length, size in lives]
    placed: list[Slot] = []
    for s in sorted(slots, key=lambda s: (-s.size, s.first)):
        s.offset = arena._lowest(s, placed)
        placed.append(s)
    size = verify(slots, [STEP] * 20)
    alive = max(sum(s.size for s in slots if s.first <= t <= s.last) for t in range(20))
    assert alive <= size <= sum(s.size for s in slots)


class Heads(torch.nn.Module):
    """Views of results: cut, split into heads, turned; and a reshape that must copy."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = torch.nn.Linear(32, 96), torch.nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.first(x).split(32, -1)
        q, k, v = (t.view(2, 9, 4, 8).transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k.cos(), v).flip(1)
        return self.last(y.transpose(1, 2).reshape(2, 9, 32)).sin()


def test_views_of_results_are_made_once() -> None:
    model, args = Heads(), (torch.randn(2, 9, 32),)
    executable = compiled(model, args)
    assert "split" not in executable.source and "transpose" not in executable.source.split("flip")[0]
    for _ in range(3):
        x = torch.randn(2, 9, 32)
        torch.testing.assert_close(executable(x), model(x))


def test_a_reshape_that_copies_is_made_in_each_call() -> None:
    class Turned(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x.exp() + 1
            return (y.transpose(1, 2).reshape(2, -1).flip(1) + y.reshape(2, -1).flip(1)).sin()

    executable = compiled(Turned(), (torch.randn(2, 9, 32),))
    for _ in range(3):
        x = torch.randn(2, 9, 32)
        torch.testing.assert_close(executable(x), Turned()(x))
