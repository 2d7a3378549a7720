"""The executable as callers see it: calls, errors, state, threads, memory and overhead."""

import gc
import statistics
import time
import weakref
from typing import NamedTuple

import pytest
import torch
from threads import in_threads
from torch.export import Dim

from torchlathe import targets
from torchlathe.codegen.executable import Executable
from torchlathe.codegen.lower import lower_eager, lower_unmeasured
from torchlathe.passes import ops
from torchlathe.passes.capture import capture
from torchlathe.passes.errors import InputError

CPU = targets.get("cpu")


def build(model, args=(), kwargs=None, dynamic_shapes=None, lower=lower_unmeasured):
    program = capture(model.eval(), args, kwargs, dynamic_shapes=dynamic_shapes)
    return Executable(program, lower(program, CPU), model=model)


class Two(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.config = {"width": 4}
        self.linear = torch.nn.Linear(4, 3)

    def forward(self, x, scale, mask=None):
        y = torch.relu(self.linear(x)) * scale
        return y if mask is None else y * mask


@pytest.fixture
def pair():
    torch.manual_seed(0)
    model = Two()
    x, scale = torch.randn(5, 4), torch.randn(5, 3)
    return model, x, scale, torch.relu(model.linear(x)) * scale


@pytest.mark.parametrize("lower", [lower_eager, lower_unmeasured])
def test_positional_keyword_and_mixed_calls(pair, lower):
    model, x, scale, wanted = pair
    for args, kwargs in (((x, scale), {}), ((x,), {"scale": scale}), ((), {"x": x, "scale": scale})):
        fast = build(model, args, kwargs, lower=lower)
        for got in (fast(x, scale), fast(x, scale=scale), fast(x=x, scale=scale), fast(scale=scale, x=x),
                    fast(x, scale, None), fast(x, scale, mask=None)):  # fmt: skip
            torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)


def test_wrong_structure_says_what_was_compiled_and_what_came(pair):
    model, x, scale, _ = pair
    fast = build(model, (x,), {"scale": scale})
    for call in (lambda: fast(x), lambda: fast(x, wrong=scale), lambda: fast(x, scale, x, x), lambda: fast(),
                 lambda: fast(x, scale, x=x), lambda: fast(x, scale, torch.ones(5, 3))):  # fmt: skip
        with pytest.raises(InputError, match="compiled for a call with 1 positional arguments and keywords scale"):
            call()


def test_wrong_dtype_shape_and_type_say_what_was_compiled_and_what_came(pair):
    model, x, scale, _ = pair
    fast = build(model, (x, scale))
    with pytest.raises(InputError, match=r"input x: compiled for torch.float32 .* called with torch.float64 \[5, 4\]"):
        fast(x.double(), scale)
    with pytest.raises(InputError, match=r"input x: .*\[5, 4\] on cpu, called with torch.float32 \[6, 4\] on cpu"):
        fast(torch.randn(6, 4), scale)
    with pytest.raises(InputError, match=r"input scale: compiled for f32\[5, 3\], called with float"):
        fast(x, 2.0)
    with pytest.raises(InputError, match=r"input x: .*on cpu, called with .* on meta"):
        fast(x.to("meta"), scale)


def test_constants_of_the_example_call_are_part_of_what_was_compiled():
    class Flagged(torch.nn.Module):
        def forward(self, x, flag, times, mask=None):
            return x * times if flag else x

    x = torch.randn(3)
    fast = build(Flagged(), (x, True, 2, None))
    torch.testing.assert_close(fast(x, True, 2, None), x * 2)
    for call in ((x, False, 2, None), (x, True, 3, None), (x, True, 2, x), (x, 1, 2, None), (x, True, x, None)):
        with pytest.raises(InputError, match="compiled for"):
            fast(*call)


@pytest.mark.parametrize("lower", [lower_eager, lower_unmeasured])
def test_inputs_in_other_layouts_give_the_same_answers(lower):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(4, 8, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(288, 5))
    x = torch.randn(2, 4, 8, 8)
    wanted = model.double()(x.double()).float()
    model.float()
    other = x.to(memory_format=torch.channels_last)
    sliced = torch.zeros(2, 4, 8, 16)
    sliced[..., ::2] = x
    for example in (x, other):
        fast = build(model, (example,), lower=lower)
        for given in (x, other, sliced[..., ::2]):
            torch.testing.assert_close(fast(given), wanted, rtol=1e-4, atol=1e-5)


