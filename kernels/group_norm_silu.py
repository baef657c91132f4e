"""GroupNorm (Wu and He 2018), FiLM (Perez et al. 2018) and SiLU in Triton, forward and backward.

    y = act((x_hat w + b) (1 + scale) + shift) = act(x_hat slope + offset)

Forward: a group that fits the registers of one program is read once; a larger one is cut into
chunks, whose moments are merged as by Chan, Golub and LeVeque (1983), and read again. Backward:
the sums over each channel, then dx in one further pass, then the parameters over the batch. There
are no atomics, so two runs agree bit for bit. Statistics and arithmetic are float32.

A mean is kept as origin + rest, two float32 numbers: one alone, far from zero, would cost x_hat
the digits that the mean has too many. Tiles are (PIXELS, CHANNELS). LAST says that channels are
neighbours in memory (channels_last); if not, a group is one run of memory, and kernels that need
whole groups take it in rows of VEC. Lengths that rows consist of arrive divided by VEC, so that
the compiler knows that VEC elements are neighbours, begin at a multiple of VEC and are inside or
outside together.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from advkd.kernels.compilation import Build
from torch import Tensor

# Groups that a tile of a channels_last tensor may hold, and partial results merged at a time.
GROUPS_IN_TILE = 16
MERGED = tl.constexpr(256)
# The tile of the kernels that only see one number for each channel.
ROWS = tl.constexpr(32)
COLUMNS = tl.constexpr(32)


@triton.jit
def _affine(  # type: ignore[no-untyped-def]
    weight_ptr, bias_ptr, scale_ptr, shift_ptr, row, channel, inside
):  # fmt: skip
    """slope and offset of channels; `row` is where their sample begins in scale and shift."""
    slope = tl.full(channel.shape, 1.0, tl.float32)
    offset = tl.zeros(channel.shape, tl.float32)
    if weight_ptr is not None:
        slope = tl.load(weight_ptr + channel, mask=inside, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        offset = tl.load(bias_ptr + channel, mask=inside, other=0.0).to(tl.float32)
    if scale_ptr is not None:
        factor = 1.0 + tl.load(scale_ptr + row + channel, mask=inside, other=0.0).to(tl.float32)
        slope *= factor
        offset *= factor
    if shift_ptr is not None:
        offset += tl.load(shift_ptr + row + channel, mask=inside, other=0.0).to(tl.float32)
    return slope, offset


@triton.jit
def _activated(z, SILU: tl.constexpr):  # type: ignore[no-untyped-def]
    if SILU:
        z = z / (1.0 + tl.exp(-z))
    return z


@triton.jit
def _before_activation(grad, z, SILU: tl.constexpr):  # type: ignore[no-untyped-def]
    """The gradient of z, given that of act(z)."""
    if SILU:
        gate = 1.0 / (1.0 + tl.exp(-z))
        grad = grad * gate * (1.0 + z * (1.0 - gate))
    return grad


@triton.jit
def _group_tile(  # type: ignore[no-untyped-def]
    sample, block, chunk, part, blocks, width, pixels,
    LAST: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """A tile of a block of groups: where it begins (64-bit), offsets in it, and what exists of it.

    A block is one group, `width` rows of CHANNELS = VEC elements; if LAST, it is some groups,
    `width` channels, and `part` counts the tiles that they may need.
    """
    at = tl.arange(0, PIXELS)
    column = tl.arange(0, CHANNELS)
    if LAST:
        channels = blocks * width
        start = (sample.to(tl.int64) * pixels + chunk * PIXELS) * channels
        start += block * width + part * CHANNELS
        offsets = at[:, None] * channels + column[None, :]
        exists = column < tl.minimum(CHANNELS, width - part * CHANNELS)
        inside = (chunk * PIXELS + at < pixels)[:, None] & exists[None, :]
    else:
        start = ((sample.to(tl.int64) * blocks + block) * width + chunk * PIXELS) * CHANNELS
        offsets = at[:, None] * CHANNELS + column[None, :]
        inside = tl.broadcast_to((chunk * PIXELS + at < width)[:, None], [PIXELS, CHANNELS])
    return start, offsets, inside


@triton.jit
def _groups_of_columns(  # type: ignore[no-untyped-def]
    part, width, group_channels, LAST: tl.constexpr, CHANNELS: tl.constexpr
):
    """The group, in its block, of each column of a tile; whether it is the tile's first of it."""
    column = tl.arange(0, CHANNELS)
    if LAST:
        group = (part * CHANNELS + column) // group_channels
        exists = column < tl.minimum(CHANNELS, width - part * CHANNELS)
        first = exists & (column % tl.minimum(CHANNELS, group_channels) == 0)
        return group, first
    else:
        return tl.zeros_like(column), column == 0


