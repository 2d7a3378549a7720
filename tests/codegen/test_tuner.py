"""Choosing kernels: records, trials in a child process, and what a bad candidate costs."""

from __future__ import annotations

import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("tvm")

import torchlathe
from torchlathe import targets
from torchlathe.codegen import tuner as tuner_module
from torchlathe.codegen import workshop as workshop_module
from torchlathe.codegen.base import Region, Schedule
from torchlathe.codegen.lower import backends
from torchlathe.codegen.request import decode_request, encode_request
from torchlathe.codegen.store import keep, kept
from torchlathe.codegen.trial import Trial, decode_trial, encode_trial, guess, hold
from torchlathe.codegen.tuner import Tuner
from torchlathe.codegen.workshop import Workshop
from torchlathe.passes.capture import capture
from torchlathe.passes.errors import InputError
from torchlathe.targets.records import Records

HOST = targets.get("cpu")


class Mlp(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = torch.nn.Linear(24, 48), torch.nn.Linear(48, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(self.down(F.gelu(self.up(x))), (24,))


def first_region() -> tuple[Any, Region, list[Any], torch.Tensor]:
    """The program, its first linear with gelu, and the values of the region's inputs."""
    x = torch.randn(3, 7, 24)
    program = capture(Mlp(), (x,))
    region = Region.of([n for n in program.graph.nodes if n.op == "call_function"][:2])
    env = dict(zip(program.inputs, (x,), strict=True))
    values = [env[n] if n in env else program.weights[str(n.target)] for n in region.inputs]
    return program, region, values, x


def test_a_request_comes_back_as_it_was(tmp_path: Path) -> None:
    program, region, values, _ = first_region()
    values[region.inputs.index(program.inputs[0])] = strided = torch.randn(24, 7, 3).permute(2, 1, 0)
    request = encode_request(program, region, values, HOST, str(tmp_path / "values"))
    inner, copy, found, target = decode_request(request)
    assert target == HOST and len(copy.nodes) == 2
    for a, b in zip(found, values, strict=True):
        assert torch.equal(a, b) and a.stride() == b.stride()
    model = Mlp()
    torch.testing.assert_close(inner.run([strided])[0], F.gelu(model.up(strided)))


def test_a_trial_in_the_child_finds_what_one_here_finds() -> None:
    program, region, values, _ = first_region()
    rivals, _ = backends(program, HOST)
    here = hold(region, rivals, HOST, values, 0.05)
    tuner = Tuner(isolated=True, each=0.05)
    there = tuner.choose(program, region, rivals, HOST, values)
    assert there.rivals.keys() == here.rivals.keys() and there.seconds is not None
    assert tuner.measured == 1 and not tuner.notes
    assert there.backend == "eager" or there.rivals[f"{there.backend} {there.schedule}"] == there.seconds


def test_a_recorded_trial_is_not_repeated(tmp_path: Path) -> None:
    program, region, values, _ = first_region()
    rivals, _ = backends(program, HOST)
    first, second = (Tuner(records=Records(tmp_path), isolated=False, each=0.01) for _ in range(2))
    wanted = first.choose(program, region, rivals, HOST, values)
    found = second.choose(program, region, rivals, HOST, values)
    assert (first.measured, second.measured) == (1, 0)
    assert encode_trial(found) == encode_trial(wanted)


def test_a_trial_as_json_comes_back() -> None:
    trial = Trial("tvm", Schedule("matmul", (("rows", 6), ("wide", True))), 1e-6, {"eager": 2e-6}, {"onednn": "no"})
    assert decode_trial(encode_trial(trial)) == trial


def test_a_spent_budget_takes_the_likeliest() -> None:
    program, region, values, _ = first_region()
    rivals, _ = backends(program, HOST)
    tuner = Tuner(budget=0.0)
    trial = tuner.choose(program, region, rivals, HOST, values)
    backend, schedule = guess(region, rivals, HOST)
    assert (trial.backend, trial.schedule) == (backend.name, schedule) and tuner.measured == 0
    assert "the tuning budget is spent" in tuner.notes


def fake_worker(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    """A child that answers with `body`, whose variables are `request` and `answer`."""
    lines = "\n    ".join(body.splitlines())
    monkeypatch.setattr(workshop_module, "BOOT", f"""
import json, os, sys, time
def answer(**values):
    os.write(int(sys.argv[2]), (json.dumps(values) + "\\n").encode())
for line in sys.stdin:
    request = json.loads(line)
    {lines}
""")  # fmt: skip
    own = Workshop()
    request.addfinalizer(own.close)
    monkeypatch.setattr(tuner_module, "workshop", lambda: own)


GOOD = {"backend": "eager", "schedule": ["default", {"tuple": []}], "seconds": 1.0, "rivals": {}, "refused": {},
        "library": None}  # fmt: skip


@pytest.mark.parametrize(("death", "reason"), [
    ("os.abort()", "SIGABRT"),
    ("sys.exit(3)", "exit status 3"),
    ("time.sleep(60)", "took more than"),
])  # fmt: skip
def test_a_bad_candidate_costs_itself_only(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, death: str, reason: str
) -> None:
    monkeypatch.setattr(tuner_module, "PATIENCE", 1.0)
    fake_worker(
        request,
        monkeypatch,
        f"""if 'tvm bad' not in request['skip']:
    answer(trying='tvm good')
    answer(trying='tvm bad')
    {death}
answer(trial={GOOD!r})""",
    )
    program, region, values, _ = first_region()
    start = time.monotonic()
    trial = Tuner().choose(program, region, backends(program, HOST)[0], HOST, values)
    assert reason in trial.refused["tvm bad"] and "tvm good" not in trial.refused and trial.seconds == 1.0
    assert time.monotonic() - start < 20


def test_a_child_that_dies_while_timing_leaves_eager(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_worker(request, monkeypatch, "answer(trying='timing')\nos.abort()")
    program, region, values, _ = first_region()
    trial = Tuner().choose(program, region, backends(program, HOST)[0], HOST, values)
    assert trial.backend == "eager" and "SIGABRT" in trial.refused["all"]


def test_a_second_optimize_measures_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHLATHE_CACHE", str(tmp_path))
    model, x = Mlp().eval(), torch.randn(64, 24)
    first = torchlathe.optimize(model, (x,))
    monkeypatch.setattr(tuner_module, "hold", lambda *a, **k: pytest.fail("a trial was held"))
    monkeypatch.setattr(Workshop, "ask", lambda *a: pytest.fail("the child was asked"))
    monkeypatch.setattr("torchlathe.optimizer.judge.compare", lambda *a, **k: pytest.fail("something was timed"))
    monkeypatch.setattr("torchlathe.codegen.tvm.build.compile_function", lambda *a: pytest.fail("compiled again"))
    second = torchlathe.optimize(model, (x,))
    assert torch.equal(first(x), second(x))
    assert [c.kernel.name for c in first.choices] == [c.kernel.name for c in second.choices]
    assert second.report.ratio == first.report.ratio
    monkeypatch.undo()


def test_the_fast_level_measures_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchlathe.targets.measure._interleave", lambda *a: pytest.fail("something was timed"))
    model, x = Mlp().eval(), torch.randn(64, 24)
    fast = torchlathe.optimize(model, (x,), level="fast")
    torch.testing.assert_close(fast(x), model(x))
    assert "tvm" in [c.kernel.backend for c in fast.choices]


def test_an_unwritable_cache_is_named_and_nothing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TORCHLATHE_CACHE", str(tmp_path / "file"))
    model, x = Mlp().eval(), torch.randn(64, 24)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = torchlathe.optimize(model, (x,))
    torch.testing.assert_close(result(x), model(x))
    assert [n for n in result.report.notes if "not recorded" in n]


def test_a_damaged_stored_kernel_is_compiled_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHLATHE_CACHE", str(tmp_path))
    digest = keep(b"code", "text")
    assert digest is not None and kept(digest) == (tmp_path / "kernels" / f"{digest}.so", "text")
    (tmp_path / "kernels" / f"{digest}.so").write_bytes(b"other")
    with pytest.warns(UserWarning, match="damaged"):
        assert kept(digest) is None
    assert kept("../../etc/passwd") is None


def test_threads_of_the_result_are_its_own() -> None:
    model, x, before = Mlp().eval(), torch.randn(64, 24), torch.get_num_threads()
    one = torchlathe.optimize(model, (x,), num_threads=1)
    many = torchlathe.optimize(model, (x,))
    torch.testing.assert_close(one(x), many(x))
    assert torch.get_num_threads() == before
    with pytest.raises(InputError, match="at least one"):
        torchlathe.optimize(model, (x,), num_threads=0)
    with pytest.raises(InputError, match="level"):
        torchlathe.optimize(model, (x,), level="fastest")
