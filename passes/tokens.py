"""What token passes share: where a program's attention sites are, which tokens must stay, what padding is."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from ..targets import cost
from .axis import Axes, Axis, Dim, Taken
from .axis_rules import by_element
from .base import Refusal
from .blocks import Branch, attention_branches, find_stream
from .nodes import arguments, descendants, expression, operator_name
from .program import Program
from .shorten import WHOLE, Stopped
from .values import Values

aten = torch.ops.aten


@dataclass(frozen=True)
class Site:
    """A self-attention along the stream.

    Attributes:
        branch: the residual branch that holds it.
        attention: the operator.
    """

    branch: Branch
    attention: fx.Node

    @property
    def at(self) -> fx.Node:
        """The stream after it, [batch, tokens, features]."""
        return self.branch.end

    @property
    def keys(self) -> fx.Node:
        """[batch, heads, tokens, features]."""
        found: fx.Node = arguments(self.attention)["key"]
        return found

    @property
    def mask(self) -> fx.Node | None:
        """Its mask, if it has one."""
        found: fx.Node | None = arguments(self.attention)["attn_mask"]
        return found


@dataclass
class Tokens:
    """The token axis of a program.

    Attributes:
        axes: of the program.
        axis: the tokens.
        sites: self-attentions over them, in order.
        protected: places of tokens that come from parameters (class, distillation, registers) or are read by their
            place, as `placed` names them.
        activations: nodes that descend from the first value of the stream, and that value.
        length: number of tokens that the first attention is over; where it is symbolic, that of the example.
    """

    axes: Axes
    axis: Dim
    sites: list[Site]
    protected: tuple[int, ...]
    activations: set[fx.Node]
    length: int


def find_tokens(program: Program, in_order: bool = False) -> Tokens | Refusal:
    """The token axis of a program, or why it has none that can be shortened.

    Args:
        in_order: whether the tokens that stay keep their order and what they stand for, so that masks which tell
            tokens apart by place (causal ones) can be taken along.
    """
    stream = find_stream(program)
    if stream is None:
        return Refusal("no residual stream leads to the first result")
    axes, axis, sites = program.axes(), None, []
    for branch in stream.branches:
        if branch.attention is None:
            continue
        found = _over_itself(axes, branch)
        if found is None:
            return Refusal.at(
                branch.attention, "attention is not over the tokens of the stream [batch, tokens, features]"
            )
        if axis is not None and found != axis:
            return Refusal.at(branch.attention, "attentions are over different tokens")
        axis = found
        sites.append(Site(branch, branch.attention))
    if axis is None:
        return Refusal("no attention on the residual stream")
    return _tokens_of(program, axes, axis, sites, stream.values[0], in_order)


def find_local_tokens(program: Program) -> list[Tokens] | Refusal:
    """Token axes of self-attentions that need not lie on one stream, each with its sites; why one has none.

    What is found serves edits inside a site's branch only.
    """
    axes, sites = program.axes(), dict[Dim, list[Site]]()
    for branch in attention_branches(program):
        axis = _over_itself(axes, branch)
        if axis is not None:
            assert branch.attention is not None
            sites.setdefault(axis, []).append(Site(branch, branch.attention))
    found = []
    for axis, own in sites.items():
        tokens = _tokens_of(program, axes, axis, own, own[0].branch.start, False)
        if isinstance(tokens, Refusal):
            return tokens
        found.append(tokens)
    return found or Refusal("no self-attention inside a residual branch [batch, tokens, features]")


def _over_itself(axes: Axes, branch: Branch) -> Dim | None:
    """The tokens of the stream, if a branch's attention is over them."""
    assert branch.attention is not None
    given = arguments(branch.attention)
    query, key, end = (axes.of(n) for n in (given["query"], given["key"], branch.end))
    if len(query) != 4 or len(end) != 3 or query[-2] != key[-2] or end[1] != query[-2] or not end[1]:
        return None
    return end[1]


def _tokens_of(
    program: Program, axes: Axes, axis: Dim, sites: list[Site], first: fx.Node, in_order: bool
) -> Tokens | Refusal:
    """What is known of an axis; `first` is the value from which its tokens descend."""
    values = Values(program)
    for site in sites:
        if not in_order and site.mask is not None and varies(values, site.mask, -2):
            return Refusal.at(site.attention, "its mask differs from query to query: tokens are told apart by place")
    after, length = descendants(first), sites[0].at.meta["val"].shape[1]
    places = [*protected(axes, axis), *_read_by_place(axes, axis, after, length)]
    return Tokens(axes, axis, sites, placed(places, length), after, cost.hint(length))


