"""Candidates of a region are those that won where a region of nearly its sizes was tried."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import fx
from torch.nn import functional as F

from torchlathe import targets
from torchlathe.codegen import near, trial
from torchlathe.codegen.base import Kernel, Region, Schedule
from torchlathe.codegen.eager import EagerBackend
from torchlathe.codegen.trial import Trial
from torchlathe.codegen.tuner import Tuner
from torchlathe.passes.capture import capture
from torchlathe.targets.records import Records
from torchlathe.targets.target import Target

HOST = targets.get("cpu")


class Many:
    """Offers schedules; number 5 is the fastest. Those in `wrong` give a wrong answer."""

    name = "many"

    def __init__(self, offers: Iterable[int] = range(8), wrong: Iterable[int] = ()) -> None:
        self.offers, self.wrong, self.lowered = list(offers), set(wrong), list[int]()

    def absorbs(self, node: fx.Node) -> bool:
        return False

    def supports(self, region: Region, target: Target) -> str | None:
        return None

    def space(self, region: Region, target: Target) -> Iterable[Schedule]:
        return [Schedule("s", (("n", n),)) for n in self.offers]

    def lower(self, region: Region, target: Target, schedule: Schedule) -> Kernel:
        number, eager = schedule["n"], EagerBackend().lower(region, target, Schedule())
        self.lowered.append(number)

        def call(*values: Any) -> Any:
            return eager.call(*values) + (1 if number in self.wrong else 0)

        return Kernel("k", self.name, call, schedule=schedule)


@pytest.fixture(autouse=True)
def known_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times by the number of the schedule, so that nothing depends on how busy the machine is."""

    def compare(calls: Mapping[str, Any], budget: float, tell: Any) -> dict[str, Any]:
        numbers = {name: 9 if name == "eager" else int(name.partition("n=")[2]) for name in calls}
        return {name: SimpleNamespace(median=1.0 + abs(number - 5)) for name, number in numbers.items()}

    monkeypatch.setattr("torchlathe.codegen.trial.race", compare)


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = torch.nn.Linear(24, 48)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.gelu(self.up(x))


def tried(records: Records, tokens: int, backend: Many, level: str = "default") -> list[int]:
    """Numbers of the schedules that a trial of a region of so many tokens lowers."""
    x = torch.randn(3, tokens, 24)
    program = capture(Net(), (x,))
    region = Region.of(n for n in program.graph.nodes if n.op == "call_function")
    values = [x if n.op == "placeholder" else program.weights[str(n.target)] for n in region.inputs]
    Tuner(level=level, records=records, isolated=False, each=0.01).choose(program, region, [backend], HOST, values)
    return backend.lowered


def test_near_sizes_try_the_best_of_before(tmp_path: Path) -> None:
    records = Records(tmp_path)
    assert tried(records, 40, Many()) == list(range(8))
    found = tried(Records(tmp_path), 48, Many())  # another process
    assert found == [4, 5, 6]
    assert len(tried(records, 30, Many())) == 3


def test_far_sizes_try_all() -> None:
    records = Records()
    tried(records, 40, Many())
    assert len(tried(records, 80, Many())) == 8
    assert len(tried(records, 20, Many())) == 8


def test_near_ones_do_not_lead_on() -> None:
    """What was found among three is no ground for the next: sizes would drift away from what was tried in full."""
    records = Records()
    for tokens, count in ((40, 8), (56, 3), (70, 8)):
        assert len(tried(records, tokens, Many())) == count


def test_the_highest_level_tries_all() -> None:
    records = Records()
    tried(records, 40, Many())
    assert len(tried(records, 44, Many(), "max")) == 8


@pytest.mark.parametrize(("second", "lowered"), [
    (Many(offers=[0, 1, 2]), [0, 1, 2]),
    (Many(wrong=[4, 5, 6]), [4, 5, 6, 0, 1, 2, 3, 7]),
    (Many(offers=[0, 1, 5]), [5]),
])  # fmt: skip
def test_winners_that_are_not_offered_or_do_not_work_are_passed_over(second: Many, lowered: list[int]) -> None:
    records = Records()
    tried(records, 40, Many())
    assert tried(records, 44, second) == lowered


def test_sizes_are_told_from_other_numbers() -> None:
    text = "in0 : f32[8, 197]{197, 1}\nadd_1 = aten.add.Tensor(in0, 1e-05, alpha=-1, eps=0.25) : f32[8, d0]"
    kind, sizes = near.kind_of(text)
    assert sizes == [8, 197, 197, 1, 8]
    assert kind == "in0 : f32[#, #]{#, #}\nadd_1 = aten.add.Tensor(in0, 1e-05, alpha=-1, eps=0.25) : f32[#, d0]"


def test_the_nearest_trial_counts() -> None:
    stored = None
    for size, label in ((100, "far"), (140, "near")):
        stored = near.with_trial(stored, [8, size], Trial(rivals={"eager": 1.0, label: 2.0}))
    assert near.winners(stored, [8, 135]) == ["near"] and near.winners(stored, [8, 104]) == ["far"]
    assert near.winners(stored, [8, 300]) == [] and near.winners(stored, [1, 135]) == []
    for _ in range(50):
        stored = near.with_trial(stored, [1], Trial())
    assert len(stored) == near.KEPT


@pytest.mark.parametrize("stored", [None, 3, [3], [["a", "b"]], {"a": 1}, [[[1, "x"], []]], [[[8], ["a"], 0]]])
def test_foreign_records_are_ignored(stored: Any) -> None:
    assert near.winners(stored, [9]) == []


def test_where_checking_takes_long_fewer_candidates_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    class Clock:
        now = 0.0

        def perf_counter(self) -> float:
            return self.now

    clock, judged = Clock(), trial.difference

    def slow(*args: Any) -> Any:
        clock.now += 4.0
        return judged(*args)

    class Other(Many):
        name = "other"

    monkeypatch.setattr(trial, "time", clock)
    monkeypatch.setattr(trial, "difference", slow)
    x = torch.randn(3, 5, 24)
    program = capture(Net(), (x,))
    region = Region.of(n for n in program.graph.nodes if n.op == "call_function")
    values = [x if n.op == "placeholder" else program.weights[str(n.target)] for n in region.inputs]
    first, second = Many(), Other([6, 7])
    found = trial.hold(region, [first, second], HOST, values, 0.1)
    assert (first.lowered, second.lowered) == ([0, 1], [6])  # in turns, until there is no time
    assert (found.backend, found.schedule["n"]) == ("other", 6)
    assert sum("too slow" in why for why in found.refused.values()) == 7
    first, second = Many(range(3)), Other([6, 7])
    trial.hold(region, [first, second], HOST, values, 0.1, skip=[f"other {Schedule('s', (('n', 6),))}"])
    assert (first.lowered, second.lowered) == ([0, 1], [7])  # the first that is not known to fail has its turn
    second = Other([6], wrong=[6])
    found = trial.hold(region, [Many(wrong=[0, 1]), second], HOST, values, 0.1)
    assert (found.backend, found.schedule["n"]) == ("many", 2)  # one that works is waited for
