"""The front door: `optimize` and `explain`."""

from __future__ import annotations

import contextlib
import difflib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from .. import passes as P
from .. import targets
from ..codegen.cache import load as load_artefact
from ..codegen.executable import Executable, threads
from ..codegen.triton.compile import interpreted, is_here
from ..codegen.tuner import LEVELS, Tuner
from ..codegen.versions import versions
from ..passes.base import Context, Pass
from ..passes.capture import capture
from ..passes.errors import InputError, LatheError, UnknownNameError
from ..passes.placement import device_of
from ..passes.program import Program
from ..targets.folder import cache_folder
from ..targets.measure_gpu import settled
from ..targets.records import Records
from ..targets.target import Target
from .judge import Judge, compile_ahead, lower_and_judge, lower_streamed, outputs_of, recorded, tuned
from .kernels import kernel_rows
from .pipeline import PASSES, run_passes
from .quality import Quality, score
from .report import Report

Progress = Callable[[str], None]


@torch.random.fork_rng(devices=[])  # timing and checking must not move the user's random numbers
def optimize(
    model: torch.nn.Module | torch.export.ExportedProgram, args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None, *, target: str | Target = "cpu", dynamic_shapes: Any = None,
    passes: Sequence[str | Pass] | None = None, data: Sequence[Any] | None = None, quality: Quality | None = None,
    limit: int | None = None, level: str = "default", budget: float = 120.0, num_threads: int | None = None,
    aot: bool = False, device_memory: int | None = None, progress: Progress | None = None,
) -> Executable:  # fmt: skip
    """A faster drop-in for `model` on `target`, with a report of what was done.

    Args:
        model: a module in eval mode, or an ExportedProgram.
        args: example positional inputs; shapes are fixed to theirs unless `dynamic_shapes` says otherwise.
        kwargs: example keyword inputs.
        target: name of a target that this host can run, or a Target. Inputs on a GPU mean ``cuda``, this host's GPU.
        passes: apply exactly these, in this order (instances or names; ``default`` names the standard list).
        data: calibration batches, each a tuple of positional inputs; the report states the agreement on them.
        quality: budget for lossy passes; without one a lossy pass that `passes` names stays if it is faster.
        dynamic_shapes: as in `torch.export.export`.
        limit: stop after this many kept rewrites.
        level: ``fast`` measures nothing and takes the likeliest kernels; ``default`` measures candidates that are not
            on record; ``max`` takes five times as long, and searches schedules for operators without a template.
        budget: seconds of trying candidate kernels, after which the likeliest are taken.
        num_threads: threads of the result, whatever `torch.set_num_threads` says when it is called.
        aot: compile for a GPU that need not be here, without measuring: the result is saved, and loaded where it is.
        device_memory: bytes of a GPU's memory for weights, beside intermediate results. Those beyond it stay in host
            memory and are copied while a call runs. The model must be on the CPU, where rewrites are checked and not
            timed; the likeliest kernels are taken.
        progress: called with a short sentence at each step.

    Measurements are kept in the cache folder (see `TORCHLATHE_CACHE`): a second call with the same model measures
    nothing. The result is for inference: it returns tensors without gradients, and packs weights, so that writing into
    the model's parameters afterwards is seen in part at most. Optimize again after such a change.

    Raises:
        CaptureError: the model cannot be captured as one graph.
        UnknownNameError: no pass or target of that name.
        InputError: `device_memory` is too small for a step, the target is a CPU, or the model is not on the CPU.
    """
    start, tell = time.perf_counter(), progress or (lambda sentence: None)
    chosen, rewrites = _runnable(target, _checked(args, kwargs), aot), _chosen(passes)
    if device_memory is not None:
        args, kwargs, data = _on_the_host(model, chosen, device_memory, (args, kwargs, data))
    tell("capture")
    program = capture(model, args, kwargs, dynamic_shapes=dynamic_shapes)
    flat = pytree.tree_leaves((tuple(args), dict(kwargs or {}))) if args or kwargs else _example_of(model)
    original = model if isinstance(model, torch.nn.Module) else None
    measured = not aot and device_memory is None and not (chosen.device == "cuda" and interpreted())
    tuner = make_tuner(level if measured else "fast", budget)
    with threads(num_threads):
        result = compile_program(program, flat, chosen, rewrites, original=original, data=data, quality=quality,
                                 limit=limit, tuner=tuner, progress=tell, aot=aot,
                                 device_memory=device_memory)  # fmt: skip
        result.num_threads = num_threads
    result.report.model = type(model).__name__
    if original is not None and not program.state and tuner.level != "fast":
        _compare_with_model(result, original, args, kwargs or {}, tuner.records, tell)
    result.report.took = time.perf_counter() - start
    return result


