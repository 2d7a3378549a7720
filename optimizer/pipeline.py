"""The ordered passes, and the loop over them: fork, run, verify, judge, keep or drop."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import fields, replace

from .. import passes as P
from ..passes.base import Context, Fidelity, Pass, Refusal
from ..passes.program import Program
from .judge import Judge, counts
from .report import Step

# Folds first, since they delete work; then fusions, which want their operands in final form; then the sweep.
PASSES: tuple[Pass, ...] = (
    P.FoldAdapters(), P.HoistInvariant(), P.FoldConstants(), P.FoldNorm(), P.MergeReparam(), P.FuseAttention(),
    P.DropMasks(), P.ShareHeads(), P.MergeCommon(), P.FuseQkv(), P.DropCopies(), P.DropDead(),
)  # fmt: skip


def run_passes(
    program: Program,
    passes: Sequence[Pass],
    ctx: Context,
    judge: Judge,
    *,
    limit: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> tuple[Program, list[Step], Judge]:
    """Try every pass in order on a fork. Returns the best program, one step per pass, and the judge of what comes next.

    `limit=n` stops after n rewrites were kept, so that a wrong one can be found by bisection.
    """
    steps: list[Step] = []
    for rewrite in passes:
        if limit is not None and sum(s.kept for s in steps) >= limit:
            break
        if progress:
            progress(f"pass {rewrite.name}")
        start, fork = time.perf_counter(), program.fork()
        step = Step(rewrite.name, rewrite.fidelity.value, **counts(program, "before"))
        try:
            rewrite = strongest(rewrite, program, ctx, judge)
            outcome = rewrite.run(fork, ctx)
        except (RuntimeError, ArithmeticError, TypeError, ValueError, LookupError, AttributeError) as error:
            outcome = Refusal(f"the pass failed, which is a bug worth reporting: {type(error).__name__}: {error}")
        if isinstance(outcome, Refusal) or outcome == 0:
            step = replace(step, refusal=str(outcome or "nothing to change"), **counts(program, "after"))
        else:
            step = replace(step, sites=outcome, setting=knobs(rewrite), **counts(fork, "after"))
            step = judge.decide(program, fork, rewrite, ctx, step)
            if step.kept:
                program = replace(fork, history=(*program.history, rewrite.name))
                judge = judge.onward(program) if rewrite.fidelity is Fidelity.LOSSY else judge
        steps.append(replace(step, took=time.perf_counter() - start))
    return program, steps, judge


def strongest(rewrite: Pass, program: Program, ctx: Context, judge: Judge) -> Pass:
    """The setting of a lossy pass that gives up most within the quality budget; the pass as it is without a budget.

    Found by bisection over `Pass.space`, which goes from little to much: quality is taken to fall along it."""
    if rewrite.fidelity is not Fidelity.LOSSY or ctx.quality is None:
        return rewrite
    settings = list(rewrite.space(program, ctx))
    low, high = 0, len(settings) - 1  # the first is taken whatever it scores: the judge says so if that is too little
    while low < high:
        middle = (low + high + 1) // 2
        fork = program.fork()
        found, step = settings[middle].run(fork, ctx), Step(rewrite.name, rewrite.fidelity.value)
        good = not isinstance(found, Refusal) and not judge.scored(fork, ctx, step).reason
        low, high = (middle, high) if good else (low, middle - 1)
    return settings[low] if settings else rewrite


def knobs(rewrite: Pass) -> str:
    """The knobs of a pass that differ from its defaults, such as ``r=13``."""
    given = ((f.name, getattr(rewrite, f.name), f.default) for f in fields(rewrite))
    return ", ".join(f"{name}={value!r}" for name, value, default in given if value != default)
