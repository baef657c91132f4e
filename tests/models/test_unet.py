"""The teacher's network against diffusers' UNet2DModel, weights carried over both ways."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DModel

from advkd import ops
from advkd.config import UNetConfig
from advkd.diffusion import Schedule
from advkd.models.layers import Attention, ResnetBlock, timestep_embedding
from advkd.models.unet import UNet, config_from_diffusers, config_to_diffusers
from advkd.pretrained import load_teacher, save_teacher

RTOL = 1e-5  # of the output's largest value: float32 sums in another order

SMALL: dict[str, Any] = {
    "sample_size": 16,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 2,
    "norm_num_groups": 4,
    "attention_head_dim": None,
}

ATTENTION = {
    "down_block_types": ("AttnDownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D"),
}

# Each entry is a change to SMALL.
VARIANTS: dict[str, dict[str, Any]] = {
    "small": {},
    "no attention in the blocks": {
        "down_block_types": ("DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D"),
    },
    "attention everywhere": ATTENTION,
    "attention only on the way up": {
        "down_block_types": ("DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D"),
    },
    "no attention at all": {
        "down_block_types": ("DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D"),
        "add_attention": False,
    },
    "sin before cos": {"flip_sin_to_cos": False},
    "freq_shift 1": {"freq_shift": 1},
    "sin before cos, freq_shift 1": {"flip_sin_to_cos": False, "freq_shift": 1},
    "downsample_padding 0": {"downsample_padding": 0},
    "heads of 8": {"attention_head_dim": 8},
    "norm_eps 1e-6": {"norm_eps": 1e-6},
    "norm_eps 0.1": {"norm_eps": 0.1},
    "2 groups": {"norm_num_groups": 2},
    "1 layer": {"layers_per_block": 1},
    "3 layers": {"layers_per_block": 3},
    "centered input": {"center_input_sample": True},
    "mid block scaled": {"mid_block_scale_factor": 1.4142},
    "dropout": {"dropout": 0.3},
    "classes": {"num_class_embeds": 5},
    "grayscale in, two channels out": {"in_channels": 1, "out_channels": 2},
    "FiLM": {"resnet_time_scale_shift": "scale_shift"},
    "FiLM, a norm in front of the middle's attention": {
        "resnet_time_scale_shift": "scale_shift",
        "attn_norm_num_groups": 8,
    },
    "other groups in the middle": {"attn_norm_num_groups": 2},
    "no middle block": {"mid_block_type": None},
    "resampled by resnets": {
        **ATTENTION,
        "downsample_type": "resnet",
        "upsample_type": "resnet",
    },
    "resnets that resample, FiLM, classes": {
        "block_out_channels": (8, 16, 24),
        "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        "downsample_type": "resnet",
        "upsample_type": "resnet",
        "resnet_time_scale_shift": "scale_shift",
        "num_class_embeds": 5,
    },
    "classes as times": {"class_embed_type": "timestep", "num_class_embeds": 5},
    "another width of the time": {"time_embedding_dim": 24},
    "one block": {
        "block_out_channels": (8,),
        "down_block_types": ("AttnDownBlock2D",),
        "up_block_types": ("AttnUpBlock2D",),
    },
    "widths fall and rise": {
        "block_out_channels": (16, 8, 24),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    },
}

CIFAR10 = {
    "sample_size": 32,
    "block_out_channels": (128, 256, 256, 256),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 2,
    "attention_head_dim": None,
    "center_input_sample": False,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-6,
    "norm_num_groups": 32,
    "time_embedding_type": "positional",
    "act_fn": "silu",
}
CELEBAHQ = {  # and church: the same network
    **CIFAR10,
    "sample_size": 256,
    "block_out_channels": (128, 128, 256, 256, 512, 512),
    "down_block_types": (*4 * ("DownBlock2D",), "AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", *4 * ("UpBlock2D",)),
}


def reduced(settings: dict[str, Any]) -> dict[str, Any]:
    """The same structure, a sixteenth of the widths, on small images."""
    widths = settings["block_out_channels"]
    return settings | {
        "block_out_channels": tuple(width // 16 for width in widths),
        "norm_num_groups": 4,
        "sample_size": 2 ** len(widths),
    }


GOOGLE = {"ddpm-cifar10-32": reduced(CIFAR10), "ddpm-celebahq-256": reduced(CELEBAHQ)}
ALL = {name: SMALL | change for name, change in VARIANTS.items()} | GOOGLE


def randomize(network: torch.nn.Module, seed: int = 0) -> None:
    """Random values in every parameter: fresh norms (1 and 0) would hide swapped tensors."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 16
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / fan_in**0.5)


