"""Merge tokens of a vision transformer and see what that costs: accuracy against measured speed.

A small transformer learns the handwritten digits of scikit-learn, enlarged to 40 x 40 pixels (about a minute on two
cores). Then `MergeTokens` is swept over the number of tokens that merge away in each block; each result is timed in
turn with the exact executable of the same model, and its accuracy is taken on digits that training has not seen.

    python examples/vision_tokens.py [--epochs N] [--folder DIR]

writes accuracy.png and accuracy.html.
"""

from __future__ import annotations

import argparse
import base64
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jinja2 import Template
from torch import nn
from torch.nn import functional as F

import torchlathe
from torchlathe.passes import MergeTokens
from torchlathe.targets.measure import Comparison, compare_many

SIZE, PATCH, WIDTH, HEADS, DEPTH, BATCH = 40, 4, 192, 3, 6, 64
PAGE = """<!doctype html><meta charset="utf-8"><title>Accuracy against speed</title>
<style>body{font:16px sans-serif;margin:2em auto;max-width:46em}td,th{padding:.2em 1em;text-align:right}</style>
<h1>Merging tokens of a vision transformer</h1>
<p>{{ tokens }} tokens, {{ depth }} blocks, batches of {{ batch }}. Speed is against the exact executable.</p>
<img alt="accuracy against speed" src="data:image/png;base64,{{ image }}" width="640">
<table><tr><th>merged in each block<th>tokens at the end<th>speed<th>accuracy</tr>
{% for p in points %}<tr><td>{{ p.r }}<td>{{ p.left }}<td>{{ "%.2f"|format(p.speed) }}
<td>{{ "%.1f"|format(100 * p.accuracy) }}%</tr>{% endfor %}</table>
"""


class Block(nn.Module):
    """Pre-norm attention and feed-forward."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, tokens, width] to the same."""
        b, t, _ = x.shape
        q, k, v = self.qkv(self.first(x)).view(b, t, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v)
        x = x + self.out(y.transpose(1, 2).reshape(b, t, WIDTH))
        return x + self.down(F.gelu(self.up(self.second(x))))


class Digits(nn.Module):
    """A vision transformer with a class token."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, WIDTH, PATCH, PATCH)
        self.token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.places = nn.Parameter(0.02 * torch.randn(1, (SIZE // PATCH) ** 2 + 1, WIDTH))
        self.blocks = nn.Sequential(*(Block() for _ in range(DEPTH)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """[batch, 1, 40, 40] to logits [batch, 10]."""
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.places
        return self.head(self.norm(self.blocks(x))[:, 0])


@dataclass(frozen=True)
class Point:
    """One reduction: tokens merged in each block, tokens at the end, speed against exact, share of right answers."""

    r: int
    left: int
    speed: float
    accuracy: float


def data() -> tuple[torch.Tensor, torch.Tensor]:
    """Images [1797, 1, 40, 40], between 0 and 1, and labels, shuffled."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return F.interpolate(images, (SIZE, SIZE), mode="bilinear")[order], torch.tensor(digits.target)[order]


def train(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, epochs: int) -> None:
    """AdamW with one cycle of the learning rate, images shifted by up to three pixels."""
    steps = epochs * (len(images) // BATCH)
    adam = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    cycle = torch.optim.lr_scheduler.OneCycleLR(adam, 2e-3, total_steps=steps)
    for _ in range(epochs):
        for rows in torch.randperm(len(images))[: len(images) // BATCH * BATCH].split(BATCH):
            across, down = torch.randint(-3, 4, (2,)).tolist()
            loss = F.cross_entropy(model(images[rows].roll((across, down), (2, 3))), labels[rows])
            adam.zero_grad()
            loss.backward()
            adam.step()
            cycle.step()


@torch.no_grad()
def accuracy(run: Any, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of right answers over whole batches."""
    whole = len(images) // BATCH * BATCH
    found = torch.cat([run(batch).argmax(1) for batch in images[:whole].split(BATCH)])
    return float((found == labels[:whole]).double().mean())


def sweep(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, numbers: list[int]) -> list[Point]:
    """Optimize with each number of merged tokens, measure speed in turn and accuracy."""
    example = (images[:BATCH],)
    runs = {r: torchlathe.optimize(model, example, passes=["default", *([MergeTokens(r=r)] if r else [])])
            for r in [0, *numbers]}  # fmt: skip
    seen = compare_many({str(r): (lambda f=f: f(*example)) for r, f in runs.items()}, budget=20.0)
    points = []
    for r, run in runs.items():
        left = (SIZE // PATCH) ** 2 + 1
        for _ in range(DEPTH):
            left -= min(r, (left - 1) // 2)
        ratio = Comparison.of(seen["0"], seen[str(r)]).ratio
        points.append(Point(r, left, 1 / ratio, accuracy(run, images, labels)))
        print(f"r={r}: {left} tokens at the end, {1 / ratio:.2f}x, {100 * points[-1].accuracy:.1f}%", flush=True)
    return points


def draw(points: list[Point], folder: Path) -> None:
    """accuracy.png and accuracy.html."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.add_subplot()
    axes.plot([p.speed for p in points], [100 * p.accuracy for p in points], "o-")
    for p in points:
        axes.annotate(f"r={p.r}", (p.speed, 100 * p.accuracy), textcoords="offset points", xytext=(4, 6))
    axes.set(xlabel="speed against the exact executable", ylabel="accuracy, %", title="MergeTokens on digits")
    axes.grid(alpha=0.3)
    figure.savefig(folder / "accuracy.png", dpi=150)
    image = base64.b64encode((folder / "accuracy.png").read_bytes()).decode()
    page = Template(PAGE, autoescape=True).render(
        points=points, image=image, tokens=(SIZE // PATCH) ** 2 + 1, depth=DEPTH, batch=BATCH
    )
    (folder / "accuracy.html").write_text(page, "utf-8")


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description="accuracy against speed of merging tokens")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--numbers", type=int, nargs="+", default=[4, 8, 12, 16, 24])
    parser.add_argument("--folder", type=Path, default=Path())
    options = parser.parse_args()
    torch.manual_seed(0)
    images, labels = data()
    model, start = Digits(), time.perf_counter()
    train(model, images[:1400], labels[:1400], options.epochs)
    model.eval()
    print(f"trained in {time.perf_counter() - start:.0f} s", flush=True)
    points = sweep(model, images[1400:], labels[1400:], options.numbers)
    options.folder.mkdir(parents=True, exist_ok=True)
    draw(points, options.folder)
    print(f"wrote {options.folder / 'accuracy.png'} and {options.folder / 'accuracy.html'}")


if __name__ == "__main__":
    main()
