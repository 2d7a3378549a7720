"""Knobs that are chosen by the share of the operations that they leave."""

from __future__ import annotations

from typing import Any

import pytest
from encoders import Encoder, inputs

from torchlathe import targets
from torchlathe.passes.base import Context, Refusal
from torchlathe.passes.capture import capture
from torchlathe.passes.lossy.merge_tokens import MergeTokens
from torchlathe.passes.lossy.prune_tokens import PruneTokens
from torchlathe.passes.lossy.settings import operations

CONTEXT = Context(targets.get("cpu"))


def test_a_share_of_the_operations_is_reached_with_the_smallest_number() -> None:
    model, args = Encoder("plain").eval(), inputs("plain", 1)
    program = capture(model, args)

    def left(**knobs: Any) -> int:
        fork = program.fork()
        assert isinstance(MergeTokens(**knobs).run(fork, CONTEXT), int)
        return operations(fork)

    whole, found = operations(program), left(flops=0.7)
    reached = [left(r=r) for r in range(1, 19)]
    assert found == max(n for n in reached if n <= 0.7 * whole)
    assert found > 0.6 * whole


@pytest.mark.parametrize(("knobs", "reason"), [({"flops": 0.1}, "at best"), ({"flops": 0.7, "r": 3}, "one of them")])
def test_shares_that_cannot_be_reached_are_refused(knobs: dict[str, Any], reason: str) -> None:
    outcome = MergeTokens(**knobs).run(capture(Encoder("plain").eval(), inputs("plain", 1)), CONTEXT)
    assert isinstance(outcome, Refusal) and reason in str(outcome)


def test_settings_go_from_little_to_much() -> None:
    program = capture(Encoder("plain").eval(), inputs("plain", 1))
    numbers = [s.r for s in MergeTokens().space(program, CONTEXT)]
    assert numbers == sorted(set(numbers)) and numbers[0] == 1 and len(numbers) > 5
    assert list(MergeTokens(r=3).space(program, CONTEXT)) == [MergeTokens(r=3)]


def test_pruning_reaches_a_share_too() -> None:
    program = capture(Encoder("plain").eval(), inputs("plain", 1))
    whole = operations(program)
    assert isinstance(PruneTokens(flops=0.7).run(program, CONTEXT), int)
    assert 0.65 * whole < operations(program) <= 0.7 * whole
