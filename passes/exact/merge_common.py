"""merge_common: compute what is computed twice only once."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from ..base import Context, Pass, Refusal
from ..nodes import escapes, is_pure, is_view
from ..program import Program


@dataclass(frozen=True)
class MergeCommon(Pass):
    """Merge calls of one operator on the same arguments, and weights that are one tensor in memory.

        a = aten.relu(x); b = aten.relu(x); return a + b   -->   a = aten.relu(x); return a + a

    Assumes pure operators. Two results that both leave the program stay two tensors, so that a caller who writes into
    one does not change the other. Gives up memory where a value now lives longer. Source: value numbering, Aho et
    al., Compilers (2nd ed.), section 6.1.
    """

    name: ClassVar[str] = "merge-common"

    def run(self, program: Program, ctx: Context) -> int | Refusal:
        """See the class."""
        first: dict[Any, fx.Node] = {}
        sites, refusal = 0, Refusal("no operator is called twice on the same arguments")
        for node in list(program.graph.nodes):
            key = _key(program, node)
            if key is None:
                continue
            kept = first.setdefault(key, node)
            if kept is node:
                continue
            if node.op == "call_function" and not is_view(node) and _leaves(kept) and _leaves(node):
                refusal = Refusal.at(node, f"{kept.name} and {node.name} are both results and must not share memory")
                continue
            node.replace_all_uses_with(kept)
            program.graph.erase_node(node)
            sites += 1
        return sites or refusal


def _leaves(node: fx.Node) -> bool:
    """Whether a caller gets the node's value or, of several values, one of them."""
    return escapes(node) or any(u.target is operator.getitem and _leaves(u) for u in node.users)


def _key(program: Program, node: fx.Node) -> Any:
    """What equal nodes have in common; None for a node that must stay."""
    if node.op == "get_attr":
        tensor = program.constant(node)
        if tensor is None or tensor.layout is not torch.strided or not tensor.data_ptr():
            return ("name", str(node.target))
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
            return ("name", str(node.target))
        look = tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.is_conj(), tensor.is_neg()
        return (tensor.data_ptr(), *look)
    if node.op == "call_function" and is_pure(node):
        return (node.target, _freeze(node.args), _freeze(node.kwargs))
    return None


def _freeze(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(_freeze(v) for v in value)
    if isinstance(value, dict):
        return tuple((k, _freeze(v)) for k, v in sorted(value.items()))
    if isinstance(value, slice):
        return ("slice", _freeze((value.start, value.stop, value.step)))
    # repr keeps 1, 1.0 and True apart, and 0.0 from -0.0
    return value if isinstance(value, fx.Node) else (type(value), repr(value))
