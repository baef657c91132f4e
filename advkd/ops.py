"""The fused ops, each beside its plain twin in torch, and the choice between the two.

Every op takes `backend`: "reference" (plain torch), "fused" (C++ on the CPU, Triton on CUDA; a
ValueError where that does not exist) or None, which follows the environment variable ADVKD_OPS
and otherwise uses the fused op wherever it exists. `use_backend` changes that for a while.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from advkd import reference
from advkd.kernels import unavailable_reason as triton_missing


def _load_extension() -> tuple[ModuleType | None, str | None]:
    """The C++ extension, or why there is none."""
    try:
        return import_module("advkd._C"), None
    except ImportError as error:
        return None, f"the C++ extension is not installed ({error})"


extension, extension_missing = _load_extension()

X_T_STEP = 0xFFFFFFFF  # the Philox step whose normals are x_T
LABEL_STEP = 0xFFFFFFFE  # the Philox step whose first number picks the class label

BACKENDS = ("reference", "fused")
_TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _checked_backend(name: str | None, source: str) -> str | None:
    if name is not None and name not in BACKENDS:
        raise ValueError(f"{source} is '{name}', but it must be 'reference' or 'fused'.")
    return name


_default_backend = _checked_backend(os.environ.get("ADVKD_OPS") or None, "ADVKD_OPS")


@contextmanager
def use_backend(backend: str | None) -> Iterator[None]:
    """Within the block, ops called without `backend` use this one (None: fused where it exists)."""
    global _default_backend
    before = _default_backend
    _default_backend = _checked_backend(backend, "backend")
    try:
        yield
    finally:
        _default_backend = before


def _use_fused(op: str, backend: str | None, unavailable: str | None) -> bool:
    """Whether to run the fused op, given why it cannot run on these tensors (None: it can)."""
    chosen = _checked_backend(backend, "backend") or _default_backend
    if chosen == "reference":
        return False
    if unavailable is None:
        return True
    # Nobody shall time the twin unknowingly: an explicit wish that cannot be met is an error.
    if backend == "fused":
        raise ValueError(f"{op} has no fused backend here: {unavailable}.")
    if chosen == "fused" and extension_missing is not None:
        raise ValueError(f"ADVKD_OPS=fused cannot be met: {extension_missing}.")
    return False


def _cpu_unavailable(*tensors: Tensor) -> str | None:
    """Why the C++ ops cannot take these tensors."""
    if extension_missing is not None:
        return extension_missing
    for tensor in tensors:
        if not tensor.is_cpu:
            return f"no kernel serves tensors on {tensor.device.type}"
        if tensor.dtype is not torch.float32 and tensor.is_floating_point():
            return f"the C++ kernel takes float32, not {tensor.dtype}"
    return None


def _group_norm_unavailable(x: Tensor, weight: Tensor, bias: Tensor) -> str | None:
    """Why no fused GroupNorm-SiLU can take these tensors."""
    if not x.is_cuda:
        return _cpu_unavailable(x, weight, bias)
    if x.dtype not in _TRITON_DTYPES:
        return f"the Triton kernel takes float32, float16 and bfloat16, not {x.dtype}"
    return triton_missing()


def _fused_extension() -> ModuleType:
    if extension is None:
        raise ValueError(f"the op was asked for as fused, but {extension_missing}.")
    return extension


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
        image_index: (B,) int64; its 64 bits count, so that a negative one is as good as any.
        step: in [0, 2^32).
        count: numbers per image, in [0, 2^34].
        first_block: the block of four that they begin with, in [0, 2^32).

    Returns:
        (B, count) int64, each in [0, 2^32), on image_index's device.

    Raises:
        ValueError, TypeError: a seed, index, step or count outside the above.
    """
    _check_stream(seed, image_index, step)
    if not 0 <= count <= 1 << 34:
        raise ValueError(f"count={count} is not in [0, 2^34].")
    if not 0 <= first_block <= 0xFFFFFFFF:
        raise ValueError(f"first_block={first_block} is not in [0, 2^32).")
    fused = _use_fused("philox_uint32", backend, _cpu_unavailable(image_index))
    return torch.ops.advkd.philox_uint32(
        _signed(seed), image_index, step, count, first_block, fused
    )


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
    _check_stream(seed, image_index, step)
    if len(shape) != 3 or any(size < 1 for size in shape):
        raise ValueError(f"shape={tuple(shape)} is not (C, H, W) with positive sizes.")
    if memory_format not in (torch.contiguous_format, torch.channels_last):
        raise ValueError(f"memory_format={memory_format} is neither contiguous nor channels_last.")
    fused = _use_fused("philox_normal", backend, _cpu_unavailable(image_index))
    channels, height, width = shape
    channels_last = memory_format == torch.channels_last
    return torch.ops.advkd.philox_normal(
        _signed(seed), image_index, step, channels, height, width, channels_last, fused
    )


