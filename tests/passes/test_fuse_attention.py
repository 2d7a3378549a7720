"""fuse-attention: every spelling is found, nothing else is, and masked rows keep their value."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from torchlathe.passes.base import Refusal
from torchlathe.passes.exact.fuse_attention import FuseAttention

INF = math.inf
B, H, S, D = 2, 3, 17, 4


class Call(nn.Module):
    """A function as a module, with tensors that are weights."""

    def __init__(self, function, **weights):
        super().__init__()
        self.function = function
        for name, value in weights.items():
            self.register_buffer(name, value)
        self.names = tuple(weights)

    def forward(self, *args):
        return self.function(*args, *(getattr(self, name) for name in self.names))


def qkv(*sizes, dtype=torch.float64, queries=S, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = sizes or (B, H)
    return tuple(torch.randn(*sizes, n, D, generator=generator, dtype=torch.float64).to(dtype) for n in (queries, S, S))


def count(program, word):
    return sum(word in str(n.target) for n in program.graph.nodes)


def check_fires(ask, function, args, sites=1, **options):
    """All attentions are found; no softmax is left; answers equal eager's (within float64 rounding in most tests)."""
    model = function if isinstance(function, nn.Module) else Call(function)
    before, after, found = ask(FuseAttention(), model, args, **options)
    assert found == sites, str(found)
    assert count(before, "softmax") == sites and count(before, "scaled_dot_product") == 0
    assert count(after, "softmax") == 0 and count(after, "scaled_dot_product") == sites
    return after


def operators(program):
    return [n for n in program.graph.nodes if "scaled_dot_product" in str(n.target)]


def operator(program):
    return operators(program)[0]


def check_refuses(ask, function, args, reason, **options):
    model = function if isinstance(function, nn.Module) else Call(function)
    _, _, found = ask(FuseAttention(), model, args, **options)
    assert isinstance(found, Refusal) and reason in found.reason, str(found)
    return found


def norm(q, k, v):
    return ((q * 0.5) @ (k * 0.5).mT).softmax(-1) @ v


