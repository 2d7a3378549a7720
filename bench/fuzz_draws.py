"""How the fuzzer draws operands and settings for an operator.

Values know whether they are exact, that is free of rounding. Operators with jumps (comparisons, sorting, floor, a cast
to integers) draw exact operands only, and operators with poles keep away from them on others: else two correct
programs, which round differently, could give answers that are far apart.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Knobs = dict[str, Any]
Drawn = tuple[list[int], Knobs]


class NoFit(Exception):
    """No value made so far suits the operator."""


@dataclass(frozen=True)
class Op:
    """An operator: `draw` chooses operands (ids of values) and knobs, `call` takes the tensors and the knobs."""

    name: str
    call: Callable[..., Any]
    draw: Callable[[Draw], Drawn]
    rounds: bool = True


@dataclass
class Draw:
    """Random choices among the values made so far, later ones preferred."""

    rng: random.Random
    values: dict[int, Tensor]
    exact: set[int]
    weights: dict[int, Tensor] = field(default_factory=dict)

    def pick(self, fits: Callable[[Tensor], bool], exact: bool = False) -> int:
        """Id of a value that fits."""
        found = [i for i, v in self.values.items() if fits(v) and (not exact or i in self.exact)]
        if not found:
            raise NoFit
        return found[max(self.rng.randrange(len(found)), self.rng.randrange(len(found)))]

    def floats(self, least: int = 0, most: int = 9, exact: bool = False) -> int:
        """Id of a floating point value with a rank in a range."""
        return self.pick(lambda v: v.is_floating_point() and least <= v.ndim <= most, exact)

    def weight(self, *shape: int, like: int, positive: bool = False) -> int:
        """Id of a new weight with the dtype of a value."""
        made = torch.tensor([self.rng.gauss(0, 1) for _ in range(torch.Size(shape).numel())]).reshape(shape)
        name = 1000 + len(self.weights)
        self.weights[name] = self.values[name] = (made.abs() + 0.5 if positive else made).to(self.values[like].dtype)
        self.exact.add(name)
        return name

    def dim(self, i: int) -> int:
        """A dimension of a value, counted from either side."""
        rank = self.values[i].ndim
        if rank == 0:
            raise NoFit
        return self.rng.randrange(-rank, rank)

    def partner(self, i: int, fits: Callable[[Tensor], bool], exact: bool = False) -> int:
        """Id of a value that broadcasts with value i."""

        def broadcasts(v: Tensor) -> bool:
            pairs = zip(reversed(v.shape), reversed(self.values[i].shape), strict=False)
            return fits(v) and all(a == b or a == 1 or b == 1 for a, b in pairs)

        return self.pick(broadcasts, exact)


def number(v: Tensor) -> bool:
    """Not a truth value."""
    return v.dtype != torch.bool


def anything(v: Tensor) -> bool:
    """Any tensor."""
    return True


def unary(exact: bool = False, **choices: list[Any]) -> Callable[[Draw], Drawn]:
    """One floating point operand; each knob is drawn from its list."""
    return lambda d: ([d.floats(exact=exact)], {k: d.rng.choice(v) for k, v in choices.items()})


def poled(d: Draw) -> Drawn:
    """One operand, kept away from the pole where it is rounded."""
    x = d.floats()
    return [x], {"safe": x not in d.exact}


def away(fn: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """`fn`, on request with operands of at least one half."""
    return lambda x, safe: fn(x.abs() + 0.5 if safe else x)


def binary(exact: bool = False, fits: Callable[[Tensor], bool] = number) -> Callable[[Draw], Drawn]:
    """Two operands that broadcast, of any two dtypes."""

    def draw(d: Draw) -> Drawn:
        x = d.pick(fits, exact)
        return [x, d.partner(x, fits, exact)], {}

    return draw


def divide(d: Draw) -> Drawn:
    """Numerator and denominator."""
    (x, y), _ = binary()(d)
    return [x, y], {"safe": y not in d.exact or not d.values[y].is_floating_point()}


def choice(d: Draw) -> Drawn:
    """A mask and two operands."""
    mask = d.pick(lambda v: v.dtype == torch.bool)
    x = d.partner(mask, number)
    return [mask, x, d.partner(x, number)], {}


def reduction(exact: bool = False, fits: Callable[[Tensor], bool] = torch.is_floating_point) -> Callable[[Draw], Drawn]:
    """One operand, one or more dimensions, kept or not."""

    def draw(d: Draw) -> Drawn:
        x = d.pick(lambda v: fits(v) and v.ndim > 0, exact)
        rank = d.values[x].ndim
        return [x], {"dim": sorted(d.rng.sample(range(rank), d.rng.randint(1, rank))), "keepdim": d.rng.random() < 0.5}

    return draw


def along(exact: bool = False, fits: Callable[[Tensor], bool] = torch.is_floating_point) -> Callable[[Draw], Drawn]:
    """One operand and one of its dimensions."""

    def draw(d: Draw) -> Drawn:
        x = d.pick(fits, exact)
        return [x], {"dim": d.dim(x)}

    return draw


def normed(*weights: str) -> Callable[[Draw], Drawn]:
    """An operand and weights over its last dimension."""

    def draw(d: Draw) -> Drawn:
        x = d.floats(1)
        width = d.values[x].shape[-1]
        return [x, *(d.weight(width, like=x) for _ in weights)], {"eps": d.rng.choice([1e-5, 1e-6, 1e-3])}

    return draw


def channels(count: int, groups: bool = False) -> Callable[[Draw], Drawn]:
    """An operand with channels in dimension 1 and weights over them."""

    def draw(d: Draw) -> Drawn:
        x = d.floats(2 if not groups else 3)
        width = d.values[x].shape[1]
        made = [d.weight(width, like=x, positive=i == 3) for i in range(count)]
        divisors = [g for g in range(1, width + 1) if width % g == 0] or [1]
        return [x, *made], {"groups": d.rng.choice(divisors)} if groups else {}

    return draw


def linear(bias: bool) -> Callable[[Draw], Drawn]:
    """An operand, a weight matrix, perhaps a bias."""

    def draw(d: Draw) -> Drawn:
        x = d.floats(1)
        out = d.rng.choice([1, 3, 8, 17])
        made = [d.weight(out, d.values[x].shape[-1], like=x)] + ([d.weight(out, like=x)] if bias else [])
        return [x, *made], {}

    return draw


def product(d: Draw) -> Drawn:
    """Two operands that `call` multiplies as matrices: the second is turned if that makes them fit."""
    x = d.floats(2)
    v = d.values[x]

    def fits(w: Tensor) -> bool:
        lead = w.ndim == 2 or (w.ndim == v.ndim and w.shape[:-2] == v.shape[:-2])
        return w.dtype == v.dtype and w.ndim >= 2 and lead and v.shape[-1] in w.shape[-2:]

    y = d.pick(fits)
    return [x, y], {"turn": d.values[y].shape[-2] != v.shape[-1]}


def batched(d: Draw) -> Drawn:
    """One operand of rank 3."""
    return [d.pick(lambda v: v.is_floating_point() and v.ndim == 3)], {}


def convolution(rank: int, turned: bool = False) -> Callable[[Draw], Drawn]:
    """An operand, a kernel, a bias, with random stride, padding, dilation and groups."""

    def draw(d: Draw) -> Drawn:
        x = d.floats(rank + 2, rank + 2)
        width = d.values[x].shape[1]
        groups = d.rng.choice([1, 1, width]) or 1
        out = groups * d.rng.choice([1, 2])
        size = d.rng.choice([1, 2, 3])
        shape = (width, out // groups) if turned else (out, width // groups)
        knobs = {"stride": d.rng.choice([1, 2]), "padding": d.rng.randint(0, size - 1), "groups": groups}
        if not turned:
            knobs["dilation"] = d.rng.choice([1, 1, 2])
        return [x, d.weight(*shape, *[size] * rank, like=x), d.weight(out, like=x)], knobs

    return draw


def pool(d: Draw) -> Drawn:
    """An image and a window."""
    x = d.floats(4, 4)
    size = d.rng.choice([1, 2, 3])
    return [x], {"kernel_size": size, "stride": d.rng.choice([1, 2]), "padding": size // 2}


def resize(d: Draw) -> Drawn:
    """An image and its new size."""
    mode = d.rng.choice(["nearest", "bilinear"])
    corners = {"align_corners": d.rng.random() < 0.5} if mode == "bilinear" else {}
    return [d.floats(4, 4)], {"size": (d.rng.randint(1, 7), d.rng.randint(1, 7)), "mode": mode, **corners}


def split_size(d: Draw) -> Drawn:
    """An operand whose one dimension is folded into two, or two into one."""
    x = d.pick(lambda v: v.ndim > 0 and v.numel() > 0)
    shape = list(d.values[x].shape)
    at = d.rng.randrange(len(shape))
    if at + 1 < len(shape) and d.rng.random() < 0.5:
        return [x], {"shape": [*shape[:at], shape[at] * shape[at + 1], *shape[at + 2 :]]}
    factor = d.rng.choice([f for f in range(1, shape[at] + 1) if shape[at] % f == 0])
    return [x], {"shape": [*shape[:at], factor, shape[at] // factor, *shape[at + 1 :]]}


def permutation(d: Draw) -> Drawn:
    """Any operand and a new order of its dimensions."""
    x = d.pick(anything)
    return [x], {"dims": d.rng.sample(range(d.values[x].ndim), d.values[x].ndim)}


def section(d: Draw) -> Drawn:
    """A range of one dimension."""
    x = d.pick(lambda v: v.ndim > 0)
    dim = d.dim(x)
    size = d.values[x].shape[dim]
    return [x], {"dim": dim, "start": d.rng.randint(0, size // 2), "stop": d.rng.randint(size // 2, size),
                 "step": d.rng.choice([1, 1, 2])}  # fmt: skip


def place(d: Draw) -> Drawn:
    """One position of one dimension."""
    x = d.pick(lambda v: v.ndim > 0 and 0 not in v.shape)
    dim = d.dim(x)
    return [x], {"dim": dim, "index": d.rng.randrange(d.values[x].shape[dim])}


def joined(d: Draw) -> Drawn:
    """Two or three operands of one shape."""
    x = d.pick(lambda v: v.ndim > 0)
    alike = [d.pick(lambda v: v.shape == d.values[x].shape) for _ in range(d.rng.randint(1, 2))]
    return [x, *alike], {"dim": d.dim(x)}


def widened(d: Draw) -> Drawn:
    """An operand and padding for its last dimensions."""
    x = d.pick(lambda v: v.is_floating_point() and v.ndim > 0)
    dims = d.rng.randint(1, min(2, d.values[x].ndim))
    return [x], {
        "pad": [d.rng.randint(-1, 2) for _ in range(2 * dims)],
        "value": d.rng.choice([0.0, 1.5, float("-inf")]),
    }


def indexed(d: Draw) -> Drawn:
    """An operand, an index vector for one of its dimensions."""
    x = d.pick(lambda v: v.ndim > 0 and 0 not in v.shape)
    return [x, d.pick(lambda v: v.dtype == torch.int64 and v.ndim >= 1)], {"dim": d.dim(x)}


def looked_up(d: Draw) -> Drawn:
    """Integers and a table."""
    ids = d.pick(lambda v: v.dtype == torch.int64)
    return [ids, d.weight(7, d.rng.choice([1, 4, 8]), like=d.floats())], {}


def attention(masked: str) -> Callable[[Draw], Drawn]:
    """One operand of rank 3 or 4 as queries, keys and values, perhaps with a mask."""

    def draw(d: Draw) -> Drawn:
        x = d.floats(3, 4)
        length = d.values[x].shape[-2]
        scale = {"scale": d.rng.choice([None, 0.3])}
        if masked == "causal":
            return [x], {"is_causal": True, **scale}
        if masked == "float":
            return [x, d.weight(length, length, like=x)], scale
        if masked == "bool":
            return [x, d.pick(lambda v: v.dtype == torch.bool and v.ndim > 0 and v.shape[-1] in (1, length))], scale
        return [x], scale

    return draw


def cast(
    kinds: list[torch.dtype], exact: bool = False, fits: Callable[[Tensor], bool] = number
) -> Callable[[Draw], Drawn]:
    """Any operand and another dtype."""
    return lambda d: ([d.pick(fits, exact)], {"dtype": d.rng.choice(kinds)})
