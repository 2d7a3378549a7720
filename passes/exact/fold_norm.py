"""fold_norm: a scale and shift per channel goes into the linear or convolution beside it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import fx

from .. import rewrite
from ..base import Context, Pass, Refusal
from ..layers import NORMS, Channelwise, Layer, channelwise_of, layer_of
from ..program import Program

aten = torch.ops.aten


@dataclass(frozen=True)
class FoldNorm(Pass):
    """Put a batch norm, or a scale and shift per channel, into the linear or convolution before or after it.

        y = aten.batch_norm(aten.conv2d(x, w, b, s, p), g, h, m, v, eps)   -->   y = aten.conv2d(x, w', b', s, p)

    Assumes inference statistics and constant weights; refuses a norm before a padded convolution unless its shift is
    zero, because padding reads zeros where the shift would stand. Gives up nothing; `split` also writes a norm that
    has no such neighbour as one multiply and one add. Source: Jacob et al., Quantization and training of neural
    networks for efficient integer-arithmetic-only inference, https://arxiv.org/abs/1712.05877, section 3.2.
    """

    name: ClassVar[str] = "fold-norm"
    split: bool = False

    def run(self, program: Program, ctx: Context) -> int | Refusal:
        """See the class."""
        sites, refusal = 0, None
        waiting = list(program.graph.nodes)
        while waiting:
            node = waiting.pop(0)
            norm = None if node._erased or not node.users else channelwise_of(program, node)
            if norm is None:
                continue
            followers = list(node.users)
            found = _fold_back(program, norm)
            found = _fold_forward(program, norm) if found == "" else found
            if isinstance(found, str) and self.split and norm.inner.target in NORMS:
                found = _split(program, norm)
            if isinstance(found, fx.Node):
                # The folded layer may now stand beside a scale that was looked at before.
                sites, waiting = sites + 1, [*followers, found, *found.all_input_nodes, *waiting]
            elif norm.inner.target in NORMS or found:
                refusal = refusal or Refusal.at(node, found or "no linear or convolution of constant weights beside it")
        return sites or refusal or Refusal("no batch norm or scale per channel stands beside a linear or convolution")


def _fold_back(program: Program, norm: Channelwise) -> fx.Node | str:
    """Fold into the layer that yields the norm's source: the new layer, why not, or "" if there is no layer."""
    layer = layer_of(program, norm.source)
    if layer is None or layer.kind == "embedding":  # a scaled copy of a table costs more than the scaling
        return ""
    if len(norm.source.users) > 1:
        return f"the value of {norm.source.name} is also used elsewhere" if norm.inner.target in NORMS else ""
    if not norm.fits(layer.channel):
        return "the layer before it has its channels in another dimension" if norm.inner.target in NORMS else ""
    if norm.inner.target not in NORMS and _shared(program, layer):
        return f"the weight {layer.name} is shared, and a scaled copy costs more than the scaling"
    folded = layer.then(norm.scale, norm.shift)
    return folded.obstacle() or _put(program, norm.node, folded)


def _fold_forward(program: Program, norm: Channelwise) -> fx.Node | str:
    """Fold into the layer that reads the norm: the new layer, why not, or "" if there is no layer."""
    user = next(iter(norm.node.users))
    layer = layer_of(program, user)
    if layer is None or layer.source is not norm.node:
        return ""
    if len(norm.node.users) > 1:
        return f"the value of {norm.node.name} is also used outside the layer after it"
    if not norm.fits(layer.channel):
        return "the layer after it has its channels in another dimension"
    if norm.inner.target not in NORMS and _shared(program, layer):
        return f"the weight {layer.name} is shared, and a scaled copy costs more than the scaling"
    if layer.transposed:
        return "a transposed convolution reads the shift a different number of times at the border"
    if layer.padded and norm.shift.any():
        return "the convolution after it pads with zeros, which the shift would have to change too (padding + bias)"
    folded = replace(layer.after(norm.scale, norm.shift), source=norm.source)
    return folded.obstacle() or _put(program, user, folded)


def _shared(program: Program, layer: Layer) -> bool:
    """Whether another call reads the layer's weight too, such as an embedding tied to it."""
    place = layer.weight.data_ptr()
    tensors = ((n, program.constant(n)) for n in program.graph.nodes if n.op == "get_attr")
    return sum(len(n.users) for n, t in tensors if t is not None and t.data_ptr() == place) > 1


def _put(program: Program, old: fx.Node, layer: Layer) -> fx.Node:
    new = layer.build(program, old)
    rewrite.replace(old, new)
    return new


def _split(program: Program, norm: Channelwise) -> fx.Node:
    value = norm.node.meta["val"]
    shape = [-1] + [1] * (value.dim() - 2)
    scale = program.weight(f"{norm.node.name}.scale", norm.scale.to(value.dtype).view(shape))
    shift = program.weight(f"{norm.node.name}.shift", norm.shift.to(value.dtype).view(shape))
    product = program.call(aten.mul.Tensor, norm.source, scale, before=norm.node, like=norm.node)
    total = program.call(aten.add.Tensor, product, shift, before=norm.node, like=norm.node)
    rewrite.replace(norm.node, total)
    return total
