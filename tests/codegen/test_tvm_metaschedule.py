"""Searched schedules for operators without a template: right answers, refusals, the same sample for the same seed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("tvm")

from reference import compare, region_of

import torchlathe
from torchlathe import targets
from torchlathe.codegen.lower import backends
from torchlathe.codegen.trial import run_kernel
from torchlathe.codegen.tvm import metaschedule
from torchlathe.codegen.tvm.backend import TvmBackend
from torchlathe.codegen.tvm.metaschedule import MetaScheduleBackend

HOST = targets.get("cpu")
BACKEND = MetaScheduleBackend(TvmBackend())


def grouped(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return F.conv2d(x, w, None, 1, 1, 1, 4)


def operands() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(1, 32, 28, 28), torch.randn(32, 8, 3, 3)


@pytest.mark.slow
def test_samples_compute_what_eager_computes() -> None:
    args = operands()
    region, _ = region_of(grouped, args)
    assert BACKEND.supports(region, HOST) is None
    for schedule in list(BACKEND.space(region, HOST))[:4]:
        kernel = BACKEND.lower(region, HOST, schedule)
        (ours,) = run_kernel(kernel, list(args))
        compare(ours, grouped(*args), grouped(*(a.double() for a in args)))
        again = MetaScheduleBackend(TvmBackend()).lower(region, HOST, schedule)
        assert again.source == kernel.source
    shifted = torch.zeros(args[0].numel() + 1)[1:].view_as(args[0]).copy_(args[0])
    result = torch.zeros(ours.numel() + 1)[1:].view_as(ours)
    kernel.call(shifted, args[1], result)
    torch.testing.assert_close(result, ours)


@pytest.mark.parametrize(("function", "args", "reason"), [
    (lambda x, w: F.linear(x, w), (torch.randn(64, 256), torch.randn(256, 256)), "template"),
    (lambda x, w: F.conv2d(x, w, groups=2), (torch.randn(1, 4, 5, 5), torch.randn(4, 2, 3, 3)), "too little work"),
    (lambda x, w: F.conv2d(x, w, groups=4).relu(), operands(), "single"),
    (lambda x, w: grouped(x, w), tuple(t.double() for t in operands()), "float32"),
    (lambda x, w: grouped(x, w), tuple(t.to(memory_format=torch.channels_last) for t in operands()), "contiguous"),
])  # fmt: skip
def test_refusals_name_the_reason(function: Callable[..., Any], args: Any, reason: str) -> None:
    region, _ = region_of(function, args)
    assert reason in (BACKEND.supports(region, HOST) or "")


def test_what_the_importer_does_not_know_is_refused() -> None:
    region, _ = region_of(lambda x: torch.linalg.inv(x), (torch.randn(300, 300),))
    assert BACKEND.supports(region, HOST) is not None


def test_only_the_highest_level_searches() -> None:
    names = [[b.name for b in backends(None, HOST, search)[0]] for search in (False, True)]  # type: ignore[arg-type]
    assert names == [["tvm", "onednn"], ["tvm", "onednn", "metaschedule"]]


class Grouped(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(32, 32, 3, padding=1, groups=4, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x)


@pytest.mark.slow
def test_a_searched_kernel_competes_and_is_stored(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHLATHE_CACHE", str(tmp_path))
    monkeypatch.setattr(metaschedule, "SAMPLES", 3)
    model, x = Grouped().eval(), operands()[0]
    fast = torchlathe.optimize(model, (x,), level="max")
    torch.testing.assert_close(fast(x), model(x), atol=1e-4, rtol=1e-4)
    (kernel,) = fast.report.kernels
    assert any("metaschedule" in name for name in (kernel.backend, *kernel.rivals)), kernel
    fast.save(str(tmp_path / "grouped.lathe"))
    loaded = torchlathe.load(str(tmp_path / "grouped.lathe"))
    torch.testing.assert_close(loaded(x), model(x), atol=1e-4, rtol=1e-4)
