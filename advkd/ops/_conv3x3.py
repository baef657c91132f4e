"""3x3 convolution that keeps the size, by Winograd, differentiable any number of times.

Two ops are closed under differentiation: dgrad, the gradient of the input, is the transposed
convolution, and wgrad, the gradient of weight and bias, is bilinear in input and output gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from advkd.ops import _backend, reference
from advkd.ops._address import address, addresses
from advkd.ops._backend import fused_extension, use_fused
from advkd.ops._registry import Kernel, register

# The batch that the cost model is asked about where shapes are traced and may be symbols.
_TRACED_BATCH = 16


def conv3x3(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str | None = None
) -> Tensor:
    """F.conv2d(x, weight, bias, padding=1), by Winograd's minimal filtering (Lavin and Gray 2016).

    Unless backend="fused" asks for it, only where that should be faster: on the CPU, in float32
    and channels_last, with enough channels. Its relative error is about 3e-6, where that of a
    direct convolution is 7e-7.

    Args:
        x: (B, C, H, W) floating, any strides.
        weight: (C_out, C, 3, 3).
        bias: (C_out,).

    Returns:
        (B, C_out, H, W) of x's dtype; channels_last where it is fused.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit the above;
            backend="fused" where no kernel serves.
    """
    _check(x, weight, bias)
    unavailable = _CONV3X3.unavailable(x)
    wanted = backend is not None or (unavailable is None and pays(x, weight))
    if not use_fused("conv3x3", backend, unavailable) or not wanted:
        return reference.conv3x3(x, weight, bias, False)
    out: Tensor = _CONV3X3.fused(x, weight, bias, False)
    return out


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if x.dim() != 4 or x.shape[2] < 1 or x.shape[3] < 1:
        raise ValueError(f"x has the shape {tuple(x.shape)}, but it must be (B, C, H, W).")
    if weight.dim() != 4 or weight.shape[1:] != (x.shape[1], 3, 3) or weight.shape[0] < 1:
        raise ValueError(
            f"weight {tuple(weight.shape)} does not fit x {tuple(x.shape)}: "
            f"it must be (C_out, {x.shape[1]}, 3, 3)."
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias {tuple(bias.shape)} must be {tuple(weight.shape[:1])}.")
    if not x.is_floating_point():
        raise TypeError(f"x is {x.dtype}, but it must be floating.")
    others = [weight] if bias is None else [weight, bias]
    if any(t.dtype != x.dtype for t in others) and not torch.is_autocast_enabled(x.device.type):
        raise TypeError(
            f"x, weight and bias are {[str(t.dtype) for t in (x, *others)]}, but must be of one "
            "dtype."
        )
    if any(t.device != x.device for t in others):
        raise ValueError(
            f"x, weight and bias are on {[str(t.device) for t in (x, *others)]}, but must be on "
            "one device."
        )


def _limit(x: Tensor) -> str | None:
    """Why no kernel takes x, as a clause."""
    return "there are no channels" if x.shape[1] < 1 else None


def pays(x: Tensor, weight: Tensor) -> bool:
    """Whether the fused convolution should be faster than torch's."""
    if not x.is_cpu or x.dtype is not torch.float32 or torch.is_autocast_enabled("cpu"):
        return False
    if _backend.extension is None or not x.is_contiguous(memory_format=torch.channels_last):
        return False
    B, C, H, W = x.shape
    batch = _TRACED_BATCH if torch.compiler.is_compiling() else B
    return _speedup(batch, C, H, W, weight.shape[0]) > 1.0


def _speedup(batch: int, channels: int, height: int, width: int, out: int) -> float:
    speedup: float = fused_extension().conv3x3_speedup((batch, height, width, channels, out))
    return speedup


# What torch.compiler.assume_constant_result leaves; it also imports torch's compiler, which takes
# longer than all else that a command imports.
vars(_speedup)["_dynamo_marked_constant"] = True


def dense_pixels(x: Tensor) -> Tensor:
    """x with the channels of a pixel consecutive and no gaps, as the kernels want it."""
    return x.contiguous(memory_format=torch.channels_last)


def _channels_innermost(x: Tensor) -> Tensor:
    """x laid out as the kernels' results, channels_last whatever its shape."""
    return x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


def empty_pixels(like: Tensor, channels: int) -> Tensor:
    """(B, channels, H, W) of the batch and size of `like`, channels_last whatever its shape; no
    view, so that what comes behind a convolution may be done in place."""
    B, _, H, W = like.shape
    strides = (H * W * channels, 1, W * channels, channels)
    return torch.empty_strided((B, channels, H, W), strides, dtype=like.dtype, device=like.device)


