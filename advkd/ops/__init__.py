"""The fused ops, each beside its reference in plain torch, and the choice between the two.

Every op takes `backend`: "reference" (plain torch), "fused" (C++ on the CPU, Triton on CUDA; a
ValueError where that does not exist) or None, which follows the environment variable ADVKD_OPS
and otherwise uses the fused op wherever it exists. `use_backend` changes that for a while.
Forward-mode AD and the transforms of torch.func (jvp, grad, vmap, ...) run the references.
"""

from __future__ import annotations

from advkd.ops import _backend, _registry
from advkd.ops._address import address, addresses
from advkd.ops._attention import attention
from advkd.ops._backend import BACKENDS, extension, use_backend
from advkd.ops._conv3x3 import conv3x3
from advkd.ops._cuda import cuda_code_missing, cuda_missing
from advkd.ops._group_norm_silu import group_norm_silu
from advkd.ops._noise import (
    LABEL_STEP,
    X_T_STEP,
    check_seed,
    philox_labels,
    philox_normal,
    philox_uint32,
)
from advkd.ops._normed_conv3x3 import normed_conv3x3
from advkd.ops._registry import Kernel, register, registered
from advkd.ops._sampling_step import sampling_step

__all__ = [
    "BACKENDS",
    "LABEL_STEP",
    "X_T_STEP",
    "Kernel",
    "address",
    "addresses",
    "attention",
    "check_seed",
    "conv3x3",
    "cuda_code_missing",
    "cuda_missing",
    "describe",
    "extension",
    "group_norm_silu",
    "normed_conv3x3",
    "philox_labels",
    "philox_normal",
    "philox_uint32",
    "register",
    "registered",
    "sampling_step",
    "use_backend",
]


def describe() -> list[tuple[str, str, str]]:
    """Which backend serves each op by default: (op, backend, why not another; may be empty)."""
    missing = _backend.asked_reference() or cuda_missing()
    loop = "eager, torch" if missing else "fused, C++ over a CUDA graph"
    return [
        *_registry.rows(),
        ("sampling loop on CUDA", loop, missing or ""),
        ("other ops on CUDA", "reference, torch", "no fused kernel exists for them"),
    ]
