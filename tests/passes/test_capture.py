"""Capture: what a Program keeps of a model, what it drops, and what it refuses."""

from __future__ import annotations

import copy
from collections import namedtuple
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import _pytree as pytree

from torchlathe.passes.capture import capture, capture_graph
from torchlathe.passes.errors import CaptureError
from torchlathe.passes.verify import well_formed

Pair = namedtuple("Pair", ["low", "high"])


class Net(nn.Module):
    """A module around a function; `parts` become attributes."""

    def __init__(self, fn, **parts):
        super().__init__()
        self.fn = fn
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *args, **kwargs):
        return self.fn(self, *args, **kwargs)


def net(fn, **parts):
    return Net(fn, **parts).eval()


def ops(program):
    return [str(n.target).removeprefix("aten.") for n in program.graph.nodes if n.op == "call_function"]


def same(found, wanted):
    assert pytree.tree_structure(found) == pytree.tree_structure(wanted)
    for a, b in zip(pytree.tree_leaves(found), pytree.tree_leaves(wanted), strict=True):
        assert torch.equal(a, b) if isinstance(b, torch.Tensor) else a == b


def check(model, args, kwargs=None):
    """Capture, verify, compare with the model exactly; returns the program."""
    program = capture(model, args, kwargs)
    well_formed(program)
    with torch.no_grad():
        same(program(*args, **(kwargs or {})), model(*args, **(kwargs or {})))
    return program


def test_nested_inputs_and_outputs_keep_their_structure():
    def forward(self, batch, pair, *, scale=1.0):
        x = batch["x"] + batch["more"][0]
        return {"sum": x, "pair": Pair(pair.low * scale, [pair.high, None, 3])}

    x, y = torch.randn(2, 3), torch.randn(3)
    program = check(net(forward), ({"x": x, "more": (y,)}, Pair(x, y)), {"scale": 2.0})
    assert len(program.inputs) == 5
    with pytest.raises(ValueError, match="the program takes"):
        program({"x": x}, Pair(x, y), scale=2.0)


def test_dataclass_output():
    @dataclass
    class Answer:
        mean: torch.Tensor
        parts: list[torch.Tensor]

    pytree.register_dataclass(Answer)
    program = capture(net(lambda self, x: Answer(x.mean(), [x, x + 1])), (torch.arange(4.0),))
    found = program(torch.arange(4.0))
    assert isinstance(found, Answer)
    assert found.mean == 1.5
    assert torch.equal(found.parts[1], torch.arange(1.0, 5.0))


def test_parameter_names_of_forward():
    class Named(nn.Module):
        def forward(self, left, right=None, *, extra=2):
            return left * extra

    assert capture(Named().eval(), (torch.ones(2),)).parameters == ("left", "right", "extra")


def test_dropout_is_removed_in_eval_mode():
    model = net(lambda self, x: self.drop(x.sin()).cos(), drop=nn.Dropout(0.5))
    assert ops(check(model, (torch.randn(4),))) == ["sin.default", "cos.default"]


@pytest.mark.parametrize("layer", [nn.Dropout(0.5), nn.BatchNorm1d(3)], ids=["dropout", "batch-norm"])
def test_training_mode_is_refused_with_the_way_out(layer):
    model = net(lambda self, x: self.layer(x), layer=layer).train()
    with pytest.raises(CaptureError, match=r"training mode[\s\S]*model\.eval\(\)"):
        capture(model, (torch.randn(4, 3),))


def test_dropout_that_is_random_in_eval_mode_too_stays_random():
    program = capture(net(lambda self, x: F.dropout(x, 0.5, training=True)), (torch.ones(1000),))
    zeros = int((program(torch.ones(1000)) == 0).sum())
    assert 400 < zeros < 600


