"""Kernels that merge and choose tokens where their number is known at run time only, and sizes that follow from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("tvm")

from encoders import DEPTH, Text
from reference import region_of

from torchlathe import targets
from torchlathe.codegen.base import Destination, Region
from torchlathe.codegen.cache import _destination, load
from torchlathe.codegen.executable import Executable
from torchlathe.codegen.lower import lower_unmeasured
from torchlathe.codegen.trial import run_kernel
from torchlathe.codegen.tvm.backend import TvmBackend
from torchlathe.passes import MergeTokens, PruneTokens, ops
from torchlathe.passes.base import Context, Pass
from torchlathe.passes.capture import capture
from torchlathe.passes.nodes import expression, operator_name
from torchlathe.passes.program import Program

HOST = targets.get("cpu")
LENGTHS = (2, 3, 8, 33)  # some are shorter than the reduction


def texts(batch: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Texts of falling length."""
    torch.manual_seed(length)
    mask = torch.arange(length)[None] < torch.linspace(length, 1 + length // 2, batch)[:, None]
    return torch.randn(batch, length, 12), mask


def shortened(*passes: Pass) -> Program:
    batch, tokens = torch.export.Dim("batch", min=1, max=8), torch.export.Dim("tokens", min=2, max=64)
    sizes = {0: batch, 1: tokens}
    program = capture(Text().eval(), texts(2, 20), dynamic_shapes=(sizes, sizes))
    for rewrite in passes:
        assert isinstance(rewrite.run(program, Context(HOST)), int)
    return program


def compiled(program: Program, operator: str) -> Executable:
    """With a kernel of ours wherever the operator is."""
    choices = lower_unmeasured(program, HOST)
    of_it = [c for c in choices if any(operator_name(n) == operator for n in c.region.nodes)]
    assert of_it and {c.kernel.backend for c in of_it} == {"tvm"}
    return Executable(program, choices)


@torch.no_grad()
def check(run: Any, program: Program) -> None:
    for batch in (1, 3):
        for length in LENGTHS:
            args = texts(batch, length)
            torch.testing.assert_close(run(*args), program(*args), atol=1e-5, rtol=1e-5)


def test_merging_any_number_of_tokens(tmp_path: Path) -> None:
    program = shortened(MergeTokens(r=3))
    run = compiled(program, "merge_tokens")
    check(run, program)
    merges = [c for c in run.choices if any(operator_name(n) == "merge_tokens" for n in c.region.nodes)]
    assert len(merges) == DEPTH and len({id(c.kernel.call) for c in merges}) == 1  # sizes differ by name only
    run.save(str(tmp_path / "model.lathe"))
    check(load(tmp_path / "model.lathe"), program)


@pytest.mark.parametrize("keep", [0.5, 3])
def test_choosing_any_number_of_tokens(keep: Any) -> None:
    program = shortened(PruneTokens(keep=keep, score="received", layers=(0, 2)))
    check(compiled(program, "best_tokens"), program)


def test_choosing_the_last_token() -> None:
    program = shortened(PruneTokens(keep=0.3, score="last_query", layers=(1,)))
    check(compiled(program, "best_tokens"), program)


@pytest.mark.parametrize(("function", "widths"), [
    (lambda x, size, metric: tuple(ops.merge_tokens()(x, size, metric, 9, [0, -1])), [(5,), (), (7,)]),
    (lambda score: (ops.best_tokens()(score, 3, [0, -2]),), [()]),
])  # fmt: skip
def test_protected_places_counted_from_the_last_token(function: Any, widths: list[tuple[int, ...]]) -> None:
    def values(tokens: int) -> tuple[torch.Tensor, ...]:
        torch.manual_seed(tokens)
        return tuple(torch.rand(2, tokens, *w) for w in widths)

    open_size = {1: torch.export.Dim("tokens", min=4, max=64)}
    region, graph = region_of(function, values(24), [open_size for _ in widths])
    names = [n.name for n in graph.nodes if n.op == "placeholder"]
    kernel = TvmBackend().lower(region, HOST, next(iter(TvmBackend().space(region, HOST))))
    for tokens in (24, 34, 8):
        args = values(tokens)
        ours = run_kernel(kernel, [args[names.index(n.name)] for n in region.inputs])
        torch.testing.assert_close(ours, list(function(*args)))


def test_sizes_do_not_grow_from_layer_to_layer() -> None:
    program = shortened(MergeTokens(r=3))
    merges = [n for n in program.graph.nodes if operator_name(n) == "merge_tokens"]
    counts = [expression(n.meta["val"][0].shape[1]) for n in merges]
    assert len(set(counts)) == DEPTH and all(n.is_Symbol for n in counts)
    again = shortened(MergeTokens(r=3))
    assert again.text() == program.text()


EXTENT = ("Add", (1, 0), ("Mul", -1, ("Max", 0, ("Min", 3, ("FloorDiv", (0, 1), 2)))))


def test_a_size_that_follows_from_others() -> None:
    made = Destination((4, EXTENT), torch.float32, (1, 0))
    assert made.bytes == 0
    a, b = torch.empty(2, 5), torch.empty(9)
    assert eval(made.text(["a", "b"]), {"a": a, "b": b}) == (7, 4)


@pytest.mark.parametrize("stored", [
    ["__import__", 0], ["Add", "a", 1], ["Add", [0, 7.5], 1], [2, 0], [0, -1], -3, [], ["Add", [["Add"]], 1],
    ["Pow", [0, 0], ["Add", [0, 0]]],
])  # fmt: skip
def test_stored_sizes_that_are_none_are_refused(stored: Any) -> None:
    region = Region((), (None, None), ())  # type: ignore[arg-type]
    with pytest.raises((ValueError, TypeError)):
        _destination([[stored], "float32", None], region)


def test_stored_sizes_come_back() -> None:
    region = Region((), (None, None), ())  # type: ignore[arg-type]
    stored = ["Add", [1, 0], ["Mul", -1, ["Max", 0, ["Min", 3, ["FloorDiv", [0, 1], 2]]]]]
    assert _destination([[4, stored], "float32", None], region).shape == (4, EXTENT)
