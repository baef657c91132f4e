"""Augmentations: images are moved and covered as told, and gradients go the same way back."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from advkd.training.augment import Augmentation, draw


def images(B: int = 4, C: int = 2, size: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(B, C, size, size, generator=generator, dtype=torch.float64) * 2 - 1


def stated(x: Tensor, how: Augmentation) -> Tensor:
    """Pixel by pixel, as the words say."""
    out = torch.full_like(x, -1.0)
    for b, (down, right) in enumerate(how.offsets.tolist()):
        top, left = how.corners[b].tolist()
        for i in range(x.shape[2]):
            for j in range(x.shape[3]):
                inside = 0 <= i - down < x.shape[2] and 0 <= j - right < x.shape[3]
                covered = top <= i < top + how.side and left <= j < left + how.side
                if inside and not covered:
                    out[b, :, i, j] = x[b, :, i - down, j - right]
    return out


@pytest.mark.parametrize(("translate", "cutout"), [(0, 0), (2, 0), (0, 3), (2, 3), (9, 20)])
def test_moved_and_covered(translate: int, cutout: int) -> None:
    x = images()
    how = draw(4, 6, translate, cutout, torch.Generator().manual_seed(1))
    torch.testing.assert_close(how(x), stated(x, how))
    part = slice(1, 3)
    assert torch.equal(how.share(part)(x[part]), how(x)[part])
    if translate == cutout == 0:
        torch.testing.assert_close(how(x), x)


def test_gradients_and_their_gradients() -> None:
    x = images(2, 1, 4).requires_grad_()
    how = draw(2, 4, 1, 2, torch.Generator().manual_seed(2))
    assert torch.autograd.gradcheck(how, x)
    assert torch.autograd.gradgradcheck(lambda x: how(x) ** 3, x)


def test_what_is_drawn() -> None:
    how = draw(5000, 8, 3, 4, torch.Generator().manual_seed(3))
    assert how.offsets.unique().tolist() == list(range(-3, 4))
    assert (how.offsets.double().mean(0).abs() < 5 * 2 / 5000**0.5).all()
    assert how.corners.unique().tolist() == list(range(-2, 6))  # a center on every pixel
    assert how.offsets.shape == how.corners.shape == (5000, 2)
