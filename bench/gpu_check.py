"""Every template of the Triton backend against eager on the device: the cases of ``gpu.py --check``.

A case is a function of tensors. It is captured and partitioned; each region's first schedules run on real values, into
buffers that were filled with NaN, and must give eager's answers. A region that no template takes is named with the
reason and is no fault.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import gpu_tree  # noqa: F401
import torch
from gpu_ours import Net, Tensors, here, operands, parts
from torch import nn
from torch.nn import functional as F

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
            must: whether a region without a template is a fault.
        """

        def case() -> Row:
            torch.manual_seed(0)
            net = function.to(self.device) if isinstance(function, nn.Module) else Net(lambda _, *a: function(*a))
            with torch.no_grad():
                args, other = make(), run() if run else None
                found = [verdict(p, must) for p in parts(net, args, here(self.device), self.most, dynamic, other)]
            return merged(name, found)

        self.cases.append((name, case))


def verdict(part: Any, must: bool) -> tuple[bool, str]:
    """Whether a region is right, and what to say of it."""
    if part.reason is not None:
        names = " ".join(str(n.target).removeprefix("aten.") for n in part.region.nodes)
        return not must, f"eager: {names}: {part.reason}"
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
    wide, odd = g.size(4096, 70), g.size(1000, 37)
    for name, d in DTYPES.items():
        g.add(f"pointwise {name}", lambda x, y: F.gelu(x) * 2 + y.tanh() * F.silu(x),
              lambda d=d: (g.randn(13, odd, dtype=d), g.randn(13, odd, dtype=d)))  # fmt: skip
        g.add(f"softmax {name}", lambda x: F.softmax(x * 3, -1), lambda d=d: (g.randn(7, 5, odd, dtype=d),))
        g.add(f"layer_norm {name}", nn.LayerNorm(wide).to(d), lambda d=d: (g.randn(33, wide, dtype=d),))
        g.add(f"residual, layer_norm {name}", lambda x, y: F.layer_norm(x + y, (odd,)),
              lambda d=d: (g.randn(9, odd, dtype=d), g.randn(9, odd, dtype=d)))  # fmt: skip
        g.add(f"rms_norm {name}", nn.RMSNorm(wide).to(d), lambda d=d: (g.randn(33, wide, dtype=d),))
        g.add(f"row longer than a tile {name}", lambda x: F.softmax(x, -1),
              lambda d=d: (g.randn(3, g.size(70001, 20001), dtype=d),))  # fmt: skip
    g.add("broadcast", lambda x, y, z: x * y + z, lambda: (g.randn(6, 1, odd), g.randn(4, 1), g.randn(odd)))
    g.add("max, min, NaN, Inf", lambda x: (x.amax(-1), x.amin(-1), torch.relu(x), x.clamp(-1, 1)), lambda: (strange(g),))
    g.add("softmax of rows of -Inf", lambda x: F.softmax(x, -1),
          lambda: (torch.full((4, odd), -math.inf, device=g.device).index_fill_(0, torch.tensor([1], device=g.device), 0.5),))  # fmt: skip
    g.add("group_norm", nn.GroupNorm(4, 16), lambda: (g.randn(2, 16, 9, 7),), must=False)
    g.add("cat of rows", lambda a, b: torch.cat([a, b], 1) * 2, lambda: (g.randn(3, 4, odd), g.randn(3, 1, odd)))
    g.add("cat of columns", lambda a, b: torch.cat([a, b], -1) * 2, lambda: (g.randn(3, 4, 8), g.randn(3, 4, 5)))
    g.add("embedding", lambda i, w: F.embedding(i, w) + 1,
          lambda: (torch.randint(0, 50, (3, 7), device=g.device), g.randn(50, odd)))  # fmt: skip
    g.add("comparisons, integers", lambda x, i: torch.where(x > 0, i, i + 1),
          lambda: (g.randn(9, odd), torch.randint(0, 9, (9, odd), device=g.device)))  # fmt: skip


def strange(g: Grid) -> torch.Tensor:
    """Rows with NaN, Inf and both zeros."""
    x = g.randn(8, 40)
    x[1, 3], x[2, 5], x[3, 7], x[4] = math.nan, math.inf, -math.inf, 0.0
    x[4, ::2] = -0.0
    return x


