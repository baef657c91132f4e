"""The device code of `group_norm_silu`: GroupNorm, FiLM and SiLU in Triton, forward and backward.

A mean is kept as origin + rest, two float32 numbers: one alone, far from zero, would cost x_hat
the digits that the mean has too many. Tiles are (PIXELS, CHANNELS). LAST says that channels are
neighbors in memory (channels_last); if not, a group is one run of memory, and kernels that need
whole groups take it in rows of VEC. Lengths that rows consist of arrive divided by VEC, so that
the compiler knows that VEC elements are neighbors, begin at a multiple of VEC and are inside or
outside together.
"""

from __future__ import annotations

import triton
import triton.language as tl

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
    sample, block, chunk, part, blocks, width, pixels, row,
    LAST: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """A tile of a block of groups: where it begins (64-bit), offsets in it, and what exists of it.

    A block is one group, `width` rows of CHANNELS = VEC elements; if LAST, it is some groups,
    `width` channels, `part` counts the tiles that they may need, and pixels are `row` apart.
    """
    at = tl.arange(0, PIXELS)
    column = tl.arange(0, CHANNELS)
    if LAST:
        start = (sample.to(tl.int64) * pixels + chunk * PIXELS) * row
        start += block * width + part * CHANNELS
        offsets = at[:, None] * row + column[None, :]
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


@triton.jit
def _sum_with(  # type: ignore[no-untyped-def]
    x, added_ptr, row, channel, exists, inside
):
    """x plus a number for each channel, and zero outside of the tensor."""
    if added_ptr is None:
        return x
    else:
        added = tl.load(added_ptr + row + channel, mask=exists, other=0.0).to(tl.float32)
        return tl.where(inside, x + added[None, :], 0.0)


FORWARD_INTEGERS = ("blocks", "width", "pixels", "group_channels", "x_row", "added_row")


