"""The teacher: the DDPM UNet (Ho et al. 2020), tensor for tensor diffusers' `UNet2DModel`."""

from __future__ import annotations

import dataclasses
import reprlib
import warnings
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from advkd.config import UNetConfig, build
from advkd.diffusion import Schedule
from advkd.models.folders import InFolder
from advkd.models.layers import (
    Attention,
    Conv3x3,
    Downsample,
    GroupNormSiLU,
    ResnetBlock,
    TimestepEmbedding,
    Upsample,
    timestep_embedding,
)

MAX_LEVELS = 16  # resolutions of a network
MAX_BLOCKS = 256  # residual blocks on the way down

# Settings of UNet2DModel that we implement for these values only (the first one is written).
_FIXED: dict[str, tuple[Any, ...]] = {
    "_class_name": ("UNet2DModel",),
    "act_fn": ("silu", "swish", "SiLU", "Swish"),
    "attn_norm_num_groups": (None,),
    "class_embed_type": (None,),
    "downsample_type": ("conv", None),
    "mid_block_type": ("UNetMidBlock2D",),
    "num_train_timesteps": (None,),
    "resnet_time_scale_shift": ("default",),
    "time_embedding_dim": (None,),
    "time_embedding_type": ("positional",),
    "upsample_type": ("conv", None),
}

