"""Weights beyond a budget of device bytes: plans are sound and even, and answers are those of the resident program."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from threads import in_threads
from torch import nn

import torchlathe
from torchlathe import targets
from torchlathe.codegen.base import Kernel
from torchlathe.codegen.executable import Executable
from torchlathe.codegen.lower import lower_eager, lower_unmeasured
from torchlathe.codegen.stream_plan import SMALL, Load, Plan, Unit, Visit, plan, verify
from torchlathe.codegen.weight_store import Copies, memories
from torchlathe.optimizer import judge as judging
from torchlathe.passes.capture import capture
from torchlathe.passes.errors import InputError
from torchlathe.passes.nodes import COMPUTING, may_share
from torchlathe.passes.placement import place_of, placed

HOST = targets.get("cpu")
BIG = SMALL  # bytes of a unit that is worth a copy


def uniform(count: int, size: int = BIG) -> tuple[list[Unit], list[Visit]]:
    """One unit per step."""
    return [Unit(f"w{k}", size) for k in range(count)], [Visit(k, k, k) for k in range(count)]


# --- plans


def test_what_fits_is_not_streamed() -> None:
    units, visits = uniform(5)
    made = plan(units, visits, 5 * BIG)
    assert not made.streamed and not made.loads and made.ring == 0 and made.resident == 5 * BIG


@pytest.mark.parametrize("budget", [4, 7, 10, 13])
def test_equal_weights_are_streamed_as_few_and_as_evenly_as_the_budget_allows(budget: int) -> None:
    units, visits = uniform(16)
    made = plan(units, visits, budget * BIG)
    verify(made, units, visits, budget * BIG)
    assert len(made.streamed) == 16 - budget + 2  # the ring holds two: one is read, one is copied
    gaps = [b - a for a, b in zip(sorted(made.streamed), sorted(made.streamed)[1:], strict=False)]
    assert all(16 // len(made.streamed) <= g <= -(-16 // len(made.streamed)) for g in gaps)
    assert all(n.start < n.visit.first for n in made.loads[1:])  # no step but the first waits for all before it


def test_a_weight_used_often_stays() -> None:
    units, visits = uniform(8)
    visits += [Visit(3, k, k) for k in (5, 7)]
    assert 3 not in plan(units, visits, 4 * BIG).streamed


def test_a_weight_that_would_need_a_large_ring_stays() -> None:
    units, visits = uniform(16)
    units[8] = Unit("head", 6 * BIG)
    made = plan(units, visits, 12 * BIG)
    assert 8 not in made.streamed and made.copied == 11 * BIG  # 16 if it is streamed where its turn comes


def test_small_weights_stay() -> None:
    units, visits = uniform(8)
    units += [Unit(f"bias{k}", 64) for k in range(8)]
    visits += [Visit(8 + k, k, k) for k in range(8)]
    made = plan(units, visits, 5 * BIG)
    assert made.streamed and max(made.streamed) < 8


def test_what_must_stay_stays_even_if_all_else_is_streamed() -> None:
    units, visits = uniform(6)
    units[2] = replace(units[2], stays=True)
    made = plan(units, visits, 2 * BIG)
    assert made.streamed == {0, 1, 3, 4, 5} and made.resident == BIG and made.ring == BIG


def test_a_budget_that_is_too_small_names_the_weight_and_one_that_is_enough() -> None:
    units, visits = uniform(6)
    units[4] = Unit("the.largest", 3 * BIG)
    units[1] = replace(units[1], stays=True)
    visits.append(Visit(0, 4, 4))  # read beside it
    with pytest.raises(InputError, match=rf"the\.largest.*beside {BIG} bytes") as error:
        plan(units, visits, 5 * BIG - 1)
    assert f"at least {5 * BIG} bytes" in str(error.value)
    verify(plan(units, visits, 5 * BIG), units, visits, 5 * BIG)


def test_all_must_stay_and_does_not_fit() -> None:
    with pytest.raises(InputError, match="at least 128 bytes"):
        plan([Unit("state", 128, stays=True)], [Visit(0, 0, 0)], 64)


def good() -> tuple[Plan, list[Unit], list[Visit]]:
    """Three units, all streamed through a ring of two; the second is held for two steps."""
    units, visits = [Unit(f"w{k}", 64) for k in range(3)], [Visit(0, 0, 0), Visit(1, 1, 2), Visit(2, 2, 2)]
    loads = Load(visits[0], 0, 0), Load(visits[1], 64, 0), Load(visits[2], 0, 1)
    return Plan(frozenset((0, 1, 2)), loads, 0, 128, 192), units, visits


@pytest.mark.parametrize(("number", "wrong", "message"), [
    (2, {"offset": 64}, "overwritten"),  # onto what is still held
    (1, {"offset": 0}, "overwritten"),  # onto what the first step reads
    (2, {"start": 0}, "overwritten"),  # while the first step reads
    (1, {"start": 2}, "order"),
    (2, {"start": 3}, "missing"),
    (1, {"offset": 96}, "outside"),
    (0, {"offset": -64}, "outside"),
])  # fmt: skip
def test_the_verifier_sees_bad_loads(number: int, wrong: dict[str, int], message: str) -> None:
    made, units, visits = good()
    assert verify(made, units, visits, 128) == 128
    loads = list(made.loads)
    loads[number] = replace(loads[number], **wrong)
    with pytest.raises(AssertionError, match=message):
        verify(replace(made, loads=tuple(loads)), units, visits, 128)


def test_the_verifier_sees_bad_totals() -> None:
    made, units, visits = good()
    with pytest.raises(AssertionError, match="exceed"):
        verify(made, units, visits, 127)
    with pytest.raises(AssertionError, match="exceed"):  # a resident unit counts whatever the plan says
        verify(replace(made, streamed=frozenset((0, 1))), units, visits, 128)
    with pytest.raises(AssertionError, match="missing"):
        verify(replace(made, loads=made.loads[:2]), units, visits, 128)
    with pytest.raises(AssertionError, match="must stay"):
        verify(made, [units[0], replace(units[1], stays=True), units[2]], visits, 128)


@st.composite
def programs(draw: st.DrawFn) -> tuple[list[Unit], list[Visit], int]:
    """Units of few or many sizes that are read by random steps, some of them held, and a budget."""
    count, steps = draw(st.integers(1, 14)), draw(st.integers(1, 16))
    sizes = st.integers(1, draw(st.sampled_from((2, 40)))).map(lambda n: n * draw(st.sampled_from((64, BIG))))
    units = [Unit(f"w{k}", draw(sizes), draw(st.integers(0, 7)) == 0) for k in range(count)]
    visits = []
    for k in range(count):
        last = -2
        for first in sorted(draw(st.sets(st.integers(0, steps - 1), max_size=4))):
            if first > last + 1:
                last = min(first + draw(st.sampled_from((0, 0, 0, 1, 5))), steps - 1)
                visits.append(Visit(k, first, last))
    return units, visits, draw(st.integers(1, sum(u.size for u in units) + 64))


@settings(deadline=None, max_examples=300)
@given(programs())
def test_every_plan_passes_the_verifier_and_every_refusal_names_what_is_enough(
    case: tuple[list[Unit], list[Visit], int],
) -> None:
    units, visits, budget = case
    total = sum(u.size for u in units)
    fixed = sum(u.size for u in units if u.stays)
    at_once = [sum(units[v.unit].size for v in visits if v.first <= s <= v.last and not units[v.unit].stays)
               for s in range(17)]  # fmt: skip
    try:
        made = plan(units, visits, budget)
    except InputError as error:
        enough = int(str(error).rpartition("at least ")[2].split()[0])
        assert budget < enough <= max(total, fixed + sum(units[v.unit].size for v in visits))
        verify(plan(units, visits, enough), units, visits, enough)
        return
    assert verify(made, units, visits, budget) <= budget
    assert budget >= min(total, fixed + max(at_once))
    assert made.copied == sum(units[v.unit].size for v in visits if v.unit in made.streamed)


# --- memory


def test_tensors_that_overlap_move_together() -> None:
    base, alone = torch.arange(100.0), torch.arange(7, dtype=torch.int16)
    tensors = {"a": base[10:30], "b": base[20:60].view(8, 5).t(), "c": base[70:].expand(2, 30), "d": alone, "e": alone}
    found = memories(tensors.items())
    assert [len(m.tensors) for m in found] == [2, 1, 1]
    for memory in found:
        there = torch.zeros(memory.size + 64, dtype=torch.uint8)[64:]
        there.copy_(memory.copied(torch.device("cpu")))
        for view, (tensor, _) in zip(memory.views(there), memory.tensors, strict=True):
            assert torch.equal(view, tensor) and view.stride() == tensor.stride()
            assert view.data_ptr() != tensor.data_ptr()
    assert not any(m.plain for m in memories([("s", torch.eye(3).to_sparse()), ("z", torch.empty(0))]))


@pytest.mark.parametrize("name", sorted(COMPUTING))
def test_operators_that_compute_return_new_memory(name: str) -> None:
    x, w = torch.ones(1, 4, 4), torch.ones(4, 4)
    row = [4], torch.ones(4), torch.ones(4)
    image = torch.ones(1, 4, 4, 4, 4)
    args: dict[str, tuple[Any, ...]] = {
        "linear": (x, w), "matmul": (w, w), "scaled_dot_product_attention": (x[None], x[None], x[None]),
        "layer_norm": (x, *row), "rms_norm": (x, [4]), "group_norm": (x, 2), "softmax": (x, -1), "log_softmax": (x, 1),
        "conv1d": (x, torch.ones(4, 4, 1)), "conv2d": (image[0], torch.ones(4, 4, 1, 1)),
        "conv3d": (image, torch.ones(4, 4, 1, 1, 1)),
    }  # fmt: skip
    overload = getattr(torch.ops.aten, name).int if "softmax" in name else getattr(torch.ops.aten, name).default
    given = {t.untyped_storage().data_ptr() for t in args[name] if isinstance(t, torch.Tensor)}
    assert overload(*args[name]).untyped_storage().data_ptr() not in given
    assert not may_share(torch.fx.Graph().create_node("call_function", overload))


# --- executables


class Chain(nn.Module):
    """Residual layers between an embedding and a head that share a weight; one layer is used twice, far apart."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(50, 64), nn.Linear(64, 50)
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(6))
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for layer in [*self.layers, self.layers[0]]:
            x = x + torch.relu(layer(x))
        return self.head(x)  # type: ignore[no-any-return]


