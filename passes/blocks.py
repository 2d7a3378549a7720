"""Analysis 2: the residual stream, the blocks that repeat along it, and their parts.

The stream is found by dominators: seen from where it begins, every path to the result goes through its values, while
what a residual branch computes can be bypassed. Masks and position tables would bypass the stream too; they are left
out by looking only at what descends from the stream's first value. Blocks are runs of branches that repeat, compared
operator by operator with their shapes.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import networkx as nx
import torch
from torch import fx

from .nodes import expression
from .operators import ATTENTION
from .program import Program
from .text import stable_text

aten = torch.ops.aten
ADDS = {aten.add.Tensor, aten.add_.Tensor}
NORMS = {aten.layer_norm.default, aten.rms_norm.default, aten.group_norm.default, aten.batch_norm.default,
         aten.native_layer_norm.default}  # fmt: skip
LINEARS = {aten.linear.default, aten.addmm.default, aten.mm.default, aten.matmul.default}
CONVOLUTIONS = {aten.conv1d.default, aten.conv2d.default, aten.conv3d.default}
MOST = 64  # candidates for the first value of the stream


@dataclass(frozen=True)
class Branch:
    """What one residual addition adds to the stream.

    Attributes:
        start: the value of the stream that the branch reads.
        end: the addition.
        nodes: what lies between, in topological order.
        kind: ``attention``, ``feed-forward``, ``parallel`` (both at once), ``convolution`` or ``other``.
    """

    start: fx.Node
    end: fx.Node
    nodes: tuple[fx.Node, ...]
    kind: str

    @property
    def norms(self) -> list[fx.Node]:
        """Normalisations in it."""
        return [n for n in self.nodes if n.target in NORMS]

    @property
    def attention(self) -> fx.Node | None:
        """The attention operator, if it has one."""
        return next((n for n in self.nodes if n.target is ATTENTION), None)

    @property
    def linears(self) -> list[fx.Node]:
        """Its linear layers, in order."""
        return [n for n in self.nodes if n.target in LINEARS]

    def signature(self) -> str:
        """Equal for branches that compute the same operators on the same shapes."""
        names = {self.start: "stream"}
        for node in self.nodes:
            for source in node.all_input_nodes:
                if source not in names and source not in self.nodes:
                    names[source] = source.op if source.op != "call_function" else "outside"
        return hashlib.sha256("\n".join(stable_text((*self.nodes, self.end), names)).encode()).hexdigest()


@dataclass(frozen=True)
class Block:
    """Branches that follow each other and repeat as a group.

    Attributes:
        branches: in order.
        values: the stream from the value that goes in to the one that comes out.
    """

    branches: tuple[Branch, ...]
    values: tuple[fx.Node, ...]

    @property
    def start(self) -> fx.Node:
        """The value of the stream that goes in."""
        return self.values[0]

    @property
    def end(self) -> fx.Node:
        """The value of the stream that comes out."""
        return self.values[-1]

    def part(self, kind: str) -> Branch | None:
        """Its first branch of a kind; a parallel branch is attention and feed-forward."""
        kinds = (kind, "parallel") if kind in ("attention", "feed-forward") else (kind,)
        return next((b for b in self.branches if b.kind in kinds), None)


@dataclass(frozen=True)
class Stream:
    """A residual stream.

    Attributes:
        values: nodes that every path goes through, in order.
        branches: the residual branches, in order.
        blocks: the longest run of repeating groups of branches; empty if nothing repeats.
    """

    values: tuple[fx.Node, ...]
    branches: tuple[Branch, ...]
    blocks: tuple[Block, ...]


def find_stream(program: Program) -> Stream | None:
    """The residual stream that leads to the first result, None if there is no residual addition on the way."""
    end = next((n for n in program.outputs if isinstance(n, fx.Node) and _floating(n)), None)
    if end is None:
        return None
    graph = _flow(program)
    if end not in graph:
        return None
    best: list[fx.Node] = []
    for root in itertools.islice(_candidates(graph, end), MOST):
        chain = _chain(graph, root, end)
        if len(_joins(graph, chain)) > len(_joins(graph, best)):
            best = chain
    branches = tuple(_branches(graph, best))
    return Stream(tuple(best), branches, tuple(_blocks(best, branches))) if branches else None


def attention_branches(program: Program) -> list[Branch]:
    """The residual branch closest around each attention that has one to itself, on the way to the result or not.

    Where resolutions change, as in a U-Net, no stream goes through all of them.
    """
    graph, found = _flow(program), list[Branch]()
    for attention in (n for n in program.graph.nodes if n.target is ATTENTION):
        above, below = nx.ancestors(graph, attention), nx.descendants(graph, attention)
        for end in sorted(n for n in below if n.target in ADDS):
            start = next((s for s in end.all_input_nodes if s in above and _alike(s, end)), None)
            if start is not None:
                branch = _branch(graph, start, end)
                if sum(n.target is ATTENTION for n in branch.nodes) == 1:
                    found.append(branch)
                break
    return found


def _alike(a: fx.Node, b: fx.Node) -> bool:
    """Whether two values have the same shape."""
    first, second = ([expression(n) for n in node.meta["val"].shape] for node in (a, b))
    return first == second


def _floating(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _flow(program: Program) -> nx.DiGraph[fx.Node]:
    """Calls and inputs, with edges from values to what reads them; results of several tensors included."""
    graph: nx.DiGraph[fx.Node] = nx.DiGraph()
    for node in program.graph.nodes:
        if node.op in ("placeholder", "call_function"):
            graph.add_node(node)
            graph.add_edges_from((s, node) for s in node.all_input_nodes if s.op in ("placeholder", "call_function"))
    return graph


def _candidates(graph: nx.DiGraph[fx.Node], end: fx.Node) -> Iterable[fx.Node]:
    """Floating point values that are read more than once on the way to the result, in order."""
    reach = nx.ancestors(graph, end)
    for node in sorted(reach):
        if _floating(node) and sum(user in reach or user is end for user in node.users) > 1:
            yield node


def _chain(graph: nx.DiGraph[fx.Node], root: fx.Node, end: fx.Node) -> list[fx.Node]:
    """Values that every path from `root` to `end` goes through, in order."""
    inside = (nx.descendants(graph, root) & (nx.ancestors(graph, end) | {end})) | {root}
    if end not in inside:
        return []
    parents = nx.immediate_dominators(graph.subgraph(inside), root)
    chain = [end]
    while chain[-1] is not root:
        chain.append(parents[chain[-1]])
    return chain[::-1]


def _joins(graph: nx.DiGraph[fx.Node], chain: Sequence[fx.Node]) -> list[int]:
    """Positions of residual additions: their operands all come from the value before them in the chain."""
    found = []
    for k in range(1, len(chain)):
        operands = [s for s in chain[k].all_input_nodes if s in graph and _floating(s)]
        if chain[k].target in ADDS and len(operands) > 1:
            down = nx.descendants(graph, chain[k - 1]) | {chain[k - 1]}
            if all(s in down for s in operands):
                found.append(k)
    return found


def _branches(graph: nx.DiGraph[fx.Node], chain: Sequence[fx.Node]) -> Iterable[Branch]:
    for k in _joins(graph, chain):
        yield _branch(graph, chain[k - 1], chain[k])


def _branch(graph: nx.DiGraph[fx.Node], start: fx.Node, end: fx.Node) -> Branch:
    inside = sorted(nx.descendants(graph, start) & nx.ancestors(graph, end))
    return Branch(start, end, tuple(inside), _kind(graph, inside))


def _kind(graph: nx.DiGraph[fx.Node], nodes: Sequence[fx.Node]) -> str:
    targets = {n.target for n in nodes}
    if ATTENTION in targets:
        inside, attention = graph.subgraph(nodes), next(n for n in nodes if n.target is ATTENTION)
        own = nx.ancestors(inside, attention) | nx.descendants(inside, attention)
        return "parallel" if sum(n.target in LINEARS and n not in own for n in nodes) > 1 else "attention"
    if targets & CONVOLUTIONS:
        return "convolution"
    return "feed-forward" if targets & LINEARS else "other"


def _blocks(chain: Sequence[fx.Node], branches: Sequence[Branch]) -> Iterable[Block]:
    """The longest run of a repeating group of at most four branches."""
    signatures = [b.signature() for b in branches]
    best = (0, 0, 0)  # branches covered, start, length of a group
    for length in range(1, 5):
        for start in range(len(branches) - 2 * length + 1):
            group, count = signatures[start : start + length], 1
            while group == signatures[start + count * length : start + (count + 1) * length]:
                count += 1
            if count > 1 and count * length > best[0]:
                best = count * length, start, length
    covered, start, length = best
    place, after = {node: k for k, node in enumerate(chain)}, 0
    for first in range(start, start + covered, length or 1):
        group_of = tuple(branches[first : first + length])
        stop = place[group_of[-1].end]
        if first + length < start + covered:
            after = place[branches[first + length].start] - stop
        yield Block(group_of, tuple(chain[place[group_of[0].start] : stop + after + 1]))
