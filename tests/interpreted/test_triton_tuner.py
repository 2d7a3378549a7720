"""Candidates for GPUs are tried in a child process, and one that hangs, crashes or errs costs itself only."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from torchlathe import targets
from torchlathe.codegen import tuner as tuner_module
from torchlathe.codegen import workshop as workshop_module
from torchlathe.codegen.base import Region
from torchlathe.codegen.select import select
from torchlathe.codegen.trial import Trial
from torchlathe.codegen.triton.backend import TritonBackend
from torchlathe.codegen.tuner import Tuner
from torchlathe.codegen.workshop import Workshop
from torchlathe.passes.capture import capture
from torchlathe.passes.program import Program

TARGET = targets.get("nvidia-sm90")


class Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = torch.nn.Linear(24, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.gelu(self.inner(x))


def region() -> tuple[Program, Region, list[Any]]:
    x = torch.randn(5, 24)
    program = capture(Layer().eval(), (x,))
    found = Region.of(n for n in program.graph.nodes if n.op == "call_function")
    env = dict(zip(program.inputs, (x,), strict=True))
    return program, found, [env[n] if n in env else program.weights[str(n.target)] for n in found.inputs]


@pytest.fixture
def own(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Workshop:
    """A child process of this test's own."""
    own = Workshop()
    request.addfinalizer(own.close)
    monkeypatch.setattr(tuner_module, "workshop", lambda: own)
    return own


def hold(program: Program, found: Region, values: list[Any], tuner: Tuner) -> Trial:
    return tuner.choose(program, found, [TritonBackend(program)], TARGET, values)


def test_a_trial_in_the_child_times_every_kernel(own: Workshop) -> None:
    program, found, values = region()
    tuner = Tuner(each=0.01)
    trial = hold(program, found, values, tuner)
    assert own._child is not None and own._child.alive and not tuner.notes
    labels = {f"triton {s}" for s in TritonBackend(program).space(found, TARGET)}
    assert trial.rivals.keys() == labels | {"eager"} and not trial.refused.keys() & labels


@pytest.mark.parametrize(("fault", "reason"), [
    ("while True: pass", "took more than 20 s"),
    ("os.abort()", "SIGABRT"),
    ("raise RuntimeError('no')", "no"),
])  # fmt: skip
def test_a_bad_kernel_costs_itself_only(
    own: Workshop, monkeypatch: pytest.MonkeyPatch, fault: str, reason: str
) -> None:
    """The child's second kernel is replaced by one that is bad."""
    monkeypatch.setattr(tuner_module, "PATIENCE", 20.0)
    boot = workshop_module.BOOT
    monkeypatch.setattr(workshop_module, "BOOT", boot.replace("main(int", f"""
import os
from torchlathe.codegen.triton import backend
good = backend.TritonBackend.lower
def bad(self, region, target, schedule):
    if schedule == list(self.space(region, target))[1]:
        {fault}
    return good(self, region, target, schedule)
backend.TritonBackend.lower = bad
main(int"""))  # fmt: skip
    program, found, values = region()
    _, second, *_ = (f"triton {s}" for s in TritonBackend(program).space(found, TARGET))
    start = time.monotonic()
    trial = hold(program, found, values, Tuner(each=0.01))
    assert reason in trial.refused[second] and len(trial.rivals) > 1 and second not in trial.rivals
    assert time.monotonic() - start < 120


def test_the_winner_comes_from_the_store(own: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel that the child made is what runs here: it is not made anew."""
    boot = workshop_module.BOOT
    monkeypatch.setattr(workshop_module, "BOOT", boot.replace("main(int", """
from torchlathe.codegen import trial
trial._timed = lambda calls, *_: {name: 0.5 + (name == "eager") for name in calls}  # interpreting is slow
main(int"""))  # fmt: skip
    program, found, values = region()
    backend = TritonBackend(program)

    def never(*args: Any) -> Any:
        raise AssertionError("made anew")

    monkeypatch.setattr(backend, "_make", never)
    (choice,) = select(program, [found], [backend], TARGET, values[:1], Tuner(each=0.01))
    assert choice.kernel.backend == "triton" and not choice.refused
