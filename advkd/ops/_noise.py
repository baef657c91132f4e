"""Philox4x32-10 and the normals made of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from advkd.ops import reference
from advkd.ops._address import address
from advkd.ops._backend import fused_extension, use_fused
from advkd.ops._registry import Kernel, register

X_T_STEP = 0xFFFFFFFF  # the Philox step whose normals are x_T
LABEL_STEP = 0xFFFFFFFE  # the Philox step whose first number picks the class label


def philox_uint32(
    seed: int,
    image_index: Tensor,
    step: int,
    count: int,
    *,
    first_block: int = 0,
    backend: str | None = None,
) -> Tensor:
    """`count` numbers of each image's stream of Philox4x32-10.

    Number e is word e % 4 of the block with counter (e / 4, step, image index low, high) and the
    64-bit seed as key (Salmon, Moraes, Dror, Shaw, SC 2011).

    Args:
        seed: in [0, 2^64).
        image_index: (B,) int64, negative ones included: all 64 bits count.
        step: in [0, 2^32).
        count: numbers per image, in [0, 2^34].
        first_block: the block of four that they begin with, in [0, 2^32).

    Returns:
        (B, count) int64, each in [0, 2^32), on image_index's device.

    Raises:
        ValueError, TypeError: a seed, index, step or count outside the above.
    """
    check_stream(seed, image_index, step)
    if not 0 <= count <= 1 << 34:
        raise ValueError(f"count={count} is not in [0, 2^34].")
    if not 0 <= first_block <= 0xFFFFFFFF:
        raise ValueError(f"first_block={first_block} is not in [0, 2^32).")
    fused = use_fused("philox_uint32", backend, _PHILOX_UINT32.unavailable(image_index))
    numbers: Tensor = _PHILOX_UINT32(signed(seed), image_index, step, count, first_block, fused)
    return numbers


def philox_normal(
    seed: int,
    image_index: Tensor,
    step: int,
    shape: Sequence[int],
    *,
    memory_format: torch.memory_format = torch.contiguous_format,
    backend: str | None = None,
) -> Tensor:
    """Standard normals of each image, the same bits on every backend and for every batch.

    Normals 4q..4q+3 of an image, in C, H, W order, are Box-Muller pairs of Philox block q of
    (seed, image, step); see `philox_uint32`. step = X_T_STEP gives x_T.

    Args:
        seed: in [0, 2^64).
        image_index: (B,) int64.
        step: in [0, 2^32).
        shape: (C, H, W).
        memory_format: how the result lies in memory; its values do not depend on it.

    Returns:
        (B, C, H, W) float32 on image_index's device; no magnitude exceeds 6.8.

    Raises:
        ValueError, TypeError: an argument outside the above.
    """
    check_stream(seed, image_index, step)
    if len(shape) != 3 or any(size < 1 for size in shape):
        raise ValueError(f"shape={tuple(shape)} is not (C, H, W) with positive sizes.")
    if memory_format not in (torch.contiguous_format, torch.channels_last):
        raise ValueError(f"memory_format={memory_format} is neither contiguous nor channels_last.")
    fused = use_fused("philox_normal", backend, _PHILOX_NORMAL.unavailable(image_index))
    channels, height, width = shape
    channels_last = memory_format == torch.channels_last
    normals: Tensor = _PHILOX_NORMAL(
        signed(seed), image_index, step, channels, height, width, channels_last, fused
    )
    return normals


def philox_labels(
    seed: int,
    image_index: Tensor,
    num_classes: int,
    *,
    step: int = LABEL_STEP,
    backend: str | None = None,
) -> Tensor:
    """A class label for each image, uniform in [0, num_classes), (B,) int64.

    Raises:
        ValueError, TypeError: a bad seed, index or step, or num_classes outside [1, 2^31).
    """
    if not 1 <= num_classes < 1 << 31:
        raise ValueError(f"num_classes={num_classes} is not in [1, 2^31).")
    first = philox_uint32(seed, image_index, step, 1, backend=backend)
    return (first[:, 0] * num_classes) >> 32


def check_stream(seed: int, image_index: Tensor, step: int) -> None:
    """Raise ValueError or TypeError unless these name streams of Philox."""
    check_seed(seed)
    if image_index.dtype != torch.int64:
        raise TypeError(f"image_index is {image_index.dtype}, but it must be torch.int64.")
    if image_index.dim() != 1:
        raise ValueError(f"image_index has {image_index.dim()} dimensions, but it must be (B,).")
    if not 0 <= step <= X_T_STEP:
        raise ValueError(f"step={step} is not in [0, 2^32).")


def check_seed(seed: int) -> None:
    """Raise ValueError unless the seed is in [0, 2^64)."""
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"seed={seed} is not in [0, 2^64).")


def signed(seed: int) -> int:
    """The 64-bit seed as the signed integer that an op's schema can carry."""
    return seed - (1 << 64) if seed >= 1 << 63 else seed


