"""fuse_attention: softmax(scores of queries and keys) times values, in any spelling -> one attention operator."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from ..attention import MANY_KEYS, Site, Step, find, repeated_heads, shape, strip_expand, turned_back
from ..base import Context, Pass, Refusal
from ..layout import relax_layout
from ..nodes import erase_unused, same
from ..operators import ATTENTION, CASTS, COPIES, DIV, MUL, SOFTMAX, TURNS, VIEWS
from ..program import Program
from ..values import SCORE, Values, is_causal, swallows_all_or_little

aten = torch.ops.aten

HALF = (torch.float16, torch.bfloat16)


class Unfit(Exception):
    """An attention was found that the operator cannot express; the message is the reason."""


@dataclass(frozen=True)
class FuseAttention(Pass):
    """Replace each softmax(Q K^T * scale + mask) V, however it is written, by one attention operator.

        s = matmul(q, transpose(k, -2, -1)) * 0.125 + m; y = matmul(softmax(s, -1), v)
        -->  y = scaled_dot_product_attention(q, k, v, m, 0.0, False, scale=0.125)

    Products may be matmul, bmm, baddbmm or einsum, of any rank. Masks may be added, filled in (masked_fill, where)
    and scaled; a constant mask that is the causal one becomes `is_causal`, one that masks nothing goes away, and keys
    and values that are repeated for several query heads are read unrepeated. Rows with all keys masked keep their
    value: a finite mask stays a finite additive mask; where a row can be -inf throughout (NaN in eager, 0 in the
    operator) the mask carries NaN for it.

    Assumes that products of queries and keys stay below 8192 in magnitude, so that a key filled with -1e4 or less
    has no weight, and that a key hidden by the causal flag is finite (added to -inf it would spoil earlier rows).
    Half precision masks that could mask a whole row by a finite value which swallows only part of the scores are
    refused. Gives up nothing.
    Source: Dao et al., FlashAttention, https://arxiv.org/abs/2205.14135; the operator's meaning is that of
    torch.nn.functional.scaled_dot_product_attention.
    """

    name: ClassVar[str] = "fuse-attention"

    def run(self, program: Program, ctx: Context) -> int | Refusal:
        """See the class."""
        sites, refusals, values = 0, list[Refusal](), Values(program)
        for softmax in [n for n in program.graph.nodes if n.target in SOFTMAX]:
            site = find(softmax)
            try:
                if isinstance(site, str):
                    raise Unfit(site)
                _Rewrite(program, site, values).apply()
                sites += 1
            except Unfit as unfit:
                refusals.append(Refusal.at(softmax, str(unfit)))
        if sites:
            return sites
        telling = [r for r in refusals if not r.reason.startswith("no ")] or refusals
        if telling:
            return telling[0]
        fused = next((n for n in program.graph.nodes if n.target is ATTENTION), None)
        if fused is not None:
            return Refusal.at(fused, "every attention is already one operator")
        return Refusal("no softmax in the program")


class _Rewrite:
    """One site on its way: new nodes stand before the final product; on refusal they are erased again."""

    def __init__(self, program: Program, site: Site, values: Values) -> None:
        self.program, self.site, self.last = program, site, site.output.node
        self.values = values
        self.batch = shape(site.softmax)[:-2]
        self.scale = 1.0
        self.factors = list[Step]()  # scalings of the scores that are no constant numbers: they go to the query
        self.mask: fx.Node | None = None
        self.added = list[tuple[fx.Node, torch.dtype]]()  # masks that were added in half precision
        self.filled: float | None = None
        self.made = list[fx.Node]()

    def call(self, op: Any, *args: Any, **kwargs: Any) -> fx.Node:
        node = self.program.call(op, *args, before=self.last, like=self.site.scores.node, **kwargs)
        self.made.append(node)
        return node

    def apply(self) -> None:
        """Build the operator and put it in place. Raises Unfit, with the program as it was."""
        try:
            attention, result = self.build()
        except Unfit:
            for node in reversed(self.made):
                self.program.graph.erase_node(node)
            raise
        users = list(self.last.users)
        self.last.replace_all_uses_with(result)
        erase_unused(self.last)
        for node in reversed(self.made):
            if not node._erased:
                erase_unused(node)
        for operand in attention.args[:2]:
            factor = pull_scale(self.program, self.values, operand)
            attention.kwargs = {**attention.kwargs, "scale": float(attention.kwargs["scale"]) * factor}  # type: ignore[arg-type]
        relax_layout(self.program, users)

    def build(self) -> tuple[fx.Node, fx.Node]:
        """The attention operator and the node that stands for the final product."""
        for step in self.site.steps:
            self.follow(step)
        scores, weights = self.site.scores, self.site.output
        labels = scores.labels
        summed = next(x for x in scores.left_labels if x not in labels)
        sides = [(scores.left, scores.left_labels), (scores.right, scores.right_labels)]
        (query, of_query), (key, of_key) = sides if self.site.query_left else sides[::-1]
        query = self.arrange(query, of_query, (*labels[:-1], summed))
        key = self.arrange(key, of_key, (*labels[:-2], labels[-1], summed))
        for step in self.factors:
            query = self.call(aten.mul.Tensor if step.kind == "mul" else aten.div.Tensor, query, step.value)
        *batch, row, summed = weights.left_labels
        feature = next(x for x in weights.right_labels if x not in weights.left_labels)
        value = self.arrange(weights.right, weights.right_labels, (*batch, summed, feature))
        query, key, value = self.one_dtype(query, key, value)
        causal = self.settle_mask(query.meta["val"].dtype)
        before, after = shape(scores.node)[:-2], shape(self.site.weights)[:-2]
        repeated = self.unrepeated(key, value)
        query = self.four(self.rebatch(query, before))
        if repeated is None:
            key, value = self.four(self.rebatch(key, before)), self.four(self.rebatch(value, after))
        else:
            key, value = repeated
        extra: dict[str, Any] = {"scale": self.scale} | ({"enable_gqa": True} if repeated else {})
        mask = None if self.mask is None else self.four_mask(self.mask)
        if mask is None and not self.many_keys:
            mask = self.call(aten.zeros.default, [1, 1], dtype=query.meta["val"].dtype)
        attention = self.call(ATTENTION, query, key, value, mask, 0.0, causal, **extra)
        return attention, self.leave(attention, after, (*batch, row, feature))

    @property
    def many_keys(self) -> bool:
        """Whether torch's kernel keeps NaN without a mask."""
        keys = shape(self.site.softmax)[-1]
        return isinstance(keys, int) and keys >= MANY_KEYS

    def follow(self, step: Step) -> None:
        """Take one step of the scores into the scale or the mask."""
        number = self.values.number(step.value)
        if step.kind == "view":
            if self.factors:
                raise Unfit("the scores are reshaped after they were scaled by a tensor")
            if self.mask is not None:
                self.mask = self.reshape_mask(
                    self.mask, shape(step.node.all_input_nodes[0])[:-2], shape(step.node)[:-2]
                )
        elif step.kind in ("mul", "div"):
            self.rescale(step, number)
        elif step.kind == "fill":
            self.fill(step, number)
        elif number is None or not abs(number) < SCORE:  # a finite number added to all scores changes no softmax
            self.add(step)

    def rescale(self, step: Step, number: float | None) -> None:
        if self.filled is not None and (math.isfinite(self.filled) or number is None or number <= 0):
            raise Unfit("the scores are scaled after some were filled in")
        if number is None and (not isinstance(step.value, fx.Node) or shape(step.value)[-1:] not in ((), (1,))):
            raise Unfit("the scores are scaled by a tensor that differs from key to key")
        if number == 0 or (number is not None and not math.isfinite(number)):
            raise Unfit(f"the scores are scaled by {number}")
        if number is None:
            self.factors.append(step)
        else:
            self.scale = self.scale * number if step.kind == "mul" else self.scale / number
        if self.mask is not None:
            self.mask = self.call(aten.mul.Tensor if step.kind == "mul" else aten.div.Tensor, self.mask, step.value)

    def add(self, step: Step) -> None:
        dtype = step.node.meta["val"].dtype
        if self.filled is not None and math.isfinite(self.filled):
            swallows = self.filled == torch.finfo(dtype).min and dtype is not torch.float16
            if not swallows:
                raise Unfit(f"a mask is added to scores that were filled with {self.filled}")
        if not isinstance(step.value, fx.Node):
            raise Unfit(f"{step.value} is added to the scores")
        mask = strip_expand(step.value)
        if not mask.meta["val"].is_floating_point():
            mask = self.call(aten._to_copy.default, mask, dtype=dtype)
        if step.kind == "sub":
            mask = self.call(aten.neg.default, mask)
        if dtype in HALF:
            self.added.append((mask, dtype))
        self.mask = mask if self.mask is None else self.call(aten.add.Tensor, self.mask, mask)

    def fill(self, step: Step, number: float | None) -> None:
        if number is None or not number <= -SCORE:
            raise Unfit(f"scores are filled with {'a tensor' if number is None else number}, which is no mask")
        assert step.condition is not None
        if self.mask is not None and math.isfinite(number) and self.filled != number:
            spans = self.values.spans(self.mask)
            if spans is None or any(-math.inf < high and low <= -SCORE for low, high in spans):
                raise Unfit(f"scores that may be masked otherwise are filled with {number}")
        device, dtype = step.node.meta["val"].device, step.node.meta["val"].dtype
        if dtype in HALF and device.type == "cpu":  # the CPU kernels take such masks, others want the query's dtype
            dtype = torch.float32
        if dtype is torch.float16 and math.isfinite(number):
            raise Unfit("no float16 mask gives rows that are masked throughout by a finite value their eager answer")
        rest = self.mask
        if rest is None:
            rest = self.call(aten.full.default, [], 0.0, dtype=dtype, device=device)
        elif rest.meta["val"].dtype != dtype:
            rest = self.call(aten._to_copy.default, rest, dtype=dtype)
        value = number if math.isinf(number) else torch.finfo(dtype).min
        condition = strip_expand(step.condition)
        self.filled = number
        if step.when:
            self.mask = self.call(aten.where.ScalarSelf, condition, value, rest)
        else:
            self.mask = self.call(aten.where.ScalarOther, condition, rest, value)

    def settle_mask(self, dtype: torch.dtype) -> bool:
        """Bring the mask into its final form; True if the causal flag stands for all of it."""
        if self.mask is None:
            return False
        known = self.values.constant(self.mask)
        if known is not None and not bool(known.isnan().any()) and bool((known > -SCORE).any(-1).all()):
            causal = is_causal(known, *shape(self.site.softmax)[-2:]) and self.many_keys
            if causal or not bool(known.any()):
                self.mask = None
                return causal
        else:
            self.keep_masked_rows(self.mask)
        own = self.mask.meta["val"].dtype
        if own != dtype and not (own is torch.float32 and dtype in HALF and self.mask.meta["val"].device.type == "cpu"):
            if torch.promote_types(own, dtype) != dtype:
                raise Unfit(f"the mask is {own}, wider than the queries, {dtype}")
            self.mask = self.call(aten._to_copy.default, self.mask, dtype=dtype)
        return False

    def keep_masked_rows(self, mask: fx.Node) -> None:
        """Rows in which every key may be masked keep eager's answer."""
        spans = self.values.spans(mask)
        if spans is not None and spans[0][0] > -SCORE:
            return
        for added, dtype in self.added:
            if not swallows_all_or_little(self.values.spans(added), dtype):
                raise Unfit(f"a row could be masked throughout by values that {dtype} rounds its scores to")
        safe = self.site.softmax.target is aten._safe_softmax.default  # gives 0, as the operator does
        if not safe and (spans is None or spans[0][0] == -math.inf):
            top = self.call(aten.amax.default, mask, [-1], True)
            self.mask = self.call(aten.where.ScalarSelf, self.call(aten.eq.Scalar, top, -math.inf), math.nan, mask)

    def arrange(self, node: fx.Node, labels: tuple[Any, ...], wanted: tuple[Any, ...]) -> fx.Node:
        """Bring a factor into the wanted order of dimensions, with size 1 for labels that it lacks."""
        present = tuple(label for label in wanted if label in labels)
        if len(present) != len(labels):
            raise Unfit("a factor has a dimension that is summed on its own")
        while labels != present and node.target in TURNS:
            labels, node = turned_back(node, labels), node.all_input_nodes[0]
        if labels != present:
            node = self.call(aten.permute.default, node, [labels.index(label) for label in present])
        for position, label in enumerate(wanted):
            if label not in present:
                node = self.call(aten.unsqueeze.default, node, position)
        return node

    def one_dtype(self, *nodes: fx.Node) -> list[fx.Node]:
        """The three factors in one dtype: that of the values if the others were only widened, else the widest."""
        query, key, value = nodes
        own = value.meta["val"].dtype
        if query.meta["val"].dtype == own:
            return [query, key, value]
        if all(n.target in CASTS and n.all_input_nodes[0].meta["val"].dtype == own for n in (query, key)):
            return [query.all_input_nodes[0], key.all_input_nodes[0], value]
        wide = torch.promote_types(own, query.meta["val"].dtype)
        return [n if n.meta["val"].dtype == wide else self.call(aten._to_copy.default, n, dtype=wide) for n in nodes]

    def unrepeated(self, key: fx.Node, value: fx.Node) -> tuple[fx.Node, fx.Node] | None:
        """Keys and values before each head was repeated for its group of query heads, if both were."""
        found = [repeated_heads(node) for node in (key, value)]
        if len(self.batch) != 2 or any(f is None or not same(shape(f)[0], self.batch[0]) for f in found):
            return None
        first, second = found
        assert first is not None and second is not None
        plain = all(same(shape(n)[:-2], self.batch) for n in (self.site.scores.node, self.site.weights, key, value))
        return (first, second) if plain and same(shape(first)[:3], shape(second)[:3]) else None

    def sizes(self, wanted: Sequence[Any]) -> list[Any]:
        """Sizes as arguments: numbers, or nodes that stand for the sizes that vary."""
        return [size if isinstance(size, int) else self.size(size) for size in wanted]

    def size(self, wanted: Any) -> fx.Node:
        node: fx.Node
        for node in self.program.graph.nodes:
            if node is self.last:
                break
            value = node.meta.get("val")
            if isinstance(value, torch.SymInt) and same(value, wanted):
                return node
            if node.op == "placeholder" and isinstance(value, torch.Tensor):
                for position, size in enumerate(value.shape):
                    if same(size, wanted):
                        return self.call(aten.sym_size.int, node, position)
        raise Unfit(f"no value in the program has the size {wanted}")

    def rebatch(self, node: fx.Node, batch: Sequence[Any]) -> fx.Node:
        """A factor with the batch dimensions that the scores have at the softmax; it may broadcast along `batch`."""
        *_, rows, columns = shape(node)
        if not same(shape(node)[:-2], batch):
            node = self.call(aten.expand.default, node, [*self.sizes(batch), -1, -1])
        if same(tuple(batch), self.batch):
            return node
        return self.call(aten.reshape.default, node, self.sizes([*self.batch, rows, columns]))

    def reshape_mask(self, mask: fx.Node, before: Sequence[Any], after: Sequence[Any]) -> fx.Node:
        *lead, rows, columns = (1, 1, *shape(mask)) if mask.meta["val"].dim() < 2 else shape(mask)
        if all(same(size, 1) for size in lead):
            return self.call(aten.reshape.default, mask, self.sizes([rows, columns]))
        mask = self.call(aten.expand.default, mask, self.sizes([*before, rows, columns]))
        return self.call(aten.reshape.default, mask, self.sizes([*after, rows, columns]))

    def four(self, node: fx.Node) -> fx.Node:
        """A factor with exactly two batch dimensions, which the fast kernels ask for."""
        for _ in range(2 - len(self.batch)):
            node = self.call(aten.unsqueeze.default, node, 0)
        return self.call(aten.flatten.using_ints, node, 0, len(self.batch) - 2) if len(self.batch) > 2 else node

    def four_mask(self, mask: fx.Node) -> fx.Node:
        """The mask with two or four dimensions."""
        rank, extra = mask.meta["val"].dim(), len(self.batch) - 2
        if rank >= 4 and all(same(size, 1) for size in shape(mask)[: rank - 3]):
            return mask if rank == 4 else self.call(aten.squeeze.dims, mask, list(range(rank - 4)))
        if extra > 0 and rank > 3:
            mask = self.call(aten.expand.default, mask, [*self.sizes(self.batch[:-1]), -1, -1, -1])
            return self.call(aten.flatten.using_ints, mask, 0, extra)
        while rank < 2 or rank == 3:
            mask, rank = self.call(aten.unsqueeze.default, mask, 0), rank + 1
        return mask

    def leave(self, node: fx.Node, after: Sequence[Any], labels: tuple[Any, ...]) -> fx.Node:
        """Bring the operator's result into the shape, order and dtype of the product that it replaces."""
        for _ in range(2 - len(self.batch)):
            node = self.call(aten.squeeze.dim, node, 0)
        if len(self.batch) > 2:
            node = self.call(aten.unflatten.int, node, 0, self.sizes(self.batch[:-1]))
        if not same(tuple(after), self.batch):
            node = self.call(aten.reshape.default, node, self.sizes([*after, *shape(node)[-2:]]))
        wanted, dtype = self.site.output.labels, self.last.meta["val"].dtype
        if labels != wanted:
            node = self.call(aten.permute.default, node, [labels.index(label) for label in wanted])
        return node if node.meta["val"].dtype == dtype else self.call(aten._to_copy.default, node, dtype=dtype)


def pull_scale(program: Program, values: Values, node: Any) -> float:
    """Take a constant factor out of what only this operand reads; returns the factor (1 if there is none)."""
    chain = list[fx.Node]()
    while node.target in TURNS | VIEWS | COPIES and len(node.users) == 1:
        chain.append(node)
        node = node.all_input_nodes[0]
    if node.target not in MUL | DIV or len(node.users) != 1:
        return 1.0
    pairs = [(node.args[0], node.args[1])] + ([(node.args[1], node.args[0])] if node.target in MUL else [])
    for source, other in pairs:
        factor = values.number(other)
        if factor is None or factor == 0 or not math.isfinite(factor) or not isinstance(source, fx.Node):
            continue
        before, after = source.meta["val"], node.meta["val"]
        moved = any(n.target in VIEWS for n in chain) and not same(tuple(before.stride()), tuple(after.stride()))
        if before.dtype != after.dtype or not same(shape(source), shape(node)) or moved:
            continue
        divides = node.target in DIV
        node.replace_all_uses_with(source)
        erase_unused(node)
        for link in reversed(chain):
            program.infer(link)
        return 1 / factor if divides else factor
    return 1.0
