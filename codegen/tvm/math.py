"""Vector math as TIR expressions that LLVM keeps in registers: exp, log, erf, tanh and relatives in float32.

Every function takes the Block that receives the intermediate values and a float32 expression of the block's width.
NaN goes in and comes out; no function relies on fast-math flags. The polynomial and rational coefficients are own
fits: iteratively reweighted (Lawson) least squares in float64 on 2,000 to 4,000 Chebyshev points of the reduced
range, weighted so that the largest relative error is minimised, then rounded to float32; rational forms p(t)/q(t) are
linearised and divided by the previous denominator in each round (Sanathanan-Koerner). The stated errors were measured
on compiled kernels against float64 and are checked by tests/codegen/test_tvm_math.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm import tirx

LN2_HIGH, LN2_LOW = 0.693359375, -2.12194440e-4  # ln 2 in two parts: n * LN2_HIGH is exact for |n| < 2**15
ROUND = 12582912.0  # 1.5 * 2**23: adding it rounds to the nearest integer, kept in the low mantissa bits

EXP = (0.4999999403953552, 0.16666515171527863, 0.04166845604777336, 0.00836941134184599, 0.001381315873004496)
EXP2 = (0.6931470036506653, 0.24022242426872253, 0.05550733581185341, 0.009671512991189957, 0.001326472731307149)
LOG = (0.3333333134651184, -0.250008225440979, 0.20001226663589478, -0.16623356938362122, 0.14201761782169342,
       -0.131601944565773, 0.12761549651622772, -0.07634429633617401)  # fmt: skip
ERF_P = (1.1283791065216064, 0.19059383869171143, 0.052769310772418976, 0.003772553987801075, 0.00028484369977377355,
         2.0460277028178098e-06)  # fmt: skip
ERF_Q = (1.0, 0.5022421479225159, 0.11418275535106659, 0.014983206056058407, 0.0011638588039204478,
         3.804778680205345e-05)  # fmt: skip
TANH_P = (1.0, 0.13379713892936707, 0.003494030563160777, 2.0583418518071994e-05, 1.3318991243238543e-08)
TANH_Q = (1.0, 0.46713030338287354, 0.02587105892598629, 0.00032830864074639976, 7.761985330034804e-07)


class Block:
    """A straight run of statements at one vector width; values are bound once so that no expression is repeated."""

    def __init__(self, lanes: int) -> None:
        self.lanes = lanes
        self.statements: list[Any] = []

    def dtype(self, scalar: str) -> str:
        """Name of the vector type of this block's width."""
        return scalar if self.lanes == 1 else f"{scalar}x{self.lanes}"

    def let(self, value: Any) -> Any:
        """Keep a value in a register of its own.

        Numbers go through local buffers of one element, which LLVM promotes, because TVM's analysers copy every bound
        value into its uses: exponential time on straight-line code. The element is the whole vector: TVM writes a
        vector lane by lane to a buffer of scalars. Offsets are bound; conditions stay expressions.
        """
        dtype = str(value.ty.dtype)
        if isinstance(value, tirx.Var) or "bool" in dtype:
            return value
        if dtype == "int64":
            var = tirx.Var("v", "int64")
            self.statements.append(tirx.Bind(var, value))
            return var
        kept = register(dtype)
        self.statements += [on_stack(kept), assign(kept, value)]
        return read(kept)

    def const(self, value: float | int | bool, scalar: str = "float32") -> Any:
        """A constant in all lanes."""
        if scalar == "bool":
            return self.spread(tirx.const(bool(value), "bool"))
        if isinstance(value, float) and scalar == "float32" and (value != value or value in (INF, -INF)):
            bits = {INF: 0x7F800000, -INF: -0x800000}.get(value, 0x7FC00000)
            return tirx.reinterpret(self.dtype("float32"), self.spread(tirx.const(bits, "int32")))
        return self.spread(tirx.const(value, scalar))

    def spread(self, value: Any) -> Any:
        """A scalar in all lanes."""
        return value if self.lanes == 1 else tirx.Broadcast(value, self.lanes)

    def select(self, condition: Any, yes: Any, no: Any) -> Any:
        """Lane-wise choice, bound."""
        return self.let(tirx.Select(condition, yes, no))

    def bits(self, value: Any) -> Any:
        """The int32 bit pattern of a float32 value."""
        return self.let(tirx.reinterpret(self.dtype("int32"), value))

    def float_of(self, bits: Any) -> Any:
        """The float32 value of an int32 bit pattern."""
        return self.let(tirx.reinterpret(self.dtype("float32"), bits))

    def horner(self, x: Any, coefficients: Sequence[float]) -> Any:
        """The polynomial with these coefficients, constant term first."""
        result = self.const(coefficients[-1])
        for c in reversed(coefficients[:-1]):
            result = self.let(result * x + self.const(c))
        return result


INF = float("inf")


def on_stack(buffer: Any) -> Any:
    """Allocate a buffer of static size in the function's frame (TVM's default is a call to its workspace pool)."""
    return tirx.AllocBuffer(buffer, {"disable_lower_builtin": tirx.const(True, "bool")})


