"""Rows of the report's kernel table from the choices of an executable."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from ..codegen.eager import op_name
from ..codegen.executable import Executable
from ..codegen.select import Choice
from ..targets import cost
from ..targets.target import Target
from .report import KernelRow


def kernel_rows(executable: Executable, target: Target) -> list[KernelRow]:
    """One row per distinct kernel, the most expensive first; eager operators are grouped by name and shapes.

    Views that were made once are no kernels of a call and are left out.
    """
    choices = [c for c in executable.choices if not executable.premade.issuperset(c.region.nodes)]
    groups: dict[tuple[str, str], list[Choice]] = {}
    for choice in choices:
        key = choice.region.digest() if choice.kernel.backend != "eager" or choice.rivals else choice.kernel.name
        groups.setdefault((choice.kernel.backend, key), []).append(choice)
    total = sum((c.kernel.seconds or 0.0) for c in choices)
    rows = []
    for (backend, _), group in groups.items():
        kernel, nodes = group[0].kernel, group[0].region.nodes
        flops, moved = cost.totals(nodes)
        rivals = {k: v for k, v in group[0].rivals.items() if v != kernel.seconds}
        spent = (kernel.seconds or 0.0) * len(group)
        rows.append(KernelRow(
            kernel.name, backend, [op_name(n) for n in nodes], len(group), kernel.seconds, flops, moved,
            str(kernel.schedule), kernel.source, dict(kernel.asm), rivals,
            spent / total if total and kernel.seconds else None, _of_peak(kernel.seconds, nodes, target),
        ))  # fmt: skip
    return sorted(rows, key=lambda r: -(r.share or 0.0))


def _of_peak(seconds: float | None, nodes: Sequence[fx.Node], target: Target) -> float | None:
    """The rate of a kernel's operations over the target's peak for the dtype of the operator that does most of them."""
    most = max(nodes, key=cost.flops)
    peak = target.flops.get(cost.compute_dtype(most))
    return cost.totals(nodes)[0] / seconds / peak if seconds and peak else None