def unsigned(seed: int) -> int:
    """The seed that `signed` was given."""
    return seed & 0xFFFFFFFFFFFFFFFF


def _philox_uint32_reference(
    seed: int, image_index: Tensor, step: int, count: int, first_block: int
) -> Tensor:
    words = reference.philox_words(seed, image_index, step, (count + 3) // 4, first_block)
    return torch.stack(words, dim=-1).flatten(1)[:, :count].contiguous()


def _philox_uint32_fake(
    seed: int, image_index: Tensor, step: int, count: int, first_block: int
) -> Tensor:
    return image_index.new_empty((image_index.shape[0], count))


def _philox_uint32_cpu(
    seed: int, image_index: Tensor, step: int, count: int, first_block: int
) -> Tensor:
    image_index = image_index.contiguous()
    out = torch.empty((len(image_index), count), dtype=torch.int64, device=image_index.device)
    fused_extension().philox_uint32(
        unsigned(seed), address(image_index, torch.int64), step, len(image_index), count,
        first_block, address(out, torch.int64), torch.get_num_threads(),
    )  # fmt: skip
    return out


def _philox_normal_reference(
    seed: int,
    image_index: Tensor,
    step: int,
    channels: int,
    height: int,
    width: int,
    channels_last: bool,
) -> Tensor:
    """The reference's normals in the memory format of `philox_normal`."""
    out = _philox_normal_fake(seed, image_index, step, channels, height, width, channels_last)
    return out.copy_(reference.philox_normal(seed, image_index, step, channels, height, width))


def _philox_normal_fake(
    seed: int,
    image_index: Tensor,
    step: int,
    channels: int,
    height: int,
    width: int,
    channels_last: bool,
) -> Tensor:
    return torch.empty(
        (image_index.shape[0], channels, height, width),
        dtype=torch.float32,
        device=image_index.device,
        memory_format=torch.channels_last if channels_last else torch.contiguous_format,
    )


def _philox_normal_fused(
    seed: int,
    image_index: Tensor,
    step: int,
    channels: int,
    height: int,
    width: int,
    channels_last: bool,
) -> Tensor:
    """By C++ on the CPU, by CUDA C++ on a GPU."""
    out = _philox_normal_fake(seed, image_index, step, channels, height, width, channels_last)
    image_index, device = image_index.contiguous(), image_index.device
    numbers = address(image_index, torch.int64, device=device)
    normals = address(out, torch.float32, device=device)
    count, pixels = len(image_index), height * width
    if device.type == "cpu":
        fused_extension().philox_normal(
            unsigned(seed), numbers, step, count, channels, pixels, channels_last, normals,
            torch.get_num_threads(),
        )  # fmt: skip
    else:
        fused_extension().cuda_philox_normal(
            seed=unsigned(seed), image_index=numbers, step=step, sizes=(count, channels, pixels),
            channels_last=channels_last, out=normals, device=device.index,
            stream=torch.cuda.current_stream(device).cuda_stream,
        )  # fmt: skip
    return out


_PHILOX_UINT32 = register(
    "philox_uint32(int seed, Tensor image_index, int step, SymInt count, int first_block, "
    "bool fused) -> Tensor",
    _philox_uint32_reference,
    cpu=Kernel(_philox_uint32_cpu, (torch.int64,)),
    fake=_philox_uint32_fake,
)
_PHILOX_NORMAL = register(
    "philox_normal(int seed, Tensor image_index, int step, SymInt channels, SymInt height, "
    "SymInt width, bool channels_last, bool fused) -> Tensor",
    _philox_normal_reference,
    cpu=Kernel(_philox_normal_fused, (torch.int64,)),
    cuda=Kernel(_philox_normal_fused, (torch.int64,), language="CUDA C++"),
    fake=_philox_normal_fake,
)