def register(dtype: str, count: int = 1) -> Any:
    """Local variables of a scalar or vector type; LLVM keeps them in registers where their indices are constant."""
    return tirx.decl_buffer((count,), dtype, "v", scope="local")


def assign(variable: Any, value: Any, index: int = 0) -> Any:
    """The statement that gives a register its value."""
    return tirx.BufferStore(variable, value, [tirx.IntImm("int64", index)])


def read(variable: Any, index: int = 0) -> Any:
    """The value of a register."""
    return tirx.BufferLoad(variable, [tirx.IntImm("int64", index)])


def is_nan(b: Block, x: Any) -> Any:
    """True where x is NaN."""
    return differs(b, x, x)


def differs(b: Block, x: Any, y: Any) -> Any:
    """x != y, true for NaN. TVM compares with "ordered and unequal" and folds comparisons of equal expressions; the
    copy and the detour over integers get round both."""
    flag = b.let(tirx.Select(tirx.EQ(x, b.let(y)), b.const(0, "int32"), b.const(1, "int32")))
    return tirx.NE(flag, b.const(0, "int32"))


def clamp(b: Block, x: Any, low: float, high: float) -> Any:
    """x limited to [low, high]; NaN stays NaN."""
    x = b.select(x < b.const(low), b.const(low), x)
    return b.select(x > b.const(high), b.const(high), x)


def maximum(b: Block, x: Any, y: Any) -> Any:
    """The larger one, NaN if either is NaN (as torch.maximum)."""
    return b.select(tirx.Or(x > y, is_nan(b, x)), x, y)


def minimum(b: Block, x: Any, y: Any) -> Any:
    """The smaller one, NaN if either is NaN (as torch.minimum)."""
    return b.select(tirx.Or(x < y, is_nan(b, x)), x, y)


def exp(b: Block, x: Any) -> Any:
    """e**x within 1.1 ulp; exp(89) = Inf, exp(-Inf) = 0, results below 2**-126 underflow gradually.

    x = n ln 2 + r with |r| <= ln 2 / 2; e**r = 1 + r + r**2 q(r), q of degree 4. 2**n is applied in two factors, which
    makes overflow and gradual underflow come out right.
    """
    x = clamp(b, x, -104.0, 89.0)
    shifted = b.let(x * b.const(1.4426950408889634) + b.const(ROUND))
    n = b.let(shifted - b.const(ROUND))
    r = b.let(x - n * b.const(LN2_HIGH))
    r = b.let(r - n * b.const(LN2_LOW))
    q = b.horner(r, EXP)
    power = b.let(q * b.let(r * r) + r)
    power = b.let(power + b.const(1.0))
    whole = b.let(b.bits(shifted) - b.const(0x4B400000, "int32"))
    half = b.let(whole >> b.const(1, "int32"))
    first = b.float_of((half + b.const(127, "int32")) << b.const(23, "int32"))
    second = b.float_of((whole - half + b.const(127, "int32")) << b.const(23, "int32"))
    return b.let(b.let(power * first) * second)


def exp2_nonpositive(b: Block, x: Any) -> Any:
    """2**x for x <= 0, relative error <= 4e-7; exactly 0 below 2**-126, NaN for NaN. The power of softmax.

    x = n + r with |r| <= 1/2; 2**r is a polynomial of degree 5, 2**n comes from the low bits of the rounded sum.
    """
    shifted = b.let(x + b.const(ROUND + 127.0))
    r = b.let(x - b.let(shifted - b.const(ROUND + 127.0)))
    power = b.let(b.horner(r, EXP2) * r + b.const(1.0))
    scale = b.float_of(b.bits(shifted) << b.const(23, "int32"))
    return b.select(x < b.const(-126.0), b.const(0.0), power * scale)


def log(b: Block, x: Any) -> Any:
    """Natural logarithm within 2 ulp; log(0) = -Inf, log(x < 0) = NaN, log(Inf) = Inf; subnormals included."""
    tiny = x < b.const(1.1754943508222875e-38)
    scaled = b.select(tiny, x * b.const(8388608.0), x)
    bits = b.bits(scaled)
    # the exponent of x / sqrt(0.5): the mantissa lands in [sqrt(0.5), sqrt(2))
    n = b.let((bits - b.const(0x3F3504F3, "int32")) >> b.const(23, "int32"))
    f = b.let(b.float_of(bits - (n << b.const(23, "int32"))) - b.const(1.0))
    e = b.let(tirx.Cast(b.dtype("float32"), n) + tirx.Select(tiny, b.const(-23.0), b.const(0.0)))
    square = b.let(f * f)
    q = b.let(b.horner(f, LOG) * b.let(square * f))
    q = b.let(q + e * b.const(LN2_LOW))
    q = b.let(q - square * b.const(0.5))
    result = b.let(b.let(q + f) + e * b.const(LN2_HIGH))
    result = b.select(x == b.const(INF), x, result)
    result = b.select(x == b.const(0.0), b.const(-INF), result)
    return b.select(tirx.Or(x < b.const(0.0), is_nan(b, x)), b.const(float("nan")), result)


