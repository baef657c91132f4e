"""Non-causal attention in Triton, forward and backward; two runs agree bit for bit (no atomics).

Forward: Dao, "FlashAttention-2" (2023), algorithm 1. Backward: algorithm 2 there, split into one
kernel for dk and dv (a block of keys walks over the queries) and one for dq (a block of queries
walks over the keys), so that every output element has one writer. A head dimension that does not
fit is cut: scores are summed over its chunks, and a further grid dimension cuts the output's
columns, each part computing the scores again.

Products of float32 are as exact as float32 unless torch.backends.cuda.matmul says "tf32": on
NVIDIA's GPUs the forward multiplies three TF32 parts of each, by tensor cores ("tf32x3").
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
from advkd.kernels.attention_device import (
    PADDED,
    attention_delta_kernel,
    attention_dkdv_kernel,
    attention_dq_kernel,
    attention_forward_kernel,
)
from advkd.kernels.compilation import POINTERS, Build, capability_of
from torch import Tensor


@dataclass(frozen=True)
class Variant:
    """One way to launch a kernel: what it is compiled for besides ragged edges and the dtype."""

    kernel: str  # "forward", "delta", "dkdv" or "dq"
    half: bool  # for float16 and bfloat16, or for float32 (delta: for any of them)
    block_n: int  # queries of a tile, a divisor of PADDED in the backward
    block_m: int  # keys of a tile (delta: 0, it has none)
    block_d: int  # columns of q and k of a tile
    out_d: int  # columns of the output that a program makes
    chunked: bool  # whether the scores are summed over chunks of block_d columns
    num_warps: int
    num_stages: int

    def name(self) -> str:
        """E.g. "attention forward half 64x64x64": dtype, queries x keys x columns of a tile."""
        if self.kernel == "delta":
            return f"attention delta {self.block_n}x{self.block_d}"
        dtype = "half" if self.half else "float32"
        columns = f"{self.block_d} of {self.out_d}" if self.chunked else str(self.block_d)
        return f"attention {self.kernel} {dtype} {self.block_n}x{self.block_m}x{columns}"

    def constants(
        self, queries: int, keys: int, head_dim: int, precision: str = "ieee"
    ) -> dict[str, int | bool | str]:
        """The compile-time arguments for these lengths; masks are only where one is ragged."""
        even_rows = queries % self.block_n == 0
        constants: dict[str, int | bool | str] = {
            "EVEN_D": head_dim % self.block_d == 0 and head_dim % self.out_d == 0,
            "BLOCK_N": self.block_n, "BLOCK_D": self.block_d,
        }  # fmt: skip
        if self.kernel == "delta":
            return constants | {"EVEN_ROWS": even_rows}
        return constants | {
            "EVEN_ROWS": even_rows and keys % self.block_m == 0, "BLOCK_M": self.block_m,
            "OUT_D": self.out_d, "CHUNKED": self.chunked, "PRECISION": precision,
        }  # fmt: skip

    def options(self) -> dict[str, int | bool]:
        """The compiler's options; fusing a product and a sum only spares a rounding."""
        return {
            "num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True,
        }  # fmt: skip


KERNELS = {
    "forward": attention_forward_kernel,
    "delta": attention_delta_kernel,
    "dkdv": attention_dkdv_kernel,
    "dq": attention_dq_kernel,
}

