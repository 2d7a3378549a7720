"""Lines of source that bring a tensor into the layout that its readers rely on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


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
    order = _dense_order(value)
    if order is None:
        return []
    inverse = tuple(order.index(d) for d in range(len(order)))
    return [f"if not {name}.permute({tuple(order)}).is_contiguous(): "
            f"{name} = {name}.permute({tuple(order)}).contiguous().permute({inverse})"]  # fmt: skip


def _dense_order(value: torch.Tensor) -> list[int] | None:
    """The order of dimensions in which a tensor of symbolic size lies dense in memory, None if it has gaps."""
    hints = [[size_hint(s) for s in sizes] for sizes in (value.stride(), value.shape)]
    order = sorted(range(value.dim()), key=lambda d: (-hints[0][d], -hints[1][d]))
    expected = 1
    for dim in reversed(order):
        if hints[1][dim] != 1 and hints[0][dim] != expected:
            return None
        expected *= hints[1][dim]
    return order


def size_hint(size: Any) -> int:
    """A size, or that which a symbolic one had when it was traced."""
    return size if isinstance(size, int) else int(size.node.hint or 1)


def _restride(value: torch.Tensor, stride: tuple[int, ...]) -> torch.Tensor:
    return torch.empty_strided(value.shape, stride, dtype=value.dtype, device=value.device).copy_(value)
