"""The hand-written half of the zoo: nets as users write them, each with another habit that a compiler must bear."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Built = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]


def nets() -> dict[str, Callable[[], Built]]:
    """Builders by kebab-case name."""
    image = (2, 3, 64, 64)
    return {
        "mlp": built(lambda: Mlp(512, 1024, 64), (64, 512)),
        "residual-conv": built(lambda: ResidualConv(32, 3), image),
        "separable-conv": built(lambda: SeparableConv(32, 3), image),
        "parallel-conv": built(
            lambda: nn.Sequential(*[ParallelConv(3 if i == 0 else 32, 32) for i in range(3)]), image
        ),
        "u-net": built(lambda: UNet(16), image),
        "lstm-tagger": built(lambda: LstmTagger(500, 96, 9), lambda: torch.randint(0, 500, (4, 32))),
        "gru-forecaster": built(lambda: GruForecaster(16, 64), (4, 48, 16)),
        "temporal-conv": built(lambda: TemporalConv(64, 4), (4, 64, 256)),
        "qk-norm-vit": built(lambda: PatchNet(192, 3, 6), (4, 3, 64, 64)),
        "mlp-mixer": built(lambda: Mixer(64, 128, 3), (4, 3, 64, 64)),
        "torch-encoder": built(torch_encoder, (4, 48, 128)),
        "dict-in-dataclass-out": dict_in,
        "shape-shuffle": built(lambda: ShapeShuffle(48), (8, 48, 257)),
        "fourier-mixer": built(lambda: FourierMixer(128, 3), (4, 96, 128)),
        "spectral-gate": built(lambda: SpectralGate(128, 256), (8, 256, 128)),
        "branching": built(lambda: Branching(256), (64, 256)),
    }


def built(make: Callable[[], nn.Module], given: tuple[int, ...] | Callable[[], Tensor]) -> Callable[[], Built]:
    """A builder of a net with one input: normal numbers of a shape, or what `given` makes."""

    def build() -> Built:
        torch.manual_seed(0)
        net = make().eval()
        for module in net.modules():
            if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):  # fresh statistics would fold to nothing
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.2)
                nn.init.normal_(module.running_mean, std=0.2)  # type: ignore[arg-type]
                nn.init.uniform_(module.running_var, 0.5, 2.0)  # type: ignore[arg-type]
        return net, (torch.randn(given) if isinstance(given, tuple) else given(),), {}

    return build


class Mlp(nn.Module):
    """Linear layers with GELU, dropout and a normalised output."""

    def __init__(self, features: int, hidden: int, classes: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(features, hidden), nn.GELU(), nn.Dropout(0.1), nn.Linear(hidden, hidden), nn.SiLU(),
            nn.Dropout(0.1), nn.BatchNorm1d(hidden), nn.Linear(hidden, classes), nn.LogSoftmax(dim=-1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class ConvBlock(nn.Module):
    """conv, batch norm, ReLU, twice, with an in-place residual add."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.first_norm = nn.BatchNorm2d(width)
        self.second = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.second_norm = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.first_norm(self.first(x)), inplace=True)
        y = self.second_norm(self.second(y))
        y += x
        return F.relu_(y)


