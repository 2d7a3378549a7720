"""An early layer chooses the tokens of a prompt that the whole model then reads."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, ClassVar, Self

import torch
from torch import fx

from ...targets import cost
from .. import ops
from ..base import Context, Fidelity, Pass, Refusal
from ..evaluate import evaluate
from ..nodes import arguments, erase_dead
from ..operators import CASTS, COPIES, VIEWS
from ..program import Program
from ..shorten import WHOLE, Shortening, Stopped, contains
from ..tokens import Site, Tokens, depends_on_input, find_tokens, products
from ..values import SCORE

aten = torch.ops.aten
DEFAULT = 0.5
OUTPUTS = ("whole", "last", "short")


@dataclass(frozen=True)
class SelectPrompt(Pass):
    """A causal decoder reads only the tokens of its prompt that the last one looks for in an early layer.

        logits = decoder(ids)    ->    q, k = first layers of decoder(ids)
                                       score = avg_pool1d(sum over heads of q[-1] @ k.transpose)
                                       logits = decoder(ids.gather(best(score)))

    The first `layer` layers run on the whole prompt. The products of the last query with all keys of the next layer
    (rotated, neither scaled nor masked), summed over the heads in float32 and averaged over `pool` places (beyond the
    ends lie zeros), choose the tokens; the last one always stays. Then all layers run on these tokens, in order, at new
    places from zero on. Each sample of a batch chooses for itself.

    Assumes that what the model adds to a token because of its place (positions, rotary tables, masks) does not depend
    on the length of the prompt, as decoding with a cache assumes too; padding is refused. Gives up what the dropped
    tokens say. Source: Shi et al., "Discovering the Gems in Early Layers" (GemFilter, 2024); there the last token stays
    only if it is among the best.

    Attributes:
        layer: the attention layer that chooses, counted from zero; None is the one at two fifths.
        keep: tokens to keep, the last one included; with a float, the share of those before the last. None is a half;
            with a quality budget it is the smallest share within the budget. With as many as there are nothing changes.
        pool: odd number of neighbouring places over which scores are averaged.
        outputs: what becomes of results that have an element for each token: ``whole`` refuses programs with such
            results, ``last`` returns their last token only ([batch, 1, ...]: logits from which generation starts),
            ``short`` returns the tokens that were kept (keys and values that decoding goes on with). Other results,
            such as the logits of ``hidden[:, -1]``, keep their shape.
    """

    name: ClassVar[str] = "select-prompt"
    fidelity: ClassVar[Fidelity] = Fidelity.LOSSY

    layer: int | None = None
    keep: float | int | None = None
    pool: int = 5
    outputs: str = "whole"

    def space(self, program: Program, ctx: Context) -> Iterable[Self]:
        """Shares to keep, from most tokens to few."""
        yield from [self] if self.keep is not None else [replace(self, keep=k / 10) for k in range(9, 0, -1)]

    def run(self, program: Program, ctx: Context) -> int | Refusal:
        """Rewrite `program`."""
        tokens = find_tokens(program, in_order=True)
        if isinstance(tokens, Refusal):
            return tokens
        layer = 2 * len(tokens.sites) // 5 if self.layer is None else self.layer
        keep = DEFAULT if self.keep is None else self.keep
        reason = self._reason_against(tokens, layer, keep) or _not_causal(program, tokens.sites)
        ids = reason or _token_ids(program, tokens)
        if isinstance(ids, Refusal):
            return ids
        length = ids.meta["val"].shape[1]
        if keep == 1.0 if isinstance(keep, float) else isinstance(length, int) and keep >= length:
            return 0
        if self.outputs == "whole" and (each := _results(program, tokens)):
            return Refusal.at(each[0], "a result has an element for each token: outputs='last' or 'short' says what "
                                       "should become of it")  # fmt: skip
        try:
            self._select(program, tokens, ids, tokens.sites[layer], keep)
        except Stopped as stop:
            return Refusal.at(stop.node, str(stop))
        erase_dead(program.graph)
        return 1

    def _reason_against(self, tokens: Tokens, layer: int, keep: float | int) -> Refusal | None:
        if not 0 <= layer < len(tokens.sites):
            return Refusal(f"layer {layer} of {len(tokens.sites)} attention layers")
        if (isinstance(keep, float) and not 0 < keep <= 1) or keep < (1 if isinstance(keep, int) else 0):
            return Refusal(f"{keep} of the tokens cannot be kept")
        if self.pool < 1 or self.pool % 2 == 0:
            return Refusal(f"scores cannot be averaged over {self.pool} places: it takes an odd number")
        if self.outputs not in OUTPUTS:
            return Refusal(f"outputs is {self.outputs!r}; there are {', '.join(OUTPUTS)}")
        return None

    def _select(self, program: Program, tokens: Tokens, ids: fx.Node, site: Site, keep: float | int) -> None:
        call, end = program.call, program.graph.output_node()
        share = Fraction(keep).limit_denominator(1000)
        count, divisor = (share.numerator, share.denominator) if isinstance(keep, float) else (keep - 1, 0)
        scores = products(program, site.attention, (-1, WHOLE), end)
        score = call(aten.sum.dim_IntList, scores, [1], before=end, dtype=torch.float32)
        score = call(aten.avg_pool1d.default, score, [self.pool], [1], [self.pool // 2], before=end)
        score = call(aten.squeeze.dim, score, 1, before=end)
        kept = call(ops.best_tokens(), score, count, [-1], divisor, before=end)
        new = call(ops.take(), ids, 1, kept, before=end)
        again = _copies(program, tokens, ids, new)
        # What does not come from the ids was not copied; its first elements are those of a shorter prompt.
        edit = Shortening(program, tokens.axes, tokens.axis, set(), {-1: -1}, ids, new, None, in_order=True)
        edit.apply()
        for copy in again.values():
            if isinstance(copy.meta["val"], torch.Tensor) and edit.places(copy) and copy not in edit.changed:
                raise Stopped(copy, "it is made from the number of tokens, not from the tokens")
        for result in dict.fromkeys(_results(program, tokens)):
            if result not in again:
                raise Stopped(result, "a result has an element for each token, but does not come from the tokens")
            if self.outputs == "last":
                again[result] = _last(edit, again[result], end)
        end.args = (tuple(again.get(v, v) if isinstance(v, fx.Node) else v for v in program.outputs),)


def _copies(program: Program, tokens: Tokens, ids: fx.Node, new: fx.Node) -> dict[fx.Node, fx.Node]:
    """Calls that are computed from the token ids, computed from `new` instead; sizes of the ids stay what they are."""
    copies, end, axes = {ids: new}, program.graph.output_node(), tokens.axes
    for node in [n for n in program.graph.nodes if n.op == "call_function" and n in axes.values]:
        sources = [n for n in node.all_input_nodes if n in copies]
        if not sources or (sources == [ids] and not isinstance(node.meta["val"], (torch.Tensor, tuple, list))):
            continue
        with program.graph.inserting_before(end):
            copy = copies[node] = program.graph.node_copy(node, lambda n: copies.get(n, n))
        axes.values[copy] = axes.values[node]
        axes.mixes[copy] = axes.mixes.get(node, [])
        if node in axes.unknown:
            axes.unknown[copy] = axes.unknown[node]
    return copies


def _last(edit: Shortening, node: fx.Node, before: fx.Node) -> fx.Node:
    """The last token of a result. Raises Stopped."""
    for place in edit.places(node):
        if edit.axes.of(node)[place] != edit.axis:
            raise Stopped(node, "a result has its tokens flattened together with something else")
        node = edit.program.call(aten.slice.Tensor, node, place, -1, WHOLE, before=before)
    return node


def _results(program: Program, tokens: Tokens) -> list[fx.Node]:
    """Results that have an element for each token."""
    found = [n for n in program.outputs if isinstance(n, fx.Node) and isinstance(n.meta.get("val"), torch.Tensor)]
    return [n for n in found if any(a in dim for dim in tokens.axes.of(n) for a in tokens.axis)]


def _token_ids(program: Program, tokens: Tokens) -> fx.Node | Refusal:
    """The one input that carries the tokens: [batch, tokens], rows of an embedding."""
    if program.state:
        return Refusal("the program carries state from call to call")
    looked_up = set()
    for node in program.graph.nodes:
        if node.target is aten.embedding.default:
            source: Any = arguments(node)["indices"]
            while source.target in VIEWS | CASTS | COPIES:
                source = source.args[0]
            looked_up.add(source)
    batch = tokens.axes.of(tokens.sites[0].at)[0]
    carry = [n for n in program.inputs if n.users and any(contains(d, tokens.axis) for d in tokens.axes.of(n))]
    ids = [n for n in carry if n in looked_up and tokens.axes.of(n) == [batch, tokens.axis]]
    if not ids:
        return Refusal("no input holds token ids: none that is [batch, tokens] is looked up in an embedding")
    others = [n for n in carry if n is not ids[0]]
    if others:
        return Refusal.at(others[0], "an input besides the token ids has an element for each token: padding and given "
                                     "positions cannot be carried along")  # fmt: skip
    return ids[0]


def _not_causal(program: Program, sites: list[Site]) -> Refusal | None:
    """The first attention that is not causal, or whose mask is not known before any input is there."""
    for mask in dict.fromkeys(s.mask for s in sites if not arguments(s.attention)["is_causal"]):
        attention = next(s.attention for s in sites if s.mask is mask)
        if mask is not None and depends_on_input(mask):
            return Refusal.at(attention, "its mask depends on an input: padding cannot be carried along")
        if mask is None or not _hides_what_follows(_for_example(program, mask)):
            return Refusal.at(attention, "attention is not causal: tokens see those that follow them")
    return None


def _hides_what_follows(mask: torch.Tensor) -> bool:
    """Whether a mask [..., queries, keys] takes out each key behind its query."""
    if mask.dim() < 2 or mask.shape[-2] != mask.shape[-1]:
        return False
    hidden = ~mask if mask.dtype is torch.bool else mask <= -SCORE
    return bool((hidden | torch.ones_like(hidden).tril()).all())


def _for_example(program: Program, node: fx.Node) -> torch.Tensor:
    """A value that depends on no input but through sizes, for inputs of the example's sizes."""
    needed, waiting = {node}, [node]
    while waiting:
        new = [n for n in waiting.pop().all_input_nodes if n not in needed]
        needed.update(new)
        waiting += new
    graph, copies, inputs = fx.Graph(), dict[fx.Node, fx.Node](), list[Any]()
    for n in sorted(needed):
        copies[n] = graph.node_copy(n, copies.__getitem__)
        if n.op == "placeholder":
            value = n.meta["val"]
            inputs.append(torch.zeros([cost.hint(s) for s in value.shape], dtype=value.dtype, device=value.device)
                          if isinstance(value, torch.Tensor) else cost.hint(value))  # fmt: skip
    graph.output((copies[node],))
    with torch.no_grad():
        found: torch.Tensor = evaluate(graph.nodes, program.weights, inputs)[0]
    return found
