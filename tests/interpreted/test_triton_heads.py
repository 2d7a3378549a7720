"""GPU kernels for products whose columns are heads, rotary embedding after them, run by Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attends import rotated
from lowered import FLOATS, agree, alone
from torch.export import Dim

from torchlathe import targets
from torchlathe.codegen.base import Schedule
from torchlathe.codegen.lower import backends
from torchlathe.codegen.partition import partition
from torchlathe.codegen.triton.backend import TritonBackend
from torchlathe.codegen.triton.matmul import NAMES, Template
from torchlathe.codegen.triton.product import plan
from torchlathe.passes.capture import capture

Tensors = tuple[torch.Tensor, ...]


def attention_operands(heads: int, groups: int, features: int) -> Callable[..., Any]:
    """Values as they are, then rotated queries and keys, out of one product."""

    def function(x: torch.Tensor, w: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *bias: torch.Tensor) -> Any:
        y, (batch, tokens, _) = F.linear(x, w, *bias), x.shape
        a, b = heads * features, (heads + groups) * features
        q = y[..., :a].view(batch, tokens, heads, features).transpose(1, 2)
        k = y[..., a:b].view(batch, tokens, groups, features).transpose(1, 2)
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        return y[..., b:], rotated(q, cos, sin), rotated(k, cos, sin)

    return function


def values(batch: int, tokens: int, heads: int, groups: int, features: int, dtype: torch.dtype) -> Tensors:
    torch.manual_seed(0)
    width = (heads + 2 * groups) * features
    sizes = ((batch, tokens, 40), (width, 40), (1, tokens, features), (1, tokens, features))
    x, w, cos, sin = (torch.randn(s).to(dtype) for s in sizes)
    return x, w / 6, cos, sin


@pytest.mark.parametrize("dtype", FLOATS)
def test_rotary_embedding_after_the_product(dtype: torch.dtype) -> None:
    args = values(2, 11, 4, 2, 16, dtype)
    found = agree(attention_operands(4, 2, 16), *args, torch.randn(128).to(dtype), most=3, kept=False)
    assert "library" in found[0] and "rows=" in found[1]


def test_as_many_heads_as_tokens_and_widths_that_are_no_powers_of_two() -> None:
    assert agree(attention_operands(3, 3, 12), *values(1, 3, 3, 3, 12, torch.float32), most=2, kept=False)


def test_a_single_row_and_a_split_depth() -> None:
    x, w, cos, sin = values(1, 1, 4, 4, 16, torch.float16)
    x, w = torch.randn(1, 1, 900).half() / 8, torch.randn(w.shape[0], 900).half() / 8
    found = agree(attention_operands(4, 4, 16), x, w, cos, sin, most=3, kept=False)
    assert any("splits=" in kernel and "splits=1 " not in kernel for kernel in found)


def test_by_descriptors() -> None:
    torch.manual_seed(0)
    args = (torch.randn(1, 130, 72).half() / 8, torch.randn(12 * 32, 72).half(), *torch.randn(2, 1, 130, 32).half())
    function = attention_operands(4, 4, 32)
    region, _ = alone(function, args)
    for node in region.outputs:
        node.meta["kept"] = False
    space = list(TritonBackend().space(region, targets.get("nvidia-sm90")))
    first = next(k for k, s in enumerate(space) if dict(s.params).get("tma"))
    assert any("tma=True" in kernel for kernel in agree(function, *args, most=first + 1, kept=False))


def test_texts_of_any_length() -> None:
    tokens = Dim("tokens", min=2, max=99)
    function, args = attention_operands(4, 2, 16), values(2, 11, 4, 2, 16, torch.float32)
    other = values(2, 7, 4, 2, 16, torch.float32)
    where = {1: tokens}
    assert agree(function, *args, others=[other], dynamic=(where, {}, where, where), most=2, kept=False)


def test_one_weight_for_one_result_and_heads_in_front() -> None:
    def function(x: torch.Tensor, w: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        return rotated((x @ w).view(9, 4, 8).transpose(0, 1), cos, sin)

    torch.manual_seed(0)
    args = torch.randn(9, 20), torch.randn(20, 32), torch.randn(9, 8), torch.randn(9, 8)
    assert agree(function, *args, most=2, kept=False)


def test_what_is_read_otherwise_is_left_alone() -> None:
    def normalised(x: torch.Tensor, w: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        return rotated(F.rms_norm(F.linear(x, w).view(2, 11, 8, 16), (16,)).transpose(1, 2), cos, sin)

    def thirds(x: torch.Tensor, w: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        y = F.linear(x, w).view(2, 11, 8, 16).transpose(1, 2)
        return torch.cat((rotated(y[..., :6], cos[..., :6], sin[..., :6]), y[..., 6:]), -1)

    for function in (normalised, thirds):
        x, w, cos, sin = values(2, 11, 4, 2, 16, torch.float32)
        region, _ = alone(function, (x, w, cos.unsqueeze(1), sin.unsqueeze(1)))
        assert TritonBackend().supports(region, targets.get("nvidia-sm90")) is not None
    region, _ = alone(attention_operands(4, 2, 16), values(2, 11, 4, 2, 16, torch.float32))  # results are returned
    reason = TritonBackend().supports(region, targets.get("nvidia-sm90"))
    assert reason is not None and "lies otherwise" in reason


def refused(function: Callable[..., Any], *args: torch.Tensor) -> str:
    """Why a function that is one region has no kernel."""
    region, _ = alone(function, args)
    for node in region.outputs:
        node.meta["kept"] = False
    reason = TritonBackend().supports(region, targets.get("nvidia-sm90"))
    assert reason is not None
    return reason


def test_what_no_piece_is_is_refused() -> None:
    """Each of these once had a kernel that gave wrong numbers or wrote where it must not."""
    x, w, cos, sin = values(2, 11, 4, 2, 16, torch.float32)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)

    def heads(y: torch.Tensor) -> torch.Tensor:
        return y.view(2, 11, -1, 16).transpose(1, 2)

    def with_more(x: torch.Tensor, w: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Any:
        y = F.linear(x, w)
        return torch.sigmoid(y[..., 64:]), rotated(heads(y[..., :64]), cos, sin)

    def fewer_rows(x: torch.Tensor, w: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        return rotated(heads(F.linear(x, w)), cos, sin)[:, :, :5]

    def longer(x: torch.Tensor, w: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        y = rotated(heads(F.linear(x, w)), cos, sin)
        return torch.cat((y, cos.expand_as(y)), -1)

    def one_bias(x: torch.Tensor, w: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        return rotated(torch.addmm(cos[0, 0, 0, :1], x, w).view(11, 8, 16).transpose(0, 1), cos[0], sin[0])

    assert "by heads" in refused(with_more, x, w, cos, sin)
    for function in (fewer_rows, longer):
        assert refused(function, x, w, cos, sin)
    assert refused(one_bias, x[0], w.t().contiguous(), cos, sin)
    assert "share one weight" in refused(attention_operands(4, 2, 16), x, w[:1].expand(128, 40), cos[:, 0], sin[:, 0])
    assert "not computed with" in refused(lambda x, w: heads(F.linear(x, w)), x, w)


def test_parts_that_are_counted_from_the_end() -> None:
    def function(x: torch.Tensor, w: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Any:
        y = F.linear(x, w)
        q = y[..., -64:].view(2, 11, 4, 16).transpose(1, 2)
        return y[..., :-64], rotated(q, cos.unsqueeze(1), sin.unsqueeze(1))

    assert agree(function, *values(2, 11, 4, 2, 16, torch.float32), most=2, kept=False)


def test_scratch_memory_beyond_31_bits() -> None:
    """A split depth needs room for several results, which may be too large for 32 bits where one is not."""
    x, w = (torch.randn(1, device="meta").expand(s) for s in ((2**21, 4096), (128, 4096)))
    region, _ = alone(lambda x, w: F.relu(F.linear(x, w)), (x.contiguous(), w.contiguous()))
    product = plan(region)
    for splits, wide in ((1, False), (8, True)):
        names = dict(zip(NAMES, (64, 64, 64, 4, 3, splits, False, 0), strict=True))
        text = Template(product, "wide", Schedule("matmul", tuple(names.items()))).code().text
        assert ("area" in text and "to(tl.int64)" in text.partition("_sum(")[2]) is wide


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = torch.nn.Linear(64, 128), torch.nn.Linear(64, 64)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        v, q, k = attention_operands(4, 2, 16)(x, self.qkv.weight, cos, sin, self.qkv.bias)
        v = v.view(*x.shape[:2], 2, 16).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.out(y.transpose(1, 2).flatten(2))


def test_partition_finds_heads_in_a_model() -> None:
    _, _, cos, sin = values(2, 11, 4, 2, 16, torch.float32)
    program, target = capture(Block().eval(), (torch.randn(2, 11, 64), cos, sin)), targets.get("nvidia-sm90")
    regions = partition(program, backends(program, target)[0], target)
    with_product = next(r for r in regions if any("linear" in str(n.target) for n in r.nodes))
    names = [str(n.target) for n in with_product.nodes]
    assert sum("cat" in n for n in names) == 2 and len(with_product.outputs) == 3