def layouts(g: Grid) -> None:
    """Strides, offsets and sizes that kernels could take for granted."""
    n = g.size(512, 36)
    g.add("transposed input", lambda x: F.gelu(x) + 1, lambda: (g.randn(n, 70).t(),), must=False)
    g.add("every second column", lambda x: F.softmax(x, -1), lambda: (g.randn(9, 2 * n)[:, ::2],))
    g.add("expanded input", lambda x, y: x + y, lambda: (g.randn(1, n).expand(9, n), g.randn(9, n)))
    for name, d in DTYPES.items():
        g.add(f"misaligned pointwise {name}", lambda x: x * 2 + 1, lambda d=d: (g.randn(9 * n + 1, dtype=d)[1:].view(9, n),))
        g.add(f"misaligned product {name}", lambda x, w: x @ w,
              lambda d=d: (g.randn(48 * n + 3, dtype=d)[3:].view(48, n), g.randn(n * 64 + 1, dtype=d)[1:].view(n, 64)))  # fmt: skip
    g.add("misaligned attention", lambda q, k, v: F.scaled_dot_product_attention(q, k, v),
          lambda: tuple(g.randn(2 * 2 * n * 32 + 1, dtype=HALF)[1:].view(2, 2, n, 32) for _ in range(3)))  # fmt: skip
    g.add("no elements", lambda x: F.gelu(x) + 1, lambda: (g.randn(0, n),), must=False)
    g.add("product without rows", lambda x, w: F.linear(x, w), lambda: (g.randn(0, n), g.randn(8, n)), must=False)
    many = torch.export.Dim("many", min=2, max=4096)
    net = nn.Sequential(nn.Linear(48, 40), nn.GELU(), nn.LayerNorm(40))
    for count in (1, 7, g.size(1000, 50)):
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
    m, n, k = g.size(1576, 40), g.size(768, 48), g.size(768, 64)
    for name, d in DTYPES.items():
        linear = nn.Linear(k, n).to(d)
        g.add(f"linear, gelu {name}", nn.Sequential(linear, nn.GELU()), lambda d=d: (g.randn(m, k, dtype=d),))
        g.add(f"linear, residual {name}", lambda x, y, w, b: F.linear(x, w, b) + y,
              lambda d=d: (g.randn(3, 7, k, dtype=d), g.randn(3, 7, n, dtype=d), g.randn(n, k, dtype=d), g.randn(n, dtype=d)))  # fmt: skip
        g.add(f"odd sizes {name}", nn.Sequential(nn.Linear(77, 51), nn.SiLU()).to(d), lambda d=d: (g.randn(33, 77, dtype=d),))
        g.add(f"few rows, split depth {name}", nn.Sequential(nn.Linear(g.size(4096, 512), 96), nn.ReLU()).to(d),
              lambda d=d: (g.randn(2, g.size(4096, 512), dtype=d),))  # fmt: skip
        g.add(f"one row {name}", nn.Linear(k, n).to(d), lambda d=d: (g.randn(1, k, dtype=d),))
        g.add(f"bmm {name}", lambda x, y: x @ y, lambda d=d: (g.randn(5, 40, 33, dtype=d), g.randn(5, 33, 20, dtype=d)))
        g.add(f"product with a transposed operand {name}", lambda x, y: x.t() @ y.t(),
              lambda d=d: (g.randn(k, 40, dtype=d), g.randn(24, k, dtype=d)))  # fmt: skip
    g.add("baddbmm", lambda a, x, y: torch.baddbmm(a, x, y, alpha=0.5, beta=2.0),
          lambda: (g.randn(3, 20, 24), g.randn(3, 20, 32), g.randn(3, 32, 24)), must=False)  # fmt: skip
    g.add("addmm", lambda a, x, y: torch.addmm(a, x, y), lambda: (g.randn(24), g.randn(20, 32), g.randn(32, 24)))


