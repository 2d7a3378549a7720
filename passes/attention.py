"""Finding attention: read softmax(scores) @ value, however it is written, into one normal form."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .base import Refusal
from .layout import relax_layout
from .nodes import arguments, erase_unused, same
from .operators import ADD, ATTENTION, CASTS, COPIES, DIV, DROPOUT, FILL, LIKE, MUL, PRODUCTS, SUB, VIEWS, WHERE
from .program import Program

aten = torch.ops.aten

POSITIONAL = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
MANY_KEYS = 16  # from which on torch's kernel keeps NaN without a mask: with fewer keys than vector lanes it gives 0
REACH = 64  # nodes that may stand between the product and the softmax


@dataclass(frozen=True)
class Product:
    """A product of two tensors, with one label for each dimension; a label that the result lacks is summed over."""

    node: fx.Node
    left: fx.Node
    right: fx.Node
    left_labels: tuple[Any, ...]
    right_labels: tuple[Any, ...]
    labels: tuple[Any, ...]


@dataclass(frozen=True)
class Step:
    """One thing done to the scores: `kind` is add, sub, mul, div, fill or view; `node` is where.

    `value` is the other operand (a node or a number); for fill it is what goes where `condition` equals `when`.
    """

    kind: str
    node: fx.Node
    value: Any = None
    condition: fx.Node | None = None
    when: bool = True


@dataclass(frozen=True)
class Site:
    """One attention: `scores` after `steps` (in order) go into `softmax`, whose value times `value` is `output.node`.

    `query_left` says which operand of `scores` is the query; `weights` are the probabilities as `output` reads them.
    """

    softmax: fx.Node
    scores: Product
    steps: tuple[Step, ...]
    weights: fx.Node
    output: Product
    query_left: bool


def shape(node: fx.Node) -> tuple[Any, ...]:
    """The sizes of a node's tensor."""
    return tuple(node.meta["val"].shape)


def product(node: Any) -> Product | None:
    """The node as a labelled product, None if it is none (or one of more than two tensors, or with a vector)."""
    if not isinstance(node, fx.Node) or node.target not in PRODUCTS:
        return None
    given = arguments(node)
    if node.target is aten.einsum.default:
        return _einsum(node, given["equation"], given["tensors"])
    if node.target in (aten.baddbmm.default, aten.addmm.default):
        left, right = list(node.args)[1:3]
    else:
        left, right = list(node.args)[:2]
    assert isinstance(left, fx.Node) and isinstance(right, fx.Node)
    ranks = len(shape(left)), len(shape(right))
    if min(ranks) < 2:
        return None
    batch = tuple(range(max(ranks) - 2))
    kept = [batch[len(batch) - (rank - 2) :] for rank in ranks]
    return Product(node, left, right, (*kept[0], "row", "sum"), (*kept[1], "sum", "column"), (*batch, "row", "column"))


def _einsum(node: fx.Node, equation: str, tensors: Sequence[fx.Node]) -> Product | None:
    if len(tensors) != 2 or "->" not in equation:
        return None
    terms, result = equation.replace(" ", "").split("->")
    widths = [len(shape(t)) - len(s.replace("...", "")) for t, s in zip(tensors, terms.split(","), strict=True)]
    dots = tuple(range(max(widths)))

    def labels(term: str, width: int) -> tuple[Any, ...]:
        head, found, tail = term.partition("...")
        return (*head, *(dots[len(dots) - width :] if found else ()), *tail)

    left, right = (labels(term, width) for term, width in zip(terms.split(","), widths, strict=True))
    wanted = labels(result, len(dots))
    if any(len(set(side)) != len(side) for side in (left, right, wanted)) or not set(wanted) <= {*left, *right}:
        return None
    return Product(node, tensors[0], tensors[1], left, right, wanted)


def find(softmax: fx.Node) -> Site | str:
    """The attention around a softmax, or the reason why it is none."""
    given = arguments(softmax)
    if given["dim"] not in (-1, len(shape(softmax)) - 1):
        return "the softmax does not run over the keys: its dimension is not the last one"
    source = next(iter(softmax.all_input_nodes))
    behind = _backward(source, {})
    if isinstance(behind, str):
        return behind
    scores, steps, query_left = behind
    ahead = _forward(softmax)
    if isinstance(ahead, str):
        return ahead
    return Site(softmax, scores, tuple(steps), ahead.left, ahead, query_left)