def compile_program(
    program: Program,
    flat: Sequence[Any],
    target: Target,
    passes: Sequence[Pass],
    *,
    original: Any = None,
    data: Sequence[Any] | None = None,
    quality: Quality | None = None,
    limit: int | None = None,
    timed: bool = True,
    tuner: Tuner | None = None,
    aot: bool = False,
    device_memory: int | None = None,
    progress: Progress | None = None,
) -> Executable:
    """Rewrite and lower a captured program; the part that both doors share.

    Args:
        flat: flat example inputs of the program.
        original: the module whose attributes the executable passes through.
        timed: judge rewrites by time as well as by answers.
        tuner: chooses kernels; one with the user's records by default.
        aot: compile kernels without running them.
        device_memory: bytes of a GPU's memory for weights; the program and its inputs are in host memory then.
    """
    tuner = tuner or make_tuner()
    before, flat = program.text(), [_dense(v) for v in flat]
    wanted = outputs_of(program, flat)
    ctx = Context(target, data=data, quality=quality, records=tuner.records)
    batches = [pytree.tree_leaves(b) for b in data or ()]
    judge = Judge(flat, wanted, timed=timed and tuner.level != "fast", records=tuner.records, original=program,
                  batches=batches, finish=lambda p: tuned(p, target, flat, tuner), level=tuner.level)  # fmt: skip
    best, steps, judge = run_passes(program, passes, ctx, judge, limit=limit, progress=progress)
    if device_memory is not None:
        result, step, notes = lower_streamed(best, target, judge, device_memory, run=not aot)
    elif aot:
        result, step, notes = compile_ahead(best, target)
    else:
        result, step, notes = lower_and_judge(best, target, judge, tuner, progress)
    result.__dict__["_model"] = original
    report = Report("", target.name, _device(target), [*steps, step], kernel_rows(result, target), notes=notes)
    report.graph_before, report.graph_after, report.versions = before, best.text(), versions()
    report.counts = result.counts
    result.report = report
    if batches:
        with contextlib.suppress(ValueError):  # a result of another shape, which a metric of the user's has judged
            found = score(program.run, best.run, batches)
            notes.append(f"agreement with the original on {len(batches)} batches: {found.value:.6f}")
    return result


def explain(
    model: torch.nn.Module | torch.export.ExportedProgram,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    target: str | Target = "cpu",
    passes: Sequence[str | Pass] | None = None,
    dynamic_shapes: Any = None,
) -> Report:
    """A dry run: which passes would fire, at how many sites, and why the others would not. Nothing is timed."""
    start = time.perf_counter()
    chosen = target if isinstance(target, Target) else find_target(target)
    rewrites = _chosen(passes)
    _check_example(args)
    program = capture(model, args, kwargs, dynamic_shapes=dynamic_shapes)
    flat = pytree.tree_leaves((tuple(args), dict(kwargs or {}))) if args or kwargs else _example_of(model)
    with torch.no_grad():
        judge = Judge(flat, program.run(flat), timed=False)
    best, steps, _ = run_passes(program, rewrites, Context(chosen), judge)
    return Report(type(model).__name__, chosen.name, _device(chosen), steps, graph_before=program.text(),
                  graph_after=best.text(), took=time.perf_counter() - start, versions=versions())  # fmt: skip


def axes(
    model: torch.nn.Module | torch.export.ExportedProgram,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
) -> str:
    """Which logical axis is each dimension of each tensor of a model, as text: one line per value."""
    _check_example(args)
    return str(capture(model, args, kwargs, dynamic_shapes=dynamic_shapes).axes())


def load(path: str | os.PathLike[str], *, native: bool = True) -> Executable:
    """The executable saved at `path`, with its report. Traces and compiles nothing on the CPU that it was saved on.

    Args:
        native: False compiles the file's kernels again instead of loading its machine code.

    Raises:
        ArtefactError: the file is missing, damaged or foreign; nothing of it was used.
    """
    return load_artefact(path, native=native, decode_report=Report.from_dict)


def _chosen(passes: str | Sequence[str | Pass] | None) -> tuple[Pass, ...]:
    listed = [passes] if isinstance(passes, str) else passes
    if listed is None:
        return PASSES
    return tuple(q for p in listed for q in (PASSES if p == "default" else (find_pass(p),)))


def _check_example(args: Any) -> None:
    if not isinstance(args, (tuple, list)):
        raise InputError(f"args is a {type(args).__name__}, not a tuple of positional inputs", next_step="pass (x,)")


def _checked(args: Any, kwargs: Any) -> tuple[Any, Any]:
    _check_example(args)
    return args, kwargs


