"""Rules for operators that only arrange: views, permutations, slices, concatenation, look-ups."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sympy
from torch import fx

from .axis import ONE, Axis, Dim, Joined, Site, Taken, Unknown, ratio
from .nodes import expression

Rule = Callable[[Site], Any]


def view(s: Site) -> list[Dim]:
    """Flattened axes are dealt out again; an axis that is larger than a dimension is taken apart."""
    atoms = [a for d in s.dims("self") for a in s.axes.resolve(d)]
    found: list[Dim] = []
    for size in s.sizes():
        dim: list[Axis] = []
        while size != ONE:
            if not atoms:
                raise Unknown("a view whose sizes do not fit together")
            rest = ratio(size, atoms[0].size)
            if rest is not None:
                dim.append(atoms.pop(0))
                size = rest
            elif ratio(atoms[0].size, size) is not None:
                outer, inner = s.axes.split(atoms[0], size)
                dim.append(outer)
                atoms[0], size = inner, ONE
            else:
                raise Unknown(f"a view cuts an axis of {atoms[0].size} into pieces of {size}")
        found.append(tuple(dim))
    if atoms:
        raise Unknown("a view whose sizes do not fit together")
    return found


def permute(s: Site) -> list[Dim]:
    """The same dimensions in another order."""
    dims = s.dims("self")
    rank = len(dims)
    if "dims" in s.args:
        return [dims[d % rank] for d in s.args["dims"]]
    if "dim0" in s.args:
        a, b = s.args["dim0"] % rank, s.args["dim1"] % rank
        dims[a], dims[b] = dims[b], dims[a]
        return dims
    return dims[:-2] + dims[-2:][::-1]  # t, mT


def unsqueeze(s: Site) -> list[Dim]:
    """One more dimension of size one."""
    dims = s.dims("self")
    dims.insert(s.args["dim"] % (len(dims) + 1), ())
    return dims


def squeeze(s: Site) -> list[Dim]:
    """Without dimensions of size one."""
    dims, sizes = s.dims("self"), [expression(n) for n in s.args["self"].meta["val"].shape]
    chosen = s.args.get("dim", range(len(dims)))
    chosen = [chosen] if isinstance(chosen, int) else chosen
    dropped = {d % len(dims) for d in chosen}
    return [d for k, d in enumerate(dims) if not (k in dropped and sizes[k] == ONE)]


def expand(s: Site) -> list[Dim]:
    """Dimensions of size one grow; the rest is kept."""
    dims, rank = s.dims("self"), len(s.sizes())
    dims = [()] * (rank - len(dims)) + dims
    return [d or s.fresh(k) for k, d in enumerate(dims)]


def repeat(s: Site) -> list[Dim]:
    """As `expand` where a dimension of size one is repeated; other repeated dimensions are new axes."""
    dims, times = s.dims("self"), s.args["repeats"]
    dims = [()] * (len(times) - len(dims)) + dims
    return [d if expression(n) == ONE else s.fresh(k) for k, (d, n) in enumerate(zip(dims, times, strict=True))]


def cat(s: Site) -> list[Dim]:
    """The joined dimension is a new axis made of pieces."""
    parts = [p for p in s.args["tensors"] if p.meta["val"].numel() != 0 or p.meta["val"].dim() > 1]
    all_dims = [s.dims_of(p) for p in parts]
    dim = s.args["dim"] % len(all_dims[0])
    result = all_dims[0]
    for other in all_dims[1:]:
        for k, (a, b) in enumerate(zip(result, other, strict=True)):
            if k != dim:
                s.unify(a, b)
    result = [next((d[k] for d in all_dims if d[k]), ()) for k in range(len(result))]
    result[dim] = s.fresh(dim)
    if result[dim]:
        pieces = tuple((p, d[dim]) for p, d in zip(parts, all_dims, strict=True))
        s.axes.joined[result[dim][0]] = Joined(pieces, s.node)
    return result


def stack(s: Site) -> list[Dim]:
    """A new dimension; the others are the same in all parts."""
    first, *others = (s.dims_of(p) for p in s.args["tensors"])
    for other in others:
        for a, b in zip(first, other, strict=True):
            s.unify(a, b)
    dim = s.args["dim"] % (len(first) + 1)
    return [*first[:dim], s.fresh(dim), *first[dim:]]


def slices(s: Site) -> list[Dim]:
    """A whole dimension stays, a part of one is a new axis that remembers where it lay."""
    dims = s.dims("self")
    dim = s.args["dim"] % len(dims)
    before = expression(s.args["self"].meta["val"].shape[dim])
    if s.sizes()[dim] != before:
        dims[dim] = _part(s, dims[dim], dim, s.args["start"] or 0, s.args["step"])
    elif s.args["step"] != 1:
        raise Unknown("a slice with a step that keeps the size")
    return dims


def _part(s: Site, source: Dim, dim: int, start: Any, step: int = 1, index: int | None = None) -> Dim:
    found = s.fresh(dim, index)
    if found:
        s.axes.taken[found[0]] = Taken(source, start, step, s.node)
    return found


def splits(s: Site) -> tuple[list[Dim], ...]:
    """Several parts of one dimension."""
    dims = s.dims("self")
    dim, results, start = s.args["dim"] % len(dims), list[list[Dim]](), sympy.Integer(0)
    for k, value in enumerate(s.node.meta["val"]):
        size = expression(value.shape[dim])
        whole = size == expression(s.args["self"].meta["val"].shape[dim])
        part = dims[dim] if whole else _part(s, dims[dim], dim, start, index=k)
        results.append([*dims[:dim], part, *dims[dim + 1 :]])
        start = start + size
    return tuple(results)


def unbind(s: Site) -> tuple[list[Dim], ...]:
    """The elements of one dimension."""
    dims = s.dims("self")
    dim = s.args["dim"] % len(dims)
    return tuple([*dims[:dim], *dims[dim + 1 :]] for _ in s.node.meta["val"])


def select(s: Site) -> list[Dim]:
    """One element of a dimension."""
    dims = s.dims("self")
    s.mix(dims.pop(s.args["dim"] % len(dims)))
    return dims


def getitem(s: Site) -> Any:
    """One of several results."""
    source, index = s.node.args
    found = s.axes.values.get(source)  # type: ignore[arg-type]
    if not isinstance(found, tuple) or not isinstance(index, int):
        raise Unknown("an item of something that is not known to be a tuple")
    return found[index]


def embedding(s: Site) -> list[Dim]:
    """A table's rows, one for each index."""
    table, indices = s.dims("weight"), s.dims("indices")
    s.mix(table[0])
    return [*indices, *table[1:]]


