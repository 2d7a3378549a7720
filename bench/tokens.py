"""Speed and work of token merging and pruning against the same model's own exact executable, interleaved.

    python bench/tokens.py [--model NAME] [--batch N] [--merge R ...] [--prune KEEP ...] [--markdown FILE]

The counted operations of the rewritten program stand beside those that a formula predicts for a transformer of the
model's width: 24 width**2 for each token that passes through a block's products (8 before the reduction, 16 after it)
and 4 width for each pair of tokens. Weights of the models are random, so what the reduction costs in quality is not
told here.
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from collections.abc import Sequence
from pathlib import Path

import peers_models as models
import torch

import torchlathe
from torchlathe.passes import MergeTokens, PruneTokens
from torchlathe.passes.base import Pass
from torchlathe.passes.lossy.settings import operations
from torchlathe.targets.measure import Comparison, compare_many

SIZES = {"vit-s": (197, 384, 12, 1), "vit-b": (197, 768, 12, 1)}  # tokens, width, blocks, class tokens


def classifier(name: str, batch: int) -> models.Case:
    """A vision transformer with patches of 16 that tells 1000 classes by its class token."""
    from transformers import ViTConfig, ViTForImageClassification

    _, width, blocks, _ = SIZES[name]
    config = ViTConfig(hidden_size=width, num_attention_heads=width // 64, intermediate_size=4 * width,
                       num_hidden_layers=blocks, num_labels=1000)  # fmt: skip
    return models.First(ViTForImageClassification(config), "pixel_values").eval(), models.pixels(batch)


def predicted(tokens: Sequence[int], width: int) -> int:
    """Operations of the blocks of one sample; tokens[k] go into block k, tokens[k + 1] leave it."""
    return sum(8 * a * width**2 + 4 * a * a * width + 16 * b * width**2 for a, b in itertools.pairwise(tokens))


def merged(name: str, r: int) -> list[int]:
    """Tokens before each block, and after the last, when r are merged away in each."""
    tokens, _, blocks, alone = SIZES[name]
    found = [tokens]
    for _ in range(blocks):
        found.append(found[-1] - min(r, (found[-1] - alone) // 2))
    return found


def pruned(name: str, keep: float) -> list[int]:
    """The same when a share of the free tokens is kept after a quarter, half and three quarters of the blocks."""
    tokens, _, blocks, alone = SIZES[name]
    found = [tokens]
    for block in range(blocks):
        cut = block in (blocks // 4, blocks // 2, 3 * blocks // 4)
        found.append(math.ceil((found[-1] - alone) * keep) + alone if cut else found[-1])
    return found


def table(name: str, batch: int, cases: dict[str, tuple[Pass | None, list[int]]], budget: float) -> str:
    """A markdown table, one row for each reduction."""
    torch.manual_seed(0)
    model, args = classifier(name, batch)
    executables = {}
    for case, (rewrite, _) in cases.items():
        start = time.perf_counter()
        executables[case] = torchlathe.optimize(model, args, passes=["default", *([rewrite] if rewrite else [])])
        step = next((s for s in executables[case].report.steps if rewrite and s.name == rewrite.name), None)
        verdict = "" if step is None else f", {step.reason or step.refusal or 'kept'}"
        print(f"{case}: {time.perf_counter() - start:.0f} s to compile{verdict}", flush=True)
    seen = compare_many({c: (lambda e=e: e(*args)) for c, e in executables.items()}, budget=budget)
    width, exact = SIZES[name][1], operations(executables["exact"].program)
    lines = [f"{name}, batch {batch}, float32, {torch.get_num_threads()} threads", "",
             "| reduction | tokens at the end | operations | predicted | speed | 95% interval |",
             "|---|---:|---:|---:|---:|---|"]  # fmt: skip
    blocks = batch * predicted(cases["exact"][1], width)
    for case, (_, tokens) in cases.items():
        ratio = Comparison.of(seen["exact"], seen[case])
        wanted = (exact - blocks + batch * predicted(tokens, width)) / exact
        lines.append(f"| {case} | {tokens[-1]} | {operations(executables[case].program) / exact:.3f} | {wanted:.3f} "
                     f"| {1 / ratio.ratio:.2f} | {1 / ratio.high:.2f} to {1 / ratio.low:.2f} |")  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description="speed of token reduction")
    parser.add_argument("--model", choices=SIZES, default="vit-s")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--merge", type=int, nargs="*", default=[8, 13, 16])
    parser.add_argument("--prune", type=float, nargs="*", default=[0.7, 0.5])
    parser.add_argument("--budget", type=float, default=60.0, help="seconds of sampling")
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args()
    name = options.model
    cases: dict[str, tuple[Pass | None, list[int]]] = {"exact": (None, merged(name, 0))}
    cases |= {f"merge {r}": (MergeTokens(r=r), merged(name, r)) for r in options.merge}
    cases |= {f"prune {k}": (PruneTokens(keep=k), pruned(name, k)) for k in options.prune}
    text = table(name, options.batch, cases, options.budget)
    print(text)
    if options.markdown:
        options.markdown.write_text(text + "\n")


if __name__ == "__main__":
    main()
