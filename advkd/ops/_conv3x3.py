"""3x3 convolution that keeps the size, forward and backward by Winograd, differentiable at will.

Two ops are closed under differentiation: the gradient of the input is a convolution by the kernel
turned round, that of the weights is bilinear in input and output's gradient, and so on.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from advkd.ops import _backend, reference
from advkd.ops._backend import (
    define,
    fused_extension,
    runs_eagerly,
    use_fused,
)

# A batch that stands for any, where shapes are traced and may be symbols.
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
    wanted = backend is not None or _pays(x, weight)
    if not use_fused("conv3x3", backend, _unavailable(x)) or not wanted:
        return reference.conv3x3(x, weight, bias, False)
    tensors = (x, weight) if bias is None else (x, weight, bias)
    if not runs_eagerly(*tensors):
        return torch.ops.advkd.conv3x3(x, weight, bias, False, True)
    # Past torch's dispatcher, whose way through Python takes longer than a small convolution.
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return _Conv3x3.apply(x, weight, bias, False, True)
    return _conv3x3_op(x, weight, bias, False, True)


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


def _unavailable(*tensors: Tensor) -> str | None:
    """Why no fused convolution serves these tensors, as a clause."""
    for x in tensors:
        if not x.is_cpu:
            return f"no kernel serves tensors on {x.device.type}"
        if x.dtype is not torch.float32:
            return f"the C++ kernel takes float32, not {x.dtype}"
        if x.shape[1] < 1:
            return "there are no channels"
    return _backend.extension_missing


def _pays(x: Tensor, weight: Tensor) -> bool:
    """Whether the fused convolution should be faster than torch's."""
    if not x.is_cpu or x.dtype is not torch.float32 or torch.is_autocast_enabled("cpu"):
        return False
    if _backend.extension is None or not x.is_contiguous(memory_format=torch.channels_last):
        return False
    batch = _TRACED_BATCH if torch.compiler.is_compiling() else x.shape[0]
    return _speedup(batch, *x.shape[1:], weight.shape[0]) > 1.0


@torch.compiler.assume_constant_result
def _speedup(batch: int, channels: int, height: int, width: int, out: int) -> float:
    speedup: float = fused_extension().conv3x3_speedup((batch, height, width, channels, out))
    return speedup


def _pixels(x: Tensor) -> Tensor:
    """x with the channels of a pixel consecutive and no gaps, as the kernels want it."""
    return x.contiguous(memory_format=torch.channels_last)


def _empty_pixels(like: Tensor, batch: int, channels: int) -> Tensor:
    """(batch, channels, H, W) of the size of `like`, channels_last whatever its shape."""
    size = (batch, like.shape[2], like.shape[3], channels)
    return torch.empty(size, dtype=like.dtype, device=like.device).permute(0, 3, 1, 2)


def _out_channels(weight: Tensor, turned: bool) -> int:
    return weight.shape[1] if turned else weight.shape[0]


def _conv3x3_op(
    x: Tensor, weight: Tensor, bias: Tensor | None, turned: bool, fused: bool
) -> Tensor:
    """With `turned` weight is that of the convolution whose input's gradient this is."""
    out = _empty_pixels(x, x.shape[0], _out_channels(weight, turned))
    # An exported program that was traced with the fused op runs without it too.
    if not fused or _unavailable(x, weight) is not None:
        return out.copy_(reference.conv3x3(x, weight, bias, turned))
    _check(x, weight.transpose(0, 1) if turned else weight, bias)
    x = _pixels(x)
    bias = None if bias is None else bias.contiguous()
    B, C, H, W = x.shape
    fused_extension().conv3x3(
        x.data_ptr(), C, weight.data_ptr(), weight.stride(), turned,
        0 if bias is None else bias.data_ptr(), out.data_ptr(), out.shape[1],
        (B, H, W, C, out.shape[1]), torch.get_num_threads(),
    )  # fmt: skip
    return out


def _conv3x3_fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, turned: bool, fused: bool
) -> Tensor:
    return _empty_pixels(x, x.shape[0], _out_channels(weight, turned))


def _empty_weights(grad_y: Tensor, x: Tensor) -> Tensor:
    """(C_out, C, 3, 3), laid out as (C_out, 3, 3, C)."""
    size = (grad_y.shape[1], 3, 3, x.shape[1])
    return torch.empty(size, dtype=x.dtype, device=x.device).permute(0, 3, 1, 2)


