"""What follows a convolution: bias, residual and a factor in one pass, in Triton.

    y = (x + bias + residual) scale

y may be some channels of a wider tensor, so that a concatenation costs no pass of its own. Sums are
float32. It is bound by memory: every element is read and written once.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from advkd.kernels.compilation import POINTERS, Build
from torch import Tensor

_BLOCK, _WARPS = 1024, 4  # elements and warps of a program
INTEGERS = ("count", "channels", "residual_row", "y_row")


@triton.jit(do_not_specialize=INTEGERS)
def bias_residual_kernel(  # type: ignore[no-untyped-def]
    x_ptr, bias_ptr, residual_ptr, y_ptr, count, channels, residual_row, y_row, scale,
    VEC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A block of a dense x; integers arrive divided by VEC, so that the compiler knows VEC elements
    to be neighbors in all tensors."""
    channels *= VEC
    residual_row *= VEC
    y_row *= VEC
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < tl.cast(count, tl.int64) * VEC
    row = at // channels
    channel = at % channels
    y = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + channel, mask=inside, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + row * residual_row + channel, mask=inside, other=0.0)
        y += residual.to(tl.float32)
    y = (y * scale).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + row * y_row + channel, y, mask=inside)


KERNELS = {"bias_residual": bias_residual_kernel}


def bias_residual(
    x: Tensor, bias: Tensor | None, residual: Tensor | None, scale: float, out: Tensor
) -> Tensor:
    """(x + bias + residual) scale, written to `out`, which is returned.

    It reads nothing back from the device and allocates nothing, so a CUDA graph can capture it.

    Args:
        x: (N, C) dense, float32, float16 or bfloat16.
        bias: (C,) dense, of any floating dtype, or None for 0.
        residual: (N, C) of x's dtype with neighboring channels, or None for 0.
        scale: a number.
        out: (N, C) of x's dtype with neighboring channels; may be x.
    """
    rows = [x.shape[1] if t is None else t.stride(0) for t in (x, residual, out)]
    vec = math.gcd(*rows, 16 // x.element_size())
    starts = [t.data_ptr() // t.element_size() for t in (x, residual, out) if t is not None]
    vec = math.gcd(vec, *starts)
    channels, residual_row, y_row = (row // vec for row in rows)
    grid = (triton.cdiv(x.numel(), _BLOCK),)
    if x.numel():
        with torch.cuda.device_of(x):
            KERNELS["bias_residual"][grid](
                x, bias, residual, out, x.numel() // vec, channels, residual_row, y_row,
                float(scale), VEC=vec, BLOCK=_BLOCK, **_OPTIONS,
            )  # fmt: skip
    return out


_OPTIONS = {"num_warps": _WARPS, "num_stages": 1, "enable_fp_fusion": True}


def variants() -> list[Build]:
    """The kernel for float32 and float16, and for bfloat16 with rows that allow no vectors."""
    return [_build(dtype, vec) for dtype, vec in (("float32", 4), ("float16", 8), ("bfloat16", 1))]


def _build(dtype: str, vec: int) -> Build:
    constants = {"VEC": vec, "BLOCK": _BLOCK}
    types = {
        name: ("*fp32" if name == "bias_ptr" else POINTERS[dtype]) if name.endswith("_ptr")
        else "fp32" if name == "scale" else "i32"
        for name in bias_residual_kernel.arg_names if name not in constants
    }  # fmt: skip
    width = vec * (4 if dtype == "float32" else 2)
    return Build(
        "bias_residual", f"{dtype}, {width} bytes", bias_residual_kernel, types, constants,
        _OPTIONS, read_bytes=width, write_bytes=min(width, 8) if dtype == "float16" else width,
    )  # fmt: skip
