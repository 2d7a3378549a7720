"""Single kernels on a GPU against torch's own: the sections of ``gpu.py --kernels``.

Every section lists cases; a case is run by itself and gives one row of a table. Rates count each operand and result
once, and the operations of the formula, whatever a kernel really does.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import gpu_tree  # noqa: F401
import torch
from gpu_check import paged, turned
from gpu_clock import best_of, ratio_text, time_kernels, time_models
from gpu_models import MODES, tiny
from gpu_ours import Net, Ours, Tensors, fastest
from tokens import classifier
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import torchlathe
from torchlathe.passes import MergeTokens
from torchlathe.targets.measure import Comparison, Timing

Row = dict[str, Any]
TRIED = 8  # schedules of ours that compete
DRY = 2  # cases of a section in a dry run
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION,
            "efficient": SDPBackend.EFFICIENT_ATTENTION, "math": SDPBackend.MATH}  # fmt: skip
Rival = Callable[[], Callable[[], Any]]
Operator = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class Bench:
    """Where and how long rows are measured.

    Attributes:
        device: ``cuda``, or ``cpu`` for a dry run at toy sizes.
        ceilings: measured rates of a copy and of a product.
        peers: modes of torch.compile that compete where any do.
        tune: seconds of trying kernels for a whole model.
        seconds: of sampling per row.
    """

    device: str
    ceilings: Mapping[str, float]
    peers: Sequence[str] = ("compile", "max-autotune")
    tune: float = 40.0
    seconds: float = 0.8

    @property
    def tried(self) -> int:
        """Schedules of ours that compete."""
        return TRIED if self.device == "cuda" else 2

    def size(self, n: int, toy: int) -> int:
        """A size, or in a dry run a toy one."""
        return n if self.device == "cuda" else min(n, toy)

    def randn(self, *shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
        """Random numbers on the device."""
        return torch.randn(shape, device=self.device, dtype=dtype)


Case = tuple[str, Callable[[], Row]]
Section = Callable[[Bench], list[Case]]


def compiled(net: torch.nn.Module, args: Tensors, mode: str = "default") -> Callable[[], Any]:
    """torch.compile's code for a function."""
    torch._dynamo.reset()  # all functions here share one code object, and it is compiled a few times at most
    made = torch.compile(net, mode=mode, dynamic=False)
    made(*args)
    made(*args)
    return lambda: made(*args)


def timed(
    bench: Bench, ours: Ours, rivals: Mapping[str, Callable[[], Callable[[], Any]]]
) -> tuple[Any, dict[str, str]]:
    """Timings of ours and of the rivals that can be made, and why the others cannot."""
    calls: dict[str, Callable[[], Any]] = {"ours": ours}
    failed = {}
    with torch.no_grad():
        for name, make in rivals.items():
            try:
                call = make()
                call()
                calls[name] = call
            except Exception as error:  # a rival that cannot run a case is left out of it, by name
                failed[name] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"
        return time_kernels(calls, bench.device, bench.seconds), failed


def row(cells: Mapping[str, str], timings: Mapping[str, Timing], ours: Ours, failed: Mapping[str, str]) -> Row:
    """What is written down of a case."""
    end = {"best peer / ours": ratio_text(best_of(timings))} if len(timings) > 1 else {}
    return {"cells": {**cells, **end}, "seconds": {n: asdict(t) for n, t in timings.items()},
            "schedules": ours.schedules, "failed": dict(failed)}  # fmt: skip


def micros(timings: Mapping[str, Timing], names: tuple[str, ...]) -> dict[str, str]:
    """Cells with the median microseconds of each contender."""
    return {f"{n}, us": f"{timings[n].median * 1e6:.1f}" if n in timings else "-" for n in names}


OPERATORS: dict[str, Operator] = {
    "layer_norm": lambda n, x, y: F.layer_norm(x, (x.shape[-1],), n.w, n.b),
    "add + layer_norm": lambda n, x, y: F.layer_norm(x + y, (x.shape[-1],), n.w, n.b),
    "rms_norm": lambda n, x, y: F.rms_norm(x, (x.shape[-1],), n.w),
    "softmax": lambda n, x, y: torch.softmax(x, -1),
    "gelu": lambda n, x, y: F.gelu(x),
    "silu(x) * y": lambda n, x, y: F.silu(x) * y,
    "x + y": lambda n, x, y: x + y,
}
BINARY = ("add + layer_norm", "silu(x) * y", "x + y")
ROWS = ((65536, 1024), (16384, 4096), (12608, 768), (1576, 768))