IDS = torch.arange(21).view(3, 7)


def pair(
    model: nn.Module, args: tuple[Any, ...], budget: int, lower: Any = lower_eager
) -> tuple[Executable, Executable]:
    """The same kernels with resident weights, and within a budget."""
    program = capture(model.eval(), args)
    choices = lower(program, HOST)
    return Executable(program, choices), Executable(program, choices, weights_budget=budget)


def bound(executable: Executable) -> int:
    """Bytes of all tensors that the generated code names, and of those that it takes from the ring."""
    space = executable._plain.__globals__.values()  # type: ignore[attr-defined]
    held = [v for v in space if isinstance(v, torch.Tensor)] + [executable.weight_store.ring]  # type: ignore[union-attr]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}.values())


@pytest.mark.parametrize("lower", [lower_eager, lower_unmeasured])
@pytest.mark.parametrize("budget", [34_000, 50_000, 70_000, 100_000])
def test_answers_are_the_same_to_the_bit_within_the_budget(lower: Any, budget: int) -> None:
    resident, streamed = pair(Chain(), (IDS,), budget, lower)
    store = streamed.weight_store
    assert store is not None and store.plan.loads and bound(streamed) <= budget
    for _ in range(3):  # the ring holds the end of the call before
        assert torch.equal(streamed(IDS), resident(IDS))


