"""Affine maps with constant weights: linears, embeddings and convolutions, and scales per channel beside them."""

from __future__ import annotations

import operator
import re
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import fx

from .nodes import arguments, same
from .program import Program
from .values import near_constant

aten = torch.ops.aten

NORMS = (aten.batch_norm.default, aten._native_batch_norm_legit_no_training.default, aten.native_batch_norm.default,
         aten.cudnn_batch_norm.default)  # fmt: skip
CONVS: dict[Any, int] = {
    op: n
    for n in (1, 2, 3)
    for op in (getattr(aten, f"conv{n}d").default, getattr(aten, f"conv{n}d").padding,
               aten.conv_transpose1d.default if n == 1 else getattr(aten, f"conv_transpose{n}d").input)
}  # fmt: skip
CONVS[aten.convolution.default] = 0


@dataclass(frozen=True, eq=False)
class Layer:
    """An affine map with constant weights: a linear, embedding or convolution.

    Attributes:
        node: the node that yields its value.
        source: what it is applied to.
        name: name of its weight.
        weight: [out, in / groups, *kernel]; of a transposed convolution [in, out / groups, *kernel]. Embeddings are
            linears on one-hot rows. Any floating dtype; maps that are computed from others are in float64.
        bias: [out] or None.
        dtype: of the values and of the weights when built.
        rank: number of dimensions of its value.
        kind: ``linear``, ``embedding`` or ``conv``.
    """

    node: fx.Node
    source: fx.Node
    name: str
    weight: torch.Tensor
    bias: torch.Tensor | None
    dtype: torch.dtype
    rank: int
    kind: str
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] | str = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    transposed: bool = False
    output_padding: tuple[int, ...] = ()

    @property
    def channel(self) -> int:
        """The dimension of the value that holds the output channels."""
        return self.rank - 1 - (self.weight.dim() - 2)

    @property
    def padded(self) -> bool:
        """Whether it reads zeros from beyond the border of its source."""
        return self.padding == "same" or (not isinstance(self.padding, str) and any(self.padding))

    @property
    def out(self) -> int:
        """Number of output channels."""
        return int(self.weight.shape[1]) * self.groups if self.transposed else int(self.weight.shape[0])

    def then(self, scale: torch.Tensor, shift: torch.Tensor) -> Self:
        """This map followed by ``y * scale + shift``, both [out] or [1], in float64."""
        scale, shift = scale.expand(self.out), shift.expand(self.out)
        weight, tail = self.weight.double(), [1] * (self.weight.dim() - 2)
        if self.transposed:
            grouped = weight.unflatten(0, (self.groups, -1)) * scale.view(self.groups, 1, -1, *tail)
            weight = grouped.flatten(0, 1)
        else:
            weight = weight * scale.view(-1, 1, *tail)
        bias = shift if self.bias is None else self.bias.double() * scale + shift
        return replace(self, weight=weight, bias=None if self.bias is None and not shift.any() else bias)

    def after(self, scale: torch.Tensor, shift: torch.Tensor) -> Self:
        """``x * scale + shift``, both [in] or [1], followed by this map, in float64; neither transposed nor padded."""
        tail = [1] * (self.weight.dim() - 2)
        size = int(self.weight.shape[1]) * self.groups
        grouped = self.weight.double().unflatten(0, (self.groups, -1))
        weight = (grouped * scale.expand(size).view(self.groups, 1, -1, *tail)).flatten(0, 1)
        added = (grouped * shift.expand(size).view(self.groups, 1, -1, *tail)).flatten(0, 1).flatten(1).sum(1)
        bias = added if self.bias is None else self.bias.double() + added
        return replace(self, weight=weight, bias=None if self.bias is None and not added.any() else bias)

    def obstacle(self) -> str | None:
        """Why the weights cannot be rounded to the layer's dtype: a value outside its range."""
        parts = [self.weight] + ([] if self.bias is None else [self.bias])
        finite = all(bool(p.to(self.dtype).isfinite().all()) for p in parts)
        return None if finite else f"a folded weight of {self.name} is not finite in {self.dtype}"

    def build(self, program: Program, before: fx.Node) -> fx.Node:
        """Add the weights, rounded once, and the call; returns the node that yields the value."""
        tensor = self.weight.t() if self.kind == "embedding" else self.weight
        stem = re.sub(r"(_\d+)+$", "", self.name)  # a weight that was folded before has the name of the first
        tensor = tensor.to(
            self.dtype
        )  # a convolution's weight keeps its memory format, which decides that of the result
        weight = program.weight(stem, tensor if self.kind == "conv" else tensor.contiguous())
        bias = None
        if self.bias is not None:
            beside = re.sub(r"\.?weight$", "", stem) + ".bias"
            bias = program.weight(beside, self.bias.to(self.dtype).contiguous())
        args: tuple[Any, ...] = (self.source, weight, bias)
        if self.kind == "linear":
            return program.call(aten.linear.default, *args, before=before, like=self.node)
        if self.kind == "embedding":
            return program.call(aten.embedding.default, weight, self.source, before=before, like=self.node)
        n = self.weight.dim() - 2
        geometry = [self.padding if isinstance(p := self.padding, str) else list(p), list(self.dilation)]
        if self.transposed:
            op = aten.conv_transpose1d.default if n == 1 else getattr(aten, f"conv_transpose{n}d").input
            args += (list(self.stride), geometry[0], list(self.output_padding), self.groups, geometry[1])
        else:
            overloads = getattr(aten, f"conv{n}d")
            op = overloads.padding if isinstance(self.padding, str) else overloads.default
            args += (list(self.stride), *geometry, self.groups)
        return program.call(op, *args, before=before, like=self.node)


