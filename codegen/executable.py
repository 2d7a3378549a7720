"""Executable: a flat list of kernel calls behind the model's own call signature."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from .. import targets
from ..passes.errors import InputError
from ..passes.placement import place_of
from ..passes.program import Program
from ..targets.target import Target
from .arena import Arenas, plan, verify, views_of
from .base import Destination
from .graphs import Graphs
from .guards import guard_source
from .pages import LARGE, on_large_pages
from .save import save
from .select import Choice
from .source import Source, releases
from .weight_store import WeightNames, WeightStore


class Executable(torch.nn.Module):
    """A compiled program that is called like the model it came from.

    Calls check structure, dtypes, devices and shapes, then run one straight-line function: torch operators for eager
    regions, compiled kernels for the others. Values die after their last use. All state of a call is local, so several
    threads may call one executable (except where the model itself carries state).

    Args:
        program: the optimized program.
        choices: a kernel for every region of the program, in order.
        model: the original module; attributes that the executable lacks are looked up on it.
        report: what the optimizer did.
        target: what the kernels were lowered for; this host's CPU if it is left out.
        weights_budget: bytes of device memory for weights; those beyond it are kept in host memory and streamed, and
            calls run one at a time and without CUDA graphs. None takes the weights as they lie.
        num_threads: threads of every call; None takes what `torch.set_num_threads` says at the call.
    """

    num_threads: int | None = None

    def __init__(self, program: Program, choices: Sequence[Choice], *, model: Any = None, report: Any = None,
                 target: Target | None = None, weights_budget: int | None = None) -> None:  # fmt: skip
        super().__init__()
        self.target, self.weights_budget, self.weight_store = target or targets.get("cpu"), weights_budget, None
        if weights_budget is not None:
            self.weight_store = WeightStore(program, choices, weights_budget, place_of(program))
        self.program, self.choices, self.report = program, list(choices), report
        self.counts: dict[str, int] = {"eager fallbacks": 0}
        self.__dict__["_model"] = model
        self.device = place_of(program)
        self._plain, self.source, self.premade = _assemble(program, self.choices, self.device, self.weight_store)
        self._run = Graphs(self._plain, self.counts) if self.device.type == "cuda" else self._plain
        if self.weight_store is not None:
            self.program = program = replace(program, weights=self.weight_store.weights)
            if self.weight_store.plan.loads:
                self._run = self.weight_store.alone(self._plain)
        self._leaves = _plain_structure(program)
        self._unflatten = _result_builder(program)
        self._slots = [(s.slot, s.output) for s in program.state]
        self._entangled = _reads_slots(program)
        self.eval()

    def __getattr__(self, name: str) -> Any:
        model = self.__dict__.get("_model")
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__"):
                raise
        if model is None:
            raise AttributeError(
                f"this Executable has no attribute {name!r}: it was loaded from a file, or built without the original"
                " module, so attributes of the model are not available"
            )
        return getattr(model, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the compiled program. Takes and returns what the model's forward takes and returns.

        Raises:
            InputError: the call does not fit what was compiled; the message says what was compiled and what came.
        """
        return self.forward(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """See `__call__`; module hooks are not run."""
        return self._unflatten(self.run_flat(self._flatten(args, kwargs)))

    def run_flat(self, flat: Sequence[Any]) -> Sequence[Any]:
        """Run on flat inputs, write carried tensors back, return the flat results (carried tensors included)."""
        if torch.is_autocast_enabled("cpu"):  # its effect, if any, was captured with the graph
            with torch.autocast("cpu", enabled=False):
                return self.run_flat(flat)
        if self.num_threads is not None and torch.get_num_threads() != self.num_threads:
            with threads(self.num_threads):
                return self.run_flat(flat)
        grad = torch.is_grad_enabled()
        if grad:
            torch._C._set_grad_enabled(False)
        try:
            results = self._run(*flat)
            if self._entangled:
                results = _detached(results, self._entangled)
            for slot, output in self._slots:
                target = self.program.weights[slot] if isinstance(slot, str) else flat[slot]
                target.copy_(results[output])
        finally:
            if grad:
                torch._C._set_grad_enabled(True)
        return results  # type: ignore[no-any-return]

    def measured(self, flat: Sequence[Any]) -> Sequence[Any]:
        """Run on flat inputs without writing carried tensors back: what timing calls, so that it changes nothing."""
        with torch.no_grad():
            return self._run(*flat)  # type: ignore[no-any-return]

    def _flatten(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Sequence[Any]:
        count, keywords = self._leaves
        if count == len(args) and len(keywords) == len(kwargs):
            if not kwargs:
                return args
            try:
                return (*args, *(kwargs[k] for k in keywords))
            except KeyError:
                pass
        flat, spec = pytree.tree_flatten((args, dict(kwargs)))
        if spec == self.program.in_spec:
            return flat
        return self._rebound(args, kwargs)

    def _rebound(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
        """Inputs of a call that passes by position what was compiled by keyword, the other way round, or reordered."""
        names = self.program.parameters
        given = dict(zip(names, args, strict=False)) | dict(kwargs)
        spec_args, spec_kwargs = self.program.in_spec.children()
        wanted = len(spec_args.children())
        order = [*names[:wanted], *(spec_kwargs.context or [])]
        known = len(args) <= len(names) and len(given) == len(args) + len(kwargs)
        if known and len(order) >= wanted and given.keys() >= set(order):
            values = [given.pop(name) for name in order]
            if all(v is None for v in given.values()):  # a default that was left out of the example call
                ordered = dict(zip(order[wanted:], values[wanted:], strict=True))
                flat, spec = pytree.tree_flatten((tuple(values[:wanted]), ordered))
                if spec == self.program.in_spec:
                    return flat
        raise InputError(
            f"compiled for a call with {_shape_of_call(self.program.in_spec)}, "
            f"called with {_shape_of_call(pytree.tree_structure((args, dict(kwargs))))}",
            next_step="call it as the example was, or optimize again with this call as the example",
        )

    def parameters(self, recurse: bool = True) -> Iterator[torch.nn.Parameter]:
        """The original model's parameters; none for an executable that was loaded from a file."""
        return iter(()) if self._model is None else self._model.parameters(recurse)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """As `parameters`, with names."""
        return iter(()) if self._model is None else self._model.named_parameters(*args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The original model's state; empty for an executable that was loaded from a file."""
        return {} if self._model is None else self._model.state_dict(*args, **kwargs)

    def train(self, mode: bool = True) -> Executable:
        """Executables are for inference. Raises InputError if asked to train."""
        if mode:
            raise InputError("a compiled program cannot be trained", next_step="train the model, then optimize again")
        return super().train(False)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        raise InputError("a compiled program cannot be moved or converted",
                         next_step="convert the model, then optimize again")  # fmt: skip

    def __deepcopy__(self, memo: Any) -> Executable:
        return self  # nothing in it changes between calls

    def save(self, path: str) -> None:
        """Write the artefact: one file with graph, weights, kernels, report and a checked manifest."""
        save(self.program, self.choices, path, target=self.target, report=self.report, counts=self.counts,
             weights_budget=self.weights_budget)  # fmt: skip


@contextlib.contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Run with this many threads of torch's pool, which our kernels share; None changes nothing."""
    before = torch.get_num_threads()
    if count is None:
        yield
        return
    if count < 1:
        raise InputError(f"num_threads is {count}", next_step="ask for at least one thread")
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _shape_of_call(spec: pytree.TreeSpec) -> str:
    args, kwargs = spec.children()
    keywords = ", ".join(map(str, kwargs.context or [])) or "none"
    return f"{len(args.children())} positional arguments and keywords {keywords} ({spec.num_leaves} values in all)"


def _plain_structure(program: Program) -> tuple[int, list[str]]:
    """(number of positional leaves, keyword names) if every argument is a leaf; an impossible count otherwise."""
    args, kwargs = program.in_spec.children()
    if all(c.is_leaf() for c in (*args.children(), *kwargs.children())):
        return len(args.children()), list(kwargs.context or [])
    return -1, []


def _result_builder(program: Program) -> Callable[[Sequence[Any]], Any]:
    spec, count = program.out_spec, program.out_spec.num_leaves
    if spec.is_leaf():
        return lambda flat: flat[0]
    if spec.type is tuple and all(c.is_leaf() for c in spec.children()):
        return lambda flat: tuple(flat[:count])
    return lambda flat: pytree.tree_unflatten(list(flat[:count]), spec)


def _reads_slots(program: Program) -> list[int]:
    """Positions of outputs that may be views of a carried tensor: writing that tensor back would change them."""
    slots = {s.slot for s in program.state}
    written = [n for n in program.graph.nodes if n.op == "get_attr" and n.target in slots]
    written += [n for i, n in enumerate(program.inputs) if i in slots]
    views = set(written)
    for node in program.graph.nodes:
        if node.op == "call_function" and node.args and node.args[0] in views and _may_alias(node.target):
            views.add(node)
    return [i for i, n in enumerate(program.outputs) if isinstance(n, fx.Node) and n in views]


def _may_alias(target: Any) -> bool:
    schema = getattr(target, "_schema", None)
    return schema is None or "(a" in str(schema) or "view" in schema.name


def _detached(results: Sequence[Any], positions: Sequence[int]) -> list[Any]:
    found = list(results)
    for position in positions:
        found[position] = found[position].clone()
    return found


def _assemble(program: Program, choices: Sequence[Choice], device: torch.device,
              store: WeightStore | None) -> tuple[Callable[..., Any], str, frozenset[fx.Node]]:  # fmt: skip
    """One function over the flat inputs that guards them, calls every kernel in order and returns the flat outputs.

    Also its text, and the nodes that no call computes: views that were made with the arena.
    """
    source, names = Source(), dict[fx.Node, str]()
    parameters = []
    for node in program.inputs:
        names[node] = f"v{len(names)}"
        parameters.append(names[node])
    guard_source(source, program, parameters)
    weights = WeightNames(source, program, store)
    weights.begin(program, names)
    slots = plan(program, choices)
    if slots:
        verify(slots, choices)
        arenas = Arenas(slots, views_of(slots, choices, device), device)
        block = {node: f"b{k}" for k, node in enumerate([*(s.node for s in slots), *arenas.views])}
        source.lines.append(f"block = {source.bind(arenas.take, 'take')}()")
        source.lines.append(f"{', '.join(block.values())}, = block")
    else:
        arenas, block = None, {}
    outputs = [n for n in program.outputs if isinstance(n, fx.Node)]
    steps = [(list(c.region.inputs), list(c.region.outputs)) for c in choices]
    dead = releases(steps, [*outputs, *(n for n in program.graph.nodes if n.op == "get_attr")])
    loose: set[fx.Node] = set()  # results whose layout torch chooses, which may depend on the machine
    for step, (choice, done) in enumerate(zip(choices, dead, strict=True)):
        weights.before(step, names)
        if choice.kernel.destinations is None:
            loose.update(n for n in choice.region.outputs if n not in block)
        else:
            for node in (n for n in choice.region.inputs if n in loose):
                source.as_planned(node, names)
        _emit(source, choice, names, block, device, [weights.bind(c) for c in choice.kernel.constants])
        weights.after(step)
        dying = [names[n] for n in done if n not in block]
        if dying:
            source.lines.append(f"del {', '.join(dying)}")
    for node in dict.fromkeys(n for n in outputs if n.op == "call_function"):
        source.as_traced(node, names)
    result = source.literal(tuple(program.outputs), names)
    if arenas is not None:
        source.lines.append(f"result = {result}")
        source.lines.append(f"{source.bind(arenas.give, 'give')}(block)")
        result = "result"
    premade = frozenset(() if arenas is None else arenas.views)
    return (*source.build(parameters, result), premade)


def _emit(source: Source, choice: Choice, names: dict[fx.Node, str], block: Mapping[fx.Node, str],
          device: torch.device, constants: Sequence[str]) -> None:  # fmt: skip
    region, kernel = choice.region, choice.kernel
    if kernel.backend == "eager":
        for node in region.nodes:
            if node in block:
                names[node] = block[node]
            else:
                source.node(node, names)
        inner = [names[n] for n in region.nodes if n not in region.outputs and n not in block]
        if inner:
            source.lines.append(f"del {', '.join(inner)}")
        return
    made = []
    for node in region.outputs:
        names[node] = block.get(node, f"v{len(names)}")
        made.append(names[node])
    inputs = [*(names[n] for n in region.inputs), *constants]
    if kernel.destinations is not None:
        fresh = [(names[n], d) for n, d in zip(region.outputs, kernel.destinations, strict=True) if n not in block]
        _emit_buffers(source, fresh, region.inputs, names, device)
        source.lines.append(f"{source.bind(kernel.call, 'kernel')}({', '.join([*inputs, *made])})")
    else:
        source.lines.append(f"{', '.join(made)} = {source.bind(kernel.call, 'kernel')}({', '.join(inputs)})")


def _emit_buffers(source: Source, fresh: Sequence[tuple[str, Destination]], inputs: Sequence[fx.Node],
                  names: Mapping[fx.Node, str], device: torch.device) -> None:  # fmt: skip
    """Allocate the results that are not in the arena."""
    empty = source.bind(torch.empty, "empty")
    for name, destination in fresh:
        shape = destination.text([names[n] for n in inputs])
        dtype, place = source.bind(destination.dtype, "dtype"), source.bind(device, "device")
        turned = "" if destination.order is None else f".permute({destination.seen()})"
        made = f"{empty}({shape}, dtype={dtype}, device={place})"
        if device.type == "cpu" and not 0 < destination.bytes < LARGE:
            made = f"{source.bind(on_large_pages, 'large')}({made})"
        source.lines.append(f"{name} = {made}{turned}")
