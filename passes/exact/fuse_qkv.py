"""fuse_qkv: parallel linears of one input become one linear and a split."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import fx

from ..base import Context, Pass, Refusal
from ..layers import Layer, layer_of
from ..layout import refresh
from ..nodes import escapes
from ..program import Program
from ..rewrite import replace as replace_node

aten = torch.ops.aten
LINEARS = (aten.linear.default, aten.addmm.default, aten.mm.default, aten.matmul.default)


@dataclass(frozen=True)
class FuseQkv(Pass):
    """Run linears that read one value (queries, keys and values; gate and up) as one linear, and slice its result.

        q = linear(x, wq, bq); k = linear(x, wk)   -->   y = linear(x, cat(wq, wk), cat(bq, 0))
                                                         q = slice(y, -1, 0, n); k = slice(y, -1, n, n + m)

    Assumes constant weights of one dtype. The slices are strided: views that need more become reshapes, and results
    that leave the program are copied. Gives up memory: the joined weight stands beside the model's own. Source: Jia et
    al., TASO, https://doi.org/10.1145/3341301.3359630 (fusing matrix products that share an operand).
    """

    name: ClassVar[str] = "fuse-qkv"
    smallest: int = 2  # fewest linears worth joining, at least 2

    def run(self, program: Program, ctx: Context) -> int | Refusal:
        """See the class."""
        groups: dict[Any, list[Layer]] = {}
        for node in program.graph.nodes:
            layer = layer_of(program, node) if node.users else None
            if layer is not None and layer.node.target in LINEARS:
                groups.setdefault((layer.source, layer.dtype, layer.weight.device), []).append(layer)
        sites = 0
        for layers in groups.values():
            if len(layers) >= max(2, self.smallest):
                _join(program, layers)
                sites += 1
        most = max((len(layers) for layers in groups.values()), default=0)
        if sites or most < 2:
            return sites or Refusal("no two linears with constant weights of one dtype read the same value")
        return Refusal(f"at most {most} linears read the same value, and `smallest` asks for {self.smallest}")


def _join(program: Program, layers: list[Layer]) -> None:
    first = layers[0]
    bias = None
    if any(layer.bias is not None for layer in layers):
        # Adding -0.0 changes no number, not even -0.0 itself.
        none = [first.weight.new_full((layer.out,), -0.0) for layer in layers]
        bias = torch.cat([n if layer.bias is None else layer.bias for n, layer in zip(none, layers, strict=True)])
    joined = replace(first, weight=torch.cat([layer.weight for layer in layers]), bias=bias)
    result = joined.build(program, first.node)
    parts, start = list[fx.Node](), 0
    for layer in layers:
        part = program.call(aten.slice.Tensor, result, -1, start, start + layer.out, before=first.node, like=layer.node)
        if escapes(layer.node):
            layout = {"memory_format": torch.contiguous_format}
            part = program.call(aten.clone.default, part, before=first.node, like=layer.node, **layout)
        parts.append(part)
        start += layer.out
    users = dict.fromkeys(user for layer in layers for user in layer.node.users)
    for layer, part in zip(layers, parts, strict=True):
        replace_node(layer.node, part)
    refresh(program, users)
