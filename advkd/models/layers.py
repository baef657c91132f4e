"""The building blocks of teacher, student and discriminator.

Attribute names follow diffusers where the teacher uses them, so that its tensors load by name.
Every GroupNorm-SiLU of the package goes through `GroupNormSiLU`, and every 3x3 convolution of many
channels that keeps the size through `Conv3x3`.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from advkd import ops


def area_resized(images: Tensor, size: int) -> Tensor:
    """Images (B, C, S, S) averaged down to (size, size); `size` divides S."""
    factor = images.shape[-1] // size
    return images if factor == 1 else F.avg_pool2d(images, factor)


class GroupNormSiLU(nn.GroupNorm):
    """SiLU(GroupNorm(x)), or GroupNorm alone with activation="none"; x (B, C, H, W).

    Raises ValueError unless `groups` divides `channels`.
    """

    def __init__(self, groups: int, channels: int, eps: float = 1e-5, activation: str = "silu"):
        if channels % groups:
            raise ValueError(f"num_groups={groups} does not divide channels={channels}")
        super().__init__(groups, channels, eps)
        self.activation = activation

    def forward(
        self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None
    ) -> Tensor:
        """With `scale` and `shift` (B, C): FiLM in front of SiLU, GN(x) (1 + scale) + shift."""
        return ops.group_norm_silu(
            x, self.weight, self.bias, self.num_groups, self.eps, self.activation, scale, shift
        )


class Conv3x3(nn.Conv2d):
    """A 3x3 convolution with padding 1: (B, C, H, W) -> (B, C_out, H, W)."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels, out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return ops.conv3x3(x, self.weight, self.bias)


def normed_conv(
    norm: GroupNormSiLU,
    conv: Conv3x3,
    x: Tensor,
    addend: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """residual + conv(norm(x)) + addend: x (B, C, H, W), addend (B, C_out), residual as the result.

    One op does it, unless a module is of another kind, or has hooks or a `forward` of its own.
    """
    if _is_plain(norm, GroupNormSiLU) and norm.activation == "silu" and _is_plain(conv, Conv3x3):
        return ops.normed_conv3x3(
            x, norm.weight, norm.bias, norm.num_groups, norm.eps, conv.weight, conv.bias,
            addend, residual,
        )  # fmt: skip
    h: Tensor = conv(norm(x))
    if addend is not None:
        h = h + addend[:, :, None, None]
    return h if residual is None else residual + h


def _is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling the module is what its kind's `forward` does."""
    hooked = module._forward_hooks or module._forward_pre_hooks
    watched = module._backward_hooks or module._backward_pre_hooks
    return type(module) is kind and not (hooked or watched or "forward" in vars(module))


def timestep_embedding(
    timesteps: Tensor, dim: int, flip_sin_to_cos: bool = True, freq_shift: float = 0.0
) -> Tensor:
    """Sinusoidal embedding of timesteps, (B,) -> (B, dim) float32 (Vaswani et al. 2017; DDPM)."""
    half = dim // 2
    exponent = -math.log(10000) * torch.arange(half, dtype=torch.float32, device=timesteps.device)
    angles = timesteps[:, None].float() * torch.exp(exponent / (half - freq_shift))
    parts = (angles.cos(), angles.sin()) if flip_sin_to_cos else (angles.sin(), angles.cos())
    return F.pad(torch.cat(parts, dim=1), (0, dim % 2))


class TimestepEmbedding(nn.Module):
    """The two-layer network that follows the sinusoids: (B, dim) -> (B, hidden)."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.linear_1 = nn.Linear(dim, hidden)
        self.linear_2 = nn.Linear(hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


class ResnetBlock(nn.Module):
    """Two GroupNorm-SiLU-convolutions with a residual: (B, C, H, W) -> (B, C_out, H, W).

    A projection of the time embedding `temb` (B, temb_channels) is added between the two or, with
    `film`, scales and shifts the second norm (Perez et al. 2018); with temb_channels=None there is
    none. `resample` doubles ("up") or halves ("down") height and width after the first SiLU and of
    the residual. The output is divided by `scale`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        temb_channels: int | None,
        groups: int,
        eps: float = 1e-5,
        dropout: float = 0.0,
        scale: float = 1.0,
        film: bool = False,
        resample: str | None = None,
    ):
        super().__init__()
        projected = 2 * out_channels if film else out_channels
        self.norm1 = GroupNormSiLU(groups, in_channels, eps)
        self.conv1 = Conv3x3(in_channels, out_channels)
        self.time_emb_proj = nn.Linear(temb_channels, projected) if temb_channels else None
        self.norm2 = GroupNormSiLU(groups, out_channels, eps)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = Conv3x3(out_channels, out_channels)
        self.conv_shortcut = (
            nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None
        )
        self.scale = scale
        self.film = film
        self.resample = resample

    def forward(self, x: Tensor, temb: Tensor | None = None) -> Tensor:
        projected = None
        if self.time_emb_proj is not None and temb is not None:
            projected = self.time_emb_proj(F.silu(temb))
        addend = None if self.film else projected
        if self.resample is None:
            h = normed_conv(self.norm1, self.conv1, x, addend)
        else:
            h = self.conv1(resampled(self.norm1(x), self.resample))
            x = resampled(x, self.resample)
            if addend is not None:
                h = h + addend[:, :, None, None]
        if self.conv_shortcut is not None:
            x = self.conv_shortcut(x)
        drops = self.training and self.dropout.p > 0
        if drops or (self.film and projected is not None):
            film = projected.chunk(2, dim=1) if self.film and projected is not None else ()
            h = x + self.conv2(self.dropout(self.norm2(h, *film)))
        else:
            h = normed_conv(self.norm2, self.conv2, h, None, x)
        return h if self.scale == 1.0 else h / self.scale