def test_tied_weights_are_one_copy_and_a_weight_used_twice_is_copied_twice() -> None:
    _, streamed = pair(Chain(), (IDS,), 34_000)
    store = streamed.weight_store
    assert store is not None
    used = [n.visit.unit for n in store.plan.loads]
    assert sorted(used.count(k) for k in set(used))[-2:] == [2, 2]  # the tied weight, and the layer's
    assert store.plan.copied >= 4 * (2 * 50 * 64 + 7 * 64 * 64)


def test_a_budget_that_holds_everything_changes_nothing() -> None:
    resident, streamed = pair(Chain(), (IDS,), 1 << 20)
    assert streamed.source == resident.source and "take" not in streamed.source
    weights = streamed.program.weights
    assert all(weights[k] is v for k, v in resident.program.weights.items())


def test_the_least_budget_is_named_with_its_weight_and_is_enough() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 200), nn.ReLU(), nn.Linear(200, 32))
    x = torch.randn(2, 64)
    with pytest.raises(InputError, match=r"reads 2\.weight") as error:
        pair(model, (x,), 1000)
    enough = int(str(error.value).rpartition("at least ")[2].split()[0])
    assert enough == 4 * (64 * 200) + 1024  # the weight, and its bias, rounded up
    resident, streamed = pair(model, (x,), enough)
    assert torch.equal(streamed(x), resident(x)) and bound(streamed) == enough
    with pytest.raises(InputError):
        pair(model, (x,), enough - 1)


