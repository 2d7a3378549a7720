"""simplify-attention: masks that hide nothing or the future go, repeated heads are read once, the rest stays."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from torchlathe.passes import SimplifyAttention
from torchlathe.passes.base import Refusal

B, H, S, D = 2, 6, 20, 8
LEAST = torch.finfo(torch.float32).min
TRIL = torch.ones(S, S, dtype=torch.bool).tril()


class Attend(nn.Module):
    """Attention under a constant mask, with each head of keys and values repeated as model libraries spell it."""

    def __init__(self, mask=None, group=1, values=None, spelling="expand"):
        super().__init__()
        self.register_buffer("mask", mask)
        self.group, self.values, self.spelling = group, group if values is None else values, spelling

    def repeat(self, x, n):
        if n == 1:
            return x
        if self.spelling == "interleave":
            return x.repeat_interleave(n, 1)
        b, h, s, d = x.shape
        return x[:, :, None].expand(b, h, n, s, d).reshape(b, h * n, s, d)

    def forward(self, q, k, v):
        keys, values = self.repeat(k, self.group), self.repeat(v, self.values)
        return F.scaled_dot_product_attention(q, keys, values, self.mask, scale=0.3)


def operands(group=1, values=None, queries=S, keys=S, batch=B):
    torch.manual_seed(0)
    heads = (H, H // group, H // (group if values is None else values))
    return tuple(torch.randn(batch, h, n, D) for h, n in zip(heads, (queries, keys, keys), strict=True))


def attention(program):
    (node,) = [n for n in program.graph.nodes if "scaled_dot_product" in str(n.target)]
    return node


def added(hidden, shape=(S, S), dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype).masked_fill(~torch.ones(shape, dtype=torch.bool).tril(), hidden)


CAUSAL = {
    "bool": TRIL, "bool of four dimensions": TRIL[None, None], "of each image": TRIL.expand(B, 1, S, S).clone(),
    "minus infinity": added(-math.inf), "least number": added(LEAST), "-1e9": added(-1e9),
}  # fmt: skip


@pytest.mark.parametrize("name", CAUSAL)
def test_a_mask_of_the_future_becomes_the_flag(ask, name):
    _, after, found = ask(SimplifyAttention(), Attend(CAUSAL[name]), operands())
    assert found == 1 and attention(after).args[3:] == (None, 0.0, True)
    assert not any(n.op == "get_attr" for n in after.graph.nodes if n.users)


@pytest.mark.parametrize("mask", [torch.ones(S, S, dtype=torch.bool), torch.zeros(1, 1, 1, S), torch.zeros(S, S)])
def test_a_mask_that_hides_nothing_goes(ask, mask):
    _, after, found = ask(SimplifyAttention(), Attend(mask), operands())
    assert found == 1 and attention(after).args[3:] == (None, 0.0, False)


@pytest.mark.parametrize("spelling", ["expand", "interleave"])
@pytest.mark.parametrize("mask", [None, added(-math.inf)])
def test_repeated_heads_are_read_once(ask, spelling, mask, golden):
    _, after, found = ask(SimplifyAttention(), Attend(mask, 3, spelling=spelling), operands(3))
    node = attention(after)
    assert found == 1 and node.kwargs["enable_gqa"] is True and node.kwargs["scale"] == 0.3
    assert [n.meta["val"].shape[1] for n in node.args[:3]] == [H, H // 3, H // 3]
    assert not any("expand" in str(n.target) or "repeat" in str(n.target) for n in after.graph.nodes)
    golden(after.text())


def test_repeated_heads_of_any_length(ask):
    length = torch.export.Dim("length", min=2, max=100)
    _, after, found = ask(SimplifyAttention(), Attend(None, 2), operands(2), dynamic_shapes=({2: length},) * 3)
    assert found == 1
    for n in (2, 33):
        q, k, v = operands(2, queries=n, keys=n)
        torch.testing.assert_close(after(q, k, v), Attend(None, 2)(q, k, v))


def almost(row, column):
    mask = TRIL.clone()
    mask[row, column] = ~mask[row, column]
    return mask


def small(value):
    mask = added(-math.inf)
    mask[3, 1] = value
    return mask


REFUSED = {
    "one more key": (Attend(almost(4, 5)), operands()),
    "one key less": (Attend(almost(5, 4)), operands()),
    "a number that moves scores": (Attend(small(0.5)), operands()),
    "not a number": (Attend(small(math.nan)), operands()),
    "hidden by too little": (Attend(added(-100.0)), operands()),
    "more keys than queries": (Attend(torch.ones(S, 2 * S).tril().bool()), operands(keys=2 * S)),
    "only keys": (Attend(None, 2, 1), operands(2, 1)),
    "groups of two sizes": (Attend(None, 2, 3), operands(2, 3)),
    "a mask with a batch of its own": (Attend(TRIL.expand(4, 1, S, S).clone()), operands(batch=1)),
    "fewer keys than lanes": (Attend(torch.ones(9, 9, dtype=torch.bool).tril()), operands(queries=9, keys=9)),
    "nothing to do": (Attend(), operands()),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_needed_stays(ask, name):
    _, _, found = ask(SimplifyAttention(), *REFUSED[name])
    assert isinstance(found, Refusal) and found.node is not None


def test_a_program_without_attention(ask):
    _, _, found = ask(SimplifyAttention(), nn.ReLU(), (torch.randn(2),))
    assert found.reason == "no attention operator in the program"
