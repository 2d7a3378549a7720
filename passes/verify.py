"""Checks that the pipeline and the tests share: is a program well formed, and does it still give the same answers?"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from .errors import VerifyError
from .nodes import is_pure, operator_name
from .program import Program
from .text import describe_value, where

# Largest accepted difference, relative to the scale of the output, for a rewrite that only rounds differently.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
# Operators whose result jumps where two values that they compare are nearly equal.
CHOOSING = {"merge_tokens", "best_tokens", "topk", "sort", "argsort", "argmax", "argmin"}
PIECE = 1 << 20  # numbers that are compared at a time: the logits of a language model may take gigabytes
LEAST = 1e-6  # scale of numbers that are all smaller
ALIKE = 0.999  # agreement of answers whose choices between near equals may differ


def well_formed(program: Program) -> None:
    """Check the graph's invariants.

    Raises:
        VerifyError: the graph is out of order, names an unknown weight, mutates a value, or carries a shape, dtype or
            layout that its operators do not give.
    """
    program.graph.lint()
    for node in program.graph.nodes:
        if node.op == "get_attr" and str(node.target) not in program.weights:
            raise VerifyError(f"no weight is called {node.target}", node=node.name)
        if node.op not in ("placeholder", "get_attr", "call_function", "output"):
            raise VerifyError(f"a program has no {node.op} nodes", node=node.name)
        if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
            if node.target._schema.is_mutable:
                raise VerifyError(f"{node.target} writes into its input", node=node.name, where=where(node))
            _check_inference(program, node)
    if len(program.outputs) < program.out_spec.num_leaves + len(program.state):
        raise VerifyError("the output node lacks results that the output structure or the state names")


def _check_inference(program: Program, node: fx.Node) -> None:
    known = node.meta.get("val")
    leaves = pytree.tree_leaves(known)
    if not is_pure(node) or any(not isinstance(v, torch.Tensor) or _symbolic(v) for v in leaves):
        return
    inputs = [n.meta.get("val") for n in node.all_input_nodes]
    if any(isinstance(v, torch.Tensor) and _symbolic(v) for v in inputs):
        return
    call, values = (node.target, str(node.args), str(node.kwargs)), [known, *inputs]
    before = node.meta.get("verified")  # forks share it: a pass pays for the calls that it changed
    if before is not None and before[0] == call and _identical(before[1], values):
        return
    program.infer(node)
    found = node.meta["val"]
    node.meta["val"] = known
    if [_layout(v) for v in leaves] != [_layout(v) for v in pytree.tree_leaves(found)]:
        raise VerifyError(
            f"{node.target} gives {describe_value(found)}, the graph says {describe_value(known)}",
            node=node.name,
            where=where(node),
        )
    node.meta["verified"] = call, values


def _identical(a: Sequence[Any], b: Sequence[Any]) -> bool:
    return len(a) == len(b) and all(x is y for x, y in zip(a, b, strict=True))


def _symbolic(value: torch.Tensor) -> bool:
    return any(isinstance(s, torch.SymInt) for s in (*value.shape, *value.stride()))


def _layout(value: torch.Tensor) -> Any:
    return value.dtype, tuple(value.shape), value.device.type


def difference(found: Sequence[Any], wanted: Sequence[Any]) -> tuple[float, str]:
    """Largest deviation over paired flat outputs as a multiple of what is accepted (<= 1 is equal), and where it is.

    Floating point tensors are compared relative to the scale of the wanted tensor, with NaN and Inf in the same
    places; everything else must be identical.
    """
    worst, place = 0.0, ""
    if len(found) != len(wanted):
        return float("inf"), f"{len(found)} outputs instead of {len(wanted)}"
    for index, (a, b) in enumerate(zip(found, wanted, strict=True)):
        size = _deviation(a, b)
        if size > worst:
            worst, place = size, f"output {index}"
    return worst, place


def _deviation(found: Any, wanted: Any) -> float:
    if not isinstance(wanted, torch.Tensor):
        return 0.0 if type(found) is type(wanted) and found == wanted else float("inf")
    if not isinstance(found, torch.Tensor) or found.shape != wanted.shape or found.dtype != wanted.dtype:
        return float("inf")
    if wanted.numel() == 0:
        return 0.0
    if wanted.is_complex():
        return _deviation(torch.view_as_real(found), torch.view_as_real(wanted))
    if not wanted.is_floating_point():
        return 0.0 if torch.equal(found, wanted) else float("inf")
    if wanted.element_size() == 1:
        return _deviation(found.float(), wanted.float())
    found, wanted = found.reshape(-1), wanted.reshape(-1)
    scale = _scale(wanted)
    sizes = (_relative(a, b, scale) for a, b in zip(found.split(PIECE), wanted.split(PIECE), strict=True))
    return max(sizes) / TOLERANCE.get(wanted.dtype, 1e-4)


def _scale(wanted: torch.Tensor) -> float:
    """The largest usual number: mask values such as -1e9 set no scale for the others.

    Of many numbers, the median is that of evenly spread ones. Their step shares no divisor with a dimension: else it
    would go down some columns only.
    """
    step = -(-wanted.numel() // PIECE)
    while math.gcd(step, wanted.numel()) > 1:
        step += 1
    for every in dict.fromkeys((step, 1)):
        some = wanted[::every].abs()
        some = some[(some > 0) & some.isfinite()].double()
        if some.numel():
            break
    else:
        return LEAST
    limit = min(1e4 * float(some.median()), sys.float_info.max)
    largest = max(abs(float(v)) for v in wanted.aminmax())
    if not largest <= limit:  # or it is NaN
        sizes = (piece.abs().double() for piece in wanted.split(PIECE))
        largest = max(float(size.where(size <= limit, 0.0).max()) for size in sizes)
    return max(LEAST, largest)


def _relative(found: torch.Tensor, wanted: torch.Tensor, scale: float) -> float:
    """Largest deviation relative to the numbers' size or the scale; infinite if NaN and Inf are in other places."""
    kind = torch.promote_types(wanted.dtype, torch.float32)  # a small difference of two numbers is exact
    a, b = found.to(kind), wanted.to(kind)
    worst = float(((a - b).abs_() / b.abs().clamp_(min=scale)).max())
    if math.isfinite(worst):
        return worst
    finite, infinite = b.isfinite(), b.isinf()
    same_places = torch.equal(finite, a.isfinite()) and torch.equal(a.isnan(), b.isnan())
    if not same_places or not torch.equal(a[infinite], b[infinite]):
        return float("inf")
    a, b = a[finite].double(), b[finite].double()
    return float(((a - b).abs() / b.abs().clamp(min=scale)).max()) if b.numel() else 0.0


