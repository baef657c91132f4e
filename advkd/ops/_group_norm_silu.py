"""GroupNorm, scale and shift, SiLU or nothing: forward, backward, twice differentiable."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from advkd.kernels import unavailable_reason as triton_missing
from advkd.ops import _backend, reference
from advkd.ops._backend import define, runs_eagerly, use_fused

# The dtypes of the C++ kernels, as their names have them.
_CPU_DTYPES = {
    torch.float32: "float32",
    torch.float64: "float64",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
}
_TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# weight, bias, scale, shift
Modulation = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def group_norm_silu(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    num_groups: int,
    eps: float,
    activation: str = "silu",
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """y = act((GN(x) weight + bias) (1 + scale) + shift): GroupNorm (Wu and He 2018), FiLM (Perez
    et al. 2018), and SiLU or nothing.

    Statistics and arithmetic are in float32, in float64 for float64. Under autocast on CUDA the
    result is float32, as that of torch's group_norm.

    Args:
        x: (B, C, ...) floating, any strides.
        weight, bias: (C,) floating, or None for 1 and 0.
        num_groups: divides C.
        eps: added to the variance.
        activation: "silu" or "none".
        scale, shift: (B, C) or (B, C, 1, ...) floating, or None for 0.

    Returns:
        A tensor of x's shape, dtype and memory format (contiguous, channels_last or
        channels_last_3d).

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or names that do not fit the above;
            backend="fused" where no kernel serves.
    """
    silu = activation == "silu"
    if (
        silu
        and (weight is not None and bias is not None and scale is None and shift is None)
        and _fit(x, weight, bias, num_groups, eps)
        and use_fused("group_norm_silu", backend, None)
        and runs_eagerly(x, weight, bias)
    ):
        tracked = torch.is_grad_enabled() and (
            x.requires_grad or weight.requires_grad or bias.requires_grad
        )
        return _on_cpu(x, (weight, bias, None, None), num_groups, eps, True, tracked)
    _check_arguments(x, num_groups, eps, activation)
    _check_parameters(x, weight, bias, scale, shift)
    x, scale, shift = _autocast(x), _by_channel(scale), _by_channel(shift)
    if not use_fused("group_norm_silu", backend, _unavailable(x)):
        return reference.group_norm_silu(x, weight, bias, scale, shift, num_groups, eps, silu)
    modulation = (weight, bias, scale, shift)
    tensors = [x, *(t for t in modulation if t is not None)]
    if not runs_eagerly(*tensors):
        return torch.ops.advkd.group_norm_silu(x, *modulation, num_groups, eps, silu)[0]
    # Past torch's dispatcher, whose way through Python takes longer than a small map.
    tracked = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    if not x.is_cpu or x.numel() == 0:
        run = _GroupNormSilu.apply if tracked else _group_norm_silu_op
        return run(x, *modulation, num_groups, eps, silu)[0]
    return _on_cpu(x, modulation, num_groups, eps, silu, tracked)


def _on_cpu(
    x: Tensor, modulation: Modulation, num_groups: int, eps: float, silu: bool, tracked: bool
) -> Tensor:
    """y of an x with elements, past torch's dispatcher."""
    if tracked:
        return _CpuGroupNormSilu.apply(x, *modulation, num_groups, eps, silu)
    return _cpu_forward(_dense(x), modulation, num_groups, eps, silu, False)[0]


def _fit(x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float) -> bool:
    """Whether the commonest arguments are right and the C++ kernel takes them: asked at once, since
    the questions one by one take as long as a small map does."""
    shape = x.shape
    return (
        x.dtype is weight.dtype is bias.dtype is torch.float32
        and x.is_cpu
        and weight.is_cpu
        and bias.is_cpu
        and len(shape) >= 2
        and weight.shape == bias.shape == (shape[1],)
        and num_groups >= 1
        and shape[1] % num_groups == 0
        and eps >= 0
        and x.numel() > 0
        and _backend.extension is not None
    )


def _check_arguments(x: Tensor, num_groups: int, eps: float, activation: str) -> None:
    if activation not in ("silu", "none"):
        raise ValueError(f"activation='{activation}' is neither 'silu' nor 'none'.")
    if x.dim() < 2:
        raise ValueError(f"x has the shape {tuple(x.shape)}, but it must be (B, C, ...).")
    if not x.is_floating_point():
        raise TypeError(f"x is {x.dtype}, but it must be floating.")
    if num_groups < 1 or x.shape[1] % num_groups != 0:
        raise ValueError(f"num_groups={num_groups} does not divide channels={x.shape[1]}.")
    if not eps >= 0:
        raise ValueError(f"eps={eps} is negative or not a number.")


