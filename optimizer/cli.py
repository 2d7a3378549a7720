"""Command line: torchlathe optimize | explain | bench | targets | report. Torch is imported only inside commands."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from ..passes.errors import LatheError
from .report import Report, amount_text, seconds_text

if TYPE_CHECKING:
    from ..targets.target import Target

CONTROL = (typer.Exit, typer.Abort, typer.BadParameter)  # exceptions with which typer itself ends a command
BASELINES = ("eager", "compile")


def _writable(path: Path | None) -> Path | None:
    # found out before the long work, not after it
    if path is not None and not path.absolute().parent.is_dir():
        raise typer.BadParameter(f"there is no folder {path.absolute().parent}")
    return path


def _out(text: str, *names: str) -> Any:
    return typer.Option(*names, help=text, dir_okay=False, callback=_writable)


def _bytes(text: str) -> int:
    """An amount of memory such as 8GiB, 500M or 65536, in bytes."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(?:([kMGT])(i?))?B?", text.strip().replace(" ", ""))
    if found is None:
        raise typer.BadParameter(f"{text!r} is no amount of memory such as 8GiB")
    number, prefix, binary = found.groups()
    return int(float(number) * (1024 if binary else 1000) ** (" kMGT".index(prefix) if prefix else 0))


Spec = Annotated[
    str,
    typer.Argument(
        metavar="SPEC",
        help="path/to/file.py:function or package.module:function; it returns (model, args) or (model, args, kwargs)",
        show_default=False,
    ),
]
TargetName = Annotated[str, typer.Option("--target", help="name of the target; see `torchlathe targets`")]
Passes = Annotated[
    str | None,
    typer.Option("--passes", help="exactly these passes in this order, separated by commas", show_default=False),
]
DeviceMemory = Annotated[
    int | None,
    typer.Option(
        parser=_bytes,
        metavar="AMOUNT",
        help="memory of the GPU that weights may take, such as 8GiB; the others stay in host memory",
    ),
]
Debug = Annotated[bool, typer.Option("--debug", help="show the traceback of an error")]


def main() -> None:
    """Run the command line."""
    app()(prog_name="torchlathe")


