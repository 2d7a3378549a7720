"""Structures of inputs and outputs in a file: classes come back where they are known, field names everywhere."""

from dataclasses import dataclass

import pytest
import torch
from torch.utils import _pytree as pytree

from torchlathe import targets
from torchlathe.codegen.cache import load
from torchlathe.codegen.executable import Executable
from torchlathe.codegen.lower import lower_unmeasured
from torchlathe.codegen.structure import Fields
from torchlathe.passes.capture import capture


def build(model, args):
    program = capture(model.eval(), args)
    return Executable(program, lower_unmeasured(program, targets.get("cpu")))


@dataclass
class Answer:
    score: torch.Tensor
    label: torch.Tensor


class Answering(torch.nn.Module):
    def forward(self, x):
        return Answer(x * 2, x.argmax(-1))


@pytest.fixture
def answer_file(tmp_path):
    pytree.register_dataclass(Answer)
    try:
        build(Answering(), (torch.randn(2, 3),)).save(tmp_path / "a")
        yield tmp_path / "a"
    finally:
        if Answer in pytree.SUPPORTED_NODES:
            pytree._deregister_pytree_node(Answer)
            pytree.SUPPORTED_NODES.pop(Answer, None)


def test_registered_output_classes_come_back(answer_file):
    assert isinstance(load(answer_file)(torch.ones(2, 3)), Answer)


def test_unknown_output_classes_become_fields_with_the_same_names(answer_file):
    pytree._deregister_pytree_node(Answer)
    pytree.SUPPORTED_NODES.pop(Answer, None)
    loaded = load(answer_file)
    got = loaded(torch.ones(2, 3))
    assert isinstance(got, Fields) and list(got) == ["score", "label"]
    assert got.score is got["score"] is got[0] and len(got.to_tuple()) == 2
    with pytest.raises(AttributeError, match="it has score, label"):
        _ = got.logits
    loaded.save(answer_file)  # the name of the class is kept for a process that knows it
    pytree.register_dataclass(Answer)
    assert isinstance(load(answer_file)(torch.ones(2, 3)), Answer)