def _check_parameters(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
) -> None:
    batch, channels = x.shape[:2]
    for name, tensor in (("weight", weight), ("bias", bias), ("scale", scale), ("shift", shift)):
        if tensor is None:
            continue
        shape = tuple(tensor.shape)
        if tensor is weight or tensor is bias:
            if shape != (channels,):
                raise ValueError(f"{name} has the shape {shape}, but it must be ({channels},).")
        elif shape[:2] != (batch, channels) or any(size != 1 for size in shape[2:]):
            raise ValueError(
                f"{name} has the shape {shape}, but it must be ({batch}, {channels}), with sizes "
                "of 1 behind at most."
            )
        if not tensor.is_floating_point():
            raise TypeError(f"{name} is {tensor.dtype}, but it must be floating.")
        if tensor.device != x.device:
            raise ValueError(
                f"x is on {x.device} and {name} on {tensor.device}, but they must be on one device."
            )


def _autocast(x: Tensor) -> Tensor:
    """x as autocast has it for torch's group_norm: in float32 on CUDA, as it is on the CPU."""
    halved = x.is_cuda and x.dtype in (torch.float16, torch.bfloat16)
    return x.float() if halved and torch.is_autocast_enabled("cuda") else x


def _by_channel(x: Tensor | None) -> Tensor | None:
    """(B, C, 1, ...) as (B, C)."""
    return x.flatten(1) if x is not None and x.dim() > 2 else x


def _unavailable(x: Tensor) -> str | None:
    """Why no fused GroupNorm-SiLU serves x, as a clause."""
    if x.is_cpu:
        if x.dtype not in _CPU_DTYPES:
            return f"the C++ kernel does not take {x.dtype}"
        return _backend.extension_missing
    if not x.is_cuda:
        return f"no kernel serves tensors on {x.device.type}"
    if x.dtype not in _TRITON_DTYPES:
        return f"the Triton kernel takes float32, float16 and bfloat16, not {x.dtype}"
    return triton_missing()


def _dense(x: Tensor) -> Tensor:
    return x if x.is_contiguous() else x.contiguous(memory_format=reference.memory_format_of(x))


def _wide(modulation: Modulation, dtype: torch.dtype) -> Modulation:
    """The parameters as the C++ kernels take them; x has `dtype`."""
    wide = reference.wide_dtype(dtype)
    first, second, third, fourth = [
        t if t is None or (t.dtype is wide and t.is_contiguous()) else t.to(wide).contiguous()
        for t in modulation
    ]
    return first, second, third, fourth


def _addresses(tensors: Modulation) -> list[int]:
    return [0 if t is None else t.data_ptr() for t in tensors]


def _sizes(x: Tensor, num_groups: int) -> tuple[int, int, int, int, bool]:
    """(B, C, pixels, groups, whether channels are neighbours in memory) of a dense x with
    elements."""
    batch, channels = x.shape[:2]
    pixels = x.numel() // (batch * channels)
    return batch, channels, pixels, num_groups, pixels == 1 or not x.is_contiguous()


def _kernels(name: str) -> dict[torch.dtype, Callable[..., None]]:
    extension = _backend.extension
    if extension is None:
        return {}
    return {dtype: getattr(extension, name + of) for dtype, of in _CPU_DTYPES.items()}


_FORWARD, _BACKWARD = _kernels("group_norm_silu_"), _kernels("group_norm_silu_backward_")


def _cpu_forward(
    x: Tensor, modulation: Modulation, num_groups: int, eps: float, silu: bool, keeps: bool
) -> tuple[Tensor, Tensor | None]:
    """y of a dense x with elements; mean and 1/deviation (2, B, num_groups) if it `keeps` them."""
    y = torch.empty_like(x)
    sizes = _sizes(x, num_groups)
    mean = rstd = 0
    statistics = None
    if keeps:
        statistics = torch.empty((2, sizes[0], num_groups), dtype=torch.float64)
        mean = statistics.data_ptr()
        rstd = mean + 8 * sizes[0] * num_groups
    wide = _wide(modulation, x.dtype)
    _FORWARD[x.dtype](
        x.data_ptr(), *_addresses(wide), y.data_ptr(), mean, rstd, *sizes, eps, silu,
        torch.get_num_threads(),
    )  # fmt: skip
    return y, statistics


