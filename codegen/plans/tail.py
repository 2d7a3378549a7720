"""The pointwise operators after a product or a convolution, as a row program that reads the accumulators."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..base import Region, in_memory
from .layout import Access, access_of
from .rows import Output, equal_shapes, output_access, reach, reason_against, result_of
from .rules import read
from .values import KINDS, Builder, Coordinate, Extent, Site, Unsupported, Value, broadcast, shape


@dataclass
class Tail:
    """What is computed from each element of the result before it is written.

    Attributes:
        tensors: fake tensors of the parameters: inputs, placeholders for constants, outputs.
        outputs: results of the row program.
        loads: accesses of the row program.
        result: the value in the row program that stands for the accumulated sum.
    """

    tensors: list[torch.Tensor]
    outputs: list[Output]
    loads: dict[Value, Access]
    result: Value


def plan_tail(region: Region, root: fx.Node, addend: fx.Node | None, constants: int,
              order: tuple[int, ...] | None = None, inner: Collection[fx.Node] = (),
              scale: fx.Node | None = None, device: str = "cpu") -> Tail:  # fmt: skip
    """The tail of a region whose other nodes all come after `root`. Raises Unsupported with the reason.

    Args:
        addend: what is added to the result first (a bias), broadcast to its last dimension in memory.
        constants: number of constants among the parameters.
        order: dimensions of the result from the outermost to the innermost in memory; the last one is the columns.
        inner: nodes of the region that come before `root`.
        scale: what the result is multiplied with first, one number per column.
        device: kind of device that the kernel runs on.
    """
    rest = [n for n in region.nodes if n is not root and n not in inner]
    for node in rest:
        if (reason := reason_against(node)) is not None:
            raise Unsupported(reason)
    sizes = shape(root)
    space = sizes if order is None else tuple(sizes[d] for d in order)
    build, memo = Builder(region, space, device), dict[Any, Value]()
    at = coordinates(build, order)
    tensors = [*(n.meta["val"] for n in region.inputs), *(torch.empty(0) for _ in range(constants))]
    result = summed = build.product(KINDS.get(root.meta["val"].dtype, "float32"))
    if scale is not None:
        summed = build.op("mul", summed, _addend(build, root, scale, at, memo, order))
    if addend is not None:
        summed = build.op("add", summed, _addend(build, root, addend, at, memo, order))
    memo[root, at] = build.rounded(summed, root.meta["val"].dtype)
    outputs = []
    for k, node in enumerate(region.outputs):
        if not equal_shapes(shape(node), sizes):
            raise Unsupported(f"the output {node.name} has another shape than the product")
        value = read(build, set(rest), memo, node, at)
        outputs.append(Output(value, False, output_access(len(tensors) + k, space, False)))
    reached = reach([o.value for o in outputs])
    if result not in reached or any(v.op in ("reduce", "cat", "pick", "gather") for v in reached):
        raise Unsupported("the nodes after the product are not pointwise")
    tensors += [result_of(n) if order is None else in_memory(n.meta["val"], order) for n in region.outputs]
    loads = {v: access_of(v, tensors, len(space)) for v in reached if v.op == "load"}
    return Tail(tensors, outputs, loads, result)


def coordinates(build: Builder, order: tuple[int, ...] | None) -> tuple[Coordinate, ...]:
    """The coordinates of the space itself, for a tensor whose dimensions are in this order in the space."""
    own = build.identity()
    return own if order is None else tuple(own[order.index(d)] for d in range(len(order)))


def _addend(build: Builder, root: fx.Node, addend: fx.Node, at: tuple[Coordinate, ...], memo: dict[Any, Value],
            order: tuple[int, ...] | None) -> Value:  # fmt: skip
    if KINDS.get(addend.meta["val"].dtype) != "float32":
        raise Unsupported("an addend that is not floating point")
    sizes: tuple[Extent, ...] = shape(addend)
    where = at if order is None else (at[order[-1]],)  # a bias of a convolution has one dimension: its channels
    to = shape(root) if order is None else sizes
    site = Site(build, root, where, {}, lambda n, c: read(build, set(), memo, n, c))
    value: Value = site.read(addend, broadcast(where, to, sizes))
    return value
