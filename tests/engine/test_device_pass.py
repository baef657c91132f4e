"""A plan carried out by torch, as a GPU does it, against the network's own modules; on the CPU."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from advkd.config import StudentConfig, UNetConfig
from advkd.engine.device_pass import DevicePass, joined
from advkd.engine.lowering import LoweringError
from advkd.engine.networks import lower_student, lower_time, lower_unet
from advkd.models.layers import timestep_embedding
from advkd.models.student import Student
from advkd.models.unet import UNet

TEACHERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "classes": {"num_class_embeds": 5},
    "centered": {"center_input_sample": True},
    "scaled": {"mid_block_scale_factor": 1.5, "downsample_padding": 0},
    "one head": {"attention_head_dim": None},
    "no attention in the middle": {"add_attention": False},
    "FiLM": {"resnet_time_scale_shift": "scale_shift"},
    "FiLM, classes": {"resnet_time_scale_shift": "scale_shift", "num_class_embeds": 5},
    "resampled by resnets": {"downsample_type": "resnet", "upsample_type": "resnet"},
    "resampled by resnets, FiLM, classes as times": {
        "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("ResnetUpsampleBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        "downsample_type": "resnet",
        "resnet_time_scale_shift": "scale_shift",
        "num_class_embeds": 5,
        "class_embed_type": "timestep",
    },
    "no middle block": {"mid_block_type": None},
}
STUDENTS: dict[str, dict[str, Any]] = {
    "with an encoder": {"family": "unet"},
    "from a stem": {"family": "pyramid"},
}


def teacher(**changes: Any) -> UNet:
    torch.manual_seed(5)
    config = UNetConfig(
        sample_size=16, in_channels=3, out_channels=3, block_out_channels=(8, 16, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"), layers_per_block=2,
        norm_num_groups=2, attention_head_dim=8,
    )  # fmt: skip
    config = dataclasses.replace(config, **changes)
    return UNet(config).eval()


def passes(unet: UNet, size: tuple[int, int]) -> tuple[DevicePass, DevicePass]:
    """Those of the network and of what it makes of the time."""
    low = lower_unet(unet, size, 1, 1, unet.conv_in.weight)
    return DevicePass(low.plan), DevicePass(lower_time(low, unet))


@torch.inference_mode()
def image(
    unet: UNet, network: DevicePass, time: DevicePass, x: Tensor, t: int, y: Tensor | None
) -> Tensor:
    config = unet.config
    sinusoids = timestep_embedding(
        torch.tensor([t]), config.block_out_channels[0], config.flip_sin_to_cos, config.freq_shift
    )
    conditioning = time(sinusoids[:, None, None, :])[0, 0, 0]
    return network(x.permute(0, 2, 3, 1).contiguous(), conditioning, y).permute(0, 3, 1, 2)


@pytest.mark.parametrize("size", [(16, 16), (8, 12)])
@pytest.mark.parametrize("name", TEACHERS)
def test_a_teachers_pass_is_its_modules(name: str, size: tuple[int, int]) -> None:
    unet = teacher(**TEACHERS[name])
    network, time = passes(unet, size)
    x = torch.randn(3, 3, *size)
    y = None if unet.num_classes is None else torch.tensor([0, 3, 4])
    for t in (7, 900):
        with torch.inference_mode():
            want = unet(x, t, y)
        assert (image(unet, network, time, x, t, y) - want).abs().max() < 1e-5


@pytest.mark.parametrize("classes", [None, 4])
@pytest.mark.parametrize("name", STUDENTS)
def test_a_students_pass_is_its_modules(name: str, classes: int | None) -> None:
    torch.manual_seed(6)
    config = StudentConfig(
        stages=(4, 8, 16), widths=(8, 8, 8), attention=(4,), groups=4, **STUDENTS[name]
    )
    student = Student(config, 16, 3, "denoised", classes).eval()
    x = torch.randn(2, 3, 16, 16)
    y = None if classes is None else torch.tensor([3, 0])
    for exit_at in (None, 1, 2):
        like = next(student.parameters())
        network = DevicePass(lower_student(student, (16, 16), 1, 1, exit_at, like).plan)
        with torch.inference_mode():
            want = student(x, y, exit_at)
            got = network(x.permute(0, 2, 3, 1).contiguous(), None, y).permute(0, 3, 1, 2)
        assert got.shape == want.shape
        assert (got - want).abs().max() < 1e-5


def test_new_weights_are_read_at_the_next_refresh() -> None:
    """Those in their places at once; those of several layers, or in another layout, by then."""
    unet = teacher(num_class_embeds=5)
    network, time = passes(unet, (16, 16))
    x, y = torch.randn(2, 3, 16, 16), torch.tensor([1, 2])
    before = image(unet, network, time, x, 40, y)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.data.mul_(1.1)
        want = unet(x, 40, y)
    network.refresh()
    time.refresh()
    assert (image(unet, network, time, x, 40, y) - want).abs().max() < 1e-5
    assert (before - want).abs().max() > 1e-3


def test_biases_before_norms_are_left_to_them() -> None:
    """Of both convolutions of a block the first's, which a norm alone reads."""
    unet = teacher()
    low = lower_unet(unet, (16, 16), 1, 1, unet.conv_in.weight)
    deferred = {s.op.module for s in DevicePass(low.plan)._steps if s.deferred}
    blocks = [name for name, module in unet.named_modules() if hasattr(module, "conv2")]
    assert deferred >= {f"{name}.conv1" for name in blocks}
    assert not any(name.endswith("conv2") and "up_blocks" in name for name in deferred)
    assert "conv_out" not in deferred and "conv_in" not in deferred


def test_tensors_of_another_dtype_are_named() -> None:
    unet = teacher()
    unet.mid_block.resnets[0].conv1.half()
    with pytest.raises(LoweringError, match=r"mid_block.resnets.0.conv1 is not float32 on the CPU"):
        lower_unet(unet, (16, 16), 1, 1, unet.conv_in.weight)


def test_what_is_joined_goes_to_its_place_alone() -> None:
    x, residual = torch.randn(2, 2, 3, 3, 4).unbind()
    wide = torch.full((2, 3, 3, 10), float("nan"))
    out = joined(x, torch.arange(4.0), residual, 0.5, wide[..., 3:7])
    assert torch.equal(out, (x + torch.arange(4.0) + residual) * 0.5)
    assert wide[..., :3].isnan().all() and wide[..., 7:].isnan().all()
