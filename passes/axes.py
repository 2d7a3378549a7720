"""Analysis 1: which logical axis is each dimension of each tensor?

Every dimension is a tuple of axes, the outermost first: none for a dimension of size one, several where axes were
flattened together (batch x tokens). Operators relate the dimensions of their results to those of their arguments; what
an elementwise operator brings together is one axis, and an axis that a view takes apart is taken apart everywhere, in
weights too. An operator without a rule, or one whose sizes do not fit together, makes its result unknown: its
dimensions get axes of their own, and passes that meet it refuse and name it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from .axis import ONE, Axes, Axis, Site, Unknown
from .axis_rules import rule_of
from .nodes import arguments, expression
from .text import where


def analyse(graph: fx.Graph, weights: Mapping[str, Any]) -> Axes:
    """The axes of every tensor of a graph; `Program.axes` is the way in."""
    axes = Axes(graph)
    for node in graph.nodes:
        if node.op == "output":
            continue
        value = node.meta.get("val")
        if value is None and node.op == "get_attr":
            value = weights[str(node.target)]
        if node.op in ("placeholder", "get_attr"):
            axes.values[node] = _own(node, value)
            continue
        site = Site(axes, node, arguments(node))
        try:
            rule = rule_of(node)
            if rule is None:
                raise Unknown(f"{node.target} has no rule")
            axes.values[node] = rule(site)
        except Unknown as reason:
            place = where(node)
            axes.unknown[node] = f"{reason}{f' ({place})' if place else ''}"
            axes.values[node] = _own(node, value)
    return axes


def _own(node: fx.Node, value: Any, label: str = "") -> Any:
    """New axes for every dimension of a value; None for what is no tensor."""
    if isinstance(value, torch.Tensor):
        return [() if expression(s) == ONE else (Axis(expression(s), f"{node.name}{label}.{d}"),)
                for d, s in enumerate(value.shape)]  # fmt: skip
    if isinstance(value, (list, tuple)):
        return tuple(_own(node, v, f"{label}.{k}") for k, v in enumerate(value))
    return None