def test_dynamic_transposed_input_is_brought_into_the_compiled_layout():
    class Strided(torch.nn.Module):
        def forward(self, x):
            return torch.as_strided(x, (4,), (1,)) + x[0].sum()

    base = torch.arange(24.0).reshape(4, 6)
    fast = build(Strided(), (base.t(),), dynamic_shapes=({0: Dim("n", min=2, max=9)},))
    wanted = Strided()(base.t())
    torch.testing.assert_close(fast(base.t()), wanted)
    torch.testing.assert_close(fast(base.t().contiguous()), wanted)


def test_dynamic_sizes_ranges_and_relations():
    class Pair(torch.nn.Module):
        def forward(self, a, b):
            return (a @ b.transpose(0, 1)).softmax(-1), a.shape[0] * 2

    n = Dim("n", min=2, max=16)
    a, b = torch.randn(4, 8), torch.randn(5, 8)
    fast = build(Pair(), (a, b), dynamic_shapes=({0: n}, {0: n + 1}))
    for size in (1, 2, 7, 16):
        a, b = torch.randn(size, 8), torch.randn(size + 1, 8)
        got, twice = fast(a, b)
        torch.testing.assert_close(got, (a @ b.T).softmax(-1))
        assert twice == 2 * size
    with pytest.raises(InputError, match=r"from 1 to 16; called with \[\[17, 8\], \[18, 8\]\]"):
        fast(torch.randn(17, 8), torch.randn(18, 8))
    with pytest.raises(InputError, match=r"compiled for the sizes .* called with \[\[4, 8\], \[4, 8\]\]"):
        fast(torch.randn(4, 8), torch.randn(4, 8))
    with pytest.raises(InputError, match=r"called with torch.float32 \[4, 9\]"):
        fast(torch.randn(4, 9), torch.randn(5, 8))


def test_divisibility_that_the_trace_assumed_is_checked():
    class Halves(torch.nn.Module):
        def forward(self, x):
            return x * 2 if x.shape[0] % 2 == 0 else x

    fast = build(Halves(), (torch.ones(6, 4),), dynamic_shapes=({0: Dim.AUTO},))
    torch.testing.assert_close(fast(torch.ones(8, 4)), torch.full((8, 4), 2.0))
    with pytest.raises(InputError, match="Mod"):
        fast(torch.ones(7, 4))


class Shift(torch.nn.Module):
    """Two buffers that hand a value on: the second gets what the first held before the call."""

    def __init__(self):
        super().__init__()
        self.register_buffer("first", torch.zeros(3))
        self.register_buffer("second", torch.zeros(3))

    def forward(self, x):
        self.second.copy_(self.first)
        self.first.copy_(x)
        return self.second + x


def test_buffers_are_written_back_in_the_values_they_had_before_the_call():
    ours, theirs = Shift(), Shift()
    fast = build(ours, (torch.zeros(3),))
    for step in range(4):
        x = torch.full((3,), float(step + 1))
        torch.testing.assert_close(fast(x), theirs(x))
        torch.testing.assert_close(fast.first, theirs.first)
        torch.testing.assert_close(fast.second, theirs.second)


def test_mutated_inputs_are_written_back_and_measuring_writes_nothing():
    class Push(torch.nn.Module):
        def forward(self, x):
            x.add_(1)
            return x * 2

    fast = build(Push(), (torch.zeros(3),))
    x = torch.zeros(3)
    fast.measured((x,))
    torch.testing.assert_close(x, torch.zeros(3))
    torch.testing.assert_close(fast(x), torch.full((3,), 2.0))
    torch.testing.assert_close(x, torch.ones(3))


class Out(NamedTuple):
    low: torch.Tensor
    rest: dict


def test_nested_results_keep_their_structure():
    class Nest(torch.nn.Module):
        def forward(self, x):
            return Out(x - 1, {"list": [x, None, 3], "tuple": (x + 1,)})

    x = torch.randn(2)
    got = build(Nest(), (x,))(x)
    assert isinstance(got, Out) and got.rest["list"][1:] == [None, 3] and isinstance(got.rest["tuple"], tuple)
    torch.testing.assert_close(got.rest["tuple"][0] - got.low, torch.full((2,), 2.0))


