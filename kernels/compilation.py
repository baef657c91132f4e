"""What a Triton kernel is compiled for: the same words at run time and ahead of time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

# How Triton calls pointers to elements of a dtype.
POINTERS = {"float32": "*fp32", "float16": "*fp16", "bfloat16": "*bf16"}


@lru_cache(maxsize=64)
def capability_of(device: torch.device) -> tuple[int, int]:
    """As torch.cuda.get_device_capability says; (0, 0) off CUDA, where Triton interprets."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


@dataclass(frozen=True)
class Build:
    """One kernel as the compiler gets it, and what is expected of the result.

    A variant (tile sizes and warps, what a heuristic picks) has a build for each dtype, and for
    even and ragged edges, as far as these make other code. `kernels/variants.py` lists all of
    them, and `tests/kernels/aot.py` compiles and checks each.
    """

    variant: str  # the variant's name, e.g. "attention forward half 64x64x128": a row of the table
    edges: str  # what distinguishes the builds of one variant, e.g. "float16, ragged"
    kernel: Any  # the JITFunction
    types: Mapping[str, str]  # of the run-time arguments: "*fp16", "i32", "fp32", ...
    constants: Mapping[str, Any]  # the compile-time arguments, None for a pointer that is not there
    options: Mapping[str, int | bool]  # num_warps, num_stages, enable_fp_fusion
    # Bytes of the widest accesses that the rows it reads and writes allow, and it has to reach.
    # Every pointer is taken to be at 16 bytes, as the launchers see to.
    read_bytes: int = 16
    write_bytes: int = 16
    tensor_cores: bool = False  # whether it has to multiply matrices by tensor cores
    nvidia: int = 0  # only for NVIDIA's GPUs of this compute capability (80, 90) or later
