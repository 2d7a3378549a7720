"""A region and the values of its inputs as files: what goes to the process that tries candidates."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import fx
from torch.utils import _pytree as pytree

from ..passes.program import Program
from ..targets.target import Target
from .base import Region, seen_by_callers
from .graph_json import decode_program, decode_value, encode_program, encode_value

Json = Any


def encode_request(program: Program, region: Region, values: Sequence[Any], target: Target, path: str) -> Json:
    """JSON of a region; the tensors go into the file at `path` with the strides that they have in memory.

    Raises:
        ArtefactError: an operator or value has no stored form.
    """
    tensors, described = dict[str, torch.Tensor](), []
    for k, value in enumerate(values):
        if not isinstance(value, torch.Tensor):
            described.append({"plain": encode_value(value)})
            continue
        tensors[str(k)] = _span(value).cpu()
        described.append({"shape": list(value.shape), "stride": list(value.stride()), "device": str(value.device)})
    save_file(tensors, path)
    facts = dataclasses.asdict(target) | {"features": sorted(target.features)}
    kept = [seen_by_callers(n) for n in region.outputs]
    inner = encode_program(extract(program, region))
    return {"program": inner, "kept": kept, "values": described, "tensors": path, "target": facts}


def decode_request(request: Json) -> tuple[Program, Region, list[Any], Target]:
    """The inverse of `encode_request`: a program of the region alone, the region in it, its values, the target."""
    stored = load_file(request["tensors"])
    values: list[Any] = []
    for k, d in enumerate(request["values"]):
        if "plain" in d:
            values.append(decode_value(d["plain"]))
        else:
            values.append(stored[str(k)].to(d["device"]).as_strided(d["shape"], d["stride"]))
    facts = {k: tuple(v) if isinstance(v, list) else v for k, v in request["target"].items()}
    target = Target(**(facts | {"features": frozenset(facts["features"])}))
    nodes = request["program"]["nodes"]
    weights = {n[2]: v for n, v in zip(nodes, values, strict=False) if n[0] == "get_attr"}
    inputs = sum(n[0] == "placeholder" for n in nodes)
    program = decode_program(
        request["program"], weights, _spec(inputs, True), _spec(len(request["program"]["outputs"]))
    )
    region = Region.of(n for n in program.graph.nodes if n.op == "call_function")
    for node, kept in zip(region.outputs, request["kept"], strict=True):
        node.meta["kept"] = kept
    return program, region, values, target


def extract(program: Program, region: Region) -> Program:
    """A program that computes the region alone: constant weights stay weights, all else comes in."""
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    weights: dict[str, Any] = {}
    for k, node in enumerate(region.inputs):
        constant = program.constant(node)
        if constant is not None:
            weights[f"w{k}"] = constant
            copies[node] = graph.create_node("get_attr", f"w{k}", name=f"w{k}")
        else:
            copies[node] = graph.create_node("placeholder", f"v{k}", name=f"v{k}")
        copies[node].meta = dict(node.meta)
    for k, node in enumerate(region.nodes):
        copies[node] = graph.node_copy(node, copies.__getitem__)
        copies[node].name = f"n{k}"
    outputs = tuple(copies[n] for n in region.outputs)
    graph.output(outputs)
    inputs = sum(n.op == "placeholder" for n in graph.nodes)
    return Program(graph, weights, _spec(inputs, True), _spec(len(outputs)), _fake=program.fake)


def _spec(leaves: int, call: bool = False) -> pytree.TreeSpec:
    values = tuple([0] * leaves)
    return pytree.tree_structure((values, {}) if call else values)


def _span(value: torch.Tensor) -> torch.Tensor:
    """The memory from a tensor's first to its last element, as one row of its own."""
    last = sum((n - 1) * s for n, s in zip(value.shape, value.stride(), strict=True)) if value.numel() else -1
    return value.detach().as_strided((last + 1,), (1,), value.storage_offset()).clone()
