"""Capture: an nn.Module with example inputs, an ExportedProgram or a dynamo graph -> a functional ATen Program."""

from __future__ import annotations

import inspect
import itertools
import operator
import sysconfig
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode
from torch.export import ExportedProgram
from torch.export.exported_program import (
    _override_composite_implicit_decomp,
    _split_decomp_table_to_cia_and_python_decomp,
)
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils import _pytree as pytree

from .errors import CaptureError
from .nodes import arguments, erase_unused
from .program import Program, State
from .text import where
from .unflatten import unflatten

aten = torch.ops.aten

NEXT_DOOR = 'try torch.compile(model, backend="torchlathe"), which accepts graph breaks'
DROPOUTS = (aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default, aten.native_dropout.default)


def capture(
    model: torch.nn.Module | ExportedProgram,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
) -> Program:
    """Trace a model into a Program. Weights are shared with the model; high-level operators stay whole.

    Raises:
        CaptureError: the model has a construct that cannot be captured as one graph; the error names it and its line.
    """
    if isinstance(model, ExportedProgram):
        return _from_export(model, ())
    try:
        with torch.no_grad():
            exported = torch.export.export(
                model, tuple(args), dict(kwargs or {}), dynamic_shapes=dynamic_shapes, strict=False
            )
    except Exception as error:  # torch.export raises many unrelated types; each becomes one typed error
        raise _explain(error, "torch.export cannot capture this model", NEXT_DOOR) from error
    names = tuple(inspect.signature(model.forward).parameters)
    return _from_export(exported, names, training=model.training)


def capture_graph(module: fx.GraphModule, example_inputs: Sequence[Any]) -> Program:
    """Trace a dynamo graph, whose parameters are inputs and whose sizes may be symbols, into a Program.

    Args:
        module: the graph module that dynamo hands to a backend.
        example_inputs: its inputs: fake or real tensors and SymInts.

    Raises:
        CaptureError: an operator of the graph cannot be traced.
    """
    fake = detect_fake_mode(example_inputs) or FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    inputs = [
        fake.from_tensor(i) if isinstance(i, torch.Tensor) and not isinstance(i, FakeTensor) else i
        for i in example_inputs
    ]
    mutated: list[int] = []
    spec: list[pytree.TreeSpec] = []

    def functional(*values: Any) -> list[Any]:
        mutated.clear()
        with FunctionalTensorMode(export=True):
            wrapped = pytree.tree_map_only(torch.Tensor, FunctionalTensor.to_functional, values)
            result = fx.Interpreter(module).run(*wrapped)
            leaves, found = pytree.tree_flatten(result)
            spec.append(found)
            for position, value in enumerate(wrapped):
                if isinstance(value, FunctionalTensor) and torch._functionalize_has_data_mutation(value.elem):  # type: ignore[attr-defined]
                    mutated.append(position)
            return [_unwrap(v) for v in (*leaves, *(wrapped[i] for i in mutated))]

    try:
        # Traced below autocast, grad modes and vmap, so that they leave only their effect in the graph.
        with (
            _modes_restored(),
            torch.no_grad(),
            fake,
            enable_python_dispatcher(),
            fx.traceback.preserve_node_meta(),
            _override_composite_implicit_decomp(_split_decomp_table_to_cia_and_python_decomp({})[0]),
        ):
            traced = make_fx(functional, record_module_stack=False)(*inputs)
    except Exception as error:  # tracing raises many unrelated types; each becomes one typed error
        raise _explain(error, "this graph cannot be traced", None) from error
    graph, weights = fx.Graph(), dict[str, Any]()
    copies: dict[fx.Node, fx.Node] = {}
    for node in (n for n in traced.graph.nodes if n.op == "placeholder"):
        copies[node] = graph.placeholder(node.name)
        copies[node].meta = dict(node.meta)
    graph.output(tuple(_copy_body(traced, graph, copies, weights)))
    in_spec = pytree.tree_flatten((tuple(example_inputs), {}))[1]
    leaves = spec[-1].num_leaves
    state = tuple(State(slot, leaves + i) for i, slot in enumerate(mutated))
    program = Program(graph, weights, in_spec, spec[-1], state, _fake=fake)
    clean(program)
    return program


@contextmanager
def _modes_restored() -> Iterator[None]:
    """A trace that fails inside vmap or autocast must not leave them switched on."""
    depth = torch._C._functorch.get_dynamic_layer_stack_depth()
    autocast = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
    try:
        yield
    finally:
        torch._C._functorch.pop_dynamic_layer_stack_and_undo_to_depth(depth)
        torch.set_autocast_enabled("cpu", autocast[0])
        torch.set_autocast_dtype("cpu", autocast[1])


