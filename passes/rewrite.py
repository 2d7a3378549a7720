"""Rules: a pattern to find, a check that may refuse with a reason, and a replacement to build."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import fx

from .base import Refusal
from .nodes import arguments, erase_unused
from .program import Program

Match = dict[str, Any]  # what each Var stands for; "root" is the matched node


@dataclass(frozen=True)
class Var:
    """Matches any argument and binds it; a name that occurs twice must be the same value twice."""

    name: str


@dataclass(frozen=True)
class Op:
    """Matches a call of one of `ops` whose leading arguments match `args` (in either order if `commutes`).

    Unless it is the root or `shared`, the matched node must have no user outside the pattern. `name` binds the node.
    """

    ops: Any
    args: tuple[Any, ...] = ()
    commutes: bool = False
    shared: bool = False
    name: str = ""


@dataclass(frozen=True)
class Rule:
    """`replace` returns the node that stands for the root from then on; `check` returns why not, or None."""

    pattern: Op
    replace: Callable[[Program, Match], fx.Node]
    check: Callable[[Program, Match], str | None] = lambda program, match: None


def match(pattern: Any, value: Any, bound: Match, root: bool = True) -> Match | str | None:
    """Bindings if `value` matches, None if it does not, or the reason if only an outside user stands in the way."""
    return next(iter(sorted(_matches(pattern, value, bound, root), key=lambda way: isinstance(way, str))), None)


def _matches(pattern: Any, value: Any, bound: Match, root: bool = False) -> list[Match | str]:
    if isinstance(pattern, Var):
        return [bound | {pattern.name: value}] if _same(bound.get(pattern.name, value), value) else []
    if not isinstance(pattern, Op):
        return [bound] if _same(pattern, value) else []
    ops = pattern.ops if isinstance(pattern.ops, (tuple, frozenset, set)) else (pattern.ops,)
    if not (isinstance(value, fx.Node) and value.op == "call_function" and value.target in ops):
        return []
    given, swaps = list(arguments(value).values()), pattern.commutes and arguments(value).get("alpha", 1) == 1
    named = ({"root": value} if root else {}) | ({pattern.name: value} if pattern.name else {})
    found: list[Match | str] = []
    for actual in [given, [given[1], given[0], *given[2:]]] if swaps else [given]:
        ways: list[Match | str] = [bound | named]
        for wanted, argument in zip(pattern.args, actual, strict=False):
            ways = [new for way in ways for new in ([way] if isinstance(way, str) else _matches(wanted, argument, way))]
        found += ways
    taken = not root and not pattern.shared and len(value.users) > 1
    return [f"the value of {value.name} is also used outside the pattern"] if found and taken else found


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    return type(a) is type(b) and bool(a == b)


def rewrite(program: Program, rules: Iterable[Rule], absent: str) -> int | Refusal:
    """Apply every rule wherever it matches, until none does. Returns the sites changed, or the most telling refusal:
    the reason of a site that matched but was refused, else `absent` (what was looked for and not found)."""
    rules, sites, before, refusal = list(rules), 0, -1, None
    while sites != before:
        before = sites
        for node in list(program.graph.nodes):
            for rule in rules if node.op == "call_function" and node.users else ():
                found = match(rule.pattern, node, {})
                reason = rule.check(program, found) if isinstance(found, dict) else found
                if isinstance(found, dict) and reason is None:
                    replace(node, rule.replace(program, found))
                    sites += 1
                    break
                if reason and (refusal is None or isinstance(found, dict)):
                    refusal = Refusal.at(node, reason)
    return sites or refusal or Refusal(absent)


def replace(old: fx.Node, new: fx.Node) -> None:
    """Put `new` in the place of `old` and erase what nobody uses any more."""
    old.replace_all_uses_with(new)
    erase_unused(old)
