"""Merge tokens of a vision transformer and see what that costs: accuracy against measured speed.

A small transformer learns the handwritten digits of scikit-learn, enlarged to 32 x 32 pixels (one to two minutes on
two cores that have nothing else to do). Then `MergeTokens` is swept over the number of tokens that merge away in each
block; each result is timed in turn with the exact executable of the same model, and its accuracy is taken on digits
that training has not seen.

    python examples/vision_tokens.py [--quick] [--folder DIR]

writes accuracy.html and accuracy.png. What these need beside torchlathe itself comes with
`pip install 'torchlathe[bench]'`. A reduction that is not measurably faster than the exact model is undone by
`optimize`: the sweep says so, and the curve leaves it out.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
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

SIZE, TOKENS, WIDTH, HEADS, DEPTH, BATCH = 32, 64, 96, 3, 4, 64
SMALL = 32  # images of one step of training
TRAINED_ON = 1400  # of 1,797 images; the others are held out
PAGE = """<!doctype html><meta charset="utf-8"><title>Accuracy against speed</title>
<style>body{font:16px sans-serif;margin:2em auto;max-width:46em}td,th{padding:.2em 1em;text-align:right}
svg{max-width:100%}text{font:12px sans-serif}</style>
<h1>Merging tokens of a vision transformer</h1>
<p>{{ tokens }} tokens, {{ depth }} blocks, batches of {{ batch }}; {{ images }} digits that training has not seen.
Speed is against the exact executable, timed in turn with it.</p>
<svg viewBox="0 0 640 340" role="img" aria-label="accuracy against speed">
{% for y, label in rows %}<line x1="60" x2="620" y1="{{ y }}" y2="{{ y }}" stroke="#ddd"/>
<text x="52" y="{{ y + 4 }}" text-anchor="end">{{ label }}</text>{% endfor %}
{% for x, label in columns %}<line x1="{{ x }}" x2="{{ x }}" y1="20" y2="290" stroke="#ddd"/>
<text x="{{ x }}" y="308" text-anchor="middle">{{ label }}</text>{% endfor %}
<polyline fill="none" stroke="#1764ab" stroke-width="2" points="{% for d in dots %}{{ d.x }},{{ d.y }} {% endfor %}"/>
{% for d in dots %}<circle cx="{{ d.x }}" cy="{{ d.y }}" r="4" fill="#1764ab"/>
<text x="{{ d.x + 6 }}" y="{{ d.y - 8 }}">r={{ d.r }}</text>{% endfor %}
<text x="340" y="332" text-anchor="middle">speed against the exact executable</text>
<text x="60" y="12">accuracy, %</text></svg>
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
    """A vision transformer: two strided convolutions make the tokens, waves their places, a mean the answer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 24, 3, 2, 1), nn.BatchNorm2d(24), nn.GELU(),
                                  nn.Conv2d(24, WIDTH, 3, 2, 1), nn.BatchNorm2d(WIDTH))  # fmt: skip
        self.places = nn.Parameter(waves())
        self.blocks = nn.Sequential(*(Block() for _ in range(DEPTH)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """[batch, 1, 32, 32] to logits [batch, 10]."""
        x = self.stem(images).flatten(2).transpose(1, 2) + self.places
        return self.head(self.norm(self.blocks(x)).mean(1))


def waves() -> torch.Tensor:
    """Sines and cosines of the row and the column of each token, [1, tokens, width]: neighbours begin alike."""
    side = math.isqrt(TOKENS)
    rates = torch.arange(side)[:, None] * torch.logspace(0, -1.5, WIDTH // 4)
    one = torch.cat([rates.sin(), rates.cos()], 1)
    return 0.5 * torch.cat([one.repeat_interleave(side, 0), one.repeat(side, 1)], 1)[None]


@dataclass(frozen=True)
class Point:
    """One reduction: tokens merged in each block, tokens at the end, speed against exact, share of right answers."""

    r: int
    left: int
    speed: float
    accuracy: float


def data() -> tuple[torch.Tensor, torch.Tensor]:
    """Images [1797, 1, 32, 32], between 0 and 1, and labels, shuffled."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return F.interpolate(images, (SIZE, SIZE), mode="bilinear")[order], torch.tensor(digits.target)[order]


