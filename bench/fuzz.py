"""Random small graphs through the compiler: their answers must be eager's.

    python bench/fuzz.py [--count N] [--seed N] [--door optimize|capture|compile]

Each seed gives a module over about a hundred operators with its inputs, twice: NaN, Inf, negative zero, large numbers,
size one, odd and empty shapes occur. Wanted are NaN and Inf in eager's places, and elsewhere at most twice eager's own
largest error against float64, plus the floor of torch.testing.assert_close. As eager is exact by luck now and then,
its error is the largest of five runs: as it is, and with every rounded result moved by up to half a unit in the last
place. Prints the number of graphs, wrong
answers and refusals by reason, and for each failure the seed and a shrunken graph.
"""

from __future__ import annotations

import argparse
import collections
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import fuzz_ops
import torch
from fuzz_draws import Draw, NoFit
from torch import Tensor, nn

from torchlathe.passes.capture import capture
from torchlathe.passes.errors import CaptureError

OPERATORS = fuzz_ops.operators()
LARGEST = 4096  # elements of a value
FLOOR = {torch.float64: (1e-7, 1e-7), torch.float32: (1.3e-6, 1e-5), torch.float16: (1e-3, 1e-5),
         torch.bfloat16: (1.6e-2, 1e-5)}  # fmt: skip # (relative, absolute), as torch.testing.assert_close
SPECIAL = [float("nan"), float("inf"), float("-inf"), -0.0, 0.0, 100.0, -100.0]  # no overflow in half precision

Values = dict[int, Any]
Door = Callable[[nn.Module, tuple[Tensor, ...]], Callable[..., Any]]


@dataclass(frozen=True)
class Step:
    """One call: operator, ids of its operands, its knobs, ids of its results."""

    op: str
    operands: tuple[int, ...]
    knobs: dict[str, Any]
    results: tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """A graph: ids of inputs and outputs, weights by id, steps in order."""

    inputs: tuple[int, ...]
    weights: dict[int, Tensor]
    steps: tuple[Step, ...]
    outputs: tuple[int, ...]

    def run(self, values: Values, adjust: Callable[[Step, Tensor], Tensor] | None = None) -> Values:
        """All values by id; `adjust` may replace each result."""
        values = {**values, **self.weights}
        for step in self.steps:
            found = OPERATORS[step.op].call(*(values[i] for i in step.operands), **step.knobs)
            for name, value in zip(step.results, found if isinstance(found, tuple) else (found,), strict=True):
                values[name] = value if adjust is None else adjust(step, value)
        return values

    def text(self) -> str:
        """One line per step."""
        lines = [f"{s.results} = {s.op}{s.operands} {s.knobs}" for s in self.steps]
        return "\n".join([f"inputs {self.inputs}, weights {tuple(self.weights)}", *lines, f"outputs {self.outputs}"])


