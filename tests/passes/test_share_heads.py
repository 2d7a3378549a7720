"""share-heads: heads that were repeated for groups of queries are read once, whatever spelled the repeats."""

import math

import pytest
import torch
from attends import Attend, H, added, attention, operands

from torchlathe.passes import ShareHeads
from torchlathe.passes.base import Refusal


@pytest.mark.parametrize("spelling", ["expand", "interleave"])
@pytest.mark.parametrize("mask", [None, added(-math.inf)])
def test_repeated_heads_are_read_once(ask, spelling, mask, golden):
    _, after, found = ask(ShareHeads(), Attend(mask, 3, spelling=spelling), operands(3))
    node = attention(after)
    assert found == 1 and node.kwargs["enable_gqa"] is True and node.kwargs["scale"] == 0.3
    assert [n.meta["val"].shape[1] for n in node.args[:3]] == [H, H // 3, H // 3]
    assert not any("expand" in str(n.target) or "repeat" in str(n.target) for n in after.graph.nodes)
    golden(after.text())


def test_repeated_heads_of_any_length(ask):
    length = torch.export.Dim("length", min=2, max=100)
    _, after, found = ask(ShareHeads(), Attend(None, 2), operands(2), dynamic_shapes=({2: length},) * 3)
    assert found == 1
    for n in (2, 33):
        q, k, v = operands(2, queries=n, keys=n)
        torch.testing.assert_close(after(q, k, v), Attend(None, 2)(q, k, v))


REFUSED = {
    "only keys": (Attend(None, 2, 1), operands(2, 1)),
    "groups of two sizes": (Attend(None, 2, 3), operands(2, 3)),
    "no repeats": (Attend(), operands()),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_needed_stays(ask, name):
    _, _, found = ask(ShareHeads(), *REFUSED[name])
    assert isinstance(found, Refusal) and found.node is not None