def test_grad_mode_wrappers_leave_no_trace():
    def forward(self, x):
        with torch.no_grad():
            y = x.sin()
        with torch.enable_grad():
            z = y.cos()
        return self.inner(z) + 1

    @torch.no_grad()
    def inner(self, x):
        return x.exp()

    program = check(net(forward, inner=net(inner)), (torch.randn(4),))
    assert ops(program) == ["sin.default", "cos.default", "exp.default", "add.Tensor"]
    before = torch.is_grad_enabled()
    program(torch.randn(4))
    assert torch.is_grad_enabled() == before


def autocast_forward(self, x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = self.linear(x @ x)
        with torch.autocast("cpu", enabled=False):
            z = self.linear(y.float())
    return y.softmax(-1), z


def test_autocast_becomes_casts():
    torch.manual_seed(0)
    program = check(net(autocast_forward, linear=nn.Linear(4, 4)), (torch.randn(4, 4),))
    products = [n.meta["val"].dtype for n in program.graph.nodes if "aten.linear" in str(n.target)]
    assert products == [torch.bfloat16, torch.float32]


def test_no_op_casts_aliases_and_asserts_are_removed():
    def forward(self, x):
        y = x.to(torch.float32).detach().contiguous().type_as(x).clone()
        return (y.double().float() + y).to("cpu") * 2

    assert ops(check(net(forward), (torch.randn(4),))) == [
        "_to_copy.default", "_to_copy.default", "add.Tensor", "mul.Tensor"]  # fmt: skip


@pytest.mark.parametrize(
    "forward",
    [
        lambda self, x: x.clone(),
        lambda self, x: x.clone().view(-1),
        lambda self, x: (x.clone()[0], x + 1),
        lambda self, x: x.clone().split(1)[1],
        lambda self, x: x.to(torch.float32, copy=True).t(),
        lambda self, x: self.kept.clone().unsqueeze(0),
        lambda self, x: torch.tensor([1.0, 2.0]).view(2, 1),
    ],
    ids=["clone", "view", "select", "split", "copying-cast", "weight", "constant"],
)
def test_copies_that_reach_the_outside_stay_copies(forward):
    model, x = net(forward, kept=nn.Parameter(torch.ones(3))), torch.randn(2, 2)
    program, before = check(model, (x,)), x.clone()
    for result in pytree.tree_leaves(program(x)):
        result.detach().fill_(7.0)
    assert torch.equal(x, before)
    same(program(x), model(x))


def test_weights_share_their_memory_with_the_model():
    model = net(
        lambda self, x: self.first(x) + self.second(x) + self.table, first=nn.Linear(3, 3), second=nn.Linear(3, 3)
    )
    model.second.weight = model.first.weight
    model.register_buffer("table", torch.randn(3), persistent=False)
    program = check(model, (torch.randn(2, 3),))
    found = {w.data_ptr() for w in program.weights.values()}
    assert found == {t.data_ptr() for t in (*model.parameters(), *model.buffers())}
    assert not any(w.requires_grad for w in program.weights.values())
    with torch.no_grad():
        model.first.weight.zero_()
    x = torch.randn(2, 3)
    same(program(x), model(x))


def test_buffer_that_the_model_writes_is_state():
    model = net(lambda self, x: (self.count.add_(1), x + self.count)[1])
    model.register_buffer("count", torch.zeros(()))
    program = capture(copy.deepcopy(model), (torch.zeros(2),))
    well_formed(program)
    (state,) = program.state
    assert state.slot == "count"
    flat = program.run([torch.zeros(2)])
    assert torch.equal(flat[0], torch.ones(2))
    assert flat[state.output] == 1
    assert program.weights["count"] == 0, "running a program writes nothing back"
    node = next(n for n in program.graph.nodes if n.op == "get_attr")
    assert program.constant(node) is None, "state is no constant"


def test_input_that_the_model_writes_is_state():
    def forward(self, x, y):
        y[0] = x[1]
        return x + y

    x, y = torch.randn(3), torch.zeros(3)
    program = capture(net(forward), (x, y.clone()))
    flat = program.run([x, y])
    assert [s.slot for s in program.state] == [1]
    assert torch.equal(flat[program.state[0].output], torch.stack([x[1], y[1], y[2]]))
    assert torch.equal(y, torch.zeros(3))


def test_dynamic_batch_and_length():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = net(lambda self, x: self.layer(x).mean(1), layer=layer)
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
    program = capture(model, (torch.randn(2, 5, 16),), dynamic_shapes={"args": (({0: batch, 1: length}),)})
    well_formed(program)
    for shape in ((2, 5, 16), (7, 3, 16), (1, 9, 16)):
        x = torch.randn(shape)
        torch.testing.assert_close(program(x), model(x))


def branch(self, x):
    if x.sum() > 0:  # marks the line that errors must name
        return x + 1
    return x - 1


def test_refusal_names_construct_line_and_the_other_door():
    with pytest.raises(CaptureError) as caught:
        capture(net(branch), (torch.ones(2),))
    line = branch.__code__.co_firstlineno + 1
    assert caught.value.where == f"{__file__}:{line}"
    assert "DataDependent" in str(caught.value)
    assert 'torch.compile(model, backend="torchlathe")' in str(caught.value)


def test_cond_keeps_both_branches():
    def forward(self, x):
        return torch.cond(x.sum() > 0, lambda v: self.linear(v), lambda v: v.cos(), (x,))

    model = net(forward, linear=nn.Linear(3, 3))
    program = check(model, (torch.ones(3),))
    check(model, (-torch.ones(3),))
    with torch.no_grad():
        same(program(-torch.ones(3)), torch.cos(torch.ones(3)))


def test_exported_program_is_taken_as_it_is():
    model, x = net(lambda self, x: self.linear(x).relu_(), linear=nn.Linear(3, 3)), torch.randn(2, 3)
    program = capture(torch.export.export(model, (x,)))
    same(program(x), model(x))
    assert ops(program) == ["linear.default", "relu.default"]


def test_high_level_operators_stay_whole():
    def forward(self, x):
        x = self.norm(F.conv1d(x, self.kernel, padding=1)).transpose(1, 2)
        y = F.scaled_dot_product_attention(x[None], x[None], x[None])[0]
        y = F.rms_norm(F.layer_norm(y, (4,)), (4,))
        return F.silu(F.gelu(self.linear(y))).softmax(-1), F.group_norm(y, 3)

    model = net(forward, norm=nn.BatchNorm1d(4), linear=nn.Linear(4, 4), kernel=nn.Parameter(torch.randn(4, 4, 3)))
    found = {op.split(".")[0] for op in ops(check(model, (torch.randn(2, 4, 3),)))}
    assert found >= {"conv1d", "scaled_dot_product_attention", "layer_norm", "rms_norm", "linear", "gelu", "silu",
                     "softmax", "group_norm"}  # fmt: skip


# ---- the torch.compile door ----


class Door:
    """A torch.compile backend that captures each graph and runs the Program eagerly."""

    def __init__(self):
        self.programs = []

    def __call__(self, module, example_inputs):
        program = capture_graph(module, example_inputs)
        well_formed(program)
        self.programs.append(program)

        def run(*args):
            flat = program.run(args)
            for state in program.state:
                args[state.slot].copy_(flat[state.output])
            return flat[: program.out_spec.num_leaves]

        return run


def through_door(model, args, **options):
    """Eager and compiled results are equal, and so are the arguments that the model wrote into."""
    torch._dynamo.reset()
    door = Door()
    mine, theirs = copy.deepcopy(args), copy.deepcopy(args)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        torch.manual_seed(1)
        wanted = model(*mine)
        torch.manual_seed(1)
        same(torch.compile(twin, backend=door, **options)(*theirs), wanted)
    same(theirs, mine)
    same([*twin.buffers()], [*model.buffers()])
    return door.programs


def test_door_gives_the_same_operators_as_export():
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Dropout(0.1), nn.BatchNorm1d(4), nn.LayerNorm(4))
    (program,) = through_door(layers.eval(), (torch.randn(2, 3),))
    assert ops(program) == ops(capture(layers, (torch.randn(2, 3),)))


