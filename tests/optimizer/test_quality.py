"""The quality guard: lossy rewrites are scored against the original, and dropped where the budget says so."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import torchlathe
from torchlathe import targets
from torchlathe.codegen.executable import Executable
from torchlathe.codegen.lower import lower_eager
from torchlathe.optimizer import judge as judge_module
from torchlathe.optimizer.judge import Judge
from torchlathe.optimizer.pipeline import run_passes
from torchlathe.optimizer.quality import Quality, score
from torchlathe.passes.base import Context, Fidelity, Pass
from torchlathe.passes.capture import capture
from torchlathe.passes.program import Program
from torchlathe.passes.verify import reason_against
from torchlathe.targets.measure import Comparison, Timing

HOST = targets.get("cpu")


def noise(shape: torch.Size) -> torch.Tensor:
    """The same numbers each time."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@dataclass(frozen=True)
class Scale(Pass):
    """Multiplies the result by a number: as lossy as one likes."""

    name: ClassVar[str] = "scale-result"
    fidelity: ClassVar[Fidelity] = Fidelity.LOSSY

    by: float = 1.0
    noise: float = 0.0

    def run(self, program: Program, ctx: Context) -> int:
        output = program.graph.output_node()
        (result,) = program.outputs
        changed = program.call(torch.ops.aten.mul.Tensor, result, self.by, before=output)
        if self.noise:
            added = program.weight("noise", self.noise * noise(result.meta["val"].shape))
            changed = program.call(torch.ops.aten.add.Tensor, changed, added, before=output)
        output.args = ((changed,),)
        return 1


@dataclass(frozen=True)
class Cut(Pass):
    """Drops a column of the result."""

    name: ClassVar[str] = "cut-result"
    fidelity: ClassVar[Fidelity] = Fidelity.LOSSY

    def run(self, program: Program, ctx: Context) -> int:
        output = program.graph.output_node()
        (result,) = program.outputs
        output.args = ((program.call(torch.ops.aten.slice.Tensor, result, 1, 1, before=output),),)
        return 1


def decided(rewrite: Pass, quality: Quality | None = None, data: Sequence[Any] = ()) -> Any:
    torch.manual_seed(0)
    model, x = nn.Linear(8, 6).eval(), torch.randn(16, 8)
    program = capture(model, (x,))
    with torch.no_grad():
        judge = Judge([x], program.run([x]), timed=False, original=program,
                      batches=[pytree.tree_leaves(d) for d in data])  # fmt: skip
        _, (step,), _ = run_passes(program, [rewrite], Context(HOST, quality=quality), judge)
    return step


def test_without_a_budget_the_score_is_told() -> None:
    step = decided(Scale(noise=0.1))
    assert step.kept and 0.5 < step.quality < 1.0


@pytest.mark.parametrize(("noise", "drop", "kept"), [(0.05, 0.05, True), (1.0, 0.05, False), (0.0, 0.0, True)])
def test_the_budget_decides(noise: float, drop: float, kept: bool) -> None:
    step = decided(Scale(noise=noise), Quality(max_drop=drop))
    assert step.kept is kept
    assert kept or "budget" in step.reason


def test_a_metric_of_the_users_decides() -> None:
    size = Quality(max_drop=0.3, metric=lambda results: float(results[0].abs().mean()))
    assert decided(Scale(by=0.9), size).kept
    assert not decided(Scale(by=0.1), size).kept
    assert decided(Scale(by=-1.0), size).kept, "the metric does not see the sign"
    assert not decided(Scale(by=-1.0), Quality(max_drop=0.3)).kept


def test_all_batches_count() -> None:
    batches = [(torch.randn(16, 8),), (torch.full((16, 8), torch.nan),)]
    seen = []
    metric = Quality(max_drop=1.0, metric=lambda results: seen.append(results[0].isnan().any().item()) or 0.0)
    assert decided(Scale(), metric, batches).kept
    assert sorted(seen) == [False, False, True, True]


def test_a_score_that_is_not_a_number_is_no_success() -> None:
    assert not decided(Scale(), Quality(max_drop=1.0, metric=lambda results: float("nan"))).kept


def test_a_result_of_another_shape_needs_a_metric() -> None:
    step = decided(Cut(), Quality(max_drop=1.0))
    assert not step.kept and "shape" in step.reason and "metric" in step.reason
    assert decided(Cut(), Quality(max_drop=1.0, metric=lambda results: 1.0)).kept


def test_the_score_of_equal_programs_is_one() -> None:
    found = score(lambda batch: batch, lambda batch: batch, [[torch.randn(3, 4)], [torch.zeros(2)]])
    assert found.value == 1.0 and found.drop == 0.0


def test_kernels_are_checked_against_what_they_compute_not_against_the_original() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 8)).eval(), torch.randn(32, 64)
    fast = torchlathe.optimize(model, (x,), passes=[Scale(by=0.5)], level="fast")
    assert fast.report.steps[0].kept
    torch.testing.assert_close(fast(x), 0.5 * model(x))