def _read_by_place(axes: Axes, axis: Dim, nodes: set[fx.Node], length: Any) -> list[int]:
    """Places that are read one by one, such as a class token that is part of the input, or that slices leave out."""
    found: list[int] = []
    for node in nodes:
        given = arguments(node)
        if node.target not in (aten.select.int, aten.slice.Tensor) or axes.of(given["self"])[given["dim"]] != axis:
            continue
        if node.target is aten.select.int:
            found += [given["index"]] if isinstance(given["index"], int) else []
        elif given["step"] == 1:
            found += _around_cut(given["start"] or 0, given["end"], length)
    return found


def _around_cut(start: Any, end: Any, length: Any) -> list[int]:
    """Places that tell a slice from the rest: those that it takes or those that it leaves out, if these are fewer."""
    if not isinstance(start, int) or not isinstance(end, (int, type(None))):
        return []
    if isinstance(length, int):
        inside = range(length)[start:end]
        outside = [p for p in range(length) if p not in inside]
        return outside if len(outside) < len(inside) else list(inside)
    last = 0 if end is None or end >= WHOLE else end
    if start < 0 or last > 0:
        return list(range(start, last))
    return [*range(start), *range(last, 0)]


def varies(values: Values, node: fx.Node, dim: int) -> bool:
    """Whether a tensor may differ along a dimension, counted from the end (negative). What is not known may."""
    value = node.meta["val"]
    if value.dim() < -dim or expression(value.shape[dim]) == 1:
        return False
    known = values.constant(node)
    if known is not None and known.shape == value.shape:
        return bool((known != known.narrow(dim, 0, 1)).any())
    name, given = operator_name(node), arguments(node)
    if name == "index":
        whole = len(given["indices"]) == given["self"].meta["val"].dim() and None not in given["indices"]
        return not whole or any(varies(values, n, dim) for n in given["indices"])
    if name == "expand" or by_element(node):
        return any(varies(values, n, dim) for n in node.all_input_nodes if isinstance(n.meta["val"], torch.Tensor))
    if name == "unsqueeze":
        at = given["dim"] % value.dim() - value.dim()
        return at != dim and varies(values, given["self"], dim + 1 if at > dim else dim)
    return True


def protected(axes: Axes, dim: Dim) -> list[int]:
    """Places of a token dimension whose tokens are parameters, as far as sizes before or behind them are known.

    Those behind tokens of unknown number are counted from the last one, below zero.
    """
    if len(dim) != 1:
        return []
    if dim[0] in axes.taken:
        return _protected_in_part(axes, axes.taken[dim[0]], dim[0].size)
    if dim[0] not in axes.joined:
        return []
    found, pieces = list[int](), list(axes.joined[dim[0]].pieces)
    for order, behind in ((pieces, False), (pieces[::-1], True)):
        offset = 0
        for node, piece in order:
            size = expression(node.meta["val"].shape[_place(axes, dim[0])])
            for p in _protected_in_piece(axes, node, axes.resolve(piece), size):
                if not behind and p >= 0:
                    found.append(p + offset)
                elif behind and (p < 0 or size.is_Integer):
                    found.append((p if p < 0 else p - int(size)) - offset)
            if not size.is_Integer:
                break
            offset += int(size)
        else:
            break  # all sizes are known: seen from behind, nothing is new
    return found


def _protected_in_part(axes: Axes, part: Taken, size: sympy.Expr) -> list[int]:
    start, source = expression(part.start), axes.resolve(part.source)
    behind = math.prod(a.size for a in source) - start - size
    if not start.is_Integer or start < 0 or part.step != 1:
        return []
    before = protected(axes, source)
    first = [p - int(start) for p in before if p >= start and (not size.is_Integer or p < start + size)]
    return first + [p + int(behind) for p in before if p < 0 and behind.is_Integer and p + behind < 0]


def _protected_in_piece(axes: Axes, node: fx.Node, own: Dim, size: sympy.Expr) -> Iterable[int]:
    if size.is_Integer and not depends_on_input(node):
        return range(int(size))
    if own:
        return protected(axes, own)
    return range(1 if "slice" in str(node.target) and _cuts_protected(axes, node) else 0)  # one has no axis of its own


