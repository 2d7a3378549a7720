"""Products of flattened rows as linear layers of the tensor as it is, which is how most models spell them."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from .attention import turned_back
from .nodes import RESHAPES, arguments, erase_unused, expression, operator_name
from .operators import TURNS
from .program import Program

aten = torch.ops.aten


def unflatten(program: Program) -> int:
    """Rewrite every such product; returns how many there were.

        y = view(addmm(bias, view(x, [b * t, k]), weight), [b, t, n])  -->  y = linear(x, weight.t(), bias)

    Libraries that keep a weight as [inputs, outputs] write this, and so do programs that torch has taken apart into its
    core operators. The views would stand between the product and what follows it. Rows of a matrix stay as they are.
    """
    found, turned = 0, dict[fx.Node, fx.Node]()
    for node in list(program.graph.nodes):
        if node.target in (aten.addmm.default, aten.mm.default, aten.matmul.default):
            found += _unflattened(program, node, turned)
    return found


def _unflattened(program: Program, node: fx.Node, turned: dict[fx.Node, fx.Node]) -> bool:
    given = arguments(node)
    plain = given.get("alpha", 1) == 1 and given.get("beta", 1) == 1
    operands: Any = (given["mat1"], given["mat2"], given["self"]) if "mat1" in given else (*node.args[:2], None)
    rows, weight, bias = operands
    if not plain or operator_name(rows) not in RESHAPES or (bias is not None and bias.meta["val"].dim() != 1):
        return False
    if rows.meta["val"].dim() != 2 or weight.meta["val"].dim() != 2:  # a batch of products
        return False
    x, width = rows.args[0], node.meta["val"].shape[-1]
    lead = list(map(expression, x.meta["val"].shape[:-1]))
    if len(lead) < 2 or expression(x.meta["val"].shape[-1]) != expression(rows.meta["val"].shape[-1]):
        return False
    if bias is not None and expression(bias.meta["val"].shape[0]) != expression(width):
        return False
    seen = [*lead, expression(width)]
    users = list(node.users)
    if not users or any(operator_name(u) not in RESHAPES or list(map(expression, u.meta["val"].shape)) != seen
                        for u in users):  # fmt: skip
        return False
    across = turned.get(weight) or _transposed(program, weight)
    if across is None:
        return False
    turned[weight] = across
    linear = program.call(aten.linear.default, x, across, bias, before=node, like=node)
    made, wanted = linear.meta["val"], users[0].meta["val"]
    if made.stride() != wanted.stride() or made.dtype != wanted.dtype:
        program.graph.erase_node(linear)
        return False
    for user in users:
        user.replace_all_uses_with(linear)
    for user in users:
        erase_unused(user)
    return True


def _transposed(program: Program, weight: fx.Node) -> fx.Node | None:
    """A matrix the other way round: what it is a transposition of, or a view of a constant weight.

    None for one that is computed or an input: as an operand like any other, it is better left in place.
    """
    if weight.target in TURNS and turned_back(weight, (0, 1)) == (1, 0):
        return weight.all_input_nodes[0]
    value = program.constant(weight)
    return None if value is None else program.weight(f"{weight.target}_t", value.t())
