"""Lines of source that bring a tensor into the layout that its readers rely on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .plans.layout import dense_order


def layout_lines(bind: Callable[[Any, str], str], value: torch.Tensor, name: str) -> list[str]:
    """Lines that copy a tensor into the layout of `value`, if it comes in another one."""
    if value.is_contiguous():
        return [f"if not {name}.is_contiguous(): {name} = {name}.contiguous()"]
    if any(isinstance(s, int) and s == 0 for s in value.stride()):
        return []  # an expanded tensor: what reads it takes its values from anywhere
    if not any(isinstance(s, torch.SymInt) for s in value.stride()):
        stride = tuple(value.stride())
        restride = bind(_restride, "restride")
        return [f"if {name}.stride() != {stride}: {name} = {restride}({name}, {stride})"]
    order = dense_order(*([size_hint(s) for s in each] for each in (value.shape, value.stride())))  # as traced
    if order is None:
        return []
    inverse = tuple(order.index(d) for d in range(len(order)))
    return [f"if not {name}.permute({order}).is_contiguous(): "
            f"{name} = {name}.permute({order}).contiguous().permute({inverse})"]  # fmt: skip


def size_hint(size: Any) -> int:
    """A size, or that which a symbolic one had when it was traced."""
    return size if isinstance(size, int) else int(size.node.hint or 1)


def _restride(value: torch.Tensor, stride: tuple[int, ...]) -> torch.Tensor:
    return torch.empty_strided(value.shape, stride, dtype=value.dtype, device=value.device).copy_(value)
