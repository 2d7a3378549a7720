"""Typed errors. Each says what happened, where in the user's code, and what to do next."""

from __future__ import annotations


class LatheError(Exception):
    """Base of every error that torchlathe raises on purpose.

    Args:
        what: one sentence that says what went wrong.
        node: name of the graph node concerned, if any.
        where: the user's file and line that the node came from, if known.
        by: text name of the pass or backend that was at work, if any.
        next_step: what the user can do about it.
    """

    def __init__(
        self,
        what: str,
        *,
        node: str | None = None,
        where: str | None = None,
        by: str | None = None,
        next_step: str | None = None,
    ) -> None:
        self.what, self.node, self.where, self.by, self.next_step = what, node, where, by, next_step
        lines = [what]
        for label, value in (("node", node), ("from", where), ("by", by), ("next", next_step)):
            if value:
                lines.append(f"  {label}: {value}")
        super().__init__("\n".join(lines))


class CaptureError(LatheError):
    """The model cannot be captured as one graph."""


class VerifyError(LatheError):
    """A program broke an invariant, or a rewrite changed an answer it must not change."""


class InputError(LatheError, ValueError):
    """A call does not fit what was compiled: structure, dtype, device or shape."""


class UnknownNameError(LatheError, KeyError):
    """No pass, target or backend of that name; near matches are listed."""

    def __str__(self) -> str:  # KeyError would print the repr of the message
        return str(self.args[0])


class MissingPackageError(LatheError, ImportError):
    """An optional dependency is not installed; the extra that brings it is named."""


class LowerError(LatheError):
    """A backend could not lower a region that it claimed to support."""


class ArtefactError(LatheError):
    """A saved file is damaged, foreign, or from an unknown format version."""
