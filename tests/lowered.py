"""Functions lowered by the Triton backend as one kernel family each, and held against eager."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from reference import region_of

from torchlathe import targets
from torchlathe.codegen.base import Region
from torchlathe.codegen.trial import run_kernel
from torchlathe.codegen.triton.backend import TritonBackend

Tensors = tuple[torch.Tensor, ...]


def alone(function: Callable[..., Any], args: Tensors, dynamic: Any = None) -> tuple[Region, list[Any]]:
    """The function as one region, and which argument is which input; of a size: of which argument and dimension."""
    region, graph = region_of(function, args, dynamic)
    names = [n.name for n in graph.nodes if n.op == "placeholder" and isinstance(n.meta["val"], torch.Tensor)]
    sizes = [n for n in region.inputs if n.op == "call_function"]
    where = {n: (names.index(n.args[0].name), n.args[1]) for n in sizes}  # type: ignore[union-attr]
    return region, [where[n] if n in where else names.index(n.name) for n in region.inputs]


def agree(
    function: Callable[..., Any],
    *args: torch.Tensor,
    others: Sequence[Tensors] = (),
    dynamic: Any = None,
    most: int = 3,
    wanted: Callable[..., Any] | None = None,
    kept: bool = True,
) -> list[str]:
    """Run the first `most` kernels for a function, and compare them with eager in the same and in double precision.

    Args:
        others: further arguments that the same kernels are called with.
        dynamic: a dict of symbolic dimensions per argument.
        wanted: what stands for the function in eager, where it cannot be run as it is.
        kept: whether somebody relies on how the results lie in memory.

    Returns:
        What was compared: name and schedule of each kernel.
    """
    region, order = alone(function, args, dynamic)
    for node in region.outputs:
        node.meta["kept"] = kept
    backend, row, found = TritonBackend(), targets.get("nvidia-sm90"), list[str]()
    assert (reason := backend.supports(region, row)) is None, reason
    eager = wanted or function
    for schedule in itertools.islice(backend.space(region, row), most):
        kernel = backend.lower(region, row, schedule)
        for values in (args, *others):
            ours = run_kernel(kernel, [values[k[0]].shape[k[1]] if isinstance(k, tuple) else values[k] for k in order])
            same, exact = flat(eager(*values)), flat(eager(*map(double, values)))
            assert len(ours) == len(same)
            for k, (o, e, x) in enumerate(zip(ours, same, exact, strict=True)):
                assert o.shape == e.shape and o.dtype is e.dtype
                try:
                    close(o, e, x)
                except AssertionError as error:
                    error.add_note(
                        f"output {k} of {kernel.name} {schedule}: {o.flatten()[:20]} instead of {e.flatten()[:20]}"
                    )
                    raise
        found.append(f"{kernel.name} {schedule}")
    assert found
    return found


def close(ours: torch.Tensor, eager: torch.Tensor, exact: torch.Tensor) -> None:
    """Our error may be twice eager's largest, and what `torch.testing.assert_close` allows; NaN and Inf are alike.

    The interpreter cuts off what bfloat16 cannot hold, where GPUs round.
    """
    if not eager.is_floating_point():
        assert torch.equal(ours, eager)
        return
    assert torch.equal(ours.isnan(), eager.isnan()) and torch.equal(ours.isinf(), eager.isinf())
    assert torch.equal(ours[ours.isinf()], eager[ours.isinf()])
    good = eager.isfinite() & exact.isfinite()
    if good.any():
        o, e, x = (t[good].double() for t in (ours, eager, exact))
        part, least = FLOOR[eager.dtype]
        assert ((o - x).abs() <= 2 * (e - x).abs().max() + part * x.abs() + least).all()


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
FLOOR = {torch.float32: (1.3e-6, 1e-5), torch.float16: (1e-3, 1e-5), torch.bfloat16: (1.6e-2, 1e-5)}
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
