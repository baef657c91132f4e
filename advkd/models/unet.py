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
from advkd.diffusion import LEARNED_RANGE, Schedule
from advkd.models.folders import InFolder
from advkd.models.layers import (
    Attention,
    Conv3x3,
    Downsample,
    GroupNormSiLU,
    ResnetBlock,
    TimestepEmbedding,
    Upsample,
    normed_conv,
    timestep_embedding,
)

MAX_LEVELS = 16  # resolutions of a network
MAX_BLOCKS = 256  # residual blocks on the way down

# Settings of UNet2DModel that we implement for these values only (the first one is written), and
# what others would need.
_FIXED: dict[str, tuple[tuple[Any, ...], str]] = {
    "_class_name": (("UNet2DModel",), "a network of another kind"),
    "act_fn": (("silu", "swish", "SiLU", "Swish"), "norms fused with another activation"),
    "time_embedding_type": (
        ("positional",),
        "random Fourier features or a learned table of times, and samplers of other noise levels",
    ),
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
    ValueError names a setting that this package does not implement at its value, and what it lacks.
    """
    known = {field.name for field in dataclasses.fields(UNetConfig)}
    ours = {**_DEFAULTS, **{key: value for key, value in settings.items() if key in known}}
    ours["sample_size"] = _square(ours["sample_size"])
    for key in ("down_block_types", "up_block_types"):
        ours[key] = _modern_types(ours[key])
    for key in ("downsample_type", "upsample_type"):
        ours[key] = ours.get(key) or "conv"
    if ours.get("class_embed_type") == "identity":
        raise ValueError(
            "class_embed_type='identity' is not supported: its labels are vectors of any kind, and "
            "advkd would need samplers and stores of trajectories that carry vectors"
        )
    for key, (allowed, lacking) in _FIXED.items():
        if settings.get(key, allowed[0]) not in allowed:
            value = reprlib.repr(settings[key])
            raise ValueError(f"UNet setting {key}={value} is not supported: it needs {lacking}")
    config = cast(UNetConfig, build(UNetConfig, ours, ""))
    check_unet(config)
    # The last of these is of learned time embeddings only.
    passed_over = known | _OF_EMA | set(_FIXED) | {"num_train_timesteps"}
    ignored = [key for key in settings if key not in passed_over]
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
            raise ValueError(
                f"sample_size={reprlib.repr(size)} is not square: students, stores of trajectories "
                "and image data would need a height and a width of their own"
            )
        return size[0]
    return size


def _modern_types(kinds: Any) -> Any:
    """Block types without the prefix that they had in the first versions of diffusers."""
    if not isinstance(kinds, list | tuple):
        return kinds
    return [kind.removeprefix("UNetRes") if isinstance(kind, str) else kind for kind in kinds]


def config_to_diffusers(config: UNetConfig) -> dict[str, Any]:
    """The content of a config.json that diffusers' UNet2DModel reads.

    It knows one `attention_head_dim` for all levels: a list of several is read by advkd alone.
    """
    fixed = {key: allowed[0] for key, (allowed, _) in _FIXED.items()}
    heads = {_head_dim(config, level) for level in _attended(config)}
    one = {"attention_head_dim": heads.pop()} if len(heads) == 1 else {}
    return {**fixed, **dataclasses.asdict(config), **one}


class DownBlock(nn.Module):
    """`layers_per_block` residual blocks, with or without attention, then a halving unless last."""

    def __init__(self, config: UNetConfig, level: int, last: bool):
        super().__init__()
        widths, kind = config.block_out_channels, config.down_block_types[level]
        c_in, c_out = widths[max(level - 1, 0)], widths[level]
        self.resnets = nn.ModuleList(
            _resnet(config, c_in if i == 0 else c_out, c_out)
            for i in range(config.layers_per_block)
        )
        self.attentions = _attentions(config, kind, level, config.layers_per_block)
        self.downsamplers: nn.ModuleList | None = None
        if last:
            return
        if _is_resampled_by_resnet(kind, config.downsample_type):
            self.downsamplers = nn.ModuleList([_resnet(config, c_out, c_out, resample="down")])
        else:
            self.downsamplers = nn.ModuleList([Downsample(c_out, config.downsample_padding)])

    def forward(self, h: Tensor, temb: Tensor) -> tuple[Tensor, list[Tensor]]:
        skips = []
        for i, resnet in enumerate(self.resnets):
            h = resnet(h, temb)
            if self.attentions is not None:
                h = self.attentions[i](h)
            skips.append(h)
        if self.downsamplers is not None:
            h = _resampled(self.downsamplers[0], h, temb)
            skips.append(h)
        return h, skips


class MidBlock(nn.Module):
    """Residual block, attention, residual block at the lowest resolution."""

    def __init__(self, config: UNetConfig):
        super().__init__()
        channels, scale = config.block_out_channels[-1], config.mid_block_scale_factor
        self.resnets = nn.ModuleList(
            _resnet(config, channels, channels, scale=scale) for _ in range(2)
        )
        self.attentions: nn.ModuleList | None = None
        if config.add_attention:
            # As in diffusers: FiLM goes without this norm, unless its groups are given.
            usual = None if config.resnet_time_scale_shift != "default" else config.norm_num_groups
            groups = config.attn_norm_num_groups or usual
            last = len(config.block_out_channels) - 1
            self.attentions = nn.ModuleList([_attention(config, last, groups, scale)])

    def forward(self, h: Tensor, temb: Tensor) -> Tensor:
        h = self.resnets[0](h, temb)
        if self.attentions is not None:
            h = self.attentions[0](h)
        return self.resnets[1](h, temb)


class UpBlock(nn.Module):
    """`layers_per_block` + 1 residual blocks, each with one of the `skips`, then a doubling unless
    last. `level` counts from the lowest resolution."""

    def __init__(self, config: UNetConfig, level: int, last: bool):
        super().__init__()
        up, kind = config.block_out_channels[::-1], config.up_block_types[level]
        c_prev, c_out, c_skip_last = (
            up[max(level - 1, 0)],
            up[level],
            up[min(level + 1, len(up) - 1)],
        )
        layers = config.layers_per_block + 1
        self.resnets = nn.ModuleList()
        for i in range(layers):
            c_skip = c_skip_last if i == layers - 1 else c_out
            self.resnets.append(_resnet(config, (c_prev if i == 0 else c_out) + c_skip, c_out))
        self.attentions = _attentions(config, kind, len(up) - 1 - level, layers)
        self.upsamplers: nn.ModuleList | None = None
        if last:
            return
        if _is_resampled_by_resnet(kind, config.upsample_type):
            self.upsamplers = nn.ModuleList([_resnet(config, c_out, c_out, resample="up")])
        else:
            self.upsamplers = nn.ModuleList([Upsample(c_out)])

    def forward(self, h: Tensor, skips: list[Tensor], temb: Tensor) -> Tensor:
        for i, (resnet, skip) in enumerate(zip(self.resnets, skips, strict=True)):
            h = resnet(torch.cat([h, skip], dim=1), temb)
            if self.attentions is not None:
                h = self.attentions[i](h)
        return h if self.upsamplers is None else _resampled(self.upsamplers[0], h, temb)


def _is_resampled_by_resnet(kind: str, of_attention: str) -> bool:
    """Whether a level's resolution changes in a residual block; `of_attention` is the setting for
    levels with attention."""
    return kind.startswith("Resnet") or (kind.startswith("Attn") and of_attention == "resnet")


def _resampled(module: nn.Module, h: Tensor, temb: Tensor) -> Tensor:
    found: Tensor = module(h, temb) if isinstance(module, ResnetBlock) else module(h)
    return found


def _resnet(
    config: UNetConfig, c_in: int, c_out: int, *, scale: float = 1.0, resample: str | None = None
) -> ResnetBlock:
    return ResnetBlock(
        c_in,
        c_out,
        temb_channels=_hidden(config),
        groups=config.norm_num_groups,
        eps=config.norm_eps,
        dropout=config.dropout,
        scale=scale,
        film=config.resnet_time_scale_shift == "scale_shift",
        resample=resample,
    )


def _hidden(config: UNetConfig) -> int:
    """The width of the time embedding."""
    return config.time_embedding_dim or 4 * config.block_out_channels[0]


def _attention(config: UNetConfig, level: int, groups: int | None, scale: float = 1.0) -> Attention:
    channels = config.block_out_channels[level]
    return Attention(channels, _head_dim(config, level), groups, config.norm_eps, scale)


def _head_dim(config: UNetConfig, level: int) -> int | None:
    """The channels of a head at a level, 0 the highest resolution; None: one head over all."""
    heads = config.attention_head_dim
    return heads[level] if isinstance(heads, tuple) else heads


def _attentions(config: UNetConfig, kind: str, level: int, n: int) -> nn.ModuleList | None:
    if not kind.startswith("Attn"):
        return None
    return nn.ModuleList(_attention(config, level, config.norm_num_groups) for _ in range(n))


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
        widths, hidden = config.block_out_channels, _hidden(config)
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(widths[0], hidden)
        self.class_embedding = self._class_embedding(hidden)
        last = len(widths) - 1
        self.down_blocks = nn.ModuleList(
            DownBlock(config, i, last=i == last) for i in range(len(widths))
        )
        self.mid_block = None if config.mid_block_type is None else MidBlock(config)
        self.up_blocks = nn.ModuleList(
            UpBlock(config, i, last=i == last) for i in range(len(widths))
        )
        self.conv_norm_out = GroupNormSiLU(config.norm_num_groups, widths[0], config.norm_eps)
        self.conv_out = Conv3x3(widths[0], config.out_channels)

    def _class_embedding(self, hidden: int) -> nn.Embedding | TimestepEmbedding | None:
        config = self.config
        if config.num_class_embeds is None:
            return None
        if config.class_embed_type == "timestep":
            return TimestepEmbedding(config.block_out_channels[0], hidden)
        return nn.Embedding(config.num_class_embeds, hidden)

    @property
    def num_classes(self) -> int | None:
        """How many classes it is conditional on; None: it takes no labels."""
        return self.config.num_class_embeds

    @property
    def learns_variance(self) -> bool:
        """Whether a variance follows the prediction, in as many channels (Nichol and Dhariwal
        2021)."""
        twice = self.config.out_channels == 2 * self.config.in_channels
        return twice and self.schedule.variance_type == LEARNED_RANGE

    def embed_time(self, t: Tensor | int, batch: int) -> Tensor:
        """The time embedding without a class: (batch, hidden)."""
        dtype = t.dtype if isinstance(t, Tensor) else torch.float32
        timesteps = torch.as_tensor(t, dtype=dtype, device=self.conv_in.weight.device)
        temb: Tensor = self.time_embedding(self._sinusoids(timesteps.reshape(-1).expand(batch)))
        return temb

    def _sinusoids(self, numbers: Tensor) -> Tensor:
        config = self.config
        found = timestep_embedding(
            numbers, config.block_out_channels[0], config.flip_sin_to_cos, config.freq_shift
        )
        return found.to(self.conv_in.weight.dtype)

    def embed_class(self, y: Tensor) -> Tensor:
        """The class embedding of labels y (B,): (B, hidden). For a network with classes."""
        assert self.class_embedding is not None
        as_time = isinstance(self.class_embedding, TimestepEmbedding)
        found: Tensor = self.class_embedding(self._sinusoids(y) if as_time else y)
        return found

    def embed(self, t: Tensor | int, batch: int, y: Tensor | None = None) -> Tensor:
        """The embedding of time and class that every block receives: (batch, hidden)."""
        temb = self.embed_time(t, batch)
        if self.class_embedding is not None:
            if y is None:
                raise ValueError("this teacher is class-conditional: pass labels y (B,)")
            temb = temb + self.embed_class(y)
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
        if self.mid_block is not None:
            h = self._passed(self.mid_block, h, temb)
        for up in self.up_blocks:
            own = [skips.pop() for _ in range(self.config.layers_per_block + 1)]
            h = self._passed(up, h, own, temb)
        return normed_conv(self.conv_norm_out, self.conv_out, h)

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
    heads = config.attention_head_dim
    if isinstance(heads, tuple) and len(heads) != n:
        raise ValueError(f"attention_head_dim has {len(heads)} entries, block_out_channels has {n}")
    for level in _attended(config):
        channels = widths[level]
        if channels % (_head_dim(config, level) or channels):
            raise ValueError(f"attention_head_dim={heads} does not divide {channels=}")
    if widths[-1] % (config.attn_norm_num_groups or 1):
        raise ValueError(
            f"attn_norm_num_groups={config.attn_norm_num_groups} does not divide "
            f"channels={widths[-1]}"
        )
    if config.class_embed_type is not None and config.num_class_embeds is None:
        raise ValueError(
            f"class_embed_type={config.class_embed_type!r} takes any number for a label: "
            "num_class_embeds has to say how many there are"
        )


def _attended(config: UNetConfig) -> list[int]:
    """The levels with attention, 0 the highest resolution."""
    last = len(config.block_out_channels) - 1
    found = {last} if config.mid_block_type is not None and config.add_attention else set()
    for kinds in (config.down_block_types, config.up_block_types[::-1]):
        found |= {level for level, kind in enumerate(kinds) if kind.startswith("Attn")}
    return sorted(found)
