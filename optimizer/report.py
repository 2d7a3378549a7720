"""Report: what fired, what did not and why, and what each step gained and cost; as text, JSON and one HTML page."""

from __future__ import annotations

import difflib
import html
import json
import math
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from importlib.resources import files
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from ..passes.errors import ArtefactError

if TYPE_CHECKING:
    from rich.console import Group

T = TypeVar("T")

NONE = "-"
PAGE_BYTES = 1_000_000
STEP_HEADS = (
    "pass", "fidelity", "sites", "before", "after", "speed-up", "quality", "nodes", "flops", "bytes", "took", "outcome"
)  # fmt: skip
# narrow tables for terminals: what became of each pass, then what the rewrites that ran changed
TIME_HEADS = ("pass", "sites", "before", "after", "speed-up", "quality", "outcome")
SIZE_HEADS = ("pass", "fidelity", "nodes", "flops", "bytes", "took")
CALL_HEADS = ("kernel", "backend", "calls", "one call", "share", "flop/s", "of peak", "operators")
KERNEL_HEADS = (*CALL_HEADS[:-1], "byte/s", "schedule", "operators")
OUTCOME_STYLES = {"kept": "green", "dropped": "yellow", "refused": "dim"}
NUMERIC = frozenset(("sites", "before", "after", "quality", "took", *CALL_HEADS[2:-1], "byte/s"))


@dataclass(frozen=True)
class Step:
    """One pass tried on the program. Nodes, flops and bytes are those of one run, before and after the rewrite."""

    name: str
    fidelity: str  # exact, conditional or lossy
    sites: int = 0  # places changed
    refusal: str | None = None  # why the pass found no place
    kept: bool = False
    reason: str = ""  # why a rewrite was dropped
    seconds_before: float | None = None
    seconds_after: float | None = None
    # 95% confidence interval of seconds before / after, of fewer than six rounds their range: above 1 means faster
    ratio_low: float | None = None
    ratio_high: float | None = None
    quality: float | None = None  # as the quality guard measured it
    nodes_before: int = 0
    nodes_after: int = 0
    flops_before: int = 0
    flops_after: int = 0
    bytes_before: int = 0  # read and written
    bytes_after: int = 0
    took: float = 0.0  # seconds that the step itself took
    setting: str = ""  # knobs of the pass that differ from its defaults

    @property
    def outcome(self) -> str:
        """What became of the rewrite, in a few words."""
        if self.refusal is not None:
            return f"refused: {self.refusal}"
        with_knobs = f" ({self.setting})" if self.setting else ""
        return ("kept" if self.kept else "dropped") + with_knobs + (f": {self.reason}" if self.reason else "")

    def cells(self) -> list[str]:
        """The texts of this row under STEP_HEADS."""
        low, high = self.ratio_low, self.ratio_high
        return [
            self.name,
            self.fidelity,
            str(self.sites) if self.refusal is None else NONE,
            seconds_text(self.seconds_before),
            seconds_text(self.seconds_after),
            NONE if low is None or high is None else f"{low:.3g} to {high:.3g}x",
            NONE if self.quality is None else f"{self.quality:.5g}",
            _change(self.nodes_before, self.nodes_after, str),
            _change(self.flops_before, self.flops_after, amount_text),
            _change(self.bytes_before, self.bytes_after, amount_text),
            seconds_text(self.took),
            self.outcome,
        ]


@dataclass(frozen=True)
class KernelRow:
    """One kernel of the executable. Seconds, flops and bytes are those of one call."""

    name: str
    backend: str
    region: list[str]  # the operators it computes, in order
    count: int = 1  # calls in one run of the executable
    seconds: float | None = None
    flops: int = 0
    bytes: int = 0
    schedule: str = ""
    source: str = ""
    asm: dict[str, str] = field(default_factory=dict)  # generated code by its kind
    rivals: dict[str, float] = field(default_factory=dict)  # seconds of the candidates that lost
    share: float | None = None  # part of the executable's time that all calls take, from 0 to 1
    of_peak: float | None = None  # part of the target's peak rate for this dtype that a call reaches

    def cells(self) -> list[str]:
        """The texts of this row under KERNEL_HEADS."""
        rates = [amount_text(n / self.seconds) if n and self.seconds else NONE for n in (self.flops, self.bytes)]
        return [
            self.name,
            self.backend,
            str(self.count),
            seconds_text(self.seconds),
            NONE if self.share is None else f"{self.share:.1%}",
            rates[0],
            NONE if self.of_peak is None else f"{self.of_peak:.0%}",
            rates[1],
            self.schedule or NONE,
            " ".join(self.region),
        ]


