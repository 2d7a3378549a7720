"""The TIR function of choosing the tokens of the highest score, in the order of their places."""

from __future__ import annotations

from typing import Any

from tvm import tirx

from ..plans.tokens import Best
from . import math as vector
from .emit import integer, parallel, parameters, prim_func, serial
from .layout import Sizes
from .math import Block, assign, on_stack, read, register
from .ranking import MASKED, Scratch, load, mark_best, store


def function(best: Best, name: str, lanes: int, threaded: bool) -> Any:
    """The complete PrimFunc."""
    sizes = Sizes()
    buffers, memory = parameters(best.tensors, sizes)
    sample, b, scratch = tirx.Var("sample", "int64"), Block(1), Scratch()
    batch = b.let(sizes.tir(best.batch))
    b.statements += [scratch.make(name, dtype, batch * integer(best.tokens))
                     for name, dtype in (("score", "float32"), ("mark", "int32"))]  # fmt: skip
    base, k, copy = sample * integer(best.tokens), tirx.Var("k", "int64"), Block(1)
    score = memory.load(copy, 0, sizes.offset(best.score, (sample, k)), None)
    score = copy.select(vector.is_nan(copy, score), copy.const(MASKED), score)
    copy.statements.append(store(scratch["score"], base + k, score))
    statements = [serial(k, integer(best.tokens), copy.statements)]
    statements += [store(scratch["score"], base + integer(p), Block(1).const(vector.INF)) for p in best.protected]
    statements += mark_best(scratch["score"], base, best.tokens, integer(best.chosen), scratch["mark"], base, lanes)
    count, t, pick, inner = register("int64"), tirx.Var("t", "int64"), Block(1), Block(1)
    place = inner.let(read(count))
    memory.store(inner, 1, sample * integer(best.chosen) + place, t)
    inner.statements.append(assign(count, place + integer(1)))
    mark = pick.let(load(scratch["mark"], base + t))
    pick.statements.append(tirx.IfThenElse(tirx.EQ(mark, tirx.const(1, "int32")), tirx.SeqStmt(inner.statements), None))
    statements += [on_stack(count), assign(count, integer(0)), serial(t, integer(best.tokens), pick.statements)]
    loop = parallel if threaded else serial
    return prim_func(name, buffers, memory, [*b.statements, loop(sample, batch, statements)])