def _conv3x3_fake(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    return empty_pixels(x, weight.shape[1] if transposed else weight.shape[0])


def _conv3x3_reference(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    return _channels_innermost(reference.conv3x3(x, weight, bias, transposed))


def _conv3x3_cpu(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    """With `transposed`, weight is that of the convolution whose dgrad this is."""
    _check(x, weight.transpose(0, 1) if transposed else weight, bias)
    out = _conv3x3_fake(x, weight, bias, transposed)
    x = dense_pixels(x)
    bias = None if bias is None else bias.contiguous()
    B, C, H, W = x.shape
    at = addresses(torch.float32, x, weight, bias, out)
    fused_extension().conv3x3(
        at[0], C, at[1], weight.stride(), transposed, at[2], at[3], out.shape[1],
        (B, H, W, C, out.shape[1]), torch.get_num_threads(),
    )  # fmt: skip
    return out


def wgrad_results(grad_y: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """The weight is (C_out, C, 3, 3), laid out as (C_out, 3, 3, C)."""
    size = (grad_y.shape[1], 3, 3, x.shape[1])
    grad_weight = torch.empty(size, dtype=x.dtype, device=x.device).permute(0, 3, 1, 2)
    return grad_weight, torch.empty(size[:1], dtype=x.dtype, device=x.device)


def _wgrad_reference(grad_y: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    _check_wgrad(grad_y, x)
    grad_weight, grad_bias = reference.conv3x3_wgrad(grad_y, x)
    return _channels_innermost(grad_weight), grad_bias


def _wgrad_cpu(grad_y: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    if x.shape[1] < 1:
        return _wgrad_reference(grad_y, x)
    _check_wgrad(grad_y, x)
    grad_weight, grad_bias = wgrad_results(grad_y, x)
    if x.shape[0] == 0:
        return grad_weight.zero_(), grad_bias.zero_()
    grad_y, x = dense_pixels(grad_y), dense_pixels(x)
    B, C, H, W = x.shape
    fused_extension().conv3x3_gradient(
        address(x, torch.float32), C, address(grad_y, torch.float32), grad_y.shape[1],
        *addresses(torch.float32, grad_weight, grad_bias), (B, H, W, C, grad_y.shape[1]),
        torch.get_num_threads(),
    )  # fmt: skip
    return grad_weight, grad_bias


def _check_wgrad(grad_y: Tensor, x: Tensor) -> None:
    if x.shape[0] != grad_y.shape[0] or x.shape[2:] != grad_y.shape[2:]:
        raise ValueError(f"grad_y {tuple(grad_y.shape)} is of no output of x {tuple(x.shape)}.")


class _Conv3x3(torch.autograd.Function):
    """The op with its gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool, fused: bool
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.options = transposed, fused
        out: Tensor = _CONV3X3.below_autograd(x, weight, bias, transposed, fused)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, weight and bias where they are needed, themselves differentiable."""
        (grad,) = grads
        x, weight = ctx.saved_tensors
        transposed, fused = ctx.options
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = _CONV3X3(grad, weight, None, not transposed, fused)
        if ctx.needs_input_grad[1]:
            # The transposed convolution is the dgrad of one from `grad` to `x`.
            pair = (x, grad) if transposed else (grad, x)
            grad_weight, grad_bias = _WGRAD(*pair, fused)
        if not ctx.needs_input_grad[2]:
            grad_bias = None
        elif transposed or grad_bias is None:
            grad_bias = grad.sum(dim=(0, 2, 3))
        return grad_x, grad_weight, grad_bias, None, None


class _Wgrad(torch.autograd.Function):
    """The gradient of weight and bias, with its own gradient."""

    @staticmethod
    def forward(ctx: Any, grad_y: Tensor, x: Tensor, fused: bool) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(grad_y, x)
        ctx.fused = fused
        grad_weight, grad_bias = _WGRAD.below_autograd(grad_y, x, fused)
        return grad_weight, grad_bias

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        slope_weight, slope_bias = grads
        grad_y, x = ctx.saved_tensors
        of_grad_y = of_x = None
        if ctx.needs_input_grad[0]:
            of_grad_y = _CONV3X3(x, slope_weight, slope_bias, False, ctx.fused)
        if ctx.needs_input_grad[1]:
            of_x = _CONV3X3(grad_y, slope_weight, None, True, ctx.fused)
        return of_grad_y, of_x, None


_CONV3X3 = register(
    "conv3x3(Tensor x, Tensor weight, Tensor? bias, bool transposed, bool fused) -> Tensor",
    _conv3x3_reference,
    cpu=Kernel(_conv3x3_cpu, (torch.float32,), _limit),
    fake=_conv3x3_fake,
    gradient=_Conv3x3,
    autocast=True,
)
_WGRAD = register(
    "conv3x3_wgrad(Tensor grad_y, Tensor x, bool fused) -> (Tensor, Tensor)",
    _wgrad_reference,
    cpu=Kernel(_wgrad_cpu, (torch.float32,), _limit),
    fake=wgrad_results,
    gradient=_Wgrad,
    derived=True,
)