@dataclass
class Report:
    """All that one optimization did. Printing it shows tables; `html()` is a page, `json()` holds everything.

    Attributes:
        model: name of the optimized model.
        target: text name of the target.
        device: the device in words.
        steps: the passes, in the order tried.
        kernels: the kernels of the executable.
        eager_seconds: seconds of one call of the original model, if measured.
        seconds: seconds of one call of the executable, if measured.
        ratio: eager_seconds / seconds as compared interleaved; above 1 means faster.
        ratio_low: lower end of its 95% confidence interval.
        ratio_high: upper end of it.
        took: seconds that the optimization took.
        notes: sentences that the user should read.
        counts: fallbacks to eager, recompilations, cache misses, precision drops.
        graph_before: print of the captured program.
        graph_after: print of the final program.
        versions: versions of the tools used.
    """

    model: str
    target: str
    device: str = ""
    steps: list[Step] = field(default_factory=list)
    kernels: list[KernelRow] = field(default_factory=list)
    eager_seconds: float | None = None
    seconds: float | None = None
    ratio: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None
    took: float = 0.0
    notes: list[str] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    graph_before: str = ""
    graph_after: str = ""
    versions: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; floats that JSON cannot write (inf, nan) become strings."""
        return {f.name: _encode(getattr(self, f.name)) for f in fields(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Report:
        """The inverse of `to_dict`. Raises ArtefactError that names the unknown, missing or wrongly typed key."""
        return _decode_row(cls, data, "report")

    def json(self) -> str:
        """`to_dict` as JSON text."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)

    def headline(self) -> str:
        """The result in one sentence."""
        if self.ratio is None:
            return "not timed"
        low, high = self.ratio_low, self.ratio_high
        word, interval = "", ""
        if low is not None and high is not None:
            word = {"good": "faster: ", "bad": "slower: ", "": "no measurable difference: "}[self._verdict()]
            interval = f", 95% confidence {low:.3g} to {high:.3g}x"
        return (
            f"{word}{self.ratio:.3g}x the speed of the original model"
            f" ({seconds_text(self.eager_seconds)} before, {seconds_text(self.seconds)} after{interval})"
        )

    def facts(self) -> list[str]:
        """Model, target and duration, then the notes and the counts that are not zero, a sentence each."""
        place = f"{self.target} ({self.device})" if self.device else self.target
        counted = [f"{name}: {count}" for name, count in self.counts.items() if count]
        return [f"{self.model} on {place}, optimized in {seconds_text(self.took)}", *self.notes, *counted]

    def text(self) -> str:
        """Plain text: the headline, one row per pass, one row per kernel, notes and counts."""
        parts = [f"{_clean(self.model)}: {_clean(self.headline())}"]
        for heads, rows in self._tables():
            parts += ["", *_columns(heads, rows)]
        return "\n".join([*parts, "", *map(_clean, self.facts())])

    __str__ = text

    def __rich__(self) -> Group:
        """The same as `text`, as tables for a rich console."""
        from rich.box import SIMPLE
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        color = {"good": "green", "bad": "red", "": ""}[self._verdict()]
        parts: list[Any] = [Text(f"{_clean(self.model)}: {_clean(self.headline())}", style=f"bold {color}".strip())]
        for heads, rows in self._tables():
            table = Table(box=SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
            for head in heads:
                title, least = Text(head), {heads[0]: 14, heads[-1]: 10}.get(head, 0)
                side: Literal["right", "left"] = "right" if head in NUMERIC else "left"
                table.add_column(title, justify=side, no_wrap=not least, overflow="fold", min_width=least)
            for row in rows:
                style = OUTCOME_STYLES.get(row[-1].partition(":")[0], "")
                table.add_row(*(Text(_clean(cell)) for cell in row), style=style)
            parts.append(table)
        return Group(*parts, *(Text(_clean(line)) for line in self.facts()))

    def html(self) -> str:
        """One self-contained page under 1 MB: no scripts, nothing loaded from elsewhere, light and dark.

        Long sources and graphs are cut to fit; the JSON holds everything.
        """
        from jinja2 import Environment, StrictUndefined

        source = files(__package__).joinpath("report.html.j2").read_text("utf-8")
        environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
        template = environment.from_string(source)
        pages = (template.render(_page(self, room)) for room in (200_000, 60_000, 15_000, 2_000))
        return next(page for page in pages if len(page.encode()) < PAGE_BYTES)

    def _verdict(self) -> str:
        return "good" if (self.ratio_low or 0) > 1 else "bad" if (self.ratio_high or 1) < 1 else ""

    def _tables(self) -> Iterator[tuple[list[str], list[list[str]]]]:
        ran = [step for step in self.steps if step.refusal is None]
        for heads, steps in ((TIME_HEADS, self.steps), (SIZE_HEADS, ran)):
            if steps:
                yield _filled(heads, [[step.cells()[STEP_HEADS.index(head)] for head in heads] for step in steps])
        if self.kernels:
            rows = [dict(zip(KERNEL_HEADS, kernel.cells(), strict=True)) for kernel in self.kernels]
            yield _filled(CALL_HEADS, [[row[head] for head in CALL_HEADS] for row in rows])


def seconds_text(value: float | None) -> str:
    """Seconds in a readable unit, such as ``12.3 ms``."""
    if value is None:
        return NONE
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if abs(value) >= 0.9995 * size:  # so that 999.6 us prints as 1 ms
            return f"{value / size:.3g} {unit}" if abs(value) < 999.5 else f"{value:.0f} s"
    return f"{value / 1e-9:.3g} ns" if value else "0 s"


def amount_text(value: float, digits: int = 4) -> str:
    """A count, flops or bytes with a decimal prefix, such as ``1.25G``."""
    for prefix, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.{digits}g}{prefix}"
    return f"{value:.4g}"


