"""The pointwise operators after a product or a convolution, as a row program that reads the accumulators."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..base import Region, in_memory
from .layout import Access, access_of
from .rows import Output, equal_shapes, output_access, reach, reason_against, result_of
from .rules import name_of, read
from .values import (
    COLUMN,
    KINDS,
    Builder,
    Coordinate,
    Extent,
    Site,
    Unsupported,
    Value,
    bound,
    broadcast,
    in_order,
    shape,
)


@dataclass
class Tail:
    """What is computed from each element of the result before it is written.

    Attributes:
        tensors: fake tensors of the parameters: inputs, placeholders for constants, outputs.
        outputs: results of the row program.
        loads: accesses of the row program.
        results: the values in the row program that stand for accumulated sums, by the first column of the part of the
            product that they belong to; one, at column 0, unless several parts are put together.
    """

    tensors: list[torch.Tensor]
    outputs: list[Output]
    loads: dict[Value, Access]
    results: dict[int, Value]

    @property
    def result(self) -> Value:
        """The accumulated sum, if there is one."""
        (value,) = self.results.values()
        return value


def column_parts(region: Region, root: fx.Node) -> tuple[int, ...]:
    """First columns of the equally wide parts of a product that are put together, such as a gate and what it lets pass.

    The region reads the product by slices of its columns only; (0,) if it reads the product itself. Raises Unsupported.
    """
    width = shape(region.outputs[0])[-1:]
    if root in region.outputs or equal_shapes(width, shape(root)[-1:]):
        return (0,)
    starts = set[int]()
    for user in root.users:
        starts.add(first_column(root, user))
        if not equal_shapes(shape(user)[-1:], width):
            raise Unsupported("the product is read by parts that are not equally wide")
    return tuple(sorted(starts))


def first_column(root: fx.Node, part: fx.Node) -> int:
    """Where a slice of a product's columns begins. Raises Unsupported for anything else."""
    given, columns = bound(part) if name_of(part) == "slice" else {}, shape(root)[-1]
    along = given and given["dim"] % len(shape(root)) == len(shape(root)) - 1 and given["step"] == 1
    start = given["start"] or 0 if along else None
    if not isinstance(start, int) or (start < 0 and not isinstance(columns, int)):
        raise Unsupported("the product is read otherwise than by slices of its columns")
    return max(0, start + columns) if start < 0 else start


def shape_of_parts(region: Region, root: fx.Node, parts: Sequence[int]) -> tuple[Extent, ...]:
    """Shape of a product, or of one of its parts where several are put together."""
    return shape(root) if len(parts) == 1 else (*shape(root)[:-1], shape(region.outputs[0])[-1])


def plan_tail(region: Region, root: fx.Node, addend: fx.Node | None, constants: int,
              order: tuple[int, ...] | None = None, inner: Collection[fx.Node] = (),
              scale: fx.Node | None = None, device: str = "cpu", parts: Sequence[int] = (0,)) -> Tail:  # fmt: skip
    """The tail of a region whose other nodes all come after `root`. Raises Unsupported with the reason.

    Args:
        addend: what is added to the result first (a bias), broadcast to its last dimension in memory.
        constants: number of constants among the parameters.
        order: dimensions of the result from the outermost to the innermost in memory; the last one is the columns.
        inner: nodes of the region that come before `root`.
        scale: what the result is multiplied with first, one number per column.
        device: kind of device that the kernel runs on.
        parts: first columns of the parts of the result that are put together; the space has the columns of one.
    """
    rest = [n for n in region.nodes if n is not root and n not in inner]
    for node in rest:
        if (reason := reason_against(node)) is not None:
            raise Unsupported(reason)
    sizes = shape_of_parts(region, root, parts)
    space = in_order(sizes, order)
    build, memo = Builder(region, space, device, order), dict[Any, Value]()
    at = build.identity()
    tensors = [*(n.meta["val"] for n in region.inputs), *(torch.empty(0) for _ in range(constants))]
    results = {start: build.product(KINDS.get(root.meta["val"].dtype, "float32"), start) for start in parts}
    for start, summed in results.items():
        where = (*at[:-1], (COLUMN, start)) if len(parts) > 1 else at
        if scale is not None:
            summed = build.op("mul", summed, _addend(build, root, scale, where, memo, order))
        if addend is not None:
            summed = build.op("add", summed, _addend(build, root, addend, where, memo, order))
        memo[root, where] = build.rounded(summed, root.meta["val"].dtype)
    outputs = []
    for k, node in enumerate(region.outputs):
        if not equal_shapes(shape(node), sizes):
            raise Unsupported(f"the output {node.name} has another shape than the product")
        value = read(build, set(rest), memo, node, at)
        outputs.append(Output(value, False, output_access(len(tensors) + k, space, False)))
    reached = reach([o.value for o in outputs])
    if any(result not in reached for result in results.values()) or any(
        v.op in ("reduce", "cat", "pick", "gather") for v in reached
    ):
        raise Unsupported("the nodes after the product are not pointwise")
    tensors += [result_of(n) if order is None else in_memory(n.meta["val"], order) for n in region.outputs]
    loads = {v: access_of(v, tensors, len(space)) for v in reached if v.op == "load"}
    return Tail(tensors, outputs, loads, results)


def replaceable(tail: Tail, busy: Collection[int]) -> tuple[tuple[int, int], ...]:
    """Inputs in whose place the output may be written: each element is read once, to compute the one in its place.

    Args:
        busy: parameters that are read otherwise.
    """
    if len(tail.outputs) != 1 or len(tail.results) != 1:
        return ()
    (output,) = tail.outputs
    made = tail.tensors[output.access.buffer]
    for access in tail.loads.values():
        readers = sum(other.buffer == access.buffer for other in tail.loads.values())
        same = access.strides == output.access.strides and access.shift == output.access.shift
        if same and readers == 1 and access.buffer not in busy and tail.tensors[access.buffer].dtype is made.dtype:
            return ((access.buffer, 0),)
    return ()


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
