"""Rules for operators that compute: what meets is one axis, what is summed over or normalised is mixed."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from .axis import ONE, Dim, Site, Unknown
from .axis_views import VIEWS, Rule, broadcast, getitem
from .nodes import expression, operator_name

# The first argument's dimensions, element by element; other arguments have no say in them.
ALIKE = """clone contiguous to _to_copy type_as alias detach dropout feature_dropout bernoulli zeros_like ones_like
full_like empty_like rand_like randn_like nan_to_num bucketize lift_fresh_copy fill""".split()
# The first argument's dimensions, but what an element becomes depends on its place.
PLACED = """triu tril scatter scatter_add scatter_reduce index_put index_add index_fill select_scatter
slice_scatter""".split()
# The same sizes, with the dimension `dim` mixed.
ALONG = """softmax _softmax log_softmax _log_softmax _safe_softmax cumsum cumprod logcumsumexp flip roll
argsort""".split()
REDUCTIONS = """mean sum amax amin var std prod any all logsumexp argmax argmin norm linalg_vector_norm
count_nonzero""".split()
PAIRS = ("max", "min", "sort", "topk", "median", "kthvalue", "cummax", "cummin", "mode", "var_mean", "std_mean")
MADE = """arange full zeros ones empty eye linspace scalar_tensor rand randn randint tril_indices triu_indices
new_ones new_zeros new_full new_empty""".split()
# Elementwise, though not tagged so.
ELEMENTWISE = """__and__ __or__ __xor__ __lshift__ __rshift__ hardswish hardsigmoid _weight_norm prelu lerp masked_fill
where clamp copy floor_divide""".split()
FOURIER = "fft_fft fft_ifft fft_fft2 fft_ifft2 fft_fftn fft_ifftn fft_rfft fft_irfft fft_rfft2 fft_irfft2".split()
CHANNEL_NORMS = ("batch_norm", "group_norm", "instance_norm", "_native_batch_norm_legit_no_training")
NORMS = ("layer_norm", "rms_norm", "native_layer_norm", "_fused_rms_norm")
POOLS = ("max_pool", "avg_pool", "adaptive_avg_pool", "adaptive_max_pool", "upsample", "pixel_shuffle")


def elementwise(s: Site) -> list[Dim]:
    """What is brought together element by element is one axis."""
    return broadcast(s, list(s.tensors()))


def like_first(s: Site) -> list[Dim]:
    """The sizes of the first argument; where the others come in does not matter to them."""
    return next(s.tensors())


def along(s: Site) -> list[Dim]:
    """The sizes of the argument, mixed along `dim`."""
    dims = like_first(s)
    chosen = s.args.get("dim", s.args.get("dims", ()))
    for d in [chosen] if isinstance(chosen, int) else chosen or range(len(dims)):
        s.mix(dims[d % len(dims)])
    return dims


def _reduced(s: Site, dims: list[Dim]) -> list[Dim]:
    chosen, rank = s.args.get("dim"), len(dims)
    listed = [chosen] if isinstance(chosen, int) else list(chosen or range(rank))
    gone = {d % rank for d in listed} if rank else set()
    s.mix(*(dims[d] for d in gone))
    if s.args.get("keepdim"):
        return [() if k in gone else d for k, d in enumerate(dims)]
    return [d for k, d in enumerate(dims) if k not in gone]


def reduction(s: Site) -> list[Dim]:
    """The reduced dimensions are mixed and go."""
    return _reduced(s, like_first(s))


def pairs(s: Site) -> Any:
    """Values with indices: a reduction, or the same sizes with one dimension reordered or cut."""
    dims = like_first(s)
    if not isinstance(s.node.meta["val"], (tuple, list)):
        return elementwise(s) if len(s.node.all_input_nodes) > 1 else reduction(s)
    rank = len(dims)
    if operator_name(s.node) in ("sort", "topk", "cummax", "cummin"):
        dim = s.args.get("dim", -1) % rank
        s.mix(dims[dim])
        whole = expression(s.args["self"].meta["val"].shape[dim]) == s.sizes(0)[dim]
        dims[dim] = dims[dim] if whole else s.fresh(dim, 0)
        return (dims, list(dims))
    found = _reduced(s, dims)
    return tuple(list(found) for _ in s.node.meta["val"])


def made(s: Site) -> list[Dim]:
    """New axes."""
    return [s.fresh(k) for k in range(len(s.sizes()))]


def linear(s: Site) -> list[Dim]:
    """x W^T + b: the features meet, and are mixed."""
    x, w = s.dims("input"), s.dims("weight")
    s.unify(x[-1], w[-1])
    s.mix(x[-1])
    if len(w) == 1:
        return x[:-1]
    if isinstance(s.args.get("bias"), fx.Node):
        s.unify(w[0], s.dims("bias")[-1])
    return [*x[:-1], w[0]]


def product(s: Site) -> list[Dim]:
    """Matrix products: the inner dimensions meet and are mixed, leading ones are broadcast."""
    names = {
        "addmm": ("mat1", "mat2"),
        "baddbmm": ("batch1", "batch2"),
        "mv": ("self", "vec"),
        "dot": ("self", "tensor"),
    }
    name = operator_name(s.node)
    first, second = names.get(name, ("self", "other" if "other" in s.args else "mat2"))
    a, b = s.dims(first), s.dims(second)
    inner = b[-2] if len(b) > 1 else b[-1]
    s.unify(a[-1], inner)
    s.mix(a[-1] or inner)
    lead = broadcast(s, [a[:-2], b[:-2]])
    result = [*lead, *a[-2:-1], *(b[-1:] if len(b) > 1 else [])]
    if name in ("addmm", "baddbmm"):
        broadcast(s, [result, s.dims("self")])
    return result


def einsum(s: Site) -> list[Dim]:
    """Dimensions of the same letter are one axis; letters that the result lacks are mixed."""
    inputs, _, output = s.args["equation"].replace(" ", "").partition("->")
    if "." in inputs or not output:
        raise Unknown("an einsum with an ellipsis or without its result")
    known: dict[str, Dim] = {}
    for letters, operand in zip(inputs.split(","), s.args["tensors"], strict=True):
        for letter, dim in zip(letters, s.dims_of(operand), strict=True):
            s.unify(known.get(letter, ()), dim)
            known[letter] = known.get(letter) or dim
    s.mix(*(d for letter, d in known.items() if letter not in output))
    return [known[letter] for letter in output]


def attention(s: Site) -> list[Dim]:
    """Queries meet keys in their features; every query mixes all keys. Heads may be grouped."""
    q, k, v = (s.dims(n) for n in ("query", "key", "value"))
    for a, b in ((q[-1], k[-1]), (k[-2], v[-2])):
        s.unify(a, b)
    s.mix(k[-2], q[-1])
    heads = [expression(s.args[n].meta["val"].shape[-3]) for n in ("query", "key")] if len(q) > 2 else []
    shared = q[:-2]
    if heads and heads[0] != heads[1] and heads[1] != ONE:
        s.unify(k[-3], v[-3])
        parts = s.axes.resolve(q[-3])
        if len(parts) != 1:
            raise Unknown("grouped heads that are more than one axis")
        outer, _ = s.axes.split(parts[0], heads[1])
        s.unify((outer,), k[-3])
        shared = [*broadcast(s, [q[:-3], k[:-3], v[:-3]]), q[-3]]
    else:
        shared = broadcast(s, [q[:-2], k[:-2], v[:-2]])
    if isinstance(s.args.get("attn_mask"), fx.Node):
        broadcast(s, [[*shared, q[-2], k[-2]], s.dims("attn_mask")])
    return [*shared, q[-2], v[-1]]


def norm(s: Site) -> Any:
    """Normalised over the last dimensions."""
    x = s.dims("input")
    count = len(s.args["normalized_shape"])
    s.mix(*x[len(x) - count :])
    for name in ("weight", "bias"):
        if isinstance(s.args.get(name), fx.Node):
            broadcast(s, [x, s.dims(name)])
    value = s.node.meta["val"]
    if isinstance(value, (tuple, list)):
        return (x, *([*x[: len(x) - count], *[()] * count] for _ in value[1:]))
    return x


def channel_norm(s: Site) -> Any:
    """batch_norm, group_norm, instance_norm: scale and shift belong to dimension 1."""
    x = next(s.tensors())
    name = operator_name(s.node)
    if "batch_norm" not in name:
        s.mix(*x[1:] if "group" in name else x[2:])
    for other in ("weight", "bias", "running_mean", "running_var"):
        if isinstance(s.args.get(other), fx.Node):
            s.unify(x[1], s.dims(other)[0])
    value = s.node.meta["val"]
    return (x, *([s.fresh(k, i) for k in range(v.dim())] for i, v in enumerate(value[1:], 1))) if isinstance(
        value, (tuple, list)) else x  # fmt: skip


def convolution(s: Site) -> list[Dim]:
    """Channels meet the weight's; a spatial dimension is kept where the window is one element, else mixed."""
    x, w = s.dims("input"), s.dims("weight")
    groups = s.args.get("groups", 1)
    if s.args.get("transposed"):
        raise Unknown("a transposed convolution")
    if groups == 1:
        s.unify(x[1], w[1])
        s.mix(x[1])
    out = w[0]
    depthwise = groups != 1 and expression(s.args["input"].meta["val"].shape[1]) == groups
    if depthwise and s.sizes()[1] == groups:
        s.unify(x[1], w[0])
    elif groups != 1:
        s.mix(x[1])
    if isinstance(s.args.get("bias"), fx.Node):
        s.unify(out, s.dims("bias")[0])
    found, window = [x[0], out], s.args["weight"].meta["val"].shape[2:]
    for k, taps in enumerate(window, 2):
        same = s.sizes()[k] == expression(s.args["input"].meta["val"].shape[k])
        if not (same and taps == 1):
            s.mix(x[k])
        found.append(x[k] if same else s.fresh(k))
    return found