def row_kernels(bench: Bench) -> list[Case]:
    """Norms, softmax and pointwise operators in bfloat16: bytes per second, as a share of the measured copy's."""

    def case(name: str, rows: int, columns: int) -> Row:
        rows, columns = bench.size(rows, 8), bench.size(columns, 64)
        x, y = (bench.randn(rows, columns, dtype=torch.bfloat16) for _ in range(2))
        w, b = (bench.randn(columns, dtype=torch.bfloat16) for _ in range(2))
        net = Net(OPERATORS[name], w=w, b=b)
        ours = fastest(net, (x, y), bench.device, bench.tried)
        moved = (3 if name in BINARY else 2) * x.nbytes
        source, sink = (torch.empty(moved // 2, dtype=torch.uint8, device=bench.device) for _ in range(2))
        timings, failed = timed(bench, ours, {
            "eager": lambda: lambda: net(x, y), "compile": lambda: compiled(net, (x, y)),
            "copy": lambda: lambda: sink.copy_(source),
        })  # fmt: skip
        copy = timings.pop("copy")
        rate = moved / timings["ours"].median
        cells = {"operator": name, "shape": f"{rows} x {columns}", **micros(timings, ("ours", "eager", "compile")),
                 "ours, GB/s": f"{rate / 1e9:.0f}", "of a large copy": f"{rate / bench.ceilings['copy']:.2f}",
                 "of a copy of as many bytes": f"{copy.median / timings['ours'].median:.2f}"}  # fmt: skip
        return row(cells, timings, ours, failed)

    return [(f"{name} {r} x {c}", lambda n=name, r=r, c=c: case(n, r, c)) for r, c in ROWS for name in OPERATORS]


def sdpa(args: Tensors, **options: Any) -> dict[str, Rival]:
    """Every backend of torch's attention."""

    def rival(backend: SDPBackend) -> Callable[[], Any]:
        def call() -> torch.Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(*args, **options)

        return call

    return {name: (lambda b=backend: rival(b)) for name, backend in BACKENDS.items()}


# batch, heads, features, tokens, causal; the more telling first
ATTENTION = (
    (8, 12, 64, 197, False), (8, 12, 64, 256, True), (4, 16, 64, 1024, False), (4, 16, 64, 1024, True),
    (1, 16, 128, 4096, False), (1, 16, 128, 4096, True), (2, 16, 64, 2048, False), (2, 16, 64, 2048, True),
    (2, 8, 128, 2048, False), (1, 16, 128, 8192, True), (1, 16, 64, 8192, False), (8, 12, 64, 512, False),
    (64, 12, 64, 197, False), (1, 12, 64, 197, False), (4, 16, 128, 1024, True), (1, 8, 64, 8192, True),
)  # fmt: skip


def attention(bench: Bench) -> list[Case]:
    """Dense and causal attention in float16 against every backend of torch's operator."""

    def case(batch: int, heads: int, features: int, tokens: int, causal: bool) -> Row:
        batch, heads = bench.size(batch, 1), bench.size(heads, 2)
        features, tokens = bench.size(features, 16), bench.size(tokens, 40)
        args = tuple(bench.randn(batch, heads, tokens, features) for _ in range(3))
        net = Net(lambda _, q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=causal))
        ours = fastest(net, args, bench.device, bench.tried)
        timings, failed = timed(bench, ours, sdpa(args, is_causal=causal))
        work = 4 * batch * heads * tokens**2 * features / (2 if causal else 1)
        rates = {f"{n}, TFLOP/s": f"{work / timings[n].median / 1e12:.1f}" if n in timings else "-"
                 for n in ("ours", *BACKENDS)}  # fmt: skip
        cells = {"batch, heads, features": f"{batch}, {heads}, {features}", "tokens": str(tokens),
                 "causal": "yes" if causal else "no", "ours, us": f"{timings['ours'].median * 1e6:.1f}", **rates,
                 "of the product's rate": f"{work / timings['ours'].median / bench.ceilings['product']:.2f}",
        }  # fmt: skip
        return row(cells, timings, ours, failed)

    return [(f"attention {c}", lambda c=c: case(*c)) for c in ATTENTION]


def sparse(bench: Bench) -> list[Case]:
    """Attention under a constant mask, where each token sees a window of those before it; the dense one is ours too."""

    def case(tokens: int, features: int, window: int) -> Row:
        heads, real = bench.size(16, 1), window
        tokens, features, window = bench.size(tokens, 64), bench.size(features, 16), bench.size(window, 16)
        args = tuple(bench.randn(1, heads, tokens, features) for _ in range(3))
        distance = torch.arange(tokens, device=bench.device)[:, None] - torch.arange(tokens, device=bench.device)
        mask = (distance >= 0) & (distance < window)
        net = Net(lambda n, q, k, v: F.scaled_dot_product_attention(q, k, v, n.mask), mask=mask)
        ours = fastest(net, args, bench.device, bench.tried)
        rivals = sdpa(args, attn_mask=mask)
        rivals = {n: rivals[n] for n in (("efficient", "math") if real == 1024 else ("efficient",))}
        whole = fastest(
            Net(lambda _, q, k, v: F.scaled_dot_product_attention(q, k, v)), args, bench.device, bench.tried
        )
        timings, failed = timed(bench, ours, {"our dense": lambda: whole, **rivals})
        everything = timings.pop("our dense")
        share, density = Comparison.of(everything, timings["ours"]), mask.double().mean().item()
        cells = {"tokens, features": f"{tokens}, {features}", "window": str(window), "density": f"{density:.3f}",
                 **micros(timings, ("ours",)), "our dense, us": f"{everything.median * 1e6:.1f}",
                 "time / dense": f"{share.ratio:.3f} ({share.low:.3f} to {share.high:.3f})",
                 "time share / density": f"{share.ratio / density:.2f}", **micros(timings, ("efficient",))}  # fmt: skip
        return row(cells, timings, ours, failed)

    grid = [(t, f, w) for t, f in ((8192, 64), (4096, 128)) for w in (512, 1024, 2048, 256, 4096)]
    return [(f"window {c}", lambda c=c: case(*c)) for c in grid]


def decode(bench: Bench) -> list[Case]:
    """One new token, 32 query heads on 8 key heads of 128 features, float16: bytes of keys and values per second."""

    def case(batch: int, keys: int) -> Row:
        batch, keys, features = bench.size(batch, 1), bench.size(keys, 300), bench.size(128, 16)
        heads, groups = bench.size(32, 4), bench.size(8, 2)
        q = bench.randn(batch, heads, 1, features)
        k, v = (bench.randn(batch, groups, keys, features) for _ in range(2))
        net = Net(lambda _, q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True))
        ours = fastest(net, (q, k, v), bench.device, bench.tried)
        timings, failed = timed(bench, ours, sdpa((q, k, v), enable_gqa=True))
        rate = 2 * k.nbytes / timings["ours"].median
        cells = {"batch": str(batch), "keys": str(keys), **micros(timings, ("ours", *BACKENDS))}
        cells |= {"ours, GB/s": f"{rate / 1e9:.0f}", "of a large copy": f"{rate / bench.ceilings['copy']:.2f}"}
        return row(cells, timings, ours, failed)

    grid = [(1, 4096), (1, 32768), (8, 4096), (1, 1024), (8, 32768), (1, 16384), (8, 1024)]
    return [(f"decode {c}", lambda c=c: case(*c)) for c in grid]


