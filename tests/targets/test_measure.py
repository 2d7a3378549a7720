"""Statistics under a simulated clock, where the truth is known, and a few checks with the real one."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable

import pytest

from torchlathe.targets import measure
from torchlathe.targets.measure import Comparison, Timing, compare, compare_many, median_interval, race, time_calls


class Clock:
    """A clock that only advances when work is done, with noise that the test chooses."""

    def __init__(self, seed: int = 0, noise: float = 0.0) -> None:
        self.now, self.calls, self.noise, self.random = 0.0, list[str](), noise, random.Random(seed)

    def __call__(self) -> float:
        return self.now

    def work(self, name: str, seconds: float) -> Callable[[], None]:
        def call() -> None:
            self.calls.append(name)
            self.now += seconds * self.load() * self.random.lognormvariate(0, self.noise)

        return call

    def load(self) -> float:
        return 1.0


class BusyClock(Clock):
    """Another process takes half of the machine every other 50 ms, and the clock rate drifts down by half."""

    def load(self) -> float:
        return (2.0 if self.now % 0.1 > 0.05 else 1.0) * (1 + min(self.now, 1.0))


def use(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> Clock:
    monkeypatch.setattr(measure, "perf_counter", clock)
    return clock


def test_time_calls_takes_warm_up_rounds_and_budget_as_told(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = use(monkeypatch, Clock())
    timing = time_calls(clock.work("a", 1e-3), budget=0.05, warmup=3)
    assert (timing.median, timing.minimum) == pytest.approx((1e-3, 1e-3))
    assert timing.spread == pytest.approx(0, abs=1e-9)
    assert timing.rounds == len(timing.samples) == pytest.approx(50, abs=1)
    assert len(clock.calls) == 3 + timing.rounds  # the last warm-up call also chose the batch size
    begun = len(clock.calls)
    assert time_calls(clock.work("slow", 10.0), budget=0.1, warmup=3, min_rounds=5).rounds == 5
    assert len(clock.calls) - begun == 1 + 5  # one long call is warm-up enough
    assert time_calls(clock.work("a", 1e-3), budget=10, max_rounds=20).rounds == 20


@pytest.mark.parametrize(("seconds", "rounds"), [(0.9, 2), (1.005, 2), (1.2, 6)])
def test_where_only_slower_is_asked_few_rounds_of_long_calls_exclude_it(
    monkeypatch: pytest.MonkeyPatch, seconds: float, rounds: int
) -> None:
    clock = use(monkeypatch, Clock())
    seen = compare(clock.work("a", 1.0), clock.work("b", seconds), budget=0.5, only_slower=True)
    assert (seen.a.rounds, seen.slower) == (rounds, seconds > 1.1)
    assert len(clock.calls) == 2 * (1 + rounds)
    assert compare(clock.work("a", 1.0), clock.work("b", seconds), budget=0.5).a.rounds == 6
    asked = compare(clock.work("a", 1e-3), clock.work("b", seconds * 1e-3), budget=0.5, only_slower=True)
    assert asked.a.rounds > 100  # within the budget nothing is cut short


def test_one_round_that_is_not_slower_ends_the_question(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = use(monkeypatch, Clock())
    turns = iter([1.5, 1.5, 1.5, 1.5, 1.0, 1.5, 1.5, 1.5])

    def call() -> None:
        clock.now += next(turns)

    seen = compare(clock.work("a", 1.0), call, budget=0.5, only_slower=True)
    assert (seen.a.rounds, seen.slower) == (4, False)  # the first of the turns warmed up


def test_fast_calls_are_batched_to_fifty_microseconds(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = use(monkeypatch, Clock())
    timing = time_calls(clock.work("a", 1e-7), budget=0, min_rounds=1)
    start, calls = clock.now, len(clock.calls)
    assert timing.median == pytest.approx(1e-7)
    time_calls(clock.work("a", 1e-7), budget=0, min_rounds=11)
    assert (clock.now - start) / 11 >= 50e-6
    assert (len(clock.calls) - calls) / 11 < 2000  # batches, but not much longer than needed


def test_spread_is_the_interquartile_range_over_the_median() -> None:
    assert Timing.of([1.0, 2.0, 3.0, 4.0, 5.0]) == Timing(3.0, 1.0, 2 / 3, 5, (1.0, 2.0, 3.0, 4.0, 5.0))
    assert Timing.of([2.0]).spread == 0


@pytest.mark.parametrize("seed", range(5))
def test_drift_and_load_hit_both_alike(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    clock = use(monkeypatch, BusyClock(seed, noise=0.05))
    equal = compare(clock.work("a", 1e-3), clock.work("b", 1e-3))
    assert not equal.slower and not equal.faster
    assert equal.low <= equal.ratio <= equal.high
    assert compare(clock.work("a", 1e-3), clock.work("b", 1.05e-3)).slower
    assert compare(clock.work("a", 1e-3), clock.work("b", 0.95e-3)).faster


def test_equal_functions_are_rarely_called_different(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = 0
    for seed in range(200):
        clock = use(monkeypatch, Clock(seed, noise=0.1))
        result = compare(clock.work("a", 1e-2), clock.work("b", 1e-2), budget=0.3)
        wrong += result.slower or result.faster
    assert wrong <= 12  # 95% confidence and a margin of 1% on top


def test_less_than_one_percent_is_not_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = use(monkeypatch, Clock(noise=0.001))
    result = compare(clock.work("a", 1e-3), clock.work("b", 1.005e-3))
    assert result.ratio == pytest.approx(1.005, abs=1e-3) and not result.slower


def test_order_alternates(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = use(monkeypatch, Clock())
    compare(clock.work("a", 0.1), clock.work("b", 0.1), budget=0, min_rounds=8)
    rounds = ["".join(clock.calls[i : i + 2]) for i in range(4, 20, 2)]
    assert rounds.count("ab") == rounds.count("ba") == 4
    assert rounds[:2] == ["ab", "ba"]


def test_compare_many_pairs_samples_by_round(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = use(monkeypatch, BusyClock(noise=0.02))
    work = {"a": clock.work("a", 1e-3), "b": clock.work("b", 2e-3), "c": clock.work("c", 3e-3)}
    timings = compare_many(work, budget=0.5)
    assert list(timings) == ["a", "b", "c"]
    assert len({timing.rounds for timing in timings.values()}) == 1
    assert Comparison.of(timings["a"], timings["c"]).ratio == pytest.approx(3, rel=0.05)
    assert Comparison.of(timings["b"], timings["a"]).ratio == pytest.approx(0.5, rel=0.05)
    per_call = {name: clock.calls.count(name) for name in work}
    assert len(set(per_call.values())) == 1
    firsts = {clock.calls[i] for i in range(6, len(clock.calls), 3)}
    assert firsts == {"a", "b", "c"}  # nobody always runs first


def test_timings_of_different_rounds_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match="same rounds"):
        Comparison.of(Timing.of([1.0]), Timing.of([1.0, 2.0]))


def test_median_interval_is_that_of_the_binomial_table() -> None:
    # ranks of the distribution-free 95% interval of a median, from published tables
    ranks = {6: (1, 6), 9: (2, 8), 12: (3, 10), 15: (4, 12), 20: (6, 15), 25: (8, 18), 100: (40, 61)}
    for n, expected in ranks.items():
        assert median_interval(range(1, n + 1)) == expected
    assert median_interval([3.0, 1.0]) == (1.0, 3.0)


@pytest.mark.parametrize("n", [15, 300])
def test_median_interval_covers_the_true_median(n: int) -> None:
    generator = random.Random(n)
    covered = 0
    for _ in range(1000):
        low, high = median_interval([generator.expovariate(1.0) for _ in range(n)])
        covered += low <= 0.693147 <= high
    assert covered >= 930


def spin(seconds: float) -> Callable[[], None]:
    def call() -> None:
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            pass

    return call


def test_real_clock() -> None:
    timing = time_calls(lambda: time.sleep(2e-3), budget=0.05)
    assert timing.minimum >= 2e-3
    assert 0 < time_calls(lambda: None, budget=0.02).minimum < 1e-5
    result = compare(spin(1e-4), spin(3e-4), budget=0.3)
    assert result.slower and not result.faster and result.ratio > 1.5
    assert compare(spin(3e-4), spin(1e-4), budget=0.3).faster


def test_cost_of_measuring_stays_inside_the_budget() -> None:
    elapsed = []
    for _ in range(3):
        start = time.perf_counter()
        compare(lambda: sum(range(1000)), lambda: sum(range(1000)), budget=0.1)
        elapsed.append(time.perf_counter() - start)
    assert 0.1 <= min(elapsed) < 0.3
    assert statistics.median(elapsed) < 1


def test_in_a_race_of_long_calls_those_far_behind_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, told = use(monkeypatch, Clock()), list[int]()
    seconds = {"a": 1.05, "b": 1.0, "c": 1.2, "d": 3.0}
    calls = {name: clock.work(name, s) for name, s in seconds.items()}
    seen = race(calls, budget=0.1, tell=lambda: told.append(len(clock.calls)))
    assert {name: clock.calls.count(name) for name in seen} == {"a": 4, "b": 4, "c": 3, "d": 3}  # one warmed up
    assert {name: t.median for name, t in seen.items()} == pytest.approx(seconds)
    assert told == [0, 4, 8, 12]  # before the first calls and each round


@pytest.mark.parametrize(("fast", "slow", "rounds"), [(0.01, 0.011, 7), (0.2, 0.21, 7), (0.04, 0.048, 7)])
def test_in_a_race_of_short_calls_those_near_run_to_the_end(
    monkeypatch: pytest.MonkeyPatch, fast: float, slow: float, rounds: int
) -> None:
    clock = use(monkeypatch, Clock())
    seen = race({"a": clock.work("a", 1e-4), "b": clock.work("b", 1e-3)}, budget=0.1)
    assert seen["a"].rounds == seen["b"].rounds > 50  # within the budget nobody leaves
    many = {f"c{k}": clock.work(f"c{k}", slow) for k in range(11)}
    seen = race({"a": clock.work("a", fast), **many}, budget=0.1)
    assert seen["a"].rounds == rounds and clock.calls.count("c3") == (rounds + 1 if slow < 1.1 * fast else 3)


@pytest.mark.parametrize(("eager", "ours"), [(0.04, 0.048), (0.048, 0.04)])
@pytest.mark.parametrize("load", [0.45, 2.2])
def test_one_that_has_left_a_race_is_told_at_the_speed_of_the_others(
    monkeypatch: pytest.MonkeyPatch, eager: float, ours: float, load: float
) -> None:
    clock = use(monkeypatch, Clock())

    def call(name: str, seconds: float) -> Callable[[], None]:
        def work() -> None:
            clock.calls.append(name)
            clock.now += seconds * (load if clock.calls.count(name) > 3 else 1.0)

        return work

    seen = race({"eager": call("eager", eager), "ours": call("ours", ours)}, budget=0.1)
    assert min(clock.calls.count("eager"), clock.calls.count("ours")) == 3
    assert seen["ours"].median / seen["eager"].median == pytest.approx(ours / eager)


def test_in_a_race_one_disturbed_sample_costs_nobody_the_lead(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = use(monkeypatch, Clock())
    turns = iter([1.0, 5.0, 1.0, 1.0])

    def disturbed() -> None:
        clock.now += next(turns)

    seen = race({"a": disturbed, "b": clock.work("b", 2.0)}, budget=0.1)
    assert (seen["a"].rounds, seen["a"].median) == (3, 1.0)
    assert race({}, budget=0.1) == {}


def test_a_first_call_in_which_something_is_made_does_not_set_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, made = use(monkeypatch, Clock()), list[int]()

    def call() -> None:
        clock.now += 2e-6 if made else 0.7
        made.append(1)

    start = clock.now
    seen = compare(call, clock.work("b", 2e-6), budget=0.0, min_rounds=6)
    assert len(made) > 6 * 20 and seen.a.median == pytest.approx(2e-6) and clock.now - start < 0.8
