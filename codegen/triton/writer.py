"""Row programs as Triton text: rows are [R, 1] tensors, columns [1, C] tensors, and operators broadcast them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import sympy
import torch

from ..plans.layout import Access
from ..plans.values import Value
from .code import Sizes, dimensions, long

BINARY = {"add": "+", "sub": "-", "mul": "*", "div": "/", "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==",
          "ne": "!=", "and": "&", "or": "|"}  # fmt: skip
CALLS = {
    "exp": "tl.exp", "log": "tl.log", "erf": "tl.erf", "sqrt": "tl.sqrt_rn", "rsqrt": "tl.rsqrt", "abs": "tl.abs",
    "log1p": "device.log1p", "expm1": "device.expm1", "tanh": "device.tanh", "sigmoid": "device.sigmoid",
    "max": "device.nan_max", "min": "device.nan_min",
}  # fmt: skip
TYPES = {"float32": "tl.float32", "int64": "tl.int64", "int32": "tl.int32", "bool": "tl.int1"}
NEUTRAL = {"sum": "0.0", "max": 'float("-inf")', "peak": 'float("-inf")', "min": 'float("inf")'}
COMBINE = {"sum": "{} + {}", "max": "device.nan_max({}, {})", "min": "device.nan_min({}, {})",
           "peak": "tl.maximum({}, {})"}  # fmt: skip
REDUCE = {"sum": "tl.sum({}, {}, keep_dims=True)", "peak": "tl.max({}, {}, keep_dims=True)",
          "max": "tl.reduce({}, {}, device.nan_max, keep_dims=True)",
          "min": "tl.reduce({}, {}, device.nan_min, keep_dims=True)"}  # fmt: skip


@dataclass(frozen=True)
class Place:
    """Which elements a piece of text computes.

    Attributes:
        digits: index along each leading dimension, [R, 1] each.
        column: index along the last one, [1, C].
        rows: text that says which rows exist, None if all do.
        columns: the same for columns.
        row_guards: further conditions under which a row is read.
        column_guards: the same for columns.
    """

    digits: tuple[str, ...]
    column: str
    rows: str | None = None
    columns: str | None = None
    row_guards: tuple[str, ...] = ()
    column_guards: tuple[str, ...] = ()

    @property
    def mask(self) -> str | None:
        """Which elements exist, None if all do."""
        return " & ".join(m for m in (self.rows, self.columns) if m) or None


@dataclass
class Block:
    """Lines, and the names of the values that they compute."""

    lines: list[str] = field(default_factory=list)
    known: dict[tuple[Value, Place], str] = field(default_factory=dict)


@dataclass
class Writer:
    """Writes the lines of one kernel.

    Attributes:
        sizes: texts of sizes.
        tensors: fake tensors of the parameters; parameter k is called ``t<k>``.
        loads: the access of every load, gather and pick.
        blocks: open blocks, the innermost last; what does not depend on the column goes to the outermost.
    """

    sizes: Sizes
    tensors: Sequence[torch.Tensor]
    loads: dict[Value, Access]
    blocks: list[Block] = field(default_factory=lambda: [Block()])
    count: int = 0

    def line(self, text: str) -> None:
        """Append a line to the innermost block."""
        self.blocks[-1].lines.append(text)

    def let(self, text: str, inner: bool = True, stem: str = "v") -> str:
        """Name a text."""
        name = f"{stem}{self.count}"
        self.count += 1
        self.blocks[-1 if inner else 0].lines.append(f"{name} = {text}")
        return name

    def digits(self, index: str, extents: Sequence[sympy.Expr]) -> tuple[str, ...]:
        """A row number as one index per leading dimension."""
        found: list[str] = []
        for extent in reversed(extents[1:]):
            size = self.sizes.text(extent)
            found.append(self.let(f"{index} % {size}", stem="i"))
            index = self.let(f"{index} // {size}", stem="i")
        return (index, *reversed(found)) if extents else ()

    def program(self, *grid: sympy.Expr | int) -> tuple[str, ...]:
        """Number of this program along each axis of a grid, the fastest first."""
        sizes, found = [sympy.sympify(n) for n in grid], ["0"] * len(grid)
        for size in sizes:
            self.sizes.text(size)  # a launch needs to know sizes that no kernel reads
        for number, axes in enumerate(dimensions(sizes)):
            counted = [k for k in reversed(axes) if sizes[k] != 1]
            digits = self.digits(f"tl.program_id({number})", [sizes[k] for k in counted])
            for k, digit in zip(counted, digits, strict=True):
                found[k] = digit
        return tuple(found)

    def long(self, number: str) -> str:
        """The text of a number that strides of the parameters multiply."""
        return long(number, self.tensors)

    def offset(self, access: Access, place: Place) -> tuple[str, bool, bool]:
        """Where an access is, and whether that depends on the row and on the column."""
        terms = []
        for digit, stride in zip(place.digits, access.strides[:-1], strict=True):
            if stride != 0:
                terms.append(digit if stride == 1 else f"{digit} * {self.sizes.text(stride)}")
        rows, last = bool(terms), access.strides[-1]
        if last != 0:
            terms.append(place.column if last == 1 else f"{place.column} * {self.sizes.text(last)}")
        if access.shift != 0:
            terms.append(self.sizes.text(access.shift))
        return " + ".join(terms) or "0", rows, last != 0

    def value(self, v: Value, place: Place) -> str:
        """The name (or literal) of a value at a place."""
        key = v, (place if v.vary else replace(place, column="", columns=None, column_guards=()))
        for block in reversed(self.blocks):
            if key in block.known:
                return block.known[key]
        if v.op == "const":
            return literal(v)
        name = self.let(self._text(v, place), v.vary)
        self.blocks[-1 if v.vary else 0].known[key] = name
        return name

    def know(self, v: Value, place: Place, name: str) -> None:
        """Say which name holds a value."""
        key = v, (place if v.vary else replace(place, column="", columns=None, column_guards=()))
        self.blocks[-1 if v.vary else 0].known[key] = name

    def _text(self, v: Value, place: Place) -> str:
        if v.op in ("load", "gather"):
            return self._load(v, place)
        if v.op == "pick":
            index = self.let(self.offset(self.loads[v], place)[0], False)
            guards = [*_between(index, v.attr[1])]
            places = [replace(place, row_guards=(*place.row_guards, g)) for g in guards]
            return self._parts(v, places, index, v.attr[1])
        if v.op == "cat":
            guards = [*_between(place.column, v.attr)]
            places = [replace(place, column_guards=(*place.column_guards, g)) for g in guards]
            return self._parts(v, places, place.column, v.attr)
        args = [self.value(a, place) for a in v.args]
        if v.op == "reduce":
            return reduced(v, masked(args[0], v.attr, place))
        return elementwise(v, args)

    def _parts(self, v: Value, places: Sequence[Place], index: str, bounds: Sequence[int]) -> str:
        texts = [self.value(part, place) for part, place in zip(v.args, places, strict=True)]
        text = texts[-1]
        for k in reversed(range(len(texts) - 1)):
            text = f"tl.where({index} < {bounds[k + 1]}, {texts[k]}, {text})"
        return text

    def _load(self, v: Value, place: Place) -> str:
        access = self.loads[v]
        where, by_row, by_column = self.offset(access, place)
        inside = None
        if v.op == "gather":
            dim, index, vary = v.attr[2], self.value(v.args[0], place), v.args[0].vary
            table = self.tensors[access.buffer]
            index = self.let(f"{index}.to(tl.int64)", vary)
            inside = self.let(f"({index} >= 0) & ({index} < {self.sizes.text(table.shape[dim])})", vary)
            where, by_row = f"{index} * {self.sizes.text(table.stride(dim))} + {where}", True
            by_column = by_column or vary
        masks = [place.rows, *place.row_guards, inside] if by_row else []
        masks += [place.columns, *place.column_guards] if by_column else []
        text = load(f"t{access.buffer} + {where}", [m for m in masks if m], self.tensors[access.buffer].dtype)
        if inside is None:
            return text
        # eager raises for an index outside the table; a kernel cannot, but must not return a number
        missing = 'float("nan")' if v.kind == "float32" else "0"
        return f"tl.where({inside}, {text}, {missing})"

    def store(self, access: Access, place: Place, text: str, per_row: bool = False) -> None:
        """Write a value to an output."""
        where, _, _ = self.offset(access, place)
        mask = place.rows if per_row else place.mask
        guard = f", mask={mask}" if mask else ""
        self.line(f"tl.store(t{access.buffer} + {where}, {text}{guard})")


def _between(index: str, bounds: Sequence[int]) -> Iterator[str]:
    """For each part, the condition that an index is inside it."""
    for k, low in enumerate(bounds):
        last = k + 1 == len(bounds)
        yield f"({index} >= {low})" if last else f"(({index} >= {low}) & ({index} < {bounds[k + 1]}))"


def load(address: str, masks: Sequence[str], dtype: torch.dtype) -> str:
    """A load in the type in which it is computed with; 0 where it is masked out."""
    guard = f", mask={' & '.join(masks)}, other=0" if masks else ""
    text = f"tl.load({address}{guard})"
    return f"{text}.to(tl.float32)" if dtype in (torch.bfloat16, torch.float16) else text


def masked(text: str, how: str, place: Place) -> str:
    """A value that is neutral for a reduction where no element exists."""
    return f"tl.where({place.mask}, {text}, {NEUTRAL[how]})" if place.mask else text


def reduced(v: Value, text: str) -> str:
    """One number per row, [R, 1]."""
    return REDUCE[v.attr].format(text, 1)


def literal(v: Value) -> str:
    """A constant."""
    return f'float("{v.attr}")' if v.kind == "float32" and v.attr.strip("-") in ("inf", "nan") else str(v.attr)


def elementwise(v: Value, args: Sequence[str]) -> str:
    """The text of an operation on named operands."""
    if v.op in BINARY:
        return f"{args[0]} {BINARY[v.op]} {args[1]}"
    if v.op in ("max", "min") and v.kind != "float32":
        return f"tl.{v.op}imum({args[0]}, {args[1]})"
    if v.op in CALLS:
        return f"{CALLS[v.op]}({', '.join(args)})"
    if v.op == "select":
        return f"tl.where({', '.join(args)})"
    if v.op == "neg":
        return f"-{args[0]}"
    if v.op == "not":
        return f"{args[0]} == 0"
    if v.op == "reciprocal":
        return f"1.0 / {args[0]}"
    if v.op == "round":
        return f"{args[0]}.to(tl.{v.attr}).to(tl.float32)"
    if v.op == "cast":
        return f"{args[0]} != 0" if v.kind == "bool" else f"{args[0]}.to({TYPES[v.kind]})"
    if v.op == "spread":
        return args[0]
    raise AssertionError(v.op)
