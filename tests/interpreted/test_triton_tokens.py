"""GPU kernels that merge and choose tokens, run by Triton's interpreter, against what the operators mean in torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from lowered import FLOATS, LAYOUTS, alone, close, laid_out

from torchlathe import targets
from torchlathe.codegen.trial import run_kernel
from torchlathe.codegen.triton.backend import TritonBackend
from torchlathe.passes import ops

pytestmark = pytest.mark.slow  # the interpreter needs minutes for these

TARGET = targets.get("nvidia-sm90")


def run(function: Callable[..., Any], *args: torch.Tensor, most: int = 9) -> list[list[torch.Tensor]]:
    """The results of the schedules; all of the function is one region."""
    region, order = alone(function, args)
    backend, values = TritonBackend(), [args[k] for k in order]
    assert backend.supports(region, TARGET) is None
    schedules = list(backend.space(region, TARGET))[:most]
    assert schedules
    return [run_kernel(backend.lower(region, TARGET, s), values) for s in schedules]


def merging(count: int, protected: list[int]) -> Callable[..., Any]:
    return lambda x, size, metric, *valid: tuple(ops.merge_tokens()(x, size, metric, count, protected, *valid))


def check_merge(function: Callable[..., Any], *args: torch.Tensor, most: int = 9) -> None:
    wanted = function(*args)
    exact = function(args[0].double(), *args[1:])[0]
    for tokens, sizes, places, where in run(function, *args, most=most):
        assert torch.equal(places, wanted[2]) and torch.equal(where, wanted[3])
        assert torch.equal(sizes.nan_to_num(-1), wanted[1].nan_to_num(-1))
        close(tokens, wanted[0], exact)


def sizes_of(batch: int, tokens: int) -> torch.Tensor:
    return torch.randint(1, 5, (batch, tokens)).float()


@settings(deadline=None, max_examples=20, derandomize=True, phases=[Phase.generate])
@given(st.data())
def test_any_merge(data: st.DataObject) -> None:
    tokens, batch = data.draw(st.integers(2, 40)), data.draw(st.integers(1, 3))
    features, compared = data.draw(st.integers(1, 20)), data.draw(st.integers(1, 10))
    protected = sorted(data.draw(st.sets(st.integers(0, tokens - 1), max_size=tokens // 3)))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    metric = torch.randn(batch, tokens, compared)
    if data.draw(st.booleans()):  # duplicates, which tie
        metric = metric[:, torch.randint(0, max(1, tokens // 3), (tokens,))]
    valid = ()
    if data.draw(st.booleans()):
        valid = (torch.arange(tokens) < torch.randint(1, tokens + 1, (batch, 1)),)
    function = merging(data.draw(st.integers(1, tokens)), protected)
    x, size = torch.randn(batch, tokens, features), sizes_of(batch, tokens)
    if function(x, size, metric, *valid)[0].shape[1] < tokens:  # else nothing merges
        check_merge(function, x, size, metric, *valid, most=1)


@pytest.mark.parametrize("dtype", FLOATS)
def test_every_schedule_of_a_merge(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, metric = torch.randn(1, 90, 70).to(dtype), torch.randn(1, 90, 24).to(dtype)
    check_merge(merging(31, [0, 1]), x, sizes_of(1, 90), metric)


def test_merging_beside_tokens_behind_that_stay_alone() -> None:
    torch.manual_seed(0)
    check_merge(merging(9, [0, -2, -1]), torch.randn(3, 37, 20), sizes_of(3, 37), torch.randn(3, 37, 8), most=1)


def test_many_features_are_averaged_in_pieces() -> None:
    torch.manual_seed(0)
    check_merge(merging(3, [0]), torch.randn(1, 9, 2500), sizes_of(1, 9), torch.randn(1, 9, 300), most=1)


def test_many_tokens_become_one() -> None:
    metric = torch.zeros(1, 30, 3)
    metric[:, :, 0] = 1.0  # all even tokens find the first odd one
    x, size = torch.randn(1, 30, 8), sizes_of(1, 30)
    check_merge(merging(9, []), x, size, metric)
    assert merging(9, [])(x, size, metric)[1].max() > 9


def test_of_equal_ones_in_several_tiles_the_first_is_taken() -> None:
    check_merge(merging(40, []), torch.randn(1, 150, 3), sizes_of(1, 150), torch.ones(1, 150, 2), most=1)


def test_what_is_too_short_for_a_direction_is_alike_to_nothing() -> None:
    metric = torch.tensor([[[1.0, 0.0], [0.9, 0.4], [9e-43, 4e-43], [0.0, 1.0]]])  # token 2 points to none
    function = merging(1, [])
    check_merge(function, torch.randn(1, 4, 3), torch.ones(1, 4), metric)
    assert function(torch.randn(1, 4, 3), torch.ones(1, 4), metric)[2].tolist() == [[1, 2, 3]]


def test_vectors_of_no_length_and_no_number() -> None:
    torch.manual_seed(0)
    metric = torch.randn(2, 21, 8)
    metric[0, :9], metric[1, 3], metric[1, 4], metric[1, 6, 2] = 0.0, torch.nan, torch.inf, -torch.inf
    metric[0, 12] = 1e-42  # shorter than what counts as a length
    metric[0, 13] = 3e38
    check_merge(merging(6, [0]), torch.randn(2, 21, 20), sizes_of(2, 21), metric)


def test_what_is_not_a_number_stays_in_its_own_token() -> None:
    torch.manual_seed(0)
    x, metric, size = torch.randn(2, 20, 5), torch.randn(2, 20, 4), sizes_of(2, 20)
    x[0, 4], x[1, 7, 2], size[1, 3] = torch.nan, torch.inf, 0.0
    function = merging(8, [])
    check_merge(function, x, size, metric)
    assert 0 < function(x, size, metric)[0].isnan().any(-1).sum() < 4


@pytest.mark.parametrize("how", LAYOUTS)
def test_layouts_of_a_merge(how: str) -> None:
    torch.manual_seed(0)
    x, metric = (laid_out(torch.randn(3, 22, n), how) for n in (10, 6))
    valid = torch.arange(22) < torch.tensor([[22], [13], [5]])
    check_merge(merging(7, [0]), x, sizes_of(22, 3).t(), metric, laid_out(valid, how))


def test_a_batch_of_any_size() -> None:
    n = torch.export.Dim("n", min=2, max=64)
    function = merging(4, [0])
    args = [(torch.randn(b, 15, 6), sizes_of(b, 15), torch.randn(b, 15, 3)) for b in (2, 5, 1)]
    region, order = alone(function, args[0], ({0: n},) * 3)
    backend = TritonBackend()
    assert backend.supports(region, TARGET) is None
    kernel = backend.lower(region, TARGET, next(iter(backend.space(region, TARGET))))
    for values in args:
        for ours, wanted in zip(run_kernel(kernel, [values[k] for k in order]), function(*values), strict=True):
            assert torch.allclose(ours, wanted)


def test_results_that_nobody_reads() -> None:
    torch.manual_seed(0)
    x, metric = torch.randn(2, 10, 6), torch.randn(2, 10, 6)
    for k in range(4):
        found = run(lambda *a, k=k: merging(3, [0])(*a)[k], x, torch.ones(2, 10), metric, most=1)
        assert torch.allclose(found[0][0], merging(3, [0])(x, torch.ones(2, 10), metric)[k])


@settings(deadline=None, max_examples=25, derandomize=True, phases=[Phase.generate])
@given(st.data())
def test_any_choice(data: st.DataObject) -> None:
    tokens, batch = data.draw(st.integers(1, 70)), data.draw(st.integers(1, 3))
    few = st.sampled_from([0.0, -0.0, 1.5, -2.0, float("inf"), float("-inf"), float("nan"), 1e-42])
    score = torch.tensor([data.draw(st.lists(few, min_size=tokens, max_size=tokens)) for _ in range(batch)])
    protected = data.draw(st.lists(st.integers(-tokens, tokens - 1), max_size=3, unique_by=lambda p: p % tokens))
    count = data.draw(st.integers(0 if protected else 1, tokens))
    dtype = data.draw(st.sampled_from(FLOATS))
    function = lambda s: ops.best_tokens()(s, count, protected)  # noqa: E731
    for (places,) in run(function, score.to(dtype), most=1):
        assert torch.equal(places, function(score.to(dtype)))


def test_every_schedule_of_a_choice() -> None:
    torch.manual_seed(0)
    score = torch.randint(0, 90, (2, 1500)).float().t().contiguous().t()
    function = lambda s: ops.best_tokens()(s, 1, [0, 3], 3)  # noqa: E731
    found = run(function, score)
    assert len(found) > 1
    for (places,) in found:
        assert torch.equal(places, function(score))


def test_what_is_refused() -> None:
    x, backend = torch.randn(1, 6, 4), TritonBackend()
    region, _ = alone(merging(0, []), (x, torch.ones(1, 6), x))
    assert "leaves all tokens" in str(backend.supports(region, TARGET))
    into = lambda x, size: tuple(ops.merge_tokens()(x, size, x, 2, [], None, [0]))  # noqa: E731
    region, _ = alone(into, (x, torch.ones(1, 6)))
    assert "chosen places" in str(backend.supports(region, TARGET))
    region, _ = alone(lambda s: ops.best_tokens()(s, 3, []), (torch.randn(1, 9000),))
    assert "more tokens" in str(backend.supports(region, TARGET))
