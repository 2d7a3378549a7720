"""The matcher: commutation, shared values, repeated variables, literals, and the reasons it gives."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from torchlathe.passes.base import Refusal
from torchlathe.passes.capture import capture
from torchlathe.passes.nodes import erase_unused, is_pure
from torchlathe.passes.rewrite import Op, Rule, Var, match, rewrite

aten = torch.ops.aten
ADD, MUL, SUB = aten.add.Tensor, aten.mul.Tensor, aten.sub.Tensor
X, Y = torch.randn(3), torch.randn(3)


class Call(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)


def program_of(function, *args):
    return capture(Call(function).eval(), args or (X, Y))


def last(program) -> fx.Node:
    return [n for n in program.graph.nodes if n.op == "call_function"][-1]


def test_commutes_finds_both_orders():
    pattern = Op(ADD, (Op(MUL, (Var("a"), 2)), Var("b")), commutes=True)
    for function in (lambda x, y: x * 2 + y, lambda x, y: y + x * 2):
        found = match(pattern, last(program_of(function)), {})
        assert isinstance(found, dict) and [found["a"].name, found["b"].name] == ["args_0", "args_1"]


def test_order_counts_without_commutes():
    pattern = Op(SUB, (Op(MUL, (Var("a"), 2)), Var("b")))
    assert isinstance(match(pattern, last(program_of(lambda x, y: x * 2 - y)), {}), dict)
    assert match(pattern, last(program_of(lambda x, y: y - x * 2)), {}) is None


def test_a_scaled_sum_does_not_commute():
    pattern = Op(ADD, (Op(MUL, (Var("a"), 2)), Var("b")), commutes=True)
    assert match(pattern, last(program_of(lambda x, y: torch.add(y, x * 2, alpha=3))), {}) is None


def test_repeated_variable_is_one_value():
    square = Op(MUL, (Var("a"), Var("a")))
    assert isinstance(match(square, last(program_of(lambda x, y: x * x)), {}), dict)
    assert match(square, last(program_of(lambda x, y: x * y)), {}) is None


def test_repeated_variable_makes_an_inner_operator_try_its_other_order():
    pattern = Op(SUB, (Op(ADD, (Var("a"), Var("b")), commutes=True), Var("a")))
    for function in (lambda x, y: (x + y) - x, lambda x, y: (y + x) - x):
        found = match(pattern, last(program_of(function)), {})
        assert isinstance(found, dict) and found["a"].name == "args_0"


def test_repeated_variable_compares_plain_values():
    pattern = Op(ADD, (Op(MUL, (Var("a"), Var("s"))), Op(MUL, (Var("b"), Var("s")))))
    assert isinstance(match(pattern, last(program_of(lambda x, y: x * 2.5 + y * float("2.5"))), {}), dict)
    assert match(pattern, last(program_of(lambda x, y: x * 2.5 + y * 3.5)), {}) is None


def test_literals_match_by_type_and_value():
    node = last(program_of(lambda x, y: torch.sum(x, [0])))
    assert isinstance(match(Op(aten.sum.dim_IntList, (Var("x"), [0])), node, {}), dict)
    assert match(Op(aten.sum.dim_IntList, (Var("x"), [1])), node, {}) is None
    node = last(program_of(lambda x, y: x * 2))
    assert match(Op(MUL, (Var("x"), 2.0)), node, {}) is None and match(Op(MUL, (Var("x"), True)), node, {}) is None


def test_default_arguments_are_filled_in():
    node = last(program_of(lambda x, y: torch.softmax(x, 0)))
    assert isinstance(match(Op(node.target, (Var("x"), 0, Var("third"))), node, {}), dict)


def test_inner_value_used_elsewhere_is_a_reason():
    def twice(x, y):
        inner = x * 2
        return torch.exp(inner), inner + y

    pattern = Op(ADD, (Op(MUL, (Var("a"), 2)), Var("b")))
    node = last(program_of(twice))
    assert match(pattern, node, {}) == "the value of mul is also used outside the pattern"
    shared = Op(ADD, (Op(MUL, (Var("a"), 2), shared=True, name="inner"), Var("b")))
    found = match(shared, node, {})
    assert isinstance(found, dict) and found["inner"].target is MUL and found["root"] is node


def double_sum(check):
    pattern = Op(ADD, (Var("a"), Var("a")))
    return Rule(pattern, lambda p, m: p.call(MUL, m["a"], 2, before=m["root"]), check)


def test_rewrite_applies_until_nothing_matches():
    program = program_of(lambda x, y: (x + x) + (x + x) + y)
    program.graph.lint()
    assert rewrite(program, [double_sum(lambda p, m: None)], "absent") == 2
    assert torch.equal(program(X, Y), 4 * X + Y)


@pytest.mark.parametrize(("function", "reason"), [
    (lambda x, y: x + x, "only on Mondays"),
    (lambda x, y: x + y, "no a + a")])  # fmt: skip
def test_rewrite_refuses_with_the_reason_of_the_check_or_the_absence(function, reason):
    program = program_of(function)
    before = program.text()
    refusal = rewrite(program, [double_sum(lambda p, m: "only on Mondays")], "no a + a")
    assert isinstance(refusal, Refusal) and refusal.reason == reason
    assert program.text() == before


def test_erase_unused_follows_a_long_chain():
    graph = fx.Graph()
    node = kept = graph.placeholder("x")
    for _ in range(5000):
        node = graph.call_function(aten.relu.default, (node,))
    graph.output((kept,))
    erase_unused(node)
    assert len(graph.nodes) == 2


def test_purity():
    graph = fx.Graph()
    x = graph.placeholder("x")
    assert is_pure(graph.call_function(aten.scaled_dot_product_attention.default, (x, x, x)))
    assert not is_pure(graph.call_function(aten.scaled_dot_product_attention.default, (x, x, x, None, 0.5)))
    assert not is_pure(graph.call_function(aten.rand_like.default, (x,)))
    assert not is_pure(graph.call_function(aten.add_.Tensor, (x, x)))
