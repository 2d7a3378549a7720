"""Seconds of every zoo model: eager, optimized, and through torch.compile, sampled interleaved in one run.

    python bench/zoo_speed.py [--only NAME ...] [--budget SECONDS]

Prints a markdown table. A ratio is seconds divided by eager's seconds (below 1 is faster), with its 95% confidence
interval. The claim: no ratio is measurably above 1.03.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
from collections.abc import Callable, Sequence
from typing import Any

import torch
import zoo

import torchlathe
from torchlathe.passes.errors import CaptureError
from torchlathe.targets.measure import Comparison, compare_many

CLAIM = 1.03  # seconds over eager's seconds


def measure(name: str, budget: float) -> dict[str, Comparison | str]:
    """Comparison with eager by door; a text instead where the door refuses the model."""
    torch._dynamo.reset()
    model, args, kwargs = zoo.models()[name]()
    calls: dict[str, Callable[[], Any]] = {"eager": lambda: model(*args, **kwargs)}
    found: dict[str, Comparison | str] = {}
    try:
        fast = torchlathe.optimize(model, args, kwargs)
        calls["optimize"] = lambda: fast(*args, **kwargs)
    except CaptureError as error:
        found["optimize"] = f"refused: {error.what.splitlines()[0][:60]}"
    compiled = torch.compile(model, backend="torchlathe")
    calls["compile"] = lambda: compiled(*args, **kwargs)
    timings = compare_many(calls, budget=budget, min_rounds=11)
    return found | {door: Comparison.of(timings["eager"], timings[door]) for door in calls if door != "eager"}


def cell(result: Comparison | str) -> str:
    """A ratio with its interval, in bold where it breaks the claim."""
    if isinstance(result, str):
        return result
    text = f"{result.ratio:.3f} ({result.low:.3f} to {result.high:.3f})"
    return f"**{text}**" if result.low > CLAIM else text


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; the exit status is the number of models that break the claim."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=list(zoo.models()), metavar="NAME", help="models to measure")
    parser.add_argument("--budget", type=float, default=3.0, help="seconds of sampling per model")
    options = parser.parse_args(arguments)
    machine = f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    print(f"{machine}, torch {torch.__version__}, {datetime.datetime.now(datetime.UTC).date()}\n")
    print("| model | eager, ms | optimize / eager | torch.compile / eager |\n|---|---|---|---|")
    slower: list[str] = []
    with torch.no_grad():
        for name in options.only:
            results = measure(name, options.budget)
            compiled = results["compile"]
            eager = compiled.a.median * 1e3 if isinstance(compiled, Comparison) else float("nan")
            print(f"| {name} | {eager:.2f} | {cell(results['optimize'])} | {cell(compiled)} |", flush=True)
            slower += [f"{name} ({door})" for door, r in results.items() if isinstance(r, Comparison) and r.low > CLAIM]
    print(f"\nmeasurably more than 3% slower than eager: {', '.join(slower) or 'none'}")
    return len(slower)


if __name__ == "__main__":
    raise SystemExit(main())