@dataclass(frozen=True)
class Round(Pass):
    """Adds a number so small that only rounding could explain it, or one so large that nothing does."""

    name: ClassVar[str] = "add-little"

    by: float = 0.0

    def run(self, program: Program, ctx: Context) -> int:
        output = program.graph.output_node()
        (result,) = program.outputs
        output.args = ((program.call(torch.ops.aten.add.Tensor, result, self.by, before=output),),)
        return 1


@pytest.mark.parametrize(("by", "kept"), [(1e-7, True), (0.1, False)])
def test_exact_rewrites_after_a_lossy_one_are_held_to_its_answers(by: float, kept: bool) -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(8, 6).eval(), torch.randn(16, 8)
    program = capture(model, (x,))
    with torch.no_grad():
        judge = Judge([x], program.run([x]), timed=False, original=program)
        _, steps, _ = run_passes(program, [Scale(by=1.5), Round(by=by), Scale(noise=0.1)], Context(HOST), judge)
    assert [s.kept for s in steps] == [True, kept, True]
    assert steps[2].quality < 1.0  # scored against the original, not against what Scale made of it


@dataclass(frozen=True)
class Blur(Scale):
    """Scale with settings of growing noise."""

    name: ClassVar[str] = "blur-result"

    def space(self, program: Program, ctx: Context) -> Iterator[Scale]:
        yield from (Blur(noise=k / 20) for k in range(1, 9))


@pytest.mark.parametrize("drop", [0.02, 0.1])
def test_the_strongest_setting_within_the_budget_is_taken(drop: float) -> None:
    def found(noise: float) -> float:
        return float(decided(Scale(noise=noise)).quality)

    step = decided(Blur(), Quality(max_drop=drop))
    best = max(k / 20 for k in range(1, 9) if 1 - found(k / 20) <= drop)
    assert step.kept and step.setting == f"noise={best!r}" and f"noise={best!r}" in step.outcome


def test_no_setting_within_the_budget() -> None:
    step = decided(Blur(), Quality(max_drop=1e-6))
    assert not step.kept and "quality drops" in step.reason


def test_a_choice_between_near_equals_may_turn() -> None:
    """Answers that differ in one row of many count as equal only where the program chooses by comparing."""
    x = torch.randn(4000, 8)
    wanted = [x.clone()]
    turned = [torch.where(torch.arange(4000)[:, None] == 7, x.roll(1, 1), x)]
    plain = capture(nn.Identity(), (x,))
    choosing = capture(Sorted(), (x,))
    assert "deviates" in str(reason_against(plain, turned, wanted))
    assert reason_against(choosing, turned, wanted) is None
    assert "deviates" in str(reason_against(choosing, [x.roll(1, 1)], wanted))
    assert "deviates" in str(reason_against(choosing, [x[:, :7]], wanted))


class Sorted(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + x.sort(0).values


def test_the_standard_list_has_a_name() -> None:
    model, x = nn.Linear(8, 6).eval(), torch.randn(16, 8)
    found = torchlathe.optimize(model, (x,), passes=["default", Scale(by=2.0)], level="fast")
    names = [s.name for s in found.report.steps]
    assert names[-2:] == ["scale-result", "lower"] and "fuse-attention" in names


@dataclass(frozen=True)
class Skip(Pass):
    """Lets the last linear layer read what the first one reads."""

    name: ClassVar[str] = "skip-layer"
    fidelity: ClassVar[Fidelity] = Fidelity.LOSSY

    again: bool = False

    def run(self, program: Program, ctx: Context) -> int:
        first, last = (n for n in program.graph.nodes if n.target == torch.ops.aten.linear.default)
        last.replace_input_with(first, program.inputs[0])
        if not self.again:
            program.graph.erase_node(first)
        return 1


@pytest.mark.parametrize(("again", "finish", "kept", "makes"), [
    (False, True, True, 4), (False, False, False, 2), (True, True, False, 2),
])  # fmt: skip
def test_a_lossy_rewrite_that_saves_operations_is_timed_with_tuned_kernels_too(
    monkeypatch: pytest.MonkeyPatch, again: bool, finish: bool, kept: bool, makes: int
) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).eval(), torch.randn(4, 8)
    made, times = list[str](), iter([1.0, 0.5])  # as fast as before with plain kernels, twice as fast with tuned ones

    def executable(kind: str) -> Any:
        return lambda program, target=HOST: made.append(kind) or Executable(program, lower_eager(program, target))

    def compared(a: Any, b: Any, budget: float, only_slower: bool) -> Comparison:
        ratio = next(times)
        assert not only_slower  # it must be known to be faster
        return Comparison(Timing.of([1.0]), Timing.of([ratio]), ratio, ratio, ratio)

    monkeypatch.setattr(judge_module, "trial", executable("plain"))
    monkeypatch.setattr(judge_module, "compare", compared)
    program = capture(model, (x,))
    judge = Judge([x], program.run([x]), original=program, finish=executable("tuned") if finish else None)
    _, (step,), _ = run_passes(program, [Skip(again)], Context(HOST), judge)
    assert step.kept is kept and made == ["plain", "plain", "tuned", "tuned"][:makes]
    assert kept or step.reason == "not measurably faster"
