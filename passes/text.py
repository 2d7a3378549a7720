"""How programs, nodes and values print: stable text that goldens, hashes, reports and errors share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import fx


def where(node: fx.Node) -> str | None:
    """The user's file and line that a node came from: the innermost frame outside torch."""
    frames: list[str] = [
        line.strip() for line in node.meta.get("stack_trace", "").splitlines() if line.strip().startswith("File")
    ]
    inner = [f for f in frames if "/torch/" not in f]
    found = inner or frames
    return found[-1] if found else None


def describe(node: fx.Node, strides: bool = False) -> str:
    """Dtype and shape of a node's value, such as ``f32[8, 128, 384]``; with strides on request."""
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor):
        short = str(value.dtype).removeprefix("torch.").replace("float", "f").replace("int", "i")
        shape = ", ".join(str(s) for s in value.shape)
        tail = ""
        if strides and value.layout is torch.strided:
            tail = "{" + ", ".join(str(s) for s in value.stride()) + "}"
        return f"{short}[{shape}]{tail}"
    if isinstance(value, (tuple, list)):
        return "(" + ", ".join(describe_value(v) for v in value) + ")"
    return type(value).__name__


def describe_value(value: Any) -> str:
    """As `describe`, for a bare value."""
    node = fx.Graph().placeholder("value")
    node.meta["val"] = value
    return describe(node)


def stable_text(nodes: Iterable[fx.Node], names: dict[fx.Node, str], strides: bool = False) -> list[str]:
    """One line per node, named by operator and running number; extends `names` with the names it gives."""
    lines, counts = [], dict[str, int]()
    for node in nodes:
        op = str(node.target) if isinstance(node.target, torch._ops.OpOverload) else _callable_name(node.target)
        base = op.split(".")[1] if "." in op else op
        counts[base] = counts.get(base, 0) + 1
        names[node] = f"{base}_{counts[base]}"
        args = [argument(a, names) for a in node.args]
        args += [f"{k}={argument(v, names)}" for k, v in node.kwargs.items()]
        lines.append(f"{names[node]} = {op}({', '.join(args)}) : {describe(node, strides)}")
    return lines


def argument(value: Any, names: Mapping[fx.Node, str]) -> str:
    """Print of one argument of a node, with nodes under the given names."""
    if isinstance(value, fx.Node):
        return names.get(value, value.name)
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(argument(v, names) for v in value) + "]"
    return repr(value)


def _callable_name(target: Any) -> str:
    return getattr(target, "__name__", str(target))
