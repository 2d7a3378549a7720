"""The operators of the fuzzer: a name, how to call it on tensors and knobs, and how to draw those."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import fuzz_draws as draw
import torch
import torch.nn.functional as F
from fuzz_draws import Op, away, binary, number, reduction, unary
from torch import Tensor

HALF = [torch.bfloat16, torch.float16]
FLOATS = [torch.float32, torch.float32, *HALF]


def operators() -> dict[str, Op]:
    """Every operator by name."""
    table = [*pointwise(), *jumps(), *reductions(), *layers(), *moves(), *lookups(), *casts()]
    return {op.name: op for op in table}


def pointwise() -> list[Op]:
    """Unary and binary functions; the operands broadcast and promote."""
    smooth = (torch.sin, torch.cos, torch.exp, torch.tanh, torch.sigmoid, torch.erf, torch.expm1, torch.square, F.silu,
              F.softplus, F.elu, F.mish, F.hardswish, F.hardsigmoid, F.logsigmoid, F.relu6, torch.atan)  # fmt: skip
    poled = (torch.sqrt, torch.rsqrt, torch.log, torch.log2, torch.reciprocal)
    calm = (torch.neg, torch.abs, torch.relu)
    both = (torch.add, torch.sub, torch.mul)
    pick = (torch.maximum, torch.minimum)
    return [
        *(Op(fn.__name__, fn, unary()) for fn in smooth),
        *(Op(fn.__name__, away(fn), draw.poled) for fn in poled),
        *(Op(fn.__name__, fn, unary(), rounds=False) for fn in calm),
        *(Op(fn.__name__, fn, binary()) for fn in both),
        *(Op(fn.__name__, fn, binary(), rounds=False) for fn in pick),
        Op("gelu", F.gelu, unary(approximate=["none", "tanh"])),
        Op("leaky_relu", F.leaky_relu, unary(negative_slope=[0.01, 0.3])),
        Op("clamp", torch.clamp, unary(min=[-1.0, None], max=[0.5, 2.0]), rounds=False),
        Op("pow", lambda x, power: x**power, unary(power=[2, 3, 0, 1])),
        Op("scaled_add", lambda x, alpha: torch.add(x, 1, alpha=alpha), unary(alpha=[2, 0.5, -1])),
        Op("rsub", lambda x, from_: from_ - x, unary(from_=[1, 0.0, 2.5])),
        Op("times", lambda x, by: x * by, unary(by=[0, 1, -1, 2.0, 0.1, 1e-3])),
        Op("div", lambda x, y, safe: x / (y.abs() + 0.5 if safe else y), draw.divide),
        Op("lerp", lambda x, y: torch.lerp(x, y, 0.3), binary(fits=torch.is_floating_point)),
        Op("addcmul", lambda x, y: torch.addcmul(x, y, y, value=0.5), binary(fits=torch.is_floating_point)),
        Op("where", torch.where, draw.choice, rounds=False),
        Op("masked_fill", lambda m, x, y: x.masked_fill(m, 2.0) + y, draw.choice),
        Op("add_in_place", lambda x, y: (x + y).mul_(0.5).add_(1.0), binary(fits=torch.is_floating_point)),
        Op("fill_part", fill_part, draw.along(), rounds=False),
    ]


def fill_part(x: Tensor, dim: int) -> Tensor:
    """Write into a slice of a copy."""
    y = x.clone()
    y.narrow(dim, 0, x.shape[dim] // 2).fill_(0.5)
    return y


def jumps() -> list[Op]:
    """Functions with jumps: exact operands only."""
    compare = (torch.gt, torch.ge, torch.lt, torch.le, torch.eq, torch.ne)
    steps = (torch.floor, torch.ceil, torch.round, torch.trunc, torch.sign, torch.isnan, torch.isfinite)
    logic = (torch.logical_and, torch.logical_or, torch.logical_xor)
    truth = binary(fits=lambda v: v.dtype == torch.bool)
    return [
        *(Op(fn.__name__, fn, binary(exact=True), rounds=False) for fn in compare),
        *(Op(fn.__name__, fn, unary(exact=True), rounds=False) for fn in steps),
        *(Op(fn.__name__, fn, truth, rounds=False) for fn in logic),
        Op("above", lambda x, bound: x > bound, unary(exact=True, bound=[0, 0.5, -1]), rounds=False),
        Op("logical_not", torch.logical_not, cast_free(torch.bool), rounds=False),
        Op("atan2", torch.atan2, binary(exact=True, fits=torch.is_floating_point)),
        Op("argmax", lambda x, dim: x.argmax(dim), draw.along(exact=True), rounds=False),
        Op("sort", lambda x, dim: torch.sort(x, dim=dim, stable=True), draw.along(exact=True), rounds=False),
        Op("topk", lambda x, dim: x.topk((x.shape[dim] + 1) // 2, dim)[0], draw.along(exact=True), rounds=False),
        Op("one_hot", lambda i: F.one_hot(i.remainder(5), 5), cast_free(torch.int64), rounds=False),
    ]


def cast_free(dtype: torch.dtype) -> Callable[[draw.Draw], draw.Drawn]:
    """One operand of a dtype."""
    return lambda d: ([d.pick(lambda v: v.dtype == dtype)], {})


def reductions() -> list[Op]:
    """Reductions, scans and softmaxes."""
    many = (torch.sum, torch.mean, torch.logsumexp, torch.std, torch.var)
    ends = (torch.amax, torch.amin)
    single = {"prod": torch.prod, "cumsum": torch.cumsum, "softmax": torch.softmax, "log_softmax": torch.log_softmax}
    return [
        *(Op(fn.__name__, fn, reduction()) for fn in many),
        *(Op(fn.__name__, fn, reduction(), rounds=False) for fn in ends),
        *(Op(name, fn, draw.along()) for name, fn in single.items()),
        Op("int_sum", torch.sum, reduction(fits=lambda v: not v.is_floating_point()), rounds=False),
        Op("max_values", lambda x, dim: x.max(dim).values, draw.along(), rounds=False),
        Op("cummax", lambda x, dim: x.cummax(dim).values, draw.along(), rounds=False),
        Op("vector_norm", torch.linalg.vector_norm, reduction()),
        Op("any", lambda x, dim: x.any(dim), draw.along(fits=lambda v: v.dtype == torch.bool), rounds=False),
        Op("softmin", lambda x, dim: torch.softmax(-x * 0.5, dim), draw.along()),
        Op("wide_softmax", lambda x, dim: x.softmax(dim, dtype=wider(x)).to(x.dtype), draw.along()),
    ]


def wider(x: Tensor) -> torch.dtype:
    """float32, or float64 in the reference."""
    return torch.promote_types(x.dtype, torch.float32)


def layers() -> list[Op]:
    """Norms, products, convolutions, pooling, attention."""

    def batch_norm(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        return F.batch_norm(x, mean, var, weight, bias)

    def own_rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return weight * (x.to(wider(x)).pow(2).mean(-1, keepdim=True) + eps).rsqrt().to(x.dtype) * x

    def attend(x: Tensor, mask: Tensor | None = None, **knobs: Any) -> Tensor:
        return F.scaled_dot_product_attention(x, x * 0.5, x + 1.0, attn_mask=mask, **knobs)

    def written_out(x: Tensor, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
        scores = x @ x.transpose(-2, -1) * (scale or 1 / math.sqrt(max(x.shape[-1], 1)))
        return torch.softmax(scores if mask is None else scores + mask, -1) @ x

    def norm(fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x, *w, eps: fn(x, x.shape[-1:], *w, eps=eps)

    return [
        Op("layer_norm", norm(F.layer_norm), draw.normed("weight", "bias")),
        Op("layer_norm_plain", norm(F.layer_norm), draw.normed()),
        Op("rms_norm", norm(F.rms_norm), draw.normed("weight")),
        Op("own_rms_norm", own_rms, draw.normed("weight")),
        Op("group_norm", lambda x, w, b, groups: F.group_norm(x, groups, w, b), draw.channels(2, groups=True)),
        Op("batch_norm", batch_norm, draw.channels(4)),
        Op("linear", F.linear, draw.linear(bias=True)),
        Op("linear_plain", F.linear, draw.linear(bias=False)),
        Op("linear_gelu", lambda *a: F.gelu(F.linear(*a)), draw.linear(bias=True)),
        Op("matmul", lambda x, y, turn: x @ (y.mT if turn else y), draw.product),
        Op("bmm", lambda x: torch.bmm(x, x.mT), draw.batched),
        Op("baddbmm", lambda x: torch.baddbmm(x[:, :, :1], x, x.mT, beta=0.5), draw.batched),
        Op("einsum", lambda x: torch.einsum("bij,bkj->bki", x, x + 1), draw.batched),
        Op("conv1d", F.conv1d, draw.convolution(1)),
        Op("conv2d", F.conv2d, draw.convolution(2)),
        Op("conv_transpose2d", F.conv_transpose2d, draw.convolution(2, turned=True)),
        Op("conv_bn", conv_bn, draw.convolution(2)),
        Op("max_pool2d", F.max_pool2d, draw.pool, rounds=False),
        Op("avg_pool2d", F.avg_pool2d, draw.pool),
        Op("adaptive_avg_pool2d", lambda x: F.adaptive_avg_pool2d(x, (2, 1)), lambda d: ([d.floats(4, 4)], {})),
        Op("interpolate", F.interpolate, draw.resize),
        Op("attention", attend, draw.attention("")),
        Op("attention_causal", attend, draw.attention("causal")),
        Op("attention_bool", attend, draw.attention("bool")),
        Op("attention_float", attend, draw.attention("float")),
        Op("attention_written_out", written_out, draw.attention("")),
        Op("attention_written_out_masked", written_out, draw.attention("float")),
    ]


def conv_bn(x: Tensor, kernel: Tensor, bias: Tensor, **knobs: Any) -> Tensor:
    """A convolution and a batch norm in a row; the bias doubles as its statistics."""
    return F.batch_norm(F.conv2d(x, kernel, bias, **knobs), bias, bias.abs() + 0.5, bias, None)


def moves() -> list[Op]:
    """Views and copies: nothing is computed."""
    every = draw.along(fits=lambda v: True)
    table: dict[str, tuple[Callable[..., Any], Callable[[draw.Draw], draw.Drawn]]] = {
        "reshape": (lambda x, shape: x.reshape(shape), draw.split_size),
        "permute": (torch.permute, draw.permutation),
        "transposed_copy": (lambda x, dims: x.permute(dims).contiguous(), draw.permutation),
        "slice": (cut, draw.section),
        "select": (torch.select, draw.place),
        "unsqueeze": (torch.unsqueeze, every),
        "squeeze": (torch.squeeze, every),
        "flatten": (torch.flatten, lambda d: ([d.pick(draw.anything)], {})),
        "expand": (lambda x, dim: x.unsqueeze(0).expand(3, *[-1] * x.ndim).movedim(0, dim), every),
        "unfold": (lambda x, dim: x.unfold(dim, 2, 1), every),
        "split": (lambda x, dim: torch.split(x, max(x.shape[dim] // 2, 1), dim), every),
        "chunk_swapped": (lambda x, dim: torch.cat(torch.chunk(x, 2, dim)[::-1], dim), every),
        "cat": (lambda *x, dim: torch.cat(x, dim), draw.joined),
        "stack": (lambda *x, dim: torch.stack(x, dim), draw.joined),
        "roll": (lambda x, dim: torch.roll(x, 2, dim), every),
        "flip": (lambda x, dim: torch.flip(x, [dim]), every),
        "pad": (F.pad, draw.widened),
        "repeat": (lambda x, dim: x.repeat(*[2 if d == dim % x.ndim else 1 for d in range(x.ndim)]), every),
        "repeat_interleave": (lambda x, dim: x.repeat_interleave(2, dim), every),
        "diagonal": (torch.diagonal, lambda d: ([d.pick(lambda v: v.ndim >= 2)], {})),
        "tril": (torch.tril, lambda d: ([d.pick(lambda v: v.ndim >= 2)], {})),
    }  # fmt: skip
    return [Op(name, call, how, rounds=False) for name, (call, how) in table.items()]


def cut(x: Tensor, dim: int, start: int, stop: int, step: int) -> Tensor:
    """A strided range of one dimension."""
    where: list[Any] = [slice(None)] * x.ndim
    where[dim] = slice(start, stop, step)
    return x[tuple(where)]


def lookups() -> list[Op]:
    """Indexing by integers."""

    def line(i: Tensor, size: int) -> Tensor:
        return i.flatten()[:6].remainder(size)

    def gather(x: Tensor, i: Tensor, dim: int) -> Tensor:
        shape = [1] * x.ndim
        shape[dim] = -1
        return x.gather(dim, line(i, x.shape[dim]).reshape(shape))

    def scatter(x: Tensor, i: Tensor, dim: int) -> Tensor:
        return torch.zeros_like(x).index_add(dim, line(i, x.shape[dim]), x.index_select(dim, line(i, x.shape[dim])))

    return [
        Op("index_select", lambda x, i, dim: x.index_select(dim, line(i, x.shape[dim])), draw.indexed, rounds=False),
        Op("index", lambda x, i, dim: x.movedim(dim, 0)[line(i, x.shape[dim])], draw.indexed, rounds=False),
        Op("gather", gather, draw.indexed, rounds=False),
        Op("index_add", scatter, draw.indexed),
        Op("embedding", lambda i, table: F.embedding(i.remainder(7), table), draw.looked_up, rounds=False),
        Op("positions", lambda x, dim: torch.arange(x.shape[dim]) + x.shape[dim], draw.along(), rounds=False),
    ]


def casts() -> list[Op]:
    """Changes of dtype. The reference computes all floats in float64, so casts between them do nothing there."""

    def to_float(x: Tensor, dtype: torch.dtype) -> Tensor:
        return x.to(torch.float64 if x.dtype == torch.float64 else dtype)

    def to_int(x: Tensor, dtype: torch.dtype) -> Tensor:
        return x.nan_to_num(0.0, 9.0, -9.0).clamp(-100, 100).to(dtype)

    return [
        Op("to_float", to_float, draw.cast(FLOATS)),
        Op("to_half", to_float, draw.cast(HALF)),
        Op("to_int", to_int, draw.cast([torch.int64, torch.int32], True, torch.is_floating_point), rounds=False),
        Op("to_bool", lambda x, dtype: x.to(dtype), draw.cast([torch.bool], True), rounds=False),
        Op(
            "from_bool",
            lambda x, dtype: x.to(dtype),
            draw.cast([torch.int64], False, lambda v: not number(v)),
            rounds=False,
        ),
    ]
