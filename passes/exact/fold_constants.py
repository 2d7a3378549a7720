"""fold_constants: evaluate what depends on weights alone, and drop calls that return their input."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx
from torch.utils import _pytree as pytree

from ..base import Context, Pass, Refusal
from ..nodes import MAY_COPY, ancestors, escapes, is_pure, is_view, same
from ..program import Program
from ..rewrite import replace
from ..values import evaluated

aten = torch.ops.aten

SMALL = 1 << 20  # bytes that a folded value may always have, however little it was computed from
GROWTH = 8  # a larger value may have this many times the bytes of the weights it was computed from
COPIES = (aten.clone.default, aten.contiguous.default, aten._to_copy.default, aten.to.dtype, aten.to.device)
# Operators that keep all elements in row-major order, so that only the final shape counts.
REORDERLESS = (aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.unsqueeze.default,
               aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.flatten.using_ints)  # fmt: skip
PERMUTES = (aten.permute.default, aten.transpose.int, aten.t.default)


@dataclass(frozen=True)
class FoldConstants(Pass):
    """Evaluate calls that depend on no input into new weights, and drop calls that return exactly their input.

        m = aten.mul.Tensor(weight, 2.0); y = aten.mul.Tensor(aten.view(x, x.shape), m) --> y = aten.mul.Tensor(x, m')

    Dropped are x * 1, x / 1, x - 0, x + -0.0 (x + 0.0 stays: it turns -0.0 into 0.0; integers have no -0), reshapes to
    the same shape, permutations that cancel, copies without effect, slices of everything and cat of one tensor.
    Assumes that weights do not change between calls (carried state is left alone). Gives up memory: a folded value may
    have up to `limit` bytes and 8 times those of the weights behind it (1 MiB always). Views of weights cost nothing
    and stay.
    Source: constant folding, Aho et al., Compilers (2nd ed.), section 8.5.
    """

    name: ClassVar[str] = "fold-constants"
    limit: int = 1 << 26  # bytes

    def run(self, program: Program, ctx: Context) -> int | Refusal:
        """See the class."""

        def keep(size: int, behind: int, calls: int) -> bool:
            return size <= self.limit and size <= max(SMALL, GROWTH * behind)

        sites, refusal = fold(program, keep)
        for node in list(program.graph.nodes):
            source = unchanged(program, node) if node.op == "call_function" and node.users else None
            if source is not None:
                replace(node, source)
                sites += 1
        return sites or refusal or Refusal("nothing depends on weights alone, and every call changes its input")


def fold(program: Program, keep: Callable[[int, int, int], bool]) -> tuple[int, Refusal | None]:
    """Replace maximal sub-graphs without inputs by weights, where `keep` allows it.

    Args:
        keep: (bytes of the value, bytes of the weights behind it, calls behind it) -> whether to hold the value.

    Returns:
        The number of values folded, and the first refusal.
    """
    constant = _constants(program)
    stays: set[fx.Node] = set()
    folded: list[fx.Node] = []
    refusal: Refusal | None = None
    for node in reversed(list(program.graph.nodes)):
        if node not in constant:
            stays.add(node)
        elif node.op == "call_function" and any(user in stays for user in node.users):
            reason = _obstacle(node, constant, keep)
            if reason is None:
                folded.append(node)
                continue
            stays.add(node)
            refusal = refusal or (Refusal.at(node, reason) if reason else None)
    values = evaluated(program, folded)
    for node in reversed(folded):
        replace(node, program.weight(node.name, values[node]))
    return len(folded), refusal


def _constants(program: Program) -> set[fx.Node]:
    found: set[fx.Node] = set()
    for node in program.graph.nodes:
        if node.op == "get_attr" and program.constant(node) is not None:
            found.add(node)
        elif node.op == "call_function" and is_pure(node) and all(i in found for i in node.all_input_nodes):
            leaves = pytree.tree_leaves(node.meta.get("val"))
            if leaves and all(isinstance(v, torch.Tensor) and _static(v) and v.device.type != "meta" for v in leaves):
                found.add(node)
    return found


def _obstacle(node: fx.Node, constant: set[fx.Node], keep: Callable[[int, int, int], bool]) -> str | None:
    """None if the node's value is to become a weight; why not; empty if there is nothing to gain."""
    value = node.meta["val"]
    if is_view(node) or not isinstance(value, torch.Tensor):
        return ""
    if escapes(node):
        return "a caller could write into the result, so it is computed anew"
    behind = ancestors(node)
    weights = sum(_bytes(n.meta["val"]) for n in behind if n.op == "get_attr")
    if keep(_bytes(value), weights, sum(n.op == "call_function" and not is_view(n) for n in behind)):
        return None
    return f"its {_bytes(value)} bytes are too many for what it costs to compute"


def unchanged(program: Program, node: fx.Node) -> fx.Node | None:
    """The earlier value that a call returns bit by bit, if it does."""
    source = _neutral(program, node)
    chain = [node]
    for family, cancels in ((REORDERLESS, _same_layout), (PERMUTES, _cancels)):
        step: Any = node
        walked = []
        while isinstance(step, fx.Node) and step.target in family:
            walked.append(step)
            step = step.args[0]
            if isinstance(step, fx.Node) and cancels(step, walked):
                source, chain = step, list(walked)
    if source is None or not _same_layout(source, chain):
        return None
    # What a caller gets must not become the memory of an input, a weight or another result.
    fresh = source.op == "call_function" and not is_view(source) and source.target not in MAY_COPY
    if all(is_view(n) for n in chain) or not escapes(node) or (fresh and set(source.users) == {chain[-1]}):
        return source
    return None


def _same_layout(source: fx.Node, chain: list[fx.Node]) -> bool:
    a, b = source.meta.get("val"), chain[0].meta.get("val")
    if not (isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)) or (a.dtype, a.device) != (b.dtype, b.device):
        return False
    return same(a.shape, b.shape) and same(a.stride(), b.stride())


