"""Kernels that merge, choose and take tokens, against what the operators mean in torch."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("tvm")

from reference import compare, region_of

from torchlathe.codegen.base import Region
from torchlathe.codegen.trial import run_kernel
from torchlathe.codegen.tvm.backend import TvmBackend
from torchlathe.passes import ops
from torchlathe.targets.target import Target

BACKEND = TvmBackend()


def target(bits: int) -> Target:
    return Target("cpu", "cpu", "generic", 2, {}, 0.0, (), 0, ("float32",), vector_bits=bits)


def run(function: Callable[..., Any], *args: torch.Tensor, bits: int = 256) -> list[list[torch.Tensor]]:
    """The results of every schedule; all of the function is one kernel."""
    region, graph = region_of(function, args)
    assert BACKEND.supports(region, target(bits)) is None
    names = [n.name for n in graph.nodes if n.op == "placeholder"]
    values = [args[names.index(n.name)] for n in region.inputs]
    schedules = list(BACKEND.space(region, target(bits)))
    assert schedules
    return [list(run_kernel(BACKEND.lower(region, target(bits), s), values)) for s in schedules]


def merging(count: int, protected: list[int]) -> Callable[..., Any]:
    return lambda x, size, metric, *valid: tuple(ops.merge_tokens()(x, size, metric, count, protected, *valid))


def check_merge(function: Callable[..., Any], *args: torch.Tensor, bits: int = 256) -> None:
    wanted = function(*args)
    exact = function(args[0].double(), *args[1:])[0]
    for tokens, sizes, places, where in run(function, *args, bits=bits):
        assert torch.equal(places, wanted[2]) and torch.equal(where, wanted[3])
        assert torch.equal(sizes, wanted[1])
        compare(tokens, wanted[0], exact)


def sizes_of(batch: int, tokens: int) -> torch.Tensor:
    return torch.randint(1, 5, (batch, tokens)).float()


@pytest.mark.parametrize("count", [1, 13, 98])
@pytest.mark.parametrize(("tokens", "features", "compared"), [(197, 384, 64), (198, 70, 7), (65, 16, 1), (2, 3, 5)])
def test_merging(tokens: int, features: int, compared: int, count: int) -> None:
    torch.manual_seed(0)
    x, metric = torch.randn(3, tokens, features), torch.randn(3, tokens, compared)
    check_merge(merging(count, [0] if tokens > 2 else []), x, sizes_of(3, tokens), metric)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [128, 512])
def test_merging_in_half_precision(dtype: torch.dtype, bits: int) -> None:
    torch.manual_seed(0)
    x, metric = torch.randn(2, 50, 48).to(dtype), torch.randn(2, 50, 24).to(dtype)
    check_merge(merging(11, [0, 1]), x, sizes_of(2, 50), metric, bits=bits)


def test_merging_beside_tokens_behind_that_stay_alone() -> None:
    torch.manual_seed(0)
    check_merge(merging(9, [0, -2, -1]), torch.randn(3, 37, 20), sizes_of(3, 37), torch.randn(3, 37, 8))


def test_merging_into_chosen_places_is_left_to_torch() -> None:
    x, size = torch.randn(2, 8, 4), torch.ones(2, 8)
    region, _ = region_of(lambda x, size: tuple(ops.merge_tokens()(x, size, x, 2, [], None, [0])), (x, size))
    assert "chosen places" in str(BACKEND.supports(region, target(256)))


def test_duplicates_tie_and_the_first_is_taken() -> None:
    torch.manual_seed(0)
    few = torch.randn(2, 4, 33)
    metric = few[:, torch.randint(0, 4, (40,))] * torch.rand(40, 1).add(0.5)
    check_merge(merging(15, []), torch.randn(2, 40, 20), sizes_of(2, 40), metric)


def test_vectors_of_no_length_and_no_number() -> None:
    torch.manual_seed(0)
    metric = torch.randn(2, 21, 8)
    metric[0, :9], metric[1, 3], metric[1, 4] = 0.0, torch.nan, torch.inf
    check_merge(merging(6, [0]), torch.randn(2, 21, 20), sizes_of(2, 21), metric)


@pytest.mark.parametrize("protected", [[0, 1, 2, 3, 4], [3, 16, 8], [0, 2, 4, 6, 8, 10, 12, 14, 16]])
def test_protected_tokens_stay_alone(protected: list[int]) -> None:
    torch.manual_seed(0)
    x, size = torch.randn(2, 17, 9), torch.ones(2, 17)
    function = merging(17, protected)
    check_merge(function, x, size, torch.randn(2, 17, 9))
    _, sizes, places, _ = function(x, size, torch.randn(2, 17, 9))
    for place in protected:
        assert (sizes[places == place] == 1).all() and (places == place).sum() == 2


def test_padding_and_tokens_are_not_mixed() -> None:
    torch.manual_seed(0)
    valid = torch.arange(24)[None] < torch.tensor([[24], [13], [1], [6]])
    x = torch.where(valid[..., None], 1.0, -1.0).expand(4, 24, 10) * torch.ones(10)
    for count in (1, 5, 12):
        function = merging(count, [])
        check_merge(function, x, sizes_of(4, 24), torch.randn(4, 24, 6), valid)
        tokens = function(x, sizes_of(4, 24), torch.randn(4, 24, 6), valid)[0]
        assert (tokens.abs() - 1).abs().max() < 1e-6  # a mean of 1 and -1 would lie between


def test_any_batch_and_strides() -> None:
    torch.manual_seed(0)
    big = torch.randn(40, 5, 3 * 32)
    x, metric = big[..., :32].transpose(0, 1), big[..., 64:].transpose(0, 1)
    check_merge(merging(7, [0]), x, sizes_of(40, 5).t(), metric)


def test_results_that_nobody_reads() -> None:
    x, metric = torch.randn(2, 10, 6), torch.randn(2, 10, 6)
    for k in range(4):
        found = run(lambda *a, k=k: merging(3, [0])(*a)[k], x, torch.ones(2, 10), metric)
        wanted = merging(3, [0])(x, torch.ones(2, 10), metric)[k]
        for (ours,) in found:
            assert torch.allclose(ours, wanted)


@pytest.mark.parametrize("tokens", [1, 3, 100, 197])
def test_choosing_the_best(tokens: int) -> None:
    torch.manual_seed(0)
    score = torch.randint(0, 30, (4, tokens)).float() / 7
    score[0, tokens // 2] = torch.nan
    for chosen, protected in ((tokens // 3, [0]), (0, [tokens - 1]), (tokens, [])):
        function = lambda s, c=chosen, p=protected: ops.best_tokens()(s, c, p)  # noqa: E731
        for (places,) in run(function, score):
            assert torch.equal(places, function(score))


def test_taking_tokens_with_what_follows() -> None:
    torch.manual_seed(0)
    x, index = torch.randn(3, 9, 4, 20), torch.randint(0, 9, (3, 5))
    table = torch.randn(1, 9, 4, 20)

    def function(x: torch.Tensor, table: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        taken = ops.take()(x, 1, index) + ops.take()(table, 1, index)
        return torch.nn.functional.layer_norm(taken, (20,))

    found = run(function, x, table, index)
    assert len(found) > 1
    for (ours,) in found:
        compare(ours, function(x, table, index), function(x.double(), table.double(), index))


def test_taking_what_is_not_there_is_an_error() -> None:
    x, index = torch.randn(2, 4, 20), torch.tensor([[0, 1], [2, 4]])
    with pytest.raises(IndexError):
        run(lambda x, i: ops.take()(x, 1, i), x, index)


def test_a_merge_without_its_parts_is_refused() -> None:
    args = torch.randn(2, 10, 6), torch.ones(2, 10), torch.randn(2, 10, 6)
    region, _ = region_of(merging(2, []), args)
    assert "together with" in str(BACKEND.supports(Region.of(region.nodes[:2]), target(256)))


def test_a_merge_takes_in_nothing_but_its_parts() -> None:
    """What follows may have an argument that looks like the number of a result."""
    args = torch.randn(2, 10, 6), torch.ones(2, 10), torch.randn(2, 10, 6)
    for follow in (lambda y: y.unsqueeze(-1), lambda y: y.unsqueeze(1)):
        region, _ = region_of(
            lambda x, s, m, f=follow: (merging(2, [])(x, s, m)[0], f(merging(2, [])(x, s, m)[1])), args
        )
        last = [n for n in region.nodes if "unsqueeze" in str(n.target)]
        own = {n for n in region.nodes if n.target is operator.getitem and n.args[0] is last[0].args[0].args[0]}
        whole = Region.of([last[0].args[0].args[0], *own, *last])
        assert "together with" in str(BACKEND.supports(whole, target(256)))