class Net(nn.Module):
    """A plan as a module; several outputs come as a dictionary."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.plan = replace(plan, weights={})
        for name, weight in plan.weights.items():
            self.register_buffer(f"weight_{name}", weight)
        self.names = tuple(plan.weights)

    def forward(self, *inputs: Tensor) -> Any:
        weights = {name: getattr(self, f"weight_{name}") for name in self.names}
        values = self.plan.run(dict(zip(self.plan.inputs, inputs, strict=True)) | weights)
        found = {f"out_{i}": values[i] for i in self.plan.outputs}
        return found if len(found) > 1 else next(iter(found.values()))


def widened(value: Tensor) -> Tensor:
    """Floats as float64."""
    return value.double() if value.is_floating_point() else value


def moved(seed: int) -> Callable[[Step, Tensor], Tensor]:
    """Rounded results moved by up to half a unit in the last place: what another order of additions may give."""
    generator = torch.Generator().manual_seed(seed)

    def adjust(step: Step, value: Tensor) -> Tensor:
        if not value.is_floating_point() or not OPERATORS[step.op].rounds:
            return value
        noise = torch.rand(value.shape, generator=generator, dtype=torch.float64) - 0.5
        other = (value.double() * (1 + torch.finfo(value.dtype).eps * noise)).to(value.dtype)
        return torch.where(value.isfinite(), other, value)

    return adjust


def fresh_inputs(rng: random.Random, kinds: Sequence[tuple[torch.dtype, tuple[int, ...], bool]]) -> list[Tensor]:
    """Random tensors of given dtypes and shapes, some with special values, some not contiguous."""
    made = []
    for dtype, shape, turned in kinds:
        size = torch.Size(shape).numel()
        numbers = [rng.gauss(0, 1) for _ in range(size)]
        if dtype.is_floating_point and size and rng.random() < 0.3:
            for _ in range(rng.randint(1, 3)):
                numbers[rng.randrange(size)] = rng.choice(SPECIAL)
        value = torch.tensor(numbers, dtype=torch.float64).reshape(shape)
        value = (value * 5).to(torch.int64) if dtype == torch.int64 else value > 0 if dtype == torch.bool else value
        value = value.to(dtype)
        made.append(value.mT.contiguous().mT if turned and value.ndim > 1 else value)
    return made


def make(seed: int) -> tuple[Plan, list[list[Tensor]]]:
    """The plan of a seed and two sets of inputs."""
    rng = random.Random(seed)
    dims = [rng.choice([1, 2, 3]), rng.choice([1, 3, 4, 8]), rng.choice([1, 5, 7, 16]), rng.choice([1, 2, 9, 33])]
    if rng.random() < 0.04:
        dims[rng.randrange(4)] = 0
    dtypes = [torch.float32] * 14 + [torch.bfloat16, torch.float16] * 2 + [torch.int64] * 3 + [torch.bool]
    kinds = []
    for position in range(rng.randint(2, 4)):
        rank = rng.choice([0, 1, 2, 3, 3, 4, 4])
        shape = tuple(dims[4 - rank :]) if rng.random() < 0.7 else tuple(rng.choice([d, 1]) for d in dims[4 - rank :])
        kinds.append((rng.choice(dtypes) if position else torch.float32, shape, rng.random() < 0.15))
    first, second = fresh_inputs(rng, kinds), fresh_inputs(rng, kinds)
    inputs = tuple(range(len(kinds)))
    drawn = Draw(rng, dict(zip(inputs, first, strict=True)), set(inputs))
    steps: list[Step] = []
    for _ in range(rng.randint(3, 14)):
        steps += draw_step(rng, drawn, 100 + 4 * len(steps))
    used = {i for step in steps for i in step.operands}
    made = [i for step in steps for i in step.results]
    outputs = [i for i in made if i not in used] or [0]
    if rng.random() < 0.3:
        outputs.append(rng.choice([*made, *inputs]))
    return Plan(inputs, drawn.weights, tuple(steps), tuple(dict.fromkeys(outputs))), [first, second]


def draw_step(rng: random.Random, drawn: Draw, name: int) -> list[Step]:
    """One more call that works on the values so far (none if no draw fits); adds its results to the values."""
    for _ in range(50):
        op = OPERATORS[rng.choice(list(OPERATORS))]
        before = len(drawn.weights)
        try:
            operands, knobs = op.draw(drawn)
            found = op.call(*(drawn.values[i] for i in operands), **knobs)
        except (NoFit, RuntimeError, IndexError, ValueError, NotImplementedError, TypeError):
            found = None  # eager refuses these operands: draw again
        values = found if isinstance(found, tuple) else (found,)
        if found is None or len(values) > 4 or any(v.numel() > LARGEST for v in values):
            for extra in list(drawn.weights)[before:]:
                del drawn.weights[extra], drawn.values[extra]
            continue
        results = tuple(range(name, name + len(values)))
        drawn.values.update(zip(results, values, strict=True))
        if all(i in drawn.exact for i in operands):
            drawn.exact.update(i for i in results if not op.rounds or not drawn.values[i].is_floating_point())
        return [Step(op.name, tuple(operands), knobs, results)]
    return []


def wrong(found: Tensor, eager: Tensor, others: Sequence[Tensor], wide: Tensor) -> str | None:
    """Why a result is wrong, None if it is right. `others` are as right as eager's, `wide` is the value in float64."""
    if not isinstance(found, Tensor) or (found.dtype, found.shape) != (eager.dtype, eager.shape):
        return f"{type(found).__name__} {getattr(found, 'dtype', '')} {tuple(getattr(found, 'shape', ()))}"
    if not eager.is_floating_point():
        return None if torch.equal(found, eager) else "integers differ"
    for check in (torch.isnan, torch.isposinf, torch.isneginf):
        if not torch.equal(check(found), check(eager)):
            return f"{check.__name__} in other places"
    finite = eager.isfinite() & wide.isfinite()
    a, exact = found[finite].double(), wide[finite]
    if not a.numel():
        return None
    relative, absolute = FLOOR[eager.dtype]
    error = max(float((b[finite].double() - exact).abs().max()) for b in (eager, *others))
    allowed = absolute + relative * exact.abs() + 2 * error
    excess = float(((a - exact).abs() / allowed).max())
    return None if excess <= 1 else f"error is {excess:.3g} times the allowed"


def judge(plan: Plan, inputs: Sequence[Tensor], call: Callable[..., Any]) -> tuple[int, str] | None:
    """Id of the first wrong output and what is wrong with it."""
    given = dict(zip(plan.inputs, inputs, strict=True))
    eager, *others = [plan.run(given, adjust) for adjust in (None, *map(moved, range(4)))]
    wide_plan = replace(plan, weights={i: widened(w) for i, w in plan.weights.items()})
    wide = wide_plan.run({i: widened(v) for i, v in given.items()}, lambda step, value: widened(value))
    kept = [v.clone() for v in inputs]
    try:
        found = call(*inputs)
    except Exception as error:  # whatever a compiled graph raises where eager does not is a finding
        return plan.outputs[0], f"raises {type(error).__name__}: {str(error).splitlines()[:1]}"
    if not all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(kept, inputs, strict=True)):
        return plan.outputs[0], "an input was overwritten"
    for i in plan.outputs:
        value = found[f"out_{i}"] if len(plan.outputs) > 1 else found
        if reason := wrong(value, eager[i], [o[i] for o in others], wide[i]):
            return i, reason
    return None


