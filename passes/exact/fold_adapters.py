"""fold_adapters: low-rank adapters go into the weights of the layer that they adapt."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import fx

from .. import rewrite
from ..base import Context, Pass, Refusal
from ..layers import Channelwise, Layer, channelwise_of, layer_of
from ..nodes import same
from ..program import Program
from .merge_reparam import add_layers

aten = torch.ops.aten

CASTS = (aten._to_copy.default, aten.to.dtype)
REACH = 64  # nodes that one adapted layer may consist of


@dataclass(frozen=True)
class FoldAdapters(Pass):
    """Fold layers that run beside and behind each other on one input, such as LoRA or DoRA, into one layer.

        y = linear(x, w, b) + linear(linear(x, a), c) * s   -->   y = linear(x, w + s * c @ a, b)

    Works on any expression that is affine in one value x: linear, addmm, embedding and convolution layers, 1x1
    convolutions behind them, sums, differences, scales per channel and casts between them. Assumes constant weights;
    folds only where the one layer has fewer weights than the parts. Gives up swapping adapters at run time. Source: Hu
    et al., LoRA, https://arxiv.org/abs/2106.09685, section 4.1; Liu et al., DoRA, https://arxiv.org/abs/2402.09353.
    """

    name: ClassVar[str] = "fold-adapters"

    def run(self, program: Program, ctx: Context) -> int | Refusal:
        """See the class."""
        sites, refusal = 0, None
        known: dict[fx.Node, Step | None] = {}
        for node in list(program.graph.nodes):
            found = _Expression.of(program, node, known) if node.op == "call_function" and node.users else None
            if found is None:
                continue
            layer = found.folded()
            reason = layer if isinstance(layer, str) else layer.obstacle()
            if isinstance(layer, Layer) and reason is None:
                rewrite.replace(node, layer.build(program, node))
                known.clear()
                sites += 1
            elif reason and refusal is None:
                refusal = Refusal.at(node, reason)
        return sites or refusal or Refusal("no layer has another one behind it whose result is added to its own")


Step = Layer | Channelwise | tuple[fx.Node, ...]  # the operands of a sum, a difference or a cast


@dataclass(frozen=True)
class _Expression:
    """The nodes between `root` and the one value `source` that all of them depend on, each an affine step."""

    root: fx.Node
    source: fx.Node
    steps: dict[fx.Node, Step]
    maps: dict[fx.Node, Layer | str] = field(default_factory=dict)

    @classmethod
    def of(cls, program: Program, root: fx.Node, known: dict[fx.Node, Step | None]) -> _Expression | None:
        """Expand the latest node until one value remains behind at least two layers, one behind another.

        `known` keeps the steps of nodes that were looked at before.
        """
        steps: dict[fx.Node, Step] = {}
        frontier = {root}
        while len(steps) < REACH:
            node = max(frontier)
            layers = [s for s in steps.values() if isinstance(s, Layer)]
            if len(frontier) == 1 and len(layers) > 1 and any(s.source in steps for s in layers):
                return cls(root, node, steps)
            if node not in known:
                known[node] = _step(program, node)
            step = known[node]
            if step is None:
                return None
            steps[node] = step
            frontier = (frontier - {node}).union(_operands(step))
        return None

    def folded(self) -> Layer | str:
        """The one layer, why it cannot be, or "" if it would not be smaller."""
        inside = set(self.steps)
        for node, step in self.steps.items():
            outside = [u for u in node.users if u not in inside and not self._leads_inside(u)]
            if node is not self.root and outside:
                return f"the value of {node.name} is also used by {outside[0].name}"
            plain = any(self._origin(operand) is self.source for operand in _operands(step))
            if plain and not isinstance(step, Layer) and node.target not in CASTS:
                return "the input itself is part of the sum"
        layers = [s for s in self.steps.values() if isinstance(s, Layer)]
        layer = self._map(self.root)
        if isinstance(layer, str) or layer.weight.numel() >= sum(part.weight.numel() for part in layers):
            return layer if isinstance(layer, str) else ""
        largest = max(layers, key=lambda part: part.weight.numel())
        dtype = self.root.meta["val"].dtype
        if largest.dtype != dtype or (layer.kind != "embedding" and self.source.meta["val"].dtype != dtype):
            return "its result has another dtype than its input or its largest weight"
        return replace(layer, node=largest.node, source=self.source, name=largest.name, dtype=dtype)

    def _origin(self, node: fx.Node) -> fx.Node:
        """The node behind casts."""
        while node.target in CASTS and node in self.steps:
            node = next(iter(_operands(self.steps[node])))
        return node

    def _leads_inside(self, user: fx.Node) -> bool:
        """Whether a view or norm beside the steps is read by steps only."""
        waiting = [user]
        for _ in range(REACH):
            if not waiting:
                return True
            node = waiting.pop()
            if node not in self.steps:
                if node.op != "call_function" or not node.users:
                    return False
                waiting += node.users
        return False

    def _map(self, node: fx.Node) -> Layer | str:
        if node not in self.maps:
            self.maps[node] = self._mapped(node)
        return self.maps[node]

    def _mapped(self, node: fx.Node) -> Layer | str:
        step = self.steps[node]
        if isinstance(step, Layer):
            plain = replace(step, dtype=torch.float64)
            inner = plain if self._origin(step.source) is self.source else self._map(step.source)
            return inner if inner is plain or isinstance(inner, str) else _compose(inner, plain)
        parts = [self._map(operand) for operand in _operands(step)]
        layers = [part for part in parts if isinstance(part, Layer)]
        if len(layers) < len(parts):
            return next(part for part in parts if isinstance(part, str))
        if isinstance(step, Channelwise):
            fits = step.fits(layers[0].channel)
            return layers[0].then(step.scale, step.shift) if fits else f"{node.name} scales no channel of the layer"
        if node.target is aten.sub.Tensor:
            minus = torch.tensor([-1.0], dtype=torch.float64, device=layers[1].weight.device)
            layers[1] = layers[1].then(minus, torch.zeros_like(minus))
        return add_layers(layers)


def _operands(step: Step) -> Iterable[fx.Node]:
    return step if isinstance(step, tuple) else (step.source,)


def _step(program: Program, node: fx.Node) -> Step | None:
    found = layer_of(program, node) or channelwise_of(program, node, casts=True)
    if found is not None:
        return found
    value = node.meta.get("val")
    operands = tuple(a for a in node.args[:2] if isinstance(a, fx.Node))
    if not operands or not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return None
    for operand in operands:
        before = operand.meta.get("val")
        if (
            not isinstance(before, torch.Tensor)
            or not before.is_floating_point()
            or not same(before.shape, value.shape)
        ):
            return None
    if node.target in (aten.add.Tensor, aten.sub.Tensor) and not node.kwargs and len(operands) == 2:
        return operands
    return operands if node.target in CASTS else None


def _compose(inner: Layer, outer: Layer) -> Layer | str:
    """The one layer that does what `inner` and then `outer` do, in float64."""
    reads_one = all(k == 1 for k in outer.weight.shape[2:]) and all(s == 1 for s in outer.stride)
    if (outer.kind == "conv") != (inner.kind == "conv") or not reads_one or outer.padded:
        return f"behind {inner.node.name} stands {outer.node.name}, which reads more than one of its positions"
    if inner.groups != 1 or outer.groups != 1 or inner.transposed or outer.transposed:
        return f"{inner.node.name} and {outer.node.name} are grouped or transposed convolutions"
    mix = outer.weight.double().flatten(1)
    weight = (mix @ inner.weight.double().flatten(1)).unflatten(1, inner.weight.shape[1:])
    added = [] if inner.bias is None else [mix @ inner.bias.double()]
    added += [] if outer.bias is None else [outer.bias.double()]
    return replace(inner, weight=weight, bias=sum(added[1:], added[0]) if added else None, rank=outer.rank)
