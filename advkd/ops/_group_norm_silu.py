"""GroupNorm, FiLM, SiLU or nothing: forward, backward, twice differentiable."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from advkd.ops import _backend, reference
from advkd.ops._address import address, addresses
from advkd.ops._backend import runs_eagerly, runs_eagerly_backward, use_fused
from advkd.ops._registry import Kernel, register
from advkd.ops.reference import Affine, Norm

# The dtypes of the C++ kernels, as their names have them.
_CPU_DTYPES = {
    torch.float32: "float32",
    torch.float64: "float64",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
}
_TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# The fields of an Affine and of a Norm: plain tuples take a tenth of the time to make.
_Affine = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
_Norm = tuple[int, float, bool]


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

    Statistics and arithmetic are in float32, in float64 for float64. Under autocast x stays what it
    is, where torch's group_norm would first make float32 of it on CUDA: statistics of half types
    lose nothing here, and the convolution behind would make half types of the result again.

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
        and fit(x, weight, bias, num_groups, eps)
        and use_fused("group_norm_silu", backend, None)
        and runs_eagerly(x, weight, bias)
    ):
        tracked = torch.is_grad_enabled() and (
            x.requires_grad or weight.requires_grad or bias.requires_grad
        )
        return _on_cpu(x, (weight, bias, None, None), (num_groups, eps, True), tracked)
    _check_arguments(x, num_groups, eps, activation)
    _check_affine(x, Affine(weight, bias, scale, shift))
    affine = Affine(weight, bias, _by_channel(scale), _by_channel(shift))
    norm = Norm(num_groups, eps, silu)
    if not use_fused("group_norm_silu", backend, _GROUP_NORM_SILU.unavailable(x)):
        return reference.group_norm_silu(x, affine, norm)
    tensors = [x, *(t for t in affine if t is not None)]
    if x.is_cpu and x.numel() > 0 and runs_eagerly(*tensors):
        tracked = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
        return _on_cpu(x, affine, norm, tracked)
    y: Tensor = _GROUP_NORM_SILU(x, *affine, *norm)[0]
    return y


def _on_cpu(x: Tensor, affine: _Affine, norm: _Norm, tracked: bool) -> Tensor:
    """y of an x with elements, past torch's dispatcher."""
    if tracked:
        y: Tensor = _CpuGroupNormSilu.apply(x, *affine, *norm)
        return y
    return _cpu_forward(_dense(x), affine, norm, False)[0]


def fit(x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float) -> bool:
    """Whether the commonest arguments are right and the C++ kernel takes them: checked at once,
    since the checks one by one take as long as a small map does."""
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


def _check_affine(x: Tensor, affine: Affine) -> None:
    batch, channels = x.shape[:2]
    for name, tensor in zip(Affine._fields, affine, strict=True):
        if tensor is None:
            continue
        shape = tuple(tensor.shape)
        if name in ("weight", "bias"):
            if shape != (channels,):
                raise ValueError(f"{name} has the shape {shape}, but it must be ({channels},).")
        elif shape[:2] != (batch, channels) or any(size != 1 for size in shape[2:]):
            raise ValueError(
                f"{name} has the shape {shape}, but it must be ({batch}, {channels}), followed by "
                "sizes of 1 at most."
            )
        if not tensor.is_floating_point():
            raise TypeError(f"{name} is {tensor.dtype}, but it must be floating.")
        if tensor.device != x.device:
            raise ValueError(
                f"x is on {x.device} and {name} on {tensor.device}, but they must be on one device."
            )


def _by_channel(x: Tensor | None) -> Tensor | None:
    """(B, C, 1, ...) as (B, C)."""
    return x.flatten(1) if x is not None and x.dim() > 2 else x


def _dense(x: Tensor) -> Tensor:
    return x if x.is_contiguous() else x.contiguous(memory_format=reference.memory_format_of(x))


def _wide(affine: _Affine, dtype: torch.dtype) -> _Affine:
    """The parameters as the C++ kernels take them, in `dtype` and dense."""
    first, second, third, fourth = [
        t if t is None or (t.dtype is dtype and t.is_contiguous()) else t.to(dtype).contiguous()
        for t in affine
    ]
    return first, second, third, fourth