def _cuts_protected(axes: Axes, node: fx.Node) -> bool:
    given = arguments(node)
    return (given["start"] or 0) in protected(axes, axes.of(given["self"])[given["dim"]])


def _place(axes: Axes, axis: Axis) -> int:
    node = axes.joined[axis].node
    return int(arguments(node)["dim"]) % len(axes.of(node))


def depends_on_input(node: fx.Node) -> bool:
    """Whether values of the program's inputs (not only their sizes) go into a node."""
    found, stack = {node}, [node]
    while stack:
        current = stack.pop()
        if current.op == "placeholder":
            return True
        for source in current.all_input_nodes:
            if source not in found and isinstance(source.meta.get("val"), torch.Tensor):
                found.add(source)
                stack.append(source)
    return False


def leading(places: Iterable[int]) -> int:
    """How many of the first places are among these, without a gap."""
    found = set(places)
    return next(k for k in itertools.count() if k not in found)


def trailing(places: Iterable[int]) -> int:
    """How many of the last places are among these, named from -1 on, without a gap."""
    return leading(-1 - p for p in places)


def middle(places: Sequence[int]) -> list[int]:
    """Those of some places, named as `placed` does, that are neither the first nor the last ones."""
    return [p for p in places if leading(places) <= p]


def placed(places: Iterable[int], length: Any) -> tuple[int, ...]:
    """Places by names that hold however many tokens go between them: from the first token those that are first without
    a gap, from the last one, below zero, those that are last; those in the middle as they are."""
    if not isinstance(length, int):
        return tuple(sorted(set(places), key=lambda p: (p < 0, p)))
    known = {p % length for p in places}
    front = leading(known)
    back = leading(length - 1 - p for p in known) if front < length else 0
    return (*range(front), *sorted(p for p in known if front <= p < length - back), *range(-back, 0))


def products(program: Program, attention: fx.Node, rows: tuple[int, int] | None, before: fx.Node) -> fx.Node:
    """[batch, heads, rows, tokens]: an attention's queries times its keys, neither scaled nor masked.

    Args:
        rows: first query and the one after the last, as in a slice; None takes all.
    """
    call, given = program.call, arguments(attention)
    query, key = given["query"], given["key"]
    heads, groups = query.meta["val"].shape[1], key.meta["val"].shape[1]
    if heads != groups:
        key = call(aten.repeat_interleave.self_int, key, heads // groups, 1, before=before)
    if rows is not None:
        query = call(aten.slice.Tensor, query, 2, *rows, before=before)
    return call(aten.matmul.default, query, call(aten.transpose.int, key, -2, -1, before=before), before=before)


def masked(program: Program, mask: fx.Node | None, scores: fx.Node, before: fx.Node) -> fx.Node:
    """Scores with an attention's mask applied: minus infinity where a boolean one is False, else their sum."""
    if mask is None:
        return scores
    if mask.meta["val"].dtype is torch.bool:
        return program.call(aten.where.ScalarOther, mask, scores, float("-inf"), before=before)
    return program.call(aten.add.Tensor, mask, scores, before=before)


def may_hide(program: Program, mask: fx.Node | None) -> bool:
    """Whether a mask may hide a token from another: unless it is a constant that lets everything pass."""
    known = None if mask is None else Values(program).constant(mask)
    return mask is not None and (known is None or not bool((known if known.dtype is torch.bool else known == 0).all()))


def valid_tokens(program: Program, site: Site, before: fx.Node) -> fx.Node | None:
    """[batch, tokens] bool: False for tokens that the site's mask hides from everybody; None where it hides none.

    Raises:
        Stopped: the mask is made after the place where this is asked for.
    """
    mask = site.mask
    if mask is None or not may_hide(program, mask):
        return None
    if not mask < before:
        raise Stopped(site.attention, "its mask is made after the place at which tokens are judged")
    value = mask.meta["val"]
    bias = mask if value.dtype is not torch.bool else program.call(
        aten._to_copy.default, mask, before=before, dtype=torch.float32)  # fmt: skip
    lead = list(range(1, value.dim() - 1))
    seen = program.call(aten.amax.default, bias, lead, before=before) if lead else bias
    least = 0.5 if value.dtype is torch.bool else torch.finfo(value.dtype).min / 2
    return program.call(aten.gt.Scalar, seen, least, before=before)