def inputs(settings: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    generator = torch.Generator().manual_seed(1)
    size = settings["sample_size"]
    x = torch.randn(3, settings.get("in_channels", 3), size, size, generator=generator)
    y = torch.tensor([0, 4, 2]) if settings.get("num_class_embeds") else None
    return x, torch.tensor([0, 417, 999]), y


def assert_agree(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert ours.shape == theirs.shape
    assert torch.isfinite(theirs).all()
    assert (ours - theirs).abs().max() <= RTOL * theirs.abs().max()


@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_loads_what_diffusers_saved(name: str, tmp_path: Path) -> None:
    settings = ALL[name]
    theirs = UNet2DModel(**settings).eval()
    randomize(theirs)
    theirs.save_pretrained(tmp_path / "unet")
    DDIMScheduler().save_pretrained(tmp_path / "scheduler")
    ours = load_teacher(tmp_path)
    x, t, y = inputs(settings)
    expected = theirs(x, t, class_labels=y).sample
    assert_agree(ours(x, t, y), expected)
    assert_agree(ours(x.contiguous(memory_format=torch.channels_last), t, y), expected)
    for scalar in (417, torch.tensor(417)):
        assert_agree(ours(x, scalar, y), theirs(x, 417, class_labels=y).sample)


@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_diffusers_loads_what_we_saved(name: str, tmp_path: Path) -> None:
    settings = ALL[name]
    ours = UNet(config_from_diffusers(settings)).eval()
    randomize(ours)
    save_teacher(ours, tmp_path)
    theirs, report = UNet2DModel.from_pretrained(tmp_path / "unet", output_loading_info=True)
    assert not any(report.values()), report
    for key, value in settings.items():
        stored = theirs.config[key]
        assert (tuple(stored) if isinstance(stored, list) else stored) == value, key
    x, t, y = inputs(settings)
    assert_agree(ours(x, t, y), theirs.eval()(x, t, class_labels=y).sample)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"num_class_embeds": 5},
        {"layers_per_block": 1},
        VARIANTS["FiLM"],
        VARIANTS["resnets that resample, FiLM, classes"],
    ],
)
def test_the_gradients_are_diffusers(change: dict[str, Any]) -> None:
    settings = SMALL | change
    ours, theirs = UNet(config_from_diffusers(settings)).double(), UNet2DModel(**settings).double()
    randomize(theirs)
    ours.load_state_dict(theirs.state_dict())
    x, t, y = inputs(settings)
    ours(x.double(), t, y).square().mean().backward()
    theirs(x.double(), t, class_labels=y).sample.square().mean().backward()
    expected = {name: p.grad for name, p in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None, name
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("settings", "millions"), [(CIFAR10, 35.7), (CELEBAHQ, 113.7)], ids=["cifar10", "celebahq"]
)
def test_google_networks_at_full_size(settings: dict[str, Any], millions: float) -> None:
    with torch.device("meta"):
        ours, theirs = UNet(config_from_diffusers(settings)), UNet2DModel(**settings)
    shapes = {name: tensor.shape for name, tensor in ours.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in theirs.state_dict().items()}
    assert round(sum(shape.numel() for shape in shapes.values()) / 1e6, 1) == millions


def test_absent_settings_mean_diffusers_defaults() -> None:
    ours = config_from_diffusers({})
    with torch.device("meta"):
        stored = UNet2DModel().config
    for field in dataclasses.fields(UNetConfig):
        value = stored[field.name]
        expected = tuple(value) if isinstance(value, list | tuple) else value
        assert getattr(ours, field.name) == expected, field.name