# The first whose output holds the head dimension is taken, the last also for larger ones.
_HALF_FORWARD = (
    Variant("forward", True, 64, 64, 16, 16, False, 4, 2),
    Variant("forward", True, 64, 128, 32, 32, False, 4, 2),
    Variant("forward", True, 64, 64, 64, 64, False, 4, 2),
    Variant("forward", True, 64, 32, 128, 128, False, 4, 2),
    Variant("forward", True, 64, 32, 128, 256, True, 8, 2),
)
_HALF_DKDV = (
    Variant("dkdv", True, 32, 64, 16, 16, False, 4, 2),
    Variant("dkdv", True, 32, 64, 32, 32, False, 4, 2),
    Variant("dkdv", True, 32, 64, 64, 64, False, 4, 2),
    Variant("dkdv", True, 32, 64, 128, 128, False, 4, 2),
    Variant("dkdv", True, 16, 64, 128, 256, True, 8, 2),
)
_HALF_DQ = (
    Variant("dq", True, 64, 64, 16, 16, False, 4, 2),
    Variant("dq", True, 64, 64, 32, 32, False, 4, 2),
    Variant("dq", True, 64, 64, 64, 64, False, 4, 2),
    Variant("dq", True, 64, 32, 128, 128, False, 4, 2),
    Variant("dq", True, 64, 32, 64, 256, True, 8, 2),
)
_FLOAT_FORWARD = (
    Variant("forward", False, 32, 32, 16, 16, False, 4, 2),
    Variant("forward", False, 32, 32, 32, 32, False, 4, 2),
    Variant("forward", False, 32, 32, 64, 64, False, 4, 2),
    Variant("forward", False, 32, 16, 128, 128, False, 8, 2),
    Variant("forward", False, 32, 32, 32, 256, True, 8, 2),
)
_FLOAT_DKDV = (
    Variant("dkdv", False, 32, 32, 16, 16, False, 4, 2),
    Variant("dkdv", False, 32, 32, 32, 32, False, 4, 2),
    Variant("dkdv", False, 32, 32, 64, 64, False, 4, 2),
    Variant("dkdv", False, 16, 32, 32, 128, True, 8, 2),
    Variant("dkdv", False, 32, 32, 32, 256, True, 8, 2),
)
_FLOAT_DQ = (
    Variant("dq", False, 32, 32, 16, 16, False, 4, 2),
    Variant("dq", False, 32, 16, 32, 32, False, 4, 2),
    Variant("dq", False, 32, 32, 64, 64, False, 4, 2),
    Variant("dq", False, 32, 16, 128, 128, False, 8, 2),
    Variant("dq", False, 32, 32, 32, 256, True, 8, 2),
)
# Of large heads: q stays in shared memory, or, of float32, taller tiles read k and v half as often.
# Masks would take the registers that these tiles need, and so would three parts before Hopper.
_WHOLE_FORWARD = Variant("forward", True, 64, 32, 256, 256, False, 4, 2)
_TF32_FORWARD = Variant("forward", False, 64, 64, 64, 256, True, 8, 2)
_TF32X3_FORWARD = Variant("forward", False, 64, 32, 32, 256, True, 8, 2)
_HOPPER = (9, 0)
_SPILLS = (_FLOAT_DKDV[1], "tf32")  # on Blackwell, with masks
# Many queries fill the machine even in taller tiles, which read k and v half as often.
_TALL_FORWARD = (
    Variant("forward", True, 128, 32, 64, 64, False, 8, 2),
    Variant("forward", True, 128, 32, 128, 128, False, 8, 2),
)
_DELTA = (
    Variant("delta", True, 64, 0, 16, 16, False, 4, 1),
    Variant("delta", True, 64, 0, 64, 64, False, 4, 1),
)
_BY_HEAD_DIM = {
    ("forward", True): _HALF_FORWARD,
    ("dkdv", True): _HALF_DKDV,
    ("dq", True): _HALF_DQ,
    ("forward", False): _FLOAT_FORWARD,
    ("dkdv", False): _FLOAT_DKDV,
    ("dq", False): _FLOAT_DQ,
    ("delta", True): _DELTA,
    ("delta", False): _DELTA,
}

VARIANTS: tuple[Variant, ...] = tuple(
    dict.fromkeys(
        [
            *(v for group in _BY_HEAD_DIM.values() for v in group),
            *(*_TALL_FORWARD, _WHOLE_FORWARD, _TF32_FORWARD, _TF32X3_FORWARD),
        ]
    )
)


