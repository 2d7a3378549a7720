"""Random graphs with fixed seeds through the compiler, and proof that the judge of bench/fuzz.py sees faults."""

from __future__ import annotations

import pytest
import torch

from torchlathe.passes.capture import capture
from torchlathe.passes.errors import CaptureError


@pytest.mark.parametrize("seed", [*range(8), *(pytest.param(s, marks=pytest.mark.slow) for s in range(8, 40))])
@torch.no_grad()
def test_optimized_graphs_give_the_same_answers(fuzz, seed):
    plan, sets = fuzz.make(seed)
    try:
        failure = fuzz.attempt(plan, sets, fuzz.through_optimize)
    except CaptureError as error:
        pytest.skip(f"refused: {error.what}")
    assert failure is None, f"python bench/fuzz.py --seed {seed} --count 1\n{plan.text()}"


@pytest.mark.parametrize("seed", range(40, 60))
@torch.no_grad()
def test_captured_graphs_give_the_same_answers(fuzz, seed):
    plan, sets = fuzz.make(seed)
    assert fuzz.attempt(plan, sets, fuzz.through_capture) is None


def test_seeds_fix_the_graph_and_the_data(fuzz):
    (plan, sets), (again, same) = fuzz.make(7), fuzz.make(7)
    assert plan.text() == again.text()
    assert all(
        torch.equal(a.nan_to_num(), b.nan_to_num())
        for s, t in zip(sets, same, strict=True)
        for a, b in zip(s, t, strict=True)
    )
    assert plan.text() != fuzz.make(8)[0].text()


def test_the_seeds_use_many_operators(fuzz):
    drawn = {step.op for seed in range(300) for step in fuzz.make(seed)[0].steps}
    assert len(drawn) >= 100


def one_step(fuzz, op, knobs, *inputs):
    """The plan of a single operator on inputs."""
    names = tuple(range(len(inputs)))
    return fuzz.Plan(names, {}, (fuzz.Step(op, names, knobs, (100,)),), (100,))


@pytest.mark.parametrize(
    "fault",
    [
        lambda x: torch.softmax(x.nan_to_num(), -1),
        lambda x: torch.softmax(x, -1) * (1 + 1e-4),
        lambda x: torch.softmax(x, -1).double(),
        lambda x: torch.softmax(x, -1)[:1],
        lambda x: torch.softmax(x, 0),
        lambda x: torch.softmax(x.mul_(2).mul_(0.25), -1),
        lambda x: 1 / 0,
    ],
    ids=["drops-nan", "scale", "dtype", "shape", "axis", "overwrites", "raises"],
)
def test_the_judge_sees_a_fault(fuzz, fault):
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    x[2, 1] = float("nan")
    plan = one_step(fuzz, "softmax", {"dim": -1}, x)
    assert fuzz.judge(plan, [x.clone()], lambda x: torch.softmax(x, -1)) is None
    assert fuzz.judge(plan, [x.clone()], fault) is not None


def test_the_judge_accepts_another_order_of_additions(fuzz):
    x = torch.randn(3, 1001, generator=torch.Generator().manual_seed(0))
    plan = one_step(fuzz, "sum", {"dim": [1], "keepdim": False}, x)
    assert fuzz.judge(plan, [x], lambda x: sum(x[:, i] for i in range(x.shape[1]))) is None


@torch.no_grad()
def test_a_result_baked_in_from_the_first_inputs_is_seen(fuzz):
    plan, sets = fuzz.make(3)

    def baked(model, args):
        kept = model(*args)
        return lambda *_: kept

    assert fuzz.attempt(plan, sets, baked) is not None


@torch.no_grad()
def test_a_failure_shrinks_to_the_operator_at_fault(fuzz):
    def broken(model, args):
        program = capture(model, args)
        for node in program.graph.nodes:
            if node.target is torch.ops.aten.tanh.default:
                node.target = torch.ops.aten.sin.default
        return program

    seeds = (s for s in range(500) if any(step.op == "tanh" for step in fuzz.make(s)[0].steps))
    for seed in seeds:
        plan, sets = fuzz.make(seed)
        if len(plan.steps) > 4 and fuzz.attempt(plan, sets, broken):
            small, _, reason = fuzz.shrink(plan, sets, broken)
            assert [step.op for step in small.steps] == ["tanh"]
            assert "times the allowed" in reason
            return
    pytest.fail("no seed draws tanh")
