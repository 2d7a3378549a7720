"""Program: the graph that every pass reads and rewrites. It can always be run, printed, forked and hashed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils import _pytree as pytree

from .axes import analyse
from .axis import Axes
from .evaluate import evaluate, infer
from .text import argument, describe, stable_text


@dataclass(frozen=True)
class State:
    """A tensor carried from call to call: after each run, output number `output` is written into `slot`, which is
    the name of a weight (a buffer that the model updates) or the position of a mutated input."""

    slot: str | int
    output: int


@dataclass
class Program:
    """A functional graph of ATen operators with the weights it names.

    Attributes:
        graph: nodes are placeholders (flat inputs), get_attr (weights), call_function and one output, whose argument
            is a flat tuple: the model's results, then the carried tensors of `state`.
        weights: tensors (or the sub-graphs of control flow) by name; shared with the model and never written.
        in_spec: pytree structure of ``(args, kwargs)``.
        out_spec: pytree structure of the result.
        state: carried tensors.
        history: text names of the passes that made this program.
        parameters: names of the captured callable's parameters, in order (empty where unknown).
    """

    graph: fx.Graph
    weights: dict[str, Any]
    in_spec: pytree.TreeSpec
    out_spec: pytree.TreeSpec
    state: tuple[State, ...] = ()
    history: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()
    _fake: FakeTensorMode | None = field(default=None, repr=False)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run eagerly and return what the model returns. Carried tensors are not written back."""
        flat, spec = pytree.tree_flatten((args, kwargs))
        if spec != self.in_spec:
            raise ValueError(f"the program takes {self.in_spec}, called with {spec}")
        return pytree.tree_unflatten(self.run(flat)[: self.out_spec.num_leaves], self.out_spec)

    def run(self, inputs: Sequence[Any], watch: Callable[[fx.Node, Any], None] | None = None) -> list[Any]:
        """Run eagerly on flat inputs; `watch` sees every node with its value. Returns the flat outputs."""
        return evaluate(self.graph.nodes, self.weights, inputs, watch)

    @property
    def inputs(self) -> list[fx.Node]:
        """The placeholders, in order."""
        return [n for n in self.graph.nodes if n.op == "placeholder"]

    @property
    def outputs(self) -> tuple[Any, ...]:
        """The flat results (nodes or constants), carried tensors last."""
        results: Any = self.graph.output_node().args[0]
        return tuple(results)

    @property
    def fake(self) -> FakeTensorMode:
        """The mode under which shapes of new nodes are inferred; it holds the symbols of dynamic sizes."""
        if self._fake is None:
            modes = (v.fake_mode for n in self.graph.nodes if isinstance(v := n.meta.get("val"), FakeTensor))
            self._fake = next(modes, None) or FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
        return self._fake

    def fork(self) -> Program:
        """An independent copy of the graph that shares all weights."""
        graph = fx.Graph()
        graph.output(graph.graph_copy(self.graph, {})).meta = dict(self.graph.output_node().meta)
        return replace(self, graph=graph, weights=dict(self.weights))

    def call(self, op: Any, *args: Any, before: fx.Node, like: fx.Node | None = None, **kwargs: Any) -> fx.Node:
        """Insert ``op(*args, **kwargs)`` before a node, infer its value's shape, keep the source line of `like`."""
        with self.graph.inserting_before(before):
            node = self.graph.call_function(op, args, kwargs)
        node.meta.update({k: v for k, v in (like or before).meta.items() if k in ("stack_trace", "nn_module_stack")})
        try:
            self.infer(node)
        except Exception:
            self.graph.erase_node(node)
            raise
        return node

    def infer(self, node: fx.Node) -> None:
        """Set ``node.meta["val"]`` anew. Raises what the operator raises on bad shapes."""
        node.meta["val"] = infer(node, self.weights, self.fake)

    def weight(self, name: str, value: torch.Tensor) -> fx.Node:
        """Add a new weight under a unique name derived from `name`; the node stands after the placeholders."""
        unique, count = name, 1
        while unique in self.weights:
            unique, count = f"{name}_{count}", count + 1
        self.weights[unique] = value.detach()
        first = next(n for n in self.graph.nodes if n.op not in ("placeholder", "get_attr"))
        with self.graph.inserting_before(first):
            node = self.graph.create_node("get_attr", unique)
        node.meta["val"] = self.fake.from_tensor(value.detach(), static_shapes=True)
        return node

    def constant(self, value: Any) -> torch.Tensor | None:
        """The tensor behind a get_attr node, None for anything else (and for weights that are carried state)."""
        if not isinstance(value, fx.Node) or value.op != "get_attr" or any(s.slot == value.target for s in self.state):
            return None
        found = self.weights[str(value.target)]
        return found if isinstance(found, torch.Tensor) else None

    def axes(self) -> Axes:
        """Which logical axis is each dimension of each tensor; ``print(program.axes())`` shows it."""
        return analyse(self.graph, self.weights)

    def text(self) -> str:
        """A stable print: one line per node with shapes; equal programs print equally in every process."""
        names = {n: str(n.target) for n in self.graph.nodes if n.op in ("placeholder", "get_attr")}
        head = [f"{n.op} {names[n]} : {describe(n)}" for n in self.graph.nodes if n.op in ("placeholder", "get_attr")]
        body = stable_text([n for n in self.graph.nodes if n.op == "call_function"], names)
        results = ", ".join(argument(v, names) for v in self.outputs)
        return "\n".join([*head, *body, f"return {results}", *(f"carry {s.slot} <- {s.output}" for s in self.state)])

    def digest(self) -> str:
        """Content hash of `text()` (shapes and operators, not the numbers in the weights)."""
        return hashlib.sha256(self.text().encode()).hexdigest()
