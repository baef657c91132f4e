"""What D sees is moved and partly covered at random, real and generated images alike.

So a discriminator does not learn few images by heart, and as both sides are treated the same and
the student's gradient passes through, its images stay as they are (Zhao et al. 2020).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

BLACK = -1.0  # what moves in from outside, and covers


class Augmentation(NamedTuple):
    """Random numbers of B images: `offsets` (B, 2) int64, pixels down and right; `corners` (B, 2)
    int64, of a square of `side` pixels that is covered."""

    offsets: Tensor
    corners: Tensor
    side: int

    def share(self, part: slice) -> Augmentation:
        """Those of one worker's images."""
        return Augmentation(self.offsets[part], self.corners[part], self.side)

    def __call__(self, x: Tensor) -> Tensor:
        """x (B, C, S, S) moved and covered; differentiable as often as need be."""
        x = x - BLACK
        x = _moved(_moved(x, self.offsets[:, 0], 2), self.offsets[:, 1], 3)
        if self.side:
            x = x * ~self._covered(x.shape[-1])
        return x + BLACK

    def _covered(self, size: int) -> Tensor:
        """Which pixels are covered: (B, 1, size, size) bool."""
        place = torch.arange(size, device=self.corners.device)
        from_corner = place - self.corners[:, :, None]  # (B, 2, size)
        inside = (from_corner >= 0) & (from_corner < self.side)
        return (inside[:, 0, :, None] & inside[:, 1, None, :])[:, None]


def draw(
    B: int, size: int, translate: int, cutout: int, generator: torch.Generator
) -> Augmentation:
    """Random numbers for B images: moved by up to `translate` pixels each way, and a square of
    `cutout` pixels covered whose center lies anywhere."""
    offsets = torch.randint(-translate, translate + 1, (B, 2), generator=generator)
    corners = torch.randint(size, (B, 2), generator=generator) - cutout // 2
    return Augmentation(offsets, corners, cutout)


def _moved(x: Tensor, offset: Tensor, dim: int) -> Tensor:
    """x (B, C, H, W), each image moved by its own offset (B,) along a dimension, 0 coming in."""
    size = x.shape[dim]
    source = torch.arange(size, device=x.device) - offset[:, None]
    shape = [len(x), 1, 1, 1]
    shape[dim] = size
    inside = ((source >= 0) & (source < size)).view(shape)
    index = source.clamp(0, size - 1).view(shape).expand_as(x)
    return x.gather(dim, index) * inside
