"""Attention without a mask: softmax(scale q k^T) v, forward and backward, twice differentiable."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from advkd.kernels import unavailable_reason as triton_missing
from advkd.ops import _backend, reference
from advkd.ops._backend import (
    define,
    fused_extension,
    runs_eagerly,
    use_fused,
)

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
    if not use_fused("attention", backend, _unavailable(q)):
        return reference.attention(q, k, v, scale)[0]
    if not runs_eagerly(q, k, v):
        return torch.ops.advkd.attention(q, k, v, scale, True)[0]
    # Past torch's dispatcher, whose way through Python takes longer than a small attention.
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return _Attention.apply(q, k, v, scale, True)[0]
    return _attention_op(q, k, v, scale, True)[0]


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


def _unavailable(q: Tensor) -> str | None:
    """Why no fused attention serves q and keys like it, as a clause."""
    head_dim = q.shape[-1]
    if head_dim % 8 != 0 or head_dim > _LARGEST_HEAD_DIM:
        return f"head_dim={head_dim} is no multiple of 8 up to {_LARGEST_HEAD_DIM}"
    if q.is_cpu:
        if q.dtype not in _CPU_DTYPES:
            return f"the C++ kernel does not take {q.dtype}"
        return _backend.extension_missing
    if not q.is_cuda:
        return f"no kernel serves tensors on {q.device.type}"
    if q.dtype not in _TRITON_DTYPES:
        return f"the Triton kernel takes float32, float16 and bfloat16, not {q.dtype}"
    return triton_missing() or triton_limit(head_dim, q.dtype)


def triton_limit(head_dim: int, dtype: torch.dtype) -> str | None:
    """Why the Triton kernel does not serve these heads."""
    # Here and not above, because importing Triton takes long and only CUDA needs it.
    from advkd.kernels.attention import supports

    return supports(head_dim, dtype)


def _rows(x: Tensor) -> Tensor:
    """x with consecutive elements in the last dimension, as the kernels want it."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _head_rows(x: Tensor) -> tuple[int, int, int, int]:
    """What the extension takes for one operand: the address, and three strides."""
    batch, head, row, _ = x.stride()
    return x.data_ptr(), batch, head, row


def _empty_rows(like: Tensor) -> Tensor:
    """(B, H, N, D), laid out as (B, N, H, D)."""
    B, H, N, D = like.shape
    return torch.empty((B, N, H, D), dtype=like.dtype, device=like.device).transpose(1, 2)


def _attention_op(
    q: Tensor, k: Tensor, v: Tensor, scale: float, fused: bool
) -> tuple[Tensor, Tensor]:
    # An exported program that was traced with the fused op runs without it too.
    if not fused or _unavailable(q) is not None:
        return reference.attention(q, k, v, scale)
    q, k, v = _rows(q), _rows(k), _rows(v)
    if q.is_cuda:
        from advkd.kernels.attention import forward

        return forward(q, k, v, scale)
    if q.dtype in _HALVES:
        out, lse = _attention_op(q.float(), k.float(), v.float(), scale, fused)
        return out.to(q.dtype), lse
    B, H, N, D = q.shape
    out = _empty_rows(q)
    lse = torch.empty((B, H, N), dtype=q.dtype)
    extension = fused_extension()
    kernel = (
        extension.attention_float32 if q.dtype is torch.float32 else extension.attention_float64
    )
    kernel(
        _head_rows(q), _head_rows(k), _head_rows(v), _head_rows(out), lse.data_ptr(),
        (B, H, N, k.shape[2], D), scale, torch.get_num_threads(),
    )  # fmt: skip
    return out, lse


def _attention_fake(
    q: Tensor, k: Tensor, v: Tensor, scale: float, fused: bool
) -> tuple[Tensor, Tensor]:
    return _empty_rows(q), q.new_empty(q.shape[:3], dtype=reference.wide_dtype(q.dtype))