SPELLINGS = {
    "transpose": (1.0, lambda q, k, v: (q @ k.transpose(-1, -2)).softmax(-1) @ v),
    "divide": (0.5, lambda q, k, v: torch.softmax(q @ k.transpose(2, 3) / 2, dim=3) @ v),
    "times": (0.3, lambda q, k, v: F.softmax(0.3 * torch.matmul(q, k.mT), dim=-1).matmul(v)),
    "negative": (-0.3, lambda q, k, v: F.softmax(torch.matmul(q, k.mT) * -0.3, dim=-1).matmul(v)),
    "permute": (0.25, lambda q, k, v: (q @ k.permute(0, 1, 3, 2) * 0.25).softmax(-1) @ v),
    "swapaxes": (0.25, lambda q, k, v: (q @ k.swapaxes(-1, 2) * 0.25).softmax(-1) @ v),
    "on q": (0.25, lambda q, k, v: (q * 0.25 @ k.mT).softmax(-1) @ v),
    "on k": (0.25, lambda q, k, v: (q @ (k / 4).mT).softmax(-1) @ v),
    "on both": (0.25, norm),
    "on all": (0.125, lambda q, k, v: ((q * 0.5) @ (k * 0.5).mT * 0.5).softmax(-1) @ v),
    "tensor": (0.5, lambda q, k, v: (q @ k.mT / torch.sqrt(torch.tensor(D))).softmax(-1) @ v),
    "full": (0.5, lambda q, k, v: (q @ k.mT / torch.full([], 2.0, dtype=q.dtype)).softmax(-1) @ v),
    "one element": (0.5, lambda q, k, v: (q @ k.mT * torch.full((1, 1), 0.5, dtype=q.dtype)).softmax(-1) @ v),
    "shifted": (1.0, lambda q, k, v: (q @ k.mT + 3).softmax(-1) @ v),
    "upcast": (1.0, lambda q, k, v: (q @ k.mT).softmax(-1, dtype=torch.float64).to(q.dtype) @ v),
    "special": (1.0, lambda q, k, v: torch.special.softmax(q @ k.mT, -1) @ v),
    "dropout": (1.0, lambda q, k, v: F.dropout((q @ k.mT).softmax(-1), 0.1, training=False) @ v),
    "einsum": (
        0.5,
        lambda q, k, v: torch.einsum("bhqk,bhkd->bqhd", (torch.einsum("bhqd,bhkd->bhqk", q, k) * 0.5).softmax(-1), v),
    ),
    "einsum turned": (1.0, lambda q, k, v: torch.einsum("bhkd, bhqd -> bhqk", k, q).softmax(-1) @ v),
    "einsum dots": (
        1.0,
        lambda q, k, v: torch.einsum("...ij,...jd->...id", torch.einsum("...id,...jd->...ij", q, k).softmax(-1), v),
    ),
    "views": (
        0.5,
        lambda q, k, v: torch.bmm(
            (torch.bmm(q.reshape(-1, S, D), k.reshape(-1, S, D).transpose(1, 2)).view(B, H, S, S) / 2)
            .softmax(-1)
            .view(B * H, S, S),
            v.reshape(-1, S, D),
        ).view(B, H, S, D),
    ),
    "baddbmm": (
        0.5,
        lambda q, k, v: torch.bmm(
            torch.baddbmm(q.new_zeros(1), q.flatten(0, 1), k.flatten(0, 1).mT, beta=0, alpha=0.5).softmax(-1),
            v.flatten(0, 1),
        ),
    ),
    "merged heads": (
        1.0,
        lambda q, k, v: ((q @ k.mT).softmax(-1) @ v).transpose(1, 2).contiguous().view(B, S, H * D) * 2,
    ),
    "flat at once": (
        1.0,
        lambda q, k, v: ((q.transpose(1, 2).contiguous().transpose(1, 2) @ k.mT).softmax(-1) @ v).view(-1),
    ),
    "one head": (1.0, lambda q, k, v: (q[0, 0] @ k[0, 0].T).softmax(-1) @ v[0, 0]),
    "three dimensions": (1.0, lambda q, k, v: (q[0] @ k[0].mT).softmax(-1) @ v[0]),
    "keys for all": (1.0, lambda q, k, v: (q @ k[:1, :1].mT).softmax(-1) @ v[:, :1]),
    "einsum shared keys": (
        1.0,
        lambda q, k, v: torch.einsum("bhqk,bkd->bhqd", torch.einsum("bhqd,bkd->bhqk", q, k[:, 0]).softmax(-1), v[:, 0]),
    ),
    "wide values": (1.0, lambda q, k, v: (q @ k.mT).softmax(-1) @ torch.cat([v, v + 1], -1)),
}


def test_spellings(ask):
    functions = [function for _, function in SPELLINGS.values()]
    after = check_fires(ask, lambda *args: [function(*args) for function in functions], qkv(), sites=len(functions))
    for (name, (scale, _)), node in zip(SPELLINGS.items(), operators(after), strict=True):
        assert math.isclose(node.kwargs["scale"], scale, rel_tol=1e-6), name


def test_more_than_two_batch_dimensions(ask):
    def windows(q, k, v, mask, bias):
        return ((q @ k.mT + mask[:, None]) * 0.5 + bias).softmax(-1) @ v

    args = (*qkv(2, 3, 2), torch.randn(3, S, S).double(), torch.randn(2, S, S).double())
    after = check_fires(ask, windows, args)
    assert operator(after).meta["val"].shape == (6, 2, S, D)


def test_baddbmm_with_a_mask(ask):
    def bloom(q, k, v, alibi, mask):
        scores = torch.baddbmm(alibi, q.flatten(0, 1), k.flatten(0, 1).mT, beta=1.0, alpha=0.5).view(B, H, S, S)
        return torch.bmm((scores + mask).softmax(-1).view(B * H, S, S), v.flatten(0, 1))

    check_fires(ask, bloom, (*qkv(), torch.randn(B * H, 1, S).double(), torch.randn(B, 1, S, S).double()))