def test_config_round_trip() -> None:
    config = config_from_diffusers(CIFAR10)
    assert config_from_diffusers(config_to_diffusers(config)) == config
    assert config_from_diffusers({**CIFAR10, "act_fn": "swish"}) == config


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"act_fn": "gelu"}, ["act_fn", "gelu"]),
        ({"resnet_time_scale_shift": "spatial"}, ["resnet_time_scale_shift", "spatial"]),
        ({"time_embedding_type": "fourier"}, ["time_embedding_type", "Fourier features"]),
        ({"time_embedding_type": "learned"}, ["time_embedding_type", "learned", "table of times"]),
        ({"downsample_type": "fir"}, ["downsample_type", "fir"]),
        ({"upsample_type": 3}, ["upsample_type"]),
        ({"class_embed_type": "timestep"}, ["class_embed_type", "num_class_embeds"]),
        ({"class_embed_type": "identity"}, ["class_embed_type", "vectors"]),
        ({"attn_norm_num_groups": 3}, ["attn_norm_num_groups=3", "16"]),
        ({"time_embedding_dim": 0}, ["time_embedding_dim"]),
        ({"mid_block_type": "UNetMidBlock2DCrossAttn"}, ["mid_block_type"]),
        ({"attention_head_dim": [8]}, ["attention_head_dim", "1 entries"]),
        ({"attention_head_dim": [8, 5]}, ["attention_head_dim", "16"]),
        ({"attention_head_dim": ["8", "8"]}, ["attention_head_dim"]),
        ({"_class_name": "UNet2DConditionModel"}, ["UNet2DConditionModel"]),
        ({"act_fn": ["silu"]}, ["act_fn"]),
        ({"_class_name": {"a": 1}}, ["_class_name"]),
        ({"sample_size": [16, 8]}, ["sample_size", "square"]),
        ({"norm_num_groups": None}, ["norm_num_groups", "None"]),
        ({"block_out_channels": [8, "16"]}, ["block_out_channels", "16"]),
        ({"block_out_channels": 8}, ["block_out_channels", "8"]),
        ({"block_out_channels": []}, ["block_out_channels", "0 entries"]),
        ({"block_out_channels": [8] * 100}, ["block_out_channels", "100 entries"]),
        ({"layers_per_block": [2, 2]}, ["layers_per_block"]),
        ({"down_block_types": "DownBlock2D"}, ["down_block_types"]),
        ({"down_block_types": [["DownBlock2D"], 3]}, ["down_block_types"]),
        (
            {"block_out_channels": [2, 4], "norm_num_groups": 2, "freq_shift": 1},
            ["block_out_channels[0]=2", "freq_shift"],
        ),
        ({"layers_per_block": 10**15}, ["layers_per_block"]),
        (
            {"block_out_channels": [8] * 16, "layers_per_block": 64}
            | {"down_block_types": ["DownBlock2D"] * 16, "up_block_types": ["UpBlock2D"] * 16},
            ["layers_per_block=64", "256"],
        ),
    ],
)
def test_unsupported_unet_settings_are_named(settings: dict, words: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        config_from_diffusers(SMALL | settings)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"down_block_types": ("DownBlock2D", "SkipDownBlock2D")}, ["SkipDownBlock2D"]),
        ({"up_block_types": ("SkipUpBlock2D", "UpBlock2D")}, ["SkipUpBlock2D"]),
        ({"down_block_types": ("DownBlock2D",)}, ["down_block_types", "1", "2"]),
        ({"up_block_types": 3 * ("UpBlock2D",)}, ["up_block_types", "3", "2"]),
        ({"norm_num_groups": 3}, ["num_groups=3", "8"]),
        ({"attention_head_dim": 5}, ["attention_head_dim=5", "16"]),
    ],
)
def test_impossible_architectures_are_errors(change: dict, words: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        UNet(config_from_diffusers(SMALL | change))
    for word in words:
        assert word in str(caught.value)


def test_heads_of_each_level() -> None:
    """A list that says the same as a number, and one that diffusers has no words for."""
    settings = SMALL | ATTENTION
    one, listed = (
        UNet(config_from_diffusers(settings | {"attention_head_dim": heads})).eval()
        for heads in (4, [4, 4])
    )
    other = UNet(config_from_diffusers(settings | {"attention_head_dim": [4, 8]})).eval()
    randomize(one)
    for unet in (listed, other):
        unet.load_state_dict(one.state_dict())
    x, t, y = inputs(settings)
    assert torch.equal(one(x, t, y), listed(x, t, y))
    assert not torch.equal(one(x, t, y), other(x, t, y))
    heads = {name: m.heads for name, m in other.named_modules() if isinstance(m, Attention)}
    assert heads["down_blocks.0.attentions.0"] == heads["up_blocks.1.attentions.0"] == 8 // 4
    assert heads["down_blocks.1.attentions.0"] == heads["mid_block.attentions.0"] == 16 // 8
    assert config_to_diffusers(listed.config)["attention_head_dim"] == 4
    assert config_to_diffusers(other.config)["attention_head_dim"] == (4, 8)


def test_labels_must_fit_the_network() -> None:
    x = torch.zeros(2, 3, 8, 8)
    with pytest.raises(ValueError, match="class-conditional"):
        UNet(config_from_diffusers(SMALL | {"num_class_embeds": 5}))(x, 3)
    with pytest.raises(ValueError, match="unconditional"):
        UNet(config_from_diffusers(SMALL))(x, 3, torch.tensor([0, 1]))


def test_an_image_that_cannot_be_halved_is_an_error() -> None:
    with pytest.raises(ValueError, match="15"):
        UNet(config_from_diffusers(SMALL))(torch.zeros(1, 3, 15, 16), 3)


@torch.no_grad()
def test_batches_of_one_and_of_none() -> None:
    unet = UNet(config_from_diffusers(SMALL)).eval()
    randomize(unet)
    x, t, _ = inputs(SMALL)
    whole = unet(x, t)
    assert_agree(unet(x[1:2], t[1:2]), whole[1:2])
    assert unet(x[:0], t[:0]).shape == (0, 3, 16, 16)
    assert_agree(unet(x[:, :, :8, :], 5), unet(x[:, :, :8, :].contiguous(), 5))


def test_dropout_drops_in_training_only() -> None:
    unet = UNet(config_from_diffusers(SMALL | {"dropout": 0.5}))
    randomize(unet)
    x, t, _ = inputs(SMALL)
    with torch.no_grad():
        assert not torch.equal(unet(x, t), unet(x, t))
        unet.eval()
        assert torch.equal(unet(x, t), unet(x, t))


def test_the_schedule_is_carried() -> None:
    assert UNet(config_from_diffusers(SMALL)).schedule == Schedule()
    schedule = Schedule(prediction_type="sample")
    assert UNet(config_from_diffusers(SMALL), schedule).schedule is schedule


@pytest.mark.parametrize("dim", [1, 7, 8])
def test_timestep_embedding_fills_odd_widths(dim: int) -> None:
    found = timestep_embedding(torch.tensor([0, 999]), dim)
    assert found.shape == (2, dim) and torch.isfinite(found).all()


def test_attention_is_torchs_and_differentiable_twice() -> None:
    block = Attention(16, 8, 4).double()
    randomize(block)
    x = torch.randn(2, 16, 3, 5, generator=torch.Generator().manual_seed(0)).double()
    with ops.use_backend("reference"):
        plain = block(x)
    torch.testing.assert_close(block(x), plain)
    x.requires_grad_()
    (slope,) = torch.autograd.grad(block(x).sum(), x, create_graph=True)
    slope.square().sum().backward()
    assert x.grad is not None and torch.isfinite(x.grad).all()


def test_resnet_block_without_time() -> None:
    block = ResnetBlock(8, 12, None, groups=4)
    assert block.time_emb_proj is None
    assert block(torch.randn(2, 8, 5, 3)).shape == (2, 12, 5, 3)
