"""Models that broke something once: each gives eager's answers through `optimize`, and through torch.compile."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import torchlathe
from torchlathe.passes.errors import InputError
from torchlathe.passes.verify import difference


class Function(nn.Module):
    """A function of its inputs as a module, with parameters and buffers under the given names."""

    def __init__(self, function, **state):
        super().__init__()
        self.function = function
        for name, value in state.items():
            if isinstance(value, nn.Module):
                setattr(self, name, value)
            else:
                self.register_buffer(name, value)

    def forward(self, *inputs):
        return self.function(self, *inputs)


def leaves(value):
    return torch.utils._pytree.tree_leaves(value)


def check(model, *inputs, passes=None, level="default"):
    """The optimized model, after its answers on the inputs were compared with eager's."""
    fast = torchlathe.optimize(model.eval(), inputs, passes=passes, level=level)
    with torch.no_grad():
        size, place = difference(leaves(fast(*inputs)), leaves(model(*inputs)))
    assert size <= 1, f"{place} deviates {size} times the tolerance"
    return fast


def test_nan_to_bool():
    check(Function(lambda m, x: (x * 1.5).to(torch.bool)), torch.tensor([0.0, float("nan"), 2.0, -0.0] * 8))


def test_float16_overflows_as_in_eager():
    x = torch.full((4, 32), 300.0, dtype=torch.float16)
    check(Function(lambda m, x: F.layer_norm(x * x, (32,))), x)
    mask = torch.full((4, 32), torch.finfo(torch.float16).min, dtype=torch.float16)
    check(Function(lambda m, x, a: torch.softmax(x + a + a, -1)), x, mask)


def test_hardswish_of_large_numbers():
    layer = nn.Conv2d(1, 2, 1)
    check(nn.Sequential(layer, nn.Hardswish()), torch.tensor([[[[1e38, -1e38], [1.0, 3e38]]]]))


def test_outputs_keep_eager_strides():
    conv = nn.Conv2d(3, 8, 3).eval()
    x = torch.randn(2, 3, 16, 16)
    fast = check(conv, x)
    assert fast(x).stride() == conv(x).stride() and fast(x).view(2, -1).shape == (2, 8 * 14 * 14)


def test_operators_that_read_strides_after_a_convolution():
    conv = nn.Conv2d(3, 8, 3, padding=1)
    x = torch.randn(2, 3, 8, 8)
    check(Function(lambda m, x: torch.view_as_complex(m.conv(x).reshape(2, 8, 8, 4, 2)).abs(), conv=conv), x)
    check(Function(lambda m, x: torch.view_as_complex(m.w) * x, w=torch.randn(4, 2)), torch.randn(4))
    check(Function(lambda m, x: m.conv(x).as_strided((4, 4), (8, 1)) * 1, conv=conv), x)
    check(Function(lambda m, x: m.conv(x).view(torch.int32) + 0, conv=nn.Conv2d(3, 8, 3)), x * 0)


def test_reductions_and_squeezes_without_a_dimension():
    check(Function(lambda m, x: (x.squeeze() * 2, x.flatten().mean(), x.flatten().sum())), torch.randn(1, 8, 1))


def test_clusters_that_are_not_contiguous():
    def tangle(m, x, y):
        n1, u2 = x.relu(), y.exp()
        g = n1.prod(0)
        n2, u1 = n1 + u2, g * 2
        return n2, u1 + u2

    check(Function(tangle), torch.rand(4, 8, 16), torch.randn(8, 16))


def test_a_stored_and_a_computed_weight_of_one_shape():
    w = torch.randn(16, 16)
    check(Function(lambda m, x: F.linear(F.linear(x, m.w), (x.t() @ x).relu()), w=w), torch.randn(16, 16))


def test_bounds_that_are_sizes():
    model = Function(lambda m, x: m.layer(x).clamp(max=x.shape[0]), layer=nn.Linear(8, 8)).eval()
    fast = torchlathe.optimize(model, (torch.randn(3, 8),), dynamic_shapes=(({0: torch.export.Dim("n", max=64)},),))
    with torch.no_grad():
        for rows in (2, 5, 64):
            x = torch.randn(rows, 8) * 100
            assert difference([fast(x)], [model(x)])[0] <= 1


def test_expanded_examples():
    fast = check(Function(lambda m, x: (x * 2).relu()), torch.randn(1, 64).expand(8, 64))
    x = torch.randn(8, 64)
    assert torch.equal(fast(x), (x * 2).relu())


def test_defaults_and_autocast_of_the_caller_change_nothing():
    model = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.GELU()).eval()
    x = torch.randn(8, 64)
    fast = check(model, x)
    wanted = fast(x)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(fast(x), wanted)
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(fast(x), wanted)
    with torch.inference_mode():
        assert torch.equal(fast(x), wanted)


def test_carried_weights_are_never_packed():
    def decay(m, x):
        y = F.linear(x, m.w)
        m.w.mul_(0.5)
        return y

    w, x = torch.randn(64, 64), torch.randn(4, 64)
    fast = torchlathe.optimize(Function(decay, w=w.clone()).eval(), (x,))
    with torch.no_grad():
        found = [fast(x) for _ in range(3)]
    for step, value in enumerate(found):
        assert difference([value], [F.linear(x, w * 0.5**step)])[0] <= 1


def test_results_do_not_alias_constants_inputs_or_each_other():
    w = torch.randn(4, 4)
    fast = check(Function(lambda m: torch.einsum("ij->ji", m.w * 2), w=w), passes=["fold-constants"])
    wanted = fast().clone()
    fast().zero_()
    assert torch.equal(fast(), wanted)
    x = torch.randn(3, 5)
    copy = check(Function(lambda m, x: torch.einsum("ij->ij", x).clone()), x)(x)
    assert copy.data_ptr() != x.data_ptr()
    a, b = check(Function(lambda m, x: (torch.max(x, 1).values, torch.max(x, 1).values)), x)(x)
    assert a.data_ptr() != b.data_ptr()