def test_scaled_by_a_tensor(ask):
    def swin(q, k, v, scale, bias):
        return (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT * scale.exp() + bias).softmax(-1) @ v

    check_fires(ask, swin, (*qkv(), torch.randn(H, 1, 1).double(), torch.randn(H, S, S).double()))


def test_scaled_after_the_mask_scales_the_mask(ask):
    check_fires(ask, lambda q, k, v, m: ((q @ k.mT + m) * 0.5).softmax(-1) @ v, (*qkv(), torch.randn(S, S).double()))


def test_two_products_of_which_one_is_the_bias(ask):
    def disentangled(q, k, v, position):
        return ((q @ k.mT + q @ position.mT) * 0.5).softmax(-1) @ v

    check_fires(ask, disentangled, (*qkv(), torch.randn(S, D).double()))


def test_grouped_heads_are_not_repeated(ask):
    def repeat(x):
        return x[:, :, None].expand(B, 2, 3, S, D).reshape(B, 6, S, D)

    def grouped(q, k, v):
        return (q @ repeat(k).mT * 0.5).softmax(-1) @ repeat(v)

    def interleaved(q, k, v):
        return (q @ k.repeat_interleave(3, 1).mT * 0.5).softmax(-1) @ v.repeat_interleave(3, dim=1)

    q, k, v = qkv(B, 6)[0], *qkv(B, 2)[1:]
    for function in (grouped, interleaved):
        after = check_fires(ask, function, (q, k, v))
        assert operator(after).kwargs["enable_gqa"] and count(after, "expand") + count(after, "repeat") == 0


def test_keys_tiled_over_heads_are_not_grouped(ask):
    """`repeat` puts copies of all heads one after the other: query head 1 reads key head 1, not key head 0."""
    q, k, v = qkv(B, 6)[0], *qkv(B, 2)[1:]
    after = check_fires(
        ask, lambda q, k, v: (q @ k.repeat(1, 3, 1, 1).mT).softmax(-1) @ v.repeat(1, 3, 1, 1), (q, k, v)
    )
    assert "enable_gqa" not in operator(after).kwargs


def dead_rows():
    """True = masked: padding, a row without any key, and a row whose first keys are masked."""
    mask = torch.zeros(B, 1, S, S, dtype=torch.bool)
    mask[1, ..., 3:], mask[0, 0, 1], mask[0, 0, 2, :4] = True, True, True
    return mask


