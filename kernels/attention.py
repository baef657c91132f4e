"""Non-causal attention in Triton, forward and backward; two runs agree bit for bit (no atomics).

Forward: Dao, "FlashAttention-2" (2023), algorithm 1. Backward: algorithm 2 there, split into one
kernel for dk and dv (a block of keys walks over the queries) and one for dq (a block of queries
walks over the keys), so that every output element has one writer.

A head dimension that is no power of two is padded by masked loads. One that does not fit (CHUNKED)
is cut: scores are summed over chunks of D that stream from the cache, and a further grid dimension
cuts the output's columns, each part computing the scores again.

In the kernels n counts queries and m keys; all strides arrive in units of 8 elements, because then
the compiler knows that rows begin at 16 bytes, whatever the layout.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from advkd.kernels.compilation import Build
from torch import Tensor

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# The backward kernels read two numbers of each query, in rows that are padded to this many: so
# they begin at 16 bytes and need no masks.
PADDED = tl.constexpr(64)


@triton.jit
def _tile(  # type: ignore[no-untyped-def]
    start, rows, stride, column, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A tile's origin (64 bits), offsets in it (as wide as stride), rows and columns that exist."""
    row = tl.arange(0, ROWS)
    col = tl.arange(0, COLUMNS)
    origin = tl.cast(start, tl.int64) * stride + column
    offsets = row[:, None] * stride + col[None, :]
    return origin, offsets, (start + row < rows)[:, None], (column + col < columns)[None, :]


@triton.jit
def _load(  # type: ignore[no-untyped-def]
    ptr, start, rows, stride, column, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    EVEN_ROWS: tl.constexpr, EVEN_COLUMNS: tl.constexpr,
):  # fmt: skip
    """The tile at (start, column) of a matrix (rows, columns), zero outside of it."""
    origin, offsets, row_in, column_in = _tile(start, rows, stride, column, columns, ROWS, COLUMNS)
    if EVEN_ROWS and EVEN_COLUMNS:
        return tl.load(ptr + origin + offsets)
    elif EVEN_COLUMNS:
        return tl.load(ptr + origin + offsets, mask=row_in, other=0.0)
    elif EVEN_ROWS:
        return tl.load(ptr + origin + offsets, mask=column_in, other=0.0)
    else:
        return tl.load(ptr + origin + offsets, mask=row_in & column_in, other=0.0)