def reason_against(program: Program, found: Sequence[Any], wanted: Sequence[Any]) -> str | None:
    """Why a program's flat outputs are not those that were wanted; None if they are.

    Rounding may differ. Where a program chooses by comparing what it computed, rounding may also turn a choice between
    near equals: then the outputs must agree to `ALIKE` on average.
    """
    size, place = difference(found, wanted)
    if size <= 1:
        return None
    if any(operator_name(n) in CHOOSING for n in program.graph.nodes) and _alike(found, wanted):
        return None
    return f"{place} deviates {size:.3g} times more than rounding explains"


def _alike(found: Sequence[Any], wanted: Sequence[Any]) -> bool:
    pairs = list(zip(found, wanted, strict=True)) if len(found) == len(wanted) else []
    same = all(a.shape == b.shape and a.dtype == b.dtype for a, b in pairs if isinstance(b, torch.Tensor))
    return bool(pairs) and same and agreement(found, wanted) >= ALIKE


def agreement(found: Sequence[Any], wanted: Sequence[Any]) -> float:
    """Mean cosine similarity of floating point outputs, averaged over the last dimension's rows; 1 is equal.

    Integer and boolean outputs count by the share of equal elements. Rows that are equal count 1, also zero rows.
    """
    scores = []
    for a, b in zip(found, wanted, strict=True):
        if not isinstance(b, torch.Tensor) or b.numel() == 0:
            continue
        if not b.is_floating_point():
            scores.append(float((a == b).double().mean()))
            continue
        rows_a, rows_b = (t.double().nan_to_num().reshape(-1, t.shape[-1] if t.dim() else 1) for t in (a, b))
        cosine = torch.nn.functional.cosine_similarity(rows_a, rows_b, dim=-1)
        scores.append(float(torch.where((rows_a == rows_b).all(-1), 1.0, cosine).mean()))
    return sum(scores) / len(scores) if scores else 1.0


def same_answers(program: Program, inputs: Sequence[Any], wanted: Sequence[Any], by: str) -> None:
    """Check a rewritten program against reference outputs.

    Args:
        inputs: flat example inputs.
        wanted: flat outputs of the reference program on them.
        by: text name of the pass to blame.

    Raises:
        VerifyError: some output deviates by more than rounding explains.
    """
    try:
        found = program.run(inputs)
    except Exception as error:  # operators raise many types; whatever it is, the rewrite is at fault
        raise VerifyError(f"the rewritten program fails: {error}", by=by) from error
    reason = reason_against(program, found, wanted)
    if reason is not None:
        raise VerifyError(reason, by=by, next_step="report this as a bug; passes=[...] without this pass avoids it")
