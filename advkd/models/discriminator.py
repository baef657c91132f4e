"""The discriminator D(x, k) or D(x, x_T, k): one network for the images of every head."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from advkd.config import DiscriminatorConfig
from advkd.models.layers import Attention, Conv3x3, area_resized

SLOPE = 0.2  # of the leaky ReLU below 0
SHARPNESS = 4.0  # times which an image's detail stands beside it


def resized_noise(x_T: Tensor, size: int) -> Tensor:
    """x_T averaged down to `size` and scaled so that its standard deviation stays 1."""
    return area_resized(x_T, size) * (x_T.shape[-1] // size)


def with_detail(x: Tensor) -> Tensor:
    """Images beside what each pixel differs by from the 3x3 around it, amplified: (B, 2C, H, W).

    Nearly all of an image's power is in its shapes. Without this D would take long to see a fine
    grain that makes every generated image out.
    """
    around = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    return torch.cat([x, SHARPNESS * (x - around)], dim=1)


def leaky(x: Tensor) -> Tensor:
    """Leaky ReLU, in the place of x: its gradient needs the result alone."""
    return F.leaky_relu(x, SLOPE, inplace=True)


class Discriminator(nn.Module):
    """Logits that images are real: x (B, C, r, r), head k -> (B,).

    Level i works at resolution S / 2^i with `config.widths[i]` channels, and an image enters at the
    level of its own resolution: by two convolutions at the highest, one at the others, so that D
    is shallow and learns fast. 2x2 pixels are averaged before a level halves the resolution, so
    that no frequency is folded onto another. Nothing normalizes: an image's contrast is one of the
    things that tell it. With `sees_noise` x_T (B, C, S, S) is concatenated to the image: D then
    tells whether x is the teacher's image of x_T. k and the label y act by projection (Miyato &
    Koyama 2018). Raises ValueError for a size that cannot be halved so often and for a resolution
    in `stages` that is no level.
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
        if not widths:
            raise ValueError("discriminator.widths is empty")
        halvings = len(widths) - 1
        if size % (1 << halvings):
            raise ValueError(f"{halvings} halvings do not fit images of size {size}")
        self.levels = [size >> i for i in range(len(widths))]
        self.size, self.stages, self.sees_noise = size, tuple(stages), sees_noise
        seen = channels * (3 if sees_noise else 2)
        self.entrances = nn.ModuleDict(
            {
                str(r): nn.Conv2d(seen, widths[self._level(r)], 3, padding=1)
                for r in sorted(set(stages))
            }
        )
        self.conv = Conv3x3(widths[0], widths[0])
        self.downs = nn.ModuleList(Conv3x3(a, b) for a, b in pairwise(widths))
        self.attentions = nn.ModuleDict(
            {
                str(i): Attention(w, None, config.groups)
                for i, (w, r) in enumerate(zip(widths, self.levels, strict=True))
                if r in config.attention
            }
        )
        self.dense = nn.Linear(widths[-1] * self.levels[-1] ** 2, widths[-1])
        self.out = nn.Linear(widths[-1], 1)
        self.head_embedding = nn.Embedding(len(stages), widths[-1])
        self.class_embedding = nn.Embedding(num_classes, widths[-1]) if num_classes else None
        for embedding in (self.head_embedding, self.class_embedding):
            if embedding is not None:
                nn.init.normal_(embedding.weight, std=widths[-1] ** -0.5)

    def _level(self, resolution: int) -> int:
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
        x = with_detail(x)
        if x_T is not None:
            x = torch.cat([x, resized_noise(x_T, r)], dim=1)
        h = leaky(self.entrances[str(r)](x))
        first = self._level(r)
        for i in range(first, len(self.levels)):
            if i > first:
                h = leaky(self.downs[i - 1](F.avg_pool2d(h, 2)))
            elif i == 0:
                h = leaky(self.conv(h))
            if str(i) in self.attentions:
                h = self.attentions[str(i)](h)
        phi = leaky(self.dense(h.flatten(1)))
        projected = self.head_embedding.weight[k].expand_as(phi)
        if self.class_embedding is not None:
            if y is None:
                raise ValueError("this discriminator is class-conditional: pass labels y (B,)")
            projected = projected + self.class_embedding(y)
        elif y is not None:
            raise ValueError("this discriminator is unconditional: it takes no labels")
        logits: Tensor = self.out(phi).squeeze(1) + (projected * phi).sum(dim=1)
        return logits
