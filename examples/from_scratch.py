"""torchlathe's core, rebuilt from scratch in one file: read this first, then passes/program.py.

Everything here uses only torch. Five ideas, in the order in which a model meets them:

1. capture   a model becomes a flat list of pure operator calls;
2. rewrite   a rule is a pattern, a check that may refuse with a reason, and a replacement;
3. verify    a rewritten graph must give the answers of the original;
4. judge     a rewrite must not be slower, measured in turn with what it replaces, or it is undone;
5. lower     what is left becomes one straight-line function without any module overhead.

Run it: `python examples/from_scratch.py`. It folds batch norms into convolutions, finds attention spelled by hand, and
prints what each pass did, or why it did nothing.
"""

from __future__ import annotations

import copy
import operator
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter

import torch
from torch import fx, nn

aten = torch.ops.aten


# 1. Capture ----------------------------------------------------------------------------------------------------------


def capture(model: nn.Module, args: tuple) -> fx.GraphModule:
    """torch.export gives a graph of ATen calls; `run_decompositions({})` removes in-place writes and nothing else.

    `module()` turns parameters, which export passes as inputs, into attributes of the graph module.
    """
    return torch.export.export(model.eval(), args).run_decompositions({}).module()


def show(program: fx.GraphModule) -> list[str]:
    """The operators of a program, in order."""
    return [str(n.target) for n in program.graph.nodes if n.op == "call_function"]


# 2. Rewrite ----------------------------------------------------------------------------------------------------------


@dataclass
class Refusal:
    """Why a pass changed nothing. A pass never fails in silence."""

    reason: str


Pass = Callable[[fx.GraphModule], "int | Refusal"]  # rewrites in place; the number of sites changed, or why none was


def weight(program: fx.GraphModule, node: object) -> torch.Tensor | None:
    """The tensor behind a node if it is a constant of the program."""
    if isinstance(node, fx.Node) and node.op == "get_attr":
        return operator.attrgetter(node.target)(program)
    return None


def constant(program: fx.GraphModule, name: str, value: torch.Tensor, before: fx.Node) -> fx.Node:
    """A new constant. Existing weights are never written: they belong to the user's model."""
    program.register_buffer(name, value)
    with program.graph.inserting_before(before):
        return program.graph.get_attr(name)


def fold_norm(program: fx.GraphModule) -> int | Refusal:
    """batch_norm(conv(x, w, b)) --> conv(x, w * s, b * s + t): both are affine in x, and s and t are known now."""
    sites, reason = 0, "there is no batch norm"
    for norm in [n for n in program.graph.nodes if n.target is aten._native_batch_norm_legit_no_training.default]:
        conv, gamma, beta, mean, var, _, eps = norm.args
        (first,) = norm.users  # the operator also returns statistics, which nobody reads in eval mode
        if conv.target is not aten.conv2d.default:
            reason = "the batch norm does not follow a convolution"
        elif len(conv.users) > 1:
            reason = "the convolution's value is also used without the norm"
        else:
            values = [weight(program, n) for n in (gamma, beta, mean, var, conv.args[1])]
            if any(v is None for v in values):
                reason = "a weight is computed at run time"
                continue
            g, b, m, v, w = (t.double() for t in values)
            scale = g / (v + eps).sqrt()
            bias = (
                weight(program, conv.args[2])
                if len(conv.args) > 2 and conv.args[2] is not None
                else torch.zeros(len(g))
            )
            folded = (w * scale[:, None, None, None]).float()
            shift = ((bias.double() - m) * scale + b).float()
            new_w = constant(program, f"folded_weight_{sites}", folded, conv)
            new_b = constant(program, f"folded_bias_{sites}", shift, conv)
            conv.args = (conv.args[0], new_w, new_b, *conv.args[3:])
            first.replace_all_uses_with(conv)
            program.graph.erase_node(first)
            program.graph.erase_node(norm)
            sites += 1
    return sites or Refusal(reason)


def fuse_attention(program: fx.GraphModule) -> int | Refusal:
    """softmax(q @ k.T * s) @ v --> scaled_dot_product_attention(q, k, v): one kernel, no table of all scores."""
    sites, reason = 0, "there is no softmax between two matmuls"
    for soft in [n for n in program.graph.nodes if n.target is aten.softmax.int]:
        (out,) = soft.users if len(soft.users) == 1 else (None,)
        scaled = soft.args[0]
        if out is None or out.target is not aten.matmul.default or out.args[0] is not soft:
            reason = "the probabilities are also used elsewhere"
        elif soft.args[1] not in (-1, 3) or scaled.target is not aten.mul.Tensor or isinstance(scaled.args[1], fx.Node):
            reason = "the scores are not a plain scaled product"
        elif scaled.args[0].target is not aten.matmul.default or len(scaled.users) > 1:
            reason = "the scores are also used elsewhere"
        else:
            q, transposed = scaled.args[0].args
            if transposed.target is not aten.transpose.int or set(transposed.args[1:]) != {-2, -1}:
                reason = "the keys are not transposed"
                continue
            with program.graph.inserting_before(out):
                fused = program.graph.call_function(
                    aten.scaled_dot_product_attention.default,
                    (q, transposed.args[0], out.args[1]),
                    {"scale": scaled.args[1]},
                )
            out.replace_all_uses_with(fused)
            sites += 1
    program.graph.eliminate_dead_code()
    return sites or Refusal(reason)


