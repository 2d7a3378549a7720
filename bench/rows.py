"""Row kernels against eager and torch.compile, interleaved in one process: ``python bench/rows.py [--json FILE]``."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from torchlathe.codegen.base import Region
from torchlathe.codegen.tvm.backend import TvmBackend
from torchlathe.targets.target import Target

SHAPES = ((197, 384), (1576, 768), (128, 3072))
OPERATORS: dict[str, Callable[..., torch.Tensor]] = {
    "layer_norm": lambda x, w, b: functional.layer_norm(x, (x.shape[-1],), w, b),
    "gelu": lambda x, w, b: functional.gelu(x),
    "softmax": lambda x, w, b: torch.softmax(x, -1),
    "rms_norm": lambda x, w, b: functional.rms_norm(x, (x.shape[-1],), w),
}


class Operator(torch.nn.Module):
    """One operator as a module, so that it can be exported."""

    def __init__(self, function: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: torch.Tensor) -> torch.Tensor:
        """Apply the operator."""
        return self.function(*args)


def ours(function: Callable[..., torch.Tensor], args: tuple[torch.Tensor, ...], target: Target) -> Callable[[], Any]:
    """Our first schedule, with the output allocated in every call."""
    graph = torch.export.export(Operator(function), args).run_decompositions({}).graph
    region = Region.of(n for n in graph.nodes if n.op == "call_function")
    backend = TvmBackend()
    kernel = backend.lower(region, target, next(iter(backend.space(region, target))))
    names = [n.name for n in graph.nodes if n.op == "placeholder"]
    used = [args[names.index(n.name)] for n in region.inputs]
    shape, dtype, call = args[0].shape, args[0].dtype, kernel.call

    def run() -> torch.Tensor:
        out = torch.empty(shape, dtype=dtype)
        call(*used, out)
        return out

    return run


def interleaved(functions: dict[str, Callable[[], Any]], seconds: float) -> dict[str, list[float]]:
    """Seconds per call of each function, taken in turns."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - start)
    return times


def row(operator: str, shape: tuple[int, int], target: Target, seconds: float) -> dict[str, Any]:
    """Medians, quartiles and ratios of one operator on one shape."""
    function = OPERATORS[operator]
    args = (torch.randn(shape), torch.randn(shape[-1]), torch.randn(shape[-1]))
    compiled = torch.compile(function, dynamic=False)
    functions = {
        "eager": lambda: function(*args), "compile": lambda: compiled(*args), "ours": ours(function, args, target),
    }  # fmt: skip
    torch.testing.assert_close(functions["ours"](), functions["eager"]())
    interleaved(functions, seconds / 10)
    times = interleaved(functions, seconds)
    result: dict[str, Any] = {"operator": operator, "shape": shape}
    for name, values in times.items():
        low, median, high = statistics.quantiles(values, n=4)
        result[name] = {"median": median, "low": low, "high": high, "minimum": min(values)}
    return result


def main() -> None:
    """Print the table; write the figures as JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--seconds", type=float, default=1.0, help="time per row of the table")
    options = parser.parse_args()
    bits = 512 if "avx512f" in Path("/proc/cpuinfo").read_text() else 256
    target = Target("cpu", "cpu", "generic", torch.get_num_threads(), {}, 0.0, (), 0, ("float32",), vector_bits=bits)
    print("| operator | shape | eager us | compile us | ours us (quartiles) | eager/ours | compile/ours |")
    print("|---|---|---|---|---|---|---|")
    results = []
    with torch.no_grad():
        for operator in OPERATORS:
            for shape in SHAPES:
                r = row(operator, shape, target, options.seconds)
                results.append(r)
                e, c, o = (r[k] for k in ("eager", "compile", "ours"))
                print(f"| {operator} | {shape[0]} x {shape[1]} | {e['median'] * 1e6:.1f} | {c['median'] * 1e6:.1f} | "
                      f"{o['median'] * 1e6:.1f} ({o['low'] * 1e6:.1f}-{o['high'] * 1e6:.1f}) | "
                      f"{e['median'] / o['median']:.2f} | {c['median'] / o['median']:.2f} |", flush=True)  # fmt: skip
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
