"""Functions that generated kernels call: what Triton's language lacks, with the corner cases that torch has."""

from __future__ import annotations

import os

import triton
import triton.language as tl

ALL = tl.constexpr(tl.PropagateNan.ALL)
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")


@triton.jit
def dot(a, b, sums):
    """sums + a @ b, accumulated in float32. Operands in float32 are not rounded to a shorter type."""
    if INTERPRETED and a.dtype == tl.bfloat16:  # the interpreter would multiply the bit patterns
        sums = tl.dot(a.to(tl.float32), b.to(tl.float32), sums)
    elif a.dtype == tl.float32:
        sums = tl.dot(a, b, sums, input_precision="ieee")
    else:
        sums = tl.dot(a, b, sums)
    return sums


@triton.jit
def nan_max(a, b):
    """The larger; NaN if either is."""
    return tl.maximum(a, b, propagate_nan=ALL)


@triton.jit
def nan_min(a, b):
    """The smaller; NaN if either is."""
    return tl.minimum(a, b, propagate_nan=ALL)


@triton.jit
def tanh(x):
    """Hyperbolic tangent: an odd polynomial near zero, where the quotient would cancel."""
    a = tl.abs(x)
    t = tl.exp(-2.0 * a)
    far = (1.0 - t) / (1.0 + t)
    s = a * a
    near = a * (1.0 + s * (-0.3333333333 + s * (0.1333333333 + s * (-0.0539682540 + s * 0.0218694885))))
    y = tl.where(a < 0.25, near, far)
    return tl.where(x < 0, -y, y)


@triton.jit
def log1p(x):
    """log(1 + x), exact to rounding for small x (Kahan's correction of the rounded sum)."""
    u = 1.0 + x
    d = u - 1.0
    y = tl.where(d == 0, x, tl.log(u) * (x / tl.where(d == 0, 1.0, d)))
    return tl.where(u == float("inf"), u, y)


@triton.jit
def expm1(x):
    """exp(x) - 1, exact to rounding for small x (Kahan)."""
    u = tl.exp(x)
    d = u - 1.0
    log = tl.where((u == 1.0) | (u == 0.0), 1.0, tl.log(u))
    y = tl.where(u == 1.0, x, d * (x / log))
    y = tl.where(u == 0.0, -1.0, y)
    return tl.where(u == float("inf"), u, y)


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x))."""
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def largest(score, exists, count):
    """Which elements of a vector are the `count` largest, of equal ones the first. No score may be NaN.

    The smallest key that is chosen is found bit by bit, and those equal to it are counted: no order of the sum and no
    order of threads can change the answer.
    """
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)  # -0.0 equals 0.0
    key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)  # in the order of the scores
    key = tl.where(exists, key, -(2**31))
    least = tl.full([], -(2**31), tl.int64)
    step = tl.full([], 2**31, tl.int64)
    for _ in range(32):
        enough = tl.sum((key >= least + step).to(tl.int32), 0) >= count
        least = tl.where(enough, least + step, least)
        step = step // 2
    more, same = key > least, key == least
    left = count - tl.sum(more.to(tl.int32), 0)
    return exists & (more | (same & (tl.cumsum(same.to(tl.int32), 0) <= left)))
