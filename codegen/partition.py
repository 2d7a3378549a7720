"""Partition: cut a program into convex regions that backends claim, and single nodes for the rest."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import networkx as nx
from torch import fx

from ..passes.program import Program
from ..targets.target import Target
from .base import Backend, Region


def partition(program: Program, backends: Sequence[Backend], target: Target) -> list[Region]:
    """Regions in an order in which they can run; every call of the program is in exactly one.

    Backends are asked in the given order. Each grows clusters greedily along data flow: a node joins the clusters of
    its producers as long as the backend supports the union and no value leaves the cluster and comes back. What no
    backend claims becomes a region of one node, or of a node of several results and those that take it apart.
    """
    cut = _Cut(program)
    for backend in backends:
        cut.claim(backend, target)
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
                known = self.owner.get(source) == backend.name or (source not in self.owner and backend.absorbs(source))
                mine = known and self.cluster.get(source) is not self.cluster[node]
                if mine and (alone or node not in self.owner or self.owner[node] == backend.name):
                    union = sorted([*self.cluster[source], *self.cluster[node]], key=self.position.__getitem__)
                    if backend.supports(Region.of(union), target) is None and self._convex(union):
                        self.owner[node] = self.owner[source] = backend.name
                        for member in union:
                            self.wide.pop(self.position[self.cluster[member][0]], None)
                            self.cluster[member] = union
                        self.wide[self.position[union[0]]] = union

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