class ResidualConv(nn.Module):
    """Stem, residual blocks, global average, classifier."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 5, 2, 2), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
        self.blocks = nn.Sequential(*[ConvBlock(width) for _ in range(depth)])
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


class SeparableConv(nn.Module):
    """Depthwise and pointwise convolutions with squeeze-and-excite gates."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, stride=2, padding=1)
        self.wide = nn.ModuleList(nn.Conv2d(width, 2 * width, 1) for _ in range(depth))
        self.depthwise = nn.ModuleList(
            nn.Conv2d(2 * width, 2 * width, 3, padding=1, groups=2 * width) for _ in range(depth)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(2 * width) for _ in range(depth))
        self.gates = nn.ModuleList(nn.Conv2d(2 * width, 2 * width, 1) for _ in range(depth))
        self.narrow = nn.ModuleList(nn.Conv2d(2 * width, width, 1) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for wide, deep, norm, gate, narrow in zip(
            self.wide, self.depthwise, self.norms, self.gates, self.narrow, strict=True
        ):
            y = F.hardswish(norm(deep(F.relu6(wide(x)))))
            y = y * F.hardsigmoid(gate(F.adaptive_avg_pool2d(y, 1)))
            x = x + narrow(y)
        return x


class ParallelConv(nn.Module):
    """3x3, 1x1 and identity branches, each with its batch norm, summed (as RepVGG trains)."""

    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        self.large = nn.Sequential(nn.Conv2d(inner, outer, 3, padding=1, bias=False), nn.BatchNorm2d(outer))
        self.small = nn.Sequential(nn.Conv2d(inner, outer, 1, bias=False), nn.BatchNorm2d(outer))
        self.straight = nn.BatchNorm2d(inner) if inner == outer else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.large(x) + self.small(x)
        return F.relu(y if self.straight is None else y + self.straight(x))


class UNet(nn.Module):
    """Two levels down and up again, skips by concatenation, group norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.down = nn.ModuleList([self.level(3, width), self.level(width, 2 * width)])
        self.middle = self.level(2 * width, 4 * width)
        self.up = nn.ModuleList(
            [nn.ConvTranspose2d(4 * width, 2 * width, 2, 2), nn.ConvTranspose2d(2 * width, width, 2, 2)]
        )
        self.merge = nn.ModuleList([self.level(4 * width, 2 * width), self.level(2 * width, width)])
        self.head = nn.Conv2d(width, 2, 1)

    @staticmethod
    def level(inner: int, outer: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(inner, outer, 3, padding=1), nn.GroupNorm(4, outer), nn.LeakyReLU(0.1))

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for level in self.down:
            x = level(x)
            skips.append(x)
            x = F.max_pool2d(x, 2)
        x = self.middle(x)
        for up, merge in zip(self.up, self.merge, strict=True):
            x = merge(torch.cat([up(x), skips.pop()], dim=1))
        return torch.sigmoid(self.head(x))


class LstmTagger(nn.Module):
    """Embedding, bidirectional LSTM of two layers, tag scores."""

    def __init__(self, words: int, width: int, tags: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, width, padding_idx=0)
        self.lstm = nn.LSTM(width, width, num_layers=2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(2 * width, tags)

    def forward(self, words: Tensor) -> tuple[Tensor, Tensor]:
        found, (_, cell) = self.lstm(self.embed(words))
        return F.log_softmax(self.head(found), dim=-1), cell


class GruForecaster(nn.Module):
    """A hand-rolled scan over GRU cells, then a linear head."""

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.gru = nn.GRU(features, width, batch_first=True)
        self.cell = nn.GRUCell(features, width)
        self.head = nn.Linear(width, features)

    def forward(self, x: Tensor) -> Tensor:
        _, last = self.gru(x)
        hidden, step, steps = last[0], x[:, -1], []
        for _ in range(6):
            hidden = self.cell(step, hidden)
            step = self.head(hidden)
            steps.append(step)
        return torch.stack(steps, dim=1)


class TemporalConv(nn.Module):
    """Causal dilated convolutions with gated activations and weight norm."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            nn.utils.parametrizations.weight_norm(nn.Conv1d(width, 2 * width, 3, dilation=2**i)) for i in range(depth)
        )

    def forward(self, x: Tensor) -> Tensor:
        for i, conv in enumerate(self.convs):
            gate, value = conv(F.pad(x, (2 * 2**i, 0))).chunk(2, dim=1)
            x = x + torch.sigmoid(gate) * torch.tanh(value)
        return x


class NormedAttention(nn.Module):
    """Multi-head attention, written out, with normalised queries and keys and a learned temperature."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.norm_q, self.norm_k = nn.LayerNorm(width // heads), nn.LayerNorm(width // heads)
        self.temperature = nn.Parameter(torch.full((heads, 1, 1), math.log(4.0)))
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(x).reshape(batch, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        scores = self.norm_q(q) @ self.norm_k(k).transpose(-2, -1) * self.temperature.exp() / math.sqrt(q.shape[-1])
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, length, width))


class PatchNet(nn.Module):
    """A vision transformer with QK-norm, a class token and layer scale."""

    def __init__(self, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 8, stride=8)
        self.first = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.position = nn.Parameter(torch.randn(1, 65, width) * 0.02)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2 * depth))
        self.attention = nn.ModuleList(NormedAttention(width, heads) for _ in range(depth))
        self.feed = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))
            for _ in range(depth)
        )
        self.scale = nn.Parameter(torch.full((2 * depth, width), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.first.expand(x.shape[0], -1, -1), x], dim=1) + self.position
        for i, (attention, feed) in enumerate(zip(self.attention, self.feed, strict=True)):
            x = x + self.scale[2 * i] * attention(self.norms[2 * i](x))
            x = x + self.scale[2 * i + 1] * feed(self.norms[2 * i + 1](x))
        return x[:, 0]


class Mixer(nn.Module):
    """MLPs over tokens and over channels in turn."""

    def __init__(self, tokens: int, width: int, depth: int) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 8, stride=8)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2 * depth))
        self.over_tokens = nn.ModuleList(
            nn.Sequential(nn.Linear(tokens, 2 * tokens), nn.GELU(), nn.Linear(2 * tokens, tokens)) for _ in range(depth)
        )
        self.over_width = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)) for _ in range(depth)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).mT
        for i, (tokens, width) in enumerate(zip(self.over_tokens, self.over_width, strict=True)):
            x = x + tokens(self.norms[2 * i](x).mT).mT
            x = x + width(self.norms[2 * i + 1](x))
        return x.mean(1)


def torch_encoder() -> nn.Module:
    """PyTorch's own pre-norm transformer encoder."""
    layer = nn.TransformerEncoderLayer(128, 4, 512, batch_first=True, norm_first=True, activation="gelu")
    return nn.TransformerEncoder(layer, 3, norm=nn.LayerNorm(128), enable_nested_tensor=False)


