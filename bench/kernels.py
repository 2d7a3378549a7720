"""Single kernels against torch's and oneDNN's, interleaved in one process.

    python bench/kernels.py [--only SECTION ...] [--seconds S] [--markdown FILE]

Every kernel takes the schedule that a trial chooses, is checked against torch, and is then sampled in turns with its
rivals. Rates are 2 M N K (attention: 4 heads tokens^2 features) over the median seconds of a call.
"""

from __future__ import annotations

import argparse
import datetime
import math
import os
import platform
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from torchlathe import targets
from torchlathe.codegen.base import Region
from torchlathe.codegen.trial import allocate, hold
from torchlathe.codegen.tvm.backend import TvmBackend
from torchlathe.passes.capture import capture
from torchlathe.passes.ops import linear_int4, merge_tokens, pack_int4
from torchlathe.targets.measure import Comparison, Timing, compare_many

Call = Callable[[], Any]
HOST = targets.get("cpu")
# Linear layers as (rows of one image or text, outputs, inputs); each is taken at batch 1 and 8.
LAYERS = {
    "vit-s": (197, [(1152, 384), (384, 384), (1536, 384), (384, 1536)]),
    "vit-b": (197, [(2304, 768), (768, 768), (3072, 768), (768, 3072)]),
    "bert-base": (128, [(2304, 768), (768, 768), (3072, 768), (768, 3072)]),
    "minilm": (128, [(1152, 384), (384, 384), (1536, 384), (384, 1536)]),
    "gpt2": (256, [(2304, 768), (768, 768), (3072, 768), (768, 3072)]),
    "llama-110m": (256, [(1280, 768), (768, 768), (2048, 768), (768, 2048)]),
    "convnext-t": (784, [(768, 192), (192, 768), (1536, 384), (384, 1536)]),
}
DECODING = [(m, n, k) for m in (1, 4) for n, k in ((3072, 768), (768, 3072))]


class Net(torch.nn.Module):
    """A function of tensors, with constants as buffers."""

    def __init__(self, function: Callable[..., torch.Tensor], **constants: torch.Tensor) -> None:
        super().__init__()
        self.function = function
        for name, value in constants.items():
            self.register_buffer(name, value)

    def forward(self, *args: torch.Tensor) -> torch.Tensor:
        """Apply the function."""
        return self.function(self, *args)


def ours(net: Net, args: tuple[torch.Tensor, ...], tolerance: float) -> tuple[Call, str]:
    """Our kernel for the whole of `net`, writing into a buffer made once, and the schedule that won."""
    program = capture(net, args)
    region = Region.of(n for n in program.graph.nodes if n.op == "call_function")
    backend, env = TvmBackend(program), dict(zip(program.inputs, args, strict=True))
    values = [env[n] if n in env else program.weights[str(n.target)] for n in region.inputs]
    with torch.no_grad():
        trial = hold(region, [backend], HOST, values, 0.3)
    rivals = {k: v for k, v in trial.rivals.items() if k != "eager"}
    assert rivals, f"no kernel: {trial.refused}"
    best = min(rivals, key=rivals.__getitem__)
    schedule = next(s for s in backend.space(region, HOST) if f"tvm {s}" == best)
    kernel = backend.lower(region, HOST, schedule)
    operands = [*values, *kernel.constants, *allocate(kernel, values)]
    kernel.call(*operands)
    wanted = net(*args)
    error = ((operands[-1].double() - wanted.double()).abs().max() / wanted.double().abs().max()).item()
    assert error <= tolerance, error
    return (lambda: kernel.call(*operands)), str(schedule)


def linear_case(m: int, n: int, k: int, dtype: torch.dtype, tail: bool) -> tuple[Net, tuple[torch.Tensor, ...]]:
    """A linear layer with bias, and gelu after it if `tail`."""
    torch.manual_seed(0)
    w, b = (torch.randn(n, k) / math.sqrt(k)).to(dtype), torch.randn(n).to(dtype)
    function = (lambda s, x: F.gelu(F.linear(x, s.w, s.b))) if tail else (lambda s, x: F.linear(x, s.w, s.b))
    return Net(function, w=w, b=b), (torch.randn(m, k).to(dtype),)