def _cancels(source: fx.Node, chain: list[fx.Node]) -> bool:
    rank = source.meta["val"].dim()
    order = list(range(rank))
    for node in reversed(chain):
        args: Any = node.args[1:]
        if node.target is aten.permute.default:
            order = [order[d] for d in args[0]]
        elif rank > 1:
            a, b = args or (0, 1)
            order[a], order[b] = order[b], order[a]
    return order == list(range(rank))


def _neutral(program: Program, node: fx.Node) -> fx.Node | None:
    """The operand that the operator by itself passes on."""
    args: Any = node.args
    if node.target is aten.cat.default and len(args[0]) == 1:
        return args[0][0]  # type: ignore[no-any-return]
    if node.target in COPIES or node.target in (aten.expand.default, aten.slice.Tensor):
        return args[0]  # type: ignore[no-any-return]
    if node.target not in (aten.mul.Tensor, aten.div.Tensor, aten.add.Tensor, aten.sub.Tensor) or node.kwargs:
        return None
    commutes = node.target in (aten.mul.Tensor, aten.add.Tensor)
    for kept, other in [(args[0], args[1]), (args[1], args[0])] if commutes else [(args[0], args[1])]:
        number = _number(program, other)
        if number is None or not isinstance(kept, fx.Node):
            continue
        if node.target in (aten.mul.Tensor, aten.div.Tensor):
            neutral = number == 1
        else:
            integer = not (node.meta["val"].is_floating_point() or node.meta["val"].is_complex())
            negative = math.copysign(1, number) < 0
            neutral = number == 0 and (integer or negative == (node.target is aten.add.Tensor))
        if neutral:
            return kept
    return None


def _number(program: Program, value: Any) -> float | None:
    """The number that an operand is everywhere."""
    if isinstance(value, (int, float)):
        return float(value)
    tensor = program.constant(value)
    if tensor is None or tensor.numel() == 0 or tensor.is_complex() or tensor.layout is not torch.strided:
        return None
    if tensor.is_floating_point() and tensor.element_size() == 1:
        return None  # no arithmetic is defined on 8-bit floats
    first = tensor.flatten()[0]
    same = bool((tensor == first).all()) and bool((tensor.signbit() == first.signbit()).all())
    return float(first) if same else None


def _static(value: torch.Tensor) -> bool:
    return all(isinstance(s, int) for s in (*value.shape, *value.stride()))


def _bytes(value: Any) -> int:
    return sum(v.numel() * v.element_size() for v in pytree.tree_leaves(value) if isinstance(v, torch.Tensor))
