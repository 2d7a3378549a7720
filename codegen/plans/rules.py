"""What each ATen operator means in a row program: one rule per operator; those that only move elements are in moves."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from ...passes.ops import NAMESPACE
from .moves import MOVES, Rule
from .values import COLUMN, KINDS, Builder, Coordinate, Site, Unsupported, Value, bound


def _binary(name: str) -> Rule:
    def rule(s: Site) -> Value:
        if s.kind == "bool" and name not in ("max", "min"):
            raise Unsupported(f"{s.node.target} on bool")
        left, right = s.value("self"), s.value("other")
        alpha = s.args.get("alpha", 1)
        if alpha != 1:
            right = s.build.op("mul", right, s.build.const(alpha, s.kind), kind=s.kind)
        return s.build.op(name, left, right, kind=s.kind)

    return rule


def _rsub(s: Site) -> Value:
    scaled = s.value("self")
    if s.args.get("alpha", 1) != 1:
        scaled = s.build.op("mul", scaled, s.build.const(s.args["alpha"], s.kind), kind=s.kind)
    return s.build.op("sub", s.value("other"), scaled, kind=s.kind)


def _div(s: Site) -> Value:
    if s.args.get("rounding_mode") is not None or s.kind != "float32":
        raise Unsupported("div with a rounding mode or on integers")
    other = s.args["other"]
    if isinstance(other, (int, float)) and other != 0 and math.isfinite(other) and abs(math.frexp(other)[0]) == 0.5:
        return s.build.op("mul", s.value("self"), s.build.const(1.0 / other))
    return s.build.op("div", s.value("self"), s.value("other"))


def _compare(name: str) -> Rule:
    def rule(s: Site) -> Value:
        sides = [s.args["self"], s.args["other"]]
        fakes = [v.meta["val"] if isinstance(v, fx.Node) else v for v in sides]
        dtype = torch.result_type(*fakes)
        if dtype not in KINDS:
            raise Unsupported(f"a comparison in {dtype}")
        left, right = (s.build.rounded(s.of(v, KINDS[dtype]), dtype) for v in sides)
        if KINDS[dtype] == "bool":
            left, right = s.build.cast(left, "int32"), s.build.cast(right, "int32")
        return s.build.op(name, left, right, kind="bool")

    return rule


def _unary(name: str) -> Rule:
    def rule(s: Site) -> Value:
        if s.kind != "float32" and not (name in ("neg", "abs") and s.kind != "bool"):
            raise Unsupported(f"{s.node.target} on {s.kind}")
        return s.build.op(name, s.value("self"), kind=s.kind)

    return rule


def _logical(name: str) -> Rule:
    def rule(s: Site) -> Value:
        if s.kind != "bool":
            raise Unsupported(f"{s.node.target} on {s.kind}")
        names = ("self",) if name == "not" else ("self", "other")
        return s.build.op(name, *(s.value(n) for n in names), kind="bool")

    return rule


def _clamped(build: Builder, x: Value, low: float | None, high: float | None) -> Value:
    if low is not None:
        floor = build.const(low, x.kind)
        x = build.op("select", build.op("lt", x, floor, kind="bool"), floor, x, kind=x.kind)
    if high is not None:
        ceiling = build.const(high, x.kind)
        x = build.op("select", build.op("gt", x, ceiling, kind="bool"), ceiling, x, kind=x.kind)
    return x


def _clamp(low: str, high: str) -> Rule:
    def rule(s: Site) -> Value:
        if any(isinstance(s.args.get(n), fx.Node) for n in (low, high)):
            return _clamp_tensor(s)
        return _clamped(s.build, s.value("self"), s.args.get(low), s.args.get(high))

    return rule


def _clamp_tensor(s: Site) -> Value:
    x = s.value("self")
    for name, op in (("min", "max"), ("max", "min")):
        if s.args.get(name) is not None:
            x = s.build.op(op, x, s.value(name), kind=s.kind)
    return x


def _floating(rule: Callable[[Site, Value], Value]) -> Rule:
    def checked(s: Site) -> Value:
        if s.kind != "float32":
            raise Unsupported(f"{s.node.target} on {s.kind}")
        return rule(s, s.value("self"))

    return checked


def _positive(s: Site, x: Value) -> Value:
    return s.build.op("gt", x, s.build.const(0.0), kind="bool")


def _leaky(s: Site, x: Value) -> Value:
    slope = s.build.const(s.args["negative_slope"])
    return s.build.op("select", _positive(s, x), x, s.build.op("mul", x, slope))


def _elu(s: Site, x: Value) -> Value:
    f, alpha, scale, inner = s.build, s.args["alpha"], s.args["scale"], s.args["input_scale"]
    if inner <= 0:
        raise Unsupported("elu with a negative input scale")
    low = f.op("mul", f.op("expm1", f.op("mul", x, f.const(inner))), f.const(alpha * scale))
    return f.op("select", _positive(s, x), f.op("mul", x, f.const(scale)), low)


def _softplus(s: Site, x: Value) -> Value:
    f = s.build
    scaled = f.op("mul", x, f.const(s.args["beta"]))
    soft = f.op("div", f.op("log1p", f.op("exp", scaled)), f.const(s.args["beta"]))
    return f.op("select", f.op("gt", scaled, f.const(s.args["threshold"]), kind="bool"), x, soft)


def _gelu(s: Site, x: Value) -> Value:
    f = s.build
    half = f.op("mul", x, f.const(0.5))
    if s.args["approximate"] == "tanh":
        cube = f.op("mul", f.op("mul", x, x), x)
        inner = f.op("add", x, f.op("mul", cube, f.const(0.044715)))
        curve = f.op("tanh", f.op("mul", inner, f.const(math.sqrt(2.0 / math.pi))))
    else:
        curve = f.op("erf", f.op("mul", x, f.const(math.sqrt(0.5))))
    result = f.op("mul", half, f.op("add", curve, f.const(1.0)))
    if s.args["approximate"] == "tanh" or s.dtype is torch.float16 or f.device != "cpu" or not _gelu_loses_infinity():
        return result
    return f.op("add", result, f.op("sub", x, x))


@functools.cache
def _gelu_loses_infinity() -> bool:
    """Whether torch's exact gelu is NaN at infinity on this CPU, as oneDNN's is, which torch takes on some of them.

    Asked of many numbers: some CPUs answer otherwise for one.
    """
    return bool(torch.nn.functional.gelu(torch.full((64,), torch.inf)).isnan().all())


def _silu(s: Site, x: Value) -> Value:
    f = s.build
    return f.op("div", x, f.op("add", f.op("exp", f.op("neg", x)), f.const(1.0)))


def _hard(gate: bool) -> Callable[[Site, Value], Value]:
    def rule(s: Site, x: Value) -> Value:
        part = _clamped(s.build, s.build.op("add", x, s.build.const(3.0)), 0.0, 6.0)
        return s.build.op("div", s.build.op("mul", x, part) if gate else part, s.build.const(6.0))

    return rule


def _pow(s: Site, x: Value) -> Value:
    f, exponent = s.build, s.args["exponent"]
    if not isinstance(exponent, (int, float)) or (abs(exponent) != 0.5 and (exponent % 1 or abs(exponent) > 8)):
        raise Unsupported(f"a power of {exponent}")
    if abs(exponent) == 0.5:
        result = f.op("sqrt", x)
    else:
        result, left = f.const(1.0), x
        for bit in reversed(bin(abs(int(exponent)))[2:]):
            if bit == "1":
                result = left if result.op == "const" else f.op("mul", result, left)
            left = f.op("mul", left, left)
    return f.op("div", f.const(1.0), result) if exponent < 0 else result


def _where(s: Site) -> Value:
    condition = s.of(s.args["condition"], "bool")
    return s.build.op("select", condition, s.value("self"), s.value("other"), kind=s.kind)


def _masked_fill(s: Site) -> Value:
    return s.build.op("select", s.of(s.args["mask"], "bool"), s.value("value"), s.value("self"), kind=s.kind)


def _copy(s: Site) -> Value:
    source = s.args["self"]
    value = s.build.cast(s.of(source, _kind_of(source)), s.kind)
    return s.build.rounded(value, s.dtype) if s.args.get("dtype") is not None else value


def _kind_of(node: fx.Node) -> str:
    return KINDS[node.meta["val"].dtype]


# Row reductions. The mean and the variance take two passes over the row, which lies in the first cache level.


def _mean_of(s: Site, x: Value) -> Value:
    return s.build.op("mul", s.build.reduce("sum", x), s.build.const(1.0 / s.columns))


def _variance(s: Site, x: Value, divisor: float) -> tuple[Value, Value]:
    """The centred row and its variance. The second pass also measures how far the mean was rounded and corrects it."""
    f = s.build
    rough = f.op("sub", x, _mean_of(s, x))
    error = _mean_of(s, rough)
    total = f.op("sub", f.reduce("sum", f.op("mul", rough, rough)),
                 f.op("mul", f.op("mul", error, error), f.const(s.columns)))  # fmt: skip
    return f.op("sub", rough, error), f.op("div", total, f.const(divisor))


def _reduction(how: str) -> Rule:
    def rule(s: Site) -> Value:
        s.last_dim()
        if s.kind != "float32":
            raise Unsupported(f"{s.node.target} on {s.kind}")
        x = s.row("self")
        return _mean_of(s, x) if how == "mean" else s.build.reduce(how, x)

    return rule


def _var(s: Site) -> Value:
    s.last_dim()
    correction = s.args.get("correction", int(s.args.get("unbiased", True)))
    correction = 1 if correction is None else correction
    return _variance(s, s.row("self"), max(0, s.columns - correction))[1]


def _at_column(s: Site, x: Value) -> Value:
    if s.coords[-1] != (COLUMN, 0):
        raise Unsupported(f"{s.node.target} is read at other columns than its own")
    return x


def _affine(s: Site, x: Value) -> Value:
    for name, op in (("weight", "mul"), ("bias", "add")):
        if s.args.get(name) is not None:
            x = s.build.op(op, x, s.value(name))
    return x


def _layer_norm(s: Site) -> Value:
    if len(s.args["normalized_shape"]) != 1:
        raise Unsupported("layer_norm over more than the last dimension")
    f, x = s.build, _at_column(s, s.row("input"))
    centred, variance = _variance(s, x, s.columns)
    scale = f.op("rsqrt", f.op("add", variance, f.const(s.args["eps"])))
    return _affine(s, f.op("mul", centred, scale))


def _rms_norm(s: Site) -> Value:
    if len(s.args["normalized_shape"]) != 1:
        raise Unsupported("rms_norm over more than the last dimension")
    f, x = s.build, _at_column(s, s.row("input"))
    eps = torch.finfo(torch.float32).eps if s.args["eps"] is None else s.args["eps"]  # of what torch computes in
    scale = f.op("rsqrt", f.op("add", _mean_of(s, f.op("mul", x, x)), f.const(eps)))
    return _affine(s, f.op("mul", x, scale))


def _softmax(logarithm: bool) -> Rule:
    def rule(s: Site) -> Value:
        s.last_dim()
        f, x = s.build, _at_column(s, s.row("self"))
        if s.args.get("dtype") is not None:
            x = f.rounded(x, s.args["dtype"])
        # a NaN that this maximum loses comes back through x - peak
        shifted = f.op("sub", x, f.reduce("peak", x))
        power = f.op("exp", shifted)
        total = f.reduce("sum", power)
        if logarithm:
            return f.op("sub", shifted, f.op("log", total))
        return f.op("mul", power, f.op("div", f.const(1.0), total))

    return rule


RULES: dict[str, Rule] = {
    **{name: _binary(name) for name in ("add", "sub", "mul")},
    "maximum": _binary("max"), "minimum": _binary("min"), "rsub": _rsub, "div": _div,
    **{name: _compare(name) for name in ("eq", "ne", "lt", "le", "gt", "ge")},
    **{name: _unary(name) for name in
       ("exp", "erf", "tanh", "log", "sqrt", "rsqrt", "sigmoid", "neg", "abs", "reciprocal")},
    "logical_not": _logical("not"), "logical_and": _logical("and"), "logical_or": _logical("or"),
    "__and__": _logical("and"), "__or__": _logical("or"),
    "bitwise_not": _logical("not"), "bitwise_and": _logical("and"), "bitwise_or": _logical("or"),
    "relu": lambda s: _clamped(s.build, s.value("self"), 0.0, None),
    "clamp": _clamp("min", "max"), "clamp_min": _clamp("min", "-"), "clamp_max": _clamp("-", "max"),
    "hardtanh": _clamp("min_val", "max_val"), "hardswish": _floating(_hard(True)),
    "relu6": lambda s: _clamped(s.build, s.value("self"), 0.0, 6.0),
    "hardsigmoid": _floating(_hard(False)), "leaky_relu": _floating(_leaky), "elu": _floating(_elu),
    "softplus": _floating(_softplus), "gelu": _floating(_gelu), "silu": _floating(_silu), "pow": _floating(_pow),
    "square": _floating(lambda s, x: s.build.op("mul", x, x)),
    "where": _where, "masked_fill": _masked_fill, "_to_copy": _copy, "clone": _copy, "contiguous": _copy, "to": _copy,
    "mean": _reduction("mean"), "sum": _reduction("sum"), "amax": _reduction("max"), "amin": _reduction("min"),
    "var": _var, "layer_norm": _layer_norm, "rms_norm": _rms_norm, "softmax": _softmax(False),
    "_softmax": _softmax(False), "log_softmax": _softmax(True), "_log_softmax": _softmax(True),
    **MOVES,
}  # fmt: skip


def name_of(node: fx.Node) -> str | None:
    """The operator's name without namespace and overload, if it is an ATen operator or one of ours."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return None
    space, name = node.target._schema.name.split("::")
    return name if space in ("aten", NAMESPACE) else None


def read(
    build: Builder, members: set[fx.Node], memo: dict[Any, Value], node: fx.Node, at: tuple[Coordinate, ...]
) -> Value:
    """The value of a node at coordinates: a load for region inputs, else what its rule says."""
    key = (node, at)
    if key not in memo:
        if node not in members:
            memo[key] = build.load(node, at)
        else:
            site = Site(build, node, at, bound(node), lambda n, c: read(build, members, memo, n, c))
            value = RULES[name_of(node) or ""](site)
            # Eager rounds to float16 after each operator, and what overflows there must overflow here.
            memo[key] = build.rounded(value, site.dtype) if site.dtype is torch.float16 else value
    return memo[key]
