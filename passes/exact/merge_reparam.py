"""merge_reparam: parallel linear branches of one input that are summed become one layer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import fx

from .. import rewrite
from ..base import Context, Pass, Refusal
from ..layers import NORMS, Layer, channelwise_of, layer_of
from ..nodes import same
from ..program import Program

aten = torch.ops.aten


@dataclass(frozen=True)
class MergeReparam(Pass):
    """Merge convolutions (or linears) of one input whose results are added, the input itself included, into one.

        y = conv2d(x, w3, b3, 1, 1) + conv2d(x, w1, b1) + batch_norm(x)   -->   y = conv2d(x, w, b, 1, 1)

    Assumes constant weights, and that batch norms behind the branches were folded before (fold-norm). One branch's
    kernel must cover the others'. Gives up nothing; where the input is infinite, Inf - Inf may give Inf instead of NaN.
    Source: Ding et al., RepVGG, https://arxiv.org/abs/2101.03697; Diverse Branch Block, https://arxiv.org/abs/2103.13425.
    """

    name: ClassVar[str] = "merge-reparam"

    def run(self, program: Program, ctx: Context) -> int | Refusal:
        """See the class."""
        sites, refusal = 0, None
        for node in list(program.graph.nodes):
            if node._erased or not is_sum(node) or (len(node.users) == 1 and is_sum(next(iter(node.users)))):
                continue
            terms, merged = _terms(node), 0
            for source in dict.fromkeys(layer.source for t in terms if (layer := layer_of(program, t))):
                found = _merge(program, node, terms, source)
                if isinstance(found, list):
                    terms, merged = found, merged + 1
                elif found and refusal is None:
                    refusal = Refusal.at(node, found)
            if merged:
                rewrite.replace(node, _add_up(program, node, terms))
            sites += merged
        return sites or refusal or Refusal("no two linear branches of one input are added")


def is_sum(node: fx.Node) -> bool:
    """Whether a node adds two tensors of its own shape and dtype."""
    if node.target is not aten.add.Tensor or node.kwargs:
        return False
    values = [a.meta.get("val") for a in node.args if isinstance(a, fx.Node)]
    own = node.meta["val"]
    tensors = [v for v in values if isinstance(v, torch.Tensor)]
    return len(tensors) == 2 and all(v.dtype == own.dtype and same(v.shape, own.shape) for v in tensors)


def _terms(root: fx.Node) -> list[fx.Node]:
    found: list[fx.Node] = []
    waiting: list[Any] = list(reversed(root.args))
    while waiting:
        term = waiting.pop()
        if is_sum(term) and len(term.users) == 1:
            waiting += reversed(term.args)
        else:
            found.append(term)
    return found


def _add_up(program: Program, root: fx.Node, terms: list[fx.Node]) -> fx.Node:
    total = terms[0]
    for term in terms[1:]:
        total = program.call(aten.add.Tensor, total, term, before=root, like=root)
    return total


def _merge(program: Program, root: fx.Node, terms: list[fx.Node], source: fx.Node) -> list[fx.Node] | str:
    """The terms with those that are linear in `source` replaced by one, or why not ("": there is only one)."""
    layers = {t: layer for t in terms if (layer := layer_of(program, t)) and layer.source is source}
    template = next(iter(layers.values()))
    for term in terms:
        if term not in layers and (branch := _pointwise(program, term, template)) is not None:
            layers[term] = branch
    members = [t for t in terms if t in layers]
    if len(members) < 2:
        unfolded = (n for t in terms if (n := channelwise_of(program, t)) and n.inner.target in NORMS)
        late = next((n for n in unfolded if (f := layer_of(program, n.source)) and f.source is source), None)
        return f"the batch norm {late.inner.name} of a branch is not folded: run fold-norm first" if late else ""
    shared = next((t for t in members if t is not source and len(t.users) > 1), None)
    if shared is not None:
        return f"the value of {shared.name} is also used outside the sum"
    merged = add_layers([layers[t] for t in members])
    if isinstance(merged, str) or (reason := merged.obstacle()):
        return merged if isinstance(merged, str) else str(reason)
    return [merged.build(program, root), *(t for t in terms if t not in layers)]


def _pointwise(program: Program, term: fx.Node, like: Layer) -> Layer | None:
    """The input itself, or the input times a scale per channel, as a layer with a kernel of size one."""
    one, zero = torch.ones(like.out, dtype=torch.float64), torch.zeros(like.out, dtype=torch.float64)
    if term is not like.source:
        norm = channelwise_of(program, term)
        if norm is None or norm.source is not like.source or not norm.fits(like.channel):
            return None
        one, zero = norm.scale.expand(like.out), norm.shift.expand(like.out)
    fits = int(like.weight.shape[1]) * like.groups == like.out and all(s == 1 for s in like.stride)
    if not fits or like.kind == "embedding" or like.transposed:
        return None
    n = like.weight.dim() - 2
    per_group = like.out // like.groups
    kernel = torch.eye(per_group, dtype=torch.float64, device=one.device).repeat(like.groups, 1)
    branch = replace(like, node=term, weight=kernel.view(*kernel.shape, *[1] * n), bias=None, padding=(0,) * n)
    return branch.then(one, zero)


def add_layers(layers: list[Layer]) -> Layer | str:
    """The sum of layers of one source as one layer in float64, or why there is none."""
    first = layers[0]
    for name in ("kind", "dtype", "stride", "groups", "channel", "transposed"):
        if any(getattr(layer, name) != getattr(first, name) for layer in layers):
            return f"the branches differ in {name}"
    if first.transposed or any(isinstance(layer.padding, str) for layer in layers):
        return "a branch is a transposed convolution or pads its sides unequally"
    cover = max(layers, key=lambda layer: layer.weight[0, 0].numel())
    total = torch.zeros_like(cover.weight, dtype=torch.float64)
    for layer in layers:
        place: list[Any] = [slice(None), slice(None)]
        for i, (k, wide) in enumerate(zip(layer.weight.shape[2:], cover.weight.shape[2:], strict=True)):
            shift = int(cover.padding[i]) - int(layer.padding[i])
            start, rest = divmod(shift, cover.dilation[i])
            if (k > 1 and layer.dilation[i] != cover.dilation[i]) or rest:
                return "the branches differ in dilation"
            if k > wide:
                return "no branch's kernel covers the others"
            if start < 0 or start + k > wide:
                return "the paddings of the branches do not line up"
            place.append(slice(start, start + k))
        total[tuple(place)] += layer.weight.double()
    biases = [layer.bias.double() for layer in layers if layer.bias is not None]
    return replace(cover, weight=total, bias=sum(biases[1:], biases[0]) if biases else None)