def precision_of(kernel: str, dtype: torch.dtype, capability: tuple[int, int]) -> str:
    """How a kernel multiplies, in Triton's words: "ieee", "tf32x3" or "tf32"."""
    if dtype != torch.float32 or capability < (8, 0) or torch.version.hip:
        return "ieee"
    if torch.backends.cuda.matmul.fp32_precision == "tf32":
        return "tf32"
    return "tf32x3" if kernel == "forward" else "ieee"


def pick(
    kernel: str,
    shape: tuple[int, int, int, int, int],
    dtype: torch.dtype,
    capability: tuple[int, int],
) -> Variant:
    """The variant for a call, the same at run time and ahead of time.

    Args:
        kernel: a key of KERNELS.
        shape: (B, H, N, M, D).
        dtype: of q, k and v.
        capability: of the device, as torch.cuda.get_device_capability says. Variants fit every
            target (99 KB of shared memory, 64 KB on AMD), but for those of one precision.
    """
    half, head_dim = dtype != torch.float32, shape[4]
    precision = precision_of(kernel, dtype, capability)
    if kernel == "forward":
        of_shape = _half_forward(shape) if half else _float_forward(shape, precision, capability)
        if of_shape is not None:
            return of_shape
    group = [v for v in _BY_HEAD_DIM[kernel, half] if (v, precision) != _SPILLS]
    return next((v for v in group if head_dim <= v.out_d), group[-1])


