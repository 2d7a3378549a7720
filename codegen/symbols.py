"""Sizes that depend on the inputs: symbolic expressions as nested JSON lists, and as Python text for guards."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import sympy
import torch
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._sympy import functions
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.value_ranges import ValueRanges

# A number is itself, a symbol is its name, a call is [operator, operand, ...].
Expression = int | str | list[Any]

_NATIVE = {n: getattr(sympy, n) for n in ("Add", "Mul", "Pow", "Eq", "Ne", "Lt", "Le", "Gt", "Ge", "And", "Or", "Not")}
_TORCH = (
    "FloorDiv ModularIndexing Mod PythonMod CleanDiv CeilToInt FloorToInt TruncToInt RoundToInt IntTrueDiv "
    "FloatTrueDiv ToFloat PowByNatural FloatPow Max Min Where LShift RShift OpaqueUnaryFn_sqrt"
).split()
OPERATORS: dict[str, Any] = _NATIVE | {n: getattr(functions, n) for n in _TORCH if hasattr(functions, n)}
_NAMES = {operator: name for name, operator in OPERATORS.items()}
_INFIX = {"Add": "+", "Mul": "*", "FloorDiv": "//", "CleanDiv": "//", "Mod": "%", "PythonMod": "%", "Eq": "==",
          "Ne": "!=", "Lt": "<", "Le": "<=", "Gt": ">", "Ge": ">="}  # fmt: skip
_SYMBOL = re.compile(r"[a-z]{1,4}[0-9]{1,9}")
LARGEST = 2**63
DEPTH = 40


def encode(expression: sympy.Basic) -> Expression:
    """Nested lists of a symbolic expression. Raises ValueError for an operator that is not in the table."""
    if isinstance(expression, sympy.Integer):
        return int(expression)
    if isinstance(expression, sympy.Symbol):
        return str(expression.name)
    if isinstance(expression, sympy.Rational):
        return ["Rational", int(expression.p), int(expression.q)]
    if isinstance(expression, sympy.Float):
        return ["Float", float(expression).hex()]
    if expression in (sympy.true, sympy.false):
        return ["Bool", int(expression is sympy.true)]
    name = _NAMES.get(type(expression))
    if name is None:
        raise ValueError(f"no stored form for the operator {type(expression).__name__} in {expression}")
    return [name, *(encode(a) for a in expression.args)]


def decode(stored: Any, symbols: Mapping[str, sympy.Symbol], depth: int = 0) -> Any:
    """The inverse of `encode`. Nothing is parsed or evaluated as text; raises ValueError, KeyError on anything else."""
    if type(stored) is int and abs(stored) <= LARGEST:
        return sympy.Integer(stored)
    if isinstance(stored, str):
        return symbols[stored]
    if not isinstance(stored, list) or not stored or depth > DEPTH:
        raise ValueError(f"not a size expression: {str(stored)[:80]}")
    name, *rest = stored
    if name == "Float":
        return sympy.Float(float.fromhex(rest[0]))
    operands = [decode(r, symbols, depth + 1) for r in rest]
    if name == "Rational":
        return sympy.Rational(*operands)
    if name == "Bool":
        return sympy.true if operands[0] else sympy.false
    # powers of numbers are computed on construction: a small bound keeps a crafted file from filling the memory
    if name in ("Pow", "PowByNatural", "LShift") and not (operands[1].is_Integer and abs(int(operands[1])) <= 8):
        raise ValueError(f"exponent out of range in {str(stored)[:80]}")
    return OPERATORS[name](*operands)


def python_text(stored: Expression, text_of: Callable[[Any], str]) -> str:
    """Python text of an expression; `text_of` gives that of a symbol (a name), or of a place (a pair of integers).

    Raises:
        ValueError: an operator that guards do not compute.
    """
    if isinstance(stored, int):
        return str(stored)
    if isinstance(stored, str) or isinstance(stored[0], int):
        return text_of(stored)
    name, *rest = stored
    operands = [python_text(r, text_of) for r in rest]
    if name in _INFIX:
        return "(" + f" {_INFIX[name]} ".join(operands) + ")"
    if name in ("Max", "Min"):
        return f"{name.lower()}({', '.join(operands)})"
    if name == "ModularIndexing":
        return f"({operands[0]} // {operands[1]} % {operands[2]})"
    if name in ("Pow", "PowByNatural") and isinstance(rest[1], int) and rest[1] >= 0:
        return f"({operands[0]} ** {rest[1]})"
    raise ValueError(f"guards cannot compute {name}")


def placed(stored: Expression, places: Mapping[str, int | tuple[Any, ...]]) -> Any:
    """An expression in tuples, with a place (or an expression of places) for every symbol; KeyError without one."""
    if isinstance(stored, list):
        return (stored[0], *(placed(r, places) for r in stored[1:]))
    return places[stored] if isinstance(stored, str) else stored


def relations(environment: ShapeEnv | None) -> list[sympy.Basic]:
    """Divisibility by a number that the trace took for granted.

    Other relations that tracing records are left to the operators: many only say which of two equal code paths was
    taken (a size that is not one, two sizes that differ), and enforcing them would refuse calls that work.
    """
    found = {guard.expr for guard in (environment.guards if environment is not None else ())}
    return sorted((e for e in found if _is_divisibility(e)), key=str)


def _is_divisibility(expression: Any) -> bool:
    if not isinstance(expression, (sympy.Eq, sympy.Ne)):
        return False
    parts = [a for a in expression.args if isinstance(a, (functions.Mod, functions.PythonMod))]
    return len(parts) == 1 and bool(parts[0].args[1].is_Integer) and any(bool(a.is_Integer) for a in expression.args)


def encode_environment(environment: ShapeEnv | None, used: set[sympy.Symbol]) -> dict[str, Any]:
    """The symbols in use: what they are, the range and the example value of each, and the relations among them."""
    if environment is None:
        return {"symbols": {}, "relations": []}
    kept = [r for r in relations(environment) if r.free_symbols <= used]
    symbols = {}
    for symbol in sorted(used, key=str):
        limits = environment.var_to_range.get(symbol)
        hint = environment.backed_var_to_val.get(symbol)
        bounds = [None, None] if limits is None else [_bound(limits.lower), _bound(limits.upper)]
        facts = [bool(symbol.is_integer), bool(symbol.is_positive), bool(symbol.is_nonnegative)]
        symbols[symbol.name] = [facts, bounds, None if hint is None else int(hint)]
    return {"symbols": symbols, "relations": [encode(r) for r in kept]}


def _bound(limit: Any) -> int | None:
    return int(limit) if limit.is_Integer else None


def decode_environment(stored: Mapping[str, Any], environment: ShapeEnv) -> dict[str, sympy.Symbol]:
    """Declare stored symbols in a fresh environment. Returns the symbols by name."""
    from torch._guards import ShapeGuard, SLoc

    symbols: dict[str, sympy.Symbol] = {}
    for name, (facts, (low, high), hint) in stored["symbols"].items():
        if not _SYMBOL.fullmatch(name):
            raise ValueError(f"{name!r} is no symbol")
        kinds = {k: True for k, yes in zip(("integer", "positive", "nonnegative"), facts, strict=True) if yes is True}
        symbol = symbols[name] = sympy.Symbol(name, **kinds)
        lower = -int_oo if low is None else decode(low, {})
        upper = int_oo if high is None else decode(high, {})
        environment.var_to_range[symbol] = ValueRanges(lower, upper)
        if hint is not None:
            environment.backed_var_to_val[symbol] = decode(hint, {})
    for relation in stored["relations"]:
        found = decode(relation, symbols)
        if not _is_divisibility(found):
            raise ValueError(f"not a relation of sizes: {str(found)[:80]}")
        environment.guards.append(ShapeGuard(found, SLoc("loaded", ""), False))
    return symbols


def symbolic(kind: str, expression: Any, environment: ShapeEnv) -> Any:
    """A SymInt, SymFloat or SymBool (`kind`: int, float, bool) of an expression; plain numbers stay plain."""
    if kind == "int" and expression.is_Integer:
        return int(expression)
    if kind == "bool":
        return environment.create_symboolnode(expression)
    if kind == "float":
        return environment.create_symfloatnode(expression, hint=None)
    return environment.create_symintnode(expression, hint=None)


def expression_of(value: torch.SymInt | torch.SymFloat | torch.SymBool) -> Any:
    """The expression behind a symbolic number."""
    return value.node.expr
