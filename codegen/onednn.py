"""The onednn backend: linear and convolution with prepacked constant weights and the following activation fused in.

Uses torch's own ``mkldnn`` operators (`_linear_pointwise`, `_convolution_pointwise`), which are part of CPU builds of
torch. Weights are reordered once at compile time into the layout that oneDNN chooses for the expected batch.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import fx

from ..passes.errors import LowerError
from ..passes.nodes import arguments
from ..passes.program import Program
from ..targets.target import Target
from .base import Kernel, Region, Schedule
from .eager import op_name

aten = torch.ops.aten

PRODUCTS = (aten.addmm.default, aten.mm.default, aten.matmul.default)  # their weight is [in, out], not [out, in]
LINEARS = (aten.linear.default, *PRODUCTS)
CONVS = (aten.conv2d.default, aten.convolution.default, aten.conv1d.default, aten.conv3d.default)
ADDS = (aten.add.Tensor,)

Post = tuple[str, list[Any], str]  # attribute, scalars and algorithm of oneDNN's post-operation
NO_POST: Post = ("none", [], "")


def post_operation(node: fx.Node) -> Post | None:
    """oneDNN's name for an activation that it computes as torch does, NaN and Inf included; None if it has none."""
    given = arguments(node)
    plain = {aten.sigmoid.default: "sigmoid", aten.tanh.default: "tanh", aten.silu.default: "swish"}
    if node.target in plain:
        return plain[node.target], [], ""
    if node.target is aten.gelu.default:
        return "gelu", [], given["approximate"]
    if node.target is aten.leaky_relu.default:
        return "leaky_relu", [given["negative_slope"]], ""
    return None


def in_place(node: fx.Node) -> Callable[[torch.Tensor], Any] | None:
    """An activation to run in the fresh result: oneDNN's relu and clamp lose NaN, its hardswish loses large numbers."""
    given = arguments(node)
    if any(isinstance(v, fx.Node) for v in [*node.args[1:], *node.kwargs.values()]):
        return None  # a bound that is only known at run time
    if node.target is aten.relu.default:
        return torch.relu_
    if node.target is aten.hardswish.default:
        return torch._C._nn.hardswish_
    if node.target is aten.hardtanh.default:
        low, high = given["min_val"], given["max_val"]
        return lambda value: torch._C._nn.hardtanh_(value, low, high)
    if node.target is aten.clamp.default:
        low, high = given["min"], given["max"]
        return lambda value: torch.clamp_(value, low, high)
    return None


class OnednnBackend:
    """Regions of one linear or convolution with constant weight, then a residual add, then an activation."""

    name = "onednn"

    def __init__(self, program: Program) -> None:
        self.program = program

    def absorbs(self, node: fx.Node) -> bool:
        """None."""
        return False

    def supports(self, region: Region, target: Target) -> str | None:
        """None, or why oneDNN's fused operators do not cover the region."""
        if not torch.backends.mkldnn.is_available():
            return "torch was built without oneDNN"
        root, *rest = region.nodes
        if root.target not in (*LINEARS, *CONVS):
            return f"{op_name(root)} is neither a linear nor a convolution"
        value, given = root.meta.get("val"), _operands(root)
        if not isinstance(value, torch.Tensor) or value.device.type != "cpu" or not _computes(value.dtype):
            return "only float32 on the CPU is prepacked, and bfloat16 where the processor computes in it"
        weight, bias = self._tensor(given["weight"]), self._tensor(given["bias"])
        if weight is None or (given["bias"] is not None and bias is None):
            return "the weight or bias is not a constant"
        if root.target in LINEARS and (reason := _linear_reason(root, weight, bias)):
            return reason
        if root.target in CONVS and (reason := _conv_reason(root)):
            return reason
        if value.numel() == 0 or weight.numel() == 0:
            return "the result or the weight has no elements"
        return _tail_reason(root, rest)

    def space(self, region: Region, target: Target) -> Iterable[Schedule]:
        """Prepacked weights."""
        return (Schedule("packed"),)

    def lower(self, region: Region, target: Target, schedule: Schedule) -> Kernel:
        """One call of torch's fused operator with a weight packed for the expected batch."""
        root, *rest = region.nodes
        given = _operands(root)
        weight, bias = self._tensor(given["weight"]), self._tensor(given["bias"])
        assert weight is not None
        if root.target in PRODUCTS:
            weight = weight.t().contiguous()
        source = region.inputs.index(given["input"])
        added = _other(root, rest[0]) if rest and rest[0].target in ADDS else None
        other = region.inputs.index(added) if added is not None else None
        post = next((p for p in map(post_operation, rest) if p), NO_POST)
        make = _linear if root.target in LINEARS else _convolution
        try:
            call = make(root, weight, bias, source, other, post)
        except RuntimeError as error:  # oneDNN has no primitive for some sizes and types
            raise LowerError(str(error), node=root.name, by=self.name) from error
        call = _finished(call, in_place(rest[-1]) if rest else None)
        name = "_".join(["packed", *(op_name(n) for n in region.nodes)])
        return Kernel(name, self.name, call, source=f"mkldnn::{name}", schedule=schedule)

    def _tensor(self, value: Any) -> torch.Tensor | None:
        return self.program.constant(value)  # None for carried tensors too: they change between calls