@triton.jit
def _over_groups(sums, group, GROUPS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Sums over columns, (CHANNELS,): to each column that of all columns of its group."""
    if GROUPS == 1:
        return tl.zeros_like(sums) + tl.sum(sums, axis=0)
    else:
        # A choice and not a product, because groups must not catch each other's NaN.
        member = group[:, None] == tl.arange(0, GROUPS)[None, :]
        of_group = tl.sum(tl.where(member, sums[:, None], 0.0), axis=0)
        return tl.sum(tl.where(member, of_group[None, :], 0.0), axis=1)


@triton.jit
def _moments(x, inside, group, count, GROUPS: tl.constexpr):  # type: ignore[no-untyped-def]
    """x - origin; the mean as origin + rest; the sum of squared deviations from it."""
    origin = _over_groups(tl.sum(x, axis=0), group, GROUPS) / count
    x = tl.where(inside, x - origin[None, :], 0.0)
    rest = _over_groups(tl.sum(x, axis=0), group, GROUPS) / count
    deviation = tl.where(inside, x - rest[None, :], 0.0)
    squares = _over_groups(tl.sum(deviation * deviation, axis=0), group, GROUPS)
    return x, origin, rest, squares


@triton.jit
def _quotient(a, b):  # type: ignore[no-untyped-def]
    """a // b of small integers, a >= 0, without the long integer division of GPUs."""
    quotient = (a.to(tl.float32) * (1.0 / b.to(tl.float32))).to(tl.int32)
    rest = a - quotient * b
    return quotient + (rest >= b).to(tl.int32) - (rest < 0).to(tl.int32)


FORWARD_INTEGERS = ("blocks", "width", "pixels", "group_channels")


@triton.jit(do_not_specialize=FORWARD_INTEGERS)
def _forward_kernel(  # type: ignore[no-untyped-def]
    x_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr, y_ptr, mean_ptr, rstd_ptr,
    blocks, width, pixels, group_channels, eps,
    SILU: tl.constexpr, VEC: tl.constexpr, LAST: tl.constexpr,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """y of one block of groups, which one tile holds, so that x is read once."""
    if LAST:
        width *= VEC
    sample = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    start, offsets, inside = _group_tile(
        sample, block, 0, 0, blocks, width, pixels, LAST, PIXELS, CHANNELS
    )
    group, first = _groups_of_columns(0, width, group_channels, LAST, CHANNELS)
    x = tl.load(x_ptr + start + offsets, mask=inside, other=0.0).to(tl.float32)
    count = pixels.to(tl.float32) * group_channels
    x, origin, rest, squares = _moments(x, inside, group, count, GROUPS)
    rstd = 1.0 / tl.sqrt_rn(squares / count + eps)

    if LAST:
        channel = (block * width + tl.arange(0, CHANNELS))[None, :]
        exists = (tl.arange(0, CHANNELS) < width)[None, :]
        channels = blocks * width
        groups_in_block = width // group_channels
    else:
        at = tl.arange(0, PIXELS)[:, None]
        channel = block * group_channels + _quotient(at, pixels // VEC)
        exists = at < width
        channels = blocks * group_channels
        groups_in_block = 1
    row = sample.to(tl.int64) * channels
    slope, offset = _affine(weight_ptr, bias_ptr, scale_ptr, shift_ptr, row, channel, exists)
    y = _activated((x - rest[None, :]) * rstd[None, :] * slope + offset, SILU)
    tl.store(y_ptr + start + offsets, y.to(y_ptr.dtype.element_ty), mask=inside)
    index = tl.program_id(0) * groups_in_block + group
    tl.store(mean_ptr + index, origin + rest, mask=first)
    tl.store(rstd_ptr + index, rstd, mask=first)


@triton.jit(do_not_specialize=(*FORWARD_INTEGERS, "chunks"))
def _moments_kernel(  # type: ignore[no-untyped-def]
    x_ptr, partial_ptr, blocks, width, pixels, group_channels, chunks,
    VEC: tl.constexpr, LAST: tl.constexpr,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Count, origin, rest and squares of each group's share of a tile: (4, B, groups, tiles)."""
    if LAST:
        width *= VEC
        parts = tl.cdiv(width, CHANNELS)
        groups_in_block = width // group_channels
    else:
        parts = 1
        groups_in_block = 1
    tiles = chunks * parts
    # Neighbouring programs read neighbouring memory.
    block_of_all = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    start, offsets, inside = _group_tile(
        block_of_all // blocks, block_of_all % blocks, tile // parts, tile % parts,
        blocks, width, pixels, LAST, PIXELS, CHANNELS,
    )  # fmt: skip
    group, first = _groups_of_columns(tile % parts, width, group_channels, LAST, CHANNELS)
    x = tl.load(x_ptr + start + offsets, mask=inside, other=0.0).to(tl.float32)
    count = _over_groups(tl.sum(inside.to(tl.float32), axis=0), group, GROUPS)
    x, origin, rest, squares = _moments(x, inside, group, count, GROUPS)

    index = (block_of_all * groups_in_block + group).to(tl.int64) * tiles + tile
    plane = tl.num_programs(0).to(tl.int64) * groups_in_block
    tl.store(partial_ptr + index, count, mask=first)
    tl.store(partial_ptr + plane + index, origin, mask=first)
    tl.store(partial_ptr + 2 * plane + index, rest, mask=first)
    tl.store(partial_ptr + 3 * plane + index, squares, mask=first)


@triton.jit(do_not_specialize=("tiles",))
def _merge_kernel(  # type: ignore[no-untyped-def]
    partial_ptr, origin_ptr, rest_ptr, mean_ptr, rstd_ptr, tiles, eps
):
    """The statistics of one group of its tiles', in a fixed order."""
    plane = tl.num_programs(0).to(tl.int64) * tiles
    partial_ptr += tl.program_id(0).to(tl.int64) * tiles
    lane = tl.arange(0, MERGED)

    counts = tl.zeros([MERGED], tl.float32)
    sums = tl.zeros([MERGED], tl.float32)
    for at in range(0, tiles, MERGED):
        inside = at + lane < tiles
        count = tl.load(partial_ptr + at + lane, mask=inside, other=0.0)
        counts += count
        sums += count * tl.load(partial_ptr + plane + at + lane, mask=inside, other=0.0)
    total = tl.sum(counts, axis=0)
    origin = tl.sum(sums, axis=0) / total

    sums = tl.zeros([MERGED], tl.float32)
    for at in range(0, tiles, MERGED):
        inside = at + lane < tiles
        count = tl.load(partial_ptr + at + lane, mask=inside, other=0.0)
        mean = tl.load(partial_ptr + plane + at + lane, mask=inside, other=0.0) - origin
        mean += tl.load(partial_ptr + 2 * plane + at + lane, mask=inside, other=0.0)
        sums += tl.where(inside, count * mean, 0.0)
    rest = tl.sum(sums, axis=0) / total

    sums = tl.zeros([MERGED], tl.float32)
    for at in range(0, tiles, MERGED):
        inside = at + lane < tiles
        count = tl.load(partial_ptr + at + lane, mask=inside, other=0.0)
        mean = tl.load(partial_ptr + plane + at + lane, mask=inside, other=0.0) - origin
        mean += tl.load(partial_ptr + 2 * plane + at + lane, mask=inside, other=0.0)
        apart = mean - rest
        squares = tl.load(partial_ptr + 3 * plane + at + lane, mask=inside, other=0.0)
        sums += tl.where(inside, squares + count * apart * apart, 0.0)
    rstd = 1.0 / tl.sqrt_rn(tl.sum(sums, axis=0) / total + eps)

    tl.store(origin_ptr + tl.program_id(0), origin)
    tl.store(rest_ptr + tl.program_id(0), rest)
    tl.store(mean_ptr + tl.program_id(0), origin + rest)
    tl.store(rstd_ptr + tl.program_id(0), rstd)


@triton.jit
def _tile(  # type: ignore[no-untyped-def]
    sample, pixel, channel, pixels, channels,
    LAST: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """The tile at (pixel, channel): where it begins (64-bit), offsets in it, what exists of it."""
    row = tl.arange(0, PIXELS)
    column = tl.arange(0, CHANNELS)
    start = sample.to(tl.int64) * pixels * channels
    if LAST:
        start += tl.cast(pixel, tl.int64) * channels + channel
        offsets = row[:, None] * channels + column[None, :]
    else:
        start += tl.cast(channel, tl.int64) * pixels + pixel
        offsets = row[:, None] + column[None, :] * pixels
    inside = (pixel + row < pixels)[:, None] & (channel + column < channels)[None, :]
    return start, offsets, inside


@triton.jit
def _channel_program(  # type: ignore[no-untyped-def]
    pixel_programs, channels, CHANNELS: tl.constexpr
):
    """This program's sample, its first channel, and its number among those along the pixels."""
    blocks = tl.cdiv(channels, CHANNELS)
    column = tl.program_id(0) // pixel_programs
    return column // blocks, column % blocks * CHANNELS, tl.program_id(0) % pixel_programs


APPLY_INTEGERS = ("channels", "pixels", "group_channels")


@triton.jit(do_not_specialize=APPLY_INTEGERS)
def _apply_kernel(  # type: ignore[no-untyped-def]
    x_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr, origin_ptr, rest_ptr, rstd_ptr, y_ptr,
    channels, pixels, group_channels,
    SILU: tl.constexpr, VEC: tl.constexpr, LAST: tl.constexpr,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """A tile of y, given the statistics."""
    if LAST:
        channels *= VEC
    else:
        pixels *= VEC
    sample, first, number = _channel_program(tl.cdiv(pixels, PIXELS), channels, CHANNELS)
    start, offsets, inside = _tile(
        sample, number * PIXELS, first, pixels, channels, LAST, PIXELS, CHANNELS
    )
    channel = first + tl.arange(0, CHANNELS)
    exists = channel < channels
    group = sample * (channels // group_channels) + channel // group_channels
    origin = tl.load(origin_ptr + group, mask=exists, other=0.0)
    rest = tl.load(rest_ptr + group, mask=exists, other=0.0)
    rstd = tl.load(rstd_ptr + group, mask=exists, other=0.0)
    row = sample.to(tl.int64) * channels
    slope, offset = _affine(weight_ptr, bias_ptr, scale_ptr, shift_ptr, row, channel, exists)
    x = tl.load(x_ptr + start + offsets, mask=inside, other=0.0).to(tl.float32)
    y = ((x - origin[None, :]) - rest[None, :]) * rstd[None, :] * slope[None, :] + offset[None, :]
    y = _activated(y, SILU)
    tl.store(y_ptr + start + offsets, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=(*APPLY_INTEGERS, "chunks", "chunk_tiles"))
def _sums_kernel(  # type: ignore[no-untyped-def]
    grad_ptr, x_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr, mean_ptr, rstd_ptr, partial_ptr,
    channels, pixels, group_channels, chunks, chunk_tiles,
    SILU: tl.constexpr, VEC: tl.constexpr, LAST: tl.constexpr,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Sums of g and g x_hat over a chunk of each channel, g the gradient before the activation.

    They go to (2, B, chunks, C).
    """
    if LAST:
        channels *= VEC
    else:
        pixels *= VEC
    sample, first, chunk = _channel_program(chunks, channels, CHANNELS)
    channel = first + tl.arange(0, CHANNELS)
    exists = channel < channels
    group = sample * (channels // group_channels) + channel // group_channels
    mean = tl.load(mean_ptr + group, mask=exists, other=0.0)
    rstd = tl.load(rstd_ptr + group, mask=exists, other=0.0)
    row = sample.to(tl.int64) * channels
    slope, offset = _affine(weight_ptr, bias_ptr, scale_ptr, shift_ptr, row, channel, exists)

    sums = tl.zeros([PIXELS, CHANNELS], tl.float32)
    products = tl.zeros([PIXELS, CHANNELS], tl.float32)
    for number in range(chunk * chunk_tiles, (chunk + 1) * chunk_tiles):
        start, offsets, inside = _tile(
            sample, number * PIXELS, first, pixels, channels, LAST, PIXELS, CHANNELS
        )
        x = tl.load(x_ptr + start + offsets, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + start + offsets, mask=inside, other=0.0).to(tl.float32)
        x_hat = (x - mean[None, :]) * rstd[None, :]
        grad = _before_activation(grad, x_hat * slope[None, :] + offset[None, :], SILU)
        # Padding adds 0, or NaN where the statistics are NaN and make everything so.
        sums += grad
        products += grad * x_hat

    index = (sample.to(tl.int64) * chunks + chunk) * channels + channel
    blocks = tl.cdiv(channels, CHANNELS)
    plane = (tl.num_programs(0) // blocks).to(tl.int64) * channels
    tl.store(partial_ptr + index, tl.sum(sums, axis=0), mask=exists)
    tl.store(partial_ptr + plane + index, tl.sum(products, axis=0), mask=exists)


@triton.jit(do_not_specialize=("groups", "pixels", "group_channels", "chunks"))
def _reduce_kernel(  # type: ignore[no-untyped-def]
    partial_ptr, weight_ptr, scale_ptr, sums_ptr, means_ptr,
    groups, pixels, group_channels, chunks,
):  # fmt: skip
    """Of one group: its channels' sums over the chunks, (2, B, C); the means of g slope and
    g slope x_hat over the group, (2, B, groups)."""
    channels = groups * group_channels
    sample = (tl.program_id(0) // groups).to(tl.int64)
    group = tl.program_id(0) % groups
    plane = (tl.num_programs(0) // groups).to(tl.int64) * channels
    lane = tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)
    mean = tl.zeros([COLUMNS], tl.float32)
    product = tl.zeros([COLUMNS], tl.float32)
    for at in range(0, group_channels, COLUMNS):
        exists = at + column < group_channels
        channel = group * group_channels + at + column
        of_sums = tl.zeros([ROWS, COLUMNS], tl.float32)
        of_products = tl.zeros([ROWS, COLUMNS], tl.float32)
        for chunk in range(0, chunks, ROWS):
            inside = (chunk + lane < chunks) & exists[None, :]
            index = (sample * chunks + chunk + lane) * channels + channel[None, :]
            of_sums += tl.load(partial_ptr + index, mask=inside, other=0.0)
            of_products += tl.load(partial_ptr + plane * chunks + index, mask=inside, other=0.0)
        sums = tl.sum(of_sums, axis=0)
        products = tl.sum(of_products, axis=0)
        row = sample * channels
        tl.store(sums_ptr + row + channel, sums, mask=exists)
        tl.store(sums_ptr + plane + row + channel, products, mask=exists)
        slope, _ = _affine(weight_ptr, None, scale_ptr, None, row, channel, exists)
        mean += tl.where(exists, sums * slope, 0.0)
        product += tl.where(exists, products * slope, 0.0)
    count = pixels.to(tl.float32) * group_channels
    tl.store(means_ptr + tl.program_id(0), tl.sum(mean, axis=0) / count)
    tl.store(means_ptr + tl.num_programs(0) + tl.program_id(0), tl.sum(product, axis=0) / count)


@triton.jit(do_not_specialize=(*APPLY_INTEGERS, "batch"))
def _dx_kernel(  # type: ignore[no-untyped-def]
    grad_ptr, x_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr, mean_ptr, rstd_ptr, means_ptr,
    dx_ptr, channels, pixels, group_channels, batch,
    SILU: tl.constexpr, VEC: tl.constexpr, LAST: tl.constexpr,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """A tile of dx = rstd (g slope - mean(g slope) - x_hat mean(g slope x_hat))."""
    if LAST:
        channels *= VEC
    else:
        pixels *= VEC
    sample, first, number = _channel_program(tl.cdiv(pixels, PIXELS), channels, CHANNELS)
    start, offsets, inside = _tile(
        sample, number * PIXELS, first, pixels, channels, LAST, PIXELS, CHANNELS
    )
    channel = first + tl.arange(0, CHANNELS)
    exists = channel < channels
    groups = channels // group_channels
    group = sample * groups + channel // group_channels
    mean = tl.load(mean_ptr + group, mask=exists, other=0.0)
    rstd = tl.load(rstd_ptr + group, mask=exists, other=0.0)
    along_one = tl.load(means_ptr + group, mask=exists, other=0.0)
    along_x = tl.load(means_ptr + batch * groups + group, mask=exists, other=0.0)
    row = sample.to(tl.int64) * channels
    slope, offset = _affine(weight_ptr, bias_ptr, scale_ptr, shift_ptr, row, channel, exists)

    x = tl.load(x_ptr + start + offsets, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + start + offsets, mask=inside, other=0.0).to(tl.float32)
    x_hat = (x - mean[None, :]) * rstd[None, :]
    grad = _before_activation(grad, x_hat * slope[None, :] + offset[None, :], SILU)
    dx = (grad * slope[None, :] - along_one[None, :] - x_hat * along_x[None, :]) * rstd[None, :]
    tl.store(dx_ptr + start + offsets, dx.to(dx_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _store_to(ptr, value, index, inside):  # type: ignore[no-untyped-def]
    """Stores where there is something to store to."""
    if ptr is not None:
        tl.store(ptr + index, value.to(ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=("batch", "channels"))
def _parameters_kernel(  # type: ignore[no-untyped-def]
    sums_ptr, weight_ptr, bias_ptr, scale_ptr,
    dweight_ptr, dbias_ptr, dscale_ptr, dshift_ptr, batch, channels,
):  # fmt: skip
    """The gradients of some channels' parameters, from the sums over their pixels."""
    channel = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    exists = channel < channels
    # Those of x_hat w + b, before FiLM.
    weight, bias = _affine(weight_ptr, bias_ptr, None, None, 0, channel, exists)
    dweight = tl.zeros([ROWS, COLUMNS], tl.float32)
    dbias = tl.zeros([ROWS, COLUMNS], tl.float32)
    plane = batch.to(tl.int64) * channels
    for start in range(0, batch, ROWS):
        sample = start + tl.arange(0, ROWS)
        inside = (sample < batch)[:, None] & exists[None, :]
        index = sample.to(tl.int64)[:, None] * channels + channel[None, :]
        sums = tl.load(sums_ptr + index, mask=inside, other=0.0)
        products = tl.load(sums_ptr + plane + index, mask=inside, other=0.0)
        _store_to(dscale_ptr, products * weight[None, :] + sums * bias[None, :], index, inside)
        _store_to(dshift_ptr, sums, index, inside)
        if scale_ptr is not None:
            factor = 1.0 + tl.load(scale_ptr + index, mask=inside, other=0.0).to(tl.float32)
            sums *= factor
            products *= factor
        dweight += products
        dbias += sums
    _store_to(dweight_ptr, tl.sum(dweight, axis=0), channel, exists)
    _store_to(dbias_ptr, tl.sum(dbias, axis=0), channel, exists)


KERNELS = {
    "forward": _forward_kernel,
    "moments": _moments_kernel,
    "merge": _merge_kernel,
    "apply": _apply_kernel,
    "sums": _sums_kernel,
    "reduce": _reduce_kernel,
    "dx": _dx_kernel,
    "parameters": _parameters_kernel,
}


@dataclass(frozen=True)
class Variant:
    """One way to launch a kernel: what it is compiled for besides dtype and width of accesses."""

    kernel: str  # a key of KERNELS
    last: bool = False  # channels_last
    pixels: int = 0  # of a tile; 0, 0 where tiles are fixed
    channels: int = 0  # of a tile; 1 where it is a run of memory of `pixels` elements
    num_warps: int = 4

    @property
    def name(self) -> str:
        words = ["group_norm_silu", self.kernel]
        if self.pixels:
            words += ["channels_last" if self.last else "contiguous"]
            words += [f"{self.pixels}x{self.channels}"]
        return " ".join(words)

    def constants(self, vec: int, silu: bool) -> dict[str, int | bool]:
        """The compile-time arguments."""
        if not self.pixels:
            return {}
        rows, columns = self.pixels, self.channels
        whole_groups = self.kernel in ("forward", "moments")
        if whole_groups and not self.last:
            rows, columns = rows // vec, vec
        constants: dict[str, int | bool] = {
            "VEC": vec, "LAST": self.last, "PIXELS": rows, "CHANNELS": columns,
        }  # fmt: skip
        if whole_groups:
            constants["GROUPS"] = GROUPS_IN_TILE if self.last else 1
        if self.kernel != "moments":
            constants["SILU"] = silu
        return constants

    def options(self) -> dict[str, int | bool]:
        """The compiler's options; fusing a product and a sum only spares a rounding."""
        return {"num_warps": self.num_warps, "num_stages": 1, "enable_fp_fusion": True}


# From the smallest tile to the largest, which keeps 32 elements in a thread's registers.
_FORWARD = (
    Variant("forward", False, 1024, 1, 2),
    Variant("forward", False, 4096, 1, 4),
    Variant("forward", False, 16384, 1, 16),
    Variant("forward", True, 64, 16, 2),
    Variant("forward", True, 256, 16, 4),
    Variant("forward", True, 1024, 16, 16),
    Variant("forward", True, 64, 64, 4),
    Variant("forward", True, 256, 64, 16),
    Variant("forward", True, 64, 256, 16),
)
_MOMENTS = (
    Variant("moments", False, 8192, 1, 8),
    Variant("moments", True, 512, 16, 8),
    Variant("moments", True, 128, 64, 8),
)


# Of kernels that treat channels singly: for small maps, for large ones, for channels_last.
_BY_CHANNEL = {
    "apply": (
        Variant("apply", False, 64, 64, 8),
        Variant("apply", False, 1024, 4, 8),
        Variant("apply", True, 128, 32, 8),
    ),
    # Half as large where it fits: they hold two sums for each element.
    "sums": (
        Variant("sums", False, 64, 32, 4),
        Variant("sums", False, 512, 4, 4),
        Variant("sums", True, 128, 32, 8),
    ),
    "dx": (
        Variant("dx", False, 64, 64, 8),
        Variant("dx", False, 1024, 4, 8),
        Variant("dx", True, 128, 32, 8),
    ),
}
_FIXED = {kernel: Variant(kernel) for kernel in ("merge", "reduce", "parameters")}

VARIANTS: tuple[Variant, ...] = (
    *_FORWARD, *_MOMENTS, *(v for group in _BY_CHANNEL.values() for v in group), *_FIXED.values()
)  # fmt: skip

# A run whose rows are shorter than 4 elements takes more registers for its channels' numbers.
_LARGEST_NARROW_RUN = 4096

# Programs that fill the largest of today's GPUs (132 to 304 processors) several times.
_ENOUGH_PROGRAMS = 1024


class Problem(NamedTuple):
    """What the choice of a variant depends on."""

    batch: int
    channels: int
    pixels: int
    groups: int
    last: bool  # channels_last
    itemsize: int  # of x, in bytes

    @property
    def group_channels(self) -> int:
        return self.channels // self.groups

    def vec(self, row: int) -> int:
        """Elements of the widest access, up to 16 bytes, that rows of this length allow."""
        return math.gcd(row, 16 // self.itemsize)


class GroupTiles(NamedTuple):
    """How a kernel that needs whole groups cuts x."""

    variant: Variant
    blocks: int  # of a sample: groups, or blocks of groups
    width: int  # of a block: elements if it is a run of memory, channels if channels_last
    chunks: int  # along the run, or along the pixels
    vec: int  # elements of the widest access that its rows allow

    @property
    def parts(self) -> int:
        """Tiles along the channels of a block."""
        return triton.cdiv(self.width, self.variant.channels) if self.variant.last else 1


def _block_of_groups(problem: Problem, columns: tuple[int, ...]) -> tuple[int, int]:
    """Groups in a block of a channels_last tensor, and columns of a tile.

    Several small groups share a tile, so that its rows begin at 16 bytes and fill whole sectors.
    """
    size = problem.group_channels
    counts = [n for n in range(1, GROUPS_IN_TILE + 1) if problem.groups % n == 0]
    for wanted in (16 // problem.itemsize, 1):
        for width in columns:
            fitting = [n for n in counts if n * size <= width and n * size % wanted == 0]
            if fitting:
                return fitting[-1], width
    return 1, columns[-1]


def group_tiles(problem: Problem, variants: tuple[Variant, ...]) -> GroupTiles:
    """The tiles of a kernel that needs whole groups: the smallest that holds one, or the last."""
    variants = tuple(v for v in variants if v.last == problem.last)
    if problem.last:
        columns = tuple(sorted({v.channels for v in variants}))
        count, column = _block_of_groups(problem, columns)
        width, length = count * problem.group_channels, problem.pixels
        vec = problem.vec(width)
        variants = tuple(v for v in variants if v.channels == column)
    else:
        count, width = 1, problem.group_channels * problem.pixels
        length, vec = width, problem.vec(problem.pixels)
        if vec < 4 and variants[0].kernel == "forward":
            variants = tuple(v for v in variants if v.pixels <= _LARGEST_NARROW_RUN)
    variant = next((v for v in variants if v.pixels >= length), variants[-1])
    chunks = triton.cdiv(length, variant.pixels)
    return GroupTiles(variant, problem.groups // count, width, chunks, vec)


def pick(kernel: str, problem: Problem, capability: tuple[int, int]) -> Variant | None:
    """The variant for a call, the same at run time and ahead of time; None: the kernel is unused.

    Args:
        kernel: a key of KERNELS.
        capability: of the device, as torch.cuda.get_device_capability says. Every variant fits
            every target, so nothing depends on it yet.
    """
    in_one_pass = group_tiles(problem, _FORWARD)
    one_pass = in_one_pass.chunks * in_one_pass.parts == 1
    if kernel == "forward":
        return in_one_pass.variant if one_pass else None
    if kernel in ("moments", "merge", "apply") and one_pass:
        return None
    if kernel == "moments":
        return group_tiles(problem, _MOMENTS).variant
    if kernel in _FIXED:
        return _FIXED[kernel]
    small, large, last = _BY_CHANNEL[kernel]
    if problem.last:
        return last
    return small if problem.pixels <= 256 else large


def _group_numbers(problem: Problem, tiles: GroupTiles) -> list[int]:
    """blocks, width, pixels and group_channels as the kernels by group take them."""
    return [tiles.blocks, tiles.width // tiles.vec, problem.pixels, problem.group_channels]


def _channel_vec(problem: Problem) -> int:
    return problem.vec(problem.channels if problem.last else problem.pixels)


def _channel_numbers(problem: Problem) -> list[int]:
    """channels, pixels and group_channels as the kernels by channel take them."""
    vec = _channel_vec(problem)
    channels = problem.channels // vec if problem.last else problem.channels
    pixels = problem.pixels if problem.last else problem.pixels // vec
    return [channels, pixels, problem.group_channels]


def sum_chunks(problem: Problem, variant: Variant) -> tuple[int, int]:
    """Chunks that the backward sums cut each channel into, and the tiles of one."""
    tiles = triton.cdiv(problem.pixels, variant.pixels)
    programs = problem.batch * triton.cdiv(problem.channels, variant.channels)
    chunk_tiles = triton.cdiv(tiles, max(1, _ENOUGH_PROGRAMS // programs))
    return triton.cdiv(tiles, chunk_tiles), chunk_tiles


def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def _launch(
    variant: Variant, grid: int, arguments: list[Any], vec: int = 1, silu: bool = False
) -> None:
    with torch.cuda.device_of(arguments[0]):
        KERNELS[variant.kernel][(grid,)](
            *arguments, **variant.constants(vec, silu), **variant.options()
        )


def _aligned(x: Tensor) -> Tensor:
    """x, or a copy of it that begins at 16 bytes."""
    return x if x.data_ptr() % 16 == 0 else x.clone()


def _dense(x: Tensor) -> tuple[Tensor, bool]:
    """x without gaps, with neighbouring pixels or neighbouring channels; whether the latter."""
    last = not x.is_contiguous() and x.movedim(1, -1).is_contiguous()
    return _aligned(x if last else x.contiguous()), last


def _like(x: Tensor, other: Tensor) -> Tensor:
    """x, laid out as `other`."""
    return _aligned(x if x.stride() == other.stride() else torch.empty_like(other).copy_(x))


def _parameters(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if x is None else _aligned(x.contiguous()) for x in tensors]


def _empty(x: Tensor, *shape: int) -> Tensor:
    """An unwritten float32 tensor on x's device. Each is its own, so that it begins at 16 bytes."""
    return torch.empty(shape, dtype=torch.float32, device=x.device)


def _problem(x: Tensor, last: bool, num_groups: int) -> Problem:
    batch, channels = x.shape[:2]
    pixels = math.prod(x.shape[2:])
    if channels // num_groups * pixels >= 1 << 29:
        raise ValueError(
            f"a group of {channels // num_groups} channels and {pixels} pixels is too large: the "
            "Triton kernels take fewer than 2^29 elements."
        )
    return Problem(batch, channels, pixels, num_groups, last, x.element_size())


def forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, scale: Tensor | None,
    shift: Tensor | None, num_groups: int, eps: float, silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """act(GroupNorm(x) (1 + scale) + shift), with statistics and arithmetic in float32.

    Args:
        x: (B, C, ...) float32, float16 or bfloat16; copied if neither contiguous nor channels_last.
        weight, bias: (C,), any floating dtype, or None for 1 and 0.
        scale, shift: (B, C), any floating dtype, or None for 0.
        num_groups: divides C.
        eps: added to the variance.
        silu: SiLU after all, or nothing.

    Returns:
        y: of x's shape, dtype and memory format.
        mean, rstd: (B, num_groups) float32; rstd = 1 / sqrt(variance + eps).

    Raises:
        ValueError: a group of 2^29 elements or more.
    """
    x, last = _dense(x)
    problem = _problem(x, last, num_groups)
    y = torch.empty_like(x)
    mean, rstd = (_empty(x, problem.batch, num_groups) for _ in range(2))
    if x.numel() == 0:
        return y, mean.fill_(math.nan), rstd.fill_(math.nan)
    parameters = _parameters(weight, bias, scale, shift)
    capability = _capability(x.device)
    if pick("forward", problem, capability) is None:
        _forward_in_two_passes(x, parameters, y, mean, rstd, problem, eps, silu)
        return y, mean, rstd
    tiles = group_tiles(problem, _FORWARD)
    arguments = [x, *parameters, y, mean, rstd, *_group_numbers(problem, tiles), float(eps)]
    _launch(tiles.variant, problem.batch * tiles.blocks, arguments, tiles.vec, silu)
    return y, mean, rstd


def _forward_in_two_passes(
    x: Tensor, parameters: list[Tensor | None], y: Tensor, mean: Tensor, rstd: Tensor,
    problem: Problem, eps: float, silu: bool,
) -> None:  # fmt: skip
    """Fills y, mean and rstd, reading x twice."""
    tiles = group_tiles(problem, _MOMENTS)
    count = tiles.chunks * tiles.parts
    groups = problem.batch * problem.groups
    partial = _empty(x, 4, groups, count)
    arguments = [x, partial, *_group_numbers(problem, tiles), tiles.chunks]
    _launch(tiles.variant, problem.batch * tiles.blocks * count, arguments, tiles.vec)
    origin, rest = (_empty(x, *mean.shape) for _ in range(2))
    _launch(_FIXED["merge"], groups, [partial, origin, rest, mean, rstd, count, float(eps)])

    variant = pick("apply", problem, _capability(x.device))
    assert variant is not None
    arguments = [x, *parameters, origin, rest, rstd, y, *_channel_numbers(problem)]
    grid = _channel_grid(problem, variant, triton.cdiv(problem.pixels, variant.pixels))
    _launch(variant, grid, arguments, _channel_vec(problem), silu)


def _channel_grid(problem: Problem, variant: Variant, pixel_programs: int) -> int:
    return problem.batch * triton.cdiv(problem.channels, variant.channels) * pixel_programs


def _sums_and_means(read: list[Any], problem: Problem, silu: bool) -> tuple[Tensor, Tensor]:
    """What `_reduce_kernel` makes, given what `_sums_kernel` reads."""
    _, x, weight, _, scale, *_ = read
    batch, channels, groups = problem.batch, problem.channels, problem.groups
    variant = pick("sums", problem, _capability(x.device))
    assert variant is not None
    chunks, chunk_tiles = sum_chunks(problem, variant)
    partial = _empty(x, 2, batch, chunks, channels)
    grid = _channel_grid(problem, variant, chunks)
    arguments = [*read, partial, *_channel_numbers(problem), chunks, chunk_tiles]
    _launch(variant, grid, arguments, _channel_vec(problem), silu)

    sums, means = _empty(x, 2, batch, channels), _empty(x, 2, batch, groups)
    arguments = [partial, weight, scale, sums, means]
    arguments += [groups, problem.pixels, problem.group_channels, chunks]
    _launch(_FIXED["reduce"], batch * groups, arguments)
    return sums, means


def backward(
    grad_y: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, scale: Tensor | None,
    shift: Tensor | None, mean: Tensor, rstd: Tensor, num_groups: int, eps: float, silu: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of `forward`'s y; the same bits in every run.

    Args:
        grad_y: of x's shape and dtype, any strides.
        mean, rstd: what `forward` returned.
        The others: as for `forward`.

    Returns:
        (dx, dweight, dbias, dscale, dshift), each of the shape and dtype of what it belongs to, dx
        also of its memory format; None for what is None.
    """
    x, last = _dense(x)
    problem = _problem(x, last, num_groups)
    grad_y = _like(grad_y, x)
    dx = torch.empty_like(x)
    weight, bias, scale, shift = parameters = _parameters(weight, bias, scale, shift)
    gradients = [None if p is None else torch.empty_like(p) for p in parameters]
    dweight, dbias, dscale, dshift = gradients
    if x.numel() == 0:
        for gradient in gradients:
            if gradient is not None:
                gradient.zero_()
        return dx, dweight, dbias, dscale, dshift
    mean, rstd = _aligned(mean.contiguous()), _aligned(rstd.contiguous())
    numbers, vec = _channel_numbers(problem), _channel_vec(problem)
    read = [grad_y, x, *parameters, mean, rstd]
    sums, means = _sums_and_means(read, problem, silu)

    variant = pick("dx", problem, _capability(x.device))
    assert variant is not None
    grid = _channel_grid(problem, variant, triton.cdiv(problem.pixels, variant.pixels))
    _launch(variant, grid, [*read, means, dx, *numbers, problem.batch], vec, silu)

    if any(gradient is not None for gradient in gradients):
        arguments = [sums, weight, bias, scale, *gradients, problem.batch, problem.channels]
        grid = triton.cdiv(problem.channels, COLUMNS.value)
        _launch(_FIXED["parameters"], grid, arguments)
    return dx, dweight, dbias, dscale, dshift


_TYPES = {"float32": "*fp32", "float16": "*fp16", "bfloat16": "*bf16"}
_OF_X_DTYPE = ("x_ptr", "y_ptr", "grad_ptr", "dx_ptr")


def _build(variant: Variant, dtype: str, vec: int) -> Build:
    kernel = KERNELS[variant.kernel]
    constants = variant.constants(vec, True)
    types = {
        name: _TYPES[dtype if name in _OF_X_DTYPE else "float32"] if name.endswith("_ptr")
        else "fp32" if name == "eps" else "i32"
        for name in kernel.arg_names if name not in constants
    }  # fmt: skip
    row_bytes = vec * (4 if dtype == "float32" else 2)
    edges = f"{dtype}, {row_bytes} bytes" if constants else "float32"
    return Build(
        variant.name, edges, kernel, types, constants, variant.options(),
        read_bytes=row_bytes if constants else 4,
        # The others write only one number for each group or channel.
        write_bytes=row_bytes if variant.kernel in ("forward", "apply", "dx") else 4,
    )  # fmt: skip


def variants() -> list[Build]:
    """What `pick` can pick, each for float32 and float16 with SiLU and all parameters.

    Rows that do not allow 16 bytes are compiled for the shortest that the variant takes, in
    bfloat16: that needs the most registers.
    """
    builds = []
    for variant in VARIANTS:
        builds.append(_build(variant, "float32", 4))
        if variant.pixels:
            wide_run = variant.kernel == "forward" and variant.pixels > _LARGEST_NARROW_RUN
            builds.append(_build(variant, "float16", 8))
            builds.append(_build(variant, "bfloat16", 4 if wide_run else 1))
    return builds
