"""The fused ops, each beside its plain reference in torch, and the choice between the two.

Every op takes `backend`: "reference" (plain torch), "fused" (C++ on the CPU, Triton on CUDA; a
ValueError where that does not exist) or None, which follows the environment variable ADVKD_OPS
and otherwise uses the fused op wherever it exists. `use_backend` changes that for a while.
"""

from __future__ import annotations

import torch

from advkd.kernels import unavailable_reason as triton_missing
from advkd.ops import _backend
from advkd.ops._attention import attention
from advkd.ops._backend import BACKENDS, extension, use_backend
from advkd.ops._conv3x3 import conv3x3
from advkd.ops._cuda import cuda_code_missing, cuda_missing
from advkd.ops._group_norm_silu import group_norm_silu
from advkd.ops._noise import (
    LABEL_STEP,
    X_T_STEP,
    philox_labels,
    philox_normal,
    philox_uint32,
)
from advkd.ops._sampling_step import sampling_step

__all__ = [
    "BACKENDS",
    "LABEL_STEP",
    "X_T_STEP",
    "attention",
    "conv3x3",
    "cuda_code_missing",
    "cuda_missing",
    "describe",
    "extension",
    "group_norm_silu",
    "philox_labels",
    "philox_normal",
    "philox_uint32",
    "sampling_step",
    "use_backend",
]


def describe() -> list[tuple[str, str, str]]:
    """Which backend serves each op by default: (op, backend, why not another; may be empty)."""
    asked = _backend.asked_reference()
    extension = _backend.extension
    reason = asked or _backend.extension_missing
    serving = f"fused, C++ ({extension.isa()})" if extension and not reason else "reference, torch"
    rows = [
        (op, serving, reason or "")
        for op in (
            "philox_uint32",
            "philox_normal",
            "sampling_step",
            "group_norm_silu",
            "attention",
            "conv3x3",
        )
    ]
    no_gpu = None if torch.cuda.is_available() else "torch sees no CUDA device"
    triton_reason = asked or triton_missing()
    rows += [
        (
            f"{op} on CUDA",
            "reference, torch" if triton_reason else "fused, Triton",
            "; ".join(filter(None, (triton_reason, limit, no_gpu))),
        )
        for op, limit in (("group_norm_silu", None), ("attention", None))
    ]
    loop_missing = asked or cuda_missing()
    rows.append(
        (
            "sampling loop on CUDA",
            "plain, torch" if loop_missing else "fused, C++ over a CUDA graph",
            loop_missing or "",
        )
    )
    rows.append(("other ops on CUDA", "reference, torch", "no fused kernel exists for them"))
    return rows
