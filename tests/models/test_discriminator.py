"""The discriminator: resolutions, conditioning, independence of images, double backward."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from advkd.config import DiscriminatorConfig, load_preset, presets
from advkd.models.discriminator import Discriminator, resized_noise

STAGES = (2, 2, 4, 8)
SMALL = DiscriminatorConfig(widths=(4, 8, 16), attention=(4,), groups=4)


def small(channels: int = 1, num_classes: int | None = None, **changes: Any) -> Discriminator:
    torch.manual_seed(0)
    config = dataclasses.replace(SMALL, **changes)
    return Discriminator(config, 8, channels, STAGES, num_classes).double()


def noise(num: int, size: int, channels: int = 1, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num, channels, size, size, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("k", range(len(STAGES)))
@torch.no_grad()
def test_every_resolution_enters(k: int, channels: int) -> None:
    D = small(channels)
    x, x_T = noise(3, STAGES[k], channels), noise(3, 8, channels, seed=2)
    logits = D(x, x_T, k)
    assert logits.shape == (3,)
    assert logits.isfinite().all()
    assert logits.std() > 0
    assert D(x[:0], x_T[:0], k).shape == (0,)


@pytest.mark.parametrize("k", range(len(STAGES)))
def test_logits_depend_on_image_and_noise(k: int) -> None:
    D = small()
    x = noise(2, STAGES[k]).requires_grad_()
    x_T = noise(2, 8, seed=2).requires_grad_()
    by_x, by_noise = torch.autograd.grad(D(x, x_T, k).sum(), [x, x_T])
    assert (by_x != 0).all()
    assert (by_noise != 0).all()  # every pixel of x_T, also where it is resized


def test_a_discriminator_that_does_not_see_the_noise() -> None:
    D = Discriminator(SMALL, 8, 1, STAGES, sees_noise=False).double()
    for k, r in enumerate(STAGES):
        x = noise(2, r).requires_grad_()
        (by_x,) = torch.autograd.grad(D(x, None, k).sum(), x)
        assert (by_x != 0).all()
    with pytest.raises(ValueError, match="does not see the noise"):
        D(noise(2, 8), noise(2, 8), 3)
    with pytest.raises(ValueError, match=r"beside its noise: pass x_T"):
        small()(noise(2, 8), None, 3)


@torch.no_grad()
def test_logits_depend_on_k() -> None:
    D = small()
    x, x_T = noise(2, 2), noise(2, 8, seed=2)
    assert ((D(x, x_T, 0) - D(x, x_T, 1)).abs() > 1e-6).all()


@torch.no_grad()
def test_logits_depend_on_the_label() -> None:
    D = small(num_classes=3)
    x, x_T = noise(2, 8), noise(2, 8, seed=2)
    same = D(x, x_T, 3, torch.tensor([1, 1]))
    other = D(x, x_T, 3, torch.tensor([1, 2]))
    assert same[0] == other[0]
    assert (same[1] - other[1]).abs() > 1e-6
    with pytest.raises(ValueError, match="class-conditional"):
        D(x, x_T, 3)
    with pytest.raises(ValueError, match="unconditional"):
        small()(x, x_T, 3, torch.tensor([1, 2]))


@pytest.mark.parametrize("k", range(len(STAGES)))
def test_no_image_sees_another(k: int) -> None:
    """The student's gradient is taken from D's own backward pass, which relies on this."""
    D = small()
    x, x_T = noise(4, STAGES[k]).requires_grad_(), noise(4, 8, seed=2)
    logits = D(x, x_T, k)
    alone = torch.cat([D(x[i : i + 1], x_T[i : i + 1], k) for i in range(4)])
    torch.testing.assert_close(alone, logits, rtol=1e-11, atol=1e-12)
    (gradient,) = torch.autograd.grad(logits[2], x)
    assert gradient[2].abs().max() > 0
    gradient[2] = 0
    assert gradient.abs().max() == 0


@pytest.mark.parametrize("factor", [1, 2, 4, 8])
def test_resized_noise_keeps_its_deviation(factor: int) -> None:
    x_T = noise(2000, 8, 2)
    resized = resized_noise(x_T, 8 // factor)
    assert resized.shape == (2000, 2, 8 // factor, 8 // factor)
    n = resized.numel()
    assert abs(resized.mean()) < 5 / n**0.5
    assert abs(resized.square().mean() - 1) < 5 * (2 / n) ** 0.5
    block = x_T[0, 1, :factor, :factor]
    torch.testing.assert_close(resized[0, 1, 0, 0], block.sum() / factor)


@pytest.mark.parametrize("k", [0, 2, 3])
def test_r1_differentiates_twice(k: int) -> None:
    """The gradient of |grad_x D|^2 in D's parameters, against finite differences."""
    D = small()
    x, x_T = noise(2, STAGES[k]), noise(2, 8, seed=2)

    def penalty() -> Tensor:
        wanted = x.clone().requires_grad_()
        logits = D(wanted, x_T, k)
        (gradient,) = torch.autograd.grad(logits.sum(), wanted, create_graph=True)
        return gradient.square().sum(dim=(1, 2, 3)).mean()

    parameters = list(D.parameters())
    found = torch.autograd.grad(penalty(), parameters, allow_unused=True, materialize_grads=True)
    generator = torch.Generator().manual_seed(3)
    h = 1e-5
    for _ in range(3):
        direction = [
            torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in parameters
        ]

        def moved(by: float, direction: list[Tensor] = direction) -> float:
            with torch.no_grad():
                torch._foreach_add_(parameters, direction, alpha=by)
            value = penalty().item()
            with torch.no_grad():
                torch._foreach_sub_(parameters, direction, alpha=by)
            return value

        numeric = (moved(h) - moved(-h)) / (2 * h)
        exact = sum((g * d).sum().item() for g, d in zip(found, direction, strict=True))
        # Central differences err by h^2 times a third derivative, and rounding by eps / h.
        assert abs(numeric - exact) <= 1e-5 * max(1.0, abs(exact))
        assert abs(exact) > 1e-6


@torch.no_grad()
def test_channels_last_changes_nothing() -> None:
    D = small()
    x, x_T = noise(2, 8), noise(2, 8, seed=2)
    expected = D(x, x_T, 3)
    D.to(memory_format=torch.channels_last)
    found = D(x.contiguous(memory_format=torch.channels_last), x_T, 3)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(
    ("size", "stages", "changes", "words"),
    [
        (8, (1, 2, 4, 8), {}, "no level for images of size 1"),
        (8, (8,), {"widths": (8,) * 5}, "4 halvings do not fit images of size 8"),
        (28, (7, 14, 28), {"widths": (8,) * 4}, "3 halvings do not fit images of size 28"),
        (8, (8,), {"widths": ()}, "widths is empty"),
        (8, (8,), {"groups": 3}, "num_groups=3 does not divide"),
    ],
)
def test_configurations_that_cannot_be(
    size: int, stages: tuple[int, ...], changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        Discriminator(dataclasses.replace(SMALL, **changes), size, 1, stages)


@pytest.mark.parametrize("preset", presets())
def test_discriminators_of_the_presets(preset: str) -> None:
    config = load_preset(preset)
    size, channels, stages = config.data.size, config.data.channels, config.student.stages
    with torch.device("meta"):
        D = Discriminator(config.discriminator, size, channels, stages)
        for k, r in enumerate(stages):
            x = torch.empty(1, channels, r, r)
            assert D(x, torch.empty(1, channels, size, size), k).shape == (1,)