def train(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, epochs: int) -> None:
    """AdamW; the learning rate rises over the first tenth and falls as a cosine; images are shifted by a few pixels."""
    steps = epochs * (len(images) // SMALL)
    adam = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
    cycle = torch.optim.lr_scheduler.OneCycleLR(adam, 3e-3, total_steps=steps, pct_start=0.1)
    for _ in range(epochs):
        for rows in torch.randperm(len(images))[: len(images) // SMALL * SMALL].split(SMALL):
            shift = tuple(torch.randint(-2, 3, (2,)).tolist())
            loss = F.cross_entropy(model(images[rows].roll(shift, (2, 3))), labels[rows])
            adam.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            adam.step()
            cycle.step()


@torch.no_grad()
def accuracy(run: Any, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of right answers; the last batch is filled up with images that do not count."""
    filled = torch.cat([images, images[: -len(images) % BATCH]])
    found = torch.cat([run(batch).argmax(1) for batch in filled.split(BATCH)])
    return float((found[: len(labels)] == labels).double().mean())


def sweep(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, numbers: list[int], level: str,
          seconds: float) -> list[Point]:  # fmt: skip
    """Optimize with each number of merged tokens, measure speed in turn and accuracy."""
    example, runs = (images[:BATCH],), dict[int, Any]()
    for r in [0, *numbers]:
        passes = ["default", *([MergeTokens(r=r)] if r else [])]
        run = torchlathe.optimize(model, example, level=level, passes=passes)
        undone = next(
            (s.reason or s.refusal for s in run.report.steps if s.name == "merge-tokens" and not s.kept), None
        )
        if undone is None:
            runs[r] = run
        else:
            print(f"r={r} is undone: {undone}", flush=True)
    seen = compare_many({str(r): (lambda f=f: f(*example)) for r, f in runs.items()}, budget=seconds)
    points = []
    for r, run in runs.items():
        left = TOKENS
        for _ in range(DEPTH):
            left -= min(r, left // 2)
        ratio = Comparison.of(seen["0"], seen[str(r)]).ratio
        points.append(Point(r, left, 1 / ratio, accuracy(run, images, labels)))
        print(f"r={r}: {left} tokens at the end, {1 / ratio:.2f}x, {100 * points[-1].accuracy:.1f}%", flush=True)
    return points


def page(points: list[Point], images: int) -> str:
    """accuracy.html: the curve as inline SVG, and the figures as a table."""
    bottom = math.floor(min(100 * p.accuracy for p in points))
    right = math.ceil(10 * max(*(p.speed for p in points), 1.1)) / 10
    left = math.floor(10 * min(*(p.speed for p in points), 1.0)) / 10

    def x(speed: float) -> float:
        return round(60 + 560 * (speed - left) / (right - left), 1)

    def y(percent: float) -> float:
        return round(290 - 270 * (percent - bottom) / (100 - bottom + 0.01), 1)

    every = max(1, (100 - bottom) // 5)
    rows = [(y(percent), percent) for percent in range(bottom, 101, every)]
    columns = [(x(k / 10), k / 10) for k in range(round(10 * left), round(10 * right) + 1)]
    dots = [{"x": x(p.speed), "y": y(100 * p.accuracy), "r": p.r} for p in points]
    return Template(PAGE, autoescape=True).render(
        points=points, dots=dots, rows=rows, columns=columns, images=images, tokens=TOKENS, depth=DEPTH, batch=BATCH
    )


def draw(points: list[Point], path: Path) -> None:
    """accuracy.png."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.add_subplot()
    axes.plot([p.speed for p in points], [100 * p.accuracy for p in points], "o-")
    for p in points:
        axes.annotate(f"r={p.r}", (p.speed, 100 * p.accuracy), textcoords="offset points", xytext=(4, 6))
    axes.set(xlabel="speed against the exact executable", ylabel="accuracy, %", title="MergeTokens on digits")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description="accuracy against speed of merging tokens")
    parser.add_argument("--quick", action="store_true", help="half the training, one setting, kernels untimed")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--numbers", type=int, nargs="+", default=[4, 8, 12, 14, 16])
    parser.add_argument("--folder", type=Path, default=Path())
    options = parser.parse_args()
    if any(importlib.util.find_spec(name) is None for name in ("sklearn", "matplotlib")):
        parser.error("digits and plot need scikit-learn and matplotlib: pip install 'torchlathe[bench]'")
    torch.manual_seed(0)
    images, labels = data()
    model, start = Digits(), time.perf_counter()
    train(model, images[:TRAINED_ON], labels[:TRAINED_ON], options.epochs // (2 if options.quick else 1))
    model.eval()
    unseen, right = images[TRAINED_ON:], labels[TRAINED_ON:]
    print(f"trained in {time.perf_counter() - start:.0f} s: {100 * accuracy(model, unseen, right):.1f}%", flush=True)
    level, seconds, numbers = ("fast", 4.0, [12]) if options.quick else ("default", 20.0, options.numbers)
    points = sweep(model, unseen, right, numbers, level, seconds)
    options.folder.mkdir(parents=True, exist_ok=True)
    (options.folder / "accuracy.html").write_text(page(points, len(unseen)), "utf-8")
    draw(points, options.folder / "accuracy.png")
    print(f"wrote accuracy.html and accuracy.png to {options.folder.resolve()}")


if __name__ == "__main__":
    main()
