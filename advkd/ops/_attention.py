"""Attention without a mask: softmax(scale q k^T) v, forward and backward, twice differentiable."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from advkd.ops import reference
from advkd.ops._address import address, address_and_strides
from advkd.ops._backend import fused_extension, use_fused
from advkd.ops._registry import Kernel, register

_HALVES = (torch.float16, torch.bfloat16)
_CPU_DTYPES = (torch.float32, torch.float64, *_HALVES)
_TRITON_DTYPES = (torch.float32, *_HALVES)
_LARGEST_HEAD_DIM = 512


def attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, *, backend: str | None = None
) -> Tensor:
    """softmax(scale q k^T) v for each head, in O(N) memory (FlashAttention-2, Dao 2023).

    Under autocast it runs in autocast's dtype, as torch's scaled_dot_product_attention does.

    Args:
        q: (B, H, N, D) floating, any strides.
        k, v: (B, H, M, D) of q's dtype and device, M >= 1.
        scale: of the scores; None is 1 / sqrt(D).

    Returns:
        (B, H, N, D) of q's dtype, laid out as (B, N, H, D), so that joining the heads is free.
        Sums and softmax are taken in float32, in float64 for float64.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit the above; backend="fused"
            where no kernel serves (D must be a multiple of 8 up to 512).
    """
    _check(q, k, v)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if not use_fused("attention", backend, _ATTENTION.unavailable(q)):
        return reference.attention(q, k, v, scale)[0]
    out: Tensor = _ATTENTION.fused(q, k, v, scale)[0]
    return out


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
        raise ValueError(
            f"q, k and v have the shapes {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}, "
            "but they must be (B, H, N, D)."
        )
    if k.shape != v.shape or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} must agree in all but "
            "the number of queries."
        )
    if k.shape[2] < 1 or q.shape[3] < 1:
        raise ValueError(f"k has the shape {tuple(k.shape)}, but needs a key and a channel.")
    if not q.is_floating_point() or not q.dtype == k.dtype == v.dtype:
        raise TypeError(
            f"q, k and v are {q.dtype}, {k.dtype} and {v.dtype}, but must be of one floating dtype."
        )
    if not q.device == k.device == v.device:
        raise ValueError(
            f"q, k and v are on {q.device}, {k.device} and {v.device}, but must be on one device."
        )


def _limit(q: Tensor) -> str | None:
    """Why no kernel takes heads of q's size, as a clause."""
    head_dim = q.shape[-1]
    if head_dim % 8 != 0 or head_dim > _LARGEST_HEAD_DIM:
        return f"head_dim={head_dim} is no multiple of 8 up to {_LARGEST_HEAD_DIM}"
    return None


def _dense_rows(x: Tensor) -> Tensor:
    """x with consecutive elements in the last dimension, as the kernels want it."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _empty_rows(like: Tensor) -> Tensor:
    """(B, H, N, D), laid out as (B, N, H, D)."""
    B, H, N, D = like.shape
    return torch.empty((B, N, H, D), dtype=like.dtype, device=like.device).transpose(1, 2)


def _attention_cpu(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    if q.dtype in _HALVES:
        out, lse = _attention_cpu(q.float(), k.float(), v.float(), scale)
        return out.to(q.dtype), lse
    q, k, v = _dense_rows(q), _dense_rows(k), _dense_rows(v)
    dtype = q.dtype
    B, H, N, D = q.shape
    out = _empty_rows(q)
    lse = torch.empty((B, H, N), dtype=dtype, device=q.device)
    extension = fused_extension()
    kernel = extension.attention_float32 if dtype is torch.float32 else extension.attention_float64
    kernel(
        address_and_strides(q, dtype), address_and_strides(k, dtype),
        address_and_strides(v, dtype), address_and_strides(out, dtype), address(lse, dtype),
        (B, H, N, k.shape[2], D), scale, torch.get_num_threads(),
    )  # fmt: skip
    return out, lse


def _attention_cuda(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    # Here and not above, because importing Triton takes long and only CUDA needs it.
    from advkd.kernels.attention import forward

    return forward(q, k, v, scale)


def _attention_fake(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return _empty_rows(q), q.new_empty(q.shape[:3], dtype=reference.wide_dtype(q.dtype))


def _backward_reference(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return reference.attention_backward(grad_out, q, k, v, scale)


def _backward_cpu(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    if q.dtype in _HALVES:
        wide = (grad_out.float(), q.float(), k.float(), v.float(), out.float())
        dq, dk, dv = (grad.to(q.dtype) for grad in _backward_cpu(*wide, lse, scale))
        return dq, dk, dv
    grad_out, q, k, v, out = (_dense_rows(x) for x in (grad_out, q, k, v, out))
    lse, dtype = lse.contiguous(), q.dtype
    B, H, N, D = q.shape
    dq, dk, dv = _empty_rows(q), _empty_rows(k), _empty_rows(v)
    if N == 0:
        return dq, dk.zero_(), dv.zero_()
    extension = fused_extension()
    kernel = (
        extension.attention_backward_float32
        if dtype is torch.float32
        else extension.attention_backward_float64
    )
    kernel(
        address_and_strides(grad_out, dtype), address_and_strides(q, dtype),
        address_and_strides(k, dtype), address_and_strides(v, dtype),
        address_and_strides(out, dtype), address(lse, dtype),
        address_and_strides(dq, dtype), address_and_strides(dk, dtype),
        address_and_strides(dv, dtype),
        (B, H, N, k.shape[2], D), scale, torch.get_num_threads(),
    )  # fmt: skip
    return dq, dk, dv


def _backward_cuda(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    from advkd.kernels.attention import backward

    return backward(grad_out, q, k, v, out, lse, scale)


def _backward_fake(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_rows(q), _empty_rows(k), _empty_rows(v)


class _Attention(torch.autograd.Function):
    """The op with its gradient."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, fused: bool
    ) -> tuple[Tensor, Tensor]:
        out, lse = _ATTENTION.below_autograd(q, k, v, scale, fused)
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.options = scale, fused
        return out, lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_out = grads[0]
        if grad_out is None:
            return (None,) * 5
        return *_BACKWARD(grad_out, *ctx.saved_tensors, *ctx.options), None, None


class _Backward(torch.autograd.Function):
    """The backward op with its own gradient. Those of out and lse are in those of q, k and v."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(*arguments[:4])
        ctx.scale = arguments[6]
        dq, dk, dv = _BACKWARD.below_autograd(*arguments)
        return dq, dk, dv

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_dq, grad_dk, grad_dv = grads
        grad_out, q, k, v = ctx.saved_tensors
        second = reference.attention_double_backward(
            grad_dq, grad_dk, grad_dv, grad_out, q, k, v, ctx.scale
        )
        return *second, None, None, None, None


_ATTENTION = register(
    "attention(Tensor q, Tensor k, Tensor v, float scale, bool fused) -> (Tensor, Tensor)",
    reference.attention,
    cpu=Kernel(_attention_cpu, _CPU_DTYPES, _limit),
    cuda=Kernel(_attention_cuda, _TRITON_DTYPES, _limit),
    fake=_attention_fake,
    gradient=_Attention,
    autocast=True,
)
_BACKWARD = register(
    "attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    "float scale, bool fused) -> (Tensor, Tensor, Tensor)",
    _backward_reference,
    cpu=Kernel(_backward_cpu, _CPU_DTYPES, _limit),
    cuda=Kernel(_backward_cuda, _TRITON_DTYPES, _limit),
    fake=_backward_fake,
    gradient=_Backward,
    derived=True,
)
