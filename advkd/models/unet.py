"""The teacher: the DDPM UNet (Ho et al. 2020), tensor for tensor diffusers' `UNet2DModel`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from advkd.config import UNetConfig, build
from advkd.diffusion import Schedule
from advkd.models.layers import (
    Attention,
    Downsample,
    GroupNormSiLU,
    ResnetBlock,
    TimestepEmbedding,
    Upsample,
    timestep_embedding,
)

DOWN_BLOCKS = ("DownBlock2D", "AttnDownBlock2D")
UP_BLOCKS = ("UpBlock2D", "AttnUpBlock2D")

# Settings of UNet2DModel that we implement for these values only (the first one is written).
_FIXED: dict[str, tuple[Any, ...]] = {
    "_class_name": ("UNet2DModel",),
    "act_fn": ("silu", "swish"),
    "attn_norm_num_groups": (None,),
    "class_embed_type": (None,),
    "downsample_type": ("conv",),
    "mid_block_type": ("UNetMidBlock2D",),
    "num_train_timesteps": (None,),
    "resnet_time_scale_shift": ("default",),
    "time_embedding_dim": (None,),
    "time_embedding_type": ("positional",),
    "upsample_type": ("conv",),
}

# What a key that is absent from a config.json means: diffusers' defaults, not those of our presets.
_DEFAULTS: dict[str, Any] = {
    "sample_size": None,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (224, 448, 672, 896),
    "down_block_types": ("DownBlock2D",) + 3 * ("AttnDownBlock2D",),
    "up_block_types": 3 * ("AttnUpBlock2D",) + ("UpBlock2D",),
    "attention_head_dim": 8,
    "norm_num_groups": 32,
}


def config_from_diffusers(settings: Mapping[str, Any]) -> UNetConfig:
    """Read a UNet2DModel's config.json; ValueError names what this package does not implement."""
    for key, allowed in _FIXED.items():
        if key in settings and settings[key] not in allowed:
            raise ValueError(f"UNet setting {key}={settings[key]!r} is not supported")
    settings = {key: value for key, value in settings.items() if not key.startswith("_")}
    known = {field.name for field in dataclasses.fields(UNetConfig)}
    unknown = sorted(set(settings) - known - set(_FIXED))
    if unknown:
        raise ValueError(f"UNet settings that are not known: {', '.join(unknown)}")
    chosen = {k: v for k, v in {**_DEFAULTS, **settings}.items() if k in known}
    return cast(UNetConfig, build(UNetConfig, chosen, ""))


def config_to_diffusers(config: UNetConfig) -> dict[str, Any]:
    """The content of a config.json that diffusers' UNet2DModel reads."""
    fixed = {key: allowed[0] for key, allowed in _FIXED.items()}
    return {**fixed, **dataclasses.asdict(config)}


class DownBlock(nn.Module):
    """layers_per_block residual blocks (with attention), then a halving unless it is the last."""

    def __init__(self, config: UNetConfig, kind: str, channels: tuple[int, int], last: bool):
        super().__init__()
        c_in, c_out = channels
        self.resnets = nn.ModuleList(
            _resnet(config, c_in if i == 0 else c_out, c_out)
            for i in range(config.layers_per_block)
        )
        self.attentions = _attentions(config, kind, c_out, config.layers_per_block)
        self.downsamplers = (
            None if last else nn.ModuleList([Downsample(c_out, config.downsample_padding)])
        )

    def forward(self, h: Tensor, temb: Tensor) -> tuple[Tensor, list[Tensor]]:
        skips = []
        for i, resnet in enumerate(self.resnets):
            h = resnet(h, temb)
            if self.attentions is not None:
                h = self.attentions[i](h)
            skips.append(h)
        if self.downsamplers is not None:
            h = self.downsamplers[0](h)
            skips.append(h)
        return h, skips


class MidBlock(nn.Module):
    """Residual block, attention, residual block at the lowest resolution."""

    def __init__(self, config: UNetConfig, channels: int):
        super().__init__()
        scale = config.mid_block_scale_factor
        self.resnets = nn.ModuleList(_resnet(config, channels, channels, scale) for _ in range(2))
        self.attentions = (
            nn.ModuleList([_attention(config, channels, scale)]) if config.add_attention else None
        )

    def forward(self, h: Tensor, temb: Tensor) -> Tensor:
        h = self.resnets[0](h, temb)
        if self.attentions is not None:
            h = self.attentions[0](h)
        return self.resnets[1](h, temb)


class UpBlock(nn.Module):
    """layers_per_block + 1 residual blocks, each fed a skip; then a doubling unless the last."""

    def __init__(self, config: UNetConfig, kind: str, channels: tuple[int, int, int], last: bool):
        super().__init__()
        c_skip_last, c_prev, c_out = channels
        layers = config.layers_per_block + 1
        self.resnets = nn.ModuleList()
        for i in range(layers):
            c_skip = c_skip_last if i == layers - 1 else c_out
            self.resnets.append(_resnet(config, (c_prev if i == 0 else c_out) + c_skip, c_out))
        self.attentions = _attentions(config, kind, c_out, layers)
        self.upsamplers = None if last else nn.ModuleList([Upsample(c_out)])

    def forward(self, h: Tensor, skips: list[Tensor], temb: Tensor) -> Tensor:
        for i, resnet in enumerate(self.resnets):
            h = resnet(torch.cat([h, skips.pop()], dim=1), temb)
            if self.attentions is not None:
                h = self.attentions[i](h)
        if self.upsamplers is not None:
            h = self.upsamplers[0](h)
        return h