FILLS = {
    "masked_fill": lambda x, m, v: x.masked_fill(m, v),
    "where keep": lambda x, m, v: torch.where(~m, x, v),
    "where drop": lambda x, m, v: torch.where(m, torch.tensor(v, dtype=x.dtype), x),
    "full_like": lambda x, m, v: torch.where(m, torch.full_like(x, v), x),
    "expanded": lambda x, m, v: x.masked_fill(m.expand_as(x), v),
    "added": lambda x, m, v: x + torch.zeros_like(m, dtype=x.dtype).masked_fill(m, v),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_masked_rows_keep_their_value(ask, dtype):
    cases = [(fill, value) for fill in FILLS for value in (-INF, torch.finfo(dtype).min, -1e9, -1e4)]
    if dtype is torch.bfloat16:
        cases = [case for case in cases if case[0] != "added" or case[1] < -1e30]

    def masked(q, k, v, mask):
        return [FILLS[fill](q @ k.mT * 0.5, mask, value).softmax(-1) @ v for fill, value in cases]

    check_fires(ask, masked, (*qkv(dtype=dtype), dead_rows()), sites=len(cases))
    check_fires(ask, masked, (*qkv(dtype=dtype), torch.ones(1, 1, 1, S, dtype=torch.bool)), sites=len(cases))


def test_masks_that_bfloat16_rounds_scores_to(ask):
    """Eager gives x - 1e4 as a multiple of 64 then: no mask of the operator does that."""

    def masked(q, k, v, mask):
        return FILLS["added"](q @ k.mT, mask, -1e4).softmax(-1) @ v

    check_refuses(ask, masked, (*qkv(dtype=torch.bfloat16), dead_rows()), "rounds its scores to")


def test_masked_rows_in_float16(ask):
    """Eager rounds x - 65504 to a multiple of 32; the operator does not: only what is exact goes through."""
    args = (*qkv(dtype=torch.float16), dead_rows())
    added = FILLS["added"]

    def exact(q, k, v, m):
        scores = [(q @ k.mT).masked_fill(m, x) for x in (-INF, -65504.0, -1e4)] + [added(q @ k.mT, m, -INF)]
        return [s.softmax(-1) @ v for s in scores]

    check_fires(ask, exact, args, sites=4)
    check_refuses(ask, lambda q, k, v, m: added(q @ k.mT, m, -65504.0).softmax(-1) @ v, args, "rounds its scores to")
    upcast = (*args[:3], args[3].float() * -1e30)
    check_fires(ask, lambda q, k, v, m: ((q @ k.mT).float() + m).softmax(-1).to(q.dtype) @ v, upcast)


def test_added_mask_of_unknown_content(ask):
    masks = []
    for value in (-INF, torch.finfo(torch.float32).min, -1e4, math.nan):
        for shape in ((B, 1, S, S), (S, S), (S,), (B, 1, 1, S), (1, H, S, S), (1, S, S)):
            mask = torch.zeros(shape)
            mask.view(-1, *shape[-2:])[:, 1 if shape[-2:] == (S, S) else 0] = value
            masks.append(mask)

    def masked(q, k, v, masks):
        return [(q @ k.mT * 0.5 + mask).softmax(-1) @ v for mask in masks]

    check_fires(ask, masked, (*qkv(dtype=torch.float32), masks), sites=len(masks))


def test_subtracted_and_old_style_masks(ask):
    keep = (~dead_rows()).double()
    args = (*qkv(), keep)

    def masked(q, k, v, m):
        scores = q @ k.mT - (1 - m) * 1e9, q @ k.mT + (1.0 - m) * torch.finfo(m.dtype).min, q @ k.mT + m.log()
        return [s.softmax(-1) @ v for s in scores], torch._safe_softmax(q @ k.mT + m.log(), -1) @ v

    check_fires(ask, masked, args, sites=4)


def test_two_masks(ask):
    lowest = torch.finfo(torch.float64).min
    causal = torch.ones(S, S, dtype=torch.bool).tril()
    padding = torch.zeros(B, 1, 1, S).double()
    padding[0, ..., :2] = lowest

    def masked(q, k, v, p):
        scores = [torch.where(causal, q @ k.mT, lowest) + p, (q @ k.mT + p).masked_fill(~causal, -INF)]
        return [s.softmax(-1) @ v for s in (*scores, (q @ k.mT).masked_fill(~causal, -INF) + p)]

    check_fires(ask, masked, (*qkv(), padding), sites=3)


def causal_constant(q, k, v, mask):
    return (q @ k.mT * 0.5).masked_fill(mask == 0, -INF).softmax(-1) @ v


def causal_in_place(q, k, v):
    hidden = torch.triu(torch.full((S, S), -INF, dtype=q.dtype), diagonal=1)
    return (q @ k.mT * 0.5 + hidden).softmax(-1) @ v


def causal_positions(q, k, v):
    at = torch.arange(S)
    return torch.where(at[None, :] <= at[:, None], q @ k.mT * 0.5, -1e9).softmax(-1) @ v


def test_constant_causal_masks_become_the_flag(ask):
    for model in (
        Call(causal_constant, mask=torch.ones(1, 1, S, S).tril()),
        Call(causal_in_place),
        Call(causal_positions),
    ):
        node = operator(check_fires(ask, model, qkv()))
        assert node.args[3] is None and node.args[5] is True


def test_what_is_almost_causal_stays_a_mask(ask):
    broken = torch.ones(1, 1, S, S).tril()
    broken[..., 3, 1] = 0
    shifted = torch.ones(S, S).tril(1)
    for mask in (broken, shifted, torch.ones(S, S).triu()):
        node = operator(check_fires(ask, Call(causal_constant, mask=mask), qkv()))
        assert node.args[3] is not None and node.args[5] is False
    node = operator(check_fires(ask, Call(causal_constant, mask=torch.ones(2, S).tril()), qkv(queries=2)))
    assert node.args[5] is False
    node = operator(check_fires(ask, causal_constant, (*qkv(), torch.ones(S, S).tril())))  # an input may change
    assert node.args[5] is False


def test_constant_masks_that_hide_nothing_go_away(ask):
    node = operator(check_fires(ask, Call(causal_constant, mask=torch.ones(S, S)), qkv()))
    assert node.args[3] is None and node.args[5] is False


def test_scale_of_shared_queries_stays(ask):
    def shared(q, k, v):
        q = q * 0.5
        return (q @ k.mT).softmax(-1) @ v + q

    assert operator(check_fires(ask, shared, qkv())).kwargs["scale"] == 1.0


REFUSALS = {
    "used elsewhere": lambda q, k, v: ((p := (q @ k.mT).softmax(-1)) @ v, p),
    "scores are also used": lambda q, k, v: ((s := q @ k.mT).softmax(-1) @ v, s),
    "not the last one": lambda q, k, v: (q @ k.mT).softmax(-2) @ v,
    "dropout is active": lambda q, k, v: F.dropout((q @ k.mT).softmax(-1), 0.1, training=True) @ v,
    "no matrix product follows": lambda q, k, v: (q @ k.mT).softmax(-1).sum(-1) + v.sum(-1),
    "no product of queries and keys": lambda q, k, v: (q[..., :1] - k[..., 0].unsqueeze(-2)).softmax(-1) @ v,
    "right operand": lambda q, k, v: v.mT @ (q @ k.mT).softmax(-1),
    "after some were filled": lambda q, k, v: ((q @ k.mT).masked_fill(v[..., 0, None] > 0, -1e9) * 0.5).softmax(-1) @ v,
    "filled with -1000000": lambda q, k, v: (
        ((q @ k.mT).masked_fill(v[..., 0, None] > 0, -1e6) + q[..., :1]).softmax(-1) @ v
    ),
    "filled with -5.0": lambda q, k, v: (q @ k.mT).masked_fill(v[..., 0, None] > 0, -5.0).softmax(-1) @ v,
    "differs from key to key": lambda q, k, v: ((q @ k.mT) * v[..., 0].unsqueeze(-2)).softmax(-1) @ v,
    "adds a tensor": lambda q, k, v: torch.baddbmm(v[0], (q[0] @ k[0].mT).softmax(-1), v[0]),
    "not a weighted sum": lambda q, k, v: torch.einsum("bhqk,bhqd->bhkd", (q @ k.mT).softmax(-1), v),
    "no softmax in the program": lambda q, k, v: q @ k.mT @ v,
    "already one operator": lambda q, k, v: F.scaled_dot_product_attention(q, k, v),
}


@pytest.mark.parametrize("reason", REFUSALS)
def test_refusal(ask, reason):
    check_refuses(ask, REFUSALS[reason], qkv(), reason)


def test_a_refusal_names_the_line(ask):
    found = check_refuses(ask, REFUSALS["used elsewhere"], qkv(), "used elsewhere")
    assert found.node and "test_fuse_attention.py" in (found.where or "")


def test_upcast_half_precision(ask):
    """Queries and keys that were only widened for the scores go in as they are."""

    def upcast(q, k, v):
        return (q.float() @ k.float().mT * 0.5).softmax(-1).to(v.dtype) @ v

    for dtype in (torch.bfloat16, torch.float16):
        after = check_fires(ask, upcast, qkv(dtype=dtype))
        assert count(after, "_to_copy") == 0 and operator(after).meta["val"].dtype == dtype


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x, keep):
        q, k, v = (y.view(2, 6, 2, 4).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        scores = (q @ k.transpose(-2, -1) / math.sqrt(4)).masked_fill(~keep[:, None, None], -INF)
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(2, 6, 8))


def test_small_attention(ask, golden):
    keep = torch.ones(2, 6, dtype=torch.bool)
    keep[0, 4:], keep[1] = False, False
    golden(check_fires(ask, Attention(), (torch.randn(2, 6, 8), keep)).text())
