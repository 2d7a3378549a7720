"""Time callables on this host: batches, repeats, medians, and interleaved comparison that survives a noisy machine."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

Call = Callable[[], Any]

SAMPLE_SECONDS = 50e-6  # a sample shorter than this would mostly measure the clock and the loop
FEW = 2  # rounds after which a question may be answered: each of the two has been first once
LONG = 0.5  # seconds of a call that needs no second one to warm up
MARGIN = 1.01  # ratios within 1% count as equal
BEHIND = 1.1  # times the seconds of another, beyond noise: such a candidate leaves the race
EXACT_ROUNDS = 100  # above this the binomial's normal approximation is good to one rank


@dataclass(frozen=True)
class Timing:
    """Seconds of one call, from repeated samples.

    Attributes:
        median: median seconds of one call.
        minimum: the fastest sample, in seconds of one call.
        spread: interquartile range divided by the median.
        rounds: number of samples.
        samples: seconds of one call for every sample, in the order taken.
    """

    median: float
    minimum: float
    spread: float
    rounds: int
    samples: tuple[float, ...] = field(default=(), repr=False)

    @classmethod
    def of(cls, samples: Sequence[float]) -> Timing:
        """The statistics of at least one sample (seconds of one call)."""
        median = statistics.median(samples)
        spread = 0.0
        if len(samples) > 1 and median > 0:
            low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
            spread = (high - low) / median
        return cls(median, min(samples), spread, len(samples), tuple(samples))


@dataclass(frozen=True)
class Comparison:
    """How `b` compares with `a` when both were sampled in the same rounds.

    Attributes:
        a: timing of the first callable.
        b: timing of the second callable.
        ratio: median over the rounds of seconds(b) / seconds(a); below 1 when `b` is faster.
        low: lower end of the 95% confidence interval of that median.
        high: upper end of it.
    """

    a: Timing
    b: Timing
    ratio: float
    low: float
    high: float

    @classmethod
    def of(cls, a: Timing, b: Timing) -> Comparison:
        """Compare two timings of the same rounds, as `compare_many` returns them.

        Raises:
            ValueError: if their numbers of samples differ or are zero.
        """
        if len(a.samples) != len(b.samples) or not a.samples:
            raise ValueError("only timings that were sampled in the same rounds can be compared")
        ratios = [y / x for x, y in zip(a.samples, b.samples, strict=True)]
        return cls(a, b, statistics.median(ratios), *median_interval(ratios))

    @property
    def slower(self) -> bool:
        """Whether `b` is measurably slower than `a`: by more than 1% at 95% confidence."""
        return self.low > MARGIN

    @property
    def faster(self) -> bool:
        """Whether `b` is measurably faster than `a`: by more than 1% at 95% confidence."""
        return self.high < 1 / MARGIN


def time_calls(fn: Call, *, budget: float = 0.2, warmup: int = 2, min_rounds: int = 5, max_rounds: int = 200) -> Timing:
    """Time one call of `fn`, which takes no arguments.

    Args:
        fn: the callable; fast ones are called in batches that last at least 50 us.
        budget: seconds of sampling after which to stop.
        warmup: calls before the first sample.
        min_rounds: samples to take even if they exceed the budget.
        max_rounds: samples after which to stop.
    """
    (samples,) = _interleave([fn], budget, warmup, min_rounds, max_rounds)
    return Timing.of(samples)


def compare(a: Call, b: Call, *, budget: float = 1.0, min_rounds: int = 6, only_slower: bool = False) -> Comparison:
    """Time `a` and `b` interleaved (A B, B A, ...), so that drift and load of the machine hit both alike.

    Args:
        a: the reference, a callable of no arguments.
        b: the candidate.
        budget: seconds of sampling for both together.
        min_rounds: rounds to run even if they exceed the budget; fewer than 6 cannot reach 95% confidence.
        only_slower: whether only `Comparison.slower` is asked. Beyond the budget two rounds then do, if they
            exclude it: the interval of so few rounds is their whole range, which further ones can only widen.
    """

    def judged(samples: list[list[float]]) -> Comparison:
        return Comparison.of(*(Timing.of(s) for s in samples))

    def enough(samples: list[list[float]]) -> bool:
        return only_slower and not judged(samples).slower

    return judged(_interleave([a, b], budget, 2, min_rounds, None, enough))


def compare_many(fns: Mapping[str, Call], budget: float = 1.0, min_rounds: int = 7) -> dict[str, Timing]:
    """Time any number of candidates interleaved, one sample of each per round, in an order that changes by round.

    Args:
        fns: candidates by name, callables of no arguments.
        budget: seconds of sampling for all together.
        min_rounds: rounds to run even if they exceed the budget.

    Returns:
        Timings by name. Sample i of each belongs to the same round: `Comparison.of` compares any two.
    """
    samples = _interleave(list(fns.values()), budget, 2, min_rounds, None)
    return {name: Timing.of(s) for name, s in zip(fns, samples, strict=True)}


def race(
    fns: Mapping[str, Call], budget: float = 0.1, min_rounds: int = 7, tell: Callable[[], None] = lambda: None
) -> dict[str, Timing]:
    """Time any number of candidates interleaved to find the fastest; those far behind leave when time is short.

    A candidate has lost when its fastest sample is well behind another's slowest. Of calls that take seconds, three
    rounds must do.

    Args:
        fns: candidates by name, callables of no arguments that have been called before.
        budget: seconds of sampling for all together.
        min_rounds: rounds to run even if they exceed the budget, but for candidates that have lost.
        tell: called before each round.

    Returns:
        Timings by name. Samples of one that has left are those that it would have had in the fastest one's rounds.
    """
    tell()
    batches = {name: _batch_size(fn, 1) for name, fn in fns.items()}
    samples: dict[str, list[float]] = {name: [] for name in fns}
    start, rounds, running = perf_counter(), 0, list(fns)
    while running:
        tell()
        for i in _order(len(running), rounds):
            samples[running[i]].append(_next(fns[running[i]], batches, running[i]))
        rounds += 1
        if perf_counter() - start < budget:
            continue
        lead = min(max(samples[name]) for name in running)
        if rounds >= (FEW + 1 if lead > LONG else min_rounds):
            break
        if rounds >= FEW:
            running = [name for name in running if min(samples[name]) <= BEHIND * lead]
    best = min((samples[name] for name in running), key=statistics.median, default=[])
    for name in samples.keys() - set(running):  # the machine may have been faster then, or slower
        behind = statistics.median(x / y for x, y in zip(samples[name], best, strict=False))
        samples[name] = [behind * x for x in best]
    return {name: Timing.of(s) for name, s in samples.items()}


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """Distribution-free 95% confidence interval of the median, by order statistics.

    With k the largest rank such that P(Binomial(n, 1/2) < k) <= 2.5%, it is from the k-th smallest to the k-th largest
    value. Fewer than 6 values cannot give 95%: then it is the whole range.
    """
    ordered, n = sorted(values), len(values)
    if n > EXACT_ROUNDS:
        rank = int((n - 1.96 * math.sqrt(n)) / 2)
    else:
        rank, below = 0, 1
        while below <= 0.025 * 2**n:
            rank += 1
            below += math.comb(n, rank)
    rank = max(rank, 1)
    return ordered[rank - 1], ordered[n - rank]


def _interleave(
    fns: Sequence[Call],
    budget: float,
    warmup: int,
    min_rounds: int,
    max_rounds: int | None,
    enough: Callable[[list[list[float]]], bool] = lambda samples: False,
) -> list[list[float]]:
    """Samples (seconds of one call) of every callable, one per round; beyond the budget until there are `enough`."""
    batches = [_batch_size(fn, warmup) for fn in fns]
    samples: list[list[float]] = [[] for _ in fns]
    start, rounds = perf_counter(), 0
    while fns and (rounds < max(min_rounds, 1) or perf_counter() - start < budget):
        for i in _order(len(fns), rounds):
            samples[i].append(_next(fns[i], batches, i))
        rounds += 1
        if max_rounds is not None and rounds >= max_rounds:
            break
        if rounds >= FEW and perf_counter() - start >= budget and enough(samples):
            break
    return samples


def _order(count: int, round_number: int) -> list[int]:
    # Reversing changes who runs after whom, rotating changes who runs first: caches and pools favour neither.
    shift = round_number // 2 % count
    order = [(i + shift) % count for i in range(count)]
    return order[::-1] if round_number % 2 else order


def _sample(fn: Call, batch: int) -> float:
    calls = range(batch)
    start = perf_counter()
    for _ in calls:
        fn()
    # a clock that did not advance must not turn into a division by zero
    return max(perf_counter() - start, 1e-9) / batch


def _next(fn: Call, batches: Any, which: Any) -> float:
    """One more sample; of a larger batch if it is far too short, as after a first call in which something was made."""
    seconds = _sample(fn, batches[which])
    if seconds * batches[which] < SAMPLE_SECONDS / 2:
        batches[which] = _batch_size(fn, 1)
        seconds = _sample(fn, batches[which])
    return seconds


def _batch_size(fn: Call, warmup: int) -> int:
    """Calls per sample so that a sample lasts at least SAMPLE_SECONDS, after `warmup` calls, or one if it is long."""
    for _ in range(warmup - 1):
        if _sample(fn, 1) > LONG:
            return 1
    batch = 1
    while (seconds := _sample(fn, batch) * batch) < SAMPLE_SECONDS:
        batch = max(2 * batch, min(math.ceil(batch * SAMPLE_SECONDS / seconds), 1000 * batch))
    return batch
