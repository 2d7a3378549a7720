"""The report: lossless JSON, safe and self-contained HTML, and text in which every pass has its row."""

from __future__ import annotations

import io
import json
import math
import re
from dataclasses import fields, replace
from html.parser import HTMLParser

import pytest
from rich.console import Console

from torchlathe.optimizer.report import KernelRow, Report, Step, amount_text, seconds_text
from torchlathe.passes.errors import ArtefactError

HOSTILE = "<script>alert(1)</script>\"'></pre><img src=x onerror=alert(2)>[red]x[/red]\x1b[31m{{7*7}}"
VOID = {"meta", "img", "br", "rect"}  # rect: always self-closed in the page


def full_report(name="fuse-attention"):
    step = Step(name, "exact", 4, None, True, "", 0.0123, 0.0099, 1.18, 1.31, None, 218, 190, 12_345_678_901,
                12_345_678_901, 45_000_000, 41_000_000, 1.234)  # fmt: skip
    steps = [
        step,
        Step("fold-norm", "exact", refusal=f"no batch norm here {name}", nodes_before=190, nodes_after=190),
        replace(step, name="fuse-qkv", kept=False, reason="measurably slower", seconds_after=0.0246, quality=0.5),
    ]
    kernels = [
        KernelRow(name, "tvm", ["add", name], 8, 1e-4, 400_000, 3_000_000, "rows=4", f"for i {name}", {"llvm": name},
                  {"eager": 2e-4, "lost": math.inf}, 0.25),
        KernelRow("linear", "eager", ["linear"]),
    ]  # fmt: skip
    before = "placeholder x : f32[2, 4]\nrelu_1 = aten.relu.default(x) : f32[2, 4]\nreturn relu_1"
    return Report(name, "cpu", "a chip, 2 cores", steps, kernels, 0.0123, 0.0053, 2.31, 2.25, 2.4, 14.2,
                  [f"note {name}"], {"fallbacks to eager": 0, "cache misses": 5}, before,
                  "placeholder x : f32[2, 4]\nreturn x", {"torch": "2.13.0"})  # fmt: skip