def _conv3x3_weights_op(grad_y: Tensor, x: Tensor, fused: bool) -> tuple[Tensor, Tensor]:
    """The gradients of weight and bias."""
    grad_weight = _empty_weights(grad_y, x)
    grad_bias = torch.empty(grad_y.shape[1], dtype=x.dtype, device=x.device)
    if x.shape[0] != grad_y.shape[0] or x.shape[2:] != grad_y.shape[2:]:
        raise ValueError(f"grad_y {tuple(grad_y.shape)} is of no output of x {tuple(x.shape)}.")
    if not fused or _unavailable(x, grad_y) is not None:
        plain_weight, plain_bias = reference.conv3x3_weights(grad_y, x)
        return grad_weight.copy_(plain_weight), grad_bias.copy_(plain_bias)
    if x.shape[0] == 0:
        return grad_weight.zero_(), grad_bias.zero_()
    grad_y, x = _pixels(grad_y), _pixels(x)
    B, C, H, W = x.shape
    fused_extension().conv3x3_gradient(
        x.data_ptr(), C, grad_y.data_ptr(), grad_y.shape[1], grad_weight.data_ptr(),
        grad_bias.data_ptr(), (B, H, W, C, grad_y.shape[1]), torch.get_num_threads(),
    )  # fmt: skip
    return grad_weight, grad_bias


def _conv3x3_weights_fake(grad_y: Tensor, x: Tensor, fused: bool) -> tuple[Tensor, Tensor]:
    return _empty_weights(grad_y, x), x.new_empty(grad_y.shape[1])


def _convolution(eager: bool) -> Any:
    """The op itself, or past torch's dispatcher."""
    return _conv3x3_op if eager else torch.ops.advkd.conv3x3


def _weight_gradient(eager: bool) -> Any:
    return _conv3x3_weights_op if eager else torch.ops.advkd.conv3x3_weights


class _Conv3x3(torch.autograd.Function):
    """The op with its gradient; in eager code also without torch's dispatcher."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, turned: bool, fused: bool
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.options = turned, fused
        if runs_eagerly(x, weight):
            return _conv3x3_op(x, weight, bias, turned, fused)
        with torch._C._AutoDispatchBelowAutograd():
            out: Tensor = torch.ops.advkd.conv3x3(x, weight, bias, turned, fused)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, weight = ctx.saved_tensors
        turned, fused = ctx.options
        eager = not torch.is_grad_enabled() and runs_eagerly(grad, x, weight)
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = _convolution(eager)(grad, weight, None, not turned, fused)
        if ctx.needs_input_grad[1]:
            # Turned round, input and output change places.
            pair = (x, grad) if turned else (grad, x)
            grad_weight, grad_bias = _weight_gradient(eager)(*pair, fused)
        if not ctx.needs_input_grad[2]:
            grad_bias = None
        elif turned or grad_bias is None:
            grad_bias = grad.sum(dim=(0, 2, 3))
        return grad_x, grad_weight, grad_bias, None, None


class _Conv3x3Weights(torch.autograd.Function):
    """The gradient of weight and bias, with its own gradient."""

    @staticmethod
    def forward(ctx: Any, grad_y: Tensor, x: Tensor, fused: bool) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(grad_y, x)
        ctx.fused = fused
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.advkd.conv3x3_weights(grad_y, x, fused)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        slope_weight, slope_bias = grads
        grad_y, x = ctx.saved_tensors
        eager = not torch.is_grad_enabled() and runs_eagerly(slope_weight, grad_y, x)
        of_grad_y = of_x = None
        if ctx.needs_input_grad[0]:
            of_grad_y = _convolution(eager)(x, slope_weight, slope_bias, False, ctx.fused)
        if ctx.needs_input_grad[1]:
            of_x = _convolution(eager)(grad_y, slope_weight, None, True, ctx.fused)
        return of_grad_y, of_x, None


def _autocast(x: Tensor, weight: Tensor, bias: Tensor | None, turned: bool, fused: bool) -> Tensor:
    """The op under autocast: in autocast's dtype, as torch's conv2d."""
    device = x.device.type
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device.upper()}"))
    with torch._C._ExcludeDispatchKeyGuard(keys):
        if x.dtype is not torch.float64:
            dtype = torch.get_autocast_dtype(device)
            x, weight = x.to(dtype), weight.to(dtype)
            bias = None if bias is None else bias.to(dtype)
        out: Tensor = torch.ops.advkd.conv3x3(x, weight, bias, turned, fused)
    return out


define("conv3x3(Tensor x, Tensor weight, Tensor? bias, bool turned, bool fused) -> Tensor")
define("conv3x3_weights(Tensor grad_y, Tensor x, bool fused) -> (Tensor, Tensor)")
torch.library.impl("advkd::conv3x3", "default", _conv3x3_op)
torch.library.impl("advkd::conv3x3_weights", "default", _conv3x3_weights_op)
torch.library.register_fake("advkd::conv3x3", _conv3x3_fake)
torch.library.register_fake("advkd::conv3x3_weights", _conv3x3_weights_fake)
_library = torch.library.Library("advkd", "FRAGMENT")
_library.impl("conv3x3", _Conv3x3.apply, "Autograd")
_library.impl("conv3x3_weights", _Conv3x3Weights.apply, "Autograd")
_library.impl("conv3x3", _autocast, "AutocastCPU")
_library.impl("conv3x3", _autocast, "AutocastCUDA")
