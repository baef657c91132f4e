"""A call of every op, forward and backward: what the tests that hold for all of them run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from advkd import ops
from advkd.ops import registered

# op -> (run, the floating tensors it takes); run gives a tuple of results for the same tensors.
Case = tuple[Callable[..., tuple[Tensor, ...]], list[Tensor]]


def normals(*sizes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Repeatable normals on the CPU, channels_last where they have four dimensions."""
    generator = torch.Generator(device="cpu").manual_seed(11)
    made = [torch.randn(s, generator=generator, dtype=torch.float64, device="cpu") for s in sizes]
    return [
        t.to(dtype, memory_format=torch.channels_last) if t.dim() == 4 else t.to(dtype)
        for t in made
    ]


def cases(backend: str | None, dtype: torch.dtype = torch.float32) -> dict[str, Case]:
    """The cases by op; those without floating tensors take none."""
    indices = torch.arange(2, dtype=torch.int64, device="cpu")
    kind: dict[str, Any] = {"backend": backend}
    step: dict[str, Any] = {"clip": 1.0, "seed": 3, "image_index": indices, "step": 4, **kind}

    def group_norm_silu(x: Tensor, w: Tensor, b: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return ops.group_norm_silu(x, w, b, 2, 1e-5, "silu", scale, shift, **kind)

    found: dict[str, Case] = {
        "philox_uint32": (lambda: (ops.philox_uint32(3, indices, 4, 9, **kind),), []),
        "philox_normal": (lambda: (ops.philox_normal(3, indices, 4, (3, 5, 7), **kind),), []),
        "sampling_step": (
            lambda x, m: ops.sampling_step(x, m, (1.1, -0.4, 0.9, 0.3, -0.1, 0.2), **step),
            normals((2, 3, 5, 4), (2, 3, 5, 4), dtype=dtype),
        ),
        "group_norm_silu": (
            lambda *tensors: (group_norm_silu(*tensors),),
            normals((2, 8, 5, 3), (8,), (8,), (2, 8), (2, 8), dtype=dtype),
        ),
        "attention": (
            lambda q, k, v: (ops.attention(q, k, v, **kind),),
            normals((2, 2, 5, 8), (2, 2, 7, 8), (2, 2, 7, 8), dtype=dtype),
        ),
        "conv3x3": (
            lambda x, w, b: (ops.conv3x3(x, w, b, **kind),),
            normals((2, 4, 6, 5), (3, 4, 3, 3), (3,), dtype=dtype),
        ),
        "normed_conv3x3": (
            lambda x, w, b, *rest: (ops.normed_conv3x3(x, w, b, 2, 1e-5, *rest, **kind),),
            normals(
                (2, 4, 6, 5), (4,), (4,), (3, 4, 3, 3), (3,), (2, 3), (2, 3, 6, 5), dtype=dtype
            ),
        ),
    }
    made = {"normed_conv3x3"}  # of other ops, and none of its own
    assert set(found) - made == {op.name for op in registered() if not op.derived}
    return found


NAMES = tuple(cases(None))