# rows, outputs, inputs, what follows
LINEAR = (
    (1576, 3072, 768, "gelu"), (1576, 768, 3072, "residual"), (2048, 3072, 768, "gelu"), (1024, 768, 3072, "residual"),
    (1576, 2304, 768, "bias"), (197, 3072, 768, "gelu"), (197, 768, 3072, "residual"), (12608, 3072, 768, "gelu"),
    (12608, 768, 3072, "residual"), (1576, 768, 768, "residual"), (1576, 1536, 384, "gelu"), (256, 3072, 768, "gelu"),
    (8, 3072, 768, "gelu"), (1, 4096, 4096, "residual"),
)  # fmt: skip
TAILS: dict[str, Operator] = {
    "gelu": lambda n, x, y: F.gelu(F.linear(x, n.w, n.b)),
    "residual": lambda n, x, y: F.linear(x, n.w, n.b) + y,
    "bias": lambda n, x, y: F.linear(x, n.w, n.b),
}


def linear(bench: Bench) -> list[Case]:
    """Linear layers of the models in float16, with what follows them."""

    def case(m: int, n: int, k: int, tail: str) -> Row:
        m, n, k = bench.size(m, 24), bench.size(n, 32), bench.size(k, 48)
        w, b = bench.randn(n, k) / math.sqrt(k), bench.randn(n)
        net, args = Net(TAILS[tail], w=w, b=b), (bench.randn(m, k), bench.randn(m, n))
        start = time.perf_counter()
        ours = fastest(net, args, bench.device, 2 * bench.tried)
        took = time.perf_counter() - start
        timings, failed = timed(bench, ours, {
            "eager": lambda: lambda: net(*args),
            "max-autotune": lambda: compiled(net, args, "max-autotune-no-cudagraphs"),
            "cuBLAS alone": lambda: lambda: F.linear(args[0], w, b),
        })  # fmt: skip
        product, work = timings.pop("cuBLAS alone"), 2 * m * n * k
        rates = {f"{c}, TFLOP/s": f"{work / timings[c].median / 1e12:.1f}" if c in timings else "-"
                 for c in ("ours", "eager", "max-autotune")}  # fmt: skip
        cells = {"rows, outputs, inputs": f"{m}, {n}, {k}", "after it": tail, **micros(timings, ("ours",)), **rates,
                 "of the product's rate": f"{work / timings['ours'].median / bench.ceilings['product']:.2f}",
                 "cuBLAS without it / ours": f"{product.median / timings['ours'].median:.2f}"}  # fmt: skip
        return row(cells, timings, ours, failed) | {"took": took}

    return [(f"linear {c}", lambda c=c: case(*c)) for c in LINEAR]


