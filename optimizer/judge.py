"""The judge: does a rewritten program still give the answers, and is it not slower?"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ..codegen.executable import Executable
from ..codegen.lower import lower, lower_ahead, lower_eager, trial
from ..codegen.select import Choice
from ..codegen.triton.compile import interpreted
from ..codegen.tuner import Tuner
from ..codegen.versions import fingerprint_of_code, versions
from ..passes.base import Context, Fidelity, Pass
from ..passes.errors import VerifyError
from ..passes.placement import moved, placed
from ..passes.program import Program
from ..passes.text import argument, describe
from ..passes.verify import reason_against, same_answers, well_formed
from ..targets import cost
from ..targets.measure import Comparison, Timing, compare
from ..targets.measure_gpu import settled
from ..targets.records import Records, key_of
from ..targets.target import Target, fingerprint
from .quality import score
from .report import Step

Make = Callable[[], Callable[[], Any]]


def _calls(program: Program) -> Counter[str]:
    """How often each operator is called on operands of the same dtypes, sizes and strides."""
    values = {n: describe(n, strides=True) if isinstance(n.meta.get("val"), torch.Tensor) else n.name
              for n in program.graph.nodes}  # fmt: skip
    calls = (n for n in program.graph.nodes if n.op == "call_function")
    return Counter(f"{n.target} {argument(n.args, values)} {argument(list(n.kwargs.items()), values)}" for n in calls)


@dataclass(frozen=True)
class Judge:
    """Decides whether a rewrite stays. With `timed` off it only checks answers.

    Attributes:
        inputs: flat example inputs.
        wanted: flat outputs of the original program on them.
        budget: seconds of interleaved timing per rewrite.
        records: where comparisons are looked up and kept.
        original: the program that was captured; lossy rewrites are scored against it.
        batches: flat inputs that lossy rewrites are scored on; the example inputs if there are none.
        now: flat outputs of the program so far, where lossy rewrites have changed them.
        finish: lowers a program with tuned kernels: a lossy rewrite that saves operations, but no time with the
            kernels of a trial, is timed again with these. None leaves it at the trial.
        level: how thoroughly it tunes them.
    """

    inputs: Sequence[Any]
    wanted: Sequence[Any]
    budget: float = 0.6
    timed: bool = True
    records: Records = field(default_factory=Records)
    original: Program | None = None
    batches: Sequence[Sequence[Any]] = ()
    now: Sequence[Any] | None = None
    finish: Callable[[Program], Executable] | None = None
    level: str = ""

    @property
    def answers(self) -> Sequence[Any]:
        """Flat outputs that exact rewrites and kernels must give."""
        return self.wanted if self.now is None else self.now

    def onward(self, program: Program) -> Judge:
        """The judge of what comes after a lossy rewrite: exact ones must give this program's answers."""
        return replace(self, now=outputs_of(program, self.inputs))

    def decide(self, before: Program, after: Program, rewrite: Pass, ctx: Context, step: Step) -> Step:
        """The step with its verdict.

        An exact rewrite stays unless it is wrong or measurably slower. One that leaves out calls, and changes none of
        the others, has nothing to lose and is not timed, which would take a minute for a model of some seconds. A lossy
        one must be measurably faster, and stay within the quality budget if there is one; its score is in the step
        either way.
        """
        try:
            well_formed(after)
            if rewrite.fidelity is Fidelity.LOSSY:
                step = self.scored(after, ctx, step)
                if step.reason:
                    return step
            else:
                with repeatable():
                    same_answers(after, self.inputs, self.answers, rewrite.name)
        except VerifyError as error:
            return replace(step, reason=error.what)
        if not self.timed:
            return replace(step, kept=True)
        if rewrite.fidelity is not Fidelity.LOSSY and _calls(after) <= _calls(before):
            return replace(step, kept=True, reason="it only leaves out calls")
        lossy, saves = rewrite.fidelity is Fidelity.LOSSY, step.flops_after < step.flops_before
        how = "trial" if lossy else "exact trial"
        seen = self._compared(before, after, ctx.target, how, lambda program: trial(program, ctx.target), not lossy)
        if self.finish is not None and lossy and saves and not seen.faster:
            seen = self._compared(before, after, ctx.target, f"finish {self.level}", self.finish)
        return self._verdict(seen, step, rewrite.fidelity)

    def _compared(
        self, before: Program, after: Program, target: Target, how: str, make: Callable[[Program], Executable],
        only_slower: bool = False,
    ) -> Comparison:  # fmt: skip
        """Two programs timed in turn, as executables that `make` makes."""
        what = target, [how, before.text()], [how, after.text()]
        return recorded(self.records, what, self.budget, lambda: self._call(make(before)),
                        lambda: self._call(make(after)), only_slower)  # fmt: skip

    def scored(self, after: Program, ctx: Context, step: Step) -> Step:
        """The step with its quality, and with a reason if the quality is not enough."""
        budget = ctx.quality
        try:
            with repeatable():
                found = score(self._wanted, after.run, self.batches or [self.inputs], budget.metric if budget else None)
        except ValueError as reason:
            return replace(step, reason=f"{reason}; give a metric that can judge it")
        step = replace(step, quality=found.value)
        if budget is not None and not found.drop <= budget.max_drop:
            return replace(step, reason=f"quality drops by {found.drop:.4g}, the budget is {budget.max_drop:.4g}")
        return step

    def _wanted(self, batch: Sequence[Any]) -> Sequence[Any]:
        return self.wanted if self.original is None or batch is self.inputs else self.original.run(batch)

    def decide_lowering(self, plain: Executable, lowered: Executable, target: Target, step: Step) -> Step:
        """The step with its verdict: the kernels together must give the original's answers and not be slower."""
        with repeatable():
            reason = reason_against(lowered.program, lowered.measured(self.inputs), self.answers)
        if reason is not None:
            return replace(step, reason=reason)
        if not self.timed:
            return replace(step, kept=True)
        kernels = [f"{c.kernel.backend} {c.kernel.schedule}" for c in lowered.choices]
        what = target, plain.program.text(), kernels
        seen = recorded(self.records, what, self.budget, lambda: self._call(plain), lambda: self._call(lowered), True)
        return self._verdict(seen, step, Fidelity.EXACT)

    def _call(self, executable: Executable) -> Callable[[], Any]:
        return settled(lambda: executable.measured(self.inputs), executable.device)

    def _verdict(self, seen: Comparison, step: Step, fidelity: Fidelity) -> Step:
        step = replace(
            step,
            seconds_before=seen.a.median,
            seconds_after=seen.b.median,
            ratio_low=1 / seen.high,
            ratio_high=1 / seen.low,
        )
        if seen.slower or (fidelity is Fidelity.LOSSY and not seen.faster):
            return replace(step, reason="measurably slower" if seen.slower else "not measurably faster")
        return replace(step, kept=True)


