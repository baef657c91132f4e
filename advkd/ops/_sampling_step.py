"""One DDIM or DDPM update, with clamping and noise, in one pass over memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from advkd.ops import reference
from advkd.ops._address import address, addresses
from advkd.ops._backend import fused_extension, transformed, use_fused
from advkd.ops._noise import check_stream, signed, unsigned
from advkd.ops._registry import Kernel, register


def sampling_step(
    x_t: Tensor,
    model_out: Tensor,
    coefficients: Sequence[float],
    *,
    clip: float,
    seed: int,
    image_index: Tensor,
    step: int,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """One step of DDIM (Song et al. 2021, eq. 12) or DDPM (Ho et al. 2020, algorithm 2).

    x0_hat = clip(a_x x_t + a_m m);  x_prev = c_0 x0_hat + c_x x_t + c_m m + sigma z, where m is
    the model's output and z the normals of (seed, image, step), sampled only where sigma is not 0.

    Args:
        x_t, model_out: (B, C, H, W) of one floating dtype; the fused op takes float32 on the CPU.
        coefficients: (a_x, a_m, c_0, c_x, c_m, sigma), a row of `advkd.diffusion.StepTable`.
        clip: x0_hat is clamped to [-clip, clip]; 0 means no clamping.
        seed, image_index, step: the noise, as for `philox_normal`; image_index is (B,).

    Returns:
        (x_prev, x0_hat), in x_t's shape, dtype and memory format.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or numbers that do not fit the above.
    """
    check_stream(seed, image_index, step)
    _check_sampling_step(x_t, model_out, coefficients, clip, image_index)
    fused = use_fused("sampling_step", backend, _SAMPLING_STEP.unavailable(x_t))
    numbers = [float(coefficient) for coefficient in coefficients]
    x_prev, x0_hat = _SAMPLING_STEP(
        x_t, model_out, numbers, float(clip), signed(seed), image_index, step, fused
    )
    return x_prev, x0_hat


def _check_sampling_step(
    x_t: Tensor, model_out: Tensor, coefficients: Sequence[float], clip: float, image_index: Tensor
) -> None:
    if x_t.dim() != 4 or x_t.shape != model_out.shape:
        raise ValueError(
            f"x_t {tuple(x_t.shape)} and model_out {tuple(model_out.shape)} must both be "
            "(B, C, H, W)."
        )
    if not x_t.is_floating_point() or x_t.dtype != model_out.dtype:
        raise TypeError(
            f"x_t is {x_t.dtype} and model_out {model_out.dtype}, but both must be of one "
            "floating dtype."
        )
    if not x_t.device == model_out.device == image_index.device:
        raise ValueError(
            f"x_t, model_out and image_index are on {x_t.device}, {model_out.device} and "
            f"{image_index.device}, but must be on one device."
        )
    if image_index.shape[0] != x_t.shape[0]:
        raise ValueError(
            f"image_index has {image_index.shape[0]} entries for a batch of {x_t.shape[0]}."
        )
    if len(coefficients) != 6:
        raise ValueError(f"coefficients has {len(coefficients)} entries, but it must have 6.")
    if not clip >= 0:
        raise ValueError(f"clip={clip} is negative or not a number.")


def _dense(x_t: Tensor, model_out: Tensor) -> tuple[Tensor, Tensor]:
    """Both without gaps, in x_t's memory format."""
    memory_format = reference.memory_format_of(x_t)
    return (
        x_t.contiguous(memory_format=memory_format),
        model_out.contiguous(memory_format=memory_format),
    )


def _sampling_step_reference(
    x_t: Tensor,
    model_out: Tensor,
    coefficients: Sequence[float],
    clip: float,
    seed: int,
    image_index: Tensor,
    step: int,
) -> tuple[Tensor, Tensor]:
    noise = None
    if coefficients[5] != 0:
        noise = reference.philox_normal(seed, image_index, step, *x_t.shape[1:])
    if not transformed():
        x_t, model_out = _dense(x_t, model_out)
    return reference.sampling_step(x_t, model_out, coefficients, clip, noise)


def _sampling_step_fake(
    x_t: Tensor,
    model_out: Tensor,
    coefficients: Sequence[float],
    clip: float,
    seed: int,
    image_index: Tensor,
    step: int,
) -> tuple[Tensor, Tensor]:
    x_t = x_t.contiguous(memory_format=reference.memory_format_of(x_t))
    return torch.empty_like(x_t), torch.empty_like(x_t)


def _sampling_step_cpu(
    x_t: Tensor,
    model_out: Tensor,
    coefficients: Sequence[float],
    clip: float,
    seed: int,
    image_index: Tensor,
    step: int,
) -> tuple[Tensor, Tensor]:
    x_t, model_out = _dense(x_t, model_out)
    channels_last = reference.memory_format_of(x_t) == torch.channels_last
    image_index = image_index.contiguous()
    x_prev, x0_hat = torch.empty_like(x_t), torch.empty_like(x_t)
    batch, channels, height, width = x_t.shape
    fused_extension().sampling_step(
        *addresses(torch.float32, x_t, model_out, x_prev, x0_hat),
        batch, channels, height * width, channels_last, *coefficients, clip,
        unsigned(seed), address(image_index, torch.int64), step, torch.get_num_threads(),
    )  # fmt: skip
    return x_prev, x0_hat


_SAMPLING_STEP = register(
    "sampling_step(Tensor x_t, Tensor model_out, float[] coefficients, float clip, int seed, "
    "Tensor image_index, int step, bool fused) -> (Tensor, Tensor)",
    _sampling_step_reference,
    cpu=Kernel(_sampling_step_cpu, (torch.float32,)),
    fake=_sampling_step_fake,
)