def resampled(x: Tensor, way: str) -> Tensor:
    """x (B, C, H, W), doubled to its nearest neighbors ("up") or averaged by squares ("down")."""
    return F.interpolate(x, scale_factor=2.0, mode="nearest") if way == "up" else F.avg_pool2d(x, 2)


class Attention(nn.Module):
    """Self-attention over the H*W positions, with a residual; its output is divided by `scale`.

    Heads have `head_dim` channels; None is one head over all. `groups` are those of the norm in
    front; None is no norm. Raises ValueError unless `head_dim` divides `channels`.
    """

    def __init__(
        self,
        channels: int,
        head_dim: int | None,
        groups: int | None,
        eps: float = 1e-5,
        scale: float = 1.0,
    ):
        super().__init__()
        head_dim = channels if head_dim is None else head_dim
        if channels % head_dim:
            raise ValueError(f"attention_head_dim={head_dim} does not divide channels={channels}")
        self.heads = channels // head_dim
        self.group_norm = (
            None if groups is None else GroupNormSiLU(groups, channels, eps, activation="none")
        )
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        B, C, H, W = x.shape
        normed = x if self.group_norm is None else self.group_norm(x)
        tokens = normed.permute(0, 2, 3, 1).reshape(B, H * W, C)
        q, k, v = (
            proj(tokens).reshape(B, H * W, self.heads, C // self.heads).transpose(1, 2)
            for proj in (self.to_q, self.to_k, self.to_v)
        )
        out = ops.attention(q, k, v)
        out = self.to_out[0](out.transpose(1, 2).reshape(B, H * W, C))
        h = x + out.reshape(B, H, W, C).permute(0, 3, 1, 2)
        return h if self.scale == 1.0 else h / self.scale


class Downsample(nn.Module):
    """A 3x3 convolution with stride 2; padding 0 pads only right and bottom, as in DDPM's code."""

    def __init__(self, channels: int, padding: int):
        super().__init__()
        self.padding = padding
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.padding == 0 else x)


class Upsample(nn.Module):
    """Nearest-neighbor doubling, then a 3x3 convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = Conv3x3(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