def app() -> typer.Typer:
    """The command line as a typer application."""
    made = typer.Typer(
        help="Make a PyTorch model faster, and say why.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    for command in (optimize, explain, bench, targets, report):
        made.command()(command)
    return made


def optimize(
    spec: Spec,
    target: TargetName = "cpu",
    out: Annotated[Path | None, _out("save the executable here", "--out")] = None,
    passes: Passes = None,
    html: Annotated[Path | None, _out("write the report as a page", "--html")] = None,
    json_path: Annotated[Path | None, _out("write the report as JSON", "--json")] = None,
    limit: Annotated[int | None, typer.Option(min=0, help="stop after this many rewrites")] = None,
    level: Annotated[str, typer.Option(help="fast measures nothing; default and max measure kernels")] = "default",
    threads: Annotated[int | None, typer.Option(min=1, help="threads of the result")] = None,
    aot: Annotated[bool, typer.Option("--aot", help="compile ahead of time for a GPU that need not be here")] = False,
    device_memory: DeviceMemory = None,
    debug: Debug = False,
) -> None:
    """Optimize a model, print the report, and save the result."""
    with _plain_errors(debug), _progress("importing") as say:
        model, args, kwargs = _example(spec)
        from . import api

        fast = api.optimize(model, args, kwargs, target=target, passes=_names(passes), limit=limit, level=level,
                            num_threads=threads, aot=aot, device_memory=device_memory, progress=say)  # fmt: skip
        written = _write(fast.report, html, json_path)
        if out is not None:
            say("saving")
            fast.save(str(out))
            written.append(out)
    Console().print(fast.report)
    for path in written:
        Console().print(Text(f"wrote {path} ({amount_text(path.stat().st_size, 3)}B)"), soft_wrap=True)


def explain(
    spec: Spec,
    target: TargetName = "cpu",
    passes: Passes = None,
    axes: Annotated[bool, typer.Option("--axes", help="show the logical axes of every value instead")] = False,
    debug: Debug = False,
) -> None:
    """Say which passes would fire where, and why the others would not. Nothing is timed."""
    with _plain_errors(debug), _progress("importing") as say:
        model, args, kwargs = _example(spec)
        from . import api

        say("reading the axes" if axes else "trying the passes")
        found: Any = (api.axes(model, args, kwargs) if axes else
                      api.explain(model, args, kwargs, target=target, passes=_names(passes)))  # fmt: skip
    Console().print(found, markup=False, soft_wrap=axes)


def bench(
    spec: Spec,
    target: TargetName = "cpu",
    against: Annotated[str, typer.Option(help="eager, compile or both, separated by a comma")] = "eager,compile",
    passes: Passes = None,
    rounds: Annotated[int, typer.Option(min=1, help="interleaved samples of each")] = 30,
    debug: Debug = False,
) -> None:
    """Time the optimized model, interleaved with eager and torch.compile."""
    rivals = _names(against) or []
    if unknown := [name for name in rivals if name not in BASELINES]:
        raise typer.BadParameter(f"{unknown[0]!r} is neither of {', '.join(BASELINES)}", param_hint="--against")
    with _plain_errors(debug), _progress("importing") as say:
        model, args, kwargs = _example(spec)
        import torch

        from . import api

        calls: dict[str, Callable[[], Any]] = {}
        with torch.no_grad():
            for name in dict.fromkeys(rivals):
                calls[name] = partial(model if name == "eager" else torch.compile(model), *args, **kwargs)
            fast = api.optimize(model, args, kwargs, target=target, passes=_names(passes), progress=say)
            calls["torchlathe"] = partial(fast, *args, **kwargs)
            table = _race(calls, rounds, say)
    Console().print(table)


def targets(as_json: Annotated[bool, typer.Option("--json", help="all facts, as JSON")] = False) -> None:
    """List the targets and what is known about them."""
    from ..targets import NoDeviceError, get, names

    rows, absent = [], []
    for name in names():
        try:
            rows.append(get(name))
        except NoDeviceError as error:
            absent.append(f"{name}: {error}")
    if as_json:
        facts = [{**dataclasses.asdict(row), "features": sorted(row.features)} for row in rows]
        print(json.dumps(facts, indent=2))
        return
    console = Console()
    console.print(_targets_table(rows))
    for line in absent:
        console.print(Text(line), soft_wrap=True)


def report(
    file: Annotated[Path, typer.Argument(help="a file that `optimize` saved", exists=True, dir_okay=False)],
    html: Annotated[Path | None, _out("write it as a page instead", "--html")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print it as JSON instead")] = False,
    debug: Debug = False,
) -> None:
    """Show the report stored in a saved executable, without loading or running it."""
    with _plain_errors(debug):
        from ..codegen.cache import read_report

        stored = Report.from_dict(read_report(file))
        _write(stored, html, None)
    if as_json:
        print(stored.json())
    elif html is None:
        Console().print(stored)


@contextmanager
def _plain_errors(debug: bool) -> Iterator[None]:
    """Print errors as messages and exit with code 1; with `debug` they pass through with their traceback."""
    try:
        yield
    except CONTROL:
        raise
    except Exception as error:
        if debug:
            raise
        ours = isinstance(error, LatheError) or type(error).__module__.startswith("torchlathe.")
        console, kind = Console(stderr=True), "" if ours else f"{type(error).__name__}: "
        console.print(Text(f"error: {kind}{error}", style="red"), soft_wrap=True)
        if not ours:
            console.print("--debug shows where it comes from", style="dim")
        raise typer.Exit(1) from None


@contextmanager
def _progress(first: str) -> Iterator[Callable[[str], None]]:
    """Yields a function that shows a sentence on stderr: beside a bar, or line by line outside terminals."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda sentence: console.print(Text(sentence, style="dim"), soft_wrap=True)
        return
    columns = (TextColumn("[cyan]{task.description}"), BarColumn(), TimeElapsedColumn())
    # drawn only when something is said: a thread that redraws it would disturb the measurements
    with Progress(*columns, console=console, auto_refresh=False, transient=True) as bar:
        task = bar.add_task(escape(first), total=None)

        def say(sentence: str) -> None:
            counted = re.match(r"region (\d+) of (\d+)", sentence)
            if counted:
                bar.update(task, completed=int(counted[1]), total=int(counted[2]))
            bar.update(task, description=escape(sentence), refresh=True)

        yield say


def _names(text: str | None) -> list[str] | None:
    return None if text is None else [name.strip() for name in text.split(",") if name.strip()]


def _write(found: Report, html: Path | None, json_path: Path | None) -> list[Path]:
    written = []
    for path, render in ((html, found.html), (json_path, found.json)):
        if path is not None:
            path.write_text(render(), encoding="utf-8")
            written.append(path)
    return written


def _example(spec: str) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """The model, args and kwargs that the function named by `spec` returns.

    Raises:
        typer.BadParameter: the spec names no such file, module or function, or it returns something else.
        Exception: whatever the user's module or function raises.
    """
    place, colon, name = spec.rpartition(":")
    if not colon or not place or not name.isidentifier():
        raise typer.BadParameter(f"{spec!r} is not of the form file.py:function or package.module:function")
    module = _load_file(Path(place)) if place.endswith(".py") else _load_module(place)
    function = getattr(module, name, None)
    if not callable(function):
        known = [k for k, v in vars(module).items() if callable(v) and getattr(v, "__module__", "") == module.__name__]
        raise typer.BadParameter(f"{place} has no function {name!r}; it has: {', '.join(known) or 'none'}")
    made = function()
    if not isinstance(made, tuple) or len(made) not in (2, 3) or not isinstance(made[1], (tuple, list)):
        raise typer.BadParameter(f"{spec} must return (model, args) or (model, args, kwargs), args being a tuple")
    kwargs = made[2] if len(made) == 3 else None
    return made[0], tuple(made[1]), dict(kwargs or {})


def _load_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise typer.BadParameter(f"there is no file {path}")
    found = importlib.util.spec_from_file_location(f"spec_{path.stem}", path.absolute())
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    # as when python runs the file: its neighbours can be imported, and dataclasses find their module
    sys.path.insert(0, str(path.absolute().parent))
    sys.modules[module.__name__] = module
    found.loader.exec_module(module)
    return module


def _load_module(name: str) -> ModuleType:
    sys.path.insert(0, str(Path.cwd()))
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # the module is there, something that it imports is not
        raise typer.BadParameter(f"there is no module {name!r}") from None


def _race(calls: dict[str, Callable[[], Any]], rounds: int, say: Callable[[str], None]) -> Table:
    """Times and answers of all calls, compared with the first."""
    from torch.utils import _pytree as pytree

    from ..passes.verify import difference
    from ..targets.measure import Comparison, compare_many

    answers = {}
    for name, call in calls.items():
        say(f"running {name} once")
        answers[name] = pytree.tree_leaves(call())
    say(f"timing {rounds} rounds")
    timings = compare_many(calls, budget=0.0, min_rounds=rounds)
    first = next(iter(calls))
    note = f"speed: against {first}, with 95% confidence; deviation: of the answers, at most 1 is accepted"
    table = Table(box=SIMPLE, pad_edge=False, padding=(0, 1, 0, 0), caption=note)
    for head in ("", "median", "fastest", "spread", "speed", "from", "to", "deviation"):
        table.add_column(head, justify="right" if head else "left", no_wrap=True)
    for name, timing in timings.items():
        versus = Comparison.of(timing, timings[first])
        table.add_row(
            name,
            seconds_text(timing.median),
            seconds_text(timing.minimum),
            f"{timing.spread:.0%}",
            f"{versus.ratio:.3g}x",
            f"{versus.low:.3g}x",
            f"{versus.high:.3g}x",
            f"{difference(answers[name], answers[first])[0]:.2g}",
        )
    return table


def _targets_table(rows: list[Target]) -> Table:
    table = Table(box=SIMPLE, pad_edge=False, padding=(0, 1, 0, 0), caption="flop/s: peak of float32")
    for head in ("name", "cores", "flop/s", "byte/s", "caches", "memory", "chip"):
        table.add_column(head, no_wrap=head != "chip", overflow="fold")
    for row in rows:
        rates = (row.flops.get("float32"), row.bandwidth)
        table.add_row(
            row.name,
            str(row.cores),
            *(amount_text(rate, 3) if rate else "unknown" for rate in rates),
            "/".join(map(_binary, row.caches)),
            _binary(row.memory),
            Text(row.model),
        )
    return table


def _binary(size: int) -> str:
    for prefix, unit in (("Ti", 2**40), ("Gi", 2**30), ("Mi", 2**20), ("Ki", 2**10)):
        if size >= unit:
            return f"{size / unit:.3g}{prefix}"
    return str(size)
