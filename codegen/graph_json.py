"""Programs as JSON: nodes, operators from an allow-list, arguments and shapes. Nothing is evaluated on the way back.

Plain JSON values stand for None, bool, int, str and lists; everything else is an object with one key that says what it
is, such as ``{"node": 3}``, ``{"float": "0x1.8p+1"}`` or ``{"dtype": "float32"}``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils import _pytree as pytree

from ..passes.errors import ArtefactError
from ..passes.program import Program, State
from .operators import name_of, operator_of
from .symbols import decode, decode_environment, encode, encode_environment, expression_of, symbolic

Json = Any
INTEGERS = 2**64


def _constants(kind: type) -> dict[str, Any]:
    """Every constant of one of torch's enumerations by the name that it prints with."""
    return {str(v).removeprefix("torch."): v for v in vars(torch).values() if isinstance(v, kind)}


DTYPES = _constants(torch.dtype)
LAYOUTS = _constants(torch.layout)
FORMATS = _constants(torch.memory_format)
SYMBOLIC: dict[Any, str] = {torch.SymInt: "int", torch.SymFloat: "float", torch.SymBool: "bool"}


def encode_value(value: Any, place: Mapping[fx.Node, int] | None = None) -> Json:
    """JSON of one argument. Raises ArtefactError for a value that has no stored form."""
    if value is None or type(value) in (bool, int, str):
        return value
    if isinstance(value, fx.Node) and place is not None:
        return {"node": place[value]}
    if isinstance(value, float):
        return {"float": value.hex()}
    if isinstance(value, complex):
        return {"complex": [value.real.hex(), value.imag.hex()]}
    for kind, name in ((torch.dtype, "dtype"), (torch.layout, "layout"), (torch.memory_format, "memory_format")):
        if isinstance(value, kind):
            return {name: str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if isinstance(value, slice):
        return {"slice": [encode_value(v, place) for v in (value.start, value.stop, value.step)]}
    if isinstance(value, tuple):
        return {"tuple": [encode_value(v, place) for v in value]}
    if isinstance(value, list):
        return [encode_value(v, place) for v in value]
    raise ArtefactError(f"a value of type {type(value).__name__} has no stored form: {str(value)[:80]}")


def decode_value(stored: Json, nodes: Sequence[fx.Node] = ()) -> Any:
    """The inverse of `encode_value`; `nodes` are those that the value may refer to. Raises ValueError or KeyError."""
    if stored is None or isinstance(stored, (bool, str)):
        return stored
    if isinstance(stored, int) and abs(stored) <= INTEGERS:
        return stored
    if isinstance(stored, list):
        return [decode_value(v, nodes) for v in stored]
    if not isinstance(stored, dict) or len(stored) != 1:
        raise ValueError(f"not a stored value: {str(stored)[:80]}")
    [(kind, content)] = stored.items()
    if kind == "node":
        return nodes[_index(content, len(nodes))]
    if kind == "float":
        return float.fromhex(content)
    if kind == "complex":
        return complex(float.fromhex(content[0]), float.fromhex(content[1]))
    if kind in ("tuple", "slice"):
        inner = [decode_value(v, nodes) for v in content]
        return tuple(inner) if kind == "tuple" else slice(*inner)
    if kind == "device":
        return _device(content)
    return {"dtype": DTYPES, "layout": LAYOUTS, "memory_format": FORMATS}[kind][content]


def _index(value: Any, size: int) -> int:
    if type(value) is not int or not 0 <= value < size:
        raise ValueError(f"{str(value)[:80]} is not an index below {size}")
    return value


def _device(text: Any) -> torch.device:
    if not isinstance(text, str) or text.partition(":")[0] not in ("cpu", "cuda"):
        raise ValueError(f"{str(text)[:80]} is no device of this format")
    return torch.device(text)


def encode_program(program: Program) -> Json:
    """Everything of a program but its weights and structures.

    Raises:
        ArtefactError: an operator, argument or shape has no stored form; the error names the node.
    """
    place: dict[fx.Node, int] = {}
    used: set[sympy.Symbol] = set()
    nodes = []
    for node in program.graph.nodes:
        if node.op == "output":
            continue
        try:
            nodes.append(_encode_node(program, node, place, used))
        except ValueError as error:
            raise ArtefactError(str(error), node=node.name) from error
        except ArtefactError as error:
            raise ArtefactError(error.what, node=node.name, next_step=error.next_step) from error
        place[node] = len(place)
    return {
        **encode_environment(program.fake.shape_env, used),
        "nodes": nodes,
        "outputs": [encode_value(v, place) for v in program.outputs],
        "state": [[s.slot, s.output] for s in program.state],
        "history": list(program.history),
        "parameters": list(program.parameters),
    }


def _encode_node(program: Program, node: fx.Node, place: Mapping[fx.Node, int], used: set[sympy.Symbol]) -> Json:
    value = _encode_meta(node.meta["val"], used) if "val" in node.meta else None
    if node.op in ("placeholder", "get_attr"):
        if node.op == "get_attr" and not isinstance(program.weights[str(node.target)], torch.Tensor):
            kind = type(program.weights[str(node.target)]).__name__
            raise ArtefactError(f"the weight {node.target} is a {kind}: only tensors have a stored form",
                                next_step="control flow (torch.cond and the like) cannot be saved yet")  # fmt: skip
        return [node.op, node.name, str(node.target), value]
    args = [encode_value(a, place) for a in node.args]
    kwargs = {k: encode_value(v, place) for k, v in node.kwargs.items()}
    traced = _encode_meta(node.meta["traced"], used) if "traced" in node.meta else None
    return [node.op, node.name, name_of(node.target), value, args, kwargs, traced]


def _encode_meta(value: Any, used: set[sympy.Symbol]) -> Json:
    """JSON of a node's example value: kind first, so that tensors, symbolic numbers and constants stay apart."""
    if isinstance(value, torch.Tensor):
        if value.layout is not torch.strided or value.is_quantized:
            raise ArtefactError(f"values of layout {value.layout} have no stored form")
        sizes = [[_encode_size(s, used) for s in sizes] for sizes in (value.shape, value.stride())]
        return ["tensor", str(value.dtype).removeprefix("torch."), str(value.device), *sizes]
    for kind, name in SYMBOLIC.items():
        if isinstance(value, kind):
            expression = expression_of(value)
            used |= expression.free_symbols
            return [name, encode(expression)]
    if isinstance(value, (tuple, list)):
        return ["tuple" if isinstance(value, tuple) else "list", [_encode_meta(v, used) for v in value]]
    return ["constant", encode_value(value)]


def _encode_size(size: Any, used: set[sympy.Symbol]) -> Json:
    if isinstance(size, int):
        return size
    used |= expression_of(size).free_symbols
    return encode(expression_of(size))


def decode_program(
    stored: Json, weights: dict[str, Any], in_spec: pytree.TreeSpec, out_spec: pytree.TreeSpec
) -> Program:
    """The inverse of `encode_program`: the graph with shapes of a fresh fake mode.

    Raises:
        ArtefactError: an operator is not in the allow-list or unknown to this torch.
        ValueError, KeyError, TypeError, IndexError: the content contradicts the format.
    """
    environment = ShapeEnv()
    mode = FakeTensorMode(shape_env=environment, allow_non_fake_inputs=True)
    symbols = decode_environment(stored, environment)
    graph, nodes = fx.Graph(), list[fx.Node]()
    for record in stored["nodes"]:
        node = _decode_node(graph, record, nodes, weights)
        if record[3] is not None:
            node.meta["val"] = _decode_meta(record[3], symbols, mode)
        if len(record) > 6 and record[6] is not None:
            node.meta["traced"] = _decode_meta(record[6], symbols, mode)
        nodes.append(node)
    outputs = tuple(decode_value(v, nodes) for v in stored["outputs"])
    graph.output(outputs)
    state = tuple(State(slot, _index(output, len(outputs))) for slot, output in stored["state"])
    inputs = sum(n.op == "placeholder" for n in nodes)
    for slot in (s.slot for s in state):
        if slot not in weights and not (type(slot) is int and 0 <= slot < inputs):
            raise ValueError(f"no weight or input for the state {str(slot)[:80]}")
    if in_spec.num_leaves != inputs or out_spec.num_leaves > len(outputs):
        raise ValueError("the graph and the structures of inputs and outputs contradict each other")
    history, parameters = (tuple(_text(n) for n in stored[k]) for k in ("history", "parameters"))
    return Program(graph, weights, in_spec, out_spec, state, history, parameters, mode)


def _decode_node(graph: fx.Graph, record: Json, nodes: list[fx.Node], weights: Mapping[str, Any]) -> fx.Node:
    op, name, target, _, *call = record
    if not _text(name).isidentifier():
        raise ValueError(f"{name[:80]!r} is no node name")
    if op == "placeholder" and not call:
        return graph.create_node("placeholder", _text(target), name=name)
    if op == "get_attr" and not call:
        if target not in weights:
            raise ValueError(f"no weight is called {target[:80]!r}")
        return graph.create_node("get_attr", target, name=name)
    if op != "call_function":
        raise ValueError(f"no node is a {str(op)[:80]}")
    args, kwargs = (
        tuple(decode_value(a, nodes) for a in call[0]),
        {k: decode_value(v, nodes) for k, v in call[1].items()},
    )
    function = operator_of(_text(target))
    known = {a.name for a in function._schema.arguments} if isinstance(function, torch._ops.OpOverload) else set()
    if not kwargs.keys() <= known:  # keywords become part of generated source: only the operator's own may pass
        raise ValueError(f"{target} has no argument {sorted(kwargs.keys() - known)[0][:80]!r}")
    return graph.create_node("call_function", function, args, kwargs, name=name)


def _decode_meta(stored: Json, symbols: Mapping[str, sympy.Symbol], mode: FakeTensorMode) -> Any:
    kind, *content = stored
    if kind == "tensor":
        dtype, device, shape, strides = content
        sizes = [[_decode_size(s, symbols, mode) for s in sizes] for sizes in (shape, strides)]
        value = torch.empty_strided(*sizes, dtype=DTYPES[dtype], device="meta")
        return FakeTensor(mode, value, _device(device))  # an order of magnitude faster than a call under the mode
    if kind in ("int", "float", "bool"):
        return symbolic(kind, decode(content[0], symbols), _environment(mode))
    if kind in ("tuple", "list"):
        inner = [_decode_meta(v, symbols, mode) for v in content[0]]
        return tuple(inner) if kind == "tuple" else inner
    if kind == "constant":
        return decode_value(content[0])
    raise ValueError(f"no value is a {str(kind)[:80]}")


def _decode_size(stored: Json, symbols: Mapping[str, sympy.Symbol], mode: FakeTensorMode) -> Any:
    if isinstance(stored, int):
        return stored
    return symbolic("int", decode(stored, symbols), _environment(mode))


def _environment(mode: FakeTensorMode) -> ShapeEnv:
    assert mode.shape_env is not None
    return mode.shape_env


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{str(value)[:80]} is not text")
    return value