def _unwrap(value: Any) -> Any:
    if not isinstance(value, FunctionalTensor):
        return value
    torch._sync(value)  # type: ignore[attr-defined]
    return torch._from_functional_tensor(value.elem)


def _from_export(exported: ExportedProgram, names: tuple[str, ...], training: bool = False) -> Program:
    with warnings.catch_warnings():
        # torch copies its own pytree specs in a way that it warns of itself
        warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)
        exported = exported.run_decompositions({})
    signature, spec = exported.graph_signature, exported.call_spec
    graph, weights = fx.Graph(), dict[str, Any]()
    copies: dict[fx.Node, fx.Node] = {}
    placeholders = [n for n in exported.graph.nodes if n.op == "placeholder"]
    slots: list[str | None] = []
    for node, entry in zip(placeholders, signature.input_specs, strict=True):
        if entry.kind in (InputKind.USER_INPUT, InputKind.TOKEN, InputKind.CUSTOM_OBJ):
            slots.append(entry.arg.name)
            copies[node] = graph.placeholder(node.name)
            copies[node].meta = dict(node.meta)
    for node, entry in zip(placeholders, signature.input_specs, strict=True):
        if node not in copies:
            store = exported.constants if entry.kind is InputKind.CONSTANT_TENSOR else exported.state_dict
            name = str(entry.target)
            found = store[name] if name in store else exported.constants[name]
            weights[name] = found.detach() if isinstance(found, torch.Tensor) else found
            copies[node] = graph.get_attr(name)
            copies[node].meta = dict(node.meta)
    _copy_body(exported.graph_module, graph, copies, weights)
    results = exported.graph.output_node().args[0]
    kinds = signature.output_specs
    order = [i for i, s in enumerate(kinds) if s.kind is OutputKind.USER_OUTPUT]
    order += [i for i, s in enumerate(kinds) if s.kind is not OutputKind.USER_OUTPUT]
    graph.output(tuple(fx.node.map_arg(results[i], copies.__getitem__) for i in order))
    state = []
    for position, index in enumerate(order):
        entry = kinds[index]
        if entry.kind in (OutputKind.BUFFER_MUTATION, OutputKind.PARAMETER_MUTATION):
            state.append(State(str(entry.target), position))
        elif entry.kind is OutputKind.USER_INPUT_MUTATION:
            state.append(State(slots.index(str(entry.target)), position))
    program = Program(graph, weights, spec.in_spec, spec.out_spec, tuple(state), parameters=names)
    clean(program, training)
    return program


def _copy_body(source: fx.GraphModule, graph: fx.Graph, copies: dict[fx.Node, fx.Node], weights: dict[str, Any]) -> Any:
    """Copy the calls of `source` into `graph`, inlining grad-mode and autocast wrappers; returns its output."""
    inlined: dict[fx.Node, fx.GraphModule] = {}
    result = None
    for node in source.graph.nodes:
        if node.op == "output":
            result = fx.node.map_arg(node.args[0], copies.__getitem__)
        if node.op in ("placeholder", "output"):
            continue
        if node.op == "get_attr":
            value = _attribute(source, str(node.target))
            if isinstance(value, fx.GraphModule) and all(_wraps(user) for user in node.users):
                inlined[node] = value
                continue
            weights[name := _unique(str(node.target), weights)] = value
            copies[node] = graph.get_attr(name)
            copies[node].meta = dict(node.meta)
        elif _wraps(node):
            inner = next(a for a in node.args if isinstance(a, fx.Node) and a in inlined)
            given = node.args[list(node.args).index(inner) + 1 :]
            body = inlined[inner]
            feeds = dict(zip((n for n in body.graph.nodes if n.op == "placeholder"), given, strict=True))
            below = {p: fx.node.map_arg(v, copies.__getitem__) for p, v in feeds.items()}
            copies[node] = _copy_body(body, graph, below, weights)
        elif node.target is operator.getitem and isinstance(copies.get(node.args[0]), (tuple, list)):
            copies[node] = copies[node.args[0]][node.args[1]]  # type: ignore[index]
        else:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    return result


def _wraps(node: fx.Node) -> bool:
    name = getattr(node.target, "__name__", str(node.target))
    return name in ("wrap_with_set_grad_enabled",) or (name == "wrap_with_autocast" and node.args[2] is False)


def _attribute(module: Any, name: str) -> Any:
    return operator.attrgetter(name)(module)


def _unique(name: str, taken: Mapping[str, Any]) -> str:
    count, found = 1, name
    while found in taken:
        found, count = f"{name}_{count}", count + 1
    return found