# The order is data. Adding a pass is adding a line.
PASSES: list[Pass] = [fold_norm, fuse_attention]


# 3. Verify and 4. judge ----------------------------------------------------------------------------------------------


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal up to rounding, relative to the scale of the answer."""
    return bool((a - b).abs().max() <= 1e-4 * b.abs().max())


def speed_up(before: Callable[[], object], after: Callable[[], object], rounds: int = 15) -> float:
    """Median over rounds of before / after. The two take turns, so that a busy machine slows both alike."""
    ratios = []
    for number in range(rounds + 2):
        times = {}
        for call in (before, after) if number % 2 else (after, before):
            start = perf_counter()
            call()
            times[call] = perf_counter() - start
        ratios.append(times[before] / times[after])
    return statistics.median(ratios[2:])


@torch.no_grad()
def optimize(model: nn.Module, args: tuple, slack: float = 0.95) -> tuple[Callable, list[str]]:
    """Fork, run, verify, judge, keep or drop, for every pass in turn. Returns the compiled function and a report."""
    best, report = capture(model, args), []
    wanted = model(*args)
    for rewrite in PASSES:
        fork = copy.deepcopy(best)
        outcome = rewrite(fork)
        if isinstance(outcome, Refusal):
            report.append(f"{rewrite.__name__}: refused, {outcome.reason}")
            continue
        fork.graph.lint()
        fork.recompile()
        gain = speed_up(lambda old=best: old(*args), lambda new=fork: new(*args))
        if not same(fork(*args), wanted):
            report.append(f"{rewrite.__name__}: dropped, it changes the answer")
        elif gain < slack:
            report.append(f"{rewrite.__name__}: dropped, {gain:.2f}x the speed")
        else:
            best = fork
            report.append(f"{rewrite.__name__}: kept, {outcome} sites, {gain:.2f}x the speed")
    return lower(best), report


# 5. Lower ------------------------------------------------------------------------------------------------------------


def lower(program: fx.GraphModule) -> Callable:
    """One Python function: a call per line, every value freed after its last use, no module in sight."""
    lines, space, last = [], {}, {}
    calls = [n for n in program.graph.nodes if n.op in ("call_function", "get_attr")]
    for node in program.graph.nodes:
        for source in node.all_input_nodes:
            last[source] = node
    inputs = [n.name for n in program.graph.nodes if n.op == "placeholder"]
    for node in calls:
        if node.op == "get_attr":
            space[node.name] = weight(program, node).detach()
            continue
        if node.target is aten._assert_tensor_metadata.default or "guard" in str(node.target):
            continue
        space[f"f_{node.name}"] = node.target
        arguments = [repr(a) for a in node.args] + [f"{k}={v!r}" for k, v in node.kwargs.items()]
        lines.append(f"{node.name} = f_{node.name}({', '.join(arguments)})")
        dead = [s.name for s, user in last.items() if user is node and s.op == "call_function"]
        if dead:
            lines.append(f"del {', '.join(dead)}")
    result = program.graph.output_node().args[0]
    result = result[0] if isinstance(result, (tuple, list)) else result
    body = "\n    ".join([*lines, f"return {result}"])
    exec(f"def run({', '.join(inputs)}):\n    {body}", space)
    return torch.no_grad()(space["run"])


# A model to try it on ------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """Convolutions with batch norm, then attention spelled by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 64, 4, 4), nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 64, 2, 2), nn.BatchNorm2d(64)
        )
        self.qkv = nn.Linear(64, 192)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Images f32 [batch, 3, 128, 128] to token features f32 [batch, 4, 256, 16]."""
        tokens = self.stem(image).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(tokens).reshape(tokens.shape[0], -1, 3, 4, 16).permute(2, 0, 3, 1, 4).unbind(0)
        scores = torch.matmul(q, k.transpose(-2, -1)) * 0.25
        return torch.matmul(scores.softmax(-1), v)


def main() -> None:
    """Optimize the block, check it, and say what happened."""
    torch.manual_seed(0)
    model, image = Block().eval(), torch.randn(4, 3, 128, 128)
    fast, report = optimize(model, (image,))
    print("\n".join(report))
    with torch.no_grad():
        assert same(fast(image), model(image)), "the optimized function gives other answers"
        print(f"in all {speed_up(lambda: model(image), lambda: fast(image)):.2f}x the speed of the model")


if __name__ == "__main__":
    main()
