"""GroupNorm-SiLU and the 3x3 convolution behind it, half a residual block, as one operation.

It is made of two ops, which is what a program that traces it sees, and what CUDA runs. On the CPU,
for plain tensors, kernels make the norm's result where the convolution reads it, in the forward
pass and again for the gradient of the weights: it is never stored, which is half of what a residual
block keeps for its backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from advkd.ops._address import address, addresses
from advkd.ops._backend import fused_extension, runs_eagerly, runs_eagerly_backward, use_fused
from advkd.ops._conv3x3 import conv3x3, dense_pixels, empty_pixels, pays, wgrad_results
from advkd.ops._group_norm_silu import fit, group_norm_silu


def normed_conv3x3(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    num_groups: int,
    eps: float,
    weight: Tensor,
    bias: Tensor | None = None,
    addend: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """conv3x3(group_norm_silu(x), weight, bias) + addend + residual.

    Where one kernel does all of it, GroupNorm is applied as x scale + shift, which loses digits
    where a channel's mean is many times its deviation, as it does in the engines.

    Args:
        x: (B, C, H, W) floating, any strides.
        norm_weight, norm_bias: (C,) floating.
        num_groups: divides C.
        eps: added to the variance.
        weight: (C_out, C, 3, 3).
        bias: (C_out,).
        addend: (B, C_out), the same for all pixels.
        residual: (B, C_out, H, W).

    Returns:
        (B, C_out, H, W) of x's dtype.

    Raises:
        ValueError, TypeError: as `group_norm_silu` and `conv3x3`.
    """
    given = (x, norm_weight, norm_bias, weight, bias, addend, residual)
    if (
        fit(x, norm_weight, norm_bias, num_groups, eps)
        and x.dim() == 4
        and _fit(x, weight, bias, addend, residual)
        and use_fused("normed_conv3x3", backend, None)
        and runs_eagerly(*(t for t in given if t is not None))
        and (backend is not None or pays(x, weight))
    ):
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given):
            out: Tensor = _CpuNormedConv3x3.apply(num_groups, eps, *given)
            return out
        return _forward(num_groups, eps, *given)[0]
    h = group_norm_silu(x, norm_weight, norm_bias, num_groups, eps, backend=backend)
    h = conv3x3(h, weight, bias, backend=backend)
    _check_added("addend", addend, h.shape[:2])
    _check_added("residual", residual, h.shape)
    if addend is not None:
        h = h + addend[:, :, None, None]
    return h if residual is None else residual + h


def _check_added(name: str, tensor: Tensor | None, shape: torch.Size) -> None:
    if tensor is not None and tensor.shape != shape:
        raise ValueError(f"{name} has the shape {tuple(tensor.shape)}, but must be {tuple(shape)}.")


def _fit(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    addend: Tensor | None,
    residual: Tensor | None,
) -> bool:
    """Whether what follows the norm of an x that fits is of the commonest kind."""
    B, C, H, W = x.shape
    C_out = weight.shape[0]
    wanted = (
        (weight, (C_out, C, 3, 3)),
        (bias, (C_out,)),
        (addend, (B, C_out)),
        (residual, (B, C_out, H, W)),
    )
    return all(
        t is None or (t.shape == shape and t.dtype is torch.float32 and t.is_cpu)
        for t, shape in wanted
    )


def _forward(
    num_groups: int,
    eps: float,
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    addend: Tensor | None,
    residual: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The result, and mean and 1/deviation, (2, B, groups)."""
    B, C, H, W = x.shape
    C_out = weight.shape[0]
    statistics = torch.empty((2, B, num_groups), dtype=torch.float64, device=x.device)
    out = empty_pixels(x, C_out)
    x, norm_weight, norm_bias = dense_pixels(x), norm_weight.contiguous(), norm_bias.contiguous()
    bias, addend = (t if t is None else t.contiguous() for t in (bias, addend))
    residual = None if residual is None else dense_pixels(residual)
    at = addresses(torch.float32, x, norm_weight, norm_bias, weight, bias, addend, residual, out)
    fused_extension().normed_conv3x3(
        *at[:3], num_groups, eps, address(statistics, torch.float64), at[3], weight.stride(),
        *at[4:], (B, H, W, C, C_out), torch.get_num_threads(),
    )  # fmt: skip
    return out, statistics