def _sizes(x: Tensor, num_groups: int) -> tuple[int, int, int, int, bool]:
    """(B, C, pixels, groups, whether channels are neighbors in memory) of a dense x with
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
    x: Tensor, affine: _Affine, norm: _Norm, for_backward: bool
) -> tuple[Tensor, Tensor | None]:
    """y of a dense x with elements; `for_backward`, also mean and 1/deviation, (2, B, groups)."""
    num_groups, eps, silu = norm
    dtype = x.dtype
    wide = reference.wide_dtype(dtype)
    y = torch.empty_like(x)
    sizes = _sizes(x, num_groups)
    mean = rstd = 0
    statistics = None
    if for_backward:
        shape = (2, sizes[0], num_groups)
        statistics = torch.empty(shape, dtype=torch.float64, device=x.device)
        mean, rstd = _statistics_at(statistics)
    parameters = _wide(affine, wide)
    _FORWARD[dtype](
        address(x, dtype), *addresses(wide, *parameters), address(y, dtype), mean, rstd, *sizes,
        eps, silu, torch.get_num_threads(),
    )  # fmt: skip
    return y, statistics


def _statistics_at(statistics: Tensor) -> tuple[int, int]:
    """The addresses of mean and 1/deviation in (2, B, groups)."""
    mean = address(statistics, torch.float64)
    return mean, mean + 4 * statistics.numel()


def _cpu_backward(
    grad_y: Tensor, x: Tensor, affine: _Affine, norm: _Norm, statistics: Sequence[int]
) -> tuple[Tensor, Affine]:
    """The gradients of a dense x with elements, and of the parameters (None for None), these in
    their dtypes; `statistics` are the addresses of mean and 1/deviation."""
    num_groups, _, silu = norm
    dtype = x.dtype
    wide = reference.wide_dtype(dtype)
    grad_y = grad_y.contiguous(memory_format=reference.memory_format_of(x))
    parameters = _wide(affine, wide)
    dx = torch.empty_like(x)
    gradients = [t if t is None else torch.empty_like(t) for t in parameters]
    _BACKWARD[dtype](
        *addresses(dtype, grad_y, x), *addresses(wide, *parameters), *statistics,
        address(dx, dtype), *addresses(wide, *gradients), *_sizes(x, num_groups), silu,
        torch.get_num_threads(),
    )  # fmt: skip
    return dx, Affine(
        *(
            g if g is None or t is None or g.dtype is t.dtype else g.to(t.dtype)
            for g, t in zip(gradients, affine, strict=True)
        )
    )


# What the op and its backward take and return, as torch's schemas have it: x, the four affine
# parameters, the three numbers of the norm. Bundled at once.


def _op_reference(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    norm = Norm(*rest[4:])
    y = reference.group_norm_silu(x, Affine(*rest[:4]), norm)
    return y, *reference.group_norm_statistics(x, norm.num_groups, norm.eps)


def _op_cpu(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    x, norm = _dense(x), Norm(*rest[4:])
    if x.numel() == 0:
        shape = (x.shape[0], norm.num_groups)
        mean = torch.zeros(shape, dtype=torch.float64, device=x.device)
        rstd = norm.eps**-0.5 if norm.eps else math.inf
        return torch.empty_like(x), mean, torch.full_like(mean, rstd)
    y, statistics = _cpu_forward(x, Affine(*rest[:4]), norm, True)
    assert statistics is not None
    mean, rstd = (t.clone() for t in statistics)  # what an op returns is no view
    return y, mean, rstd


def _op_cuda(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    # Here and not above, because importing Triton takes long and only CUDA needs it.
    from advkd.kernels.group_norm_silu import forward

    return forward(_dense(x), rest[:4], *rest[4:])


def _op_fake(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    statistics = x.new_empty((x.shape[0], rest[4]), dtype=reference.statistics_dtype(x))
    return torch.empty_like(_dense(x)), statistics, torch.empty_like(statistics)


class _BackwardArguments(NamedTuple):
    """The arguments of the backward op, bundled."""

    grad_y: Tensor
    x: Tensor
    affine: Affine
    mean: Tensor
    rstd: Tensor
    norm: Norm


def _bundled(grad_y: Tensor, x: Tensor, *rest: Any) -> _BackwardArguments:
    return _BackwardArguments(
        grad_y, x, Affine(*rest[:4]), mean=rest[4], rstd=rest[5], norm=Norm(*rest[6:])
    )


def _returned(dx: Tensor, gradients: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """An op cannot return None: an empty tensor stands for it."""
    return dx, *(dx.new_empty(0) if g is None else g for g in gradients)


def _backward_reference(*arguments: Any) -> tuple[Tensor, ...]:
    given = _bundled(*arguments)
    return _returned(
        *reference.group_norm_silu_backward(given.grad_y, given.x, given.affine, given.norm)
    )


def _backward_cpu(*arguments: Any) -> tuple[Tensor, ...]:
    grad_y, x, affine, mean, rstd, norm = _bundled(*arguments)
    x = _dense(x)
    if x.numel() == 0:
        zeros = [t if t is None else torch.zeros_like(t) for t in affine]
        return _returned(torch.empty_like(x), zeros)
    dense = mean.contiguous(), rstd.contiguous()
    return _returned(*_cpu_backward(grad_y, x, affine, norm, addresses(torch.float64, *dense)))


def _backward_cuda(*arguments: Any) -> tuple[Tensor, ...]:
    from advkd.kernels.group_norm_silu import backward

    grad_y, x, affine, mean, rstd, norm = _bundled(*arguments)
    x = _dense(x)
    grad_y = grad_y.contiguous(memory_format=reference.memory_format_of(x))
    return _returned(*backward(grad_y, x, affine, (mean, rstd), norm.num_groups, norm.silu))


def _backward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    given = _bundled(*arguments)
    gradients = [t if t is None else t.new_empty(t.shape) for t in given.affine]
    return _returned(torch.empty_like(_dense(given.x)), gradients)


class _GroupNormSilu(torch.autograd.Function):
    """The op with its gradient."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        y, mean, rstd = _GROUP_NORM_SILU.below_autograd(*arguments)
        ctx.mark_non_differentiable(mean, rstd)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*arguments[:5], mean, rstd)
        ctx.norm = arguments[5:]
        return y, mean, rstd

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_y = grads[0]
        if grad_y is None:
            return (None,) * 8
        gradients = _BACKWARD_OP(grad_y, *ctx.saved_tensors, *ctx.norm)
        return _needed(ctx, gradients)