def test_a_view_of_a_weight_keeps_it_where_it_is() -> None:
    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.weights = nn.ParameterList(torch.randn(64, 64) for _ in range(5))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            turned = self.weights[0].t()[:32]  # made first, read last
            for weight in list(self.weights)[1:]:
                x = torch.sin(x @ weight)
            return x[:, :32] @ turned

    resident, streamed = pair(Views(), (torch.randn(3, 64),), 34_000)
    for _ in range(3):
        x = torch.randn(3, 64)
        assert torch.equal(streamed(x), resident(x))


def test_carried_and_returned_weights_stay() -> None:
    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.register_buffer("total", torch.zeros(64, 64))
            self.table, self.layers = (
                nn.Parameter(torch.randn(64, 64)),
                nn.ModuleList(nn.Linear(64, 64) for _ in range(3)),
            )

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            for layer in self.layers:
                x = layer(x).tanh()
            self.total.add_(x)
            return x + self.total, self.table[:3]

    model, x = Counter(), torch.randn(64, 64)
    program = capture(model.eval(), (x,))
    streamed = Executable(program, lower_eager(program, HOST), weights_budget=50_000)
    store = streamed.weight_store
    assert store is not None and store.plan.loads and "take" in streamed.source
    assert not store.streams(program.weights["total"]) and not store.streams(program.weights["table"])
    y = x
    with torch.no_grad():
        for layer in model.layers:
            y = layer(y).tanh()
    for call in (1, 2, 3):
        found, rows = streamed(x)
        torch.testing.assert_close(found, y + call * y)
        assert torch.equal(rows, model.table[:3])


def test_calls_at_the_same_time_take_turns() -> None:
    _, streamed = pair(Chain(), (IDS,), 34_000)
    inputs = [IDS + k for k in range(4)]
    wanted, wrong = [streamed(i) for i in inputs], []

    def work(k: int) -> None:
        for _ in range(20):
            if not torch.equal(streamed(inputs[k]), wanted[k]):
                wrong.append(k)

    in_threads(work, range(4))
    assert not wrong


def test_a_call_that_fails_half_way_leaves_the_next_one_unharmed() -> None:
    resident, streamed = pair(Chain(), (IDS,), 34_000)
    with pytest.raises(InputError):
        streamed(IDS[:1])
    with pytest.raises(IndexError):
        streamed(IDS + 1000)  # found by the embedding itself
    assert torch.equal(streamed(IDS), resident(IDS))