def onednn(net: Any, x: torch.Tensor, attribute: str = "none", algorithm: str = "") -> Call:
    """torch's fused operator on a prepacked weight."""
    packed = torch.ops.mkldnn._reorder_linear_weight(net.w, x.shape[0])
    return lambda: torch.ops.mkldnn._linear_pointwise(x, packed, net.b, attribute, [], algorithm)


def rates(calls: dict[str, Call], seconds: float) -> dict[str, Timing]:
    """Timings of rivals sampled in turns."""
    with torch.no_grad():
        return compare_many(calls, budget=seconds, min_rounds=15)


def row(label: str, work: float, timings: dict[str, Timing], base: str) -> str:
    """A table row: rates, and our time against `base` with its interval."""
    seen = Comparison.of(timings["ours"], timings[base])
    cells = [f"{work / t.median / 1e9:.0f}" for t in timings.values()]
    return f"| {label} | {' | '.join(cells)} | {seen.ratio:.2f} ({seen.low:.2f} to {seen.high:.2f}) |"


def shapes() -> Iterable[tuple[str, int, int, int]]:
    """The grid: 60 layers of the models above."""
    for name, (rows, layers) in LAYERS.items():
        for batch in (1, 8):
            for n, k in layers:
                yield f"{name} x{batch}", rows * batch, n, k
    for m, n, k in DECODING:
        yield "decoding", m, n, k


def grid(seconds: float, tail: bool = False) -> list[str]:
    """f32 linear with bias (and gelu) on every shape of the grid."""
    lines = [f"| layer{' with gelu' if tail else ''} | ours | torch | oneDNN prepacked | torch / ours |",
             "|---|---|---|---|---|"]  # fmt: skip
    found = []
    for name, m, n, k in shapes():
        net, args = linear_case(m, n, k, torch.float32, tail)
        call, _ = ours(net, args, 1e-5)
        fused = onednn(net, args[0], "gelu", "none") if tail else onednn(net, args[0])
        timings = rates({"ours": call, "torch": lambda: net(*args), "onednn": fused}, seconds)  # noqa: B023
        lines.append(row(f"{name} {m} x {n} x {k}", 2.0 * m * n * k, timings, "torch"))
        print(lines[-1], flush=True)
        found.append([timings[r].median / timings["ours"].median for r in ("torch", "onednn")])
    for which, values in zip(("torch", "oneDNN prepacked"), zip(*found, strict=True), strict=True):
        lines.append(f"\n{which} over ours, {len(values)} layers: lowest {min(values):.2f}, geometric mean "
                     f"{math.exp(statistics.mean(map(math.log, values))):.2f}")  # fmt: skip
        print(lines[-1], flush=True)
    return lines


def peak(seconds: float) -> list[str]:
    """Rates of one product, and their share of the peak rate that the target row of this host holds."""
    top = targets.get("cpu").flops["float32"]
    lines = [f"| rows x 768 x 768 | ours, GFLOP/s | share of {top / 1e9:.0f} |", "|---|---|---|"]
    for m in (128, 197, 512, 1576):
        net, args = linear_case(m, 768, 768, torch.float32, False)
        call, _ = ours(net, args, 1e-5)
        timing = rates({"ours": call}, seconds)["ours"]
        rate = 2.0 * m * 768 * 768 / timing.median
        best = 2.0 * m * 768 * 768 / timing.minimum
        lines.append(f"| {m} | {rate / 1e9:.0f} (fastest {best / 1e9:.0f}) | {rate / top:.2f} ({best / top:.2f}) |")
        print(lines[-1], flush=True)
    return lines


