"""Guards: the checks at the entry of an executable, as lines of its source, and the errors behind them."""

from __future__ import annotations

import math
from typing import Any

import sympy
import torch

from ..passes.errors import InputError
from ..passes.program import Program
from ..passes.text import describe
from .layouts import layout_lines
from .source import Source
from .symbols import encode, expression_of, python_text, relations


def guard_source(source: Source, program: Program, parameters: list[str]) -> None:
    """Append checks of every input's type, dtype, device, shape and layout.

    A size that was declared dynamic binds its symbol at the first input that has it bare; other sizes are compared
    with the expression that the trace found. A tensor in an unexpected layout is copied into the compiled one.
    """
    inputs = program.inputs
    conditions = []
    for node, name in zip(inputs, parameters, strict=True):
        if "val" in node.meta:
            conditions.append(_condition(source, node.meta["val"], name))
    bound, places = _bind_symbols(program, parameters)
    sizes = _size_conditions(program, parameters, bound, places)

    def complain(*values: Any) -> None:
        raise _mismatch(program, values)

    complaint = f"{source.bind(complain, 'complain')}({', '.join(parameters)})"
    if conditions:
        source.lines.append(f"if not ({' and '.join(conditions)}): {complaint}")
    source.lines.extend(f"{local} = {place}" for place, local in places.items())
    if sizes:
        source.lines.append(f"if not ({' and '.join(sizes)}): {complaint}")
    for node, name in zip(inputs, parameters, strict=True):
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and value.layout is torch.strided and value.dim():
            source.lines.extend(layout_lines(source.bind, value, name))


def _condition(source: Source, value: Any, name: str) -> str:
    """What the input must be before its sizes are looked at."""
    if isinstance(value, torch.Tensor):
        return _tensor_condition(source, value, name)
    if isinstance(value, torch.SymInt):
        return f"type({name}) is int"
    if isinstance(value, (torch.SymFloat, torch.SymBool)):
        return f"isinstance({name}, (float, int))"
    if value is None:
        return f"{name} is None"
    if type(value) in (bool, int, str):
        return f"type({name}) is {type(value).__name__} and {name} == {value!r}"
    return f"{source.bind(_same, 'same_')}({name}, {source.bind(value, 'c')})"


def _same(given: Any, compiled: Any) -> bool:
    if type(given) is not type(compiled):
        return False
    nan = isinstance(compiled, float) and math.isnan(compiled) and math.isnan(given)
    return nan or bool(given == compiled)


def _tensor_condition(source: Source, value: torch.Tensor, name: str) -> str:
    dtype, device = source.bind(value.dtype, "dtype"), source.bind(value.device, "device")
    kind = source.bind(torch.Tensor, "tensor")
    test = f"isinstance({name}, {kind}) and {name}.dtype is {dtype} and {name}.device == {device}"
    if value.device.type == "cpu":
        test = f"isinstance({name}, {kind}) and {name}.dtype is {dtype} and {name}.is_cpu"
    if all(isinstance(s, int) for s in value.shape):
        return f"{test} and {name}.shape == {tuple(value.shape)}"
    return f"{test} and {name}.ndim == {value.dim()}"


def _bind_symbols(program: Program, parameters: list[str]) -> tuple[dict[str, str], dict[str, str]]:
    """The local that holds each symbol, and the text that each local is read from."""
    bound, places = dict[str, str](), dict[str, str]()
    for node, name in zip(program.inputs, parameters, strict=True):
        for place, size in _sizes(node.meta.get("val"), name):
            symbol = expression_of(size) if isinstance(size, torch.SymInt) else None
            if isinstance(symbol, sympy.Symbol) and symbol.name not in bound:
                places[place] = bound[symbol.name] = f"d{len(bound)}"
    return bound, places


def _sizes(value: Any, name: str) -> list[tuple[str, Any]]:
    """Each size of an input with its text, if any of them is symbolic."""
    if isinstance(value, torch.Tensor) and any(isinstance(s, torch.SymInt) for s in value.shape):
        return [(f"{name}.shape[{d}]", s) for d, s in enumerate(value.shape)]
    return [(name, value)] if isinstance(value, torch.SymInt) else []