def layer_of(program: Program, node: Any) -> Layer | None:
    """The affine map that a node applies, None if it applies none or its weights are not constant."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return None
    found = _linear(program, node) or _flattened(program, node) or _convolution(program, node)
    if found is None or not found.dtype.is_floating_point or found.weight.dtype != found.dtype:
        return None
    return found


def _linear(program: Program, node: fx.Node) -> Layer | None:
    args, kind, bias = arguments(node), "linear", None
    match node.target:
        case aten.linear.default:
            source, weight, bias, turned = args["input"], args["weight"], args["bias"], False
        case aten.embedding.default:
            source, weight, kind, turned = args["indices"], args["weight"], "embedding", True
        case aten.addmm.default if args["beta"] == args["alpha"] == 1:
            source, weight, bias, turned = args["mat1"], args["mat2"], args["self"], True
        case aten.mm.default:
            source, weight, turned = args["self"], args["mat2"], True
        case aten.matmul.default:
            source, weight, turned = args["self"], args["other"], True
        case _:
            return None
    tensor, added = near_constant(program, weight), near_constant(program, bias)
    if tensor is None or tensor.dim() != 2 or not isinstance(source, fx.Node) or (bias is not None and added is None):
        return None
    tensor = tensor.t() if turned else tensor
    if added is not None and added.shape != tensor.shape[:1]:
        return None
    value = node.meta["val"]
    return Layer(node, source, _name(node, weight), tensor, added, value.dtype, value.dim(), kind)


def _flattened(program: Program, node: fx.Node) -> Layer | None:
    """view(addmm(bias, view(x, [-1, in]), weight), [..., out]): a linear over the last dimension of x."""
    views = (aten.view.default, aten.reshape.default)
    inner: Any = node.args[0] if node.target in views else None
    if not isinstance(inner, fx.Node) or inner.target not in (aten.addmm.default, aten.mm.default):
        return None
    layer = _linear(program, inner)
    if layer is None or layer.source.target not in views or len(inner.users) > 1:
        return None
    source: Any = layer.source.args[0]
    before, after = source.meta["val"], node.meta["val"]
    if before.shape[-1:] != (layer.weight.shape[1],) or after.shape[-1:] != (layer.out,):
        return None
    if not same(before.shape[:-1], after.shape[:-1]):
        return None
    return replace(layer, node=node, source=source, rank=after.dim())


def _convolution(program: Program, node: fx.Node) -> Layer | None:
    if node.target not in CONVS:
        return None
    args, value = arguments(node), node.meta["val"]
    weight, bias = near_constant(program, args["weight"]), near_constant(program, args["bias"])
    if weight is None or (args["bias"] is not None and bias is None):
        return None
    n = weight.dim() - 2

    def sizes(name: str, default: int = 0) -> tuple[int, ...]:
        given = args.get(name, default)
        given = tuple(given) if isinstance(given, (list, tuple)) else (given,)
        return given * n if len(given) == 1 else given

    stride, dilation = sizes("stride"), sizes("dilation")
    padding: Any = args["padding"] if isinstance(args["padding"], str) else sizes("padding")
    reach = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
    if padding == "valid" or (padding == "same" and all(r % 2 == 0 for r in reach)):
        padding = tuple(r // 2 if padding == "same" else 0 for r in reach)
    transposed = args.get("transposed", "conv_transpose" in str(node.target))
    return Layer(node, args["input"], _name(node, args["weight"]), weight, bias, value.dtype, value.dim(), "conv",
                 stride, padding, dilation, args["groups"], transposed, sizes("output_padding"))  # fmt: skip


def _name(node: fx.Node, weight: Any) -> str:
    while isinstance(weight, fx.Node) and weight.op != "get_attr" and weight.all_input_nodes:
        weight = weight.all_input_nodes[0]
    return str(weight.target) if isinstance(weight, fx.Node) and weight.op == "get_attr" else f"{node.name}.weight"


@dataclass(frozen=True, eq=False)
class Channelwise:
    """``source * scale + shift`` along one dimension; scale and shift are [channels] or [1] in float64.

    `inner` is the node that reads `source`: the norm itself, where `node` only takes its first result.
    """

    node: fx.Node
    inner: fx.Node
    source: fx.Node
    scale: torch.Tensor
    shift: torch.Tensor
    dim: int | None  # None for the same scale and shift everywhere

    def fits(self, channel: int) -> bool:
        """Whether it scales along dimension `channel`."""
        return self.dim is None or self.dim == channel


def channelwise_of(program: Program, node: fx.Node, casts: bool = False) -> Channelwise | None:
    """The scale and shift that a batch norm, or arithmetic with a constant per channel, applies; else None.

    With `casts` the result may be of another floating dtype than the source.
    """
    value = node.meta.get("val")
    if node.op != "call_function" or not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return None
    found = _norm(program, node) or _arithmetic(program, node)
    if found is None:
        return None
    before = found.source.meta.get("val")
    if not isinstance(before, torch.Tensor) or not before.is_floating_point() or not same(before.shape, value.shape):
        return None
    return found if casts or before.dtype == value.dtype else None


def _norm(program: Program, node: fx.Node) -> Channelwise | None:
    inner: Any = node.args[0] if node.target is operator.getitem and node.args[1] == 0 else node
    if not isinstance(inner, fx.Node) or inner.target not in NORMS:
        return None
    args = list(arguments(inner).values())
    named = arguments(inner)
    if named.get("training", False):
        return None
    source, weight, bias, mean, var = args[:5]
    tensors = [near_constant(program, v) for v in (weight, bias, mean, var)]
    if (
        tensors[2] is None
        or tensors[3] is None
        or any(t is None and v is not None for t, v in zip(tensors, (weight, bias, mean, var), strict=True))
    ):
        return None
    gamma, beta, center, variance = (None if t is None else t.double() for t in tensors)
    assert center is not None and variance is not None
    scale = (variance + float(named["eps"] if "eps" in named else named["epsilon"])).rsqrt()
    scale = scale if gamma is None else scale * gamma
    shift = -center * scale if beta is None else beta - center * scale
    return Channelwise(node, inner, source, scale, shift, 1)


def _arithmetic(program: Program, node: fx.Node) -> Channelwise | None:
    if node.target not in (aten.mul.Tensor, aten.div.Tensor, aten.add.Tensor, aten.sub.Tensor) or node.kwargs:
        return None
    a, b = node.args[:2]
    if node.target in (aten.mul.Tensor, aten.add.Tensor) and near_constant(program, b) is None:
        a, b = (b, a) if near_constant(program, a) is not None else (a, b)
    number = isinstance(b, (int, float)) and not isinstance(b, bool)
    tensor = torch.tensor(b, dtype=torch.float64) if number else near_constant(program, b)
    if not isinstance(a, fx.Node) or tensor is None or tensor.is_complex():
        return None
    wide = [i for i, s in enumerate(tensor.shape) if s != 1]
    if len(wide) > 1:
        return None
    dim = node.meta["val"].dim() - tensor.dim() + wide[0] if wide else None
    numbers = tensor.double().reshape(-1)
    one, zero = torch.ones_like(numbers), torch.zeros_like(numbers)
    if node.target in (aten.mul.Tensor, aten.div.Tensor):
        return Channelwise(node, node, a, numbers if node.target is aten.mul.Tensor else 1 / numbers, zero, dim)
    return Channelwise(node, node, a, one, numbers if node.target is aten.add.Tensor else -numbers, dim)
