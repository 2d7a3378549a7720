"""GPU kernels for attention, run by Triton's interpreter, against eager."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from lowered import FLOATS, LAYOUTS, agree, close, laid_out
from torch.export import Dim

from torchlathe import targets
from torchlathe.codegen.partition import partition
from torchlathe.codegen.trial import run_kernel
from torchlathe.codegen.triton.backend import TritonBackend
from torchlathe.passes.capture import capture

sdpa = F.scaled_dot_product_attention


def operands(batch: int, heads: int, queries: int, keys: int, features: int, own: int | None = None,
             dtype: torch.dtype = torch.float32, groups: int = 1) -> tuple[torch.Tensor, ...]:  # fmt: skip
    torch.manual_seed(0)
    q = torch.randn(batch, heads, queries, features)
    k = torch.randn(batch, heads // groups, keys, features)
    v = torch.randn(batch, heads // groups, keys, own or features)
    return q.to(dtype), k.to(dtype), v.to(dtype)


@settings(deadline=None, max_examples=12, derandomize=True, phases=[Phase.generate])
@given(st.data())
def test_any_attention(data: st.DataObject) -> None:
    queries, keys = data.draw(st.integers(1, 70)), data.draw(st.integers(1, 140))
    features, own = data.draw(st.sampled_from([4, 16, 24])), data.draw(st.sampled_from([8, 16, 20]))
    groups = data.draw(st.sampled_from([1, 2]))
    q, k, v = operands(2, 2, queries, keys, features, own, data.draw(st.sampled_from(FLOATS)), groups)
    causal = queries <= keys and data.draw(st.booleans())
    scale = data.draw(st.sampled_from([None, 0.3]))
    function = lambda q, k, v: sdpa(q, k, v, is_causal=causal, scale=scale, enable_gqa=groups > 1)  # noqa: E731
    how = data.draw(st.sampled_from(LAYOUTS))
    assert agree(function, laid_out(q, how), laid_out(k, how), laid_out(v, how), most=1)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("causal", [False, True])
def test_every_schedule(causal: bool, dtype: torch.dtype) -> None:
    q, k, v = operands(1, 1, 75, 130, 20, dtype=dtype)
    assert len(agree(lambda q, k, v: sdpa(q, k, v, is_causal=causal), q, k, v, most=9)) > 1


def test_more_queries_than_keys_with_a_causal_mask() -> None:
    q, k, v = operands(1, 2, 90, 40, 16)
    assert agree(lambda q, k, v: sdpa(q, k, v, is_causal=True), q, k, v, most=2)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(33, 50), (1, 1, 33, 50), (2, 1, 1, 50), (2, 3, 33, 1), (1, 3, 33, 50), (1, 50)])
def test_masks(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    q, k, v = operands(2, 3, 33, 50, 16, dtype=dtype)
    seen, added = torch.rand(shape) > 0.4, torch.randn(shape).to(dtype) * 3
    added = added.masked_fill(torch.rand(shape) > 0.8, -math.inf)
    for mask in (seen, added):
        assert agree(lambda q, k, v, m: sdpa(q, k, v, attn_mask=m), q, k, v, mask, most=1)


@pytest.mark.parametrize("queries", [1, 40])
def test_rows_that_see_nothing(queries: int) -> None:
    q, k, v = operands(2, 2, queries, 300, 16)
    seen = torch.rand(2, 1, queries, 300) > 0.5
    seen[0, :, 0] = False
    function = lambda q, k, v, m: sdpa(q, k, v, attn_mask=m)  # noqa: E731
    assert agree(function, q, k, v, seen, most=2)
    assert agree(function, q, k, v, torch.where(seen, 0.0, -math.inf), most=2)
    seen[:] = False
    assert agree(function, q, k, v, seen, most=1)


@pytest.mark.parametrize("queries", [1, 40])
def test_what_is_not_a_number(queries: int) -> None:
    q, k, v = operands(2, 2, queries, 70, 16)
    q[0, 0, 0, 3], k[0, 1, 69, 2], v[1, 0, 5, 7] = math.nan, math.nan, math.nan
    assert agree(lambda q, k, v: sdpa(q, k, v), q, k, v, most=2)
    q, k, v = operands(2, 2, queries, 70, 16)
    k[0, 1, 69, 2], v[1, 0, 5, 7] = math.inf, -math.inf
    assert agree(lambda q, k, v: sdpa(q, k, v), q, k, v, most=2)


def test_scores_that_overflow_a_short_exponent() -> None:
    q, k, v = operands(1, 1, 20, 30, 16)
    assert agree(lambda q, k, v: sdpa(q, k, v, scale=900.0), q, k, v, most=2)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("heads", "groups"), [(8, 4), (4, 1), (6, 6)])
def test_few_queries_and_many_keys(heads: int, groups: int, dtype: torch.dtype) -> None:
    q, k, v = operands(2, heads, 1, 390, 32, dtype=dtype, groups=groups)
    found = agree(lambda q, k, v: sdpa(q, k, v, enable_gqa=groups > 1), q, k, v, most=2)
    assert "decode" in found[0] and "splits=1 " not in found[0]


def test_few_queries_with_a_mask_for_each() -> None:
    q, k, v = operands(2, 4, 3, 260, 16, groups=2)
    mask = torch.randn(2, 4, 3, 260)
    assert agree(lambda q, k, v, m: sdpa(q, k, v, attn_mask=m, enable_gqa=True), q, k, v, mask, most=2)
    assert agree(lambda q, k, v, m: sdpa(q, k, v, attn_mask=m, enable_gqa=True), q, k, v, mask > 0, most=2)


@pytest.mark.parametrize("how", LAYOUTS)
def test_layouts(how: str) -> None:
    q, k, v = (laid_out(t, how) for t in operands(2, 3, 21, 34, 16))
    assert agree(lambda q, k, v: sdpa(q, k, v), q, k, v, most=1)


def test_heads_inside_tokens_and_shared_keys() -> None:
    torch.manual_seed(0)
    joined = torch.randn(2, 21, 3, 4, 16)  # batch, tokens, query key value, heads, features
    q, k, v = joined.permute(2, 0, 3, 1, 4)
    assert agree(lambda q, k, v: sdpa(q, k, v), q, k, v, most=1)
    k, v = (t[:, :1].expand(2, 4, 21, 16) for t in (k, v))
    assert agree(lambda q, k, v: sdpa(q, k, v), q, k, v, most=1)


def test_three_dimensions() -> None:
    q, k, v = (t[0] for t in operands(1, 3, 21, 34, 16))
    assert agree(lambda q, k, v: sdpa(q, k, v), q, k, v, most=1)


@pytest.mark.parametrize("causal", [False, True])
def test_symbolic_batch_and_tokens(causal: bool) -> None:
    n, t = Dim("n", min=2, max=99), Dim("t", min=2, max=999)
    args = [tuple(torch.randn(b, 2, s, 16) for _ in range(3)) for b, s in ((2, 30), (1, 1), (3, 70), (0, 9), (2, 0))]
    function = lambda q, k, v: sdpa(q, k, v, is_causal=causal)  # noqa: E731
    assert agree(function, *args[0], others=args[1:], dynamic=({0: n, 2: t},) * 3, most=1)


def test_symbolic_keys_of_few_queries() -> None:
    t = Dim("t", min=2, max=9999)
    args = [(torch.randn(2, 4, 1, 16), *(torch.randn(2, 2, s, 16) for _ in range(2))) for s in (30, 1, 700)]
    function = lambda q, k, v: sdpa(q, k, v, enable_gqa=True)  # noqa: E731
    assert agree(function, *args[0], others=args[1:], dynamic=({}, {2: t}, {2: t}), most=1)


class Masked(torch.nn.Module):
    def __init__(self, mask: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        return sdpa(q, k, v, attn_mask=self.mask)


@pytest.mark.parametrize("additive", [False, True])
def test_a_known_mask_of_blocks(additive: bool) -> None:
    q, k, v = operands(1, 2, 150, 200, 16)
    mask = (torch.arange(150)[:, None] - torch.arange(200)).abs() < 20  # a band
    mask[7] = False
    model = Masked(torch.where(mask, 0.0, -math.inf) if additive else mask).eval()
    program = capture(model, (q, k, v))
    backend, target = TritonBackend(program), targets.get("nvidia-sm90")
    (region,) = partition(program, [backend], target)
    schedule = next(iter(backend.space(region, target)))
    kernel = backend.lower(region, target, schedule)
    (lists,) = kernel.constants  # in each row two counts and the numbers of all blocks
    assert 0 < lists[:, :2].sum() < 0.7 * lists[:, 2:].numel()
    values = {"mask": model.mask} | dict(zip("qkv", (q, k, v), strict=True))
    names = {n: str(n.target) if n.op == "get_attr" else n.name for n in region.inputs}
    (ours,) = run_kernel(kernel, [values[names[n]] for n in region.inputs])
    close(ours, model(q, k, v), model.double()(q.double(), k.double(), v.double()))
