"""What a backend is given (Region), what it chooses (Schedule) and what it returns (Kernel)."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import fx
from torch.utils import _pytree as pytree

from ..passes.ops import NAMESPACE
from ..passes.program import Program
from ..passes.text import describe, stable_text
from ..targets.target import Target
from .symbols import python_text

KNOWN = ("aten", "prims", NAMESPACE)  # namespaces of operators that take tensors of any strides

# a static size; (position of a region input, its dimension); or (operator, extent, ...) as `symbols` names operators
Extent = int | tuple[Any, ...]


@dataclass(frozen=True, eq=False)
class Region:
    """A convex set of nodes that is lowered together.

    Attributes:
        nodes: the nodes, in topological order.
        inputs: values that come from outside (weights included), in order of first use.
        outputs: nodes whose values are used outside, in order of definition.
    """

    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]

    @classmethod
    def of(cls, nodes: Iterable[fx.Node]) -> Region:
        """The region of `nodes` (any order); inputs and outputs follow from the graph."""
        members = set(nodes)
        ordered = sorted(members)
        inputs: dict[fx.Node, None] = {}
        for node in ordered:
            for source in node.all_input_nodes:
                if source not in members:
                    inputs[source] = None
        outputs = [n for n in ordered if any(user not in members for user in n.users)]
        return cls(tuple(ordered), tuple(inputs), tuple(outputs))

    def text(self) -> str:
        """A print that is equal for regions that compute the same function on the same shapes and layouts.

        Symbolic sizes are named in the order in which they occur. Results whose layout is fixed are marked.
        """
        names = {node: f"in{i}" for i, node in enumerate(self.inputs)}
        head = [f"{names[node]} : {describe(node, strides=True)}" for node in self.inputs]
        body = stable_text(self.nodes, names, strides=True)
        results = (f"{names[n]} as it is" if seen_by_callers(n) else names[n] for n in self.outputs)
        text = "\n".join([*head, *body, "return " + ", ".join(results)])
        renamed, symbols = dict[str, str](), "|".join(sorted(_symbols((*self.inputs, *self.nodes))))
        return (
            re.sub(rf"\b({symbols})\b", lambda m: renamed.setdefault(m[0], f"d{len(renamed)}"), text)
            if symbols
            else text
        )

    def key(self, program: Program | None) -> str:
        """`digest()` and which inputs are constant weights: what generated code depends on besides the target."""
        constants = [k for k, n in enumerate(self.inputs) if program is not None and program.constant(n) is not None]
        return f"{self.digest()}:{','.join(map(str, constants))}"

    def digest(self) -> str:
        """Content hash of `text()`: the key under which kernels and measurements are stored."""
        return hashlib.sha256(self.text().encode()).hexdigest()


def seen_by_callers(node: fx.Node) -> bool:
    """Whether the program returns a value or gives it to foreign code, so that its strides are to be eager's."""
    if "kept" in node.meta:
        return bool(node.meta["kept"])
    return any(user.op == "output" or getattr(user.target, "namespace", "aten") not in KNOWN for user in node.users)


def _symbols(nodes: Iterable[fx.Node]) -> set[str]:
    """Names of the symbols in sizes and strides."""
    found = set[str]()
    for value in pytree.tree_leaves([n.meta.get("val") for n in nodes]):
        sizes = (*value.shape, *value.stride()) if isinstance(value, torch.Tensor) else (value,)
        found |= {s.name for size in sizes if isinstance(size, torch.SymInt) for s in size.node.expr.free_symbols}
    return found


@dataclass(frozen=True)
class Schedule:
    """How a backend lowers a region: a name and its parameters (plain JSON values)."""

    name: str = "default"
    params: tuple[tuple[str, Any], ...] = ()

    def __getitem__(self, key: str) -> Any:
        return dict(self.params)[key]

    def get(self, key: str, default: Any) -> Any:
        """A parameter, or what stands for it in schedules that were stored before it was there."""
        return dict(self.params).get(key, default)

    def __str__(self) -> str:
        return " ".join([self.name, *(f"{k}={v}" for k, v in self.params)])