def _cpu_backward(
    grad_y: Tensor,
    x: Tensor,
    modulation: Modulation,
    statistics: tuple[int, int],
    num_groups: int,
    silu: bool,
) -> tuple[Tensor, Modulation]:
    """The gradients of a dense x with elements, and of the parameters (None for None); `statistics`
    are the addresses of the mean and of 1/deviation."""
    grad_y = grad_y.contiguous(memory_format=reference.memory_format_of(x))
    wide = _wide(modulation, x.dtype)
    dx = torch.empty_like(x)
    first, second, third, fourth = (t if t is None else torch.empty_like(t) for t in wide)
    gradients = (first, second, third, fourth)
    _BACKWARD[x.dtype](
        grad_y.data_ptr(), x.data_ptr(), *_addresses(wide), *statistics, dx.data_ptr(),
        *_addresses(gradients), *_sizes(x, num_groups), silu, torch.get_num_threads(),
    )  # fmt: skip
    return dx, gradients


def _as_parameters(gradients: Modulation, parameters: Modulation) -> list[Tensor | None]:
    """Gradients in their parameters' dtypes."""
    return [
        g if g is None or t is None or g.dtype is t.dtype else g.to(t.dtype)
        for g, t in zip(gradients, parameters, strict=True)
    ]


def _group_norm_silu_op(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    num_groups: int,
    eps: float,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    # An exported program that was traced with the fused op runs without it too.
    if _unavailable(x) is not None:
        y = reference.group_norm_silu(x, weight, bias, scale, shift, num_groups, eps, silu)
        return y, *reference.group_norm_statistics(x, num_groups, eps)
    x = _dense(x)
    if x.is_cuda:
        # Here and not above, because importing Triton takes long and only CUDA needs it.
        from advkd.kernels.group_norm_silu import forward

        return forward(x, weight, bias, scale, shift, num_groups, eps, silu)
    if x.numel() == 0:
        mean = torch.zeros((x.shape[0], num_groups), dtype=torch.float64)
        return torch.empty_like(x), mean, torch.full_like(mean, eps**-0.5 if eps else math.inf)
    y, statistics = _cpu_forward(x, (weight, bias, scale, shift), num_groups, eps, silu, True)
    assert statistics is not None
    mean, rstd = (t.clone() for t in statistics)  # what an op returns is no view
    return y, mean, rstd


def _group_norm_silu_fake(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    num_groups: int,
    eps: float,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    statistics = x.new_empty((x.shape[0], num_groups), dtype=reference.statistics_dtype(x))
    return torch.empty_like(_dense(x)), statistics, torch.empty_like(statistics)


def _group_norm_silu_backward_op(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    num_groups: int,
    eps: float,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    modulation = (weight, bias, scale, shift)
    if _unavailable(x) is not None:
        dx, *gradients = reference.group_norm_silu_backward(
            grad_y, x, *modulation, num_groups, eps, silu
        )
        return _returned(dx, gradients)
    x = _dense(x)
    if x.is_cuda:
        from advkd.kernels.group_norm_silu import backward

        grad_y = grad_y.contiguous(memory_format=reference.memory_format_of(x))
        dx, *of_modulation = backward(grad_y, x, *modulation, mean, rstd, num_groups, eps, silu)
        return _returned(dx, of_modulation)
    if x.numel() == 0:
        zeros = [t if t is None else torch.zeros_like(t) for t in modulation]
        return _returned(torch.empty_like(x), zeros)
    statistics = (mean.contiguous(), rstd.contiguous())
    addresses = (statistics[0].data_ptr(), statistics[1].data_ptr())
    dx, rest = _cpu_backward(grad_y, x, modulation, addresses, num_groups, silu)
    return _returned(dx, _as_parameters(rest, modulation))


def _returned(
    dx: Tensor, gradients: list[Tensor | None]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """An op cannot return None: an empty tensor stands for it."""
    first, second, third, fourth = (dx.new_empty(0) if g is None else g for g in gradients)
    return dx, first, second, third, fourth


def _group_norm_silu_backward_fake(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    num_groups: int,
    eps: float,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    like = (weight, bias, scale, shift)
    gradients = [t if t is None else t.new_empty(t.shape) for t in like]
    return _returned(torch.empty_like(_dense(x)), gradients)


class _GroupNormSilu(torch.autograd.Function):
    """The op with its gradient; in eager code also without torch's dispatcher."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        tensors = arguments[:5]
        if runs_eagerly(*(t for t in tensors if t is not None)):
            y, mean, rstd = _group_norm_silu_op(*arguments)
        else:
            with torch._C._AutoDispatchBelowAutograd():
                y, mean, rstd = torch.ops.advkd.group_norm_silu(*arguments)
        ctx.mark_non_differentiable(mean, rstd)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, mean, rstd)
        ctx.options = arguments[5:]
        return y, mean, rstd

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_y, saved = grads[0], ctx.saved_tensors
        if grad_y is None:
            return (None,) * 8
        arguments = (grad_y, *saved, *ctx.options)
        if torch.is_grad_enabled() or not runs_eagerly(grad_y, saved[0]):
            gradients = torch.ops.advkd.group_norm_silu_backward(*arguments)
        else:
            gradients = _group_norm_silu_backward_op(*arguments)
        wanted = [
            gradient if needed else None
            for gradient, needed in zip(gradients, ctx.needs_input_grad[:5], strict=True)
        ]
        return *wanted, None, None, None


class _CpuGroupNormSilu(torch.autograd.Function):
    """The C++ kernels with their gradient, for plain tensors with elements."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        x, weight, bias, scale, shift, num_groups, eps, silu = arguments
        modulation = (weight, bias, scale, shift)
        y, statistics = _cpu_forward(_dense(x), modulation, num_groups, eps, silu, True)
        ctx.save_for_backward(x, *modulation, statistics)
        ctx.options = num_groups, eps, silu
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of x and the parameters that need one; differentiable if that is wanted."""
        x, weight, bias, scale, shift, statistics = ctx.saved_tensors
        modulation = (weight, bias, scale, shift)
        num_groups, _, silu = ctx.options
        gradients: Any
        if torch.is_grad_enabled() or not runs_eagerly(grad_y, x):
            gradients = torch.ops.advkd.group_norm_silu_backward(
                grad_y, x, *modulation, *statistics, *ctx.options
            )
        else:
            mean = statistics.data_ptr()
            addresses = (mean, mean + 4 * statistics.numel())
            dx, rest = _cpu_backward(grad_y, _dense(x), modulation, addresses, num_groups, silu)
            gradients = (dx, *_as_parameters(rest, modulation))
        needed = ctx.needs_input_grad[:5]
        wanted = [g if n else None for g, n in zip(gradients, needed, strict=True)]
        return *wanted, None, None, None


class _GroupNormSiluBackward(torch.autograd.Function):
    """The backward op with its own gradient. Those of mean and rstd are in that of x."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*arguments[:6])
        ctx.options = arguments[8:]
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.advkd.group_norm_silu_backward(*arguments)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_y, x, *modulation = ctx.saved_tensors
        given = [g if t is not None else None for g, t in zip(grads[1:], modulation, strict=True)]
        arguments: list[Any] = [grads[0], *given, grad_y, x, *modulation, *ctx.options]
        second = reference.group_norm_silu_double_backward(*arguments)
        return *second, None, None, None, None, None


define(
    "group_norm_silu(Tensor x, Tensor? weight, Tensor? bias, Tensor? scale, Tensor? shift, "
    "int num_groups, float eps, bool silu) -> (Tensor, Tensor, Tensor)"
)
define(
    "group_norm_silu_backward(Tensor grad_y, Tensor x, Tensor? weight, Tensor? bias, "
    "Tensor? scale, Tensor? shift, Tensor mean, Tensor rstd, int num_groups, float eps, "
    "bool silu) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
torch.library.impl("advkd::group_norm_silu", "default", _group_norm_silu_op)
torch.library.impl("advkd::group_norm_silu_backward", "default", _group_norm_silu_backward_op)
torch.library.register_fake("advkd::group_norm_silu", _group_norm_silu_fake)
torch.library.register_fake("advkd::group_norm_silu_backward", _group_norm_silu_backward_fake)
_library = torch.library.Library("advkd", "FRAGMENT")
_library.impl("group_norm_silu", _GroupNormSilu.apply, "Autograd")
_library.impl("group_norm_silu_backward", _GroupNormSiluBackward.apply, "Autograd")