class Recorded(Copies):
    """Copies that are as late as they may be: done when waited for, or never. What is taken too early is old."""

    def __init__(self) -> None:
        self.queued: dict[int, Any] = {}
        self.most = 0

    def queue(self, step: int, pairs: Any) -> None:
        self.queued[step] = pairs
        self.most = max(self.most, len(self.queued))

    def wait(self, step: int) -> None:
        for earlier in [s for s in self.queued if s <= step]:  # one stream: in order
            super().queue(earlier, self.queued.pop(earlier))


def test_copies_may_come_as_late_as_they_are_waited_for() -> None:
    resident, streamed = pair(Chain(), (IDS,), 60_000)
    store = streamed.weight_store
    assert store is not None
    store._copies = late = Recorded()
    store.ring.fill_(255)  # NaN
    for _ in range(2):
        assert torch.equal(streamed(IDS), resident(IDS)) and not late.queued
    assert late.most > 1  # several are under way at once


def test_a_placed_graph_may_leave_its_weights_where_they_are() -> None:
    program = capture(nn.Linear(4, 4), (torch.randn(2, 4),))
    moved = placed(program, torch.device("meta"), weights=False)
    assert place_of(moved).type == "meta" and all(moved.weights[k] is v for k, v in program.weights.items())
    assert all(v.device.type == "meta" for v in placed(program, torch.device("meta")).weights.values())


# --- the front door


SCRIPT = """
import sys, torch, torchlathe
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/.."]
from test_weight_store import IDS, Chain, bound
model, memory = Chain().eval(), 60_000
fast = torchlathe.optimize(model, (IDS,), target="nvidia-sm90", device_memory=memory)
torch.testing.assert_close(fast(IDS), model(IDS), rtol=1e-4, atol=1e-4)
assert "triton" in {c.kernel.backend for c in fast.choices}
assert fast.weight_store.plan.loads and bound(fast) <= memory
assert any("host memory" in note for note in fast.report.notes), fast.report.notes
fast.save(sys.argv[2])
again = torchlathe.load(sys.argv[2])
assert again.weight_store.plan == fast.weight_store.plan and torch.equal(again(IDS), fast(IDS))
print("all is well")
"""


def test_optimize_within_device_memory_and_back_from_a_file(tmp_path: Path) -> None:
    """On a GPU target whose kernels are interpreted, which is decided when a process begins."""
    env = os.environ | {"TRITON_INTERPRET": "1", "TORCHLATHE_CACHE": str(tmp_path)}
    call = [sys.executable, "-c", SCRIPT, str(Path(__file__).parent), str(tmp_path / "model.lathe")]
    done = subprocess.run(call, capture_output=True, text=True, env=env, check=False)
    assert done.stdout.strip() == "all is well", done.stderr


def test_wrong_kernels_give_way_to_plain_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    program = capture(Chain().eval(), (IDS,))
    wrong = lower_eager(program, HOST)
    wrong[-1] = replace(wrong[-1], kernel=Kernel("wrong", "mine", lambda *values: torch.zeros(3, 7, 50)))
    monkeypatch.setattr(judging, "lower_ahead", lambda program, target: (wrong, []))
    judge = judging.Judge([IDS], program.run([IDS]), timed=False)
    made, step, _ = judging.lower_streamed(program, targets.get("nvidia-sm90"), judge, 60_000, run=True)
    assert not step.kept and "deviates" in step.reason
    assert torch.equal(made(IDS), program(IDS)) and made.weight_store is not None and made.weight_store.plan.loads


@pytest.mark.parametrize(("target", "memory", "message"), [
    ("cpu", 60_000, "is a CPU"), ("nvidia-sm90", 0, "device_memory is 0"),
    ("nvidia-sm90", 5_000, r"at least \d+ bytes"),
])  # fmt: skip
def test_what_device_memory_does_not_take(
    target: str, memory: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(InputError, match=message):
        torchlathe.optimize(Chain().eval(), (IDS,), target=target, device_memory=memory)


def test_a_model_that_is_not_in_host_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(InputError, match=r"embed\.weight is on meta"):
        torchlathe.optimize(Chain().eval().to("meta"), (IDS,), target="nvidia-sm90", device_memory=60_000)