def projections(n: Any, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Queries, keys and values of grouped attention by one product, the first two turned."""
    parts = F.linear(x, n.w).split([h * n.features for h in (n.heads, n.groups, n.groups)], -1)
    q, k, v = (p.view(*x.shape[:2], -1, n.features).transpose(1, 2) for p in parts)
    return turned(q, n.cos, n.sin), turned(k, n.cos, n.sin), v


def experts(_: Any, x: torch.Tensor, w: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Rows in groups, a gated layer for each."""
    gate, up = torch._grouped_mm(x, w, offs=ends).chunk(2, -1)
    return F.silu(gate) * up


def fused(bench: Bench) -> list[Case]:
    """What one kernel of ours does and torch does in several: gates, turned heads, rows in groups, keys in pages."""

    def case(what: str, size: str, net: torch.nn.Module, args: Tensors) -> Row:
        ours = fastest(net, args, bench.device, 2 * bench.tried)
        rivals: dict[str, Rival] = {"eager": lambda: lambda: net(*args)}
        for peer in ("compile", "max-autotune"):
            if peer in bench.peers:
                rivals[peer] = lambda mode=MODES[peer]: compiled(net, args, mode)
        timings, failed = timed(bench, ours, rivals)
        return row({"what": what, "size": size, **micros(timings, ("ours", *list(timings)[1:]))}, timings, ours, failed)

    def gate(m: int, n: int, k: int) -> Row:
        m, n, k = bench.size(m, 24), bench.size(n, 32), bench.size(k, 48)
        net = Net(lambda n, x: F.silu(F.linear(x, n.gate)) * F.linear(x, n.up),
                  gate=bench.randn(n, k) / math.sqrt(k), up=bench.randn(n, k) / math.sqrt(k))  # fmt: skip
        return case("gate", f"{m} x {n} x {k}", net, (bench.randn(m, k),))

    def heads(batch: int, tokens: int, heads: int, groups: int, features: int) -> Row:
        batch, tokens, features = bench.size(batch, 2), bench.size(tokens, 20), bench.size(features, 16)
        heads, groups = bench.size(heads, 4), bench.size(groups, 2)
        width = heads * features
        net = Net(projections, w=bench.randn(width + 2 * groups * features, width) / math.sqrt(width),
                  cos=bench.randn(1, 1, tokens, features), sin=bench.randn(1, 1, tokens, features))  # fmt: skip
        net.heads, net.groups, net.features = heads, groups, features  # type: ignore[assignment]
        size = f"{batch} x {tokens} tokens, {heads} / {groups} heads of {features}"
        return case("projections, turned", size, net, (bench.randn(batch, tokens, width),))

    def grouped(m: int, n: int, k: int, count: int) -> Row:
        m, n, k = bench.size(m, 24), bench.size(n, 32), bench.size(k, 32)
        x, w = bench.randn(m, k, dtype=torch.bfloat16), bench.randn(count, k, 2 * n, dtype=torch.bfloat16)
        ends = torch.multinomial(torch.ones(count, device=bench.device), m, True).bincount(minlength=count).cumsum(0)
        return case(f"{count} groups", f"{m} x {n} x {k}", Net(experts), (x, w / math.sqrt(k), ends.int()))

    def pages(batch: int, queries: int, keys: int) -> Row:
        batch, keys, features = bench.size(batch, 2), bench.size(keys, 64), bench.size(128, 16)
        heads, groups = bench.size(32, 4), bench.size(8, 2)
        pools = [bench.randn(batch * keys // 16, 16, groups, features) for _ in range(2)]
        table = torch.randperm(len(pools[0]), device=bench.device).view(batch, -1)
        net = Net(lambda _, *args: paged(*args))
        args = (bench.randn(batch, heads, queries, features), *pools, table)
        return case("pages of 16 keys", f"{batch} x {queries} queries, {keys} keys", net, args)

    grid: list[tuple[Callable[..., Row], tuple[int, ...]]] = [
        (gate, (2048, 2048, 768)), (heads, (8, 256, 12, 4, 64)), (grouped, (4096, 1024, 2048, 8)),
        (pages, (8, 1, 4096)), (gate, (4096, 11008, 4096)), (heads, (4, 1024, 32, 8, 128)),
        (grouped, (8192, 3584, 4096, 8)), (pages, (8, 64, 4096)),
    ]  # fmt: skip
    return [(f"{make.__name__} {size}", lambda m=make, size=size: m(*size)) for make, size in grid]


def merging(bench: Bench) -> list[Case]:
    """ViT-B of 64 images with 13 tokens merged away in each block, against our own exact executable, in float16."""

    def case() -> Row:
        small = bench.device == "cpu"
        model, args = tiny("vit", 2) if small else classifier("vit-b", 64)
        dtype = torch.float32 if small else torch.float16
        model, args = model.to(bench.device, dtype).eval(), tuple(a.to(bench.device, dtype) for a in args)
        options: dict[str, Any] = {"level": "fast"} if small else {"budget": bench.tune}
        made = {}
        for name, passes in (("ours", ["default", MergeTokens(r=1 if small else 13)]), ("exact", None)):
            made[name] = torchlathe.optimize(model, args, target=bench.device, passes=passes, **options)
        step = next(s for s in made["ours"].report.steps if s.name == "merge-tokens")
        calls = {n: (lambda m=m: m(*args)) for n, m in made.items()} | {"eager": lambda: model(*args)}
        with torch.no_grad():
            timings = time_models(calls, bench.device, 2 * bench.seconds)
        seen = Comparison.of(timings["ours"], timings["exact"])
        cells = {"model": "ViT-B, 64 images", "merging": step.outcome, **micros(timings, ("ours", "exact", "eager")),
                 "exact / merged": f"{seen.ratio:.2f} ({seen.low:.2f} to {seen.high:.2f})"}  # fmt: skip
        return row(cells, timings, Ours(schedules=[step.outcome]), {})

    return [("merge 13 tokens", case)]


SECTIONS: dict[str, Section] = {
    "rows": row_kernels, "attention": attention, "linear": linear, "sparse": sparse, "decode": decode,
    "merging": merging, "fused": fused,
}  # fmt: skip


def cases(request: Mapping[str, Any]) -> list[Case]:
    """The cases of one section, as a child process is asked for them."""
    bench = Bench(request["device"], request["ceilings"], request["peers"], request["tune"])
    if bench.device == "cuda":
        return SECTIONS[request["section"]](bench)
    return SECTIONS[request["section"]](replace(bench, seconds=0.0))[:DRY]
