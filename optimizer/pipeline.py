"""The ordered passes, and the loop over them: fork, run, verify, judge, keep or drop."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from .. import passes as P
from ..codegen.executable import Executable
from ..codegen.lower import lower, lower_eager
from ..passes.base import Context, Fidelity, Pass, Refusal
from ..passes.program import Program
from ..targets import cost
from ..targets.target import Target
from .judge import Judge
from .report import Step

# Folds first, since they delete work; then fusions, which want their operands in final form; then the sweep.
PASSES: tuple[Pass, ...] = (
    P.FoldAdapters(),
    P.HoistInvariant(),
    P.FoldConstants(),
    P.FoldNorm(),
    P.MergeReparam(),
    P.FuseAttention(),
    P.MergeCommon(),
    P.FuseQkv(),
    P.DropDead(),
)


def run_passes(
    program: Program,
    passes: Sequence[Pass],
    ctx: Context,
    judge: Judge,
    *,
    limit: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> tuple[Program, list[Step]]:
    """Try every pass in order on a fork. Returns the best program and one step per pass.

    `limit=n` stops after n rewrites were kept, so that a wrong one can be found by bisection.
    """
    steps: list[Step] = []
    for rewrite in passes:
        if limit is not None and sum(s.kept for s in steps) >= limit:
            break
        if progress:
            progress(f"pass {rewrite.name}")
        start, fork = time.perf_counter(), program.fork()
        step = Step(rewrite.name, rewrite.fidelity.value, **_counts(program, "before"))
        outcome = rewrite.run(fork, ctx)
        if isinstance(outcome, Refusal) or outcome == 0:
            step = replace(step, refusal=str(outcome or "nothing to change"), **_counts(program, "after"))
        else:
            step = replace(step, sites=outcome, **_counts(fork, "after"))
            step = judge.decide(program, fork, rewrite, ctx, step)
            if step.kept:
                program = replace(fork, history=(*program.history, rewrite.name))
        steps.append(replace(step, took=time.perf_counter() - start))
    return program, steps


def lower_and_judge(
    program: Program, target: Target, judge: Judge, progress: Callable[[str], None] | None = None
) -> tuple[Executable, Step, list[str]]:
    """Lower the final program; the measured kernels stay if, as a whole, they beat plain operators."""
    start = time.perf_counter()
    choices, notes = lower(program, target, judge.inputs, progress=progress)
    plain = Executable(program, lower_eager(program, target))
    sites = sum(c.kernel.backend != "eager" for c in choices)
    step = Step("lower", Fidelity.EXACT.value, sites, **_counts(program, "before"), **_counts(program, "after"))
    if sites == 0:
        step, result = replace(step, refusal="no backend beats plain operators anywhere"), plain
    else:
        result = Executable(program, choices)
        step = judge.decide_lowering(plain, result, step)
        result = result if step.kept else plain
    return result, replace(step, took=time.perf_counter() - start), notes


def _counts(program: Program, when: str) -> dict[str, Any]:
    calls = [n for n in program.graph.nodes if n.op == "call_function"]
    flops, moved = cost.totals(calls)
    return {f"nodes_{when}": len(calls), f"flops_{when}": flops, f"bytes_{when}": moved}