def index_select(s: Site) -> list[Dim]:
    """Some elements of a dimension, one for each index."""
    dims, chosen = s.dims("self"), s.dims("index")
    dim = s.args["dim"] % len(dims)
    s.mix(dims[dim])
    dims[dim] = chosen[0] if chosen else s.fresh(dim)
    return dims


def gather(s: Site) -> list[Dim]:
    """Elements along one dimension, chosen anew at every place of the others."""
    dims, chosen = s.dims("self"), s.dims("index")
    dim = s.args["dim"] % len(dims)
    s.mix(dims[dim])
    whole = [expression(n) for n in s.args["self"].meta["val"].shape]
    for k, (a, b) in enumerate(zip(dims, chosen, strict=True)):
        if k != dim and s.sizes()[k] == whole[k]:
            s.unify(a, b)
    return chosen


def index(s: Site) -> list[Dim]:
    """Advanced indexing: the indexed dimensions give way to those of the indices, broadcast against each other."""
    dims, indices = s.dims("self"), s.args["indices"]
    chosen = [k for k, i in enumerate(indices) if i is not None]
    if any(i.meta["val"].dtype.is_floating_point or str(i.meta["val"].dtype) == "torch.bool"
           for i in indices if isinstance(i, fx.Node)):  # fmt: skip
        raise Unknown("an index by a mask, whose size depends on values")
    s.mix(*(dims[k] for k in chosen))
    joint = broadcast(s, [s.dims_of(indices[k]) for k in chosen])
    rest = [d for k, d in enumerate(dims) if k not in chosen]
    first = chosen[0] if chosen == list(range(chosen[0], chosen[-1] + 1)) else 0
    return [*rest[:first], *joint, *rest[first:]]


def broadcast(s: Site, operands: list[list[Dim]]) -> list[Dim]:
    """The dimensions of operands that are broadcast against each other; what meets is the same."""
    result: list[Dim] = [()] * max(map(len, operands), default=0)
    for dims in operands:
        offset = len(result) - len(dims)
        for k, dim in enumerate(dims, offset):
            s.unify(result[k], dim)
            result[k] = result[k] or dim
    return result


VIEWS: dict[str, Rule] = {
    **dict.fromkeys(("view", "_unsafe_view", "reshape", "flatten", "unflatten"), view),
    **dict.fromkeys(("permute", "transpose", "t", "mT"), permute),
    "unsqueeze": unsqueeze, "squeeze": squeeze, "expand": expand, "repeat": repeat, "cat": cat, "stack": stack,
    "slice": slices, "select": select, "unbind": unbind, "embedding": embedding, "index_select": index_select,
    "gather": gather, "index": index,
    **dict.fromkeys(("split", "split_with_sizes", "chunk", "tensor_split"), splits),
}  # fmt: skip
