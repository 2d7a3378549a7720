"""drop_dead: remove what no output depends on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..base import Context, Pass, Refusal
from ..nodes import is_pure
from ..program import Program


@dataclass(frozen=True)
class DropDead(Pass):
    """Remove nodes and weights that no output and no carried state depends on.

        y = aten.relu(x); z = aten.exp(x); return y   -->   y = aten.relu(x); return y

    Assumes that operators without a mutable schema and without randomness have no effect beyond their value. Gives up
    nothing. Source: dead code elimination, Aho et al., Compilers (2nd ed.), section 9.1.
    """

    name: ClassVar[str] = "drop-dead"

    def run(self, program: Program, ctx: Context) -> int | Refusal:
        """See the class."""
        count, named = 0, set[str]()
        for node in reversed(list(program.graph.nodes)):
            if node.users or not (node.op == "get_attr" or (node.op == "call_function" and is_pure(node))):
                continue
            named |= {str(node.target)} if node.op == "get_attr" else set()
            program.graph.erase_node(node)
            count += 1
        used = {str(n.target) for n in program.graph.nodes if n.op == "get_attr"}
        carried = {s.slot for s in program.state}
        for name in [n for n in program.weights if n not in used and n not in carried]:
            del program.weights[name]
            count += name not in named
        return count or Refusal("every node is used")