def _change(before: int, after: int, show: Any) -> str:
    old, new = show(before), show(after)
    if not before and not after:
        return NONE
    return old if old == new else f"{old} → {new}"


def _clean(text: str) -> str:
    # names and reasons come from models: no line breaks, terminal codes or lone surrogates in a table
    return "".join(c if c.isprintable() else " " for c in text)


def _filled(heads: Sequence[str], rows: list[list[str]]) -> tuple[list[str], list[list[str]]]:
    """The table without the columns in which nothing was measured."""
    used = [i for i in range(len(heads)) if any(row[i] != NONE for row in rows)]
    return [heads[i] for i in used], [[row[i] for i in used] for row in rows]


def _columns(heads: list[str], rows: list[list[str]]) -> list[str]:
    cells = [heads, *([_clean(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    sides = [str.rjust if head in NUMERIC else str.ljust for head in heads]
    lines = ["  ".join(map(lambda fit, *cell: fit(*cell), sides, row, widths)).rstrip() for row in cells]
    return [lines[0], "-" * min(len(lines[0]), 120), *lines[1:]]


def _clip(text: str, limit: int) -> str:
    """At most about `limit` bytes of text as they stand in the page."""
    text, cut = text.encode("utf-8", "replace").decode(), False
    while len(html.escape(text).encode()) > limit:
        text, cut = text[: len(text) * 3 // 4], True
    return f"{text}\n... cut here: the JSON report has all of it" if cut else text


def _page(report: Report, room: int) -> dict[str, Any]:
    """What the template shows, with about `room` bytes for each graph and for all sources together."""
    rows, left, kernels = room // 500, room, []
    for kernel in report.kernels[:rows]:
        codes = {}
        rivals = "\n".join(f"{name}: {seconds_text(s)}" for name, s in kernel.rivals.items())
        for name, code in {"candidates": rivals, "source": kernel.source, **kernel.asm}.items():
            if code and left > 0:
                codes[_clean(name)] = _clip(code, min(left, room // 4))
                left -= len(html.escape(codes[_clean(name)]).encode())
        share = min(max(kernel.share or 0.0, 0.0), 1.0)
        kernels.append({"cells": [_clean(c)[:300] for c in kernel.cells()], "share": share, "codes": codes})
    bars = [s for s in report.steps if s.seconds_before is not None and s.seconds_after is not None][: min(rows, 60)]
    heads, steps = _filled(STEP_HEADS, [s.cells() for s in report.steps[:rows]])
    graphs = [_clip(graph, room).splitlines()[: room // 100] for graph in (report.graph_before, report.graph_after)]
    return {
        "title": _clean(report.model)[:200],
        "headline": _clean(report.headline()),
        "ratio": None if report.ratio is None else f"{report.ratio:.3g}x",
        "verdict": report._verdict(),
        "facts": [_clean(line)[:2000] for line in report.facts()[: 1 + rows]],
        "numeric": NUMERIC,
        "step_heads": heads,
        "steps": [[_clean(cell)[:300] for cell in row] for row in steps],
        "states": ["refused" if s.refusal is not None else "kept" if s.kept else "dropped" for s in report.steps],
        "kernel_heads": KERNEL_HEADS,
        "kernels": kernels,
        "left_out": max(len(report.steps), len(report.kernels)) > rows,
        "bars": bars,
        "top": max((s for bar in bars for s in (bar.seconds_before, bar.seconds_after) if s), default=1),
        "clean": _clean,
        "seconds_text": seconds_text,
        "chunks": list(_compare(*graphs)),
        "sizes": [len(report.graph_before.splitlines()), len(report.graph_after.splitlines())],
        "versions": {_clean(k)[:60]: _clean(v)[:120] for k, v in list(report.versions.items())[:50]},
    }


def _compare(before: list[str], after: list[str]) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Runs of lines side by side: ("same" or "changed", pairs of left and right line)."""
    # One dropped operator renumbers all later ones of its kind: lines are matched without the running numbers.
    matcher = difflib.SequenceMatcher(None, _keys(before), _keys(after), autojunk=False)
    for tag, i1, i2, j1, j2 in matcher.get_opcodes():
        pairs = list(zip_longest(before[i1:i2], after[j1:j2], fillvalue=""))
        yield "same" if tag == "equal" else "changed", pairs


def _keys(lines: list[str]) -> list[str]:
    defined = {line.partition(" = ")[0] for line in lines if " = " in line}

    def base(match: re.Match[str]) -> str:
        return match[1] if match[0] in defined else match[0]

    return [re.sub(r"\b(\w+)_\d+\b", base, line) for line in lines]


def _encode(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: _encode(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, (list, tuple)):
        return [_encode(v) for v in value]
    if isinstance(value, Mapping):
        return {str(k): _encode(v) for k, v in value.items()}
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _decode_row(kind: type[T], data: Any, path: str) -> T:
    if not isinstance(data, Mapping):
        raise ArtefactError(f"{path} is not an object but {type(data).__name__}")
    hints = get_type_hints(kind)
    if unknown := sorted(str(k) for k in set(data) - set(hints)):
        raise ArtefactError(
            f"{path} has unknown keys: {', '.join(unknown)}",
            next_step="read it with the torchlathe version that wrote it",
        )
    if missing := [name for name in hints if name not in data]:
        raise ArtefactError(f"{path} lacks the keys: {', '.join(missing)}")
    return kind(**{name: _decode(hint, data[name], f"{path}.{name}") for name, hint in hints.items()})


def _decode(hint: Any, value: Any, path: str) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    if origin in (types.UnionType, Union):
        return None if value is None else _decode(next(a for a in args if a is not type(None)), value, path)
    if origin is list and isinstance(value, list):
        return [_decode(args[0], v, f"{path}[{i}]") for i, v in enumerate(value)]
    if origin is dict and isinstance(value, Mapping):
        return {str(k): _decode(args[1], v, f"{path}[{k!r}]") for k, v in value.items()}
    if is_dataclass(hint) and isinstance(hint, type):
        return _decode_row(hint, value, path)
    if hint is float and (value in ("inf", "-inf", "nan") or type(value) in (int, float)):
        return float(value)
    if hint in (int, str, bool) and type(value) is hint:
        return value
    raise ArtefactError(f"{path} should be {hint}, got {value!r}")