def _size_conditions(
    program: Program, parameters: list[str], bound: dict[str, str], places: dict[str, str]
) -> list[str]:
    """Dynamic sizes against the symbols, the symbols against their ranges and the divisors that the trace assumed."""
    checks = []
    for node, name in zip(program.inputs, parameters, strict=True):
        sizes = _sizes(node.meta.get("val"), name)
        checks += [f"{place} == {_size_text(size, bound)}" for place, size in sizes if place not in places]
    for symbol, (low, high) in _ranges(program).items():
        if symbol in bound:
            checks += [f"{low} <= {bound[symbol]}"] if low is not None else []
            checks += [f"{bound[symbol]} <= {high}"] if high is not None else []
    for relation in relations(program.fake.shape_env):
        if {s.name for s in relation.free_symbols} <= bound.keys():
            checks.append(python_text(encode(relation), bound.__getitem__))
    return checks


def _ranges(program: Program) -> dict[str, tuple[int | None, int | None]]:
    """Lowest and highest value of each symbol. Tracing assumes that sizes are at least 2; the operators do not."""
    environment = program.fake.shape_env
    found = {}
    for symbol, limits in (environment.var_to_range if environment is not None else {}).items():
        low = int(limits.lower) if limits.lower.is_Integer and int(limits.lower) > 0 else None
        high = int(limits.upper) if limits.upper.is_Integer and int(limits.upper) < 2**62 else None
        found[symbol.name] = (1 if low == 2 else low, high)
    return found


def _size_text(size: Any, bound: dict[str, str]) -> str:
    if isinstance(size, int):
        return str(size)
    try:
        return python_text(encode(expression_of(size)), bound.__getitem__)
    except (KeyError, ValueError) as error:
        raise InputError(f"the size {size} cannot be computed from the inputs") from error


def _mismatch(program: Program, values: tuple[Any, ...]) -> InputError:
    """An error that names the first input that does not fit, what was compiled and what came."""
    for node, value in zip(program.inputs, values, strict=True):
        wanted = node.meta.get("val")
        if isinstance(wanted, torch.Tensor):
            if not isinstance(value, torch.Tensor):
                return _complaint(node, describe(node), type(value).__name__)
            static = [s if isinstance(s, int) else None for s in wanted.shape]
            fits = len(static) == value.dim() and all(
                a is None or a == b for a, b in zip(static, value.shape, strict=True)
            )
            if not fits or wanted.dtype is not value.dtype or wanted.device != value.device:
                came = f"{value.dtype} {list(value.shape)} on {value.device}"
                return _complaint(node, f"{wanted.dtype} {list(wanted.shape)} on {wanted.device}", came)
        elif isinstance(wanted, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            number = type(value) is int or (type(value) in (float, bool) and not isinstance(wanted, torch.SymInt))
            if not number:
                return _complaint(node, "a number", type(value).__name__)
        elif "val" in node.meta and not _same(value, wanted):
            return _complaint(node, repr(wanted), repr(value) if not isinstance(value, torch.Tensor) else "a tensor")
    return _relation_broken(program, values)


def _relation_broken(program: Program, values: tuple[Any, ...]) -> InputError:
    compiled = [list(n.meta["val"].shape) if isinstance(n.meta.get("val"), torch.Tensor) else n.meta.get("val")
                for n in program.inputs]  # fmt: skip
    came = [list(v.shape) if isinstance(v, torch.Tensor) else v for v in values]
    limits = [f"{name} from {low or 0}" + (f" to {high}" if high is not None else "")
              for name, (low, high) in _ranges(program).items() if name in str(compiled)]  # fmt: skip
    limits += [str(r) for r in relations(program.fake.shape_env)]
    return InputError(f"compiled for the sizes {compiled} with {', '.join(limits)}; called with {came}",
                      next_step="widen dynamic_shapes and optimize again")  # fmt: skip


def _complaint(node: Any, compiled: str, came: str) -> InputError:
    return InputError(
        f"input {node.name}: compiled for {compiled}, called with {came}",
        next_step="convert the input, or optimize again (dynamic_shapes=... makes sizes variable)",
    )
