"""Pass, Context and Refusal: all that a pass sees of the world."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar, Self

from torch import fx

from ..targets.target import Target
from .program import Program
from .text import where


class Fidelity(Enum):
    """What a pass promises about the answers."""

    EXACT = "exact"  # the same function; the difference is rounding only
    CONDITIONAL = "conditional"  # exact while a stated condition holds, which is guarded at run time
    LOSSY = "lossy"  # changes answers, within the quality budget


@dataclass(frozen=True)
class Refusal:
    """Why a pass changed nothing: the reason, the graph node it stumbled over, and the user's line behind it."""

    reason: str
    node: str | None = None
    where: str | None = None

    @classmethod
    def at(cls, node: fx.Node, reason: str) -> Refusal:
        """A refusal that points at a node."""
        return cls(reason, node.name, where(node))

    def __str__(self) -> str:
        place = ", ".join(p for p in (self.node, self.where) if p)
        return self.reason + (f" (at {place})" if place else "")


@dataclass(frozen=True)
class Context:
    """Everything that a pass may know besides the program. There are no globals."""

    target: Target
    data: Sequence[Any] | None = None
    quality: Any = None
    records: Any = None


@dataclass(frozen=True)
class Pass:
    """One rewrite. Subclasses are frozen dataclasses whose fields are the knobs.

    A subclass sets `name` (text name, verb-object) and `fidelity`, and implements `run`.
    """

    name: ClassVar[str] = ""
    fidelity: ClassVar[Fidelity] = Fidelity.EXACT
    needs_data: ClassVar[bool] = False

    def space(self, program: Program, ctx: Context) -> Iterable[Self]:
        """Settings worth trying on this program; those of a lossy pass from little to much that is given up."""
        yield self

    def run(self, program: Program, ctx: Context) -> int | Refusal:
        """Rewrite `program`, a private fork, in place. Returns the number of sites changed, or why none was."""
        raise NotImplementedError
