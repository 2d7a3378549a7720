"""Operators that only move elements: the same element, read at other coordinates or looked up in a table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from .values import COLUMN, FIXED, KINDS, Coordinate, Site, Unsupported, Value, is_one, shape

Rule = Callable[[Site], Value]
TURNS = ("permute", "transpose", "t")


def _move(change: Callable[[Site, list[Coordinate]], list[Coordinate]]) -> Rule:
    return lambda s: s.read(s.args["self"], tuple(change(s, list(s.coords))))


def _unsqueeze(s: Site, at: list[Coordinate]) -> list[Coordinate]:
    del at[s.args["dim"] % len(at)]
    return at


def _squeeze(s: Site, at: list[Coordinate]) -> list[Coordinate]:
    rank, dims = len(shape(s.args["self"])), s.args.get("dim", range(len(shape(s.args["self"]))))
    for d in sorted(d % rank for d in (dims if isinstance(dims, (list, tuple, range)) else [dims])):
        if shape(s.args["self"])[d] == 1:
            at.insert(d, None)
    return at


def turn_of(args: Mapping[str, Any], rank: int) -> list[int]:
    """Which dimension of its argument each dimension of a ``permute``, ``transpose`` or ``t`` is."""
    if "dims" in args:
        return [d % rank for d in args["dims"]]
    order = list(range(rank))
    if "dim0" not in args:  # ``t``
        return order[::-1]
    a, b = args["dim0"] % rank, args["dim1"] % rank
    order[a], order[b] = b, a
    return order


def _permute(s: Site, at: list[Coordinate]) -> list[Coordinate]:
    order = turn_of(s.args, len(at))
    return [at[order.index(d)] for d in range(len(at))]


def _slice(s: Site, at: list[Coordinate]) -> list[Coordinate]:
    if s.args["step"] != 1:
        raise Unsupported("a slice with a step")
    dim = s.args["dim"] % len(at)
    size, start, place = shape(s.args["self"])[dim], s.args["start"] or 0, at[dim]
    if not isinstance(start, int) or (start < 0 and not isinstance(size, int)):
        raise Unsupported("a slice of symbolic size")
    start = start + size if start < 0 else start
    start = max(0, min(start, size) if isinstance(size, int) else start)
    moved = (FIXED, start) if place is None else (place[0], place[1] + start)
    return [*at[:dim], moved, *at[dim + 1 :]]


def _select(s: Site, at: list[Coordinate]) -> list[Coordinate]:
    index, source = s.args["index"], shape(s.args["self"])
    dim = s.args["dim"] % len(source)
    if not isinstance(index, int) or (index < 0 and not isinstance(source[dim], int)):
        raise Unsupported("an index of symbolic size")
    return [*at[:dim], (FIXED, index + source[dim] if index < 0 else index), *at[dim:]]


def _expand(s: Site) -> Value:
    return s.of(s.args["self"], KINDS[s.args["self"].meta["val"].dtype])


def _cat(s: Site) -> Value:
    dim, rank = s.args["dim"] % len(s.coords), len(s.coords)
    first, parts = s.coords[dim] or (FIXED, 0), s.args["tensors"]
    if first[0] == FIXED:
        raise Unsupported("one element of a cat")
    bounds, start = list[int](), 0
    for part in parts:
        if len(shape(part)) != rank or not isinstance(start, int):
            raise Unsupported("cat of parts of other rank or symbolic size")
        bounds.append(start - first[1])
        start = start + shape(part)[dim]
    if first[0] == COLUMN and not isinstance(start, int):
        raise Unsupported("cat of columns of symbolic size")

    def read(k: int) -> Value:
        own = None if is_one(shape(parts[k])[dim]) and first[0] != COLUMN else (first[0], -bounds[k])
        return s.build.cast(s.read(parts[k], (*s.coords[:dim], own, *s.coords[dim + 1 :])), s.kind)

    if first[0] != COLUMN:
        return s.build.pick([read(k) for k in range(len(parts))], (first[0], 0), tuple(bounds))
    ends, width = [*bounds[1:], start - first[1]], s.build.space[-1]
    for k, (low, high) in enumerate(zip(bounds, ends, strict=True)):
        if isinstance(width, int) and low <= 0 and width <= high:  # half a head, say, that lies in one part
            return read(k)
    return s.build.cat([read(k) for k in range(len(parts))], tuple(bounds))


def _embedding(s: Site) -> Value:
    indices = s.args["indices"]
    index = s.read(indices, s.coords[: len(shape(indices))])
    return s.build.gather(s.args["weight"], 0, index, (None, *s.coords[len(shape(indices)) :]))


def _take(s: Site) -> Value:
    source, dim = s.args["input"], s.args["dim"]
    index = s.read(s.args["index"], (s.coords[0], s.coords[dim]))
    sample = None if is_one(shape(source)[0]) else s.coords[0]
    return s.build.gather(source, dim, index, (sample, *s.coords[1:]))


MOVES: dict[str, Rule] = {
    "unsqueeze": _move(_unsqueeze), "squeeze": _move(_squeeze), **dict.fromkeys(TURNS, _move(_permute)),
    "slice": _move(_slice), "select": _move(_select), "expand": _expand, "cat": _cat,
    "embedding": _embedding, "take": _take,
}  # fmt: skip
