"""Partition: cut a program into convex regions that backends claim, and single nodes for the rest."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Sequence

import networkx as nx
import torch
from torch import fx

from ..passes.program import Program
from ..targets import cost
from ..targets.target import Target
from .base import Backend, Region

PARTS = 16  # of one result that may be read apart and still be one kernel's


def partition(program: Program, backends: Sequence[Backend], target: Target) -> list[Region]:
    """Regions in an order in which they can run; every call of the program is in exactly one.

    Backends are asked in the given order. Each grows clusters greedily along data flow: a node joins the clusters of
    its producers as long as the backend supports the union and no value leaves the cluster and comes back. Then
    clusters take in those that read their result in parts, and nodes at the end of a cluster move to the one that reads
    them where that leaves fewer bytes to be written and read again. What no backend claims becomes a region of one
    node, or of a node of several results and those that take it apart.
    """
    cut = _Cut(program)
    for backend in backends:
        cut.claim(backend, target)
        cut.collect(backend, target)
        cut.shift(backend, target)
    return cut.ordered()


class _Cut:
    """The clusters of a growing partition and the convexity test over their quotient graph."""

    def __init__(self, program: Program) -> None:
        self.calls = [n for n in program.graph.nodes if n.op == "call_function"]
        self.position = {n: i for i, n in enumerate(self.calls)}
        self.cluster: dict[fx.Node, list[fx.Node]] = {n: [n] for n in self.calls}
        self.wide: dict[int, list[fx.Node]] = {}  # clusters of more than one node, by the position of their first
        for node in self.calls:
            self._keep_together(node)
        self.owner: dict[fx.Node, str] = {}

    def _keep_together(self, node: fx.Node) -> None:
        """Put a node of several results into one cluster with those that take it apart, if nothing else reads it."""
        several = isinstance(node.meta.get("val"), (tuple, list)) and node.target is not operator.getitem
        if several and node.users and all(u.target is operator.getitem for u in node.users):
            group = sorted([node, *node.users], key=self.position.__getitem__)
            self.cluster.update(dict.fromkeys(group, group))
            self.wide[self.position[node]] = group

    def claim(self, backend: Backend, target: Target) -> None:
        """Grow the backend's clusters over the nodes that nobody has claimed yet."""
        for node in self.calls:
            if node in self.owner:
                continue
            alone = backend.supports(Region.of(self.cluster[node]), target) is None
            if alone:
                self.owner.update(dict.fromkeys(self.cluster[node], backend.name))
            for source in node.all_input_nodes:
                mine = self.cluster.get(source) is not self.cluster[node]
                if not mine or not (alone or node not in self.owner or self.owner[node] == backend.name):
                    continue
                owned = self.owner.get(source) == backend.name
                for known in [self.cluster[source]] if owned else self._taken(source, backend):
                    union = sorted({*known, *self.cluster[node]}, key=self.position.__getitem__)
                    if backend.supports(Region.of(union), target) is None and self._convex(union):
                        self.owner.update(dict.fromkeys([node, *known], backend.name))
                        self._regroup(union)
                        break

    def _taken(self, source: fx.Node, backend: Backend) -> list[list[fx.Node]]:
        """Lone nodes in a row, of which a consumer reads the first, that it may take in: all of them, then fewer."""
        row: list[fx.Node] = []
        node: fx.Node | None = source
        while node is not None and node in self.position and node not in self.owner and backend.absorbs(node):
            row += self.cluster[node]
            node = next((s for s in node.all_input_nodes if backend.absorbs(s)), None)
        return [row[:k] for k in range(len(row), 0, -1)]

    def _regroup(self, *groups: list[fx.Node]) -> None:
        """Let these groups be the clusters of their members, which were in no other clusters than members are now."""
        for member in itertools.chain(*groups):
            self.wide.pop(self.position[self.cluster[member][0]], None)
        for group in groups:
            self.cluster.update(dict.fromkeys(group, group))
            if len(group) > 1:
                self.wide[self.position[group[0]]] = group

    def collect(self, backend: Backend, target: Target) -> None:
        """Let a node take in clusters that read views of parts of its result, which no step of `claim` could reach."""
        for node in self.calls:
            parts = [user for user in node.users if user in self.position and cost.is_free(user)]
            if self.owner.get(node) != backend.name or not 0 < len(parts) <= PARTS or len(parts) < len(node.users):
                continue  # the result itself is read, or returned
            if sum(map(_elements, parts)) > _elements(node):
                continue  # what is read twice would be computed twice
            views = self._views_of(node)
            readers = [self.cluster[n] for v in views for n in (v, *v.users) if self.owner.get(n) == backend.name]
            for reader in {id(r): r for r in readers}.values():
                if self.cluster[reader[0]] is not reader or reader is self.cluster[node]:  # it has just been taken in
                    continue
                between, stack = set(parts), list(reader)
                while stack:
                    new = [s for s in stack.pop().all_input_nodes if s in views and s not in between]
                    between.update(new)
                    stack += new
                if any(self.cluster[n] not in ([n], reader, self.cluster[node]) for n in between):
                    continue
                union = sorted({*self.cluster[node], *between, *reader}, key=self.position.__getitem__)
                if backend.supports(Region.of(union), target) is None and self._convex(union):
                    self.owner.update(dict.fromkeys(union, backend.name))
                    self._regroup(union)

    def _views_of(self, node: fx.Node) -> list[fx.Node]:
        """All views of a node's result, in order."""
        found, stack = set[fx.Node](), [node]
        while stack:
            for user in stack.pop().users:
                if user in self.position and user not in found and cost.is_free(user):
                    found.add(user)
                    stack.append(user)
        return sorted(found, key=self.position.__getitem__)

    def shift(self, backend: Backend, target: Target) -> None:
        """Move nodes of the backend's clusters to the only cluster that reads them, where that saves bytes.

        No circle can close: what the reader then waits for, it waited for before.
        """
        for node in reversed(self.calls):
            own, readers = self.cluster[node], [self.cluster.get(user) for user in node.users]
            reader = readers[0] if readers else None
            if reader is None or reader is own or len(own) == 1 or any(r is not reader for r in readers):
                continue
            if {self.owner.get(n) for n in (node, reader[0])} != {backend.name} or _saved(node, own, reader) <= 0:
                continue
            rest = [n for n in own if n is not node]
            union = sorted([node, *reader], key=self.position.__getitem__)
            if all(backend.supports(Region.of(nodes), target) is None for nodes in (union, rest)):
                self._regroup(rest, union)

    def _convex(self, union: Sequence[fx.Node]) -> bool:
        """Whether merging leaves the quotient graph acyclic: no way out of the union leads back into it."""
        members = set(union)
        first = self._floor(self.position[union[0]])
        stack = [s for n in union for s in n.all_input_nodes if s in self.position and s not in members]
        seen: set[int] = set()
        while stack:
            group = self.cluster[stack.pop()]
            if id(group) in seen or self.position[group[-1]] < first:
                continue
            seen.add(id(group))
            for node in group:
                for source in node.all_input_nodes:
                    if source in members:
                        return False
                    if source in self.position:
                        stack.append(source)
        return True

    def _floor(self, first: int) -> int:
        """The position below which nothing depends on a node from `first` on, clusters that reach across counted in."""
        for group in sorted(self.wide.values(), key=lambda g: self.position[g[-1]], reverse=True):
            if self.position[group[-1]] >= first:
                first = min(first, self.position[group[0]])
        return first

    def ordered(self) -> list[Region]:
        """The clusters as regions, topologically sorted, close to the program's own order."""
        quotient: nx.DiGraph[int] = nx.DiGraph()
        groups = {self.position[g[0]]: g for g in self.cluster.values()}
        quotient.add_nodes_from(groups)
        for key, group in groups.items():
            for node in group:
                for source in node.all_input_nodes:
                    if source in self.position and (origin := self.position[self.cluster[source][0]]) != key:
                        quotient.add_edge(origin, key)
        return [Region.of(groups[key]) for key in nx.lexicographical_topological_sort(quotient)]


def _elements(node: fx.Node) -> int:
    value = node.meta.get("val")
    return math.prod(cost.hint(size) for size in value.shape) if isinstance(value, torch.Tensor) else 0


def _saved(node: fx.Node, own: Sequence[fx.Node], reader: Sequence[fx.Node]) -> int:
    """Bytes that need not be written or read when a node moves from its own cluster to the one that reads it."""
    inside, beyond = set(own), set(reader)
    saved = 2 * cost.stored_bytes(node)
    for source in node.all_input_nodes:
        size, others = cost.stored_bytes(source), [user for user in source.users if user is not node]
        if source in inside:
            saved -= 0 if any(user not in inside for user in others) else size  # now it must be written
        else:
            saved += 0 if any(user in inside for user in others) else size  # not read there any more
        saved -= 0 if any(user in beyond for user in others) else size
    return saved
