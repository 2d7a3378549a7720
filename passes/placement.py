"""Move a program to another device: its weights, what it creates, and what the graph knows of its values."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch.utils import _pytree as pytree

from .program import Program


def device_of(values: Iterable[Any]) -> torch.device:
    """The device of the first tensor; the CPU if there is none."""
    return next((v.device for v in values if isinstance(v, torch.Tensor)), torch.device("cpu"))


def place_of(program: Program) -> torch.device:
    """The device of a program's first input or weight that is a tensor; the CPU if there is none."""
    return device_of(n.meta.get("val") for n in program.graph.nodes if n.op in ("placeholder", "get_attr"))


def placed(program: Program, device: torch.device, *, weights: bool = True) -> Program:
    """The program with everything on a device; weights are copied there, the given program is not changed.

    Args:
        weights: False leaves the weights where they are, for what puts them in their place itself. Until then the
            graph says that they are on the device, and the program does not run.
    """
    copy = program.fork()
    if weights:
        copy = replace(copy, weights={k: moved(v, device) for k, v in copy.weights.items()})

    def renamed(value: Any) -> Any:
        return device if isinstance(value, torch.device) else value

    for node in copy.graph.nodes:
        node.args, node.kwargs = pytree.tree_map(renamed, (node.args, node.kwargs))
        for kind in ("val", "traced"):
            if kind in node.meta:
                node.meta = {**node.meta, kind: pytree.tree_map(lambda v: _fake_on(v, device), node.meta[kind])}
    return copy


def moved(value: Any, device: torch.device) -> Any:
    """A tensor on a device; other values are themselves."""
    return value.to(device) if isinstance(value, torch.Tensor) else value


def _fake_on(value: Any, device: torch.device) -> Any:
    if not isinstance(value, torch._subclasses.FakeTensor):
        return value
    with value.fake_mode:
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
