"""Observe: run calibration batches through a program and reduce what chosen nodes yield."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from .program import Program

Reducer = Callable[[Any, Any], Any]  # (state so far or None, value of the node in this batch) -> new state


def observe(
    program: Program, batches: Iterable[Sequence[Any]], reducers: Mapping[fx.Node, Reducer]
) -> dict[fx.Node, Any]:
    """Fold each chosen node's values over all batches.

    Args:
        batches: flat inputs of the program, one sequence per batch.
        reducers: for each watched node the function that folds its value into a state; memory stays that of the states.

    Returns:
        The final state of each watched node.
    """
    states: dict[fx.Node, Any] = dict.fromkeys(reducers)

    def watch(node: fx.Node, value: Any) -> None:
        if node in reducers:
            states[node] = reducers[node](states[node], value)

    with torch.no_grad():
        for batch in batches:
            program.run(batch, watch)
    return states