def int8(seconds: float) -> list[str]:
    """Bytes times bytes, against oneDNN's int8 linear and our own float32."""
    lines = ["| int8 layer, GOP/s | ours | oneDNN | our float32 | oneDNN / ours |", "|---|---|---|---|---|"]
    for m, n, k in ((197, 1536, 384), (197, 3072, 768), (1576, 1536, 384), (1024, 768, 3072), (1024, 3072, 768)):
        x = torch.randint(-128, 128, (m, k), dtype=torch.int8)
        w = torch.randint(-128, 128, (k, n), dtype=torch.int8)
        scale = torch.rand(n) / 1000
        net = Net(lambda s, x: torch._int_mm(x, s.w).to(torch.float32) * s.scale, w=w, scale=scale)
        call, _ = ours(net, (x,), 1e-5)
        unsigned, zero = (x.to(torch.int16) + 128).to(torch.uint8), torch.zeros(n, dtype=torch.int32)
        packed = torch.ops.onednn.qlinear_prepack(w.t().contiguous(), [m, k])

        def theirs(unsigned: Any = unsigned, packed: Any = packed, scale: Any = scale, zero: Any = zero) -> Any:
            return torch.ops.onednn.qlinear_pointwise(
                unsigned, 1.0, 128, packed, scale, zero, None, 1.0, 0, torch.float32, "none", [], ""
            )

        plain, args = linear_case(m, n, k, torch.float32, False)
        floats, _ = ours(plain, args, 1e-5)
        timings = rates({"ours": call, "onednn": theirs, "float32": floats}, seconds)
        lines.append(row(f"{m} x {n} x {k}", 2.0 * m * n * k, timings, "onednn"))
        print(lines[-1], flush=True)
    return lines


def bf16(seconds: float) -> list[str]:
    """bfloat16 linear with bias, against oneDNN's and our own float32."""
    lines = ["| bfloat16 layer, GFLOP/s | ours | oneDNN prepacked | our float32 | our float32 / ours |",
             "|---|---|---|---|---|"]  # fmt: skip
    for m, n, k in ((197, 1536, 384), (197, 3072, 768), (1576, 1536, 384), (1024, 768, 3072), (1024, 3072, 768)):
        net, args = linear_case(m, n, k, torch.bfloat16, False)
        call, _ = ours(net, args, 2e-2)
        plain, floats = linear_case(m, n, k, torch.float32, False)
        other, _ = ours(plain, floats, 1e-5)
        timings = rates({"ours": call, "onednn": onednn(net, args[0]), "float32": other}, seconds)
        lines.append(row(f"{m} x {n} x {k}", 2.0 * m * n * k, timings, "float32"))
        print(lines[-1], flush=True)
    return lines


def attention(seconds: float) -> list[str]:
    """Attention of 8 heads of 64 features, against torch's."""
    lines = ["| tokens | ours | torch | torch / ours |", "|---|---|---|---|"]
    for tokens in (197, 256, 512, 1024, 2048):
        q, k, v = torch.randn(1, tokens, 3, 8, 64).permute(2, 0, 3, 1, 4).unbind(0)
        net = Net(lambda s, q, k, v: F.scaled_dot_product_attention(q, k, v))
        call, _ = ours(net, (q, k, v), 1e-5)
        timings = rates({"ours": call, "torch": lambda: net(q, k, v)}, seconds)  # noqa: B023
        lines.append(row(str(tokens), 4.0 * 8 * tokens * tokens * 64, timings, "torch"))
        print(lines[-1], flush=True)
    return lines


