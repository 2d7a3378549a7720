"""drop_copies: let a value be read where it lies instead of copying it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from ..base import Context, Pass, Refusal
from ..nodes import arguments, may_share
from ..program import Program

aten = torch.ops.aten


@dataclass(frozen=True)
class DropCopies(Pass):
    """Copy only what does not already lie in memory as it is wanted.

        y = aten.clone(x, memory_format=contiguous_format)   -->   y = aten.contiguous(x)

    A program never writes into a value, so its readers cannot tell a copy from the original. Traces hold a copy before
    each view that the traced layout did not allow; kernels often write the layout that the view wants, and then
    ``contiguous`` does nothing. Assumes that no output may be the same memory as an input or another output: copies
    that reach an output stay. Gives up nothing. Source: copy propagation, Aho et al., Compilers (2nd ed.), section 9.1.
    """

    name: ClassVar[str] = "drop-copies"

    def run(self, program: Program, ctx: Context) -> int | Refusal:
        """See the class."""
        copies = [n for n in program.graph.nodes if n.target is aten.clone.default]
        if not copies:
            return Refusal("nothing is copied")
        kept = _returned(program)
        count = 0
        for node in copies:
            given = arguments(node)
            if node in kept or given["memory_format"] not in (torch.contiguous_format, None, torch.preserve_format):
                continue
            if given["memory_format"] is torch.contiguous_format:
                node.target, node.args, node.kwargs = aten.contiguous.default, (given["self"],), {}
            else:
                node.replace_all_uses_with(given["self"])
                program.graph.erase_node(node)
            count += 1
        return count or Refusal("every copy may be returned to the caller")


def _returned(program: Program) -> set[fx.Node]:
    """Values whose memory an output may share: outputs, and what their views look at."""
    found: set[fx.Node] = set()
    waiting = [n for n in program.outputs if isinstance(n, fx.Node)]
    while waiting:
        node = waiting.pop()
        if node in found:
            continue
        found.add(node)
        if node.op == "call_function" and may_share(node):
            waiting += node.all_input_nodes
    return found