def philox_labels(
    seed: int, image_index: Tensor, num_classes: int, *, backend: str | None = None
) -> Tensor:
    """A class label for each image, uniform in [0, num_classes), (B,) int64.

    Raises:
        ValueError, TypeError: a bad seed or index, or num_classes outside [1, 2^31).
    """
    if not 1 <= num_classes < 1 << 31:
        raise ValueError(f"num_classes={num_classes} is not in [1, 2^31).")
    first = philox_uint32(seed, image_index, LABEL_STEP, 1, backend=backend)
    return (first[:, 0] * num_classes) >> 32


def _check_stream(seed: int, image_index: Tensor, step: int) -> None:
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"seed={seed} is not in [0, 2^64).")
    if image_index.dtype != torch.int64:
        raise TypeError(f"image_index is {image_index.dtype}, but it must be torch.int64.")
    if image_index.dim() != 1:
        raise ValueError(f"image_index has {image_index.dim()} dimensions, but it must be (B,).")
    if not 0 <= step <= X_T_STEP:
        raise ValueError(f"step={step} is not in [0, 2^32).")


def _signed(seed: int) -> int:
    """The 64-bit seed as the signed integer that an op's schema can carry."""
    return seed - (1 << 64) if seed >= 1 << 63 else seed


def _unsigned(seed: int) -> int:
    return seed & 0xFFFFFFFFFFFFFFFF