def find_pass(wanted: str | Pass) -> Pass:
    """A pass instance from an instance or a text name. Raises UnknownNameError with near matches."""
    if isinstance(wanted, Pass):
        return wanted
    known = {getattr(P, name).name: getattr(P, name) for name in P.PASSES}
    if wanted not in known:
        near = difflib.get_close_matches(wanted, known, n=3, cutoff=0.4) or sorted(known)
        raise UnknownNameError(f"no pass is called {wanted!r}; near: {', '.join(near)}")
    return known[wanted]()  # type: ignore[no-any-return]


def find_target(name: str) -> Target:
    """The target of that name. Raises UnknownNameError with near matches, LatheError if the device is not there."""
    try:
        return targets.get(name)
    except targets.UnknownTargetError as error:
        raise UnknownNameError(str(error)) from error
    except targets.NoDeviceError as error:
        raise LatheError(str(error)) from error


def _runnable(target: str | Target, example: Any, aot: bool) -> Target:
    if target == "cpu" and device_of(pytree.tree_leaves(example)).type == "cuda":
        target = "cuda"
    chosen = target if isinstance(target, Target) else find_target(target)
    if chosen.device == "cuda":
        if not (aot or interpreted() or is_here(chosen)):
            raise LatheError(
                f"the target {chosen.name} cannot run on this host, and a rewrite is only kept if it is measured",
                next_step="aot=True (or --aot) compiles ahead of time for it; explain() works for every target",
            )
        return chosen
    host = targets.get("cpu")
    if aot:
        raise LatheError("ahead of time is for GPUs that are not here", next_step="leave aot out for a CPU")
    if not chosen.features <= host.features:
        raise LatheError(
            f"the target {chosen.name} cannot run on this host, and a rewrite is only kept if it is measured",
            next_step="use target='cpu' here; explain() works for every target",
        )
    return chosen


def _on_the_host(model: Any, target: Target, device_memory: int, examples: Any) -> Any:
    """The examples in host memory, where a model that exceeds the device is captured and rewritten."""
    if target.device != "cuda":
        raise InputError(f"device_memory is for GPUs, and the target {target.name} is a CPU",
                         next_step="leave it out, or name a GPU as the target")  # fmt: skip
    if device_memory < 1:
        raise InputError(f"device_memory is {device_memory}", next_step="give the bytes that weights may take")
    state = model.state_dict() if isinstance(model, torch.nn.Module) else model.state_dict
    for name, value in state.items():
        if isinstance(value, torch.Tensor) and value.device.type != "cpu":
            raise InputError(f"{name} is on {value.device}, and device_memory is for models in host memory",
                             next_step="pass model.cpu()")  # fmt: skip
    return pytree.tree_map(lambda v: v.cpu() if isinstance(v, torch.Tensor) else v, examples)


def make_tuner(level: str = "default", budget: float = 120.0) -> Tuner:
    """A tuner with the records in the cache folder. Raises InputError for an unknown level."""
    if level not in LEVELS:
        raise InputError(f"level is {level!r}", next_step=f"choose one of {', '.join(LEVELS)}")
    records = Records(cache_folder() / "records")
    notes = [] if records.problem is None else [records.problem]
    return Tuner(level, budget, records, each=0.5 if level == "max" else 0.1, notes=notes)


def _compare_with_model(result: Executable, model: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any],
                        records: Records, tell: Progress) -> None:  # fmt: skip
    """Time the executable against the model as the user calls it."""
    tell("compare with the original model")
    report = result.report
    kernels = [f"{c.kernel.backend} {c.kernel.schedule}" for c in result.choices]
    ours = [report.graph_after, kernels, result.num_threads]
    what = (result.target, [type(model).__qualname__, report.graph_before], ours)
    calls = [settled(c, result.device) for c in (lambda: model(*args, **kwargs), lambda: result(*args, **kwargs))]
    with torch.no_grad():
        seen = recorded(records, what, 1.5, lambda: calls[0], lambda: calls[1])
    report.eager_seconds, report.seconds = seen.a.median, seen.b.median
    report.ratio, report.ratio_low, report.ratio_high = 1 / seen.ratio, 1 / seen.high, 1 / seen.low
    if seen.slower:
        report.notes.append("slower than the original model: this model is better left as it is")


def _dense(value: Any) -> Any:
    """The value, with memory of its own for each element if it was expanded."""
    overlaps = isinstance(value, torch.Tensor) and value.layout is torch.strided and 0 in value.stride()
    return value.contiguous() if overlaps else value


def _example_of(model: Any) -> list[Any]:
    example = getattr(model, "example_inputs", None)
    if example is None:
        if isinstance(model, torch.export.ExportedProgram):
            raise InputError("the ExportedProgram carries no example inputs", next_step="pass args and kwargs")
        return []
    return pytree.tree_leaves(example)


def _device(target: Target) -> str:
    if target.device == "cuda":
        return f"{target.vendor} {target.model}, {target.mcpu}, {target.cores} multiprocessors"
    return f"{target.vendor}, {target.cores} cores, {target.vector_bits}-bit vectors"