# What diffusers' EMAModel writes beside a network's own settings.
_OF_EMA = {
    "collected_params",
    "decay",
    "inv_gamma",
    "min_decay",
    "optimization_step",
    "power",
    "update_after_step",
    "use_ema_warmup",
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
    """Read a UNet2DModel's config.json as diffusers does.

    A setting that UNet2DModel does not have is ignored with a warning, as diffusers ignores it.
    ValueError names a setting that this package does not implement at its value.
    """
    known = {field.name for field in dataclasses.fields(UNetConfig)}
    ours = {**_DEFAULTS, **{key: value for key, value in settings.items() if key in known}}
    ours["sample_size"] = _square(ours["sample_size"])
    for key in ("down_block_types", "up_block_types"):
        ours[key] = _modern_types(ours[key])
    config = cast(UNetConfig, build(UNetConfig, ours, ""))
    check_unet(config)
    _check_fixed(settings, config)
    ignored = [key for key in settings if key not in known | _OF_EMA | set(_FIXED)]
    ignored = [key for key in ignored if not key.startswith("_")]
    if ignored:
        warnings.warn(
            f"ignored settings that UNet2DModel does not have: {reprlib.repr(sorted(ignored))}",
            stacklevel=2,
        )
    return config


def _square(size: Any) -> Any:
    """The side of a `sample_size` that is a list of two equal sides; other values as they are."""
    if isinstance(size, list | tuple) and len(size) == 2:
        if size[0] != size[1]:
            raise ValueError(f"sample_size={reprlib.repr(size)} is not square, and only square is")
        return size[0]
    return size


def _modern_types(kinds: Any) -> Any:
    """Block types without the prefix that they had in the first versions of diffusers."""
    if not isinstance(kinds, list | tuple):
        return kinds
    return [kind.removeprefix("UNetRes") if isinstance(kind, str) else kind for kind in kinds]


def _check_fixed(settings: Mapping[str, Any], config: UNetConfig) -> None:
    """Raise ValueError for a setting of `_FIXED` at a value that makes another network.

    Values that diffusers does not use, or that say what is the case anyway, make no other.
    """
    same: dict[str, object] = {
        "attn_norm_num_groups": config.norm_num_groups,
        "time_embedding_dim": 4 * config.block_out_channels[0],
        "num_train_timesteps": settings.get("num_train_timesteps"),  # of learned embeddings only
    }
    if not any(kind.startswith("Attn") for kind in config.down_block_types[:-1]):
        same["downsample_type"] = settings.get("downsample_type")  # of AttnDownBlock2D only
    if not any(kind.startswith("Attn") for kind in config.up_block_types[:-1]):
        same["upsample_type"] = settings.get("upsample_type")  # of AttnUpBlock2D only
    if not config.add_attention:
        same["attn_norm_num_groups"] = settings.get("attn_norm_num_groups")
    for key, allowed in _FIXED.items():
        value = settings.get(key, allowed[0])
        if value not in allowed and (key not in same or value != same[key]):
            raise ValueError(f"UNet setting {key}={reprlib.repr(value)} is not supported")


def config_to_diffusers(config: UNetConfig) -> dict[str, Any]:
    """The content of a config.json that diffusers' UNet2DModel reads."""
    fixed = {key: allowed[0] for key, allowed in _FIXED.items()}
    return {**fixed, **dataclasses.asdict(config)}


class DownBlock(nn.Module):
    """`layers_per_block` residual blocks, with or without attention, then a halving unless last."""

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
    """`layers_per_block` + 1 residual blocks, each with one of the `skips`, then a doubling unless
    last."""

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
        for i, (resnet, skip) in enumerate(zip(self.resnets, skips, strict=True)):
            h = resnet(torch.cat([h, skip], dim=1), temb)
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


class UNet(InFolder):
    """The teacher's network: `unet(x_t, t, y=None)`, (B, C, H, W) -> prediction (B, C_out, H, W).

    t is a scalar or (B,) timestep in [0, T); y (B,) int64 labels where num_class_embeds is set.
    `schedule` is the noise schedule it was trained with; `class_names`, label 0 first, are None
    where the classes have no names. Raises ValueError for settings that do not fit each other.
    """

    def __init__(self, config: UNetConfig, schedule: Schedule | None = None):
        super().__init__()
        check_unet(config)
        self.config = config
        self.schedule = Schedule() if schedule is None else schedule
        self.class_names: tuple[str, ...] | None = None
        self.recompute = False  # of each block only what it passes on is kept for its gradient
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
        self.conv_out = Conv3x3(widths[0], config.out_channels)

    @property
    def num_classes(self) -> int | None:
        """How many classes it is conditional on; None: it takes no labels."""
        return self.config.num_class_embeds

    def embed_time(self, t: Tensor | int, batch: int) -> Tensor:
        """The time embedding without a class: (batch, 4 * widths[0])."""
        dtype = t.dtype if isinstance(t, Tensor) else torch.float32
        timesteps = torch.as_tensor(t, dtype=dtype, device=self.conv_in.weight.device)
        timesteps = timesteps.reshape(-1).expand(batch)
        sinusoids = timestep_embedding(
            timesteps,
            self.config.block_out_channels[0],
            self.config.flip_sin_to_cos,
            self.config.freq_shift,
        )
        temb: Tensor = self.time_embedding(sinusoids.to(self.conv_in.weight.dtype))
        return temb

    def embed(self, t: Tensor | int, batch: int, y: Tensor | None = None) -> Tensor:
        """The embedding of time and class that every block receives: (batch, 4 * widths[0])."""
        temb = self.embed_time(t, batch)
        if self.class_embedding is not None:
            if y is None:
                raise ValueError("this teacher is class-conditional: pass labels y (B,)")
            temb = temb + self.class_embedding(y)
        elif y is not None:
            raise ValueError("this teacher is unconditional: it takes no labels")
        return temb

    def check_size(self, H: int, W: int) -> None:
        """Raise ValueError unless H and W can be halved as often as this network halves them."""
        factor = 2 ** (len(self.down_blocks) - 1)
        if H % factor or W % factor:
            raise ValueError(
                f"{H}x{W} pixels do not fit this network: {factor} must divide both sides"
            )

    def forward(self, x_t: Tensor, t: Tensor | int, y: Tensor | None = None) -> Tensor:
        """The prediction at x_t (B, C, H, W) and time t; see the class."""
        return self.denoise(x_t, self.embed(t, x_t.shape[0], y))

    def denoise(self, x_t: Tensor, temb: Tensor) -> Tensor:
        """The prediction at x_t (B, C, H, W), given the embedding of time and class."""
        self.check_size(*x_t.shape[-2:])
        h = self.conv_in(2 * x_t - 1 if self.config.center_input_sample else x_t)
        skips = [h]
        for down in self.down_blocks:
            h, new = self._passed(down, h, temb)
            skips += new
        h = self._passed(self.mid_block, h, temb)
        for up in self.up_blocks:
            own = [skips.pop() for _ in range(self.config.layers_per_block + 1)]
            h = self._passed(up, h, own, temb)
        out: Tensor = self.conv_out(self.conv_norm_out(h))
        return out

    def _passed(self, block: nn.Module, *given: Any) -> Any:
        """What a block makes of its inputs; with `recompute` made a second time for the gradient,
        dropout's numbers included."""
        if not (self.recompute and torch.is_grad_enabled()):
            return block(*given)
        dropout = self.training and self.config.dropout > 0
        return checkpoint(block, *given, use_reentrant=False, preserve_rng_state=dropout)


def check_unet(config: UNetConfig) -> None:
    """ValueError for settings that do not fit each other."""
    widths, groups = config.block_out_channels, config.norm_num_groups
    n = len(widths)
    if not 1 <= n <= MAX_LEVELS:
        raise ValueError(f"block_out_channels has {n} entries, not 1 to {MAX_LEVELS}")
    if n * config.layers_per_block > MAX_BLOCKS:
        raise ValueError(
            f"layers_per_block={config.layers_per_block} at {n} resolutions is more than "
            f"{MAX_BLOCKS} residual blocks"
        )
    for name in ("down_block_types", "up_block_types"):
        kinds = len(getattr(config, name))
        if kinds != n:
            raise ValueError(f"{name} has {kinds} entries, block_out_channels has {n}")
    for channels in widths:
        if channels % groups:
            raise ValueError(f"norm_num_groups={groups} does not divide channels={channels}")
    if config.freq_shift and widths[0] // 2 == config.freq_shift:
        raise ValueError(
            f"block_out_channels[0]={widths[0]} is too small for a time embedding with "
            f"freq_shift={config.freq_shift}"
        )
    for channels in _attended(config):
        if channels % (config.attention_head_dim or channels):
            raise ValueError(
                f"attention_head_dim={config.attention_head_dim} does not divide {channels=}"
            )


def _attended(config: UNetConfig) -> list[int]:
    """The widths of the layers with attention."""
    widths = config.block_out_channels
    found = [widths[-1]] if config.add_attention else []
    for kinds, of in ((config.down_block_types, widths), (config.up_block_types, widths[::-1])):
        found += [c for kind, c in zip(kinds, of, strict=True) if kind.startswith("Attn")]
    return found