def _forward(softmax: fx.Node) -> Product | str:
    """From the probabilities to their product with the values."""
    node = softmax
    while True:
        if len(node.users) > 1 or any(user.op == "output" for user in node.users):
            return "the attention probabilities are also used elsewhere"
        user = next(iter(node.users), None)
        found = product(user)
        if user is None or (found is None and not _passes_on(user)):
            active = user is not None and user.target in DROPOUT | {aten.native_dropout.default}
            return "dropout is active on the probabilities" if active else "no matrix product follows the softmax"
        if found is None:
            node = user
            continue
        return _values(found, node) or found


def _values(found: Product, weights: fx.Node) -> str | None:
    """Why `found` is not the sum over the keys of `weights` (its left operand) times values, if it is not."""
    if found.node.target in (aten.baddbmm.default, aten.addmm.default):
        return "the product with the values also adds a tensor"
    if found.left is not weights or found.right is weights:
        return "the probabilities are the right operand of the product that follows the softmax"
    *batch, row, key = found.left_labels
    extra = [label for label in found.right_labels if label not in found.left_labels]
    if key in found.labels or key not in found.right_labels or row in found.right_labels or len(extra) != 1:
        return "the product that follows the softmax is not a weighted sum over the keys"
    if set(found.labels) != {*batch, row, extra[0]}:
        return "the product that follows the softmax sums over more than the keys"
    return None


def _passes_on(node: fx.Node) -> bool:
    """Whether the node only changes the batch dimensions, dtype or memory of scores, not a number in them."""
    if node.target in COPIES or (node.target in CASTS and node.meta["val"].is_floating_point()):
        return True
    if node.target in DROPOUT:
        given = arguments(node)
        return given["train"] is False or given["p"] == 0
    source = node.all_input_nodes[0] if node.all_input_nodes else None
    if node.target not in VIEWS or source is None:
        return False
    before, after = shape(source), shape(node)
    if node.target is aten.expand.default:
        return same(before, after)
    return len(before) >= 2 and len(after) >= 2 and same(before[-2:], after[-2:])


def _reads(user: fx.Node) -> bool:
    """Whether a user takes more than the shape: `full_like(scores)`, to fill the scores with, does not."""
    return user.target not in LIKE or len(user.users) > 1


Behind = tuple[Product, list[Step], bool]


def _backward(node: Any, seen: dict[fx.Node, Behind | str]) -> Behind | str:
    """From the softmax's input back to the product of query and key, with what was done to the scores on the way."""
    nothing = "no product of queries and keys leads to the softmax"
    if (
        not isinstance(node, fx.Node)
        or node.op != "call_function"
        or not isinstance(node.meta.get("val"), torch.Tensor)
    ):
        return nothing
    if node not in seen and len(seen) >= REACH:
        return nothing
    if node not in seen:
        seen[node] = nothing  # while the answer is being found
        found = _behind(node, seen)
        if not isinstance(found, str) and sum(_reads(user) for user in node.users) > 1:
            found = f"the scores are also used outside the attention: {node.name} has {len(node.users)} users"
        seen[node] = found
    return seen[node]


def _behind(node: fx.Node, seen: dict[fx.Node, Behind | str]) -> Behind | str:
    found = product(node)
    if found is not None:
        return _pairs(found)
    if _passes_on(node):
        behind = _backward(node.all_input_nodes[0], seen)
        if isinstance(behind, str) or node.target not in VIEWS:
            return behind
        return behind[0], [*behind[1], Step("view", node)], behind[2]
    reason = "no product of queries and keys leads to the softmax"
    for source, step in _readings(node):
        behind = _backward(source, seen)
        if isinstance(behind, str):
            reason = max(reason, behind, key=lambda text: not text.startswith("no product"))
        elif not same(shape(source), shape(node)):
            reason = f"{node.name} broadcasts the scores"
        else:
            return behind[0], [*behind[1], step], behind[2]
    return reason


