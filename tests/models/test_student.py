"""The student: both families, early exit, conditioning, what reaches what."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from advkd.config import StudentConfig, load_preset, presets
from advkd.models.student import Stem, Student
from advkd.models.unet import UNet

FAMILIES = ("unet", "pyramid")
STAGES = [(8,), (4, 8), (8, 8), (4, 4, 8), (4, 8, 8), (2, 2, 4, 4, 8), (2, 4, 8, 16)]


def student_of(
    family: str,
    stages: tuple[int, ...],
    channels: int = 1,
    num_classes: int | None = None,
    target: str = "denoised",
    **changes: Any,
) -> Student:
    torch.manual_seed(0)
    widths = tuple(16 if r < stages[-1] else 8 for r in stages)
    config = StudentConfig(family, stages, widths, attention=(4,), groups=4)
    config = dataclasses.replace(config, **changes)
    return Student(config, stages[-1], channels, target, num_classes)


def noise(num: int, size: int, channels: int = 1) -> Tensor:
    return torch.randn(num, channels, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("stages", STAGES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_heads_and_early_exit(family: str, stages: tuple[int, ...], channels: int) -> None:
    student = student_of(family, stages, channels).eval()
    x_T = noise(2, stages[-1], channels)
    states = student.states(x_T)
    assert [tuple(x.shape) for x in states] == [(2, channels, r, r) for r in stages]
    assert torch.equal(student(x_T), states[-1])
    for k in range(1, len(stages) + 1):
        assert torch.equal(student(x_T, exit_at=k), states[k - 1])
        fewer = student.states(x_T, depth=k)
        assert all(torch.equal(a, b) for a, b in zip(fewer, states[:k], strict=True))
    assert all(x.isfinite().all() for x in states)


@torch.no_grad()
def test_size_28_is_halved_to_7() -> None:
    student = student_of("unet", (7, 14, 28))
    assert [x.shape[-1] for x in student.states(noise(1, 28))] == [7, 14, 28]


@pytest.mark.parametrize("family", FAMILIES)
def test_leaving_early_runs_no_later_submodule(family: str) -> None:
    student = student_of(family, (4, 8, 8))

    def refuse(*args: Any) -> None:
        raise AssertionError("a later submodule ran")

    for module in (*student.submodules[1:], student.heads[0], *student.heads[2:]):
        module.register_forward_hook(refuse)
    student.heads[0]._forward_hooks.clear()
    student(noise(1, 8), exit_at=1)
    with pytest.raises(AssertionError):
        student(noise(1, 8), exit_at=2)


@pytest.mark.parametrize("exit_at", [0, 3, -1])
def test_an_exit_that_does_not_exist_is_an_error(exit_at: int) -> None:
    with pytest.raises(ValueError, match=f"exit_at={exit_at} is not between 1 and 2"):
        student_of("unet", (4, 8))(noise(1, 8), exit_at=exit_at)


def test_noisy_heads_are_no_exit() -> None:
    student = student_of("pyramid", (4, 8), target="state")
    with pytest.raises(ValueError, match="exit_at is not possible"):
        student(noise(1, 8), exit_at=1)
    with torch.no_grad():
        assert torch.equal(student(noise(1, 8), exit_at=2), student.states(noise(1, 8))[-1])


# Conditioning.


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_class_conditional(family: str) -> None:
    student = student_of(family, (4, 8), num_classes=3)
    x_T = noise(3, 8)
    images = student(x_T, torch.tensor([0, 1, 2]))
    other = student(x_T, torch.tensor([0, 2, 2]))
    assert torch.allclose(images[[0, 2]], other[[0, 2]], atol=1e-5)
    assert (images[1] - other[1]).abs().max() > 1e-3
    with pytest.raises(ValueError, match="class-conditional"):
        student(x_T)
    with pytest.raises(ValueError, match="unconditional"):
        student_of(family, (4, 8))(x_T, torch.tensor([0, 1, 2]))


@pytest.mark.parametrize("num_classes", [None, 3])
@pytest.mark.parametrize("stages", STAGES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_head_alone_trains_everything_but_the_other_heads(
    family: str, stages: tuple[int, ...], num_classes: int | None
) -> None:
    student = student_of(family, stages, num_classes=num_classes).double()
    y = None if num_classes is None else torch.tensor([0, 1, 2])
    image = student(noise(3, stages[-1]).double(), y)
    image.backward(noise(3, stages[-1]).double().flip(0))
    K = len(stages)
    for name, parameter in student.named_parameters():
        others = tuple(f"heads.{k}." for k in range(K - 1))
        if name.startswith(others):
            assert parameter.grad is None, name
        elif not name.endswith("to_k.bias"):  # a softmax does not see it
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("family", FAMILIES)
def test_every_head_is_trained_by_its_own_image(family: str) -> None:
    student = student_of(family, (2, 4, 8))
    for k, image in enumerate(student.states(noise(2, 8))):
        gradients = torch.autograd.grad(
            image.square().sum(), list(student.heads.parameters()), allow_unused=True
        )
        per_head = len(gradients) // 3
        used = {i // per_head for i, gradient in enumerate(gradients) if gradient is not None}
        assert used == {k}


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_an_image_does_not_depend_on_its_batch(family: str) -> None:
    student = student_of(family, (4, 8, 8)).double()
    x_T = noise(5, 8).double()
    together = student(x_T)
    alone = torch.cat([student(x_T[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(alone, together, rtol=1e-12, atol=1e-12)
    loud = x_T.clone()
    loud[1:] *= 100
    torch.testing.assert_close(student(loud)[0], together[0], rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_channels_last_changes_nothing() -> None:
    student = student_of("unet", (4, 8)).double()
    x_T = noise(2, 8, 1).double()
    expected = student(x_T)
    student.to(memory_format=torch.channels_last)
    found = student(x_T.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


# The pyramid keeps the noise.


@pytest.mark.parametrize(("channels", "factor"), [(1, 1), (1, 4), (3, 2)])
def test_stem_keeps_all_of_the_noise(channels: int, factor: int) -> None:
    """With a width of all its inputs the 1x1 convolution can be undone, and so x_T found again."""
    torch.manual_seed(0)
    width = channels * factor**2
    stem = Stem(channels, factor, width).double()
    x_T = noise(2, 8, channels).double()
    h = stem(x_T)
    assert h.shape == (2, width, 8 // factor, 8 // factor)
    assert stem.conv.weight.shape[1] == width  # every number of x_T enters
    matrix = stem.conv.weight[:, :, 0, 0]
    inverse = torch.linalg.inv(matrix)
    unmixed = torch.einsum("oc,bchw->bohw", inverse, h - stem.conv.bias[:, None, None])
    again = torch.nn.functional.pixel_shuffle(unmixed, factor)
    torch.testing.assert_close(again, x_T, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_pixel_of_the_noise_reaches_the_image(family: str) -> None:
    student = student_of(family, (2, 4, 8)).double()
    x_T = noise(1, 8).double().requires_grad_()
    image = student(x_T)
    (gradient,) = torch.autograd.grad(image.square().sum(), x_T)
    assert (gradient != 0).all()


# What cannot be.


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"family": "resnet"}, "'resnet' is not one of"),
        ({"stages": (), "widths": ()}, "0 entries"),
        ({"widths": (16,)}, "1 entries, stages 2"),
        ({"stages": (4, 4)}, r"stages=\[4, 4\] must keep or double"),
        ({"stages": (2, 8)}, r"stages=\[2, 8\] must keep or double"),
        ({"stages": (3, 8)}, r"stages=\[3, 8\] must keep or double"),
        ({"stages": (16, 8)}, r"stages=\[16, 8\] must keep or double"),
        ({"stages": (0, 8)}, r"stages=\[0, 8\].* must be positive"),
        ({"groups": 3}, "num_groups=3 does not divide channels"),
        ({"groups": 0}, "groups=0"),
        ({"widths": (16, 0)}, r"widths=\[16, 0\].* must be positive"),
        ({"blocks": 0}, "blocks=0"),
    ],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_configurations_that_cannot_be(family: str, changes: dict[str, Any], words: str) -> None:
    config = StudentConfig(family, (4, 8), (16, 8), attention=(4,), groups=4)
    with pytest.raises(ValueError, match=words):
        Student(dataclasses.replace(config, **changes), 8, 1)


@pytest.mark.parametrize("preset", presets())
def test_students_of_the_presets(preset: str) -> None:
    """They can be built, and are no larger than their teachers."""
    config = load_preset(preset)
    with torch.device("meta"):
        student = Student(config.student, config.data.size, config.data.channels)
        teacher = UNet(config.unet)
    count = sum(p.numel() for p in student.parameters())
    assert count <= sum(p.numel() for p in teacher.parameters())
    if preset == "advkd-celebahq-256":
        assert len(student.heads) == 11
        assert config.student.stages[-1] == 256
        assert count == sum(map(_parameters, range(11))) + (3 * 32**2 + 1) * 512


def _parameters(k: int) -> int:
    """Those of submodule k and its head, counted from the architecture's description."""
    config = load_preset("advkd-celebahq-256").student
    w, before = config.widths[k], config.widths[max(k - 1, 0)]
    block = 2 * (2 * w) + 2 * (9 * w * w + w)
    attention = 2 * w + 4 * (w * w + w) if config.stages[k] in config.attention else 0
    reduce = before * w + w if before != w else 0
    return config.blocks * block + attention + reduce + 2 * w + 9 * w * 3 + 3