def log1p(b: Block, x: Any) -> Any:
    """log(1 + x) within 4 ulp for x >= 0: log(w) x / (w - 1) with w = 1 + x rounded (x itself where w is 1)."""
    w = b.let(x + b.const(1.0))
    low = b.let(w - b.const(1.0))
    corrected = b.let(log(b, w) * b.let(x / low))
    return b.select(low == b.const(0.0), x, b.select(w == b.const(INF), w, corrected))


def _saturated(b: Block, x: Any, value: Any, limit: float) -> Any:
    """value limited to [-1, 1], and exactly +-1 where x lies beyond the limit."""
    value = clamp(b, value, -1.0, 1.0)
    value = b.select(x > b.const(limit), b.const(1.0), value)
    return b.select(x < b.const(-limit), b.const(-1.0), value)


def _odd_rational(b: Block, x: Any, limit: float, p: Sequence[float], q: Sequence[float]) -> tuple[Any, Any]:
    x = clamp(b, x, -limit, limit)
    square = b.let(x * x)
    return b.let(b.horner(square, p) * x), b.horner(square, q)


def erf(b: Block, x: Any) -> Any:
    """Error function, absolute and relative error <= 5e-7; exactly +-1 beyond +-3.9."""
    p, q = _odd_rational(b, x, 3.925, ERF_P, ERF_Q)
    return _saturated(b, x, b.let(p / q), 3.9)


def tanh(b: Block, x: Any) -> Any:
    """Hyperbolic tangent, absolute and relative error <= 5e-7; exactly +-1 beyond +-9.01."""
    p, q = _odd_rational(b, x, 9.02, TANH_P, TANH_Q)
    return _saturated(b, x, b.let(p / q), 9.01)


def expm1_negative(b: Block, x: Any) -> Any:
    """e**x - 1 for x <= 0, relative error <= 1e-6: 2 tanh(x/2) / (1 - tanh(x/2)) without cancellation."""
    p, q = _odd_rational(b, b.let(x * b.const(0.5)), 9.02, TANH_P, TANH_Q)
    return b.let(b.let(p + p) / b.let(q - p))


def sigmoid(b: Block, x: Any) -> Any:
    """1 / (1 + e**-x) within 4 ulp."""
    return b.let(b.const(1.0) / b.let(exp(b, b.let(b.const(0.0) - x)) + b.const(1.0)))


def from_bfloat16(b: Block, raw: Any) -> Any:
    """float32 value of bfloat16 bits in uint16 lanes (exact)."""
    return b.float_of(tirx.Cast(b.dtype("int32"), raw) << b.const(16, "int32"))


def to_bfloat16(b: Block, x: Any) -> Any:
    """bfloat16 bits in uint16 lanes, rounded to nearest even; NaN gives 0x7FC0."""
    bits = b.bits(x)
    odd = b.let((bits >> b.const(16, "int32")) & b.const(1, "int32"))
    rounded = b.let((bits + b.const(0x7FFF, "int32") + odd) >> b.const(16, "int32"))
    return tirx.Cast(b.dtype("uint16"), b.select(is_nan(b, x), b.const(0x7FC0, "int32"), rounded))


def exchange(b: Block, one: Any, two: Any, distance: int) -> tuple[Any, Any]:
    """Two vectors with runs of `distance` lanes swapped: every second run of the first with the one before it of the
    second."""
    low = [i if not i & distance else i - distance + b.lanes for i in range(b.lanes)]
    high = [i + distance if not i & distance else i + b.lanes for i in range(b.lanes)]
    first, second = (tirx.Shuffle([one, two], [tirx.IntImm("int32", k) for k in lanes]) for lanes in (low, high))
    return b.let(first), b.let(second)


def transpose(b: Block, rows: Sequence[Any]) -> list[Any]:
    """A square of as many vectors as they have lanes, transposed in registers: log2(lanes) rounds of exchanges."""
    rows, distance = list(rows), b.lanes // 2
    while distance:
        for i in range(b.lanes):
            if not i & distance:
                rows[i], rows[i + distance] = exchange(b, rows[i], rows[i + distance], distance)
        distance //= 2
    return rows


def horizontal(kind: str, vector: Any, lanes: int) -> tuple[list[Any], Any]:
    """Statements and the scalar that reduces a vector by halving: kind is ``sum``, ``max``, ``min`` or ``peak``."""
    statements: list[Any] = []
    while lanes > 1:
        lanes //= 2
        b = Block(lanes)
        low = b.let(tirx.Shuffle([vector], [tirx.IntImm("int32", i) for i in range(lanes)]))
        high = b.let(tirx.Shuffle([vector], [tirx.IntImm("int32", i + lanes) for i in range(lanes)]))
        vector = combine(kind, b, low, high)
        statements += b.statements
    return statements, vector


def combine(kind: str, b: Block, x: Any, y: Any) -> Any:
    """One step of a reduction. ``peak`` is a maximum that may lose NaN (used where NaN is restored later)."""
    if kind == "sum":
        return b.let(x + y)
    if kind == "peak":
        return b.select(x > y, x, y)
    return maximum(b, x, y) if kind == "max" else minimum(b, x, y)