@contextlib.contextmanager
def repeatable() -> Iterator[None]:
    """Without gradients, with the same random numbers each time; the user's are left as they were."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def outputs_of(program: Program, inputs: Sequence[Any]) -> list[Any]:
    """Flat outputs of a program."""
    with repeatable():
        return program.run(inputs)


def recorded(
    records: Records, what: tuple[Target, Any, Any], budget: float, a: Make, b: Make, only_slower: bool = False
) -> Comparison:
    """The comparison of two callables, from the records if they were compared before.

    Args:
        what: the target, and plain values that say what `a` and `b` compute.
        budget: seconds of interleaved timing.
        a: makes the first callable, and is not called if the comparison is on record.
        b: makes the second one.
        only_slower: whether it is only asked if the second one is slower; `what` must not stand for other questions.
    """
    key = key_of("compare", fingerprint(what[0]), *what[1:], versions(), fingerprint_of_code(), torch.get_num_threads())
    stored = records.get(key)
    if stored is not None:
        with contextlib.suppress(KeyError, ValueError, TypeError):  # else: not one of ours
            first, second = (Timing(*stored[side]) for side in ("a", "b"))
            return Comparison(first, second, *stored["ratio"])
    seen = compare(a(), b(), budget=budget, only_slower=only_slower)
    sides = {k: [t.median, t.minimum, t.spread, t.rounds] for k, t in (("a", seen.a), ("b", seen.b))}
    records.add({key: {**sides, "ratio": [seen.ratio, seen.low, seen.high]}})
    return seen


def tuned(program: Program, target: Target, inputs: Sequence[Any], tuner: Tuner) -> Executable:
    """An executable with the kernels that the final one would have; the program is left as it is."""
    fork = program.fork()
    return Executable(fork, lower(fork, target, inputs, tuner)[0], target=target)


def lower_and_judge(
    program: Program, target: Target, judge: Judge, tuner: Tuner, progress: Callable[[str], None] | None = None
) -> tuple[Executable, Step, list[str]]:
    """Lower the final program; the measured kernels stay if, as a whole, they beat plain operators."""
    start = time.perf_counter()
    choices, notes = lower(program, target, judge.inputs, tuner, progress)
    plain = Executable(program, lower_eager(program, target), target=target)
    step = _lowering(program, choices)
    if step.sites == 0:
        step, result = replace(step, refusal="no backend beats plain operators anywhere"), plain
    else:
        result = Executable(program, choices, target=target)
        step = judge.decide_lowering(plain, result, target, step)
        result = result if step.kept else plain
    return result, replace(step, took=time.perf_counter() - start), notes


def _lowering(program: Program, choices: Sequence[Choice]) -> Step:
    """The step of lowering, before its verdict: as many sites as kernels of our own."""
    sites = sum(c.kernel.backend != "eager" for c in choices)
    return Step("lower", Fidelity.EXACT.value, sites, **counts(program, "before"), **counts(program, "after"))


def compile_ahead(program: Program, target: Target) -> tuple[Executable, Step, list[str]]:
    """Lower the final program for a device that is not here: nothing is measured, and kernels are not run."""
    start = time.perf_counter()
    choices, notes = lower_ahead(program, target)
    step = _lowering(program, choices)
    notes.append(f"compiled ahead of time for {target.name}: rewrites were checked on the CPU, kernels were not run")
    result = Executable(program, choices, target=target)
    return result, replace(step, kept=True, took=time.perf_counter() - start), notes


def lower_streamed(
    program: Program, target: Target, judge: Judge, budget: int, *, run: bool
) -> tuple[Executable, Step, list[str]]:
    """Lower the final program, which is in host memory, for a GPU that its weights may exceed.

    Nothing is measured. Plain operators are taken if the likeliest kernels do not give the original's answers.

    Args:
        budget: bytes of device memory for weights.
        run: whether the GPU is here, so that answers can be checked.
    """
    start = time.perf_counter()
    if run and not interpreted():
        program = placed(program, torch.device("cuda", torch.cuda.current_device()), weights=False)
    choices, notes = lower_ahead(program, target)
    step = _lowering(program, choices)
    result = Executable(program, choices, target=target, weights_budget=budget)
    reason = _wrong(result, judge) if run else ""
    if reason:
        del result  # and with it its device memory
        result = Executable(program, lower_eager(program, target), target=target, weights_budget=budget)
    assert result.weight_store is not None
    made = result.weight_store.plan
    notes.append(
        f"weights: {made.resident} bytes stay on the device, each call copies {made.copied} bytes from host memory"
        f" through a ring of {made.ring} bytes; rewrites and kernels were not timed"
    )
    return result, replace(step, kept=not reason, reason=reason, took=time.perf_counter() - start), notes


def _wrong(result: Executable, judge: Judge) -> str:
    """Why answers on the device are not those that the host gave; "" if they are."""
    with repeatable():
        found = result.measured([moved(v, result.device) for v in judge.inputs])
        return reason_against(result.program, [moved(v, torch.device("cpu")) for v in found], judge.answers) or ""


def counts(program: Program, when: str) -> dict[str, Any]:
    """Size of a program as the fields of a Step, `when` being before or after."""
    calls = [n for n in program.graph.nodes if n.op == "call_function"]
    flops, moved = cost.totals(calls)
    return {f"nodes_{when}": len(calls), f"flops_{when}": flops, f"bytes_{when}": moved}
