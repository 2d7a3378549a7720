"""What a node costs: floating point operations, bytes moved, and the roofline seconds on a target.

Nodes are calls of ATen operators whose values (fake tensors) are in ``node.meta["val"]``. Symbolic sizes count with
their hint, that is the size of the example input. Conventions:

- a multiply-add is two operations; biases of matrix products and convolutions are not counted;
- an elementwise operation is one operation per output element, whether it is an addition, `exp`, `erf`, `tanh` or
  `gelu`; a softmax counts 5 per element, a normalisation with mean and variance 7, an RMS norm 4, a batch norm 2;
- a reduction is one operation per input element; attention is its two matrix products plus a softmax, over all
  keys (masked ones too);
- views move nothing (`reshape` counts as a view even where it has to copy); every other node reads each distinct
  input once and writes its outputs once; lookups read only the rows that they return; dimensions of stride 0 are
  stored once;
- the sub-graphs of control flow are not counted.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import fx
from torch.utils.flop_counter import flop_registry

from .target import Target

UNKNOWN_SIZE = 1  # for sizes that depend on data and have no hint

MATMULS = {"mm", "bmm", "matmul", "linear", "mv", "dot", "vdot", "inner", "_grouped_mm"}
ADDED_MATMULS = {"addmm", "baddbmm", "addbmm", "addmv"}
CONVOLUTIONS = {"conv1d", "conv2d", "conv3d", "convolution", "_convolution"}
TRANSPOSED = {"conv_transpose1d", "conv_transpose2d", "conv_transpose3d"}
POOLS = {"avg_pool1d", "avg_pool2d", "avg_pool3d", "max_pool1d", "max_pool2d", "max_pool3d", "max_pool2d_with_indices"}
PER_ELEMENT = {
    **dict.fromkeys(("softmax", "_softmax", "log_softmax", "_log_softmax", "_safe_softmax"), 5),
    **dict.fromkeys(("layer_norm", "native_layer_norm", "group_norm", "native_group_norm", "instance_norm"), 7),
    **dict.fromkeys(("rms_norm", "_fused_rms_norm"), 4),
    **dict.fromkeys(("batch_norm", "_native_batch_norm_legit_no_training", "_native_batch_norm_legit"), 2),
}
LOOKUPS = {"embedding", "embedding_bag", "index_select", "gather", "index", "take", "take_along_dim"}
# They copy, fill or convert: bytes, but no arithmetic.
MOVES = LOOKUPS | {
    *("clone", "copy", "copy_", "_to_copy", "to", "type_as", "contiguous", "cat", "concat", "stack", "repeat", "tile"),
    *("repeat_interleave", "constant_pad_nd", "pad", "roll", "flip", "slice_scatter", "select_scatter", "index_put"),
    *("scatter", "index_copy", "arange", "full", "full_like", "zeros", "zeros_like", "ones", "ones_like", "empty"),
    *("empty_like", "new_zeros", "new_ones", "new_full", "new_empty", "scalar_tensor", "lift_fresh_copy", "tril"),
    *("triu", "pixel_shuffle", "pixel_unshuffle", "im2col", "unfold_copy", "sort", "topk", "argsort"),
}
FREE = {"_unsafe_view", "sym_size", "sym_numel", "sym_stride", "dropout", "feature_dropout", "_assert_tensor_metadata"}


def flops(node: fx.Node) -> int:
    """Operations of one call of the node; 0 for views, copies and anything that yields no tensor.

    Raises:
        ValueError: if an operator's value or one of its inputs carries no fake tensor.
    """
    outputs = _tensors(node)
    if not outputs or is_free(node):
        return 0
    name = _name(node)
    if name in MOVES:
        return 0
    out = _numel(outputs[0])
    if name in MATMULS:
        return 2 * out * _size(node, 0, -1)
    if name in ADDED_MATMULS:
        return _added_matmul(node, name, out)
    if name in CONVOLUTIONS | TRANSPOSED:
        return _convolution(node, name, out)
    if name == "scaled_dot_product_attention":
        return _attention(node)
    if name == "einsum":
        return _einsum(str(node.args[0]), [_shape(value) for value in _operands(node)])
    if name in POOLS:
        return out * _window(node, name)
    registered = flop_registry.get(getattr(node.target, "overloadpacket", None))
    if registered is not None:
        return hint(registered(*_values(node.args), **_values(node.kwargs), out_val=node.meta["val"]))
    return _elementwise(node, name, out)


def bytes_moved(node: fx.Node) -> int:
    """Bytes that one call of the node reads and writes, if nothing stays in a cache; 0 for views.

    Raises:
        ValueError: if an operator's value or one of its inputs carries no fake tensor.
    """
    outputs = _tensors(node)
    if not outputs or is_free(node):
        return 0
    written = sum(_stored_bytes(value) for value in outputs)
    sources = list(node.all_input_nodes)
    read = 0
    if _name(node) in LOOKUPS and sources:
        read, sources = _stored_bytes(outputs[0]), sources[1:]
    return written + read + sum(_stored_bytes(value) for source in sources for value in _tensors(source))


def stored_bytes(node: fx.Node) -> int:
    """Bytes of the node's value in memory."""
    return sum(_stored_bytes(value) for value in _tensors(node))


