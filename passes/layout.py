"""How results lie in memory, after a rewrite has changed how their sources do."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils import _pytree as pytree

from .nodes import erase_unused, is_pure
from .operators import CASTS, COPIES, TURNS, VIEWS
from .program import Program

aten = torch.ops.aten


def refresh(program: Program, nodes: Iterable[fx.Node]) -> None:
    """Infer values anew from `nodes` on, as far as layouts change; a view that one forbids becomes a reshape."""
    waiting = {n for n in nodes if n.op == "call_function"}
    while waiting:
        node = min(waiting)
        waiting.remove(node)
        before = node.meta.get("val")
        leaves = pytree.tree_leaves(before)
        plain = all(isinstance(v, torch.Tensor) and not free_unbacked_symbols(v) for v in leaves)
        if not plain or not is_pure(node):
            continue
        try:
            program.infer(node)
        except (RuntimeError, ValueError):
            if node.target is not aten.view.default:
                raise
            node.target = aten.reshape.default
            program.infer(node)
        if [v.stride() for v in pytree.tree_leaves(node.meta["val"])] != [v.stride() for v in leaves]:
            waiting.update(u for u in node.users if u.op == "call_function")


def relax_layout(program: Program, users: Sequence[fx.Node]) -> None:
    """Let views that relied on the strides of the old product follow the strides of the new operator.

    Which kernel runs, and so which strides come out, is only known at run time: `view` becomes `reshape`.
    """
    front, seen = list(users), set[fx.Node]()
    while front:
        node = min(front)
        front = [n for n in front if n is not node]
        if node in seen or node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        seen.add(node)
        if node.target not in VIEWS | TURNS | COPIES | CASTS and torch.Tag.pointwise not in node.target.tags:
            continue
        if node.target in (aten.view.default, aten._unsafe_view.default):
            node.target = aten.reshape.default
            source = node.all_input_nodes[0]
            if source.target is aten.clone.default and len(source.users) == 1:
                source.replace_all_uses_with(source.all_input_nodes[0])  # the clone was there for the view
                erase_unused(source)
        program.infer(node)
        front += node.users
