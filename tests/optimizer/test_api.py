"""The front door: answers, judgement, names, limits, errors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn

import torchlathe
from torchlathe.passes.base import Fidelity, Pass, Refusal
from torchlathe.passes.errors import CaptureError, InputError, LatheError, UnknownNameError
from torchlathe.passes.verify import difference

aten = torch.ops.aten


class Net(nn.Module):
    """A convolution with batch norm, a linear on top, and an attribute that users read."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 5)
        self.label_names = ["a", "b", "c", "d", "e"]

    def forward(self, x):
        return self.head(self.norm(self.conv(x)).relu().mean((2, 3)))


@dataclass(frozen=True)
class Break(Pass):
    """Changes the answer."""

    name: ClassVar[str] = "break"

    def run(self, program, ctx):
        for node in program.graph.nodes:
            if node.target is aten.relu.default:
                new = program.call(aten.neg.default, node.args[0], before=node)
                node.replace_all_uses_with(new)
                program.graph.erase_node(node)
                return 1
        return Refusal("no relu")


@dataclass(frozen=True)
class Slow(Pass):
    """Gives the same answer after a detour that takes longer than any scheduling of threads."""

    name: ClassVar[str] = "slow"
    fidelity: ClassVar[Fidelity] = Fidelity.EXACT

    def run(self, program, ctx):
        node = next(n for n in program.graph.nodes if n.target is aten.relu.default)
        value = large = program.call(aten.repeat.default, node, [60, 1, 1, 1], before=node.next)
        for _ in range(20):
            value = program.call(aten.relu.default, value, before=value.next)
        count = node.meta["val"].shape[0]
        value = program.call(aten.slice.Tensor, value, 0, 0, count, before=value.next)
        node.replace_all_uses_with(value, delete_user_cb=lambda user: user is not large)
        return 20


@pytest.fixture(scope="module")
def image():
    torch.manual_seed(0)
    return torch.randn(2, 3, 32, 32)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    net = Net()
    net(torch.randn(16, 3, 32, 32))  # batch statistics that are not trivial
    return net.eval()


@pytest.fixture(scope="module")
def fast(model, image):
    return torchlathe.optimize(model, (image,))


def steps(executable):
    return {s.name: s for s in executable.report.steps}


def test_answers_report_and_attributes(fast, model, image):
    with torch.no_grad():
        assert difference([fast(image)], [model(image)])[0] <= 1
    assert isinstance(fast, nn.Module) and fast.label_names == ["a", "b", "c", "d", "e"]
    with pytest.raises(AttributeError):
        _ = fast.no_such_name
    assert steps(fast)["fold-norm"].sites == 1
    assert steps(fast)["fuse-attention"].refusal
    assert fast.report.ratio and fast.report.ratio_low <= fast.report.ratio <= fast.report.ratio_high
    assert "fold-norm" in str(fast.report)


def test_a_wrong_rewrite_is_dropped_and_said(model, image):
    result = torchlathe.optimize(model, (image,), passes=[Break()])
    assert not steps(result)["break"].kept and "deviates" in steps(result)["break"].reason
    with torch.no_grad():
        assert difference([result(image)], [model(image)])[0] <= 1


def test_a_slower_rewrite_is_dropped(model, image):
    result = torchlathe.optimize(model, (image,), passes=[Slow()])
    assert not steps(result)["slow"].kept and steps(result)["slow"].reason == "measurably slower"


def test_passes_by_name_run_exactly_in_this_order(model, image):
    report = torchlathe.explain(model, (image,), passes=["drop-dead", "fold-norm"])
    assert [s.name for s in report.steps] == ["drop-dead", "fold-norm"]


def test_unknown_names_list_near_matches(model, image):
    with pytest.raises(UnknownNameError, match="fold-norm"):
        torchlathe.optimize(model, (image,), passes=["fold-nrom"])
    with pytest.raises(UnknownNameError, match="x86-64-v3"):
        torchlathe.optimize(model, (image,), target="x86-64-v33")


def test_a_target_that_cannot_run_here_is_refused(model, image):
    with pytest.raises(LatheError, match="cannot run on this host"):
        torchlathe.optimize(model, (image,), target="nvidia-sm90")


def test_limit_stops_after_that_many_rewrites(model, image):
    result = torchlathe.optimize(model, (image,), limit=0)
    assert [s.name for s in result.report.steps] == ["lower"] and not result.program.history


def test_explain_times_nothing_and_says_why(model, image):
    report = torchlathe.explain(model, (image,), target="nvidia-sm90")
    named = {s.name: s for s in report.steps}
    assert named["fold-norm"].sites == 1 and named["fold-adapters"].refusal and report.seconds is None


def test_training_mode_is_refused_where_it_matters(image):
    with pytest.raises(CaptureError, match="eval"):
        torchlathe.optimize(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout(0.5)).train(), (image,))


def test_wrong_calls_say_what_was_compiled_and_what_came(fast, image):
    with pytest.raises(InputError, match=r"compiled for torch.float32 \[2, 3, 32, 32\].*torch.float64"):
        fast(image.double())
    with pytest.raises(InputError, match=r"\[4, 3, 32, 32\]"):
        fast(image.repeat(2, 1, 1, 1))
    with pytest.raises(InputError, match="compiled for"):
        fast()


def test_weights_are_shared_and_never_written(model, image):
    before = {k: v.clone() for k, v in model.state_dict().items()}
    result = torchlathe.optimize(model, (image,))
    head = {v.data_ptr() for v in result.program.weights.values()}
    assert model.head.weight.data_ptr() in head
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_nan_and_inf_give_what_the_model_gives(fast, model, image):
    for special in (float("nan"), float("inf"), -float("inf")):
        poisoned = image.clone()
        poisoned[0, 1, 3, 4] = special
        with torch.no_grad():
            wanted, found = model(poisoned), fast(poisoned)
        assert torch.equal(wanted.isnan(), found.isnan()) and torch.equal(wanted[1], model(image)[1])


def test_agreement_on_calibration_data_is_reported(model, image):
    result = torchlathe.optimize(model, (image,), data=[(image,), (image * 2,)])
    assert any("agreement with the original on 2 batches: 1.0" in n or "0.99999" in n for n in result.report.notes)


def test_dynamic_batch(model, image):
    result = torchlathe.optimize(model, (image,), dynamic_shapes=({0: torch.export.Dim("batch", max=64)},))
    with torch.no_grad():
        for batch in (1, 2, 7, 64):
            x = torch.randn(batch, 3, 32, 32)
            assert difference([result(x)], [model(x)])[0] <= 1
    with pytest.raises(InputError):
        result(torch.randn(65, 3, 32, 32))
