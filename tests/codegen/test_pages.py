"""Large pages: asked for where a result is large, never for a small one, and harmless where the system has none."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest
import torch

from torchlathe.codegen import pages
from torchlathe.codegen.pages import LARGE, on_large_pages


def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    seen: list[tuple[int, int, int]] = []
    monkeypatch.setattr(pages, "_advise", lambda: lambda *args: seen.append(args))
    return seen


def test_whole_pages_inside_the_tensor_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = calls(monkeypatch)
    tensor = torch.empty(LARGE + 12345, dtype=torch.uint8)[7:]
    assert on_large_pages(tensor) is tensor
    ((start, size, advice),) = seen
    assert start % mmap.PAGESIZE == 0 and size % mmap.PAGESIZE == 0 and advice == mmap.MADV_HUGEPAGE
    assert tensor.data_ptr() <= start < tensor.data_ptr() + mmap.PAGESIZE
    assert 0 <= tensor.data_ptr() + tensor.nbytes - (start + size) < mmap.PAGESIZE


def test_small_tensors_and_other_systems_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = calls(monkeypatch)
    on_large_pages(torch.empty(LARGE - 1, dtype=torch.uint8))
    assert not seen
    monkeypatch.setattr(pages, "_advise", lambda: None)
    assert on_large_pages(torch.empty(LARGE, dtype=torch.uint8)).nbytes == LARGE


def test_the_system_takes_the_request() -> None:
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not setting.exists() or "[never]" in setting.read_text():
        pytest.skip("this system has no transparent large pages")
    tensor = torch.empty(64 << 20, dtype=torch.uint8)
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    assert pages._advise()(start, LARGE, mmap.MADV_HUGEPAGE) == 0
    on_large_pages(tensor).fill_(1)
    assert tensor.sum(dtype=torch.int64) == tensor.nbytes
