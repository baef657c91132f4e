"""The device code of `attention`: FlashAttention-2 in Triton, forward and backward.

n counts queries and m keys; all strides arrive in units of 8 elements, because then the compiler
knows that rows begin at 16 bytes, whatever the layout. A head dimension that is no power of two is
padded by masked loads; of one that does not fit (CHUNKED), chunks stream from the cache.
"""

from __future__ import annotations

import triton
import triton.language as tl

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

    The grid has one dimension, because the others end at 65535. Neighbors share a head.
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
def attention_forward_kernel(  # type: ignore[no-untyped-def]
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
def attention_delta_kernel(  # type: ignore[no-untyped-def]
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
def attention_dkdv_kernel(  # type: ignore[no-untyped-def]
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
def attention_dq_kernel(  # type: ignore[no-untyped-def]
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