class Extent(NamedTuple):
    """Lower and upper bound."""

    low: Tensor
    high: Tensor


@dataclass
class Forecast:
    """A structured result."""

    mean: Tensor
    extent: Extent
    parts: dict[str, list[Tensor]]


class DictIn(nn.Module):
    """Takes a dictionary and a keyword, returns a dataclass that holds a named tuple and a dictionary of lists."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.numbers = nn.Linear(8, width)
        self.kinds = nn.EmbeddingBag(20, width, mode="mean")
        self.out = nn.Linear(width, 3)

    def forward(self, batch: dict[str, Tensor], *, scale: float = 1.0) -> Forecast:
        hidden = F.elu(self.numbers(batch["numbers"]) + self.kinds(batch["kinds"]))
        mean, low, high = (self.out(hidden) * scale).unbind(-1)
        return Forecast(mean, Extent(mean - low.abs(), mean + high.exp()), {"hidden": [hidden, hidden.square()]})


def dict_in() -> Built:
    """Builder of `DictIn`."""
    if Forecast not in torch.utils._pytree.SUPPORTED_NODES:
        torch.utils._pytree.register_dataclass(Forecast)
    torch.manual_seed(0)
    batch = {"numbers": torch.randn(512, 8), "kinds": torch.randint(0, 20, (512, 5))}
    return DictIn(512).eval(), (batch,), {"scale": 2.0}


class ShapeShuffle(nn.Module):
    """Cuts, turns, pads, resizes and contracts its input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.randn(3, width // 3, width // 3) / 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        low, middle, high = x.split(x.shape[1] // 3, dim=1)
        y = torch.stack([low, torch.roll(middle, 2, dims=-1), high.flip(-1)], dim=1)
        y = torch.einsum("bkct,kcd->bkdt", y, self.mix)
        y = F.pad(y, (1, 2), value=0.5).unfold(-1, 4, 4).amax(-1)
        wide = F.interpolate(y.flatten(1, 2), size=x.shape[-1], mode="linear")
        top, places = torch.cat([wide, x[:, ::2]], dim=1).topk(3, dim=1)
        return top.gather(1, places.remainder(3)), y.repeat_interleave(2, dim=2).cumsum(-1)


class FourierMixer(nn.Module):
    """Real part of a two-dimensional Fourier transform in place of attention."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(depth))
        self.feed = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)) for _ in range(depth)
        )

    def forward(self, x: Tensor) -> Tensor:
        for norm, feed in zip(self.norms, self.feed, strict=True):
            x = norm(x + torch.fft.fft2(x, dim=(-2, -1), norm="ortho").real)
            x = x + feed(x)
        return x


class SpectralGate(nn.Module):
    """A learned complex filter over the token axis."""

    def __init__(self, width: int, length: int) -> None:
        super().__init__()
        self.filter = nn.Parameter(torch.randn(length // 2 + 1, width, 2) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft(x, dim=1, norm="ortho") * torch.view_as_complex(self.filter)
        return torch.fft.irfft(spectrum, n=x.shape[1], dim=1, norm="ortho")


class Branching(nn.Module):
    """Leaves early if the first layer is sure: a branch that only Python can take."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        if x.mean() > 100:
            print("early")
            return x
        return torch.relu(self.second(x))
