"""The torch.compile door: `torch.compile(model, backend="torchlathe")`, registered as an entry point."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from .. import targets
from ..codegen.executable import Executable
from ..passes.capture import capture_graph, clean
from ..passes.errors import LatheError, UnknownNameError
from ..passes.placement import device_of
from ..passes.program import Program
from ..targets.measure import compare
from ..targets.measure_gpu import settled
from .api import compile_program
from .pipeline import PASSES

log = logging.getLogger("torchlathe")

VARIANTS = 8  # compilations per graph; parameters that keep changing, as in training, run unchanged from then on


def compile_graph(module: fx.GraphModule, example_inputs: Sequence[Any], **options: Any) -> Callable[..., Any]:
    """Compile one dynamo graph for inference.

    A graph that needs gradients runs unchanged. Parameters and buffers count as constants while they are the very
    tensors that were compiled, unmodified; any other tensors in their place get an executable of their own. Writes
    through ``parameter.data`` in place leave no trace that could be checked: compile after such an update.

    Args:
        module: the graph; its parameters are inputs.
        example_inputs: tensors and SymInts.
        options: `timed` (default False) judges rewrites by time as well as by answers.
    """
    tensors = [i for i in example_inputs if isinstance(i, torch.Tensor)]
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return module.forward
    kinds = {t.device.type for t in tensors if t.dim()}
    if len(kinds) > 1 or not kinds <= {"cpu", "cuda"}:
        log.warning("torchlathe compiles graphs on one CPU or GPU: this graph runs unchanged")
        return module.forward
    given = dict(options.get("options") or {}) | {k: v for k, v in options.items() if k != "options"}
    if unknown := set(given) - {"timed"}:
        raise UnknownNameError(f"torchlathe has no option {', '.join(sorted(unknown))}; known: timed")
    door = _Door(module, bool(given.get("timed", False)))
    try:
        executable = door.compile(example_inputs)
    except LatheError as error:
        log.warning("torchlathe leaves a graph as it is: %s", error)
        return module.forward
    if door.loses(executable, example_inputs):
        log.info("torchlathe leaves a graph as it is: nothing in it could be made faster")
        return module.forward
    return door


Constant = tuple[torch.Tensor, int, int]  # a tensor with its version and address when it was compiled


class _Door:
    """One dynamo graph and its executables, one per set of constant tensors."""

    def __init__(self, module: fx.GraphModule, timed: bool) -> None:
        self.module, self.timed = module, timed
        self.static: tuple[int, ...] = ()
        self.dynamic: tuple[int, ...] = ()
        self.mutated: list[int] = []
        self.examples: list[Any] = []  # fake inputs of the first trace: they know which sizes vary
        self.variants: list[tuple[tuple[Constant, ...], Executable]] = []
        self.compiled = 0
        self.lock = threading.Lock()

    def compile(self, inputs: Sequence[Any]) -> Executable:
        """Capture the graph, make its parameters constants, optimize and lower it for these inputs."""
        program = capture_graph(self.module, self.examples or inputs)
        self.examples = [n.meta.get("val", v) for n, v in zip(program.inputs, inputs, strict=True)]
        mutated = {s.slot for s in program.state}
        self.mutated = sorted(s for s in mutated if isinstance(s, int))
        static = [i for i, v in enumerate(inputs) if _is_static(v) and i not in mutated]
        program = _bind(program, {i: inputs[i] for i in static})
        self.static = tuple(static)
        self.dynamic = tuple(i for i in range(len(inputs)) if i not in set(static))
        flat = [_concrete(inputs[i]) for i in self.dynamic]
        target = targets.get(device_of(inputs).type)
        executable = compile_program(program, flat, target, PASSES, timed=self.timed)
        known = tuple((inputs[i], _version(inputs[i]), inputs[i].data_ptr()) for i in self.static)
        self.variants = [(known, executable), *self.variants]  # other threads may be walking the old list
        self.compiled += 1
        return executable

    def loses(self, executable: Executable, inputs: Sequence[Any]) -> bool:
        """Whether the executable is measurably slower than the graph as it came."""
        if executable.program.state:
            return False
        values = [_concrete(i) for i in inputs]
        with torch.no_grad():
            plain = settled(lambda: self.module.forward(*values), executable.device)
            seen = compare(plain, settled(lambda: self(*values), executable.device), budget=0.3)
        return seen.slower

    def __call__(self, *inputs: Any) -> Any:
        """Run the executable that was compiled for these very parameters."""
        if self.mutated and _overlap(inputs, self.mutated):
            return self.module.forward(*inputs)  # a write through one input changes another
        for known, executable in self.variants:
            for index, (tensor, version, address) in zip(self.static, known, strict=True):
                if inputs[index] is not tensor or _version(tensor) != version or tensor.data_ptr() != address:
                    break
            else:
                results = executable.run_flat([inputs[i] for i in self.dynamic])
                return list(results[: executable.program.out_spec.num_leaves])
        return self._other(inputs)

    def _other(self, inputs: Sequence[Any]) -> Any:
        """Parameters that were replaced or written since: compile again, or run unchanged if that never ends."""
        with self.lock:
            alive = [v for v in self.variants if all(_version(t) == n and t.data_ptr() == a for t, n, a in v[0])]
            self.variants = alive
            if self.compiled >= VARIANTS or (
                torch.is_grad_enabled() and any(isinstance(i, torch.Tensor) and i.requires_grad for i in inputs)
            ):
                return self.module.forward(*inputs)
            try:
                executable = self.compile(inputs)
            except LatheError as error:
                log.warning("torchlathe leaves a graph as it is: %s", error)
                return self.module.forward(*inputs)
        return list(executable.run_flat([inputs[i] for i in self.dynamic])[: executable.program.out_spec.num_leaves])


def _overlap(inputs: Sequence[Any], written: Sequence[int]) -> bool:
    places = [t.untyped_storage().data_ptr() if isinstance(t, torch.Tensor) else None for t in inputs]
    return any(places.count(places[i]) > 1 for i in written)


def _version(tensor: torch.Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version  # inference tensors are not counted


def _is_static(value: Any) -> bool:
    if isinstance(value, torch.nn.Parameter):
        return True
    return isinstance(value, torch.Tensor) and getattr(value, "_dynamo_static_input_type", None) is not None


def _concrete(value: Any) -> Any:
    """A value to time and check with: fake tensors become random ones of their hinted sizes."""
    if isinstance(value, torch.SymInt):
        return int(value.node.hint)
    if not isinstance(value, torch._subclasses.FakeTensor):
        return value
    shape = [s if isinstance(s, int) else s.node.hint for s in value.shape]
    if value.is_floating_point():
        return torch.randn(shape, dtype=value.dtype, device=value.device)
    return torch.zeros(shape, dtype=value.dtype, device=value.device)


def _bind(program: Program, constants: dict[int, torch.Tensor]) -> Program:
    """The program with some inputs replaced by weights. Positions of carried inputs are renumbered."""
    from dataclasses import replace

    from torch.utils import _pytree as pytree

    inputs = program.inputs
    weights = dict(program.weights)
    for position, value in constants.items():
        node = inputs[position]
        name = f"p{position}_{node.name}"
        weights[name] = value.detach()
        with program.graph.inserting_before(next(n for n in program.graph.nodes if n.op != "placeholder")):
            constant = program.graph.create_node("get_attr", name)
        constant.meta = dict(node.meta)
        node.replace_all_uses_with(constant)
        program.graph.erase_node(node)
    kept = [i for i in range(len(inputs)) if i not in constants]
    state = tuple(replace(s, slot=kept.index(s.slot)) if isinstance(s.slot, int) else s for s in program.state)
    in_spec = pytree.tree_flatten((tuple(range(len(kept))), {}))[1]
    bound = replace(program, weights=weights, state=state, in_spec=in_spec)
    clean(bound)  # once more: now it is seen what is constant
    return bound