@pytest.mark.parametrize("keys", [1, 5, 15, 16, 20])
def test_nan_queries_through_fused_attention(keys):
    def attend(m, q, k, v):
        return torch.softmax(q @ k.transpose(-2, -1) * 0.25, -1) @ v

    q, k, v = (torch.randn(1, 2, n, 16) for n in (6, keys, keys))
    q[0, 1, 3, 2] = float("nan")
    fast = check(Function(attend), q, k, v, passes=["fuse-attention"], level="fast")  # nothing is timed, so it stays
    assert fast.report.steps[0].kept


def test_masks_that_hide_nothing_are_not_causal():
    def attend(m, q):
        scores = (q @ q.transpose(-2, -1)).masked_fill(m.hidden, float("-inf"))
        return torch.softmax(scores, -1) @ q

    check(Function(attend, hidden=torch.zeros(1, 1, dtype=torch.bool)), torch.randn(1, 2, 20, 16))


def test_deep_models_do_not_recurse():
    def chain(m, x):
        for _ in range(500):
            x = x * 0.9 + 0.1
        return torch.softmax(m.b(m.a(x)), -1)

    report = torchlathe.explain(Function(chain, a=nn.Linear(8, 8), b=nn.Linear(8, 8)).eval(), (torch.randn(2, 8),))
    assert not [s.refusal for s in report.steps if "failed" in (s.refusal or "")]


def test_masked_logits_do_not_blind_the_comparison():
    wanted = torch.randn(100)
    wanted[0] = -1e9
    found = -wanted
    found[0] = -1e9
    assert difference([found], [wanted])[0] > 1


def test_a_pass_whose_result_cannot_run_is_dropped_not_fatal():
    from dataclasses import dataclass
    from typing import ClassVar

    from torchlathe.passes.base import Pass

    @dataclass(frozen=True)
    class Crash(Pass):
        name: ClassVar[str] = "crash"

        def run(self, program, ctx):
            raise ZeroDivisionError("division by zero")

    fast = check(nn.ReLU(), torch.randn(3), passes=[Crash()])
    assert "division by zero" in fast.report.steps[0].refusal


def test_the_executable_stands_for_the_model():
    model = nn.Linear(4, 4).eval()
    fast = check(model, torch.randn(2, 4))
    assert next(fast.parameters()) is model.weight and set(fast.state_dict()) == {"weight", "bias"}
    with pytest.raises(InputError, match="trained"):
        fast.train()
    with pytest.raises(InputError, match="converted"):
        fast.half()
    with pytest.raises(InputError, match=r"pass \(x,\)"):
        torchlathe.optimize(model, torch.randn(2, 4))


def test_random_numbers_of_the_user_are_left_alone():
    model = nn.Linear(4, 4).eval()
    torch.manual_seed(3)
    wanted = torch.rand(4)
    torch.manual_seed(3)
    torchlathe.optimize(model, (torch.ones(2, 4),))
    assert torch.equal(torch.rand(4), wanted)


def test_the_door_after_a_weight_update_keeps_sizes_dynamic():
    model = Function(lambda m, x: m.layer(x).reshape(x.shape[0] * 2, -1) * x.shape[0], layer=nn.Linear(8, 8)).eval()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="torchlathe", dynamic=True)
    with torch.no_grad():
        for rows in (64, 65, 64, 60, 7):
            if rows == 60:
                model.layer.weight.mul_(2)
            x = torch.randn(rows, 8)
            assert difference([compiled(x)], [model(x)])[0] <= 1


def test_the_door_with_written_inputs_that_share_memory():
    torch._dynamo.reset()

    def write(x, y):
        x.add_(1)
        return y * 2

    compiled = torch.compile(write, backend="torchlathe")
    with torch.no_grad():
        for _ in range(2):
            base, twin = torch.zeros(4, 8), torch.zeros(4, 8)
            assert torch.equal(compiled(base, base.view(32)), write(twin, twin.view(32)))


class TwoConvolutions(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = (torch.nn.Conv2d(8, 8, 3, padding=1) for _ in range(2))

    def forward(self, x):
        return torch.relu(self.second(self.first(x)))


@torch.no_grad()
def test_a_batch_known_at_run_time_through_kernels_that_change_the_layout():
    model = TwoConvolutions().eval()
    batch = torch.export.Dim("batch", min=2, max=64)
    fast = torchlathe.optimize(model, (torch.randn(3, 8, 12, 12),), dynamic_shapes=({0: batch},))
    for n in (2, 3, 7):
        x = torch.randn(n, 8, 12, 12)
        torch.testing.assert_close(fast(x), model(x), atol=1e-5, rtol=1e-5)
        assert fast(x).is_contiguous()


class KnownAndGivenWeight(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(64, 64))

    def forward(self, x, weight):
        return F.linear(x, self.weight), F.linear(x, weight)


@torch.no_grad()
@pytest.mark.parametrize("level", ["fast", "default"])
def test_a_constant_weight_and_a_given_one_of_the_same_size(level):
    model = KnownAndGivenWeight().eval()
    x, weight = torch.randn(256, 64), torch.randn(64, 64)
    fast = torchlathe.optimize(model, (x, weight), level=level)
    for ours, wanted in zip(fast(x, weight + 1), model(x, weight + 1), strict=True):
        torch.testing.assert_close(ours, wanted, atol=1e-4, rtol=1e-4)