def clean(program: Program, training: bool = False) -> None:
    """Remove what tracing leaves behind: metadata asserts, no-op casts, aliases, dropout in eval mode, dead nodes.

    Pieces of a tensor become slices of it, so that an operator of several results is not between a value and its parts,
    and products of flattened rows linear layers.

    Raises:
        CaptureError: `training` is set and an operator behaves as in training (dropout, batch statistics).
    """
    for node in list(program.graph.nodes):
        if node.op != "call_function":
            continue
        if training and arguments(node).get("train", arguments(node).get("training", False)) is True:
            raise CaptureError(f"{node.target} runs in training mode", node=node.name, where=where(node),
                               next_step="call model.eval() before optimize")  # fmt: skip
        if node.target in (aten._assert_tensor_metadata.default, aten._assert_scalar.default):
            program.graph.erase_node(node)
        elif (source := _same_value(node)) is not None:
            node.replace_all_uses_with(source)
            program.graph.erase_node(node)
        elif node.target in (aten.split.Tensor, aten.split_with_sizes.default):
            _slice_pieces(program, node)
    unflatten(program)
    for node in reversed(list(program.graph.nodes)):
        erase_unused(node)
    for node in list(program.graph.nodes):
        if node.op == "get_attr" and not node.users:
            program.graph.erase_node(node)
    used = {str(n.target) for n in program.graph.nodes if n.op == "get_attr"} | {s.slot for s in program.state}
    program.weights = {k: v for k, v in program.weights.items() if k in used}


def _slice_pieces(program: Program, node: fx.Node) -> None:
    """Let the readers of a split read slices, where sizes are static."""
    given, pieces = arguments(node), node.meta["val"]
    source, dim = given["self"], given["dim"] % pieces[0].dim()
    ends = list(itertools.accumulate(p.shape[dim] for p in pieces))
    if not all(isinstance(end, int) for end in ends) or any(u.target is not operator.getitem for u in node.users):
        return
    for user in list(node.users):
        k = int(user.args[1])  # type: ignore[arg-type]
        first = ends[k] - pieces[k].shape[dim]
        piece = program.call(aten.slice.Tensor, source, dim, first, ends[k], before=user, like=user)
        user.replace_all_uses_with(piece)
        program.graph.erase_node(user)


def _same_value(node: fx.Node) -> fx.Node | None:
    """The input that a node merely passes on, if it does."""
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node):
        return None
    if node.target in (aten.alias.default, aten.detach.default, aten.lift_fresh.default):
        return source
    if node.target in DROPOUTS and node.target is not aten.native_dropout.default:
        return source if arguments(node)["train"] is False else None
    before, after = source.meta.get("val"), node.meta.get("val")
    if not (isinstance(before, torch.Tensor) and isinstance(after, torch.Tensor)):
        return None
    same = before.dtype == after.dtype and before.device == after.device and before.stride() == after.stride()
    copies = (aten._to_copy.default, aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten.clone.default,
              aten.contiguous.default, aten.type_as.default, aten.lift_fresh_copy.default)  # fmt: skip
    if node.target in copies and same and before.shape == after.shape:
        # A copy that reaches the outside must stay one: the caller may write into what it gets.
        return None if _escapes(node) else source
    return None


def _escapes(node: fx.Node) -> bool:
    """Whether an output may share the memory of this node's value: directly, or through views of it."""
    for user in node.users:
        if user.op == "output":
            return True
        returns = user.target._schema.returns if isinstance(user.target, torch._ops.OpOverload) else ()
        passes_on = user.target is operator.getitem or any(r.alias_info is not None for r in returns)
        if passes_on and _escapes(user):
            return True
    return False


def _explain(error: Exception, what: str, next_step: str | None) -> CaptureError:
    """The construct and line of a failed trace, from the exception's text and the innermost frame of the model."""
    frames = []
    trace = error.__traceback__
    while trace is not None:
        frames.append((trace.tb_frame.f_code.co_filename, trace.tb_lineno))
        trace = trace.tb_next
    inner = [f"{name}:{line}" for name, line in frames if _of_the_model(name)]
    first = next((line for line in str(error).splitlines() if line.strip()), "no message")
    return CaptureError(
        f"{what}: {type(error).__name__}: {first.strip()}", where=inner[-1] if inner else None, next_step=next_step
    )


def _of_the_model(file: str) -> bool:
    standard = file.startswith(sysconfig.get_path("stdlib")) and "-packages" not in file
    ours = file == __file__ or file.startswith(str(Path(torch.__file__).parent))
    return not (standard or ours or file.startswith("<"))