def _readings(node: fx.Node) -> list[tuple[Any, Step]]:
    """The ways to read a node as something done to scores: (the scores, what was done)."""
    given, target = arguments(node), node.target
    if target in ADD | MUL:
        kind = "add" if target in ADD else "mul"
        if given.get("alpha", 1) != 1:
            return []
        return [(a, Step(kind, node, b)) for a, b in (node.args[:2], node.args[1::-1])]
    if target in SUB and given.get("alpha", 1) == 1:
        return [(node.args[0], Step("sub", node, node.args[1]))]
    if target in DIV:
        return [(node.args[0], Step("div", node, node.args[1]))]
    if target in FILL:
        return [(given["self"], Step("fill", node, given["value"], given["mask"]))]
    if target in WHERE:
        a, b, condition = given["self"], given["other"], given["condition"]
        return [(a, Step("fill", node, b, condition, when=False)), (b, Step("fill", node, a, condition))]
    return []


def _pairs(found: Product) -> Behind | str:
    """The product of each query with each key: what baddbmm adds and scales becomes steps."""
    if len(found.labels) < 2:
        return "the scores are no matrix"
    summed = [label for label in {*found.left_labels, *found.right_labels} if label not in found.labels]
    row, column = found.labels[-2:]
    query_left = row in found.left_labels and row not in found.right_labels
    query, key = (found.left_labels, found.right_labels)[:: 1 if query_left else -1]
    if len(summed) != 1 or summed[0] not in query or summed[0] not in key:
        return "the scores are not one sum over the features"
    if row not in query or row in key or column not in key or column in query:
        return "the scores are not a product of queries with keys"
    steps = list[Step]()
    if found.node.target in (aten.baddbmm.default, aten.addmm.default):
        given = arguments(found.node)
        steps = [Step("mul", found.node, given["alpha"])] if given["alpha"] != 1 else []
        if given["beta"] not in (0, 1):
            return "the tensor added to the scores is scaled"
        steps += [Step("add", found.node, given["self"])] if given["beta"] == 1 else []
    return found, steps, query_left


def strip_expand(node: fx.Node) -> fx.Node:
    """The tensor before it was expanded: masks broadcast by themselves."""
    while node.target is aten.expand.default:
        node = node.all_input_nodes[0]
    return node


def turned_back(node: fx.Node, labels: tuple[Any, ...]) -> tuple[Any, ...]:
    """Labels of the input of a transpose or permute whose result has `labels`."""
    given, rank = arguments(node), len(labels)
    order = list(range(rank))
    if node.target is aten.permute.default:
        order = [d % rank for d in given["dims"]]
    else:
        a, b = (given["dim0"] % rank, given["dim1"] % rank) if node.target is aten.transpose.int else (-2, -1)
        order[a], order[b] = order[b], order[a]
    return tuple(labels[order.index(position)] for position in range(rank))


def repeated_heads(node: fx.Node) -> fx.Node | None:
    """[batch, heads, length, features] before each head was repeated n times in place, if it was."""
    if node.target is aten.repeat_interleave.self_int:
        given = arguments(node)
        return node.all_input_nodes[0] if given["dim"] in (1, -3) and len(shape(node)) == 4 else None
    if node.target not in VIEWS or len(shape(node)) != 4:
        return None
    inner = node.all_input_nodes[0]
    while inner.target in COPIES:
        inner = inner.all_input_nodes[0]
    if inner.target is not aten.expand.default or inner.all_input_nodes[0].target is not aten.unsqueeze.default:
        return None
    before = inner.all_input_nodes[0].all_input_nodes[0]
    if len(shape(before)) != 4 or inner.all_input_nodes[0].args[1] not in (2, -3):
        return None
    batch, heads, length, features = shape(before)
    group = shape(inner)[2]
    wanted = (batch, heads * group, length, features)
    return before if same(shape(node), wanted) and same(shape(inner), (batch, heads, group, length, features)) else None


def simplify(program: Program, change: Callable[[fx.Node], dict[str, Any]], reason: str) -> int | Refusal:
    """Call every attention operator with the arguments that `change` gives for it; how many had some.

    Args:
        reason: why there was nothing to change.
    """
    nodes, sites = [n for n in program.graph.nodes if n.target is ATTENTION], 0
    for node in nodes:
        if changes := change(node):
            before, given = node.all_input_nodes, arguments(node) | changes
            node.args, node.kwargs = tuple(given.pop(name) for name in POSITIONAL), given
            program.infer(node)
            for operand in before:
                erase_unused(operand)
            relax_layout(program, list(node.users))
            sites += 1
    return sites or (Refusal.at(nodes[0], reason) if nodes else Refusal("no attention operator in the program"))