def test_door_with_symbolic_sizes_serves_other_sizes():
    model = net(lambda self, x, y: torch.cat([x * x.shape[0], y]).flatten())
    torch._dynamo.reset()
    door = Door()
    compiled = torch.compile(model, backend=door, dynamic=True)
    with torch.no_grad():
        for rows in (3, 5, 8):
            x, y = torch.randn(rows, 2), torch.randn(4, 2)
            same(compiled(x, y), model(x, y))
    assert len(door.programs) == 1
    assert "SymInt" in door.programs[0].text()


def test_door_with_mutated_inputs_and_buffers():
    def forward(self, x, y):
        x.mul_(2)
        y[0] = x[1]
        self.count += 1
        return x + self.count, y.view(-1)

    model = net(forward)
    model.register_buffer("count", torch.zeros(()))
    (program,) = through_door(model, (torch.randn(3, 3), torch.randn(3, 3)))
    assert len(program.state) == 3


def test_door_applies_autocast_and_drops_grad_modes():
    torch.manual_seed(0)
    (program,) = through_door(net(autocast_forward, linear=nn.Linear(4, 4)), (torch.randn(4, 4),))
    products = [n.meta["val"].dtype for n in program.graph.nodes if "aten.linear" in str(n.target)]
    assert products == [torch.bfloat16, torch.float32]
    assert not [op for op in ops(program) if "autocast" in op or "grad" in op]


