"""Running nodes: on real values, and on fake ones to find out shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode


def evaluate(
    nodes: Iterable[fx.Node],
    weights: Mapping[str, Any],
    inputs: Sequence[Any],
    watch: Callable[[fx.Node, Any], None] | None = None,
) -> list[Any]:
    """Interpret nodes in order, freeing each value after its last use. Returns the output node's flat arguments."""
    for node, value in steps(nodes, weights, inputs):
        if node.op == "output":
            return list(value)
        if watch is not None:
            watch(node, value)
    raise ValueError("the graph has no output node")


def steps(
    nodes: Iterable[fx.Node], weights: Mapping[str, Any], inputs: Sequence[Any] = ()
) -> Iterator[tuple[fx.Node, Any]]:
    """Each node, in order, with its value (of the output node: its argument); values are freed after their last use."""
    nodes = list(nodes)
    last = {source: node for node in nodes for source in node.all_input_nodes}
    free: dict[fx.Node, list[fx.Node]] = {}
    for source, node in last.items():
        free.setdefault(node, []).append(source)
    env: dict[fx.Node, Any] = {}
    feed = iter(inputs)
    for node in nodes:
        if node.op == "placeholder":
            value = next(feed)
        elif node.op == "get_attr":
            value = weights[str(node.target)]
        else:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), env.__getitem__)
            value = args[0] if node.op == "output" else node.target(*args, **kwargs)  # type: ignore[operator]
            del args, kwargs
        env[node] = value
        yield node, value
        for source in free.get(node, ()):
            del env[source]


def infer(node: fx.Node, weights: Mapping[str, Any], fake: FakeTensorMode) -> Any:
    """The node's value on fake tensors: its shape, dtype and layout. Raises what the operator raises on bad shapes."""

    def value(source: fx.Node) -> Any:
        return source.meta["val"] if "val" in source.meta else weights[str(source.target)]

    args, kwargs = fx.node.map_arg((node.args, node.kwargs), value)
    env = fake.shape_env
    # A meta function may ask questions such as "is the batch above 16": the answer for the example is no promise.
    with fake, torch.no_grad(), env.suppress_guards() if env is not None else nullcontext():
        return node.target(*args, **kwargs)  # type: ignore[operator]