@dataclass(frozen=True)
class Destination:
    """An output buffer that the caller allocates.

    Attributes:
        shape: sizes.
        dtype: element type.
        order: dimensions from the outermost to the innermost in memory, without gaps; None for 0, 1, 2, ...
    """

    shape: tuple[Extent, ...]
    dtype: torch.dtype
    order: tuple[int, ...] | None = None

    @property
    def bytes(self) -> int:
        """Size of the buffer, 0 if it depends on the inputs."""
        sizes = [e for e in self.shape if isinstance(e, int)]
        return math.prod(sizes) * self.dtype.itemsize if len(sizes) == len(self.shape) else 0

    def stored(self) -> tuple[Extent, ...]:
        """Sizes in the order in which the dimensions lie in memory."""
        return self.shape if self.order is None else tuple(self.shape[d] for d in self.order)

    def text(self, inputs: Sequence[str]) -> str:
        """Python text of the stored sizes, for region inputs of these names."""
        texts = [python_text(e, lambda place: f"{inputs[place[0]]}.shape[{place[1]}]") for e in self.stored()]  # type: ignore[arg-type]
        return f"({', '.join(texts)},)" if texts else "()"

    def seen(self) -> tuple[int, ...]:
        """Permutation that turns the stored dimensions into the buffer's own."""
        order = self.order or range(len(self.shape))
        return tuple(list(order).index(d) for d in range(len(self.shape)))


def in_memory(value: torch.Tensor, order: tuple[int, ...]) -> torch.Tensor:
    """A fake tensor like `value` whose dimensions lie in memory in this order, without gaps."""
    stored = value.new_empty([value.shape[d] for d in order])
    return stored.permute([order.index(d) for d in range(value.dim())])


@dataclass
class Kernel:
    """One launch.

    `call(*inputs)` returns the outputs (a tensor when the region has one output, else a tuple). A kernel with
    `destinations` instead is called as `call(*inputs, *buffers)`, writes the buffers and returns None.

    Attributes:
        name: readable name, such as ``rows_layer_norm``.
        backend: text name of the backend that made it.
        call: the compiled function; safe to call from several threads.
        destinations: None, or one entry per region output.
        outputs: number of values that the region yields.
        constants: tensors made at compile time that `call` takes after the inputs (packed weights).
        source: generated source, for people.
        library: exports the compiled code as a shared library to the given path, if it can.
        seconds: measured time of one call on the target, if measured.
        schedule: the schedule it was lowered with.
        flops: floating point operations of one call.
        bytes: bytes read and written by one call.
        asm: generated code by its kind.
        spills: bytes of registers that spill to memory in each thread.
        replaces: (input, output) pairs: the output may be written where the input lies, which is then gone.
    """

    name: str
    backend: str
    call: Callable[..., Any]
    destinations: tuple[Destination, ...] | None = None
    outputs: int = 1
    constants: tuple[torch.Tensor, ...] = ()
    source: str = ""
    library: Callable[[str], None] | None = None
    seconds: float | None = None
    schedule: Schedule = field(default_factory=Schedule)
    flops: int = 0
    bytes: int = 0
    asm: Mapping[str, str] = field(default_factory=dict)
    spills: int = 0
    replaces: tuple[tuple[int, int], ...] = ()


class Backend(Protocol):
    """Three methods: can it, how could it, do it; and which lone producers it would take in."""

    name: str

    def absorbs(self, node: fx.Node) -> bool:
        """Whether a node that it cannot lower alone may be part of a region with its consumer."""
        ...

    def supports(self, region: Region, target: Target) -> str | None:
        """None if the region can be lowered, else the reason why not."""
        ...

    def space(self, region: Region, target: Target) -> Iterable[Schedule]:
        """Schedules worth trying, the most promising first."""
        ...

    def lower(self, region: Region, target: Target, schedule: Schedule) -> Kernel:
        """Compile the region. Raises LowerError."""
        ...