def test_two_threads_get_their_own_answers(pair):
    model, _, _, _ = pair
    fast = build(model, (torch.randn(5, 4), torch.randn(5, 3)))
    wrong = []

    def work(seed):
        generator = torch.Generator().manual_seed(seed)
        for _ in range(200):
            x, scale = torch.randn(5, 4, generator=generator), torch.randn(5, 3, generator=generator)
            with torch.no_grad():
                if not torch.allclose(fast(x, scale), torch.relu(model.linear(x)) * scale, atol=1e-5):
                    wrong.append(seed)

    in_threads(work, (1, 2))
    assert not wrong


def test_attributes_of_the_model_pass_through(pair):
    model, x, scale, _ = pair
    fast = build(model, (x, scale))
    assert fast.config == {"width": 4} and fast.linear is model.linear
    with pytest.raises(AttributeError, match="nothing_like_it"):
        _ = fast.nothing_like_it
    alone = Executable(fast.program, fast.choices)
    with pytest.raises(AttributeError, match=r"'config'.*attributes of the model are not available"):
        _ = alone.config
    assert not hasattr(alone, "nothing_like_it")


def test_gradients_stay_off_inside_and_on_outside(pair):
    model, x, scale, _ = pair
    fast = build(model, (x, scale))
    assert not fast(x.requires_grad_(), scale).requires_grad
    assert torch.is_grad_enabled()
    with pytest.raises(InputError):
        fast(x.detach().double(), scale)
    assert torch.is_grad_enabled()


def test_values_die_with_their_last_use():
    fast = build(torch.nn.Sequential(torch.nn.ReLU(), torch.nn.Tanh(), torch.nn.Sigmoid()), (torch.ones(4),))
    inside = []
    program = fast.program
    node = next(n for n in program.graph.nodes if "tanh" in str(n.target))
    original = node.target

    def watched(value):
        inside.append(weakref.ref(value))
        return original(value)

    def late(value):
        gc.collect()
        inside.append(inside[0]() is None)
        return torch.sigmoid(value)

    node.target = watched
    next(n for n in program.graph.nodes if "sigmoid" in str(n.target)).target = late
    x = torch.ones(4)
    result = Executable(program, lower_eager(program, CPU))(x)
    assert inside[1] is True, "the output of relu is alive after tanh, its last use"
    alive = weakref.ref(x), weakref.ref(result)
    del x, result
    gc.collect()
    assert alive[0]() is None and alive[1]() is None


def test_overhead_per_call_is_below_two_microseconds():
    class Chain(torch.nn.Module):
        def forward(self, x):
            for _ in range(200):
                x = x + 1.0
            return x

    x = torch.ones(4)
    fast, add = build(Chain(), (x,), lower=lower_eager), torch.add

    def plain():
        value = x
        for _ in range(200):
            value = add(value, 1.0)
        return value

    def seconds(call):
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    with torch.no_grad():
        assert torch.equal(fast(x), plain())
        rounds = [(seconds(lambda: fast(x)), seconds(plain)) for _ in range(60)]
    extra = (min(r[0] for r in rounds) - min(r[1] for r in rounds)) / 200
    assert extra < 2e-6, f"{extra * 1e6:.2f} us of overhead per call"
    assert statistics.median(a / b for a, b in rounds) < 1.5


class Stem(torch.nn.Module):
    """Tokens from a convolution, whose result oneDNN lays out in its own way, and the best of them."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 8, 4, 4)

    def forward(self, x):
        tokens = self.conv(x).flatten(2).transpose(1, 2) * 2
        size = torch.ones(tokens.shape[:2])
        return tuple(ops.merge_tokens()(tokens, size, tokens, 5, [0])[:2])


def test_kernels_find_the_layout_that_they_were_compiled_for():
    torch.manual_seed(0)
    model, x = Stem(), torch.randn(2, 3, 24, 24)
    fast = build(model, (x,))
    assert [c.kernel.backend for c in fast.choices if c.region.nodes[0].target == ops.merge_tokens()] == ["tvm"]
    for got, wanted in zip(fast(x), model(x), strict=True):
        torch.testing.assert_close(got, wanted)
