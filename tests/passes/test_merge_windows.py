"""MergeTokens with windows of a grid, against the formula written out on a small diffusion transformer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from encoders import WIDTH, Block, Encoder
from torch import nn
from torch.nn import functional as F
from windows import by_formula

from torchlathe import targets
from torchlathe.passes import ops
from torchlathe.passes.base import Context, Refusal
from torchlathe.passes.capture import capture
from torchlathe.passes.lossy.merge_tokens import MergeTokens
from torchlathe.passes.lossy.settings import operations
from torchlathe.passes.verify import well_formed

CONTEXT = Context(targets.get("cpu"))


class Layer(Block):
    """Scale, shift and gate of both parts come from the condition, as in diffusion transformers."""

    def __init__(self) -> None:
        super().__init__("plain")
        self.condition = nn.Linear(WIDTH, 6 * WIDTH)

    def forward(self, x: torch.Tensor, c: Any, merged: Any = None) -> torch.Tensor:
        a, b, g, d, e, h = self.condition(F.silu(c))[:, None].chunk(6, -1)
        few, size, places = merged(x) if merged else (x, None, None)
        y = self.attend(self.first(few) * (1 + a) + b, None if size is None else size.log()[:, None, None])[0] * g
        x = x + (y if places is None else torch.stack([row[p] for row, p in zip(y, places, strict=True)]))
        return x + self.down(F.gelu(self.up(self.second(x) * (1 + d) + e))) * h


class Diffusion(nn.Module):
    """A convolution to patches, two layers over the grid, and back to an image; with a token of the text in front."""

    def __init__(self, more: int = 0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patch, self.back = nn.Conv2d(4, WIDTH, 2, 2), nn.Linear(WIDTH, 16)
        self.place, self.token = nn.Parameter(torch.randn(1, 48, WIDTH)), nn.Parameter(torch.randn(1, more, WIDTH))
        self.layers, self.more = nn.ModuleList(Layer() for _ in range(2)), more

    def forward(self, x: torch.Tensor, c: torch.Tensor, merged: Any = None) -> torch.Tensor:
        y = self.patch(x)
        b, _, h, w = y.shape
        y = y.flatten(2).transpose(1, 2) + self.place
        if self.more:
            y = torch.cat([self.token.expand(b, -1, -1), y], 1)
        for layer in self.layers:
            y = layer(y, c, merged)
        y = self.back(y[:, self.more :] if self.more else y).view(b, h, w, 2, 2, 4)
        return y.permute(0, 5, 1, 3, 2, 4).reshape(b, 4, 2 * h, 2 * w)


def inputs(batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(batch)
    return torch.randn(batch, 4, 12, 16), torch.randn(batch, WIDTH)


@pytest.mark.parametrize(("batch", "r", "windows", "more"), [
    (3, 0.5, (2, 2), 0), (1, 30, (2, 2), 0), (3, 0.25, (1, 2), 3), (3, 17, (3, 5), 0),
])  # fmt: skip
@torch.no_grad()
def test_equals_the_formula(batch: int, r: float, windows: tuple[int, int], more: int) -> None:
    model, args = Diffusion(more).eval(), inputs(batch)
    program = capture(model, args)
    whole = operations(program)
    assert MergeTokens(r=r, restore=True, windows=windows).run(program, CONTEXT) == 2
    well_formed(program)
    assert operations(program) < whole
    count = int(r * (48 + more)) if isinstance(r, float) else r
    wanted = model(*args, lambda x: by_formula(x, count, windows, (6, 8), more))
    torch.testing.assert_close(program(*args), wanted, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_nothing_to_merge_changes_nothing() -> None:
    program = capture(Diffusion().eval(), inputs(1))
    before = program.text()
    for r in (0, 0.0):
        assert MergeTokens(r=r, restore=True, windows=(2, 2)).run(program, CONTEXT) == 0
    assert program.text() == before


@pytest.mark.parametrize(("model", "args", "knobs", "reason"), [
    (Diffusion(), inputs(1), {"windows": (2, 2)}, "restore"),
    (Diffusion(), inputs(1), {"windows": (0, 2), "restore": True}, "windows of"),
    (Diffusion(), inputs(1), {"windows": (2, 2), "restore": True, "r": 37}, "cannot be merged"),
    (Encoder("plain"), (torch.randn(1, 36, 12),), {"windows": (2, 2), "restore": True}, "flattening a grid"),
], ids=["around", "empty", "corners", "no-grid"])  # fmt: skip
def test_windows_that_are_none_are_refused(
    model: nn.Module, args: tuple[torch.Tensor, ...], knobs: dict[str, Any], reason: str
) -> None:
    outcome = MergeTokens(**{"r": 2, **knobs}).run(capture(model.eval(), args), CONTEXT)
    assert isinstance(outcome, Refusal) and reason in str(outcome), outcome


def test_the_operator_merges_into_goals_only() -> None:
    torch.manual_seed(0)
    x, size = torch.randn(2, 9, 4), torch.ones(2, 9)
    _, sizes, kept, places = ops.merge_tokens()(x, size, x, 100, [0, -1], None, [2, 3])
    assert kept.tolist() == [[0, 2, 3, 8]] * 2 and sizes[:, [0, 3]].eq(1).all() and (sizes.sum(1) == 9).all()
    assert places[:, [0, 2, 3, 8]].tolist() == [[0, 1, 2, 3]] * 2
    assert ops.merge_tokens()(x, size, x, 3, [4], None, [4])[0].shape == x.shape  # the only goal stays alone
    with pytest.raises(ValueError, match="padding"):
        ops.merge_tokens()(x, size, x, 3, [], size > 0, [2])
