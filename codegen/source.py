"""Straight-line Python for a sequence of nodes: the fastest way that Python offers to run a fixed list of calls."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from keyword import iskeyword
from typing import Any

import torch
from torch import fx

from .layouts import layout_lines

# ATen operators whose C++ Python binding of the same name takes the same arguments in the same order as the operator's
# schema. Calling the binding skips the generic boxed path of `torch.ops` and saves 0.4 to 1 us a call.
BOUND = frozenset(
    """add sub mul div neg abs pow sqrt rsqrt reciprocal exp log tanh sigmoid relu gelu silu softmax layer_norm
    group_norm rms_norm linear addmm mm bmm matmul baddbmm conv1d conv2d conv3d embedding scaled_dot_product_attention
    view reshape permute transpose t expand unsqueeze squeeze select cat stack index_select gather where masked_fill
    eq ne lt le gt ge logical_not logical_and logical_or bitwise_and bitwise_or bitwise_not mean sum amax amin cumsum
    clone contiguous max_pool2d avg_pool2d adaptive_avg_pool2d hardtanh hardswish hardsigmoid leaky_relu elu softplus
    clamp maximum minimum erf sin cos roll flip tril triu flatten log_softmax split_with_sizes""".split()
)

# Operators whose result depends on the strides of their input.
READS_LAYOUT = frozenset(("aten.as_strided.default", "aten.view_as_complex.default", "aten.view.dtype"))


def fast_callable(target: Any) -> Callable[..., Any]:
    """The cheapest callable that computes what `target` computes."""
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
        return target  # type: ignore[no-any-return]
    name = target._schema.name.removeprefix("aten::")
    if name in ("view", "_unsafe_view") and target._overloadname != "dtype":
        return torch.reshape  # kernels may yield another layout than the graph was traced with
    if name == "sym_size":
        return torch._C.TensorBase.size
    if name not in BOUND or target._overloadname in ("out", "names_dim", "names", "dimname", "Dimname", "dtype"):
        return target
    for owner in (torch._C._VariableFunctions, torch._C._nn, torch._C.TensorBase):
        if hasattr(owner, name):
            return getattr(owner, name)  # type: ignore[no-any-return]
    return target


class Source:
    """Collects lines of one function and the objects they name; `build` compiles them.

    Every name in the text is made here, so the text never contains anything from the outside.
    """

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.space: dict[str, Any] = {}
        self._known: dict[int, str] = {}

    def bind(self, value: Any, prefix: str) -> str:
        """A name for an object that the text refers to; the same object gets the same name."""
        if id(value) not in self._known:
            name = f"{prefix}{len(self.space)}"
            self.space[name] = value
            self._known[id(value)] = name
        return self._known[id(value)]

    def literal(self, value: Any, names: Mapping[fx.Node, str]) -> str:
        """Text of one argument."""
        if isinstance(value, fx.Node):
            return names[value]
        if value is None or type(value) in (bool, int, str) or (type(value) is float and math.isfinite(value)):
            return repr(value)
        if isinstance(value, (list, tuple)):
            inner = ", ".join(self.literal(v, names) for v in value)
            return f"[{inner}]" if isinstance(value, list) else f"({inner},)" if value else "()"
        if isinstance(value, slice):
            return f"slice({', '.join(self.literal(v, names) for v in (value.start, value.stop, value.step))})"
        return self.bind(value, "c")

    def call(self, result: str, function: Callable[..., Any], args: Iterable[Any], kwargs: Mapping[str, Any],
             names: Mapping[fx.Node, str]) -> None:  # fmt: skip
        """Append ``result = function(*args, **kwargs)``."""
        label = "".join(c if c.isalnum() else "_" for c in getattr(function, "__name__", "call"))
        parts = [self.literal(a, names) for a in args]
        parts += [f"{k}={self.literal(v, names)}" for k, v in kwargs.items() if not iskeyword(k)]
        reserved = [f"{k!r}: {self.literal(v, names)}" for k, v in kwargs.items() if iskeyword(k)]
        parts += [f"**{{{', '.join(reserved)}}}"] if reserved else []
        self.lines.append(f"{result} = {self.bind(function, f'{label}_')}({', '.join(parts)})")

    def node(self, node: fx.Node, names: dict[fx.Node, str]) -> None:
        """Append a graph node and name its value."""
        if str(node.target) in READS_LAYOUT and isinstance(node.args[0], fx.Node):
            self.as_traced(node.args[0], names)
        names[node] = f"v{len(names)}"
        self.call(names[node], fast_callable(node.target), node.args, node.kwargs, names)

    def as_traced(self, node: fx.Node, names: Mapping[fx.Node, str]) -> None:
        """Append lines that give a value the layout which it had when the program was traced."""
        if node.op != "get_attr":  # weights lie as they were traced, and their names are not local
            self._laid_out(node.meta.get("traced", node.meta.get("val")), names[node])

    def as_planned(self, node: fx.Node, names: Mapping[fx.Node, str]) -> None:
        """Append lines that give a value the layout which kernels that read it were compiled for."""
        self._laid_out(node.meta.get("val"), names[node])

    def _laid_out(self, value: Any, name: str) -> None:
        if isinstance(value, torch.Tensor) and value.layout is torch.strided and value.dim():
            self.lines.extend(layout_lines(self.bind, value, name))

    def build(self, parameters: Iterable[str], result: str) -> tuple[Callable[..., Any], str]:
        """The compiled function and its text."""
        body = [*self.lines, f"return {result}"]
        text = f"def run({', '.join(parameters)}):\n" + "\n".join(f"    {line}" for line in body) + "\n"
        space = dict(self.space)
        exec(compile(text, "<torchlathe executable>", "exec"), space)
        return space["run"], text


def releases(steps: list[tuple[list[fx.Node], list[fx.Node]]], keep: Iterable[fx.Node]) -> list[list[fx.Node]]:
    """For each step (values read, values made) the values that nobody needs after it."""
    kept, last = set(keep), dict[fx.Node, int]()
    for index, (reads, makes) in enumerate(steps):
        for node in (*makes, *reads):
            last[node] = index
    dead: list[list[fx.Node]] = [[] for _ in steps]
    for node, index in last.items():
        if node not in kept:
            dead[index].append(node)
    return dead
