"""GroupNorm (Wu and He 2018) and SiLU in one Triton kernel: one program per (image, group)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# A tile this large stays in the registers of 8 warps, so that its group is read only once.
MAX_TILE = 8192


@triton.jit
def _tile(  # type: ignore[no-untyped-def]
    start, size, group, channels, pixels, group_channels, LAST: tl.constexpr, TILE: tl.constexpr
):
    """Offsets in the image, channels and mask of a tile of a group."""
    at = start + tl.arange(0, TILE)
    if LAST:
        channel = group * group_channels + at % group_channels
        offset = (at // group_channels) * channels + channel
    else:
        channel = group * group_channels + at // pixels
        offset = group * group_channels * pixels + at
    return offset, channel, at < size


@triton.jit
def _moments(x, inside, count):  # type: ignore[no-untyped-def]
    """Mean and sum of squared deviations of a tile, by the corrected two-pass formulas."""
    mean = tl.sum(tl.where(inside, x, 0.0), axis=0) / count
    deviation = tl.where(inside, x - mean, 0.0)
    rest = tl.sum(deviation, axis=0) / count
    squares = tl.sum(deviation * deviation, axis=0) - count * rest * rest
    return mean + rest, squares


@triton.jit
def _write(  # type: ignore[no-untyped-def]
    y_ptr, x, weight, bias, mean, inverse, offset, inside, SILU: tl.constexpr
):
    y = (x - mean) * (inverse * weight.to(tl.float32)) + bias.to(tl.float32)
    if SILU:
        y = y / (1.0 + tl.exp(-y))
    tl.store(y_ptr + offset, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _group_norm_silu_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    channels,
    pixels,
    group_channels,
    eps,
    LAST: tl.constexpr,
    SILU: tl.constexpr,
    RESIDENT: tl.constexpr,
    TILE: tl.constexpr,
):
    group = tl.program_id(0)
    # 64-bit: a batch may hold more than 2^31 elements.
    image = tl.program_id(1).to(tl.int64) * channels * pixels
    x_ptr += image
    y_ptr += image
    size = group_channels * pixels

    # Everything is measured from the first tile's mean, so that a large mean costs no digits.
    offset, channel, inside = _tile(0, size, group, channels, pixels, group_channels, LAST, TILE)
    x = tl.load(x_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    origin = tl.sum(x, axis=0) / tl.minimum(size, TILE).to(tl.float32)

    if RESIDENT:
        x -= origin
        mean, squares = _moments(x, inside, size.to(tl.float32))
        inverse = 1.0 / tl.sqrt_rn(squares / size + eps)
        weight = tl.load(weight_ptr + channel, mask=inside, other=0.0)
        bias = tl.load(bias_ptr + channel, mask=inside, other=0.0)
        _write(y_ptr, x, weight, bias, mean, inverse, offset, inside, SILU)
    else:
        # The tiles' moments are merged by Chan, Golub and LeVeque's rule.
        mean = 0.0
        squares = 0.0
        for start in range(0, size, TILE):
            offset, channel, inside = _tile(
                start, size, group, channels, pixels, group_channels, LAST, TILE
            )
            x = tl.load(x_ptr + offset, mask=inside, other=0.0).to(tl.float32) - origin
            count = tl.minimum(size - start, TILE).to(tl.float32)
            tile_mean, tile_squares = _moments(x, inside, count)
            share = count / (start + count)
            apart = tile_mean - mean
            mean += apart * share
            squares += tile_squares + apart * apart * share * start
        inverse = 1.0 / tl.sqrt_rn(squares / size + eps)
        for start in range(0, size, TILE):
            offset, channel, inside = _tile(
                start, size, group, channels, pixels, group_channels, LAST, TILE
            )
            x = tl.load(x_ptr + offset, mask=inside, other=0.0).to(tl.float32) - origin
            weight = tl.load(weight_ptr + channel, mask=inside, other=0.0)
            bias = tl.load(bias_ptr + channel, mask=inside, other=0.0)
            _write(y_ptr, x, weight, bias, mean, inverse, offset, inside, SILU)


def launch_options(group_elements: int) -> dict[str, int | bool]:
    """The tile, whether a group stays in registers, and the warps, for a group's size."""
    tile = min(MAX_TILE, max(128, 1 << (group_elements - 1).bit_length()))
    return {
        "TILE": tile,
        "RESIDENT": group_elements <= tile,
        "num_warps": max(1, min(8, tile // 512)),
    }


def group_norm_silu(
    x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float, silu: bool
) -> Tensor:
    """act(GroupNorm(x)), with statistics and arithmetic in float32.

    Args:
        x: (B, C, ...) float32, float16 or bfloat16; dense, contiguous or channels_last (4-D).
        weight, bias: (C,), any floating dtype.
        num_groups: divides C.
        silu: SiLU after the normalisation, or nothing.

    Returns:
        A tensor of x's shape, dtype and memory format.
    """
    y = torch.empty_like(x)
    if x.numel() == 0:
        return y
    batch, channels = x.shape[:2]
    pixels = x.numel() // (batch * channels)
    group_channels = channels // num_groups
    _group_norm_silu_kernel[(num_groups, batch)](
        x,
        weight,
        bias,
        y,
        channels,
        pixels,
        group_channels,
        eps,
        LAST=not x.is_contiguous(),
        SILU=silu,
        **launch_options(group_channels * pixels),
    )
    return y