def resampled(s: Site) -> list[Dim]:
    """Pooling and resizing: sizes that change are new axes."""
    dims = next(s.tensors())
    before = [expression(n) for n in s.node.all_input_nodes[0].meta["val"].shape]
    found = []
    for k, (dim, old, new) in enumerate(zip(dims, before, s.sizes(), strict=True)):
        found.append(dim if old == new and k < 2 else s.fresh(k))
        if k >= 2:
            s.mix(dim)
    return found


def pad(s: Site) -> list[Dim]:
    """Dimensions that grow are new axes."""
    dims, widths = s.dims("self"), s.args["pad"]
    for k in range(len(widths) // 2):
        if widths[2 * k] != 0 or widths[2 * k + 1] != 0:
            s.mix(dims[-1 - k])
            dims[-1 - k] = s.fresh(len(dims) - 1 - k)
    return dims


def resized(s: Site) -> list[Dim]:
    """Dimensions whose sizes change are new axes, and mixed."""
    dims = next(s.tensors())
    before = [expression(n) for n in s.node.all_input_nodes[0].meta["val"].shape]
    if len(before) != len(s.sizes()):
        raise Unknown("a result of another rank")
    for k, (old, new) in enumerate(zip(before, s.sizes(), strict=True)):
        if old != new:
            s.mix(dims[k])
            dims[k] = s.fresh(k)
    return dims


def fourier(s: Site) -> list[Dim]:
    """Transformed dimensions are mixed; what they count afterwards is not what they counted before."""
    dims = next(s.tensors())
    chosen = s.args.get("dim", range(len(dims)))
    for d in [chosen] if isinstance(chosen, int) else chosen or range(len(dims)):
        k = d % len(dims)
        s.mix(dims[k])
        dims[k] = s.fresh(k)
    return dims


def meshgrid(s: Site) -> tuple[list[Dim], ...]:
    """Every result has the dimensions of all arguments."""
    grid = [s.dims_of(t)[0] if s.dims_of(t) else () for t in s.args["tensors"]]
    if s.args.get("indexing") == "xy" and len(grid) > 1:
        grid[0], grid[1] = grid[1], grid[0]
    return tuple(list(grid) for _ in s.node.meta["val"])


def widened(s: Site) -> list[Dim]:
    """A transposed convolution: channels are the weight's, all spatial dimensions are new."""
    x, w = s.dims("input"), s.dims("weight")
    s.unify(x[1], w[0])
    s.mix(*x[1:])
    return [x[0], w[1] if s.args.get("groups", 1) == 1 else s.fresh(1), *(s.fresh(k) for k in range(2, len(x)))]


def view_as_real(s: Site) -> list[Dim]:
    """One more dimension: real and imaginary part."""
    return [*s.dims("self"), s.fresh(len(s.sizes()) - 1)]


def view_as_complex(s: Site) -> list[Dim]:
    """Real and imaginary part become one element."""
    return s.dims("self")[:-1]


RULES: dict[str, Rule] = {
    **dict.fromkeys((*ALIKE, *PLACED), like_first), **dict.fromkeys(ALONG, along),
    **dict.fromkeys(REDUCTIONS, reduction),
    **dict.fromkeys(PAIRS, pairs), **dict.fromkeys(MADE, made), **dict.fromkeys(NORMS, norm),
    **dict.fromkeys(("mm", "bmm", "matmul", "addmm", "baddbmm", "mv", "dot"), product),
    **dict.fromkeys(CHANNEL_NORMS, channel_norm), **dict.fromkeys(ELEMENTWISE, elementwise),
    **dict.fromkeys(FOURIER, fourier), "meshgrid": meshgrid, "conv_transpose2d": widened, "conv_transpose1d": widened,
    "view_as_real": view_as_real, "view_as_complex": view_as_complex, "diff": resized, "repeat_interleave": resized,
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "convolution"), convolution),
    "linear": linear, "einsum": einsum, "scaled_dot_product_attention": attention,
    "pad": pad, "constant_pad_nd": pad, **VIEWS,
}  # fmt: skip


def by_element(node: fx.Node) -> bool:
    """Whether an element of the result depends on the arguments' elements at its own place only."""
    name = operator_name(node)
    return name in ALIKE or name in ELEMENTWISE or torch.Tag.pointwise in getattr(node.target, "tags", ())


def rule_of(node: fx.Node) -> Rule | None:
    """The rule of a node's operator, None if there is none."""
    if node.target is operator.getitem:
        return getitem
    if not isinstance(node.target, torch._ops.OpOverload):
        return _number if not isinstance(node.meta.get("val"), torch.Tensor) else None
    name = operator_name(node)
    if name in RULES:
        return RULES[name]
    if any(name.startswith(p) for p in POOLS) and isinstance(node.meta["val"], torch.Tensor):
        return resampled
    if torch.Tag.pointwise in node.target.tags:
        return elementwise
    return _number if not isinstance(node.meta.get("val"), (torch.Tensor, tuple, list)) else None


def _number(s: Site) -> None:
    """A number or nothing: it has no axes."""
