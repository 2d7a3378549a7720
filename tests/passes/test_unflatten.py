"""Products of flattened rows become linear layers, where nothing else reads them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.export import Dim

from torchlathe.passes.capture import capture
from torchlathe.passes.program import Program
from torchlathe.passes.unflatten import unflatten
from torchlathe.passes.verify import well_formed

aten = torch.ops.aten


class Flat(nn.Module):
    """A product of rows, with a weight of [inputs, outputs] as some libraries keep it."""

    def __init__(self, fn: Callable[[Flat, torch.Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fn = fn
        self.weight, self.bias = nn.Parameter(torch.randn(6, 5)), nn.Parameter(torch.randn(5))

    def forward(self, x: torch.Tensor) -> Any:
        return self.fn(self, x)


def rows(m: Flat, x: torch.Tensor, width: int = 5) -> torch.Tensor:
    return torch.addmm(m.bias, x.view(-1, x.shape[-1]), m.weight).view(*x.shape[:-1], width)


def names(program: Program) -> list[str]:
    return [n.target._schema.name.split("::")[1] for n in program.graph.nodes if n.op == "call_function"]


def captured(fn: Callable[[Flat, torch.Tensor], Any], x: torch.Tensor, **kwargs: Any) -> tuple[Flat, Program]:
    model = Flat(fn).eval()
    program = capture(model, (x,), **kwargs)
    well_formed(program)
    with torch.no_grad():
        torch.testing.assert_close(program(x), model(x))
    return model, program


@pytest.mark.parametrize("shape", [(2, 3, 6), (2, 3, 4, 6)])
def test_a_product_of_flattened_rows_is_a_linear_layer(shape: tuple[int, ...]) -> None:
    model, program = captured(rows, torch.randn(shape))
    assert names(program) == ["linear"]
    stored = [w for w in program.weights.values() if w.dim() == 2]
    assert [w.data_ptr() for w in stored] == [model.weight.data_ptr()]  # a view of the weight, not a second one
    assert stored[0].shape == (5, 6)


def test_without_a_bias_and_with_more_than_one_reader() -> None:
    def forward(m: Flat, x: torch.Tensor) -> Any:
        y = x.reshape(-1, 6) @ m.weight
        return y.view(2, 3, 5).relu(), y.view(2, 3, 5) + 1

    _, program = captured(forward, torch.randn(2, 3, 6))
    assert sorted(names(program)) == ["add", "linear", "relu"]


def test_any_batch() -> None:
    x = torch.randn(4, 3, 6)
    model, program = captured(rows, x, dynamic_shapes={"x": {0: Dim("b", min=2, max=64)}})
    assert names(program) == ["linear"]
    with torch.no_grad():
        torch.testing.assert_close(program(x[:2]), model(x[:2]))


def test_a_program_taken_apart_into_core_operators_has_its_linear_layers_back() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.GELU(), nn.Linear(6, 5, bias=False)).eval()
    x = torch.randn(2, 3, 6)
    core = torch.export.export(model, (x,)).run_decompositions()
    assert not any("linear" in str(n.target) for n in core.graph.nodes)  # else there is nothing to show
    program = capture(core, (x,))
    assert names(program) == ["linear", "gelu", "linear"]
    assert {w.data_ptr() for w in program.weights.values()} == {p.data_ptr() for p in model.parameters()}
    with torch.no_grad():
        torch.testing.assert_close(program(x), model(x))


@pytest.mark.parametrize(
    "fn",
    [
        lambda m, x: (rows(m, x), torch.addmm(m.bias, x.view(-1, 6), m.weight).sum(0)),
        lambda m, x: torch.addmm(m.bias, x.view(-1, 6), m.weight).view(3, 2, 5),
        lambda m, x: torch.addmm(m.bias, x.view(-1, 6), m.weight, alpha=2.0).view(2, 3, 5),
        lambda m, x: torch.addmm(m.bias, x.view(-1, 6), m.weight, beta=0.5).view(2, 3, 5),
        lambda m, x: torch.addmm(x.view(-1, 6)[:, :5], x.view(-1, 6), m.weight).view(2, 3, 5),
        lambda m, x: torch.addmm(m.bias[:1], x.view(-1, 6), m.weight).view(2, 3, 5),
        lambda m, x: torch.mm(x.view(3, 12)[:, :6], m.weight).view(1, 3, 5),
        lambda m, x: (x.view(3, 2, 6) @ m.weight.expand(3, 6, 5)).view(1, 3, 2, 5),
    ],
    ids=["rows-read", "other-shape", "alpha", "beta", "addend-per-row", "addend-of-one", "other-rows", "batch"],
)
def test_what_else_rows_are_used_for_stays(fn: Callable[[Flat, torch.Tensor], Any]) -> None:
    _, program = captured(fn, torch.randn(2, 3, 6))
    assert {"addmm", "mm", "matmul"} & set(names(program))


def test_a_square_weight_that_is_turned_twice() -> None:
    class Square(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6, 6))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            flat = x.view(-1, 6)
            a, b = flat @ self.weight.permute(0, 1), flat @ self.weight.permute(1, 0)
            return a.view(2, 3, 6) - 2 * b.view(2, 3, 6) + (flat @ self.weight.transpose(1, 1)).view(2, 3, 6)

    x, model = torch.randn(2, 3, 6), Square().eval()
    program = capture(model, (x,))
    assert names(program).count("linear") == 1  # only a transposition is one
    with torch.no_grad():
        torch.testing.assert_close(program(x), model(x))


def test_a_matrix_that_is_an_input_is_an_operand_like_any_other() -> None:
    def forward(m: Flat, x: torch.Tensor) -> torch.Tensor:
        return (x.view(-1, 6) @ x[0, :, :5]).view(2, 6, 5)

    _, program = captured(forward, torch.randn(2, 6, 6))
    assert "linear" not in names(program) and "matmul" in names(program)


def test_a_product_with_a_dtype_of_its_own_stays() -> None:
    program = capture(nn.Sequential(nn.Linear(6, 5)), (torch.randn(2, 3, 6),))
    (linear,) = [n for n in program.graph.nodes if n.op == "call_function"]
    x, weight, bias = linear.args
    rows = program.call(aten.view.default, x, [6, 6], before=linear)
    across = program.call(aten.t.default, weight, before=linear)
    with program.graph.inserting_before(linear):
        product = program.graph.call_function(aten.addmm.dtype, (bias, rows, across, torch.float64))
    product.meta["val"] = linear.meta["val"].new_empty(6, 5, dtype=torch.float64)
    view = program.call(aten.view.default, product, [2, 3, 5], before=linear)
    linear.replace_all_uses_with(view)
    assert unflatten(program) == 0
