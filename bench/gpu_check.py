"""Every template of the Triton backend against eager on the device: the cases of ``gpu.py --check``.

A case is a function of tensors. It is captured and partitioned; each region's first schedules run on real values, into
buffers that were filled with NaN, and must give eager's answers. Eager attention is torch's formula in single steps:
its fused kernels stop at odd addresses, and each has its own answer for a row that sees nothing. A region that no
template takes is named with the reason and is no fault.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import gpu_tree  # noqa: F401
import torch
from gpu_ours import Net, Tensors, here, operands, parts
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from torchlathe.codegen.partition import partition
from torchlathe.codegen.triton.backend import TritonBackend
from torchlathe.passes import ops
from torchlathe.passes.capture import capture

HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32
DTYPES = {"f16": HALF, "bf16": BRAIN, "f32": SINGLE}
MOST = 2  # schedules of a case
Row = dict[str, Any]
Make = Callable[[], Row]


@dataclass(frozen=True)
class Grid:
    """Collects cases; sizes are cut down in a dry run."""

    device: str
    most: int
    cases: list[tuple[str, Make]]

    @property
    def toy(self) -> bool:
        """Whether the kernels are interpreted."""
        return self.device == "cpu"

    def size(self, n: int, toy: int) -> int:
        """A size, or a toy one."""
        return min(n, toy) if self.toy else n

    def randn(self, *shape: int, dtype: torch.dtype = SINGLE) -> torch.Tensor:
        """Random numbers on the device."""
        return torch.randn(shape, device=self.device, dtype=dtype)

    def add(self, name: str, function: Callable[..., Any], make: Callable[[], Tensors], *, dynamic: Any = None,
            run: Callable[[], Tensors] | None = None, must: bool = True) -> None:  # fmt: skip
        """A function (or module) of what `make` gives; run on what `run` gives, if that has other sizes.

        Args:
            must: whether it is a fault if no region has a template.
        """
        nested = dynamic if dynamic is None or isinstance(function, nn.Module) else (tuple(dynamic),)

        def case() -> Row:
            torch.manual_seed(0)
            net = function.to(self.device) if isinstance(function, nn.Module) else Net(lambda _, *a: function(*a))
            with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
                args, other = make(), run() if run else None
                found = [verdict(p) for p in parts(net, args, here(self.device), self.most, nested, other)]
            if must and all(text.startswith("eager") for _, text in found):
                found.append((False, "no template takes it"))
            return merged(name, found)

        self.cases.append((name, case))

    def random(self, name: str, function: Callable[..., Any], dtype: torch.dtype, *shapes: Sequence[int],
               must: bool = True) -> None:  # fmt: skip
        """A function of random tensors."""
        self.add(name, function, lambda: tuple(self.randn(*s, dtype=dtype) for s in shapes), must=must)


def verdict(part: Any) -> tuple[bool, str]:
    """Whether a region is right, and what to say of it."""
    if part.reason is not None:
        names = " ".join(str(n.target).removeprefix("aten.") for n in part.region.nodes)
        return True, f"eager: {names}: {part.reason}"
    bad = [c for c in part.candidates if not c.right]
    worst = max((c.deviation for c in part.candidates), default=0.0)
    if bad:
        return False, "; ".join(f"[{c.schedule}] {c.reason or f'deviates {c.deviation:.3g} times the tolerance'}"
                                for c in bad)  # fmt: skip
    return True, f"{len(part.candidates)} schedules of {part.candidates[0].kernel.name}, deviation {worst:.2g}"


def merged(name: str, found: list[tuple[bool, str]]) -> Row:
    """One row of the output."""
    fine = all(ok for ok, _ in found)
    return {"fine": fine, "cells": {"verdict": "OK" if fine else "WRONG", "case": name,
                                    "found": "; ".join(t for _, t in found)}}  # fmt: skip


def rows(g: Grid) -> None:
    """Pointwise operators, reductions over rows, and what moves elements."""
    wide, odd, long = g.size(4096, 70), g.size(1000, 37), g.size(70001, 20001)
    for name, d in DTYPES.items():
        g.random(f"pointwise {name}", lambda x, y: F.gelu(x) * 2 + y.tanh() * F.silu(x), d, (13, odd), (13, odd))
        g.random(f"softmax {name}", lambda x: F.softmax(x * 3, -1), d, (7, 5, odd))
        g.random(f"layer_norm {name}", nn.LayerNorm(wide).to(d), d, (33, wide))
        g.random(f"residual, layer_norm {name}", lambda x, y: F.layer_norm(x + y, (odd,)), d, (9, odd), (9, odd))
        g.random(f"rms_norm {name}", nn.RMSNorm(wide).to(d), d, (33, wide))
        g.random(f"row longer than a tile {name}", lambda x: F.softmax(x, -1), d, (3, long))
    g.random("broadcast", lambda x, y, z: x * y + z, SINGLE, (6, 1, odd), (4, 1), (odd,))
    g.add("NaN, Inf", lambda x: (x.amax(-1), x.amin(-1), torch.relu(x), x.clamp(-1, 1)), lambda: (strange(g),))
    g.add("softmax of rows of -Inf", lambda x: F.softmax(x, -1), lambda: (strange(g)[3:],))
    g.random("group_norm", nn.GroupNorm(4, 16), SINGLE, (2, 16, 9, 7), must=False)
    g.random("cat of rows", lambda a, b: torch.cat([a, b], 1) * 2, SINGLE, (3, 4, odd), (3, 1, odd))
    g.random("cat of columns", lambda a, b: torch.cat([a, b], -1) * 2, SINGLE, (3, 4, 8), (3, 4, 5))

    def numbers(*shape: int) -> torch.Tensor:
        return torch.randint(0, 50, shape, device=g.device)

    g.add("embedding", lambda i, w: F.embedding(i, w) + 1, lambda: (numbers(3, 7), g.randn(50, odd)))
    g.add("integers", lambda x, i: torch.where(x > 0, i, i + 1), lambda: (g.randn(9, odd), numbers(9, odd)))


def strange(g: Grid) -> torch.Tensor:
    """Rows with NaN, Inf and both zeros."""
    x = g.randn(8, 40)
    x[1, 3], x[2, 5], x[3, 7], x[4], x[5] = math.nan, math.inf, -math.inf, 0.0, -math.inf
    x[4, ::2] = -0.0
    return x


def layouts(g: Grid) -> None:
    """Strides, offsets and sizes that kernels could take for granted."""
    n = g.size(512, 36)
    g.add("transposed input", lambda x: F.gelu(x) + 1, lambda: (g.randn(n, 70).t(),), must=False)
    g.add("every second column", lambda x: F.softmax(x, -1), lambda: (g.randn(9, 2 * n)[:, ::2],))
    g.add("expanded input", lambda x, y: x + y, lambda: (g.randn(1, n).expand(9, n), g.randn(9, n)))

    def shifted(d: torch.dtype, *shape: int) -> torch.Tensor:
        return g.randn(math.prod(shape) + 1, dtype=d)[1:].view(shape)

    for name, d in DTYPES.items():
        g.add(f"misaligned pointwise {name}", lambda x: x * 2 + 1, lambda d=d: (shifted(d, 9, n),))
        g.add(f"misaligned product {name}", torch.matmul, lambda d=d: (shifted(d, 48, n), shifted(d, n, 64)))
    sdpa = F.scaled_dot_product_attention
    g.add("misaligned attention", sdpa, lambda: tuple(shifted(HALF, 2, 2, n, 32) for _ in range(3)))
    g.random("no elements", lambda x: F.gelu(x) + 1, SINGLE, (0, n), must=False)
    g.random("product without rows", F.linear, SINGLE, (0, n), (8, n), must=False)
    many = torch.export.Dim("many", min=2, max=4096)
    net = nn.Sequential(nn.Linear(48, 40), nn.GELU(), nn.LayerNorm(40))
    for count in (0, 1, 7, g.size(1000, 50)):
        g.add(f"symbolic rows, {count}", net, lambda: (g.randn(9, 48),), dynamic=({0: many},),
              run=lambda c=count: (g.randn(c, 48),), must=False)  # fmt: skip
    g.cases.append(("look-up outside the table", lambda: outside(g)))


def outside(g: Grid) -> Row:
    """Eager stops the device on an index outside the table; a kernel must give NaN there and read nothing."""
    index, table = torch.tensor([[0, 3, 49]], device=g.device), g.randn(50, 24)
    program = capture(Net(lambda _, i, w: F.embedding(i, w) + 1), (index, table))
    backend, target = TritonBackend(program), here(g.device)
    (region,) = partition(program, [backend], target)
    index = torch.tensor([[0, 10**9, -1]], device=g.device)
    env = dict(zip(program.inputs, (index, table), strict=True))
    found = []
    for schedule in list(backend.space(region, target))[: g.most]:
        given, (out,) = operands(kernel := backend.lower(region, target, schedule), [env[n] for n in region.inputs])
        kernel.call(*given)
        right = bool(torch.equal(out[0, 0], table[0] + 1) and out[0, 1:].isnan().all())
        found.append((right, f"[{schedule}] {'NaN' if right else f'gives {out[0, 1:, 0].tolist()}'}"))
    return merged("look-up outside the table", found)


def products(g: Grid) -> None:
    """Matrix products with what follows them."""
    m, n, k, deep = g.size(1576, 40), g.size(768, 48), g.size(768, 64), g.size(4096, 512)
    for name, d in DTYPES.items():
        linear = nn.Linear(k, n).to(d)
        g.random(f"linear, gelu {name}", nn.Sequential(linear, nn.GELU()), d, (m, k))
        g.random(f"linear, residual {name}", lambda x, y, w, b: F.linear(x, w, b) + y, d,
                 (3, 7, k), (3, 7, n), (n, k), (n,))  # fmt: skip
        g.random(f"odd sizes {name}", nn.Sequential(nn.Linear(77, 51), nn.SiLU()).to(d), d, (33, 77))
        g.random(f"few rows, split depth {name}", nn.Sequential(nn.Linear(deep, 96), nn.ReLU()).to(d), d, (2, deep))
        g.random(f"one row {name}", linear, d, (1, k))
        g.random(f"bmm {name}", torch.matmul, d, (5, 40, 33), (5, 33, 20))
        g.random(f"one row of each {name}", torch.matmul, d, (5, 1, 33), (5, 33, 20))
        g.random(f"transposed operands {name}", lambda x, y: x.t() @ y.t(), d, (k, 40), (24, k))
    g.random("baddbmm", lambda a, x, y: torch.baddbmm(a, x, y, alpha=0.5, beta=2.0), SINGLE,
             (3, 20, 24), (3, 20, 32), (3, 32, 24), must=False)  # fmt: skip
    g.random("addmm", torch.addmm, SINGLE, (24,), (20, 32), (32, 24))
    for name, d in DTYPES.items():
        g.random(f"rotary embedding after a product {name}", rotary, d, (2, 50, 96), (512, 96), *[(1, 1, 50, 64)] * 2)
    ends = torch.tensor([5, 5, 40, 77], dtype=torch.int32, device=g.device)
    g.add("grouped product", lambda x, w, e: F.silu(torch._grouped_mm(x, w, offs=e)),
          lambda: (g.randn(77, 64, dtype=BRAIN), g.randn(4, 64, 48, dtype=BRAIN), ends))  # fmt: skip


def attentions(g: Grid) -> None:
    """Attention: masks, groups, sizes of heads, few queries."""
    n, long, keys = g.size(197, 37), g.size(1024, 70), g.size(5000, 300)

    def sdpa(**options: Any) -> Callable[..., torch.Tensor]:
        return lambda q, k, v, m=None: F.scaled_dot_product_attention(q, k, v, attn_mask=m, **options)

    def some(d: torch.dtype, *counts: int) -> list[torch.Tensor]:
        return [g.randn(2, 4, count, 64, dtype=d) for count in counts]

    for name, d in DTYPES.items():
        own = (2, 4, n, 64)
        g.random(f"attention {name}", sdpa(), d, own, own, own)
        g.random(f"causal {name}", sdpa(is_causal=True), d, *[(2, 4, long, 64)] * 3)
        g.random(f"additive mask {name}", sdpa(), d, own, own, own, (2, 1, 1, n))
        g.add(f"boolean mask {name}", sdpa(),
              lambda d=d: (*some(d, n, n, n), g.randn(2, 1, n, n) > -0.5))  # fmt: skip
        g.random(f"grouped heads {name}", sdpa(is_causal=True, enable_gqa=True), d, (2, 8, n, 64), *[(2, 2, n, 64)] * 2)
        g.random(f"one query {name}", sdpa(enable_gqa=True), d, (2, 8, 1, 64), *[(2, 2, keys, 64)] * 2)
    for features in (24, 80) if g.toy else (24, 80, 128, 256):
        g.random(f"heads of {features}", sdpa(), HALF, *[(2, 4, n, features)] * 3)
    g.random("more keys than queries", sdpa(), HALF, (2, 4, 33, 64), *[(2, 4, g.size(500, 90), 64)] * 2)
    g.random("heads inside tokens", lambda *qkv: F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in qkv)),
             HALF, *[(2, n, 4, 64)] * 3)  # fmt: skip
    g.add("rows that see nothing", sdpa(), lambda: (*some(HALF, n, n, n), (g.randn(n, 1) > 0).repeat(1, n)))
    numbers = torch.randperm(40, device=g.device).view(2, 20)
    for name, queries in (("attention", n), ("one query", 1)):
        g.add(f"{name} of pages", paged, lambda queries=queries: (
            g.randn(2, 4, queries, 64, dtype=HALF), *g.randn(2, 40, 8, 2, 64, dtype=HALF), numbers))  # fmt: skip
    distance = torch.arange(long)[:, None] - torch.arange(long)
    window = Net(lambda s, *qkv: F.scaled_dot_product_attention(*qkv, s.mask),
                 mask=(distance >= 0) & (distance < long // 4))  # fmt: skip
    g.random("constant window", window, HALF, *[(2, 4, long, 64)] * 3)
    many = torch.export.Dim("many", min=2, max=9000)
    g.add("one query, symbolic keys", lambda *qkv: F.scaled_dot_product_attention(*qkv),
          lambda: tuple(some(HALF, 1, 50, 50)), dynamic=(None, {2: many}, {2: many}),
          run=lambda: tuple(some(HALF, 1, 333, 333)))  # fmt: skip


def paged(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Attention over keys in pages [pages, keys of a page, heads, features]."""
    k, v = (pool[table].view(len(table), -1, *pool.shape[2:]).transpose(1, 2) for pool in (keys, values))
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def turned(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Heads [batch, heads, tokens, features] turned by their places."""
    low, high = heads.chunk(2, -1)
    return heads * cos + torch.cat((-high, low), -1) * sin


def rotary(x: torch.Tensor, w: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Attention of 4 heads of 64 features on 2, with queries and keys rotated after one product."""
    (batch, tokens, _), y, heads = x.shape, F.linear(x, w), []
    for start, count in ((0, 4), (256, 2)):
        head = y[..., start : start + 64 * count].view(batch, tokens, count, 64).transpose(1, 2)
        heads.append(turned(head, cos, sin))
    value = y[..., 384:].view(batch, tokens, 2, 64).transpose(1, 2)
    return F.scaled_dot_product_attention(*heads, value, is_causal=True, enable_gqa=True)


def others(g: Grid) -> None:
    """What may have no template: named, and no fault unless a kernel is wrong."""
    side = g.size(28, 9)
    for name, conv in (
        ("conv 3x3", nn.Conv2d(16, 24, 3, padding=1)), ("conv 1x1", nn.Conv2d(16, 24, 1)),
        ("depthwise conv", nn.Conv2d(16, 16, 3, padding=1, groups=16)), ("conv, stride 2", nn.Conv2d(16, 8, 3, 2, 1)),
        ("patches", nn.Conv2d(16, 32, 4, 4)), ("dilated conv", nn.Conv2d(16, 8, 3, dilation=2)),
    ):  # fmt: skip
        net = nn.Sequential(conv, nn.ReLU()).half()
        g.random(name, net, HALF, (2, 16, side, side), must=False)
        g.add(f"{name}, channels last", net, lambda: (g.randn(2, side, side, 16, dtype=HALF).permute(0, 3, 1, 2),),
              must=False)  # fmt: skip
    g.random("pooling", lambda x: F.max_pool2d(x, 3, 2, 1), HALF, (2, 16, side, side), must=False)
    merge, tokens = getattr(ops, "merge_tokens", None), g.size(197, 17)
    if merge is not None:
        g.add("merge tokens", lambda x, s, m: merge()(x, s, m, 3, [0])[0],
              lambda: (g.randn(2, tokens, 64), torch.ones(2, tokens, device=g.device), g.randn(2, tokens, 32)),
              must=False)  # fmt: skip


def large(g: Grid) -> None:
    """Offsets that do not fit 31 bits."""
    shape, m, k, n = (
        (g.size(2**21 + 524288, 40), g.size(1024, 40)),
        g.size(70000, 40),
        g.size(256, 32),
        g.size(32000, 48),
    )
    g.random("pointwise, more than 2^31 elements", lambda x: x * 2 + 1, BRAIN, shape)
    g.random("softmax, more than 2^31 elements", lambda x: F.softmax(x, -1), BRAIN, shape)
    g.random("product, more than 2^31 elements", F.linear, HALF, (m, k), (n, k))


def cases(request: Mapping[str, Any]) -> list[tuple[str, Make]]:
    """All cases, as a child process is asked for them."""
    grid = Grid(request["device"], request.get("schedules", MOST), [])
    for group in (rows, products, attentions, layouts, others, large):
        group(grid)
    return grid.cases
