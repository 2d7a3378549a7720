"""What token passes share: where a program's attention sites are, which tokens must stay, what padding is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from ..targets import cost
from .axis import Axes, Dim
from .axis_rules import by_element
from .base import Refusal
from .blocks import Branch, find_stream
from .nodes import arguments, expression, operator_name
from .program import Program
from .shorten import Stopped
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
        protected: places of tokens that come from parameters (class, distillation, registers).
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
        given = arguments(branch.attention)
        query, key, end = (axes.of(n) for n in (given["query"], given["key"], branch.end))
        if len(query) != 4 or len(end) != 3 or query[-2] != key[-2] or end[1] != query[-2] or not end[1]:
            return Refusal.at(
                branch.attention, "attention is not over the tokens of the stream [batch, tokens, features]"
            )
        if axis is not None and end[1] != axis:
            return Refusal.at(branch.attention, "attentions are over different tokens")
        axis = end[1]
        sites.append(Site(branch, branch.attention))
    if axis is None:
        return Refusal("no attention on the residual stream")
    values = Values(program)
    for site in sites:
        if not in_order and site.mask is not None and varies(values, site.mask, -2):
            return Refusal.at(site.attention, "its mask differs from query to query: tokens are told apart by place")
    after = _descendants(stream.values[0])
    places = sorted({*protected(axes, axis), *_selected(axes, axis, after)})
    return Tokens(axes, axis, sites, tuple(places), after, cost.hint(sites[0].at.meta["val"].shape[1]))


def _selected(axes: Axes, axis: Dim, nodes: set[fx.Node]) -> list[int]:
    """Places that are read one by one, such as a class token that is part of the input."""
    found = []
    for node in nodes:
        if node.target is aten.select.int:
            given = arguments(node)
            if axes.of(given["self"])[given["dim"]] == axis and isinstance(given["index"], int) and given["index"] >= 0:
                found.append(given["index"])
    return found


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


def _descendants(node: fx.Node) -> set[fx.Node]:
    found, stack = {node}, [node]
    while stack:
        new = [u for u in stack.pop().users if u not in found]
        found.update(new)
        stack += new
    return found


def protected(axes: Axes, dim: Dim) -> list[int]:
    """Places of a token dimension whose tokens are parameters, as far as sizes before them are known."""
    if len(dim) != 1:
        return []
    if dim[0] in axes.taken:
        part, size = axes.taken[dim[0]], dim[0].size
        start = expression(part.start)
        if not start.is_Integer or part.step != 1:
            return []
        before = protected(axes, axes.resolve(part.source))
        return [p - int(start) for p in before if p >= start and (not size.is_Integer or p < start + size)]
    if dim[0] not in axes.joined:
        return []
    found, offset = list[int](), 0
    for node, piece in axes.joined[dim[0]].pieces:
        own, size = axes.resolve(piece), expression(node.meta["val"].shape[_place(axes, dim[0])])
        whole = not depends_on_input(node)
        if whole and size.is_Integer:
            found += range(offset, offset + int(size))
        elif own:
            found += [offset + p for p in protected(axes, own)]
        elif "slice" in str(node.target):  # of one element, which has no axis of its own
            found += [offset] * _cuts_protected(axes, node)
        if not size.is_Integer:
            break
        offset += int(size)
    return found


def _cuts_protected(axes: Axes, node: fx.Node) -> bool:
    given = arguments(node)
    return (given["start"] or 0) in protected(axes, axes.of(given["self"])[given["dim"]])


def _place(axes: Axes, axis: object) -> int:
    node = axes.joined[axis].node  # type: ignore[index]
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


def leading(places: Sequence[int]) -> int:
    """How many of the first places are among these, without a gap."""
    return next((k for k, p in enumerate(sorted(places)) if p != k), len(places))


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


def valid_tokens(program: Program, site: Site, before: fx.Node) -> fx.Node | None:
    """[batch, tokens] bool: False for tokens that the site's mask hides from everybody; None without such a mask.

    Raises:
        Stopped: the mask is made after the place where this is asked for.
    """
    mask = site.mask
    if mask is None:
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