@triton.jit(do_not_specialize=FORWARD_INTEGERS)
def group_norm_silu_forward_kernel(  # type: ignore[no-untyped-def]
    x_ptr, added_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr, y_ptr, mean_ptr, rstd_ptr,
    blocks, width, pixels, group_channels, x_row, added_row, eps,
    SILU: tl.constexpr, VEC: tl.constexpr, LAST: tl.constexpr,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """y of one block of groups, which one tile holds, so that x is read once."""
    if LAST:
        width *= VEC
        x_row *= VEC
    sample = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    start, offsets, inside = _group_tile(
        sample, block, 0, 0, blocks, width, pixels, x_row, LAST, PIXELS, CHANNELS
    )
    group, first = _groups_of_columns(0, width, group_channels, LAST, CHANNELS)
    x = tl.load(x_ptr + start + offsets, mask=inside, other=0.0).to(tl.float32)
    if LAST:
        column = tl.arange(0, CHANNELS)
        x = _sum_with(
            x, added_ptr, sample.to(tl.int64) * added_row, block * width + column, column < width,
            inside,
        )  # fmt: skip
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
    start, offsets, _ = _group_tile(
        sample, block, 0, 0, blocks, width, pixels, blocks * width, LAST, PIXELS, CHANNELS
    )
    tl.store(y_ptr + start + offsets, y.to(y_ptr.dtype.element_ty), mask=inside)
    index = tl.program_id(0) * groups_in_block + group
    tl.store(mean_ptr + index, origin + rest, mask=first)
    tl.store(rstd_ptr + index, rstd, mask=first)


@triton.jit(do_not_specialize=(*FORWARD_INTEGERS, "chunks"))
def group_norm_silu_moments_kernel(  # type: ignore[no-untyped-def]
    x_ptr, added_ptr, partial_ptr, blocks, width, pixels, group_channels, x_row, chunks, added_row,
    VEC: tl.constexpr, LAST: tl.constexpr,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Count, origin, rest and squares of each group's share of a tile: (4, B, groups, tiles)."""
    if LAST:
        width *= VEC
        x_row *= VEC
        parts = tl.cdiv(width, CHANNELS)
        groups_in_block = width // group_channels
    else:
        parts = 1
        groups_in_block = 1
    tiles = chunks * parts
    # Neighboring programs read neighboring memory.
    block_of_all = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    sample, block, part = block_of_all // blocks, block_of_all % blocks, tile % parts
    start, offsets, inside = _group_tile(
        sample, block, tile // parts, part, blocks, width, pixels, x_row, LAST, PIXELS, CHANNELS
    )
    group, first = _groups_of_columns(part, width, group_channels, LAST, CHANNELS)
    x = tl.load(x_ptr + start + offsets, mask=inside, other=0.0).to(tl.float32)
    if LAST:
        column = part * CHANNELS + tl.arange(0, CHANNELS)
        x = _sum_with(
            x, added_ptr, sample.to(tl.int64) * added_row, block * width + column, column < width,
            inside,
        )  # fmt: skip
    count = _over_groups(tl.sum(inside.to(tl.float32), axis=0), group, GROUPS)
    x, origin, rest, squares = _moments(x, inside, group, count, GROUPS)

    index = (block_of_all * groups_in_block + group).to(tl.int64) * tiles + tile
    plane = tl.num_programs(0).to(tl.int64) * groups_in_block
    tl.store(partial_ptr + index, count, mask=first)
    tl.store(partial_ptr + plane + index, origin, mask=first)
    tl.store(partial_ptr + 2 * plane + index, rest, mask=first)
    tl.store(partial_ptr + 3 * plane + index, squares, mask=first)


@triton.jit(do_not_specialize=("tiles",))
def group_norm_silu_merge_kernel(  # type: ignore[no-untyped-def]
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
    sample, pixel, channel, pixels, channels, row,
    LAST: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """The tile at (pixel, channel): where it begins (64-bit), offsets in it, what exists of it.

    If LAST, pixels are `row` elements apart.
    """
    at = tl.arange(0, PIXELS)
    column = tl.arange(0, CHANNELS)
    if LAST:
        start = (sample.to(tl.int64) * pixels + pixel) * row + channel
        offsets = at[:, None] * row + column[None, :]
    else:
        start = (sample.to(tl.int64) * channels + channel) * pixels + pixel
        offsets = at[:, None] + column[None, :] * pixels
    inside = (pixel + at < pixels)[:, None] & (channel + column < channels)[None, :]
    return start, offsets, inside


@triton.jit
def _channel_program(  # type: ignore[no-untyped-def]
    pixel_programs, channels, CHANNELS: tl.constexpr
):
    """This program's sample, its first channel, and its number among those along the pixels."""
    blocks = tl.cdiv(channels, CHANNELS)
    column = tl.program_id(0) // pixel_programs
    return column // blocks, column % blocks * CHANNELS, tl.program_id(0) % pixel_programs


@triton.jit
def _channels_of_tile(  # type: ignore[no-untyped-def]
    sample, first, channels, group_channels, CHANNELS: tl.constexpr
):
    """A tile's channels, which of them exist, their groups, and where scale and shift begin."""
    channel = first + tl.arange(0, CHANNELS)
    exists = channel < channels
    group = sample * (channels // group_channels) + channel // group_channels
    return channel, exists, group, sample.to(tl.int64) * channels


@triton.jit
def _normalized_and_gradient(  # type: ignore[no-untyped-def]
    x_ptr, grad_ptr, inside, mean, rstd, slope, offset, SILU: tl.constexpr
):
    """A tile's x_hat, and its gradient before the activation."""
    x = tl.load(x_ptr, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr, mask=inside, other=0.0).to(tl.float32)
    x_hat = (x - mean[None, :]) * rstd[None, :]
    return x_hat, _before_activation(grad, x_hat * slope[None, :] + offset[None, :], SILU)


APPLY_INTEGERS = ("channels", "pixels", "group_channels")


@triton.jit(do_not_specialize=(*APPLY_INTEGERS, "x_row", "added_row"))
def group_norm_silu_apply_kernel(  # type: ignore[no-untyped-def]
    x_ptr, added_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr, origin_ptr, rest_ptr, rstd_ptr,
    y_ptr, channels, pixels, group_channels, x_row, added_row,
    SILU: tl.constexpr, VEC: tl.constexpr, LAST: tl.constexpr,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """A tile of y, given the statistics."""
    if LAST:
        channels *= VEC
        x_row *= VEC
    else:
        pixels *= VEC
    sample, first, number = _channel_program(tl.cdiv(pixels, PIXELS), channels, CHANNELS)
    start, offsets, inside = _tile(
        sample, number * PIXELS, first, pixels, channels, x_row, LAST, PIXELS, CHANNELS
    )
    channel, exists, group, row = _channels_of_tile(
        sample, first, channels, group_channels, CHANNELS
    )
    origin = tl.load(origin_ptr + group, mask=exists, other=0.0)
    rest = tl.load(rest_ptr + group, mask=exists, other=0.0)
    rstd = tl.load(rstd_ptr + group, mask=exists, other=0.0)
    slope, offset = _affine(weight_ptr, bias_ptr, scale_ptr, shift_ptr, row, channel, exists)
    x = tl.load(x_ptr + start + offsets, mask=inside, other=0.0).to(tl.float32)
    x = _sum_with(x, added_ptr, sample.to(tl.int64) * added_row, channel, exists, inside)
    y = ((x - origin[None, :]) - rest[None, :]) * rstd[None, :] * slope[None, :] + offset[None, :]
    y = _activated(y, SILU)
    start, offsets, _ = _tile(
        sample, number * PIXELS, first, pixels, channels, channels, LAST, PIXELS, CHANNELS
    )
    tl.store(y_ptr + start + offsets, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=(*APPLY_INTEGERS, "chunks", "chunk_tiles"))
def group_norm_silu_sums_kernel(  # type: ignore[no-untyped-def]
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
    channel, exists, group, row = _channels_of_tile(
        sample, first, channels, group_channels, CHANNELS
    )
    mean = tl.load(mean_ptr + group, mask=exists, other=0.0)
    rstd = tl.load(rstd_ptr + group, mask=exists, other=0.0)
    slope, offset = _affine(weight_ptr, bias_ptr, scale_ptr, shift_ptr, row, channel, exists)

    sums = tl.zeros([PIXELS, CHANNELS], tl.float32)
    products = tl.zeros([PIXELS, CHANNELS], tl.float32)
    for number in range(chunk * chunk_tiles, (chunk + 1) * chunk_tiles):
        start, offsets, inside = _tile(
            sample, number * PIXELS, first, pixels, channels, channels, LAST, PIXELS, CHANNELS
        )
        x_hat, grad = _normalized_and_gradient(
            x_ptr + start + offsets, grad_ptr + start + offsets, inside, mean, rstd, slope, offset,
            SILU,
        )  # fmt: skip
        # Padding adds 0, or NaN where the statistics are NaN and make everything so.
        sums += grad
        products += grad * x_hat

    index = (sample.to(tl.int64) * chunks + chunk) * channels + channel
    blocks = tl.cdiv(channels, CHANNELS)
    plane = (tl.num_programs(0) // blocks).to(tl.int64) * channels
    tl.store(partial_ptr + index, tl.sum(sums, axis=0), mask=exists)
    tl.store(partial_ptr + plane + index, tl.sum(products, axis=0), mask=exists)


@triton.jit(do_not_specialize=("groups", "pixels", "group_channels", "chunks"))
def group_norm_silu_reduce_kernel(  # type: ignore[no-untyped-def]
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
def group_norm_silu_dx_kernel(  # type: ignore[no-untyped-def]
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
        sample, number * PIXELS, first, pixels, channels, channels, LAST, PIXELS, CHANNELS
    )
    channel, exists, group, row = _channels_of_tile(
        sample, first, channels, group_channels, CHANNELS
    )
    mean = tl.load(mean_ptr + group, mask=exists, other=0.0)
    rstd = tl.load(rstd_ptr + group, mask=exists, other=0.0)
    along_one = tl.load(means_ptr + group, mask=exists, other=0.0)
    means_ptr += batch * (channels // group_channels)
    along_x = tl.load(means_ptr + group, mask=exists, other=0.0)
    slope, offset = _affine(weight_ptr, bias_ptr, scale_ptr, shift_ptr, row, channel, exists)

    x_hat, grad = _normalized_and_gradient(
        x_ptr + start + offsets, grad_ptr + start + offsets, inside, mean, rstd, slope, offset, SILU
    )
    dx = (grad * slope[None, :] - along_one[None, :] - x_hat * along_x[None, :]) * rstd[None, :]
    tl.store(dx_ptr + start + offsets, dx.to(dx_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _store_to(ptr, value, index, inside):  # type: ignore[no-untyped-def]
    """Stores where there is something to store to."""
    if ptr is not None:
        tl.store(ptr + index, value.to(ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=("batch", "channels"))
def group_norm_silu_parameters_kernel(  # type: ignore[no-untyped-def]
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
