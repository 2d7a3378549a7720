"""GPU kernels for attention that reads keys and values through an index, run by Triton's interpreter, against eager."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attends import paged
from lowered import FLOATS, agree, alone, flat
from torch.export import Dim

from torchlathe import targets
from torchlathe.codegen.base import Region
from torchlathe.codegen.partition import partition
from torchlathe.codegen.trial import run_kernel
from torchlathe.codegen.triton.backend import TritonBackend
from torchlathe.passes.capture import capture

sdpa = F.scaled_dot_product_attention


def pages(dtype: torch.dtype, queries: int = 5, integers: torch.dtype = torch.int64) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    q, (keys, values) = torch.randn(2, 4, queries, 16), torch.randn(2, 12, 8, 2, 16)
    table = torch.randperm(12)[:10].view(2, 5).to(integers)
    return q.to(dtype), keys.to(dtype), values.to(dtype), table


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("queries", [1, 5, 40])
def test_pages(dtype: torch.dtype, queries: int) -> None:
    assert agree(paged, *pages(dtype, queries), most=3)


def test_pages_numbered_from_the_end_in_32_bits() -> None:
    q, keys, values, table = pages(torch.float32, integers=torch.int32)
    assert agree(paged, q, keys, values, table - 12, most=2)


def test_a_split_of_many_pages() -> None:
    torch.manual_seed(0)
    q, keys, values = torch.randn(1, 4, 1, 16), *torch.randn(2, 70, 8, 4, 16)
    found = agree(paged, q, keys, values, torch.randperm(70).view(1, 70), most=2)
    assert any("decode" in kernel and "splits=1 " not in kernel for kernel in found)


def test_any_number_of_pages() -> None:
    count = Dim("count", min=2, max=50)
    q, keys, values, table = pages(torch.float32)
    other = q, keys, values, table[:, :3].contiguous()
    assert agree(paged, q, keys, values, table, others=[other], dynamic=({}, {}, {}, {1: count}), most=2)


def test_a_ring() -> None:
    def ring(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, places: torch.Tensor, mask: Any) -> Any:
        return sdpa(q, keys.index_select(2, places), values[:, :, places], attn_mask=mask)

    torch.manual_seed(0)
    q, (keys, values) = torch.randn(2, 4, 20, 16), torch.randn(2, 2, 4, 64, 16)
    places, mask = (torch.arange(50) + 40) % 64, torch.rand(20, 50) < 0.7
    mask[:, 0] = True
    assert agree(ring, q, keys, values, places, mask, most=2)


def test_a_row_of_a_table_for_each_head() -> None:
    def heads(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return sdpa(q, keys[rows], values)

    torch.manual_seed(0)
    q, values = torch.randn(3, 20, 16), torch.randn(3, 30, 16)
    assert agree(heads, q, torch.randn(99, 16), values, torch.randint(99, (3, 30)), most=2)


def test_an_entry_that_is_none_gives_no_number() -> None:
    q, keys, values, table = pages(torch.float32)
    region, order = alone(paged, (q, keys, values, table))
    backend, row = TritonBackend(), targets.get("nvidia-sm90")
    kernel = backend.lower(region, row, next(iter(backend.space(region, row))))
    args = q, keys, values, table.clone()
    args[3][1, 2] = 99
    (ours,) = run_kernel(kernel, [args[k] for k in order])
    assert ours[1].isnan().all() and torch.allclose(ours[0], paged(q, keys, values, table)[0], atol=1e-5)


class Paged(torch.nn.Module):
    def forward(self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        return paged(q.exp(), keys, values, table)


def test_partition_takes_the_look_up_in() -> None:
    args = pages(torch.float32)
    program, target = capture(Paged().eval(), args), targets.get("nvidia-sm90")
    regions = partition(program, [TritonBackend(program)], target)
    assert len(regions) == 2 and sum("index" in str(n.target) for n in regions[1].nodes) == 2


def test_an_index_that_is_split_is_left_alone() -> None:
    def split(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return sdpa(q, keys[rows].view(3, 30, 16), values)

    args = torch.randn(3, 20, 16), torch.randn(99, 16), torch.randn(3, 30, 16), torch.randint(99, (90,))
    region, _ = alone(split, args)
    assert flat(split(*args)) and "split" in (TritonBackend().supports(region, targets.get("nvidia-sm90")) or "")


def test_a_look_up_by_what_is_itself_looked_up() -> None:
    """The table's own look-up stays an operator; the pool's is the kernel's."""

    class Slots(torch.nn.Module):
        def forward(self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, tables: torch.Tensor,
                    slots: torch.Tensor) -> torch.Tensor:  # fmt: skip
            return paged(q, keys, values, tables[slots])

    q, keys, values, table = pages(torch.float32)
    program, target = (
        capture(Slots().eval(), (q, keys, values, table, torch.tensor([1, 0]))),
        targets.get("nvidia-sm90"),
    )
    *_, region = partition(program, [TritonBackend(program)], target)
    assert sum("index" in str(n.target) for n in region.nodes) == 2


def test_a_pool_of_another_dtype_is_left_alone() -> None:
    class Bits(torch.nn.Module):
        def forward(self, q: torch.Tensor, pool: torch.Tensor, v: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
            return sdpa(q, pool[rows].view(torch.float16), v)

    args = torch.randn(3, 20, 16).half(), torch.randn(99, 16).bfloat16(), torch.randn(3, 30, 16).half()
    program, target = capture(Bits().eval(), (*args, torch.randint(99, (3, 30)))), targets.get("nvidia-sm90")
    backend = TritonBackend(program)
    *_, region = partition(program, [backend], target)
    assert len(region.nodes) == 1
    whole = Region.of(n for n in program.graph.nodes if n.op == "call_function")
    assert "another dtype" in (backend.supports(whole, target) or "")


def test_index_select_does_not_count_from_the_end() -> None:
    """Eager raises for a negative entry of `index_select`: a kernel gives NaN."""

    def ring(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        return sdpa(q, keys.index_select(1, places), values)

    args = torch.randn(2, 20, 16), torch.randn(2, 64, 16), torch.randn(2, 30, 16), torch.arange(30)
    region, order = alone(ring, args)
    backend, row = TritonBackend(), targets.get("nvidia-sm90")
    kernel = backend.lower(region, row, next(iter(backend.space(region, row))))
    values = *args[:3], args[3] - 1
    (ours,) = run_kernel(kernel, [values[k] for k in order])
    assert ours.isnan().all()