def _attention_backward_op(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    fused: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    if not fused or _unavailable(q) is not None:
        return reference.attention_backward(grad_out, q, k, v, scale)
    grad_out, q, k, v, out = (_rows(x) for x in (grad_out, q, k, v, out))
    lse = lse.contiguous()
    if q.is_cuda:
        from advkd.kernels.attention import backward

        return backward(grad_out, q, k, v, out, lse, scale)
    if q.dtype in _HALVES:
        grads = _attention_backward_op(
            grad_out.float(), q.float(), k.float(), v.float(), out.float(), lse, scale, fused
        )
        dq, dk, dv = (grad.to(q.dtype) for grad in grads)
        return dq, dk, dv
    B, H, N, D = q.shape
    dq, dk, dv = _empty_rows(q), _empty_rows(k), _empty_rows(v)
    if N == 0:
        return dq, dk.zero_(), dv.zero_()
    extension = fused_extension()
    kernel = (
        extension.attention_backward_float32
        if q.dtype is torch.float32
        else extension.attention_backward_float64
    )
    kernel(
        _head_rows(grad_out), _head_rows(q), _head_rows(k), _head_rows(v), _head_rows(out),
        lse.data_ptr(), _head_rows(dq), _head_rows(dk), _head_rows(dv),
        (B, H, N, k.shape[2], D), scale, torch.get_num_threads(),
    )  # fmt: skip
    return dq, dk, dv


def _attention_backward_fake(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    fused: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_rows(q), _empty_rows(k), _empty_rows(v)


class _Attention(torch.autograd.Function):
    """The op with its gradient; in eager code also without torch's dispatcher."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, fused: bool
    ) -> tuple[Tensor, Tensor]:
        if runs_eagerly(q, k, v):
            out, lse = _attention_op(q, k, v, scale, fused)
        else:
            with torch._C._AutoDispatchBelowAutograd():
                out, lse = torch.ops.advkd.attention(q, k, v, scale, fused)
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
        arguments = (grad_out, *ctx.saved_tensors, *ctx.options)
        if torch.is_grad_enabled() or not runs_eagerly(*arguments[:4]):
            return *torch.ops.advkd.attention_backward(*arguments), None, None
        return *_attention_backward_op(*arguments), None, None


class _AttentionBackward(torch.autograd.Function):
    """The backward op with its own gradient. Those of out and lse are in those of q, k and v."""

    @staticmethod
    def forward(
        ctx: Any,
        grad_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        scale: float,
        fused: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(grad_out, q, k, v)
        ctx.scale = scale
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.advkd.attention_backward(grad_out, q, k, v, out, lse, scale, fused)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_dq, grad_dk, grad_dv = grads
        grad_out, q, k, v = ctx.saved_tensors
        second = reference.attention_double_backward(
            grad_dq, grad_dk, grad_dv, grad_out, q, k, v, ctx.scale
        )
        return *second, None, None, None, None


def _autocast(device: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """The op under autocast: in autocast's dtype (torch's register_autocast would fix one)."""
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device.upper()}"))

    def run(q: Tensor, k: Tensor, v: Tensor, scale: float, fused: bool) -> tuple[Tensor, Tensor]:
        with torch._C._ExcludeDispatchKeyGuard(keys):
            if q.dtype is not torch.float64:
                dtype = torch.get_autocast_dtype(device)
                q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
            return torch.ops.advkd.attention(q, k, v, scale, fused)

    return run


define("attention(Tensor q, Tensor k, Tensor v, float scale, bool fused) -> (Tensor, Tensor)")
define(
    "attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    "float scale, bool fused) -> (Tensor, Tensor, Tensor)"
)
torch.library.impl("advkd::attention", "default", _attention_op)
torch.library.impl("advkd::attention_backward", "default", _attention_backward_op)
torch.library.register_fake("advkd::attention", _attention_fake)
torch.library.register_fake("advkd::attention_backward", _attention_backward_fake)
_library = torch.library.Library("advkd", "FRAGMENT")
_library.impl("attention", _Attention.apply, "Autograd")
_library.impl("attention_backward", _AttentionBackward.apply, "Autograd")
_library.impl("attention", _autocast("cpu"), "AutocastCPU")
_library.impl("attention", _autocast("cuda"), "AutocastCUDA")