def _half_forward(shape: tuple[int, int, int, int, int]) -> Variant | None:
    """A forward of half precision for large heads, or for many queries."""
    batch, heads, queries, keys, head_dim = shape
    if 128 < head_dim <= 256 and queries % 64 == 0 and keys % 32 == 0:
        return _WHOLE_FORWARD
    if batch * heads * queries < 128 * 128 or queries < 1024:
        return None
    return next((v for v in _TALL_FORWARD if v.out_d // 2 < head_dim <= v.out_d), None)


def _float_forward(
    shape: tuple[int, int, int, int, int], precision: str, capability: tuple[int, int]
) -> Variant | None:
    """A forward of float32 for the tensor cores, where they have one of their own."""
    _, _, queries, keys, head_dim = shape
    if precision == "tf32" and 32 < head_dim != 64:
        return _TF32_FORWARD if head_dim > 128 else _FLOAT_FORWARD[3]
    even = queries % 64 == 0 and keys % 32 == 0 and head_dim == 256
    if precision == "tf32x3" and even and capability >= _HOPPER:
        return _TF32X3_FORWARD
    return None


def variants() -> list[Build]:
    """What `pick` can pick, each with even and ragged lengths and head dimensions.

    Float16 where the lengths are even and bfloat16 where not, because they differ in conversions
    only.
    """
    return [
        _build(variant, dtype, precision, even_rows, even_d)
        for variant in VARIANTS
        for even_rows in (True, False)
        for dtype in _build_dtypes(variant, even_rows)
        for precision in _build_precisions(variant, dtype)
        for even_d in (True, False)
        if _is_picked(variant, precision, even_rows, even_d)
    ]


def _is_picked(variant: Variant, precision: str, even_rows: bool, even_d: bool) -> bool:
    """Whether `pick` can pick it for lengths and a head dimension that are even, or not."""
    if variant in (_WHOLE_FORWARD, _TF32X3_FORWARD):
        return even_rows and (even_d or variant == _WHOLE_FORWARD)
    if (variant, precision) == _SPILLS:
        return False
    return not (precision == "tf32" and variant == _FLOAT_FORWARD[2] and not even_d)


def _build_precisions(variant: Variant, dtype: str) -> tuple[str, ...]:
    if dtype != "float32" or variant.kernel == "delta":
        return ("ieee",)
    if variant in (_TF32_FORWARD, _TF32X3_FORWARD):
        return ("tf32",) if variant == _TF32_FORWARD else ("tf32x3",)
    if variant == _FLOAT_FORWARD[-1]:
        return ("ieee", "tf32x3")
    return ("ieee", "tf32", "tf32x3") if variant.kernel == "forward" else ("ieee", "tf32")


def _build_dtypes(variant: Variant, even_rows: bool) -> list[str]:
    half = "float16" if even_rows else "bfloat16"
    return [half, "float32"] if variant.kernel == "delta" else [half if variant.half else "float32"]


def _build(variant: Variant, dtype: str, precision: str, even_rows: bool, even_d: bool) -> Build:
    rows = 64 * variant.block_n * max(variant.block_m, 1)
    even = math.lcm(variant.block_d, variant.out_d)
    constants = variant.constants(rows if even_rows else 1, rows, even if even_d else 8, precision)
    kernel = KERNELS[variant.kernel]
    pointer = POINTERS[dtype]
    types = {
        name: "*fp32" if name in ("lse_ptr", "statistics_ptr")
        else pointer if name.endswith("_ptr")
        else "fp32" if name == "scale"
        else "i32"
        for name in kernel.arg_names if name not in constants
    }  # fmt: skip
    edges = [
        word for word, even in (("lengths", even_rows), ("head dimension", even_d)) if not even
    ]
    delta, half = variant.kernel == "delta", dtype != "float32"
    by_parts = "" if precision == "ieee" else f" as {precision}"
    return Build(
        variant=variant.name(),
        edges=f"{dtype}{by_parts}, " + (f"ragged {' and '.join(edges)}" if edges else "even"),
        kernel=kernel,
        types=types,
        constants=constants,
        options=variant.options(),
        # On AMD, with 64 lanes, a tile of 16 columns gives each lane 8 bytes only, and the matrix
        # instructions leave 4 numbers in a lane. Delta is written by one number a thread.
        read_bytes=8 if variant.block_d == 16 else 16,
        write_bytes=4 if delta else 8 if half else 16,
        tensor_cores=not delta and (half or precision != "ieee"),
        nvidia=0 if precision == "ieee" else 90 if variant == _TF32X3_FORWARD else 80,
    )


def supports(head_dim: int, dtype: torch.dtype) -> str | None:
    """Why the kernels do not take this head dimension or dtype, as a clause; None if they do."""
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"the Triton kernel takes float32, float16 and bfloat16, not {dtype}"
    if head_dim % 8 or not 8 <= head_dim <= 512:
        return f"the Triton kernel takes head dimensions 8, 16, ..., 512, not {head_dim}"
    return None


def _readable(x: Tensor) -> Tensor:
    """x, or a copy of it whose rows begin at 16 bytes and do not lie too far apart for 32 bits."""
    strides = [x.stride(i) for i in range(3) if x.shape[i] > 1]
    fits = x.stride(3) == 1 and x.data_ptr() % 16 == 0
    fits = fits and all(stride % 8 == 0 for stride in strides) and x.stride(2) < 1 << 24
    return x if fits else x.clone(memory_format=torch.contiguous_format)


def _check(head_dim: int, *tensors: Tensor) -> None:
    """What the kernels would take without a word and get wrong; the op checks the shapes."""
    dtype = tensors[0].dtype
    if reason := supports(head_dim, dtype):
        raise ValueError(f"Attention cannot run, because {reason}.")
    for x in tensors:
        if x.dtype != dtype:
            raise TypeError(f"The Triton kernel takes one dtype, not {dtype} and {x.dtype}.")


def _strides(x: Tensor) -> list[int]:
    return [x.stride(i) // 8 for i in range(3)]


def _empty_rows(x: Tensor) -> Tensor:
    """An unwritten tensor of x's shape (B, H, rows, D) that lies in memory as (B, rows, H, D)."""
    batch, heads, rows, head_dim = x.shape
    return torch.empty(batch, rows, heads, head_dim, dtype=x.dtype, device=x.device).transpose(1, 2)


def _launch(
    kernel: str, shape: tuple[int, int, int, int, int], tensors: list[Tensor], numbers: list[int],
    scale: float | None = None,
) -> None:  # fmt: skip
    """Runs a kernel on (pointers, strides and lengths, scale) with the picked variant."""
    capability, dtype = capability_of(tensors[0].device), tensors[0].dtype
    precision = precision_of(kernel, dtype, capability)
    grid, options = _grid_and_options(kernel, shape, dtype, capability, precision)
    scalars = [*numbers, *([] if scale is None else [float(scale)])]
    with torch.cuda.device_of(tensors[0]):
        KERNELS[kernel][grid](*tensors, *scalars, **options)


@lru_cache(maxsize=1024)
def _grid_and_options(
    kernel: str, shape: tuple[int, int, int, int, int], dtype: torch.dtype,
    capability: tuple[int, int], precision: str,
) -> tuple[tuple[int], dict[str, Any]]:  # fmt: skip
    """The grid of a launch, its compile-time arguments, and the compiler's options."""
    variant = pick(kernel, shape, dtype, capability)
    batch, heads, queries, keys, head_dim = shape
    rows, block = (keys, variant.block_m) if kernel == "dkdv" else (queries, variant.block_n)
    parts = 1 if kernel == "delta" else triton.cdiv(head_dim, variant.out_d)
    grid = (batch * heads * triton.cdiv(rows, block) * parts,)
    constants = variant.constants(queries, keys, head_dim, precision)
    return grid, constants | variant.options()


def forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """softmax(scale q k^T) v, with scores and sums in float32.

    Args:
        q: (B, H, N, D) float32, float16 or bfloat16, any strides; D as `supports` says.
        k, v: (B, H, M, D) of q's dtype, M >= 1, any strides.

    Returns:
        out: (B, H, N, D) of q's dtype, in memory as (B, N, H, D).
        lse: (B, H, N) float32, the natural logarithm of the sum of exp(scale q k^T).

    Raises:
        ValueError, TypeError: for a head dimension or dtypes that the kernels do not take.
    """
    _check(q.shape[3], q, k, v)
    q, k, v = _readable(q), _readable(k), _readable(v)
    batch, heads, queries, head_dim = q.shape
    keys = k.shape[2]
    out = _empty_rows(q)
    lse = torch.empty(batch, heads, queries, dtype=torch.float32, device=q.device)
    if out.numel():
        numbers = [*_strides(q), *_strides(k), *_strides(v), heads, queries, keys, head_dim // 8]
        shape = (batch, heads, queries, keys, head_dim)
        _launch("forward", shape, [q, k, v, out, lse], numbers, scale)
    return out, lse


def backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `forward`'s out with respect to q, k and v; the same bits in every run.

    Args:
        grad_out: (B, H, N, D) of q's dtype, any strides.
        q, k, v, scale: as for `forward`; out, lse: what it returned.

    Returns:
        (dq, dk, dv), of the shapes and dtype of q, k and v, each in memory as (B, rows, H, D).

    Raises:
        ValueError, TypeError: for a head dimension or dtypes that the kernels do not take.
    """
    _check(q.shape[3], q, k, v, grad_out, out)
    q, k, v, grad_out, out = (_readable(x) for x in (q, k, v, grad_out, out))
    lse = lse.float().contiguous()
    batch, heads, queries, head_dim = q.shape
    keys = k.shape[2]
    dq, dk, dv = _empty_rows(q), _empty_rows(k), _empty_rows(v)
    if not q.numel():
        return dq, dk.zero_(), dv.zero_()
    shape = (batch, heads, queries, keys, head_dim)
    padded = triton.cdiv(queries, PADDED.value) * PADDED.value
    statistics = torch.empty(batch * heads, 2, padded, dtype=torch.float32, device=q.device)
    numbers = [*_strides(out), *_strides(grad_out), heads, queries, head_dim // 8]
    _launch("delta", shape, [out, grad_out, lse, statistics], numbers)
    numbers = [s for x in (q, k, v, grad_out) for s in _strides(x)]
    numbers += [heads, queries, keys, head_dim // 8]
    read = [q, k, v, grad_out, statistics]
    _launch("dkdv", shape, [*read, dk, dv], numbers, scale)
    _launch("dq", shape, [*read, dq], numbers, scale)
    return dq, dk, dv
