"""What the judge times, and what it need not: rewrites that only leave out calls."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import fx, nn

from torchlathe import targets
from torchlathe.optimizer import judge
from torchlathe.optimizer.judge import Judge
from torchlathe.optimizer.pipeline import run_passes
from torchlathe.optimizer.report import Step
from torchlathe.passes.base import Context, Fidelity, Pass
from torchlathe.passes.capture import capture
from torchlathe.passes.program import Program
from torchlathe.targets.measure import Comparison, Timing

aten = torch.ops.aten
COPY = aten.clone.default


class Net(nn.Module):
    """A copy that changes the layout, a pair of negations, and a call of each kind that reads them."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cos(x.transpose(0, 1).contiguous().neg().neg()) @ self.weight


def calls(program: Program, op: Any) -> list[fx.Node]:
    return [n for n in program.graph.nodes if n.target is op]


@dataclass(frozen=True)
class Leave(Pass):
    """Takes the readers of the last call of an operator to its argument."""

    name: ClassVar[str] = "leave"
    fidelity: ClassVar[Fidelity] = Fidelity.EXACT
    op: Any = aten.neg.default
    times: int = 2

    def run(self, program: Program, ctx: Context) -> int:
        for _ in range(self.times):
            node = calls(program, self.op)[-1]
            node.replace_all_uses_with(node.args[0])
            program.graph.erase_node(node)
        for node in program.graph.nodes:
            if node.op == "call_function":
                program.infer(node)
        return 1


@dataclass(frozen=True)
class LeaveLossy(Leave):
    """The same, said to change answers."""

    fidelity: ClassVar[Fidelity] = Fidelity.LOSSY


@dataclass(frozen=True)
class Repeat(Pass):
    """Computes something once more, on a view."""

    name: ClassVar[str] = "repeat"
    fidelity: ClassVar[Fidelity] = Fidelity.EXACT

    def run(self, program: Program, ctx: Context) -> int:
        node = calls(program, aten.neg.default)[-1]
        for _ in range(2):
            new = program.call(aten.neg.default, node, before=node.next)
            node.replace_all_uses_with(new, delete_user_cb=lambda user, new=new: user is not new)  # type: ignore[misc]
            node = new
        return 1


def tried(rewrite: Pass, monkeypatch: pytest.MonkeyPatch) -> tuple[Step, list[bool]]:
    """The step of a rewrite, and for each comparison whether it only asked what is slower."""
    timed = list[bool]()

    def compare(a: Any, b: Any, budget: float, only_slower: bool) -> Comparison:
        timed.append(only_slower)
        return Comparison(Timing(1.0, 1.0, 0.0, 9), Timing(1.0, 1.0, 0.0, 9), 1.0, 1.0, 1.0)

    monkeypatch.setattr(judge, "compare", compare)
    x = torch.randn(5, 6)
    program = capture(Net().eval(), (x,))
    with torch.no_grad():
        who = Judge([x], program.run([x]), original=program)
        _, (step,), _ = run_passes(program, [rewrite], Context(targets.get("cpu")), who)
    return step, timed


def test_what_only_leaves_out_calls_is_kept_without_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    step, timed = tried(Leave(), monkeypatch)
    assert step.kept and not timed and step.seconds_before is None
    assert step.outcome == "kept: it only leaves out calls"


@pytest.mark.parametrize("rewrite", [Repeat(), Leave(COPY, 1)], ids=["one-call-more", "another-layout-of-an-operand"])
def test_what_changes_or_adds_calls_is_timed(rewrite: Pass, monkeypatch: pytest.MonkeyPatch) -> None:
    step, timed = tried(rewrite, monkeypatch)
    assert step.kept and timed == [True] and step.seconds_before == 1.0 and not step.reason


def test_a_lossy_rewrite_must_be_faster_whatever_it_leaves_out(monkeypatch: pytest.MonkeyPatch) -> None:
    step, timed = tried(LeaveLossy(), monkeypatch)
    assert not step.kept and timed == [False] and step.reason == "not measurably faster"
