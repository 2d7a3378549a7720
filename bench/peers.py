"""Seconds of whole models: torchlathe against what a user could pick instead, sampled interleaved in one process.

    python bench/peers.py [--quick] [--only MODEL ...] [--batch N ...] [--peers NAME ...] [--json FILE] [--table FILE]

One process per model and batch builds every contender, checks it against eager, and then takes turns in an order that
is drawn anew in each round: each sample is preceded by a pause and one call that is not timed, so that the spinning
threads of the last contender have gone to sleep and the caches belong to this one. (ONNX Runtime's spin for tens of
milliseconds: with a short pause and a fixed order, whoever came after it lost a quarter of its speed.) Reported are
medians, and the ratio to the fastest peer with the 95% confidence interval of the median over the rounds. All compute
in float32.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import multiprocessing
import os
import platform
import random
import resource
import signal
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import peers_models as models
import torch

from torchlathe.targets.measure import median_interval

Call = Callable[[], Any]
PAUSE = 0.15  # seconds between contenders: longer than the threads of any runtime spin
TOLERANCE = 2e-3  # of the largest value: far above rounding, far below a wrong kernel or bfloat16


def eager(model: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> Call:
    """The model itself."""
    return lambda: model(*args)


def inductor(model: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> Call:
    """torch.compile as it comes."""
    compiled = torch.compile(model)
    compiled(*args)
    return lambda: compiled(*args)


def inductor_max(model: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> Call:
    """torch.compile with max-autotune and frozen weights."""
    from torch._inductor import config

    torch._dynamo.reset()
    config.freezing = True
    compiled = torch.compile(model, mode="max-autotune")
    compiled(*args)
    config.freezing = False
    return lambda: compiled(*args)


def openvino(model: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> Call:
    """OpenVINO with float32 demanded (its default would use bfloat16 here)."""
    import openvino as ov

    converted = ov.convert_model(torch.export.export(model, args))  # tracing fails on causal language models
    compiled = ov.Core().compile_model(converted, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    request, arrays = compiled.create_infer_request(), [a.numpy() for a in args]
    return lambda: request.infer(arrays, share_inputs=True, share_outputs=True)[0]


def onnxruntime(model: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> Call:
    """ONNX Runtime on a graph exported by torch."""
    import onnxruntime as ort

    program = torch.onnx.export(model, args, dynamo=True, verbose=False)
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = ort.InferenceSession(program.model_proto.SerializeToString(), options, ["CPUExecutionProvider"])
    feed = {i.name: a.numpy() for i, a in zip(session.get_inputs(), args, strict=True)}
    return lambda: session.run(None, feed)[0]


def torchlathe_(model: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> Call:
    """torchlathe.optimize as it comes."""
    import torchlathe

    fast = torchlathe.optimize(model, args)
    return lambda: fast(*args)


CONTENDERS: dict[str, Callable[[torch.nn.Module, tuple[torch.Tensor, ...]], Call]] = {
    "eager": eager, "inductor": inductor, "inductor-max": inductor_max, "openvino": openvino,
    "onnxruntime": onnxruntime, "torchlathe": torchlathe_,
}  # fmt: skip


def sample(calls: dict[str, Call], seconds: float) -> dict[str, list[float]]:
    """Seconds per call of each contender, one sample per round, in random order."""
    names, found = list(calls), {name: list[float]() for name in calls}
    batches = {}
    for name, call in calls.items():
        start = time.perf_counter()
        call()
        batches[name] = max(1, min(20, round(0.03 / (time.perf_counter() - start))))
    start, rounds, draw = time.perf_counter(), 0, random.Random(0)
    while rounds < 7 or time.perf_counter() - start < seconds:
        for name in draw.sample(names, len(names)):
            time.sleep(PAUSE)
            calls[name]()
            begin = time.perf_counter()
            for _ in range(batches[name]):
                calls[name]()
            found[name].append((time.perf_counter() - begin) / batches[name])
        rounds += 1
    return found


def run_case(name: str, batch: int, peers: Sequence[str], seconds: float) -> dict[str, Any]:
    """One row: build, check, sample. Runs in a process of its own."""
    model, args = models.build(name, batch)
    row: dict[str, Any] = {"model": name, "batch": batch, "build_seconds": {}, "failed": {}, "error": {}}
    calls: dict[str, Call] = {}
    with torch.no_grad():
        wanted = model(*args).numpy()
        for peer in ["torchlathe", *peers]:  # ours first: its measured choices must not see another runtime's threads
            start = time.perf_counter()
            try:
                call = CONTENDERS[peer](model, args)
                error = float(np.abs(np.asarray(call()) - wanted).max() / np.abs(wanted).max())
            except Exception as reason:  # a peer that cannot run a model is left out of its row, by name
                row["failed"][peer] = f"{type(reason).__name__}: {str(reason).splitlines()[0][:200]}"
                continue
            row["build_seconds"][peer], row["error"][peer] = time.perf_counter() - start, error
            print(f"  {peer} was built in {row['build_seconds'][peer]:.0f} s", file=sys.stderr, flush=True)
            if error > TOLERANCE:
                row["failed"][peer] = f"wrong by {error:.1e} of the largest value"
            else:
                calls[peer] = call
        row["samples"] = sample(calls, seconds)
    row["peak_memory"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return row


def summary(row: dict[str, Any]) -> dict[str, Any]:
    """Medians, the fastest peer, and its seconds over ours with the interval."""
    samples = row["samples"]
    medians = {k: statistics.median(v) for k, v in samples.items()}
    others = {k: v for k, v in medians.items() if k not in ("torchlathe", "eager")} or medians
    best = min(others, key=others.__getitem__)
    ratios = [b / a for a, b in zip(samples["torchlathe"], samples[best], strict=True)]
    return {"medians": medians, "best": best, "ratio": statistics.median(ratios), "interval": median_interval(ratios)}


def table(rows: Sequence[dict[str, Any]], peers: Sequence[str]) -> str:
    """Markdown: milliseconds of every contender, and the best peer's time over ours."""
    names = ["torchlathe", *peers]
    lines = [f"| model | batch | {' | '.join(names)} | best peer / ours |", f"|{'---|' * (len(names) + 3)}"]
    for row in rows:
        s = summary(row)
        cells = [f"{s['medians'][n] * 1e3:.2f}" if n in s["medians"] else "-" for n in names]
        low, high = s["interval"]
        end = f"{s['ratio']:.2f} ({low:.2f} to {high:.2f}) {s['best']}"
        lines.append(f"| {row['model']} | {row['batch']} | {' | '.join(cells)} | {end} |")
    return "\n".join(lines)


