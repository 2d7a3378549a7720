"""Regions of plain functions, and what counts as equal to eager: error at most twice eager's own, NaN and Inf alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from torchlathe.codegen.base import Region


class Wrapped(torch.nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: torch.Tensor) -> Any:
        return self.function(*args)


def region_of(function: Callable[..., Any], args: tuple[torch.Tensor, ...], dynamic: Any = None) -> tuple[Region, Any]:
    shapes = None if dynamic is None else {"args": tuple(dynamic)}
    exported = torch.export.export(Wrapped(function), args, dynamic_shapes=shapes).run_decompositions({})
    graph = exported.graph
    for node in list(graph.nodes):
        if "_assert_tensor_metadata" in str(node.target):
            graph.erase_node(node)
    return Region.of(n for n in graph.nodes if n.op == "call_function" and "sym_size" not in str(n.target)), graph


def compare(ours: torch.Tensor, eager: torch.Tensor, exact: torch.Tensor) -> None:
    if not eager.is_floating_point():
        assert torch.equal(ours, eager)
        return
    assert torch.equal(ours.isnan(), eager.isnan())
    assert torch.equal(ours[ours.isinf()], eager[ours.isinf()]) and torch.equal(ours.isinf(), eager.isinf())
    good = eager.isfinite()
    o, e, x = ours[good].double(), eager[good].double(), exact[good].double()
    floor = 1e-5 if eager.dtype == torch.float32 else 1e-3
    limit = 2 * (e - x).abs().max() + floor * x.abs().max().clamp_max(1.0) if good.any() else 0.0
    assert not good.any() or (o - x).abs().max() <= limit