def totals(nodes: Iterable[fx.Node]) -> tuple[int, int]:
    """Operations and bytes of all nodes, each run on its own."""
    pairs = [(flops(node), bytes_moved(node)) for node in nodes]
    return sum(f for f, _ in pairs), sum(b for _, b in pairs)


def seconds(node: fx.Node, target: Target) -> float:
    """Roofline estimate: the longer of computing at peak rate and moving all bytes at full bandwidth.

    The peak is that of the first floating point input's dtype (float32's where the target has none for it).
    """
    peak = target.flops.get(compute_dtype(node)) or target.flops.get("float32") or math.inf
    bandwidth = target.bandwidth or math.inf
    return max(flops(node) / peak, bytes_moved(node) / bandwidth)


def is_free(node: fx.Node) -> bool:
    """Whether the node only renames memory: placeholders, weights, views, items of tuples, and copies that are none."""
    if node.op != "call_function" or node.target is operator.getitem:
        return True
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return isinstance(target, torch._ops.HigherOrderOperator)
    name = _name(node)
    if name in ("to", "contiguous", "type_as"):
        before, after = _tensors(node.all_input_nodes[0])[0], _tensors(node)[0]
        same = before.dtype == after.dtype and before.device == after.device
        return same and _hints(before.stride()) == _hints(after.stride())
    aliases = [value.alias_info for value in target._schema.returns]
    return name in FREE or any(alias is not None and not alias.is_write for alias in aliases)


def _name(node: fx.Node) -> str:
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.split("::")[1]
    return getattr(target, "__name__", str(target))


def _tensors(node: fx.Node) -> list[torch.Tensor]:
    if "val" not in node.meta:
        schema = getattr(node.target, "_schema", None)
        if node.op == "output" or (schema is not None and not schema.returns):
            return []
        raise ValueError(f"node {node.name} carries no fake tensor in meta['val']: run fake-tensor propagation first")
    return list(_flatten(node.meta["val"]))