class Page(HTMLParser):
    """Collects tags, attributes and text, and insists that every tag is closed in order."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.attributes, self.words = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open, f"unclosed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        self.words.append(data)

    def of(self, tag, kind=None):
        return [a for t, a in self.tags if t == tag and (kind is None or a.get("class") == kind)]


def test_json_round_trip():
    report = full_report(HOSTILE)
    plain = json.loads(report.json(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    again = Report.from_dict(plain)
    assert again == report
    assert again.kernels[0].rivals["lost"] == math.inf
    assert all(getattr(report, f.name) not in (None, "", [], {}) for f in fields(report)), "a field was not exercised"


def test_json_of_empty_and_nan():
    assert Report.from_dict(json.loads(Report("m", "cpu").json())) == Report("m", "cpu")
    lost = Report("m", "cpu", steps=[Step("a", "lossy", quality=math.nan)])
    assert math.isnan(Report.from_dict(json.loads(lost.json())).steps[0].quality)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(extra=1), r"report has unknown keys: extra"),
        (lambda d: d["steps"][1].update(speed=1), r"report\.steps\[1\] has unknown keys: speed"),
        (lambda d: d.pop("kernels"), r"report lacks the keys: kernels"),
        (lambda d: d["steps"][0].update(sites="4"), r"report\.steps\[0\]\.sites .*'4'"),
        (lambda d: d["steps"][0].update(kept=1), r"report\.steps\[0\]\.kept"),
        (lambda d: d["kernels"][0]["rivals"].update(eager=None), r"report\.kernels\[0\]\.rivals\['eager'\]"),
        (lambda d: d.update(steps=3), r"report\.steps "),
        (lambda d: d.update(kernels=[7]), r"report\.kernels\[0\] is not an object"),
    ],
)
def test_foreign_json_is_refused(change, message):
    plain = json.loads(full_report().json())
    change(plain)
    with pytest.raises(ArtefactError, match=message):
        Report.from_dict(plain)


def test_html_shows_hostile_names_as_text():
    page = Page(full_report(HOSTILE).html())
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "img", "a", "link", "iframe", "object"})
    assert not [name for name, _ in page.attributes if name.startswith("on") or name in ("src", "href")]
    shown = " ".join(page.words)
    assert shown.count("<script>alert(1)</script>") >= 5  # title, heading, note, rows, source
    assert "{{7*7}}" in shown


def test_html_loads_nothing_from_elsewhere():
    text = full_report().html()
    assert not re.search(r"https?:|//[a-z]|url\(|@import|<script|<link|<base", text)
    assert text.startswith("<!DOCTYPE html>") and "prefers-color-scheme: dark" in text


def test_html_charts():
    page = Page(full_report().html())
    bars = [r for r in page.of("rect") if r.get("height") == "13"]
    widths = [float(r["width"]) for r in bars]
    assert [r["class"] for r in bars] == ["old", "new", "old", "lost"]  # the refused pass has no times
    assert widths[3] == max(widths) and widths[2] == pytest.approx(widths[3] / 2, abs=0.1)  # 12.3 ms and 24.6 ms
    assert widths[1] / widths[0] == pytest.approx(99 / 123, abs=0.001)
    assert [r["width"] for r in page.of("rect", "new") if r["height"] == "6"] == ["25.00"]
    assert len(page.of("tr", "kept")) == len(page.of("tr", "refused")) == len(page.of("tr", "dropped")) == 1
    assert {"source", "llvm", "candidates"} <= set(page.words)


def test_html_marks_only_what_changed_in_the_graph():
    def graph(ops):
        lines = [f"{op}_{i} = aten.{op}.default({w}, w{w}) : f32[4]" for i, (op, w) in enumerate(ops, 1)]
        return "\n".join(["placeholder x : f32[4]", *lines])

    ops = [("linear", k) for k in range(30)]
    report = Report("m", "cpu", graph_before=graph(ops), graph_after=graph(ops[:10] + ops[11:] + [("gelu", 99)]))
    page = Page(report.html())
    assert len(page.of("td", "gone")) == len(page.of("td", "added")) == 1  # though 19 later lines are renumbered
    text = report.html()
    assert re.search(r'class="gone">linear_11 = aten.linear.default\(10, w10\)', text)
    assert re.search(r'class="added">gelu_30 = ', text)
    assert "11 unchanged lines" in text and "19 unchanged lines" in text


def test_html_stays_under_one_megabyte():
    big = full_report("<" * 50)
    line = "linear_{0} = aten.linear.default(x_{0}, " + "&" * 100 + ") : f32[8, 128, 384]\n"
    big.graph_before = big.graph_after = "".join(line.format(i) for i in range(20_000))
    big.kernels = [replace(big.kernels[0], name=f"k{i}", source="<" * 30_000) for i in range(300)]
    big.steps = [replace(big.steps[1], name=f"pass-{i}", refusal="&" * 5_000) for i in range(1_000)]
    text = big.html()
    assert len(text.encode()) < 1_000_000
    assert "pass-0<" in text and "cut here" in text and "the JSON report has all of them" in text
    Page(text)


def test_empty_report_prints_and_renders():
    empty = Report("model", "cpu")
    Page(empty.html())
    assert "not timed" in str(empty)
    assert render(empty, 80)


def render(report, width):
    out = io.StringIO()
    Console(file=out, width=width).print(report)
    return out.getvalue()


def test_text_has_a_row_per_pass_and_no_markup():
    report = full_report()
    lines = str(report).splitlines()
    for step, words in zip(report.steps, (["kept", "12.3 ms", "9.9 ms", "1.18 to 1.31x"], ["refused: no batch norm"],
                                          ["dropped: measurably slower"]), strict=True):  # fmt: skip
        (row, *_) = [line for line in lines if line.startswith(step.name + " ")]
        assert all(word in row for word in words), row
    assert any("218 → 190" in line and "12.35G" in line and "45M → 41M" in line for line in lines)
    assert "cache misses: 5" in lines and not any("fallbacks" in line for line in lines)
    assert any(line.startswith("fuse-attention  tvm") and "25.0%" in line for line in lines)


def test_hostile_names_do_not_reach_the_terminal():
    report = full_report("[red]x[/red]\x1b[31m\n\rnext")
    for text in (str(report), render(report, 200)):
        assert "\x1b" not in text and "\r" not in text
        assert "[red]x[/red]" in text  # shown, not obeyed


def test_rich_tables_fit_a_narrow_terminal():
    text = render(full_report(), 80)
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    assert all(step.name in text for step in full_report().steps)


@pytest.mark.parametrize(
    ("ratio", "low", "high", "start"),
    [
        (2.0, 1.9, 2.1, "faster: 2x the speed"),
        (0.5, 0.4, 0.6, "slower: 0.5x the speed"),
        (1.01, 0.98, 1.04, "no measurable difference: 1.01x"),
        (1.5, None, None, "1.5x the speed"),
        (None, None, None, "not timed"),
    ],
)
def test_headline(ratio, low, high, start):
    report = Report("m", "cpu", eager_seconds=0.2, seconds=0.1, ratio=ratio, ratio_low=low, ratio_high=high)
    assert report.headline().startswith(start)
    assert start in str(report)


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "-"), (0.0, "0 s"), (2.5e-8, "25 ns"), (1.234e-5, "12.3 us"), (0.9999e-3, "1 ms"), (0.0123, "12.3 ms"),
     (59.94, "59.9 s"), (4321.0, "4321 s")],
)  # fmt: skip
def test_seconds_text(value, text):
    assert seconds_text(value) == text


def test_amount_text():
    assert [amount_text(v) for v in (0, 999, 1500, 12_345_678_901, 2e12)] == ["0", "999", "1.5k", "12.35G", "2T"]
