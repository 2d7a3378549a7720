"""Program: run, fork, print, hash, insert; and what verify notices."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from torchlathe.passes.capture import capture
from torchlathe.passes.errors import VerifyError
from torchlathe.passes.observe import observe
from torchlathe.passes.program import Program
from torchlathe.passes.verify import difference, same_answers, well_formed

aten = torch.ops.aten


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x):
        return self.linear(x).relu()


@pytest.fixture
def program():
    torch.manual_seed(0)
    return capture(Net().eval(), (torch.randn(2, 4),))


def relu(program):
    return next(n for n in program.graph.nodes if n.target is aten.relu.default)


def test_text(program, golden):
    golden(program.text())


def test_text_and_digest_do_not_depend_on_node_names(program):
    fork = program.fork()
    for node in fork.graph.nodes:
        if node.op == "call_function":
            node.name = f"renamed_{node.name}"
    assert fork.text() == program.text() and fork.digest() == program.digest()


def test_fork_shares_weights_and_nothing_else(program):
    fork = program.fork()
    node = relu(fork)
    node.replace_all_uses_with(node.args[0])
    fork.graph.erase_node(node)
    assert fork.text() != program.text() and fork.digest() != program.digest()
    assert all(fork.weights[k] is v for k, v in program.weights.items())
    fork.weight("extra", torch.zeros(2))
    assert "extra" not in program.weights


def test_call_infers_shapes_and_keeps_the_source_line(program):
    node = relu(program)
    new = program.call(aten.transpose.int, node, 0, 1, before=program.graph.output_node(), like=node)
    assert tuple(new.meta["val"].shape) == (3, 2) and new.meta["stack_trace"] == node.meta["stack_trace"]
    with pytest.raises(RuntimeError, match="reduction dim"):
        program.call(aten.mm.default, node, node, before=program.graph.output_node())
    assert all(n.target is not aten.mm.default for n in program.graph.nodes)


def test_weights_get_unique_names(program):
    assert program.weight("w", torch.ones(2)).target == "w" and program.weight("w", torch.ones(2)).target == "w_1"


def test_verify_notices_unknown_weights_stale_shapes_and_writes(program):
    well_formed(program)
    broken = program.fork()
    del broken.weights["linear.bias"]
    with pytest.raises(VerifyError, match=r"linear\.bias"):
        well_formed(broken)
    broken = program.fork()
    relu(broken).meta["val"] = relu(broken).meta["val"].new_empty(7, 7)
    with pytest.raises(VerifyError, match=r"7, 7"):
        well_formed(broken)
    broken = program.fork()
    relu(broken).target = aten.relu_.default
    with pytest.raises(VerifyError, match="writes into its input"):
        well_formed(broken)


def test_a_second_check_infers_what_changed_alone(program, monkeypatch):
    node = program.call(aten.transpose.int, relu(program), 0, 1, before=program.graph.output_node())
    well_formed(program)
    inferred, infer = list[str](), Program.infer
    monkeypatch.setattr(Program, "infer", lambda self, n: (inferred.append(str(n.target)), infer(self, n)))
    fork = program.fork()
    well_formed(fork)
    assert not inferred
    turned = next(n for n in fork.graph.nodes if n.name == node.name)
    turned.args = (turned.args[0], 0, 0)
    with pytest.raises(VerifyError, match=r"transpose"):
        well_formed(fork)
    assert inferred == ["aten.transpose.int"]
    fork = program.fork()
    source = relu(fork).args[0]
    source.meta["val"] = source.meta["val"].new_empty(7, 7)
    with pytest.raises(VerifyError, match=r"7, 7"):
        well_formed(fork)


def test_verify_compares_answers(program):
    inputs = [torch.randn(2, 4)]
    wanted = program.run(inputs)
    same_answers(program, inputs, wanted, "nobody")
    with pytest.raises(VerifyError, match="output 0"):
        same_answers(program, inputs, [wanted[0] + 0.1], "somebody")


@pytest.mark.parametrize(
    ("found", "wanted", "equal"),
    [
        (torch.tensor([1.0, float("nan")]), torch.tensor([1.0, float("nan")]), True),
        (torch.tensor([1.0, 2.0]), torch.tensor([1.0, float("nan")]), False),
        (torch.tensor([1.0, float("inf")]), torch.tensor([1.0, float("-inf")]), False),
        (torch.tensor([1.0, float("inf")]), torch.tensor([1.0, float("nan")]), False),
        (torch.tensor([1.0, float("nan")]), torch.tensor([1.0, float("inf")]), False),
        (torch.tensor([1.0, float("-inf")]), torch.tensor([1.0, float("-inf")]), True),
        (torch.tensor([1.01, float("-inf")]), torch.tensor([1.0, float("-inf")]), False),
        (torch.tensor([float("nan")]), torch.tensor([float("nan")]), True),
        (torch.tensor([1.0, 3e38]), torch.tensor([1.0, -3e38]), False),
        (torch.tensor([1.0, 6e4]).half(), torch.tensor([1.0, -6e4]).half(), False),
        (torch.tensor([1.0, 1.0 + 1e-6]), torch.tensor([1.0, 1.0]), True),
        (torch.tensor([1.0, 1.001]), torch.tensor([1.0, 1.0]), False),
        (torch.tensor([0.0, 1e-6, 0.0, 1.0]), torch.tensor([0.0, 0.0, 0.0, 1.0]), True),
        (torch.tensor([0.0, 1e-3, 0.0, 1.0]), torch.tensor([0.0, 0.0, 0.0, 1.0]), False),
        (torch.tensor([1]), torch.tensor([1.0]), False),
        (torch.tensor([1, 2]), torch.tensor([1, 3]), False),
        (torch.zeros(2, 0), torch.zeros(2, 0), True),
        (torch.zeros(2, 1), torch.zeros(2), False),
        (torch.tensor([1 + 1j]), torch.tensor([1 + 1j]), True),
        (3, 3, True),
        (3, 4, False),
    ],
)
def test_difference(found, wanted, equal):
    assert (difference([found], [wanted])[0] <= 1) is equal


@pytest.mark.parametrize("columns", [2, 32768, 3])
def test_columns_of_masked_numbers_hide_no_difference(columns):
    torch.manual_seed(0)
    wanted = torch.randn((3 << 20) // columns, columns)
    wanted[:, ::32] = -1e9
    found = wanted.clone()
    found[:, 1::32] = 0.0
    assert difference([found], [wanted])[0] > 1000
    assert difference([torch.tensor([5.0, float("inf")]).double()],
                      [torch.tensor([1e308, float("inf")]).double()])[0] > 1  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
def test_difference_of_many_numbers(dtype, masked):
    torch.manual_seed(0)
    wanted = torch.randn(3, 1 << 20).to(dtype)
    if masked:
        wanted[:, ::3], wanted[0, 1::7] = -1e9, float("-inf")
    found = wanted.clone()
    found[2, -2] += 0.25
    usual = wanted[wanted > -1e3].double()
    b = wanted[2, -2].double()
    formula = (found[2, -2].double() - b).abs() / b.abs().clamp(min=usual.abs().max())
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 5e-2}[dtype]
    expected = pytest.approx(float(formula) / tolerance, rel=1e-5)
    assert difference([found], [wanted])[0] == expected and difference([found.t()], [wanted.t()])[0] == expected
    found[2, -1] = float("nan")
    assert difference([found], [wanted])[0] == float("inf")


def test_observe_folds_over_batches(program):
    batches = [[torch.randn(2, 4)] for _ in range(3)]
    node = relu(program)
    largest = observe(
        program, batches, {node: lambda state, v: v.max() if state is None else torch.maximum(state, v.max())}
    )
    wanted = max(float(program.run(b)[0].max()) for b in batches)
    assert float(largest[node]) == wanted
