"""Speed on a GPU, from this source tree: torchlathe against what torch offers.

    python bench/gpu.py --out DIR                       whole models against eager and torch.compile
    python bench/gpu.py --out DIR --kernels             single kernels against torch's, and the device's rates
    python bench/gpu.py --out DIR --check               every template against eager; the status is 1 if one is wrong
    TRITON_INTERPRET=1 python bench/gpu.py --device cpu --out DIR ...                    a dry run at toy sizes, no GPU

Needs torch and triton, for the models transformers; nothing is downloaded and nothing has to be installed. Results are
written as JSON and as a markdown table after every row, so that a run that is ended leaves what it has measured. Rows
come in the order of their weight and stop when the budget of seconds is spent.

Models are built in waves: the processes of one wave compile at the same time, and when all are ready they are sampled
one after the other on an idle machine. Within a row the contenders take turns, each sample being as many calls as last
some milliseconds between two CUDA events; medians are reported, and the ratio with its 95% interval over the rounds.
Every contender must come as near to the float32 model as eager does, up to a factor of two.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from gpu_child import Child, Message, run_cases

TRANSFORMERS = ("vit-b", "bert-base", "gpt2", "llama-110m", "vit-s")
CONVOLUTIONAL = ("resnet-50", "mobilenet-v2", "convnext-t")
ROWS = (
    *((name, 8) for name in (*TRANSFORMERS, "resnet-50")), *((name, 1) for name in (*TRANSFORMERS, "resnet-50")),
    ("vit-b", 64), ("mobilenet-v2", 8), ("convnext-t", 8), ("mobilenet-v2", 1), ("convnext-t", 1),
)  # fmt: skip
TOYS = (("vit", 2), ("llama", 1), ("bert", 2))
PEERS = ("compile", "reduce-overhead", "max-autotune")
SECTIONS = {
    "rows": 1.0,
    "attention": 1.2,
    "linear": 1.6,
    "sparse": 0.7,
    "decode": 0.6,
    "merging": 1.2,
    "fused": 1.2,
}  # shares of time
LEAST = 60.0  # seconds: with less left, no more models are begun
SAMPLING = 25.0  # seconds that one row may need from ready to done


Row = tuple[str, int]


class Table:
    """Rows of named cells by section, written to a JSON and a markdown file whenever something is added."""

    def __init__(self, folder: Path, name: str, facts: dict[str, Any]) -> None:
        self.json, self.markdown, self.facts = folder / f"{name}.json", folder / f"{name}.md", facts
        self.rows: list[dict[str, Any]] = []
        self.failures: list[dict[str, str]] = []
        self.end: list[str] = []

    def add(self, section: str, row: dict[str, Any]) -> None:
        """A row."""
        self.rows.append({"section": section, **row})
        print(" | ".join(f"{k} {v}" for k, v in row["cells"].items()), flush=True)
        self.write()

    def fail(self, section: str, what: str, why: str) -> None:
        """A row that could not be measured."""
        self.failures.append({"section": section, "what": what, "why": why})
        print(f"{what}: {why}", flush=True)
        self.write()

    def text(self) -> str:
        """All as markdown."""
        parts = [" · ".join(f"{k} {v}" for k, v in self.facts.items())]
        for section in dict.fromkeys(r["section"] for r in self.rows):
            rows = [r["cells"] for r in self.rows if r["section"] == section]
            heads = list(dict.fromkeys(h for r in rows for h in r))
            lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
            lines += [f"| {' | '.join(str(r.get(h, '-')).replace('|', '/') for h in heads)} |" for r in rows]
            parts.append(f"## {section}\n\n" + "\n".join(lines))
        if self.failures:
            parts.append("## not measured\n\n" + "\n".join(f"- {f['what']}: {f['why']}" for f in self.failures))
        return "\n\n".join([*parts, *self.end]) + "\n"

    def write(self) -> None:
        """Both files, each put in place as a whole."""
        stored = {"facts": self.facts, "rows": self.rows, "failures": self.failures, "end": self.end}
        for path, text in ((self.json, json.dumps(stored, indent=1)), (self.markdown, self.text())):
            new = path.with_suffix(".new")
            new.write_text(text)
            new.replace(path)


def measured_ceilings(options: argparse.Namespace, log: Path) -> Message:
    """Facts of the device, and its rates. Exits where there is no usable device."""
    child = Child({"kind": "ceilings", "device": options.device}, log)
    try:
        found = child.message(time.time() + 120)
    except TimeoutError:
        found = None
    finally:
        how = child.end()
    if found is None:
        lines = log.read_text().strip().splitlines()
        dry = "A dry run needs none: TRITON_INTERPRET=1 python bench/gpu.py --device cpu --out DIR"
        raise SystemExit(f"no usable GPU ({how}): {lines[-1] if lines else 'no message'}\n{dry}")
    facts, rates = found["facts"], found["ceilings"]
    facts |= {"date": str(datetime.datetime.now(datetime.UTC).date()), "cores": os.cpu_count()}
    facts |= {"copy": f"{rates['copy'] / 1e9:.0f} GB/s", "bf16 product": f"{rates['product'] / 1e12:.1f} TFLOP/s"}
    return found


def models(options: argparse.Namespace, until: float, facts: dict[str, Any], log: Path) -> Table:
    """The table of whole models."""
    table = Table(options.out, "gpu-models", facts | {"dtype": options.dtype})
    rows = [r for r in (ROWS if options.device == "cuda" else TOYS)
            if (not options.only or r[0] in options.only) and (not options.batch or r[1] in options.batch)]  # fmt: skip
    shared = {"kind": "model", "device": options.device, "dtype": options.dtype, "peers": options.peers,
              "lock": str(Path(tempfile.mkdtemp()) / "turn"), "ours": not options.peers_only, "tune": options.tune,
              "level": options.level, "patience": options.patience, "seconds": options.seconds}  # fmt: skip
    waves = [rows[k : k + options.jobs] for k in range(0, len(rows), options.jobs)]

    def begun(wave: Sequence[Row]) -> dict[Row, Child]:
        return {r: Child({**shared, "model": r[0], "batch": r[1]}, log) for r in wave}

    children, coming = begun(waves[0]) if waves else {}, dict[Row, Child]()
    try:
        for k, wave in enumerate(waves):
            if until - time.time() < LEAST:
                for name, batch in (r for w in waves[k:] for r in w):
                    table.fail("models", f"{name}, batch {batch}", "the budget was spent")
                break
            coming = begun(waves[k + 1]) if k + 1 < len(waves) else {}  # they load while this wave is built
            print(f"\nbuilding {', '.join(f'{name} {batch}' for name, batch in wave)}", flush=True)
            _wave(options, children, coming, until, table)
            children, coming = coming, {}
            table.end = [_means(table)]
            table.write()
    finally:
        for child in (*children.values(), *coming.values()):
            child.end()
    return table


def _wave(options: argparse.Namespace, children: dict[Row, Child], coming: dict[Row, Child], until: float,
          table: Table) -> None:  # fmt: skip
    """Build some rows at the same time, then sample each while nothing else runs."""
    limit = min(time.time() + options.wave, max(time.time() + 20, until - SAMPLING / 3 * len(children)))
    for child in children.values():
        child.go(limit - 20)  # what is cut off then needs some time to end
    ready = []
    for row, child in children.items():
        row_label = f"{row[0]}, batch {row[1]}"
        if (why := _await(child, limit, "ready", row_label)) is None:
            ready.append(row)
        else:
            child.end()
            table.fail("models", row_label, why)
    for row, child in coming.items():
        _await(child, time.time() + 20, "loaded", f"{row[0]}, batch {row[1]}")
    for row in ready:
        child, row_label = children[row], f"{row[0]}, batch {row[1]}"
        child.go()
        try:
            message = child.message(time.time() + SAMPLING)
        except TimeoutError:
            message = {"why": f"sampling took more than {SAMPLING:.0f} s"}
        how = child.end()
        if message is None or "row" not in message:
            table.fail("models", row_label, message["why"] if message else f"the process {how}, see the log")
            continue
        table.add("models", message["row"])
        for who, why in message["row"]["failed"].items():
            table.fail("models", f"{row_label}, {who}", why)


def _await(child: Child, until: float, wanted: str, label: str) -> str | None:
    """Wait until a child says the wanted word; the reason if it never will."""
    try:
        while (message := child.message(until)) is not None:
            if wanted in message:
                return None
            if "built" in message:
                print(f"  {label}: {message['built']} {message['took'] or 0:.0f} s {message['why'] or ''}", flush=True)
    except TimeoutError:
        return f"not {wanted} in time"
    return f"the process {child.end()}, see the log"


def _means(table: Table) -> str:
    """Geometric means of the ratios, transformers and convolutional nets apart."""
    found = []
    for label, convolutional in (("transformers", False), ("convolutional nets", True)):
        ratios = [r["ratio"] for r in table.rows if "ratio" in r and (r["model"] in CONVOLUTIONAL) is convolutional]
        if ratios:
            found.append(f"{label}: {math.exp(statistics.mean(map(math.log, ratios))):.3f} over {len(ratios)} cases")
    return "Best torch.compile mode / ours, geometric mean: " + ("; ".join(found) or "no case") + "."


def kernels(
    options: argparse.Namespace, until: float, facts: dict[str, Any], rates: dict[str, float], log: Path
) -> Table:
    """The tables of single kernels. Each section has its share of what is left; what it does not use goes on."""
    table = Table(options.out, "gpu-kernels", facts)
    chosen = [s for s in SECTIONS if not options.only or s in options.only]

    def request(section: str) -> dict[str, Any]:
        return {
            "kind": "kernels",
            "section": section,
            "device": options.device,
            "ceilings": rates,
            "match": options.match,
            "peers": options.peers,
            "tune": options.tune,
        }

    coming = Child({**request(chosen[0]), "skip": 0}, log) if chosen else None
    for k, section in enumerate(chosen):
        share = (until - time.time()) * SECTIONS[section] / sum(SECTIONS[s] for s in chosen[k:])
        child, coming = coming, None
        if k + 1 < len(chosen):  # it loads while this section runs
            coming = Child({**request(chosen[k + 1]), "skip": 0}, log)

        def keep(message: Message, section: str = section) -> None:
            if "row" in message:
                table.add(section, message["row"])
            else:
                table.fail(section, message["failed"], message["why"])

        print(f"\n{section}, {share:.0f} s", flush=True)
        run_cases(request(section), time.time() + share, options.patience, log, keep, child)
    table.write()
    return table


def check(options: argparse.Namespace, until: float, facts: dict[str, Any], log: Path) -> tuple[Table, int]:
    """Every template against eager. The status is 1 if one is wrong, 2 if time ran out before all were seen."""
    table, shares = Table(options.out, "gpu-check", facts), options.processes
    lock = threading.Lock()

    def keep(message: Message) -> None:
        row = message.get("row") or {"fine": False, "cells": {
            "verdict": "WRONG", "case": message.get("failed"), "found": message.get("why")}}  # fmt: skip
        with lock:
            table.add("check", row)

    def run(share: int) -> bool:
        request = {"kind": "check", "device": options.device, "schedules": options.schedules, "match": options.match,
                   "share": share, "shares": shares}  # fmt: skip
        return run_cases(request, until, options.patience, log, keep)

    with ThreadPoolExecutor(shares) as pool:
        complete = all(list(pool.map(run, range(shares))))
    table.rows.sort(key=lambda r: (r["fine"], r["cells"]["case"]))
    wrong = [r["cells"]["case"] for r in table.rows if not r["fine"]]
    table.end = [f"{len(table.rows)} cases, {len(wrong)} wrong{'' if complete else ', not all were run'}"
                 + (": " + ", ".join(wrong) if wrong else "")]  # fmt: skip
    table.write()
    return table, 1 if wrong else 0 if complete else 2


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="where results go")
    add("--kernels", action="store_true", help="single kernels instead of models")
    add("--check", action="store_true", help="right answers only")
    add("--device", choices=("cuda", "cpu"), default="cuda")
    add("--dtype", choices=("float16", "bfloat16", "float32"), default="float16", help="of the models")
    add("--budget", type=float, default=500.0, metavar="SECONDS", help="of the whole command")
    add("--only", nargs="+", default=[], metavar="NAME", help="models, or sections of the kernels")
    add("--match", default="", metavar="TEXT", help="cases of kernels or checks with this text in their label")
    add("--batch", nargs="+", type=int, default=[], metavar="N")
    add("--peers", nargs="*", default=list(PEERS), choices=(*PEERS, "max-autotune-graphs"), metavar="NAME")
    add("--peers-only", action="store_true", help="leave ours out")
    add("--jobs", type=int, default=3, help="models that are built at the same time")
    add("--wave", type=float, default=230.0, metavar="SECONDS", help="of building the models of one wave")
    add("--tune", type=float, default=40.0, metavar="SECONDS", help="of trying kernels of ours per model")
    add("--level", default="default", choices=("fast", "default", "max"), help="of torchlathe.optimize")
    add("--patience", type=float, default=150.0, metavar="SECONDS", help="for one contender, or one case")
    add("--seconds", type=float, default=4.0, help="of sampling per model")
    add("--schedules", type=int, default=2, help="of each case of --check")
    add("--processes", type=int, default=8, help="that share the cases of --check")
    add("--cache", type=Path, metavar="DIR", help="keep compiled code here; a folder that is removed by default")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table last."""
    options, start = parsed(arguments), time.time()
    until = start + options.budget
    options.out.mkdir(parents=True, exist_ok=True)
    log = options.out / "gpu-log.txt"
    log.write_text("")
    processes = options.processes if options.check else 1 if options.kernels else options.jobs
    threads = max(2, (os.cpu_count() or 8) // processes)
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(threads))
    os.environ.setdefault("OMP_NUM_THREADS", str(min(threads, 4)))
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        cache = options.cache.resolve() if options.cache else Path(scratch)
        for variable, name in (("TRITON_CACHE_DIR", "triton"), ("TORCHINDUCTOR_CACHE_DIR", "inductor"),
                               ("TORCHLATHE_CACHE", "torchlathe")):  # fmt: skip
            os.environ[variable] = str(cache / name)
        found, status = measured_ceilings(options, log), 0
        facts = found["facts"]
        print(" · ".join(f"{k} {v}" for k, v in facts.items()), flush=True)
        if options.check:
            table, status = check(options, until, facts, log)
        elif options.kernels:
            table = kernels(options, until, facts, found["ceilings"], log)
        else:
            table = models(options, until, facts, log)
        table.facts["took"] = f"{time.time() - start:.0f} s"
        table.write()
    print(f"\n{table.text()}", flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
