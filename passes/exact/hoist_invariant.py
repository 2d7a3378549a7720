"""hoist_invariant: do work that is the same in every run, or for every row of the batch, only once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from ..base import Context, Pass, Refusal
from ..layout import refresh
from ..nodes import escapes, is_pure, same
from ..program import Program
from ..rewrite import replace
from .fold_constants import fold

aten = torch.ops.aten


@dataclass(frozen=True)
class HoistInvariant(Pass):
    """Evaluate input-free sub-graphs once, however little they grew from, and do pointwise work before expanding.

        m = aten.mul(aten.expand(c, [8, 12, 64]), 2.0)   -->   m = aten.expand(aten.mul(c, 2.0), [8, 12, 64])

    Assumes that a value of up to `limit` bytes made by at least two computing calls is cheaper to read than to compute
    (a single fill or arange is not). Gives up memory: masks and tables stay allocated. Source: loop-invariant code
    motion, Aho et al., Compilers (2nd ed.), section 9.5.
    """

    name: ClassVar[str] = "hoist-invariant"
    limit: int = 1 << 26  # bytes

    def run(self, program: Program, ctx: Context) -> int | Refusal:
        """See the class."""
        sites, refusal = fold(program, lambda size, behind, calls: size <= self.limit and calls >= 2)
        for node in list(program.graph.nodes):
            reason = _sink_expand(program, node)
            if reason is None:
                sites += 1
            elif reason and refusal is None:
                refusal = Refusal.at(node, reason)
        return sites or refusal or Refusal("every call depends on an input, and none works on an expanded value")


def _sink_expand(program: Program, node: fx.Node) -> str | None:
    """Move an expand below a pointwise call. Returns why not; an empty reason if there is no expand to move."""
    expands = [n for n in node.all_input_nodes if n.target is aten.expand.default]
    pointwise = isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags
    if not (pointwise and expands and node.users and is_pure(node)) or node.target is aten.clone.default:
        return ""
    value = node.meta["val"]
    whole = next((n for n in expands if same(n.meta["val"].shape, value.shape)), None)
    if whole is None or escapes(node):
        return "the result leaves the program" if whole else "no expanded operand has the shape of the result"

    def core(source: fx.Node) -> fx.Node:
        inner = source.args[0] if source in expands else source
        # A tensor without dimensions takes part in type promotion differently from an expanded one.
        return inner if isinstance(inner, fx.Node) and inner.meta["val"].dim() else source

    args, kwargs = fx.node.map_arg((node.args, node.kwargs), core)
    new: Any = program.call(node.target, *args, before=node, like=node, **kwargs)
    small = new.meta["val"]
    if small.dtype != value.dtype or small.dim() > value.dim() or same(small.shape, value.shape):
        program.graph.erase_node(new)
        return "another operand has every row of its own"
    result = program.call(aten.expand.default, new, *whole.args[1:], before=node, like=node, **whole.kwargs)
    users = list(node.users)
    replace(node, result)
    refresh(program, users)
    return None