class _CpuGroupNormSilu(torch.autograd.Function):
    """The C++ kernels with their gradient, for plain tensors with elements."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        x, affine = arguments[0], arguments[1:5]
        y, statistics = _cpu_forward(_dense(x), affine, arguments[5:], True)
        ctx.save_for_backward(x, *affine, statistics)
        ctx.norm = arguments[5:]
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of x and the parameters that need one; differentiable if that is wanted."""
        x, *affine, statistics = ctx.saved_tensors
        if torch.is_grad_enabled() or not runs_eagerly_backward(grad_y):
            return _needed(ctx, _BACKWARD_OP(grad_y, x, *affine, *statistics, *ctx.norm))
        dx, gradients = _cpu_backward(
            grad_y, _dense(x), affine, ctx.norm, _statistics_at(statistics)
        )
        return _needed(ctx, (dx, *gradients))


def _needed(ctx: Any, gradients: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """The gradients of x and the parameters that need one, and none for the norm's numbers."""
    needed = ctx.needs_input_grad[:5]
    wanted = [g if n else None for g, n in zip(gradients, needed, strict=True)]
    return *wanted, None, None, None


class _Backward(torch.autograd.Function):
    """The backward op with its own gradient. Those of mean and rstd are in that of x."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*arguments[:6])
        ctx.norm = Norm(*arguments[8:])
        gradients: tuple[Tensor, ...] = _BACKWARD_OP.below_autograd(*arguments)
        return gradients

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_y, x, *parameters = ctx.saved_tensors
        given = [g if t is not None else None for g, t in zip(grads[1:], parameters, strict=True)]
        of_grad_y, of_x, of_affine = reference.group_norm_silu_double_backward(
            grads[0], Affine(*given), grad_y, x, Affine(*parameters), ctx.norm
        )
        return of_grad_y, of_x, *of_affine, None, None, None, None, None


_GROUP_NORM_SILU = register(
    "group_norm_silu(Tensor x, Tensor? weight, Tensor? bias, Tensor? scale, Tensor? shift, "
    "int num_groups, float eps, bool silu) -> (Tensor, Tensor, Tensor)",
    _op_reference,
    cpu=Kernel(_op_cpu, tuple(_CPU_DTYPES)),
    cuda=Kernel(_op_cuda, _TRITON_DTYPES),
    fake=_op_fake,
    gradient=_GroupNormSilu,
)
_BACKWARD_OP = register(
    "group_norm_silu_backward(Tensor grad_y, Tensor x, Tensor? weight, Tensor? bias, "
    "Tensor? scale, Tensor? shift, Tensor mean, Tensor rstd, int num_groups, float eps, "
    "bool silu) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward_reference,
    cpu=Kernel(_backward_cpu, tuple(_CPU_DTYPES)),
    cuda=Kernel(_backward_cuda, _TRITON_DTYPES),
    fake=_backward_fake,
    gradient=_Backward,
    derived=True,
)