@triton.jit
def _store(  # type: ignore[no-untyped-def]
    ptr, value, start, rows, stride, column, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    EVEN_ROWS: tl.constexpr, EVEN_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Writes a tile where the matrix (rows, columns) has a place for it."""
    # Rows of a result hold all heads, and 128 rows of many heads more than 32 bits count.
    stride = tl.cast(stride, tl.int64)
    origin, offsets, row_in, column_in = _tile(start, rows, stride, column, columns, ROWS, COLUMNS)
    value = value.to(ptr.dtype.element_ty)
    if EVEN_ROWS and EVEN_COLUMNS:
        tl.store(ptr + origin + offsets, value)
    elif EVEN_COLUMNS:
        tl.store(ptr + origin + offsets, value, mask=row_in)
    elif EVEN_ROWS:
        tl.store(ptr + origin + offsets, value, mask=column_in)
    else:
        tl.store(ptr + origin + offsets, value, mask=row_in & column_in)


@triton.jit
def _product(  # type: ignore[no-untyped-def]
    a_ptr, a_start, a_rows, a_stride, b_ptr, b_start, b_rows, b_stride, columns,
    A_ROWS: tl.constexpr, B_ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
    EVEN_ROWS: tl.constexpr, EVEN_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """a b^T of a block of rows of each, (A_ROWS, B_ROWS), summed over chunks of the columns."""
    total = tl.zeros([A_ROWS, B_ROWS], tl.float32)
    for column in range(0, columns, BLOCK_D):
        a = _load(
            a_ptr, a_start, a_rows, a_stride, column, columns, A_ROWS, BLOCK_D, EVEN_ROWS, EVEN_D
        )
        b = _load(
            b_ptr, b_start, b_rows, b_stride, column, columns, B_ROWS, BLOCK_D, EVEN_ROWS, EVEN_D
        )
        total = tl.dot(a, tl.trans(b), total, input_precision=PRECISION)
    return total


@triton.jit
def _program(rows, columns, BLOCK: tl.constexpr, OUT_D: tl.constexpr):  # type: ignore[no-untyped-def]
    """This program's head (of all samples'), first row, and first column of the output.

    The grid has one dimension, because the others end at 65535. Neighbours share a head.
    """
    parts = tl.cdiv(columns, OUT_D)
    blocks = tl.cdiv(rows, BLOCK)
    index = tl.program_id(0)
    block = index // parts
    return block // blocks, block % blocks * BLOCK, index % parts * OUT_D


@triton.jit
def _head(ptr, head, heads, stride_b, stride_h):  # type: ignore[no-untyped-def]
    """Where head `head` (of all samples') of a tensor (B, H, ..., ...) begins."""
    sample = (head // heads).to(tl.int64) * stride_b
    return ptr + (sample + (head % heads).to(tl.int64) * stride_h) * 8


@triton.jit
def _dense_head(ptr, head, heads, rows, columns):  # type: ignore[no-untyped-def]
    """The same for a result, which lies in memory as (B, rows, H, columns)."""
    sample = (head // heads).to(tl.int64) * rows * heads * columns
    return ptr + sample + head % heads * columns


@triton.jit
def _statistics(ptr, head, queries):  # type: ignore[no-untyped-def]
    """Where a head's rows of (lse in units of log 2, delta) begin, and how long they are."""
    padded = tl.cdiv(queries, PADDED) * PADDED
    return ptr + head.to(tl.int64) * 2 * padded, padded


FORWARD_INTEGERS = (
    "q_b", "q_h", "q_n", "k_b", "k_h", "k_m", "v_b", "v_h", "v_m",
    "heads", "queries", "keys", "eighths",
)  # fmt: skip


@triton.jit(do_not_specialize=FORWARD_INTEGERS)
def _forward_kernel(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, q_b, q_h, q_n, k_b, k_h, k_m, v_b, v_h, v_m,
    heads, queries, keys, eighths, scale,
    EVEN_ROWS: tl.constexpr, EVEN_D: tl.constexpr, CHUNKED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, OUT_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """out = softmax(scale q k^T) v and lse = log sum exp(scale q k^T), by the online softmax."""
    dim = eighths * 8
    q_n *= 8
    k_m *= 8
    v_m *= 8
    head, start_n, part = _program(queries, dim, BLOCK_N, OUT_D)
    q_ptr = _head(q_ptr, head, heads, q_b, q_h)
    k_ptr = _head(k_ptr, head, heads, k_b, k_h)
    v_ptr = _head(v_ptr, head, heads, v_b, v_h)
    # Scores are in units of log 2 from here on, so that exp2 serves.
    scale *= LOG2_E

    if not CHUNKED:
        q = _load(q_ptr, start_n, queries, q_n, 0, dim, BLOCK_N, BLOCK_D, EVEN_ROWS, EVEN_D)
    top = tl.full([BLOCK_N], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    acc = tl.zeros([BLOCK_N, OUT_D], tl.float32)
    for start_m in range(0, keys, BLOCK_M):
        if CHUNKED:
            s = _product(
                q_ptr, start_n, queries, q_n, k_ptr, start_m, keys, k_m, dim,
                BLOCK_N, BLOCK_M, BLOCK_D, EVEN_ROWS, EVEN_D, PRECISION,
            )  # fmt: skip
            # After the scores, because registers do not hold it meanwhile.
            v = _load(v_ptr, start_m, keys, v_m, part, dim, BLOCK_M, OUT_D, EVEN_ROWS, EVEN_D)
        else:
            k = _load(k_ptr, start_m, keys, k_m, 0, dim, BLOCK_M, BLOCK_D, EVEN_ROWS, EVEN_D)
            v = _load(v_ptr, start_m, keys, v_m, 0, dim, BLOCK_M, OUT_D, EVEN_ROWS, EVEN_D)
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        s *= scale
        if not EVEN_ROWS:
            s = tl.where((start_m + tl.arange(0, BLOCK_M) < keys)[None, :], s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, axis=1))
        # A row may be -inf so far and finite later; -inf - -inf must not make it NaN.
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        p = tl.exp2(s - shift[:, None])
        decay = tl.exp2(top - shift)
        total = total * decay + tl.sum(p, axis=1)
        acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision=PRECISION)
        top = new_top

    out_ptr = _dense_head(out_ptr, head, heads, queries, dim)
    out = acc / total[:, None]
    _store(
        out_ptr, out, start_n, queries, heads * dim, part, dim, BLOCK_N, OUT_D, EVEN_ROWS, EVEN_D
    )
    if part == 0:
        n = start_n + tl.arange(0, BLOCK_N)
        lse = (top + tl.log2(total)) * LN_2
        tl.store(lse_ptr + head.to(tl.int64) * queries + n, lse, mask=n < queries)


DELTA_INTEGERS = (
    "out_b", "out_h", "out_n", "grad_b", "grad_h", "grad_n", "heads", "queries", "eighths",
)  # fmt: skip


@triton.jit(do_not_specialize=DELTA_INTEGERS)
def _delta_kernel(  # type: ignore[no-untyped-def]
    out_ptr, grad_ptr, lse_ptr, statistics_ptr, out_b, out_h, out_n, grad_b, grad_h, grad_n,
    heads, queries, eighths,
    EVEN_ROWS: tl.constexpr, EVEN_D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Of each query, lse in units of log 2 and delta = the sum of out * grad_out."""
    dim = eighths * 8
    out_n *= 8
    grad_n *= 8
    blocks = tl.cdiv(queries, BLOCK_N)
    head = tl.program_id(0) // blocks
    start = tl.program_id(0) % blocks * BLOCK_N
    out_ptr = _head(out_ptr, head, heads, out_b, out_h)
    grad_ptr = _head(grad_ptr, head, heads, grad_b, grad_h)
    statistics_ptr, padded = _statistics(statistics_ptr, head, queries)
    total = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for column in range(0, dim, BLOCK_D):
        out = _load(
            out_ptr, start, queries, out_n, column, dim, BLOCK_N, BLOCK_D, EVEN_ROWS, EVEN_D
        )
        grad = _load(
            grad_ptr, start, queries, grad_n, column, dim, BLOCK_N, BLOCK_D, EVEN_ROWS, EVEN_D
        )
        total += out.to(tl.float32) * grad.to(tl.float32)
    n = start + tl.arange(0, BLOCK_N)
    lse = tl.load(lse_ptr + head.to(tl.int64) * queries + n, mask=n < queries, other=0.0)
    tl.store(statistics_ptr + n, lse * LOG2_E)
    tl.store(statistics_ptr + padded + n, tl.sum(total, axis=1))


BACKWARD_INTEGERS = (
    "q_b", "q_h", "q_n", "k_b", "k_h", "k_m", "v_b", "v_h", "v_m", "grad_b", "grad_h", "grad_n",
    "heads", "queries", "keys", "eighths",
)  # fmt: skip


@triton.jit(do_not_specialize=BACKWARD_INTEGERS)
def _dkdv_kernel(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr, v_ptr, grad_ptr, statistics_ptr, dk_ptr, dv_ptr,
    q_b, q_h, q_n, k_b, k_h, k_m, v_b, v_h, v_m, grad_b, grad_h, grad_n,
    heads, queries, keys, eighths, scale,
    EVEN_ROWS: tl.constexpr, EVEN_D: tl.constexpr, CHUNKED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, OUT_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dv = p^T grad_out and dk = scale ds^T q, with ds = p (grad_out v^T - delta)."""
    dim = eighths * 8
    q_n *= 8
    k_m *= 8
    v_m *= 8
    grad_n *= 8
    head, start_m, part = _program(keys, dim, BLOCK_M, OUT_D)
    q_ptr = _head(q_ptr, head, heads, q_b, q_h)
    k_ptr = _head(k_ptr, head, heads, k_b, k_h)
    v_ptr = _head(v_ptr, head, heads, v_b, v_h)
    grad_ptr = _head(grad_ptr, head, heads, grad_b, grad_h)
    statistics_ptr, padded = _statistics(statistics_ptr, head, queries)

    if not CHUNKED:
        k = _load(k_ptr, start_m, keys, k_m, 0, dim, BLOCK_M, BLOCK_D, EVEN_ROWS, EVEN_D)
        v = _load(v_ptr, start_m, keys, v_m, 0, dim, BLOCK_M, BLOCK_D, EVEN_ROWS, EVEN_D)
    dk = tl.zeros([BLOCK_M, OUT_D], tl.float32)
    dv = tl.zeros([BLOCK_M, OUT_D], tl.float32)
    for start_n in range(0, queries, BLOCK_N):
        # All blocks here are transposed, (BLOCK_M, BLOCK_N): that spares two transpositions.
        if not CHUNKED:
            q = _load(q_ptr, start_n, queries, q_n, 0, dim, BLOCK_N, BLOCK_D, EVEN_ROWS, EVEN_D)
            grad = _load(
                grad_ptr, start_n, queries, grad_n, 0, dim, BLOCK_N, BLOCK_D, EVEN_ROWS, EVEN_D
            )
        n = start_n + tl.arange(0, BLOCK_N)
        lse = tl.load(statistics_ptr + n)
        delta = tl.load(statistics_ptr + padded + n)
        if CHUNKED:
            s = _product(
                k_ptr, start_m, keys, k_m, q_ptr, start_n, queries, q_n, dim,
                BLOCK_M, BLOCK_N, BLOCK_D, EVEN_ROWS, EVEN_D, PRECISION,
            )  # fmt: skip
            dp = _product(
                v_ptr, start_m, keys, v_m, grad_ptr, start_n, queries, grad_n, dim,
                BLOCK_M, BLOCK_N, BLOCK_D, EVEN_ROWS, EVEN_D, PRECISION,
            )  # fmt: skip
        else:
            s = tl.dot(k, tl.trans(q), input_precision=PRECISION)
            dp = tl.dot(v, tl.trans(grad), input_precision=PRECISION)
        p = tl.exp2(s * (scale * LOG2_E) - lse[None, :])
        ds = p * (dp - delta[None, :])
        if not EVEN_ROWS:
            # Zero times an infinity of k or v is no zero.
            p = tl.where((n < queries)[None, :], p, 0.0)
            ds = tl.where((n < queries)[None, :], ds, 0.0)
        if CHUNKED:
            q = _load(q_ptr, start_n, queries, q_n, part, dim, BLOCK_N, OUT_D, EVEN_ROWS, EVEN_D)
            grad = _load(
                grad_ptr, start_n, queries, grad_n, part, dim, BLOCK_N, OUT_D, EVEN_ROWS, EVEN_D
            )
        dv = tl.dot(p.to(grad.dtype), grad, dv, input_precision=PRECISION)
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)

    dk_ptr = _dense_head(dk_ptr, head, heads, keys, dim)
    dv_ptr = _dense_head(dv_ptr, head, heads, keys, dim)
    row = heads * dim
    _store(dv_ptr, dv, start_m, keys, row, part, dim, BLOCK_M, OUT_D, EVEN_ROWS, EVEN_D)
    _store(dk_ptr, dk * scale, start_m, keys, row, part, dim, BLOCK_M, OUT_D, EVEN_ROWS, EVEN_D)


@triton.jit(do_not_specialize=BACKWARD_INTEGERS)
def _dq_kernel(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr, v_ptr, grad_ptr, statistics_ptr, dq_ptr,
    q_b, q_h, q_n, k_b, k_h, k_m, v_b, v_h, v_m, grad_b, grad_h, grad_n,
    heads, queries, keys, eighths, scale,
    EVEN_ROWS: tl.constexpr, EVEN_D: tl.constexpr, CHUNKED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, OUT_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dq = scale ds k, with ds = p (grad_out v^T - delta)."""
    dim = eighths * 8
    q_n *= 8
    k_m *= 8
    v_m *= 8
    grad_n *= 8
    head, start_n, part = _program(queries, dim, BLOCK_N, OUT_D)
    q_ptr = _head(q_ptr, head, heads, q_b, q_h)
    k_ptr = _head(k_ptr, head, heads, k_b, k_h)
    v_ptr = _head(v_ptr, head, heads, v_b, v_h)
    grad_ptr = _head(grad_ptr, head, heads, grad_b, grad_h)
    n = start_n + tl.arange(0, BLOCK_N)
    statistics_ptr, padded = _statistics(statistics_ptr, head, queries)
    lse = tl.load(statistics_ptr + n)
    delta = tl.load(statistics_ptr + padded + n)

    if not CHUNKED:
        q = _load(q_ptr, start_n, queries, q_n, 0, dim, BLOCK_N, BLOCK_D, EVEN_ROWS, EVEN_D)
        grad = _load(
            grad_ptr, start_n, queries, grad_n, 0, dim, BLOCK_N, BLOCK_D, EVEN_ROWS, EVEN_D
        )
    dq = tl.zeros([BLOCK_N, OUT_D], tl.float32)
    for start_m in range(0, keys, BLOCK_M):
        if CHUNKED:
            s = _product(
                q_ptr, start_n, queries, q_n, k_ptr, start_m, keys, k_m, dim,
                BLOCK_N, BLOCK_M, BLOCK_D, EVEN_ROWS, EVEN_D, PRECISION,
            )  # fmt: skip
            dp = _product(
                grad_ptr, start_n, queries, grad_n, v_ptr, start_m, keys, v_m, dim,
                BLOCK_N, BLOCK_M, BLOCK_D, EVEN_ROWS, EVEN_D, PRECISION,
            )  # fmt: skip
        else:
            k = _load(k_ptr, start_m, keys, k_m, 0, dim, BLOCK_M, BLOCK_D, EVEN_ROWS, EVEN_D)
            v = _load(v_ptr, start_m, keys, v_m, 0, dim, BLOCK_M, BLOCK_D, EVEN_ROWS, EVEN_D)
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            dp = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
        p = tl.exp2(s * (scale * LOG2_E) - lse[:, None])
        ds = p * (dp - delta[:, None])
        if not EVEN_ROWS:
            ds = tl.where((start_m + tl.arange(0, BLOCK_M) < keys)[None, :], ds, 0.0)
        if CHUNKED:
            k = _load(k_ptr, start_m, keys, k_m, part, dim, BLOCK_M, OUT_D, EVEN_ROWS, EVEN_D)
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)

    dq_ptr = _dense_head(dq_ptr, head, heads, queries, dim)
    _store(
        dq_ptr,
        dq * scale,
        start_n,
        queries,
        heads * dim,
        part,
        dim,
        BLOCK_N,
        OUT_D,
        EVEN_ROWS,
        EVEN_D,
    )


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

    def constants(self, queries: int, keys: int, head_dim: int) -> dict[str, int | bool | str]:
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
            "OUT_D": self.out_d, "CHUNKED": self.chunked, "PRECISION": "ieee",
        }  # fmt: skip

    def options(self) -> dict[str, int | bool]:
        """The compiler's options; fusing a product and a sum only spares a rounding."""
        return {
            "num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True,
        }  # fmt: skip


KERNELS = {
    "forward": _forward_kernel,
    "delta": _delta_kernel,
    "dkdv": _dkdv_kernel,
    "dq": _dq_kernel,
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
    dict.fromkeys([*(v for group in _BY_HEAD_DIM.values() for v in group), *_TALL_FORWARD])
)


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
        capability: of the device, as torch.cuda.get_device_capability says. Every variant fits
            every target (99 KB of shared memory, 64 KB on AMD), so nothing depends on it yet.
    """
    batch, heads, queries, _, head_dim = shape
    half = dtype != torch.float32
    if kernel == "forward" and half and batch * heads * queries >= 128 * 128:
        for variant in _TALL_FORWARD:
            if variant.out_d // 2 < head_dim <= variant.out_d and queries >= 1024:
                return variant
    group = _BY_HEAD_DIM[kernel, half]
    return next((v for v in group if head_dim <= v.out_d), group[-1])


def variants() -> list[Build]:
    """What `pick` can pick, each with even and ragged lengths and head dimensions.

    Float16 where the lengths are even and bfloat16 where not, because they differ in conversions
    only.
    """
    return [
        _build(variant, dtype, even_rows, even_d)
        for variant in VARIANTS
        for even_rows in (True, False)
        for dtype in _build_dtypes(variant, even_rows)
        for even_d in (True, False)
    ]


def _build_dtypes(variant: Variant, even_rows: bool) -> list[str]:
    half = "float16" if even_rows else "bfloat16"
    return [half, "float32"] if variant.kernel == "delta" else [half if variant.half else "float32"]


def _build(variant: Variant, dtype: str, even_rows: bool, even_d: bool) -> Build:
    rows = 64 * variant.block_n * max(variant.block_m, 1)
    even = math.lcm(variant.block_d, variant.out_d)
    constants = variant.constants(rows if even_rows else 1, rows, even if even_d else 8)
    kernel = KERNELS[variant.kernel]
    pointer = {"float32": "*fp32", "float16": "*fp16", "bfloat16": "*bf16"}[dtype]
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
    return Build(
        variant=variant.name(),
        edges=f"{dtype}, " + (f"ragged {' and '.join(edges)}" if edges else "even"),
        kernel=kernel,
        types=types,
        constants=constants,
        options=variant.options(),
        # On AMD, with 64 lanes, a tile of 16 columns gives each lane 8 bytes only, and the matrix
        # instructions leave 4 numbers in a lane. Delta is written by one number a thread.
        read_bytes=8 if variant.block_d == 16 else 16,
        write_bytes=4 if delta else 8 if half else 16,
        tensor_cores=half and not delta,
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
    device = tensors[0].device
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    variant = pick(kernel, shape, tensors[0].dtype, capability)
    batch, heads, queries, keys, head_dim = shape
    rows, block = (keys, variant.block_m) if kernel == "dkdv" else (queries, variant.block_n)
    parts = 1 if kernel == "delta" else triton.cdiv(head_dim, variant.out_d)
    grid = (batch * heads * triton.cdiv(rows, block) * parts,)
    scalars = [*numbers, *([] if scale is None else [float(scale)])]
    constants = variant.constants(queries, keys, head_dim)
    with torch.cuda.device_of(tensors[0]):
        KERNELS[kernel][grid](*tensors, *scalars, **constants, **variant.options())


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
