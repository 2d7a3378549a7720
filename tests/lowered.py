"""Functions lowered by the Triton backend as one kernel family each, and held against eager."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from reference import compare, region_of

from torchlathe import targets
from torchlathe.codegen.base import Region
from torchlathe.codegen.trial import run_kernel
from torchlathe.codegen.triton.backend import TritonBackend

Tensors = tuple[torch.Tensor, ...]


def alone(function: Callable[..., Any], args: Tensors, dynamic: Any = None) -> tuple[Region, list[int]]:
    """The function as one region, and which argument is which input."""
    region, graph = region_of(function, args, dynamic)
    names = [n.name for n in graph.nodes if n.op == "placeholder" and isinstance(n.meta["val"], torch.Tensor)]
    return region, [names.index(n.name) for n in region.inputs]


def agree(
    function: Callable[..., Any],
    *args: torch.Tensor,
    others: Sequence[Tensors] = (),
    dynamic: Any = None,
    most: int = 3,
    wanted: Callable[..., Any] | None = None,
) -> list[str]:
    """Run the first `most` kernels for a function, and compare them with eager in the same and in double precision.

    Args:
        others: further arguments that the same kernels are called with.
        dynamic: a dict of symbolic dimensions per argument.
        wanted: what stands for the function in eager, where it cannot be run as it is.

    Returns:
        What was compared: name and schedule of each kernel.
    """
    region, order = alone(function, args, dynamic)
    backend, row, found = TritonBackend(), targets.get("nvidia-sm90"), list[str]()
    assert (reason := backend.supports(region, row)) is None, reason
    eager = wanted or function
    for schedule in itertools.islice(backend.space(region, row), most):
        kernel = backend.lower(region, row, schedule)
        for values in (args, *others):
            ours = run_kernel(kernel, [values[k] for k in order])
            same, exact = flat(eager(*values)), flat(eager(*map(double, values)))
            assert len(ours) == len(same)
            for o, e, x in zip(ours, same, exact, strict=True):
                assert o.shape == e.shape and o.dtype is e.dtype
                compare(o, e, x)
        found.append(f"{kernel.name} {schedule}")
    assert found
    return found


def flat(result: Any) -> list[torch.Tensor]:
    """One or more results as a list."""
    return list(result) if isinstance(result, (tuple, list)) else [result]


def double(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in double precision if it is floating point."""
    return tensor.double() if tensor.is_floating_point() else tensor


def laid_out(tensor: torch.Tensor, how: str) -> torch.Tensor:
    """The same values in another layout: as they are, transposed, cut out of something larger, or at an odd address."""
    if how == "transposed":
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    if how == "sliced":
        large = torch.full([n + 3 for n in tensor.shape], 7, dtype=tensor.dtype)
        inner = large[tuple(slice(1, n + 1) for n in tensor.shape)]
        return inner.copy_(tensor)
    if how == "odd":
        return torch.zeros(tensor.numel() + 1, dtype=tensor.dtype)[1:].view(tensor.shape).copy_(tensor)
    assert how == "contiguous"
    return tensor


LAYOUTS = ("contiguous", "transposed", "sliced", "odd")
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