def _computes(dtype: torch.dtype) -> bool:
    if dtype is torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype is torch.float32


def _operands(root: fx.Node) -> dict[str, Any]:
    """Input, weight and bias of the root, whatever its operator calls them."""
    given = arguments(root)
    if root.target is aten.addmm.default:
        return given | {"input": given["mat1"], "weight": given["mat2"], "bias": given["self"]}
    if root.target in PRODUCTS:
        first, second = list(given.values())[:2]
        return given | {"input": first, "weight": second, "bias": None}
    return given


def _linear_reason(root: fx.Node, weight: torch.Tensor, bias: torch.Tensor | None) -> str | None:
    given = arguments(root)
    if given.get("beta", 1) != 1 or given.get("alpha", 1) != 1:
        return "the product or the bias is scaled"
    if weight.dim() != 2 or (bias is not None and bias.dim() != 1) or (bias is not None and bias.numel() == 1):
        return "the weight is not a matrix with a bias per column"
    if root.target is aten.matmul.default and _operands(root)["input"].meta["val"].dim() < 2:
        return "a vector times a matrix"
    return None


def _conv_reason(root: fx.Node) -> str | None:
    given = arguments(root)
    if given.get("transposed"):
        return "transposed convolutions are not prepacked"
    if root.meta["val"].dim() != 4:
        return "only two-dimensional convolutions are prepacked"
    return None


def _tail_reason(root: fx.Node, rest: list[fx.Node]) -> str | None:
    """Why the nodes after the root cannot be fused: they must be a chain of at most one add and one activation."""
    for before, node in itertools.pairwise([root, *rest]):
        if list(before.users) != [node]:
            return f"the value of {before.name} is also used elsewhere"
    adds = [n for n in rest if n.target in ADDS]
    acts = [n for n in rest if n.target not in ADDS]
    if len(adds) > 1 or len(acts) > 1 or (adds and rest[0] is not adds[0]):
        return "only one add and then one activation can be fused"
    if adds and (reason := _add_reason(root, adds[0])):
        return reason
    if acts and in_place(acts[0]) is None and (post_operation(acts[0]) is None or adds):
        return f"oneDNN has no post-operation for {op_name(acts[0])} here"
    return None


def _add_reason(root: fx.Node, add: fx.Node) -> str | None:
    other = _other(root, add)
    if other is None or arguments(add)["alpha"] != 1:
        return "the add is not a plain sum with another tensor"
    a, b = other.meta.get("val"), root.meta["val"]
    if not isinstance(a, torch.Tensor) or a.shape != b.shape or a.dtype != b.dtype:
        return "the added tensor has another shape or dtype"
    return None


def _other(root: fx.Node, add: fx.Node) -> fx.Node | None:
    """The tensor that is added to the root's value."""
    operands = [a for a in add.args[:2] if a is not root]
    return operands[0] if len(operands) == 1 and isinstance(operands[0], fx.Node) else None


def _finished(call: Callable[..., Any], last: Callable[[torch.Tensor], Any] | None) -> Callable[..., Any]:
    return call if last is None else lambda *inputs: last(call(*inputs))


def _linear(root: fx.Node, weight: torch.Tensor, bias: torch.Tensor | None, source: int, other: int | None,
            post: Post) -> Callable[..., Any]:  # fmt: skip
    value = _operands(root)["input"].meta["val"]
    rows = [s if isinstance(s, int) else s.node.hint or 1 for s in value.shape[:-1]]
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, torch.Size(rows).numel())
    attribute, scalars, algorithm = post
    if other is not None:
        fused = torch.ops.mkldnn._linear_pointwise.binary
        return lambda *inputs: fused(inputs[source], inputs[other], packed, bias, "add")
    plain = torch.ops.mkldnn._linear_pointwise.default
    return lambda *inputs: plain(inputs[source], packed, bias, attribute, scalars, algorithm)


def _convolution(root: fx.Node, weight: torch.Tensor, bias: torch.Tensor | None, source: int, other: int | None,
                 post: Post) -> Callable[..., Any]:  # fmt: skip
    given = arguments(root)
    value = given["input"].meta["val"]
    size = [s if isinstance(s, int) else s.node.hint or 1 for s in value.shape]
    padding, stride, dilation, groups = given["padding"], given["stride"], given["dilation"], given["groups"]
    padding, stride, dilation = (list(v) * (2 // len(v)) for v in (padding, stride, dilation))
    packed = torch.ops.mkldnn._reorder_convolution_weight(weight, padding, stride, dilation, groups, size)
    attribute, scalars, algorithm = post
    if other is not None:
        fused = torch.ops.mkldnn._convolution_pointwise.binary
        return lambda *inputs: fused(inputs[source], inputs[other], packed, bias, padding, stride, dilation, groups,
                                     "add", 1.0, None, [], None)  # fmt: skip
    plain = torch.ops.mkldnn._convolution_pointwise.default
    return lambda *inputs: plain(inputs[source], packed, bias, padding, stride, dilation, groups,
                                 attribute, scalars, algorithm)  # fmt: skip
