"""MergeFrames against the formula written out, on videos whose frames reach the tokens in several ways."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as T
from encoders import WIDTH, Block, Encoder
from torch import nn
from torch.nn import functional as F

from torchlathe import targets
from torchlathe.passes import FuseAttention
from torchlathe.passes.base import Context, Refusal
from torchlathe.passes.capture import capture
from torchlathe.passes.lossy.merge_frames import MergeFrames
from torchlathe.passes.verify import well_formed

CONTEXT = Context(targets.get("cpu"))
FRAMES, PATCHES = 4, 6


class Video(nn.Module):
    """Patches of frames that come ready (``ready``), or from a convolution over each frame or over tubelets of two."""

    def __init__(self, kind: str, token: bool = False, behind: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.front, self.behind = kind, int(token), int(behind)
        self.embed = nn.Linear(12, WIDTH)
        self.patch, self.tube = nn.Conv2d(3, WIDTH, 4, 4), nn.Conv3d(3, WIDTH, (2, 4, 4), (2, 4, 4))
        self.token, self.place = nn.Parameter(torch.randn(2, 1, WIDTH)), nn.Parameter(torch.randn(1, 24, WIDTH))
        self.blocks = nn.ModuleList(Block("plain") for _ in range(3))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 10)

    def begin(self, x: torch.Tensor) -> torch.Tensor:
        b = x.shape[0]
        if self.kind == "ready":
            y = self.embed(x).reshape(b, FRAMES * PATCHES, WIDTH)
        elif self.kind == "each":
            y = self.patch(x.flatten(0, 1)).flatten(2).transpose(1, 2).reshape(b, FRAMES * PATCHES, WIDTH)
        else:
            y = self.tube(x).flatten(2).transpose(1, 2)
        first, last = (t.expand(b, -1, -1) for t in self.token)
        return torch.cat([*[first] * self.front, y + self.place, *[last] * self.behind], 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.begin(x)
        for block in self.blocks:
            x = block(x, None)
        return self.finish(x, torch.ones_like(x[..., 0]))

    def finish(self, x: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
        x = self.norm(x)
        if self.front:
            return self.head(x[:, 0] + (x[:, -1] if self.behind else 0))
        return self.head((x * size[..., None]).sum(1) / size.sum(1, keepdim=True))


class Averaged(Video):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.begin(x)
        for block in self.blocks:
            x = block(x, None)
        return self.head(self.norm(x).mean(1))


def video(kind: str, batch: int) -> torch.Tensor:
    torch.manual_seed(batch)
    return torch.randn(batch, *{"ready": (4, 6, 12), "each": (4, 3, 8, 12), "tubelets": (3, 8, 8, 12)}[kind])


def match(x: Any, size: Any, metric: Any, sources: list[int], goals: list[int], count: int) -> dict[int, int]:
    """Where each of the `count` most similar sources goes."""
    unit = F.normalize(metric, dim=-1)
    best = {s: max(goals, key=lambda g: float(unit[s] @ unit[g])) for s in sources}
    return {s: best[s] for s in sorted(sources, key=lambda s: -float(unit[s] @ unit[best[s]]))[:count]}


def joined(x: Any, size: Any, into: dict[int, int]) -> tuple[Any, Any]:
    """Means by size of the tokens that go together, in the order of those that stay."""
    groups = [[t, *(s for s, g in into.items() if g == t)] for t in range(len(x)) if t not in into]
    means = [(x[g] * size[g, None]).sum(0) / size[g].sum() for g in groups]
    return torch.stack(means), torch.stack([size[g].sum() for g in groups])


def by_formula(model: Video, x: torch.Tensor, within: int, across: int, window: int) -> torch.Tensor:
    """Inside each frame after the first attention, inside each window after the second one."""
    results, front = [], model.front
    for sample in model.begin(x):
        y, size, each = sample[None], torch.ones(len(sample)), PATCHES
        for layer, block in enumerate(model.blocks):
            y, keys = block.after_attention(y, size.log()[None])
            metric, into = keys[0].mean(0), dict[int, int]()
            for f in range(FRAMES if layer == 0 else 0):
                places = [front + f * each + p for p in range(each)]
                into |= match(y[0], size, metric, places[::2], places[1::2], within)
            for w in range(FRAMES // window if layer == 1 else 0):
                places = [front + w * window * each + p for p in range(window * each)]
                into |= match(y[0], size, metric, places[each:], places[:each], across)
            few, size = joined(y[0], size, into)
            each -= within if layer == 0 else 0
            y = block.feed(few[None])
        results.append(model.finish(y, size[None])[0])
    return torch.stack(results)


@pytest.mark.parametrize(("model", "batch", "ratio", "window"), [
    (Averaged("ready"), 3, 0.5, 2), (Averaged("ready"), 1, (0.0, 0.75), 4), (Video("each", True), 3, (0.34, 0.5), 2),
    (Averaged("tubelets"), 3, (0.2, 0.4), 4), (Video("tubelets", True, True), 1, 0.4, 2),
], ids=["ready", "across", "each", "tubelets", "behind"])  # fmt: skip
@torch.no_grad()
def test_equals_the_formula(model: Video, batch: int, ratio: Any, window: int) -> None:
    x = video(model.kind, batch)
    program = capture(model.eval(), (x,))
    shares = ratio if isinstance(ratio, tuple) else (ratio, ratio)
    within = int(shares[0] * PATCHES)
    across = int(shares[1] * window * (PATCHES - within))
    steps = (within > 0) + (across > 0)
    assert MergeFrames(ratio=ratio, window=window, layers=(0, 1)).run(program, CONTEXT) == steps
    well_formed(program)
    wanted = by_formula(model, x, within, across, window)
    torch.testing.assert_close(program(x), wanted, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_equal_frames_merge_without_loss() -> None:
    model = Averaged("ready").eval()
    model.place.zero_()
    x = torch.randn(2, 2, 3, 12).repeat_interleave(2, 1).repeat_interleave(2, 2)  # frames and patches in pairs
    program = capture(model, (x,))
    assert MergeFrames(ratio=0.5).run(program, CONTEXT) == 2
    torch.testing.assert_close(program(x), model(x), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(program(torch.randn_like(x)), model(x), atol=1e-3)


@torch.no_grad()
def test_a_ratio_of_nothing_changes_nothing() -> None:
    program = capture(Averaged("ready").eval(), (video("ready", 2),))
    before = program.text()
    assert MergeFrames(ratio=0).run(program, CONTEXT) == 0
    assert program.text() == before


@pytest.mark.parametrize(("model", "x", "knobs", "reason"), [
    (Averaged("ready"), video("ready", 1), {"ratio": 0.6}, "cannot be merged away"),
    (Averaged("ready"), video("ready", 1), {"window": 3}, "no windows of 3"),
    (Averaged("ready"), video("ready", 1), {"window": 1, "ratio": (0.5, 0.0)}, "no windows of 1"),
    (Averaged("ready"), video("ready", 1), {"layers": (1, 3)}, "attention layers"),
    (Encoder("plain"), torch.randn(1, 36, 12), {}, "flattening a grid"),
], ids=["ratio", "window", "one", "layers", "tokens"])  # fmt: skip
def test_impossible_knobs_are_refused(model: nn.Module, x: torch.Tensor, knobs: dict[str, Any], reason: str) -> None:
    outcome = MergeFrames(**knobs).run(capture(model.eval(), (x,)), CONTEXT)
    assert isinstance(outcome, Refusal) and reason in str(outcome), outcome


class Padded(Averaged):
    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        assert mask is not None
        x = self.begin(x)
        for block in self.blocks:
            x = block(x, torch.where(mask[:, None, None], 0.0, float("-inf")))
        return self.head(self.norm(x).mean(1))


def test_padding_is_refused() -> None:
    args = video("ready", 2), torch.ones(2, 24, dtype=torch.bool)
    outcome = MergeFrames().run(capture(Padded("ready").eval(), args), CONTEXT)
    assert isinstance(outcome, Refusal) and "hides tokens" in str(outcome), outcome


SIZES = {"hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 192}
CLIPS = {**SIZES, "image_size": 32, "num_frames": 8}


@pytest.mark.parametrize(("model", "config", "extra", "tokens"), [
    ("VideoMAEModel", "VideoMAEConfig", {}, 16), ("VivitModel", "VivitConfig", {"tubelet_size": [2, 16, 16]}, 17),
], ids=["videomae", "vivit"])  # fmt: skip
@torch.no_grad()
def test_fires_on_models_of_others(model: str, config: str, extra: dict[str, Any], tokens: int) -> None:
    torch.manual_seed(0)
    net = getattr(T, model)(getattr(T, config)(**CLIPS, **extra)).eval()
    x = {"pixel_values": torch.randn(2, 8, 3, 32, 32)}
    program = capture(net, (), x)
    FuseAttention().run(program, CONTEXT)
    assert program(**x)[0].shape[1] == tokens
    assert MergeFrames(ratio=0.5).run(program, CONTEXT) == 2
    well_formed(program)
    result = program(**x)[0]
    assert result.shape[1] == tokens - 12 and result.isfinite().all()  # four frames of 4 patches: 8 left, then 4


def test_images_have_no_frames() -> None:
    net = T.ViTModel(T.ViTConfig(**SIZES, image_size=64, patch_size=16)).eval()
    program = capture(net, (), {"pixel_values": torch.randn(2, 3, 64, 64)})
    FuseAttention().run(program, CONTEXT)
    outcome = MergeFrames().run(program, CONTEXT)
    assert isinstance(outcome, Refusal) and "4 x 4 without an axis of frames" in str(outcome), outcome