class _CpuNormedConv3x3(torch.autograd.Function):
    """The C++ kernels with their gradient, for plain tensors with elements."""

    @staticmethod
    def forward(ctx: Any, num_groups: int, eps: float, *given: Tensor | None) -> Tensor:
        x, norm_weight, norm_bias, weight, bias, addend, residual = given
        assert x is not None and norm_weight is not None
        assert norm_bias is not None and weight is not None
        out, statistics = _forward(
            num_groups, eps, x, norm_weight, norm_bias, weight, bias, addend, residual
        )
        ctx.save_for_backward(x, norm_weight, norm_bias, weight, statistics)
        ctx.norm = num_groups, eps
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients that are needed; differentiable if that is wanted."""
        (grad,) = grads
        needed = ctx.needs_input_grad[2:]
        if torch.is_grad_enabled() or not runs_eagerly_backward(grad):
            inner = _gradients_by_ops(ctx, grad, needed[:4])
            of_bias = grad.sum(dim=(0, 2, 3)) if needed[4] else None
        else:
            inner, of_bias = _gradients(ctx, grad, needed)
        of_addend = grad.sum(dim=(2, 3)) if needed[5] else None
        of_residual = grad if needed[6] else None
        return None, None, *inner, of_bias, of_addend, of_residual


def _gradients(
    ctx: Any, grad: Tensor, needed: tuple[bool, ...]
) -> tuple[list[Tensor | None], Tensor | None]:
    """Those of x, the norm's weight and bias, and the weight; and that of the bias."""
    x, norm_weight, norm_bias, weight, statistics = ctx.saved_tensors
    x, grad = dense_pixels(x), dense_pixels(grad)
    norm_weight, norm_bias = norm_weight.contiguous(), norm_bias.contiguous()
    num_groups, _ = ctx.norm
    B, C, H, W = x.shape
    sizes, threads = (B, H, W, C, weight.shape[0]), torch.get_num_threads()
    at = addresses(torch.float32, grad, x, norm_weight, norm_bias)
    norm = (*at, num_groups, address(statistics, torch.float64))
    gradients: list[Tensor | None] = [None, None, None, None]
    of_bias = None
    if any(needed[:3]):
        inner = [torch.empty_like(t) for t in (x, norm_weight, norm_bias)]
        fused_extension().normed_conv3x3_dgrad(
            *norm, address(weight, torch.float32), weight.stride(),
            *addresses(torch.float32, *inner), sizes, threads,
        )  # fmt: skip
        gradients[:3] = [g if n else None for g, n in zip(inner, needed[:3], strict=True)]
    if needed[3] or needed[4]:
        of_weight, of_bias = wgrad_results(grad, x)
        results = addresses(torch.float32, of_weight, of_bias)
        fused_extension().normed_conv3x3_wgrad(*norm, *results, sizes, threads)
        gradients[3] = of_weight
    return gradients, of_bias if needed[4] else None


def _gradients_by_ops(ctx: Any, grad: Tensor, needed: tuple[bool, ...]) -> list[Tensor | None]:
    """Those of x, the norm's weight and bias, and the weight, as autograd finds them for the two
    ops: differentiable any number of times."""
    *tensors, _ = ctx.saved_tensors
    with torch.enable_grad():
        # Views, so that the gradients end here even where one tensor is made of another.
        views = [t.view_as(t) if n else t for t, n in zip(tensors, needed, strict=True)]
        x, norm_weight, norm_bias, weight = views
        out = conv3x3(group_norm_silu(x, norm_weight, norm_bias, *ctx.norm), weight)
    wanted = [t for t, n in zip(views, needed, strict=True) if n]
    found = iter(torch.autograd.grad(out, wanted, grad, create_graph=torch.is_grad_enabled()))
    return [next(found) if n else None for n in needed]
