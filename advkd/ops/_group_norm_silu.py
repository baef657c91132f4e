"""GroupNorm, then SiLU or nothing."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from advkd import reference
from advkd.kernels import unavailable_reason as triton_missing
from advkd.ops._backend import cpu_unavailable, define, fused_extension, use_fused

_TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _group_norm_unavailable(x: Tensor, weight: Tensor, bias: Tensor) -> str | None:
    """Why no fused GroupNorm-SiLU can take these tensors."""
    if not x.is_cuda:
        return cpu_unavailable(x, weight, bias)
    if x.dtype not in _TRITON_DTYPES:
        return f"the Triton kernel takes float32, float16 and bfloat16, not {x.dtype}"
    return triton_missing()


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
    if (needs_grad and backend is None) or not use_fused(
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
    fused_extension().group_norm_silu(
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


define(
    "group_norm_silu(Tensor x, Tensor weight, Tensor bias, int num_groups, float eps, "
    "bool silu) -> Tensor"
)
torch.library.impl("advkd::group_norm_silu", "default", _group_norm_silu_op)
torch.library.register_fake("advkd::group_norm_silu", _group_norm_silu_fake)
torch.library.register_autograd(
    "advkd::group_norm_silu", _group_norm_silu_backward, setup_context=_group_norm_silu_setup
)