def _philox_uint32_op(
    seed: int, image_index: Tensor, step: int, count: int, first_block: int, fused: bool
) -> Tensor:
    if not fused:
        words = reference.philox_words(seed, image_index, step, (count + 3) // 4, first_block)
        return torch.stack(words, dim=-1).flatten(1)[:, :count].contiguous()
    image_index = image_index.contiguous()
    out = torch.empty(len(image_index), count, dtype=torch.int64)
    _fused_extension().philox_uint32(
        _unsigned(seed), image_index.data_ptr(), step, len(image_index), count,
        first_block, out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out


def _philox_normal_op(
    seed: int,
    image_index: Tensor,
    step: int,
    channels: int,
    height: int,
    width: int,
    channels_last: bool,
    fused: bool,
) -> Tensor:
    out = _philox_normal_fake(
        seed, image_index, step, channels, height, width, channels_last, fused
    )
    if not fused:
        return out.copy_(reference.philox_normal(seed, image_index, step, channels, height, width))
    image_index = image_index.contiguous()
    _fused_extension().philox_normal(
        _unsigned(seed), image_index.data_ptr(), step, len(image_index), channels,
        height * width, channels_last, out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out


def _philox_normal_fake(
    seed: int,
    image_index: Tensor,
    step: int,
    channels: int,
    height: int,
    width: int,
    channels_last: bool,
    fused: bool,
) -> Tensor:
    return torch.empty(
        (image_index.shape[0], channels, height, width),
        dtype=torch.float32,
        device=image_index.device,
        memory_format=torch.channels_last if channels_last else torch.contiguous_format,
    )


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
    the model's output and z the normals of (seed, image, step), drawn only where sigma is not 0.

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
    _check_stream(seed, image_index, step)
    _check_sampling_step(x_t, model_out, coefficients, clip, image_index)
    fused = _use_fused("sampling_step", backend, _cpu_unavailable(x_t, model_out, image_index))
    numbers = [float(coefficient) for coefficient in coefficients]
    return torch.ops.advkd.sampling_step(
        x_t, model_out, numbers, float(clip), _signed(seed), image_index, step, fused
    )


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


def _sampling_step_op(
    x_t: Tensor,
    model_out: Tensor,
    coefficients: Sequence[float],
    clip: float,
    seed: int,
    image_index: Tensor,
    step: int,
    fused: bool,
) -> tuple[Tensor, Tensor]:
    memory_format = reference.memory_format_of(x_t)
    x_t = x_t.contiguous(memory_format=memory_format)
    model_out = model_out.contiguous(memory_format=memory_format)
    batch, channels, height, width = x_t.shape
    channels_last = memory_format == torch.channels_last
    if not fused:
        noise = None
        if coefficients[5] != 0:
            noise = _philox_normal_op(
                seed, image_index, step, channels, height, width, channels_last, False
            )
        return reference.sampling_step(x_t, model_out, coefficients, clip, noise)
    x_prev, x0_hat = torch.empty_like(x_t), torch.empty_like(x_t)
    image_index = image_index.contiguous()
    _fused_extension().sampling_step(
        x_t.data_ptr(), model_out.data_ptr(), x_prev.data_ptr(), x0_hat.data_ptr(),
        batch, channels, height * width, channels_last, *coefficients, clip,
        _unsigned(seed), image_index.data_ptr(), step, torch.get_num_threads(),
    )  # fmt: skip
    return x_prev, x0_hat


def _sampling_step_fake(
    x_t: Tensor,
    model_out: Tensor,
    coefficients: Sequence[float],
    clip: float,
    seed: int,
    image_index: Tensor,
    step: int,
    fused: bool,
) -> tuple[Tensor, Tensor]:
    x_t = x_t.contiguous(memory_format=reference.memory_format_of(x_t))
    return torch.empty_like(x_t), torch.empty_like(x_t)


def group_norm_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float,
    activation: str = "silu",
    *,
    backend: str | None = None,
) -> Tensor:
    """GroupNorm (Wu and He 2018), then SiLU or nothing.

    Where a gradient is needed this is F.silu(F.group_norm(...)) itself, unless backend="fused"
    asks for the fused forward (its gradient is then that of the formula, in plain torch).

    Args:
        x: (B, C, ...) floating; the fused ops take float32 (CPU), also float16/bfloat16 (CUDA).
        weight, bias: (C,).
        num_groups: divides C.
        eps: added to the variance.
        activation: "silu" or "none".

    Returns:
        A tensor of x's shape, dtype and memory format.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or names that do not fit the above.
    """
    _check_group_norm(x, weight, bias, num_groups, eps, activation)
    silu = activation == "silu"
    needs_grad = torch.is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or bias.requires_grad
    )
    if (needs_grad and backend is None) or not _use_fused(
        "group_norm_silu", backend, _group_norm_unavailable(x, weight, bias)
    ):
        return reference.group_norm_silu(x, weight, bias, num_groups, eps, silu)
    return torch.ops.advkd.group_norm_silu(x, weight, bias, num_groups, eps, silu)


def _check_group_norm(
    x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float, activation: str
) -> None:
    if activation not in ("silu", "none"):
        raise ValueError(f"activation='{activation}' is neither 'silu' nor 'none'.")
    if x.dim() < 2:
        raise ValueError(f"x has the shape {tuple(x.shape)}, but it must be (B, C, ...).")
    if not x.is_floating_point():
        raise TypeError(f"x is {x.dtype}, but it must be floating.")
    channels = x.shape[1]
    if num_groups < 1 or channels % num_groups != 0:
        raise ValueError(f"num_groups={num_groups} does not divide channels={channels}.")
    if weight.shape != (channels,) or bias.shape != (channels,):
        raise ValueError(
            f"weight {tuple(weight.shape)} and bias {tuple(bias.shape)} must both be ({channels},)."
        )
    if not x.device == weight.device == bias.device:
        raise ValueError(
            f"x, weight and bias are on {x.device}, {weight.device} and {bias.device}, but must "
            "be on one device."
        )
    if not eps >= 0:
        raise ValueError(f"eps={eps} is negative or not a number.")


def _group_norm_silu_op(
    x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float, silu: bool
) -> Tensor:
    memory_format = reference.memory_format_of(x)
    x = x.contiguous(memory_format=memory_format)
    if _group_norm_unavailable(x, weight, bias) is not None:
        # An exported program that was traced with the fused op runs here too.
        return reference.group_norm_silu(x, weight, bias, num_groups, eps, silu)
    weight, bias = weight.contiguous(), bias.contiguous()
    if x.is_cuda:
        # Here and not above, because importing Triton takes long and only CUDA needs it.
        from advkd.kernels.group_norm_silu import group_norm_silu as triton_group_norm_silu

        return triton_group_norm_silu(x, weight, bias, num_groups, eps, silu)
    y = torch.empty_like(x)
    batch, channels, *sizes = x.shape
    pixels = math.prod(sizes)
    _fused_extension().group_norm_silu(
        x.data_ptr(), weight.data_ptr(), bias.data_ptr(), y.data_ptr(), batch, channels, pixels,
        memory_format == torch.channels_last, num_groups, eps, silu, torch.get_num_threads(),
    )  # fmt: skip
    return y


def _group_norm_silu_fake(
    x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float, silu: bool
) -> Tensor:
    return torch.empty_like(x.contiguous(memory_format=reference.memory_format_of(x)))


def _group_norm_silu_setup(
    ctx: torch.autograd.function.FunctionCtx,
    inputs: tuple[Tensor, Tensor, Tensor, int, float, bool],
    output: Tensor,
) -> None:
    x, weight, bias, num_groups, eps, silu = inputs
    ctx.save_for_backward(x, weight, bias)
    ctx.options = (num_groups, eps, silu)  # type: ignore[attr-defined]


def _group_norm_silu_backward(
    ctx: torch.autograd.function.FunctionCtx, grad_y: Tensor
) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
    x, weight, bias = ctx.saved_tensors  # type: ignore[attr-defined]
    grads = reference.group_norm_silu_backward(
        grad_y,
        x,
        weight,
        bias,
        *ctx.options,  # type: ignore[attr-defined]
    )
    return *grads, None, None, None


_SCHEMAS = {
    "philox_uint32": "(int seed, Tensor image_index, int step, SymInt count, int first_block, "
    "bool fused) -> Tensor",
    "philox_normal": "(int seed, Tensor image_index, int step, SymInt channels, SymInt height, "
    "SymInt width, bool channels_last, bool fused) -> Tensor",
    "sampling_step": "(Tensor x_t, Tensor model_out, float[] coefficients, float clip, int seed, "
    "Tensor image_index, int step, bool fused) -> (Tensor, Tensor)",
    "group_norm_silu": "(Tensor x, Tensor weight, Tensor bias, int num_groups, float eps, "
    "bool silu) -> Tensor",
}
for _name, _schema in _SCHEMAS.items():
    torch.library.define(f"advkd::{_name}", _schema, tags=torch.Tag.pt2_compliant_tag)
torch.library.impl("advkd::philox_uint32", "default", _philox_uint32_op)
torch.library.impl("advkd::philox_normal", "default", _philox_normal_op)
torch.library.impl("advkd::sampling_step", "default", _sampling_step_op)
torch.library.impl("advkd::group_norm_silu", "default", _group_norm_silu_op)
torch.library.register_fake(
    "advkd::philox_uint32",
    lambda seed, image_index, step, count, first_block, fused: image_index.new_empty(
        (image_index.shape[0], count)
    ),
)
torch.library.register_fake("advkd::philox_normal", _philox_normal_fake)
torch.library.register_fake("advkd::sampling_step", _sampling_step_fake)
torch.library.register_fake("advkd::group_norm_silu", _group_norm_silu_fake)
torch.library.register_autograd(
    "advkd::group_norm_silu", _group_norm_silu_backward, setup_context=_group_norm_silu_setup
)


def describe() -> list[tuple[str, str, str]]:
    """Which backend serves each op by default: (op, backend, why not another; may be empty)."""
    asked = "ADVKD_OPS=reference is set" if _default_backend == "reference" else None
    reason = asked or extension_missing
    serving = f"fused, C++ ({extension.isa()})" if extension and not reason else "reference, torch"
    rows = [
        (op, serving, reason or "")
        for op in ("philox_uint32", "philox_normal", "sampling_step", "group_norm_silu")
    ]
    no_gpu = None if torch.cuda.is_available() else "torch sees no CUDA device"
    triton_reason = asked or triton_missing()
    rows.append(
        (
            "group_norm_silu on CUDA",
            "reference, torch" if triton_reason else "fused, Triton",
            "; ".join(filter(None, (triton_reason, no_gpu))),
        )
    )
    rows.append(("other ops on CUDA", "reference, torch", "no fused kernel exists for them yet"))
    return rows
