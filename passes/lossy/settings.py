"""Choosing the knob of a reduction by the work that it leaves."""

from __future__ import annotations

from collections.abc import Sequence

from ...targets import cost
from ..base import Context, Pass, Refusal
from ..program import Program


def operations(program: Program) -> int:
    """Floating point operations of one run, symbolic sizes counted as in the example."""
    return cost.totals([n for n in program.graph.nodes if n.op == "call_function"])[0]


def run_within(share: float, settings: Sequence[Pass], program: Program, ctx: Context) -> int | Refusal:
    """Run the first of some settings after which at most a share of the program's operations is left.

    Args:
        share: from 0 to 1.
        settings: of one pass, from the one that saves least to the one that saves most.
        program: is rewritten.
        ctx: handed to the pass.

    Returns:
        What the pass returns; a refusal also if even the last setting leaves more.
    """
    whole, low, high = operations(program), 0, len(settings) - 1
    last = _left(settings[-1], program, ctx)
    if isinstance(last, Refusal):
        return last
    if last > share * whole:
        return Refusal(f"at best {last / whole:.0%} of the operations are left, not {share:.0%}")
    while low < high:
        middle = (low + high) // 2
        left = _left(settings[middle], program, ctx)
        if isinstance(left, Refusal):
            return left
        low, high = (low, middle) if left <= share * whole else (middle + 1, high)
    return settings[high].run(program, ctx)


def _left(setting: Pass, program: Program, ctx: Context) -> int | Refusal:
    fork = program.fork()
    outcome = setting.run(fork, ctx)
    return outcome if isinstance(outcome, Refusal) else operations(fork)