def test_door_inlines_vmap():
    model = net(lambda self, x, y: torch.vmap(lambda a, b: a.softmax(-1) @ b, in_dims=(0, None))(x, y))
    (program,) = through_door(model, (torch.randn(2, 3, 4), torch.randn(4, 5)))
    assert not [op for op in ops(program) if "vmap" in op]


def test_door_serves_what_capture_refuses():
    programs = through_door(net(branch), (torch.ones(2),))
    assert len(programs) == 2


def test_door_takes_cond_and_random_operators():
    def forward(self, x):
        y = torch.cond(x.sum() > 0, lambda v: v.sin() * 2, lambda v: v.cos(), (x,))
        return y + torch.rand_like(x)

    (program,) = through_door(net(forward), (torch.randn(4),))
    assert "cond" in program.text()


def test_a_failed_trace_leaves_no_mode_behind():
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    graph.call_function(torch.amp.autocast_mode._enter_autocast, ("cpu", torch.bfloat16, True, None))
    graph.call_function(torch._C._functorch._vmap_increment_nesting, (2, "error"))
    graph.output((graph.call_function(torch.ops.aten.mm.default, (x, x)),))
    with pytest.raises(CaptureError, match="this graph cannot be traced"):
        capture_graph(torch.fx.GraphModule({}, graph), [torch.ones(2, 3)])
    assert not torch.is_autocast_enabled("cpu")
    assert torch._C._functorch.get_dynamic_layer_stack_depth() == 0


class Pieces(nn.Module):
    def forward(self, x):
        a, b, c = x.split([2, 1, 3], -1)
        d, e = (a @ a.transpose(-1, -2)).chunk(2, 1)
        return c * b, d - e


def test_pieces_of_a_tensor_are_slices_of_it():
    x = torch.randn(3, 4, 6)
    program = capture(Pieces(), (x,))
    names = [str(n.target) for n in program.graph.nodes if n.op == "call_function"]
    assert sum("slice" in name for name in names) == 5 and not any("split" in n or "getitem" in n for n in names)
    for ours, wanted in zip(program(x), Pieces()(x), strict=True):
        assert torch.equal(ours, wanted)
