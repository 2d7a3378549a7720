"""Attention as model libraries hand it to torch: constant masks, repeated heads, rotary embedding, keys in pages."""

import torch
from torch import nn
from torch.nn import functional as F

B, H, S, D = 2, 6, 20, 8
TRIL = torch.ones(S, S, dtype=torch.bool).tril()


class Attend(nn.Module):
    """Attention under a constant mask, with each head of keys and values repeated as model libraries spell it."""

    def __init__(self, mask=None, group=1, values=None, spelling="expand"):
        super().__init__()
        self.register_buffer("mask", mask)
        self.group, self.values, self.spelling = group, group if values is None else values, spelling

    def repeat(self, x, n):
        if n == 1:
            return x
        if self.spelling == "interleave":
            return x.repeat_interleave(n, 1)
        b, h, s, d = x.shape
        return x[:, :, None].expand(b, h, n, s, d).reshape(b, h * n, s, d)

    def forward(self, q, k, v):
        keys, values = self.repeat(k, self.group), self.repeat(v, self.values)
        return F.scaled_dot_product_attention(q, keys, values, self.mask, scale=0.3)


def operands(group=1, values=None, queries=S, keys=S, batch=B):
    torch.manual_seed(0)
    heads = (H, H // group, H // (group if values is None else values))
    return tuple(torch.randn(batch, h, n, D) for h, n in zip(heads, (queries, keys, keys), strict=True))


def attention(program):
    (node,) = [n for n in program.graph.nodes if "scaled_dot_product" in str(n.target)]
    return node


def added(hidden, shape=(S, S), dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype).masked_fill(~torch.ones(shape, dtype=torch.bool).tril(), hidden)


def rotated(x, cos, sin):
    """Rotary embedding of heads [..., features]."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


def paged(q, keys, values, table):
    """Attention over pools [pages, keys of a page, heads, features] by a table [batch, pages of a text]."""
    k, v = (pool[table].view(table.shape[0], -1, *pool.shape[2:]).transpose(1, 2) for pool in (keys, values))
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != keys.shape[2])