def means(rows: Sequence[dict[str, Any]]) -> str:
    """Geometric means of the ratios, transformers and convolutional nets apart."""
    text = []
    for label, wanted in (("transformers", False), ("convolutional nets", True)):
        ratios = [summary(r)["ratio"] for r in rows if (r["model"] in models.CONVOLUTIONAL) is wanted]
        if ratios:
            text.append(f"{label}: {math.exp(statistics.mean(map(math.log, ratios))):.3f} over {len(ratios)} cases")
    return "best peer / ours, geometric mean: " + "; ".join(text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; the exit status is 0 unless a case failed to run at all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="batch 1, no max-autotune, short sampling (5 minutes)")
    parser.add_argument("--only", nargs="+", default=list(models.MODELS), choices=list(models.MODELS), metavar="MODEL")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8], metavar="N")
    parser.add_argument("--peers", nargs="+", default=[c for c in CONTENDERS if c != "torchlathe"], metavar="NAME")
    parser.add_argument("--seconds", type=float, default=20.0, help="sampling per case")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--table", type=Path)
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # which ends the process of the case as well
    if options.quick:
        options.batch, options.seconds = [1], 4.0
        options.peers = [p for p in options.peers if p != "inductor-max"]
    machine = f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"
    print(f"{machine}, {datetime.datetime.now(datetime.UTC).date()}", flush=True)
    rows, missing = [], 0
    for name in options.only:
        for batch in options.batch:
            with multiprocessing.get_context("spawn").Pool(1) as pool:  # a fresh process: no peer's leftovers
                try:
                    row = pool.apply(run_case, (name, batch, options.peers, options.seconds))
                except Exception as error:
                    print(f"{name} batch {batch}: {error}", flush=True)
                    missing += 1
                    continue
            rows.append(row)
            print(table([row], options.peers).splitlines()[-1], row["failed"] or "", flush=True)
            if options.json:
                options.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1))
    text = f"{table(rows, options.peers)}\n\n{means(rows)}"
    print(f"\n{text}")
    if options.table:
        options.table.write_text(text + "\n")
    return min(missing, 1)


if __name__ == "__main__":
    raise SystemExit(main())
