"""Questions about a single node, and erasing those that nobody needs."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any

import sympy
import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

aten = torch.ops.aten

# operators that return views although their schema does not say so
SHARING = frozenset(("_unsafe_view", "unsafe_split", "unsafe_split_with_sizes", "unsafe_chunk", "lift", "lift_fresh"))
RESHAPES = frozenset(("view", "reshape", "_unsafe_view"))
# operators that torch composes of others, and whose results are always new
COMPUTING = frozenset(
    """linear matmul conv1d conv2d conv3d scaled_dot_product_attention layer_norm group_norm rms_norm softmax
    log_softmax""".split()
)

MAY_COPY = (aten.reshape.default, aten.contiguous.default, aten.flatten.using_ints, aten.to.dtype, aten.to.device,
            aten.einsum.default)  # fmt: skip  # an einsum of one operand may be a view of it


def arguments(node: fx.Node) -> dict[str, Any]:
    """A call's arguments by their schema names, defaults filled in (positions as names without a schema)."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return {str(i): a for i, a in enumerate(node.args)} | dict(node.kwargs)
    schema = node.target._schema.arguments
    found = dict(zip((a.name for a in schema), node.args, strict=False)) | dict(node.kwargs)
    return {a.name: found.get(a.name, a.default_value) for a in schema}


def expression(size: Any) -> sympy.Expr:
    """A size or stride as a sympy expression; adds no guard."""
    if isinstance(size, sympy.Basic):
        return size
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)


def operator_name(node: fx.Node) -> str:
    """The operator's name without namespace and overload, such as ``add``; "" for what is no torch operator."""
    return node.target._schema.name.split("::")[1] if isinstance(node.target, torch._ops.OpOverload) else ""


def erase_unused(node: fx.Node) -> None:
    """Erase a pure node without users, and then its inputs likewise."""
    waiting = [node]
    while waiting:
        node = waiting.pop()
        if not node._erased and not node.users and node.op == "call_function" and is_pure(node):
            waiting += node.all_input_nodes
            node.graph.erase_node(node)


def erase_dead(graph: fx.Graph) -> None:
    """Erase all pure calls that nothing reads."""
    for node in reversed(list(graph.nodes)):
        erase_unused(node)


def is_pure(node: fx.Node) -> bool:
    """Whether the node can be dropped, repeated or evaluated early: no side effect and no randomness."""
    op = node.target
    if not isinstance(op, torch._ops.OpOverload):
        return getattr(op, "__module__", "") in ("_operator", "math")
    random = torch.Tag.nondeterministic_seeded in op.tags and arguments(node).get("dropout_p") != 0
    return not (random or op._schema.is_mutable or "assert" in str(op))


def may_share(node: fx.Node) -> bool:
    """Whether the value of an operator may share memory with an argument: views, and what may return its argument."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return True
    if operator_name(node) in SHARING:
        return True
    annotated = any(a.alias_info is not None for a in (*target._schema.arguments, *target._schema.returns))
    composed = torch._C._dispatch_has_kernel_for_dispatch_key(target.name(), "CompositeImplicitAutograd")
    return annotated or (composed and operator_name(node) not in COMPUTING)


def is_view(node: fx.Node) -> bool:
    """Whether the node's value surely shares the memory of its input and costs nothing."""
    if node.target is operator.getitem:
        return isinstance(node.args[0], fx.Node) and is_view(node.args[0])
    return isinstance(node.target, torch._ops.OpOverload) and node.target.is_view and node.target not in MAY_COPY


def escapes(node: fx.Node) -> bool:
    """Whether a caller gets hold of the memory of the node's value, directly or through views."""
    return any(u.op == "output" or ((is_view(u) or u.target in MAY_COPY) and escapes(u)) for u in node.users)


def same(a: Any, b: Any) -> bool:
    """Whether two sizes, or two shapes, are equal for every input."""
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(statically_known_true(a == b))


def ancestors(node: fx.Node) -> set[fx.Node]:
    """The node and all that its value is computed from."""
    return _reached(node, lambda n: n.all_input_nodes)


def descendants(node: fx.Node) -> set[fx.Node]:
    """The node and all that is computed from its value."""
    return _reached(node, lambda n: n.users)


def _reached(node: fx.Node, step: Callable[[fx.Node], Iterable[fx.Node]]) -> set[fx.Node]:
    found, waiting = {node}, [node]
    while waiting:
        new = [n for n in step(waiting.pop()) if n not in found]
        found.update(new)
        waiting += new
    return found
