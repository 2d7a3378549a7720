"""The torch.compile door: answers, graph breaks, new shapes, changed weights, gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from torchlathe.passes.verify import difference


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    torch.manual_seed(0)


def same(a, b):
    flat = torch.utils._pytree.tree_leaves
    return difference([t.detach() for t in flat(a)], [t.detach() for t in flat(b)])[0] <= 1


class Broken(nn.Module):
    """Branches on data, so that dynamo breaks the graph."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        y = self.first(x)
        if y.sum() > 0:
            y = y + 1
        return {"y": self.second(y).relu()}


def test_the_entry_point_is_known():
    assert "torchlathe" in torch._dynamo.list_backends(())


def test_graph_breaks():
    model = Broken().eval()
    compiled = torch.compile(model, backend="torchlathe")
    with torch.no_grad():
        for _ in range(6):
            x = torch.randn(4, 8)
            assert same(compiled(x), model(x))


def test_new_shapes():
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.LayerNorm(16)).eval()
    compiled = torch.compile(model, backend="torchlathe")
    with torch.no_grad():
        for rows in (4, 5, 9, 1, 300):
            x = torch.randn(rows, 8)
            assert same(compiled(x), model(x))


def test_changed_weights_are_seen():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU()).eval()
    compiled = torch.compile(model, backend="torchlathe")
    x = torch.randn(4, 8)
    with torch.no_grad():
        assert same(compiled(x), model(x))
        model[0].weight.mul_(-2)
        assert same(compiled(x), model(x))
        model[0].weight = nn.Parameter(torch.randn(8, 8))
        assert same(compiled(x), model(x))
        model[0].bias.data = torch.full((8,), 3.0)
        assert same(compiled(x), model(x))


def test_weights_that_keep_changing_are_not_compiled_for_ever():
    from torchlathe.optimizer import backend

    made = []
    model = nn.Linear(8, 8).eval()
    compiled = torch.compile(model, backend=lambda *graph: made.append(backend._Door(graph[0], False)) or made[0])
    x = torch.randn(4, 8)
    with torch.no_grad():
        for _ in range(backend.VARIANTS + 3):
            model.weight.add_(1)
            assert same(compiled(x), model(x))
    assert made[0].compiled == backend.VARIANTS


def test_weights_kept_the_other_way_round_are_constants_too(monkeypatch):
    from torchlathe.optimizer import backend

    monkeypatch.setattr(backend._Door, "loses", lambda *_: False)

    class Rows(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(24, 32)), nn.Parameter(torch.randn(32))

        def forward(self, x):
            return torch.addmm(self.bias, x.view(-1, 24), self.weight).view(*x.shape[:2], 32).relu()

    made, model, x = [], Rows().eval(), torch.randn(2, 3, 24)
    compiled = torch.compile(model, backend=lambda *graph: made.append(backend.compile_graph(*graph)) or made[0])
    with torch.no_grad():
        same(compiled(x), model(x))
    ((_, executable),) = made[0].variants
    calls = [n for n in executable.program.graph.nodes if n.op == "call_function"]
    assert [n.target for n in calls] == [torch.ops.aten.linear.default, torch.ops.aten.relu.default]
    assert executable.program.constant(calls[0].args[1]).data_ptr() == model.weight.data_ptr()


def test_training_and_gradients_run_unchanged():
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.BatchNorm1d(8)).train()
    compiled = torch.compile(model, backend="torchlathe")
    compiled(torch.randn(4, 8)).sum().backward()
    assert model[0].weight.grad is not None and model[2].num_batches_tracked == 1
    model.eval()
    x = torch.randn(4, 8, requires_grad=True)
    compiled(x).sum().backward()
    assert x.grad is not None


def test_batch_statistics_are_updated_without_gradients():
    model, twin = nn.BatchNorm1d(8).train(), nn.BatchNorm1d(8).train()
    compiled = torch.compile(model, backend="torchlathe")
    with torch.no_grad():
        for _ in range(3):
            x = torch.randn(16, 8)
            assert same(compiled(x), twin(x))
    assert same(model.running_mean, twin.running_mean) and int(model.num_batches_tracked) == 3


def test_inputs_that_the_model_writes_are_written():
    def forward(cache, x):
        cache[:, 1] = x
        return cache.sum(-1)

    compiled = torch.compile(forward, backend="torchlathe")
    with torch.no_grad():
        mine, theirs, x = torch.zeros(3, 4), torch.zeros(3, 4), torch.randn(3)
        assert same(compiled(mine, x), forward(theirs, x)) and torch.equal(mine, theirs)


def test_the_same_graph_with_other_parameters():
    blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(4)).eval()
    compiled = [torch.compile(b, backend="torchlathe") for b in blocks]
    x = torch.randn(2, 8)
    with torch.no_grad():
        for block, fast in zip(blocks, compiled, strict=True):
            assert same(fast(x), block(x))
