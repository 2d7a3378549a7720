"""The TIR function of choosing the tokens of the highest score, in the order of their places."""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.ir import StringImm

from ..plans.tokens import Best
from . import math as vector
from .emit import integer, parallel, parameters, prim_func, serial
from .layout import Sizes
from .math import Block, assign, on_stack, read, register
from .ranking import MASKED, Scratch, count_of, load, mark_best, store


def function(best: Best, name: str, lanes: int, threaded: bool) -> Any:
    """The complete PrimFunc."""
    sizes = Sizes()
    buffers, memory = parameters(best.tensors, sizes)
    sample, b, scratch = tirx.Var("sample", "int64"), Block(1), Scratch()
    batch, tokens, chosen = (count_of(b, sizes.tir(n)) for n in (best.batch, best.tokens, best.chosen))
    b.statements += [scratch.make(name, dtype, batch * tokens)
                     for name, dtype in (("score", "float32"), ("mark", "int32"))]  # fmt: skip
    base, k, copy = sample * tokens, tirx.Var("k", "int64"), Block(1)
    score = memory.load(copy, 0, sizes.offset(best.score, (sample, k)), None)
    score = copy.select(vector.is_nan(copy, score), copy.const(MASKED), score)
    copy.statements.append(store(scratch["score"], base + k, score))
    statements = [serial(k, tokens, copy.statements)]
    for place in best.protected:
        at = base + (integer(place) if place >= 0 else tokens + integer(place))
        statements.append(store(scratch["score"], at, Block(1).const(vector.INF)))
    statements += mark_best(scratch["score"], base, tokens, chosen, scratch["mark"], base, lanes)
    count, t, pick, inner = register("int64"), tirx.Var("t", "int64"), Block(1), Block(1)
    place = inner.let(read(count))
    memory.store(inner, 1, sample * chosen + place, t)
    inner.statements.append(assign(count, place + integer(1)))
    mark = pick.let(load(scratch["mark"], base + t))
    pick.statements.append(tirx.IfThenElse(tirx.EQ(mark, tirx.const(1, "int32")), tirx.SeqStmt(inner.statements), None))
    statements += [on_stack(count), assign(count, integer(0)), serial(t, tokens, pick.statements)]
    loop = parallel if threaded else serial
    fine = tirx.And(
        tokens > integer(max(best.protected, default=-1)), tokens >= integer(-min(best.protected, default=0))
    )
    checked = tirx.AssertStmt(fine, StringImm("IndexError"), [StringImm("a protected place that no token has")])
    return prim_func(name, buffers, memory, [*b.statements, checked, loop(sample, batch, statements)])