def _resnet(config: UNetConfig, c_in: int, c_out: int, scale: float = 1.0) -> ResnetBlock:
    return ResnetBlock(
        c_in,
        c_out,
        temb_channels=4 * config.block_out_channels[0],
        groups=config.norm_num_groups,
        eps=config.norm_eps,
        dropout=config.dropout,
        scale=scale,
    )


def _attention(config: UNetConfig, channels: int, scale: float = 1.0) -> Attention:
    return Attention(
        channels, config.attention_head_dim, config.norm_num_groups, config.norm_eps, scale
    )


def _attentions(config: UNetConfig, kind: str, channels: int, n: int) -> nn.ModuleList | None:
    if not kind.startswith("Attn"):
        return None
    return nn.ModuleList(_attention(config, channels) for _ in range(n))


class UNet(nn.Module):
    """`unet(x_t, t)` -> the network's prediction, (B, C, H, W) -> (B, C_out, H, W).

    t is a scalar or (B,) timestep in [0, T); y (B,) int64 labels where num_class_embeds is set.
    `schedule` is the noise schedule it was trained with. Raises ValueError for block types or
    shapes that the architecture does not have.
    """

    def __init__(self, config: UNetConfig, schedule: Schedule | None = None):
        super().__init__()
        _check(config)
        self.config = config
        self.schedule = Schedule() if schedule is None else schedule
        widths = config.block_out_channels
        hidden = 4 * widths[0]
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(widths[0], hidden)
        self.class_embedding = (
            nn.Embedding(config.num_class_embeds, hidden) if config.num_class_embeds else None
        )
        self.down_blocks = nn.ModuleList()
        for i, kind in enumerate(config.down_block_types):
            channels = (widths[max(i - 1, 0)], widths[i])
            self.down_blocks.append(DownBlock(config, kind, channels, i == len(widths) - 1))
        self.mid_block = MidBlock(config, widths[-1])
        self.up_blocks = nn.ModuleList()
        up = widths[::-1]
        for i, kind in enumerate(config.up_block_types):
            up_channels = (up[min(i + 1, len(up) - 1)], up[max(i - 1, 0)], up[i])
            self.up_blocks.append(UpBlock(config, kind, up_channels, i == len(up) - 1))
        self.conv_norm_out = GroupNormSiLU(config.norm_num_groups, widths[0], config.norm_eps)
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, 3, padding=1)

    @property
    def num_classes(self) -> int | None:
        """How many classes it is conditional on; None: it takes no labels."""
        return self.config.num_class_embeds

    def embed_time(self, t: Tensor | int, batch: int) -> Tensor:
        """The vector of the time alone: (batch, 4 * widths[0])."""
        timesteps = torch.as_tensor(t, device=self.conv_in.weight.device).reshape(-1).expand(batch)
        sinusoids = timestep_embedding(
            timesteps,
            self.config.block_out_channels[0],
            self.config.flip_sin_to_cos,
            self.config.freq_shift,
        )
        temb: Tensor = self.time_embedding(sinusoids.to(self.conv_in.weight.dtype))
        return temb

    def embed(self, t: Tensor | int, batch: int, y: Tensor | None = None) -> Tensor:
        """The vector every block is told the time (and class) by: (batch, 4 * widths[0])."""
        temb = self.embed_time(t, batch)
        if self.class_embedding is not None:
            if y is None:
                raise ValueError("this teacher is class-conditional: pass labels y (B,)")
            temb = temb + self.class_embedding(y)
        elif y is not None:
            raise ValueError("this teacher is unconditional: it takes no labels")
        return temb

    def check_size(self, H: int, W: int) -> None:
        """ValueError unless images of H x W pixels can be halved as often as this network does."""
        factor = 2 ** (len(self.down_blocks) - 1)
        if H % factor or W % factor:
            raise ValueError(
                f"{H}x{W} pixels do not fit this network: {factor} must divide both sides"
            )

    def forward(self, x_t: Tensor, t: Tensor | int, y: Tensor | None = None) -> Tensor:
        return self.denoise(x_t, self.embed(t, x_t.shape[0], y))

    def denoise(self, x_t: Tensor, temb: Tensor) -> Tensor:
        """The prediction, given what `embed` makes of time and class."""
        self.check_size(*x_t.shape[-2:])
        h = self.conv_in(2 * x_t - 1 if self.config.center_input_sample else x_t)
        skips = [h]
        for down in self.down_blocks:
            h, new = down(h, temb)
            skips += new
        h = self.mid_block(h, temb)
        for up in self.up_blocks:
            h = up(h, skips, temb)
        out: Tensor = self.conv_out(self.conv_norm_out(h))
        return out


def _check(config: UNetConfig) -> None:
    n = len(config.block_out_channels)
    for name, kinds, known in (
        ("down_block_types", config.down_block_types, DOWN_BLOCKS),
        ("up_block_types", config.up_block_types, UP_BLOCKS),
    ):
        if len(kinds) != n:
            raise ValueError(f"{name} has {len(kinds)} entries, block_out_channels has {n}")
        unknown = [kind for kind in kinds if kind not in known]
        if unknown:
            raise ValueError(f"{name} holds {unknown}, known are {known}")
