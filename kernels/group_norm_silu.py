"""GroupNorm (Wu and He 2018), FiLM (Perez et al. 2018) and SiLU in Triton, forward and backward.

    y = act((x_hat w + b) (1 + scale) + shift) = act(x_hat slope + offset)

Forward: a group that fits the registers of one program is read once; a larger one is cut into
chunks, whose moments are merged as by Chan, Golub and LeVeque (1983), and read again. Backward:
the sums over each channel, then dx in one further pass, then the parameters over the batch. There
are no atomics, so two runs agree bit for bit. Statistics and arithmetic are float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
from advkd.kernels.compilation import POINTERS, Build, capability_of
from advkd.kernels.group_norm_silu_device import (
    COLUMNS,
    GROUPS_IN_TILE,
    group_norm_silu_apply_kernel,
    group_norm_silu_dx_kernel,
    group_norm_silu_forward_kernel,
    group_norm_silu_merge_kernel,
    group_norm_silu_moments_kernel,
    group_norm_silu_parameters_kernel,
    group_norm_silu_reduce_kernel,
    group_norm_silu_sums_kernel,
)
from torch import Tensor

# weight, bias: (C,), or None for 1 and 0; scale, shift: (B, C), or None for 0; any floating dtype.
Affine = Sequence[Tensor | None]

KERNELS = {
    "forward": group_norm_silu_forward_kernel,
    "moments": group_norm_silu_moments_kernel,
    "merge": group_norm_silu_merge_kernel,
    "apply": group_norm_silu_apply_kernel,
    "sums": group_norm_silu_sums_kernel,
    "reduce": group_norm_silu_reduce_kernel,
    "dx": group_norm_silu_dx_kernel,
    "parameters": group_norm_silu_parameters_kernel,
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


# From the smallest tile to the largest, which keeps 64 elements in a thread's registers.
_FORWARD = (
    Variant("forward", False, 1024, 1, 2),
    Variant("forward", False, 4096, 1, 4),
    Variant("forward", False, 16384, 1, 16),
    Variant("forward", True, 16, 16, 1),
    Variant("forward", True, 64, 16, 1),
    Variant("forward", True, 256, 16, 4),
    Variant("forward", True, 1024, 16, 8),
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
    row: int  # if channels_last, elements from a pixel of x to the next; else 0

    @property
    def group_channels(self) -> int:
        return self.channels // self.groups

    def vec(self, length: int) -> int:
        """Elements of the widest access, up to 16 bytes, that rows of this length allow."""
        return math.gcd(length, self.row, 16 // self.itemsize)


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
    Rows of 8 bytes in the narrowest tile are faster than a wider one.
    """
    size = problem.group_channels
    counts = [n for n in range(1, GROUPS_IN_TILE + 1) if problem.groups % n == 0]
    for wanted in (8 // problem.itemsize, 1):
        for width in columns:
            fitting = [n for n in counts if n * size <= width and problem.vec(n * size) >= wanted]
            if fitting:
                return max(fitting, key=lambda n: (problem.vec(n * size), n)), width
    return 1, columns[-1]


@lru_cache(maxsize=4096)
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


class Launch(NamedTuple):
    """All of a launch but its pointers, and the numbers that are no part of the problem."""

    variant: Variant
    grid: tuple[int]
    numbers: tuple[int, ...]
    options: dict[str, int | bool]  # compile-time arguments, and the compiler's


def _launch_of(
    variant: Variant, grid: int, numbers: Sequence[int], vec: int = 1, silu: bool = False
) -> Launch:
    options = variant.constants(vec, silu) | variant.options()
    return Launch(variant, (grid,), tuple(numbers), options)


def _group_numbers(problem: Problem, tiles: GroupTiles) -> list[int]:
    """blocks, width, pixels, group_channels and x_row as the kernels by group take them."""
    sizes = [tiles.blocks, tiles.width // tiles.vec, problem.pixels, problem.group_channels]
    return [*sizes, problem.row // tiles.vec]


def _channel_vec(problem: Problem) -> int:
    return problem.vec(problem.channels if problem.last else problem.pixels)


def _channel_numbers(problem: Problem) -> list[int]:
    """channels, pixels and group_channels as the kernels by channel take them."""
    vec = _channel_vec(problem)
    channels = problem.channels // vec if problem.last else problem.channels
    pixels = problem.pixels if problem.last else problem.pixels // vec
    return [channels, pixels, problem.group_channels]


def _channel_grid(problem: Problem, variant: Variant, pixel_programs: int) -> int:
    return problem.batch * triton.cdiv(problem.channels, variant.channels) * pixel_programs


@lru_cache(maxsize=1024)
def forward_launches(
    problem: Problem, silu: bool, capability: tuple[int, int]
) -> tuple[Launch, ...]:
    """The forward: one launch, or those of moments, merge and apply. Kept for each problem, since
    to work it out takes longer than a small map does."""
    if pick("forward", problem, capability) is not None:
        tiles = group_tiles(problem, _FORWARD)
        grid, numbers = problem.batch * tiles.blocks, _group_numbers(problem, tiles)
        return (_launch_of(tiles.variant, grid, numbers, tiles.vec, silu),)
    tiles = group_tiles(problem, _MOMENTS)
    count = tiles.chunks * tiles.parts
    grid, numbers = problem.batch * tiles.blocks * count, _group_numbers(problem, tiles)
    moments = _launch_of(tiles.variant, grid, [*numbers, tiles.chunks], tiles.vec)
    merge = _launch_of(_FIXED["merge"], problem.batch * problem.groups, [count])
    variant, vec = pick("apply", problem, capability), _channel_vec(problem)
    assert variant is not None
    grid = _channel_grid(problem, variant, triton.cdiv(problem.pixels, variant.pixels))
    numbers = [*_channel_numbers(problem), problem.row // vec]
    return moments, merge, _launch_of(variant, grid, numbers, vec, silu)


@lru_cache(maxsize=1024)
def backward_launches(
    problem: Problem, silu: bool, capability: tuple[int, int]
) -> tuple[Launch, ...]:
    """The backward: sums, reduce, dx and parameters."""
    numbers, vec = _channel_numbers(problem), _channel_vec(problem)
    variant = pick("sums", problem, capability)
    assert variant is not None
    chunks, chunk_tiles = sum_chunks(problem, variant)
    grid = _channel_grid(problem, variant, chunks)
    sums = _launch_of(variant, grid, [*numbers, chunks, chunk_tiles], vec, silu)
    grid = problem.batch * problem.groups
    sizes = [problem.groups, problem.pixels, problem.group_channels, chunks]
    reduce = _launch_of(_FIXED["reduce"], grid, sizes)
    variant = pick("dx", problem, capability)
    assert variant is not None
    grid = _channel_grid(problem, variant, triton.cdiv(problem.pixels, variant.pixels))
    dx = _launch_of(variant, grid, [*numbers, problem.batch], vec, silu)
    grid, sizes = triton.cdiv(problem.channels, COLUMNS.value), [problem.batch, problem.channels]
    return sums, reduce, dx, _launch_of(_FIXED["parameters"], grid, sizes)


def sum_chunks(problem: Problem, variant: Variant) -> tuple[int, int]:
    """Chunks that the backward sums cut each channel into, and the tiles of one."""
    tiles = triton.cdiv(problem.pixels, variant.pixels)
    programs = problem.batch * triton.cdiv(problem.channels, variant.channels)
    chunk_tiles = triton.cdiv(tiles, max(1, _ENOUGH_PROGRAMS // programs))
    return triton.cdiv(tiles, chunk_tiles), chunk_tiles


def _launch(launch: Launch, tensors: Sequence[Tensor | None], *more: float) -> None:
    """Run a kernel on its pointers, the launch's numbers, and those that are no part of it."""
    with torch.cuda.device_of(tensors[0]):
        kernel = KERNELS[launch.variant.kernel]
        kernel[launch.grid](*tensors, *launch.numbers, *more, **launch.options)


def _aligned(x: Tensor) -> Tensor:
    """x, or a copy of it that begins at 16 bytes."""
    return x if x.data_ptr() % 16 == 0 else x.clone()


def _dense(x: Tensor) -> tuple[Tensor, bool]:
    """x without gaps, with neighboring pixels or neighboring channels; whether the latter."""
    last = not x.is_contiguous() and x.movedim(1, -1).is_contiguous()
    return _aligned(x if last else x.contiguous()), last


def _with_rows(x: Tensor) -> tuple[Tensor, int]:
    """x as the forward reads it, and how far its pixels are apart if its channels are neighbors:
    it may be some channels of a wider channels_last tensor. Else a dense x, and 0."""
    row = x.stride(-1)
    if x.dim() > 2 and row > x.shape[1] > 1 and x.data_ptr() % 16 == 0:
        wide = [1] * x.dim()
        for axis in (*range(x.dim() - 1, 1, -1), 0):
            wide[axis] = row
            row *= x.shape[axis]
        if x.stride() == tuple(wide):
            return x, x.stride(-1)
    if x.dim() > 2 and x.stride(1) == 1 and not x.is_contiguous():
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    x, last = _dense(x)
    return x, x.shape[1] if last else 0


def _like(x: Tensor, other: Tensor) -> Tensor:
    """x, laid out as `other`."""
    return _aligned(x if x.stride() == other.stride() else torch.empty_like(other).copy_(x))


def _readable(affine: Affine) -> list[Tensor | None]:
    return [None if x is None else _aligned(x.contiguous()) for x in affine]


def _empty(x: Tensor, *shape: int) -> Tensor:
    """An unwritten float32 tensor on x's device. Each is its own, so that it begins at 16 bytes."""
    return torch.empty(shape, dtype=torch.float32, device=x.device)


def _problem(x: Tensor, row: int, num_groups: int) -> Problem:
    batch, channels = x.shape[:2]
    pixels = math.prod(x.shape[2:])
    if channels // num_groups * pixels >= 1 << 29:
        raise ValueError(
            f"a group of {channels // num_groups} channels and {pixels} pixels is too large: the "
            "Triton kernels take fewer than 2^29 elements."
        )
    return Problem(batch, channels, pixels, num_groups, row > 0, x.element_size(), row)


def forward(
    x: Tensor, affine: Affine, num_groups: int, eps: float, silu: bool, added: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """act(GroupNorm(x + added) (1 + scale) + shift), with statistics and arithmetic in float32.

    It reads nothing back from the device and allocates by torch alone, so a CUDA graph can capture
    it.

    Args:
        x: (B, C, ...) float32, float16 or bfloat16; copied if neither contiguous, nor
            channels_last, nor some channels of a channels_last tensor.
        affine: weight, bias, scale and shift.
        num_groups: divides C.
        eps: added to the variance.
        silu: SiLU after all, or nothing.
        added: (C,) or (B, C) of any floating dtype with neighboring channels, such as the bias of
            the convolution before; or None for 0.

    Returns:
        y: of x's shape and dtype, contiguous or channels_last as x is.
        mean, rstd: (B, num_groups) float32, of x + added; rstd = 1 / sqrt(variance + eps).

    Raises:
        ValueError: a group of 2^29 elements or more.
    """
    x, row = _with_rows(x)
    if added is not None and not row:
        x, added = _sum(x, added), None
    problem = _problem(x, row, num_groups)
    y = torch.empty_like(x) if row in (0, x.shape[1]) else _empty_last(x)
    mean, rstd = (_empty(x, problem.batch, num_groups) for _ in range(2))
    if x.numel() == 0:
        return y, mean.fill_(math.nan), rstd.fill_(math.nan)
    affine = _readable(affine)
    added_row = added.stride(0) if added is not None and added.dim() == 2 else 0
    launches = forward_launches(problem, silu, capability_of(x.device))
    if len(launches) == 1:
        _launch(launches[0], [x, added, *affine, y, mean, rstd], added_row, float(eps))
        return y, mean, rstd
    moments, merge, apply = launches
    partial = _empty(x, 4, problem.batch * problem.groups, merge.numbers[0])
    _launch(moments, [x, added, partial], added_row)
    origin, rest = (_empty(x, *mean.shape) for _ in range(2))
    _launch(merge, [partial, origin, rest, mean, rstd], float(eps))
    _launch(apply, [x, added, *affine, origin, rest, rstd, y], added_row)
    return y, mean, rstd


def _sum(x: Tensor, added: Tensor) -> Tensor:
    """x + added of each channel, in x's dtype."""
    added = added.reshape(*added.shape[:-1], added.shape[-1], *[1] * (x.dim() - 2))
    return (x.float() + added.float()).to(x.dtype)


def _empty_last(x: Tensor) -> Tensor:
    """An unwritten tensor of x's shape and dtype, channels_last."""
    shape = (x.shape[0], *x.shape[2:], x.shape[1])
    return torch.empty(shape, dtype=x.dtype, device=x.device).movedim(-1, 1)


def _sums_and_means(read: list[Any], sums_of: Launch, reduce: Launch) -> tuple[Tensor, Tensor]:
    """What the kernel "reduce" makes, given what "sums" reads."""
    _, x, weight, _, scale, *_ = read
    batch, channels = x.shape[:2]
    groups, *_, chunks = reduce.numbers
    partial = _empty(x, 2, batch, chunks, channels)
    _launch(sums_of, [*read, partial])
    sums, means = _empty(x, 2, batch, channels), _empty(x, 2, batch, groups)
    _launch(reduce, [partial, weight, scale, sums, means])
    return sums, means


def backward(
    grad_y: Tensor, x: Tensor, affine: Affine, statistics: tuple[Tensor, Tensor],
    num_groups: int, silu: bool,
) -> tuple[Tensor, list[Tensor | None]]:  # fmt: skip
    """Gradients of `forward`'s y; the same bits in every run.

    Args:
        grad_y: of x's shape and dtype, any strides.
        statistics: mean and rstd, as `forward` returned them.
        The others: as for `forward`.

    Returns:
        dx: of x's shape, dtype and memory format.
        (dweight, dbias, dscale, dshift): each of the shape and dtype of what it belongs to; None
            for what is None.
    """
    x, last = _dense(x)
    problem = _problem(x, x.shape[1] if last else 0, num_groups)
    grad_y = _like(grad_y, x)
    dx = torch.empty_like(x)
    affine = _readable(affine)
    gradients = [None if p is None else torch.empty_like(p) for p in affine]
    if x.numel() == 0:
        return dx, [None if gradient is None else gradient.zero_() for gradient in gradients]
    read = [grad_y, x, *affine, *(_aligned(t.contiguous()) for t in statistics)]
    sums_of, reduce, of_x, of_parameters = backward_launches(problem, silu, capability_of(x.device))
    sums, means = _sums_and_means(read, sums_of, reduce)
    _launch(of_x, [*read, means, dx])
    if any(gradient is not None for gradient in gradients):
        weight, bias, scale, _ = affine
        _launch(of_parameters, [sums, weight, bias, scale, *gradients])
    return dx, gradients


_OF_X_DTYPE = ("x_ptr", "y_ptr", "grad_ptr", "dx_ptr")


def _build(variant: Variant, dtype: str, vec: int) -> Build:
    kernel = KERNELS[variant.kernel]
    constants = variant.constants(vec, True)
    types = {
        name: POINTERS[dtype if name in _OF_X_DTYPE else "float32"] if name.endswith("_ptr")
        else "fp32" if name == "eps" else "i32"
        for name in kernel.arg_names if name not in constants
    }  # fmt: skip
    row_bytes = vec * (4 if dtype == "float32" else 2)
    edges = f"{dtype}, {row_bytes} bytes" if constants else "float32"
    # AMD's 64 lanes leave a thread few elements of a small tile.
    of_thread = variant.pixels * variant.channels // (64 * variant.num_warps)
    tile_bytes = min(row_bytes, row_bytes // vec * of_thread)
    return Build(
        variant.name, edges, kernel, types, constants, variant.options(),
        read_bytes=row_bytes if constants else 4,
        # The others write only one number for each group or channel.
        write_bytes=tile_bytes if variant.kernel in ("forward", "apply", "dx") else 4,
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
