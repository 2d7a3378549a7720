"""Memory that calls need on top of the model: eager against torchlathe, each in a process of its own.

    python bench/memory.py [--only MODEL ...] [--batch N ...] [--markdown FILE]

One process optimizes and saves, another one loads the file, so that the arena has not been touched before. Then
free memory is given back to the system, three calls are made, and the peak of resident memory over them is compared
with what was resident before the first. That counts everything that a call touches: results, scratch of kernels, thread
stacks, libraries that are loaded late. Packed copies of weights are resident before and counted apart.
"""

from __future__ import annotations

import argparse
import ctypes
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import peers_models as models
import torch
from torch.nn import functional as F

MIB = 1 << 20


class Attention(torch.nn.Module):
    """One attention operator; 8 heads of 64 features."""

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """The flash-like operator of torch, or ours."""
        return F.scaled_dot_product_attention(q, k, v)


def build(name: str, batch: int) -> tuple[torch.nn.Module, tuple[torch.Tensor, ...]]:
    """A model of bench/peers.py, or ``attention-N`` with N tokens."""
    if not name.startswith("attention-"):
        return models.build(name, batch)
    tokens = int(name.removeprefix("attention-"))
    return Attention(), tuple(torch.randn(batch, 8, tokens, 64) for _ in range(3))


def status(field: str) -> int:
    """A size in bytes from the system's account of this process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def optimize(name: str, batch: int, path: str) -> None:
    """Save the optimized model. Runs in a process of its own."""
    import torchlathe

    torchlathe.optimize(*build(name, batch)).save(path)


def measure(name: str, batch: int, path: str | None) -> dict[str, int]:
    """Bytes that three calls add, and bytes of packed weights. Runs in a process of its own."""
    model, args = build(name, batch)
    call: Any = model
    packed = 0
    if path is not None:
        import torchlathe

        del model
        call = torchlathe.load(path)
        constants = {c.data_ptr(): c.nbytes for choice in call.choices for c in choice.kernel.constants}
        packed = sum(constants.values())
    with torch.no_grad():
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        before = status("VmRSS")
        for _ in range(3):
            call(*args)
        return {"call": status("VmHWM") - before, "packed": packed}


def alone(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function in a fresh process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, args)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*models.MODELS, "attention-1024", "attention-2048"]
    parser.add_argument("--only", nargs="+", default=names, metavar="MODEL")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8], metavar="N")
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args(arguments)
    if sys.platform != "linux":
        print("reads the accounts of Linux; not available here")
        return 1
    print(f"{os.cpu_count()} cores, torch {torch.__version__}")
    lines = ["| model | batch | eager, MiB | torchlathe, MiB | torchlathe / eager | packed weights, MiB |",
             "|---|---|---|---|---|---|"]  # fmt: skip
    for name in options.only:
        for batch in options.batch:
            with tempfile.TemporaryDirectory() as folder:
                path = f"{folder}/model.lathe"
                alone(optimize, name, batch, path)
                eager, ours = alone(measure, name, batch, None), alone(measure, name, batch, path)
            lines.append(f"| {name} | {batch} | {eager['call'] / MIB:.1f} | {ours['call'] / MIB:.1f} "
                         f"| {ours['call'] / eager['call']:.2f} | {ours['packed'] / MIB:.0f} |")  # fmt: skip
            print(lines[-1], flush=True)
    if options.markdown:
        options.markdown.write_text("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
