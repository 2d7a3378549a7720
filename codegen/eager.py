"""The eager backend: a region as it is, through torch's own operators. It supports everything and is the referee."""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx

from ..passes.nodes import operator_name
from ..targets.target import Target
from .base import Kernel, Region, Schedule
from .source import Source


class EagerBackend:
    """Runs the nodes of a region one after the other with ATen's kernels."""

    name = "eager"

    def absorbs(self, node: fx.Node) -> bool:
        """None."""
        return False

    def supports(self, region: Region, target: Target) -> str | None:
        """Everything is supported."""
        return None

    def space(self, region: Region, target: Target) -> Iterable[Schedule]:
        """There is one way."""
        return (Schedule(),)

    def lower(self, region: Region, target: Target, schedule: Schedule) -> Kernel:
        """Straight-line Python over the region's nodes."""
        source, names = Source(), dict[fx.Node, str]()
        parameters = []
        for node in region.inputs:
            names[node] = f"v{len(names)}"
            parameters.append(names[node])
        for node in region.nodes:
            source.node(node, names)
        results = ", ".join(names[n] for n in region.outputs)
        run, text = source.build(parameters, results)
        name = "_".join(op_name(n) for n in region.nodes[:4])
        return Kernel(name, self.name, run, outputs=len(region.outputs), source=text, schedule=schedule)


def op_name(node: fx.Node) -> str:
    """Bare operator name of a call, such as ``layer_norm``."""
    return operator_name(node) or getattr(node.target, "__name__", "call")