def attempt(plan: Plan, sets: Sequence[Sequence[Tensor]], door: Door) -> tuple[int, int, str] | None:
    """Compile on the first inputs, judge on all: set, output and reason of the first failure. Raises CaptureError."""
    call = door(Net(plan).eval(), tuple(sets[0]))
    for position, inputs in enumerate(sets):
        if failure := judge(plan, inputs, call):
            return position, *failure
    return None


def shrink(plan: Plan, sets: Sequence[Sequence[Tensor]], door: Door) -> tuple[Plan, list[list[Tensor]], str]:
    """A smaller plan that still fails: the first wrong value as its output, steps turned into inputs one by one."""

    def fails(trial: Plan, data: Sequence[Sequence[Tensor]]) -> str | None:
        try:
            failure = attempt(trial, data, door)
        except CaptureError:
            return None
        return failure[2] if failure else None

    current, data = plan, [list(s) for s in sets]
    reason = fails(current, data) or "does not fail again"
    for output in (i for step in plan.steps for i in step.results):
        trial, fewer = prune(replace(plan, outputs=(output,)), data)
        if found := fails(trial, fewer):
            current, data, reason = trial, fewer, found
            break
    for step in plan.steps:
        if step not in current.steps or len(current.steps) == 1:
            continue
        values = [current.run(dict(zip(current.inputs, s, strict=True))) for s in data]
        inputs = (*current.inputs, *step.results)
        steps = tuple(s for s in current.steps if s is not step)
        trial, fewer = prune(replace(current, inputs=inputs, steps=steps), [[v[i] for i in inputs] for v in values])
        if not set(trial.outputs) & set(trial.inputs) and (found := fails(trial, fewer)):
            current, data, reason = trial, fewer, found
    return current, data, reason


def prune(plan: Plan, sets: Sequence[Sequence[Tensor]]) -> tuple[Plan, list[list[Tensor]]]:
    """The plan and its data without steps, weights and inputs that no output needs."""
    needed, steps = set(plan.outputs), list[Step]()
    for step in reversed(plan.steps):
        if needed & set(step.results):
            needed |= set(step.operands)
            steps.insert(0, step)
    inputs = tuple(i for i in plan.inputs if i in needed)
    data = [[v for i, v in zip(plan.inputs, s, strict=True) if i in needed] for s in sets]
    return Plan(inputs, {i: w for i, w in plan.weights.items() if i in needed}, tuple(steps), plan.outputs), data


def through_capture(model: nn.Module, args: tuple[Tensor, ...]) -> Callable[..., Any]:
    """The captured program, run eagerly."""
    return capture(model, args)


def through_optimize(model: nn.Module, args: tuple[Tensor, ...]) -> Callable[..., Any]:
    """The whole compiler."""
    import torchlathe

    return torchlathe.optimize(model, args)  # type: ignore[no-any-return]


def through_compile(model: nn.Module, args: tuple[Tensor, ...]) -> Callable[..., Any]:
    """The compiler behind torch.compile."""
    torch._dynamo.reset()
    return torch.compile(model, backend="torchlathe")


DOORS: dict[str, Door] = {"capture": through_capture, "optimize": through_optimize, "compile": through_compile}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the seeds and print what was found; the exit status is the number of wrong graphs (at most 100)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0, help="first seed")
    parser.add_argument("--door", choices=DOORS, default="optimize")
    options = parser.parse_args(arguments)
    refused: collections.Counter[str] = collections.Counter()
    drawn: collections.Counter[str] = collections.Counter()
    failures, start = 0, time.perf_counter()
    with torch.no_grad():
        for seed in range(options.seed, options.seed + options.count):
            print(f"\rseed {seed} ", end="", file=sys.stderr, flush=True)  # stays on screen if native code crashes
            plan, sets = make(seed)
            drawn.update(step.op for step in plan.steps)
            try:
                failure = attempt(plan, sets, DOORS[options.door])
            except CaptureError as error:
                refused[error.what.splitlines()[0][:120]] += 1
                continue
            if failure:
                failures += 1
                print(f"seed {seed}: output {failure[1]}: {failure[2]}")
                small, data, reason = shrink(plan, sets, DOORS[options.door])
                shapes = ", ".join(
                    f"{i}: {v.dtype} {tuple(v.shape)}" for i, v in zip(small.inputs, data[0], strict=True)
                )
                print(f"  shrunk to {shapes}: {reason}\n  " + small.text().replace("\n", "\n  "), flush=True)
    print(f"{options.count} graphs, {sum(drawn.values())} operators of {len(drawn)} kinds (out of {len(OPERATORS)}), "
          f"{time.perf_counter() - start:.0f} s: {failures} wrong, {sum(refused.values())} refused")  # fmt: skip
    for reason, count in refused.most_common():
        print(f"  refused {count}: {reason}")
    return min(failures, 100)


if __name__ == "__main__":
    raise SystemExit(main())
