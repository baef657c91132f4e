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
from typing import Any, NamedTuple

import torch
import triton
from advkd.kernels.compilation import Build
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
    """x without gaps, with neighboring pixels or neighboring channels; whether the latter."""
    last = not x.is_contiguous() and x.movedim(1, -1).is_contiguous()
    return _aligned(x if last else x.contiguous()), last


def _like(x: Tensor, other: Tensor) -> Tensor:
    """x, laid out as `other`."""
    return _aligned(x if x.stride() == other.stride() else torch.empty_like(other).copy_(x))


def _readable(affine: Affine) -> list[Tensor | None]:
    return [None if x is None else _aligned(x.contiguous()) for x in affine]


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
    x: Tensor, affine: Affine, num_groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """act(GroupNorm(x) (1 + scale) + shift), with statistics and arithmetic in float32.

    It reads nothing back from the device and allocates by torch alone, so a CUDA graph can capture
    it.

    Args:
        x: (B, C, ...) float32, float16 or bfloat16; copied if neither contiguous nor channels_last.
        affine: weight, bias, scale and shift.
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
    affine = _readable(affine)
    if pick("forward", problem, _capability(x.device)) is None:
        _forward_in_two_passes(x, affine, y, mean, rstd, problem, eps, silu)
        return y, mean, rstd
    tiles = group_tiles(problem, _FORWARD)
    arguments = [x, *affine, y, mean, rstd, *_group_numbers(problem, tiles), float(eps)]
    _launch(tiles.variant, problem.batch * tiles.blocks, arguments, tiles.vec, silu)
    return y, mean, rstd


def _forward_in_two_passes(
    x: Tensor, affine: Affine, y: Tensor, mean: Tensor, rstd: Tensor, problem: Problem, eps: float,
    silu: bool,
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
    arguments = [x, *affine, origin, rest, rstd, y, *_channel_numbers(problem)]
    grid = _channel_grid(problem, variant, triton.cdiv(problem.pixels, variant.pixels))
    _launch(variant, grid, arguments, _channel_vec(problem), silu)


def _channel_grid(problem: Problem, variant: Variant, pixel_programs: int) -> int:
    return problem.batch * triton.cdiv(problem.channels, variant.channels) * pixel_programs


def _sums_and_means(read: list[Any], problem: Problem, silu: bool) -> tuple[Tensor, Tensor]:
    """What the kernel "reduce" makes, given what "sums" reads."""
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
    problem = _problem(x, last, num_groups)
    grad_y = _like(grad_y, x)
    dx = torch.empty_like(x)
    affine = _readable(affine)
    gradients = [None if p is None else torch.empty_like(p) for p in affine]
    if x.numel() == 0:
        return dx, [None if gradient is None else gradient.zero_() for gradient in gradients]
    read = [grad_y, x, *affine, *(_aligned(t.contiguous()) for t in statistics)]
    sums, means = _sums_and_means(read, problem, silu)

    variant = pick("dx", problem, _capability(x.device))
    assert variant is not None
    grid = _channel_grid(problem, variant, triton.cdiv(problem.pixels, variant.pixels))
    arguments = [*read, means, dx, *_channel_numbers(problem), problem.batch]
    _launch(variant, grid, arguments, _channel_vec(problem), silu)

    if any(gradient is not None for gradient in gradients):
        weight, bias, scale, _ = affine
        arguments = [sums, weight, bias, scale, *gradients, problem.batch, problem.channels]
        _launch(_FIXED["parameters"], triton.cdiv(problem.channels, COLUMNS.value), arguments)
    return dx, gradients


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
