"""The discriminator D(x, k) or D(x, x_T, k): one network for the images of every head."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from advkd.config import DiscriminatorConfig
from advkd.models.layers import (
    Attention,
    Conv3x3,
    GroupNormSiLU,
    ResnetBlock,
    area_resized,
)


def resized_noise(x_T: Tensor, size: int) -> Tensor:
    """x_T averaged down to `size` and scaled so that its standard deviation stays 1."""
    return area_resized(x_T, size) * (x_T.shape[-1] // size)


class Halving(nn.Module):
    """Averages 2x2 pixels, then a 3x3 convolution: (B, C, H, W) -> (B, C_out, H/2, W/2)."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.conv = Conv3x3(in_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.conv(F.avg_pool2d(x, 2))
        return h


class Discriminator(nn.Module):
    """Logits that images are real: x (B, C, r, r), head k -> (B,).

    The trunk works at resolutions S/2, S/4, ... with `config.widths` channels. An image of full
    resolution enters through a residual block of `config.full` channels at its own resolution, or
    where that is 0 through a convolution with stride 2; a smaller one at the level of its own
    resolution. What halves the resolution averages first, so that no frequency is folded onto
    another. With `sees_noise` x_T (B, C, S, S) is concatenated to the image: D then tells
    whether x is the teacher's image of x_T. k and the label y act by projection (Miyato & Koyama
    2018). Raises ValueError for a size that cannot be halved so often and for a resolution in
    `stages` that is no level.
    """

    def __init__(
        self,
        config: DiscriminatorConfig,
        size: int,
        channels: int,
        stages: Sequence[int],
        num_classes: int | None = None,
        sees_noise: bool = True,
    ):
        super().__init__()
        widths = config.widths
        self.levels = [size >> (i + 1) for i in range(len(widths))]
        if not widths:
            raise ValueError("discriminator.widths is empty")
        if size % (1 << len(widths)):
            raise ValueError(f"{len(widths)} halvings do not fit images of size {size}")
        self.size, self.stages, self.sees_noise = size, tuple(stages), sees_noise
        self.entrances = nn.ModuleDict()
        for r in sorted(set(stages)):
            level = self._level(r)
            seen = channels * (1 + sees_noise)
            if r == size and config.full:
                self.entrances[str(r)] = nn.Sequential(
                    nn.Conv2d(seen, config.full, 3, padding=1),
                    ResnetBlock(config.full, config.full, None, min(config.groups, config.full)),
                    Halving(config.full, widths[level]),
                )
            else:
                stride = 2 if r == size else 1
                self.entrances[str(r)] = nn.Conv2d(seen, widths[level], 3, stride, padding=1)
        self.blocks = nn.ModuleList(ResnetBlock(w, w, None, config.groups) for w in widths)
        self.attentions = nn.ModuleDict(
            {
                str(i): Attention(w, None, config.groups)
                for i, (w, r) in enumerate(zip(widths, self.levels, strict=True))
                if r in config.attention
            }
        )
        self.downs = nn.ModuleList(Halving(a, b) for a, b in itertools.pairwise(widths))
        self.norm_out = GroupNormSiLU(config.groups, widths[-1])
        self.dense = nn.Linear(widths[-1] * self.levels[-1] ** 2, widths[-1])
        self.out = nn.Linear(widths[-1], 1)
        self.head_embedding = nn.Embedding(len(stages), widths[-1])
        self.class_embedding = nn.Embedding(num_classes, widths[-1]) if num_classes else None
        for embedding in (self.head_embedding, self.class_embedding):
            if embedding is not None:
                nn.init.normal_(embedding.weight, std=widths[-1] ** -0.5)

    def _level(self, resolution: int) -> int:
        if resolution == self.size:
            return 0
        if resolution not in self.levels:
            raise ValueError(f"the discriminator has no level for images of size {resolution}")
        return self.levels.index(resolution)

    def forward(self, x: Tensor, x_T: Tensor | None, k: int, y: Tensor | None = None) -> Tensor:
        """Logits (B,) of head k's images x (B, C, r, r), sampled from x_T; y (B,) int64 labels.

        ValueError unless x_T is given exactly where D sees the noise, and y where it has classes.
        """
        r = x.shape[-1]
        if self.sees_noise != (x_T is not None):
            raise ValueError(
                "this discriminator sees an image beside its noise: pass x_T (B, C, S, S)"
                if self.sees_noise
                else "this discriminator does not see the noise: pass x_T=None"
            )
        if x_T is not None:
            x = torch.cat([x, resized_noise(x_T, r)], dim=1)
        h = self.entrances[str(r)](x)
        first = self._level(r)
        for i in range(first, len(self.blocks)):
            if i > first:
                h = self.downs[i - 1](h)
            h = self.blocks[i](h)
            if str(i) in self.attentions:
                h = self.attentions[str(i)](h)
        phi = F.silu(self.dense(self.norm_out(h).flatten(1)))
        projected = self.head_embedding.weight[k].expand_as(phi)
        if self.class_embedding is not None:
            if y is None:
                raise ValueError("this discriminator is class-conditional: pass labels y (B,)")
            projected = projected + self.class_embedding(y)
        elif y is not None:
            raise ValueError("this discriminator is unconditional: it takes no labels")
        logits: Tensor = self.out(phi).squeeze(1) + (projected * phi).sum(dim=1)
        return logits
