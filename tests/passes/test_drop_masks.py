"""drop-masks: masks that hide nothing or the future go, all others stay."""

import math

import pytest
import torch
from attends import TRIL, Attend, B, S, added, attention, operands
from torch import nn

from torchlathe.passes import DropMasks
from torchlathe.passes.base import Refusal

LEAST = torch.finfo(torch.float32).min
CAUSAL = {
    "bool": TRIL, "bool of four dimensions": TRIL[None, None], "of each image": TRIL.expand(B, 1, S, S).clone(),
    "minus infinity": added(-math.inf), "least number": added(LEAST), "-1e9": added(-1e9),
}  # fmt: skip


@pytest.mark.parametrize("name", CAUSAL)
def test_a_mask_of_the_future_becomes_the_flag(ask, name):
    _, after, found = ask(DropMasks(), Attend(CAUSAL[name]), operands())
    assert found == 1 and attention(after).args[3:] == (None, 0.0, True)
    assert not any(n.op == "get_attr" for n in after.graph.nodes if n.users)


@pytest.mark.parametrize("mask", [torch.ones(S, S, dtype=torch.bool), torch.zeros(1, 1, 1, S), torch.zeros(S, S)])
def test_a_mask_that_hides_nothing_goes(ask, mask):
    _, after, found = ask(DropMasks(), Attend(mask), operands())
    assert found == 1 and attention(after).args[3:] == (None, 0.0, False)


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
    "a mask with a batch of its own": (Attend(TRIL.expand(4, 1, S, S).clone()), operands(batch=1)),
    "fewer keys than lanes": (Attend(torch.ones(9, 9, dtype=torch.bool).tril()), operands(queries=9, keys=9)),
    "no mask": (Attend(), operands()),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_needed_stays(ask, name):
    _, _, found = ask(DropMasks(), *REFUSED[name])
    assert isinstance(found, Refusal) and found.node is not None


def test_a_program_without_attention(ask):
    _, _, found = ask(DropMasks(), nn.ReLU(), (torch.randn(2),))
    assert found.reason == "no attention operator in the program"


def test_the_flag_in_the_graph(ask, golden):
    _, after, _ = ask(DropMasks(), Attend(TRIL[None, None]), operands())
    golden(after.text())