def attentions(g: Grid) -> None:
    """Attention: masks, groups, sizes of heads, few queries."""
    n, sdpa = g.size(197, 37), F.scaled_dot_product_attention
    long = g.size(1024, 70)

    def qkv(d: torch.dtype, tokens: int, features: int, keys: int | None = None) -> Tensors:
        return tuple(g.randn(2, 4, t, features, dtype=d) for t in (tokens, keys or tokens, keys or tokens))

    for name, d in DTYPES.items():
        g.add(f"attention {name}", lambda q, k, v: sdpa(q, k, v), lambda d=d: qkv(d, n, 64))
        g.add(f"causal {name}", lambda q, k, v: sdpa(q, k, v, is_causal=True), lambda d=d: qkv(d, long, 64))
        g.add(f"boolean mask {name}", lambda q, k, v, m: sdpa(q, k, v, attn_mask=m),
              lambda d=d: (*qkv(d, n, 64), torch.rand(2, 1, n, n, device=g.device) > 0.3))  # fmt: skip
        g.add(f"additive mask {name}", lambda q, k, v, m: sdpa(q, k, v, attn_mask=m),
              lambda d=d: (*qkv(d, n, 64), g.randn(2, 1, 1, n, dtype=d)))  # fmt: skip
        g.add(f"grouped heads {name}", lambda q, k, v: sdpa(q, k, v, is_causal=True, enable_gqa=True),
              lambda d=d: (g.randn(2, 8, n, 64, dtype=d), *(g.randn(2, 2, n, 64, dtype=d) for _ in range(2))))  # fmt: skip
        g.add(f"one query {name}", lambda q, k, v: sdpa(q, k, v, enable_gqa=True),
              lambda d=d: (g.randn(2, 8, 1, 64, dtype=d), *(g.randn(2, 2, g.size(5000, 300), 64, dtype=d) for _ in range(2))))  # fmt: skip
    for features in (24, 80, 128, 256) if not g.toy else (24, 80):
        g.add(f"heads of {features}", lambda q, k, v: sdpa(q, k, v), lambda f=features: qkv(HALF, n, f))
    g.add("more keys than queries", lambda q, k, v: sdpa(q, k, v), lambda: qkv(HALF, 33, 64, g.size(500, 90)))
    g.add("heads inside tokens", lambda q, k, v: sdpa(*(t.transpose(1, 2) for t in (q, k, v))),
          lambda: tuple(g.randn(2, n, 4, 64, dtype=HALF) for _ in range(3)))  # fmt: skip
    g.add("rows that see nothing", lambda q, k, v, m: sdpa(q, k, v, attn_mask=m),
          lambda: (*qkv(HALF, n, 64), (torch.arange(n, device=g.device) > 5)[:, None].expand(n, n).contiguous()))  # fmt: skip
    distance = torch.arange(long)[:, None] - torch.arange(long)
    window = Net(lambda s, q, k, v: sdpa(q, k, v, s.mask), mask=(distance >= 0) & (distance < long // 4))
    g.add("constant window", window, lambda: qkv(HALF, long, 64))
    g.add("few queries, symbolic keys", lambda q, k, v: sdpa(q, k, v),
          lambda: (g.randn(2, 4, 1, 64, dtype=HALF), *(g.randn(2, 4, 50, 64, dtype=HALF) for _ in range(2))),
          dynamic=(None, {2: torch.export.Dim("keys", min=2, max=9000)}, {2: torch.export.Dim("keys", min=2, max=9000)}),
          run=lambda: (g.randn(2, 4, 1, 64, dtype=HALF), *(g.randn(2, 4, 333, 64, dtype=HALF) for _ in range(2))), must=False)  # fmt: skip


def others(g: Grid) -> None:
    """What may have no template: named, and no fault unless a kernel is wrong."""
    x = lambda c=16: (g.randn(2, c, g.size(28, 9), g.size(28, 9), dtype=HALF),)  # noqa: E731
    for name, conv in (
        ("conv 3x3", nn.Conv2d(16, 24, 3, padding=1)), ("conv 1x1", nn.Conv2d(16, 24, 1)),
        ("depthwise conv", nn.Conv2d(16, 16, 3, padding=1, groups=16)), ("conv, stride 2", nn.Conv2d(16, 8, 3, 2, 1)),
        ("patches", nn.Conv2d(16, 32, 4, 4)), ("dilated conv", nn.Conv2d(16, 8, 3, dilation=2)),
    ):  # fmt: skip
        g.add(name, nn.Sequential(conv, nn.ReLU()).half(), x, must=False)
        g.add(f"{name}, channels last", nn.Sequential(conv, nn.ReLU()).half(),
              lambda: (x()[0].to(memory_format=torch.channels_last),), must=False)  # fmt: skip
    g.add("pooling", lambda x: F.max_pool2d(x, 3, 2, 1), x, must=False)
    merge = getattr(ops, "merge_tokens", None)
    if merge is not None:
        g.add("merge tokens", lambda x, s, m: merge()(x, s, m, 3, [0])[0],
              lambda: (g.randn(2, g.size(197, 17), 64), torch.ones(2, g.size(197, 17), device=g.device),
                       g.randn(2, g.size(197, 17), 32)), must=False)  # fmt: skip


def large(g: Grid) -> None:
    """Offsets that do not fit 31 bits."""
    n = g.size(2**31 // 1024 + 524288, 40)
    g.add("pointwise, more than 2^31 elements", lambda x: x * 2 + 1, lambda: (g.randn(n, g.size(1024, 40), dtype=BRAIN),))
    g.add("softmax, more than 2^31 elements", lambda x: F.softmax(x, -1), lambda: (g.randn(n, g.size(1024, 40), dtype=BRAIN),))
    m, k = g.size(70000, 40), g.size(256, 32)
    g.add("product of more than 2^31 elements", lambda x, w: F.linear(x, w),
          lambda: (g.randn(m, k, dtype=HALF), g.randn(g.size(32000, 48), k, dtype=HALF)))  # fmt: skip


def cases(request: Mapping[str, Any]) -> list[tuple[str, Make]]:
    """All cases, as a child process is asked for them."""
    grid = Grid(request["device"], request.get("schedules", MOST), [])
    for group in (rows, products, attentions, layouts, others, large):
        group(grid)
    return grid.cases