def _flatten(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _flatten(item)


def hint(size: Any) -> int:
    """A size; of a symbolic one that of the example input."""
    if isinstance(size, torch.SymInt):  # reading the hint, unlike int(), adds no guard
        return int(size.node.hint) if size.node.has_hint() else UNKNOWN_SIZE
    return int(size)


def _hints(sizes: Iterable[Any]) -> tuple[int, ...]:
    return tuple(hint(size) for size in sizes)


def _shape(value: torch.Tensor) -> tuple[int, ...]:
    return _hints(value.shape)


def _numel(value: torch.Tensor) -> int:
    return math.prod(_shape(value))


def _stored_bytes(value: torch.Tensor) -> int:
    sizes = _shape(value)
    if value.layout is torch.strided:
        strides = _hints(value.stride())
        # an expanded dimension repeats the same memory; an empty tensor has none whatever its strides
        sizes = tuple(size if stride or not size else 1 for size, stride in zip(sizes, strides, strict=True))
    return math.prod(sizes) * value.element_size()


def _argument(node: fx.Node, position: int, name: str) -> Any:
    return node.args[position] if position < len(node.args) else node.kwargs.get(name)


def _shape_of(argument: Any) -> tuple[int, ...]:
    return _shape(_tensors(argument)[0])


def _size(node: fx.Node, position: int, dim: int) -> int:
    shape = _shape_of(node.args[position])
    return shape[dim] if shape else 1


def _values(arguments: Any) -> Any:
    return fx.map_arg(arguments, lambda node: node.meta["val"])


def _added_matmul(node: fx.Node, name: str, out: int) -> int:
    batch = _size(node, 1, 0) if name == "addbmm" else 1
    return 2 * batch * out * _size(node, 1, -1)


def _convolution(node: fx.Node, name: str, out: int) -> int:
    # weight: (out, in / groups, *kernel), transposed: (in, out / groups, *kernel)
    per_position = math.prod(_shape_of(node.args[1])[1:])
    backward = name in TRANSPOSED or (
        name in ("convolution", "_convolution") and bool(_argument(node, 6, "transposed"))
    )
    positions = math.prod(_shape_of(node.args[0])) if backward else out
    return 2 * positions * per_position


def _attention(node: fx.Node) -> int:
    query, key, value = (_shape_of(node.args[i]) for i in range(3))
    scores = math.prod(query[:-1]) * key[-2]
    return scores * (2 * query[-1] + 2 * value[-1] + PER_ELEMENT["softmax"])


def _window(node: fx.Node, name: str) -> int:
    dims = int(name.removesuffix("_with_indices")[-2])
    kernel = _argument(node, 1, "kernel_size")
    sizes: Sequence[Any] = kernel if isinstance(kernel, (list, tuple)) else [kernel]
    return math.prod(_hints(sizes if len(sizes) > 1 else [*sizes] * dims))


def _elementwise(node: fx.Node, name: str, out: int) -> int:
    inputs = [_numel(value) for source in node.all_input_nodes for value in _tensors(source)]
    if name in PER_ELEMENT:
        return PER_ELEMENT[name] * out
    tags = getattr(node.target, "tags", ())
    if torch.Tag.pointwise in tags:
        return out
    return max([out, *inputs])  # reductions read more than they write


def compute_dtype(node: fx.Node) -> str:
    """Name of the dtype that a node computes in: that of its first floating point input, if it has one."""
    inputs = [value for source in node.all_input_nodes for value in _tensors(source)]
    floating = [value for value in inputs if value.dtype.is_floating_point]
    chosen = floating or inputs or _tensors(node)
    return str(chosen[0].dtype).removeprefix("torch.") if chosen else "float32"


def _operands(node: fx.Node) -> list[torch.Tensor]:
    return [value for operand in node.args[1] for value in _tensors(operand)]  # type: ignore[union-attr,arg-type]


def _einsum(equation: str, shapes: Sequence[tuple[int, ...]]) -> int:
    """Operations of contracting the operands from left to right, two at a time."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms = [_indices(term, len(shape)) for term, shape in zip(left.split(","), shapes, strict=True)]
    sizes = dict[str, int]()
    for term, shape in zip(terms, shapes, strict=True):
        for index, size in zip(term, shape, strict=True):
            sizes[index] = max(size, sizes.get(index, 1))
    everything = [index for term in terms for index in term]
    if arrow:
        kept = {index for index in everything if index in right or (index.isdigit() and "..." in right)}
    else:
        kept = {index for index in everything if everything.count(index) == 1 or index.isdigit()}
    if len(terms) == 1:
        return math.prod(sizes[index] for index in set(terms[0]))
    total, current = 0, set(terms[0])
    for position, term in enumerate(terms[1:], start=2):
        union = current | set(term)
        needed = kept.union(*terms[position:])
        total += math.prod(sizes[index] for index in union) * (2 if union - needed else 1)
        current = union & needed
    return total


def _indices(term: str, rank: int) -> list[str]:
    """The index of every dimension; those of an ellipsis are numbered from the right."""
    if "..." not in term:
        return list(term)
    before, after = term.split("...")
    hidden = rank - len(before) - len(after)
    return [*before, *(str(hidden - i) for i in range(hidden)), *after]