def weights(seconds: float) -> list[str]:
    """float32 times weights of eight and four bits (groups of 64), against our own float32; for decoding above all."""
    lines = ["| rows x 4096 x 4096, GFLOP/s | ours, 4 bits | our float32 | 8 bits | our float32 / 4 bits |",
             "|---|---|---|---|---|"]  # fmt: skip
    n = k = 4096
    small, scale = torch.randint(-128, 128, (n, k), dtype=torch.int8), torch.rand(n)
    levels = {"w": pack_int4(torch.randint(0, 16, (n, k))), "a": torch.rand(n, k // 64), "b": torch.rand(n, k // 64)}
    op = linear_int4()
    for m in (1, 4, 128, 512):
        x = (torch.randn(m, k),)
        four, _ = ours(Net(lambda s, x: op(x, s.w, s.a, s.b), **levels), x, 1e-5)
        eight, _ = ours(Net(lambda s, x: torch._weight_int8pack_mm(x, s.w, s.scale), w=small, scale=scale), x, 1e-4)
        plain, _ = ours(Net(lambda s, x: F.linear(x, s.w), w=torch.randn(n, k)), x, 1e-5)
        timings = rates({"ours": four, "float32": plain, "eight": eight}, seconds)
        lines.append(row(str(m), 2.0 * m * n * k, timings, "float32"))
        print(lines[-1], flush=True)
    return lines


def windows(seconds: float) -> list[str]:
    """Attention where each token sees the 256 before it by a constant mask, against torch's with the same mask."""
    lines = ["| tokens, window of 256 | ours | our dense | torch | torch / ours |", "|---|---|---|---|---|"]
    for tokens in (512, 1024, 2048):
        q, k, v = torch.randn(1, tokens, 3, 8, 64).permute(2, 0, 3, 1, 4).unbind(0)
        distance = torch.arange(tokens)[:, None] - torch.arange(tokens)
        net = Net(lambda s, q, k, v: F.scaled_dot_product_attention(q, k, v, s.mask),
                  mask=(distance >= 0) & (distance < 256))  # fmt: skip
        call, _ = ours(net, (q, k, v), 1e-5)
        dense, _ = ours(Net(lambda s, q, k, v: F.scaled_dot_product_attention(q, k, v)), (q, k, v), 1e-5)
        timings = rates({"ours": call, "dense": dense, "torch": lambda: net(q, k, v)}, seconds)  # noqa: B023
        lines.append(row(str(tokens), 4.0 * 8 * tokens * tokens * 64, timings, "torch"))
        print(lines[-1], flush=True)
    return lines


def tokens(seconds: float) -> list[str]:
    """Merging 13 of 197 tokens (matching, choice and means as one kernel) against the operator's meaning in torch."""
    lines = ["| images, features, compared | ours, us | torch, us | torch / ours |", "|---|---|---|---|"]
    for batch, features, compared in ((1, 384, 64), (8, 384, 64), (8, 384, 384)):
        net = Net(lambda _, x, size, metric: merge_tokens()(x, size, metric, 13, [0])[0])
        args = torch.randn(batch, 197, features), torch.ones(batch, 197), torch.randn(batch, 197, compared)
        call, _ = ours(net, args, 1e-5)
        timings = rates({"ours": call, "torch": lambda: net(*args)}, seconds)  # noqa: B023
        ratio = Comparison.of(timings["ours"], timings["torch"])
        cells = [f"{timings[k].median * 1e6:.0f}" for k in ("ours", "torch")]
        lines.append(f"| {batch}, {features}, {compared} | {' | '.join(cells)} "
                     f"| {ratio.ratio:.2f} ({ratio.low:.2f} to {ratio.high:.2f}) |")  # fmt: skip
        print(lines[-1], flush=True)
    return lines


SECTIONS: dict[str, Callable[[float], list[str]]] = {
    "peak": peak, "grid": grid, "gelu": lambda seconds: grid(seconds, tail=True), "int8": int8, "bf16": bf16,
    "attention": attention, "windows": windows, "weights": weights, "tokens": tokens,
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=list(SECTIONS), choices=list(SECTIONS), metavar="SECTION")
    parser.add_argument("--seconds", type=float, default=0.7, help="sampling per row")
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args(arguments)
    machine = f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"
    print(f"{machine}, {datetime.datetime.now(datetime.UTC).date()}\n")
    text = []
    for name in options.only:
        print(f"\n{name}: {SECTIONS[name].__doc__ or ''}", flush=True)
        text.append("\n".join(SECTIONS[name](options.seconds)))
    if options.markdown:
        options.markdown.write_text("\n\n".join(text) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
