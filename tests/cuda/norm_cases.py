"""Shapes and inputs of GroupNorm-SiLU, and what its result may be off by, emulated or on a GPU."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from advkd.ops import reference

EPS = 1e-5
LAYOUTS = [torch.contiguous_format, torch.channels_last]
TYPES = [torch.float32, torch.float16, torch.bfloat16]
# (B, C, H, W), groups: whole vectors; vectors that two groups share; odd sides and sizes of groups,
# that go element by element; one pixel; groups that fill several warps; one group of everything.
SHAPES = [
    ((2, 32, 8, 8), 8), ((2, 16, 16, 16), 4), ((1, 24, 6, 6), 2), ((2, 12, 7, 5), 4),
    ((3, 6, 3, 3), 2), ((2, 8, 1, 1), 2), ((1, 64, 4, 4), 1), ((2, 5, 4, 4), 5), ((2, 24, 5, 5), 4),
]  # fmt: skip
# Too large for a block of threads: aligned and not.
LARGE = [((1, 16, 80, 80), 2), ((1, 6, 75, 75), 2), ((2, 4, 96, 96), 1)]


def inputs(
    shape: tuple[int, ...], dtype: torch.dtype, memory_format: torch.memory_format, given: str,
    mean: float = 0.0, std: float = 1.0,
) -> tuple[Tensor, list[Tensor | None]]:  # fmt: skip
    generator = torch.Generator().manual_seed(sum(shape))
    x = torch.randn(shape, generator=generator) * std + mean
    B, C = shape[:2]
    sizes = {"w": (C,), "b": (C,), "s": (B, C), "t": (B, C)}
    found = [torch.randn(size, generator=generator) for size in sizes.values()]
    parameters = [p if name in given else None for name, p in zip(sizes, found, strict=True)]
    return x.to(dtype).contiguous(memory_format=memory_format), parameters


def worst(y: Tensor, x: Tensor, parameters: list[Tensor | None], groups: int, silu: bool) -> float:
    """The largest error over what it may be: a rounding to the dtype and 16 + sqrt(count) ones to
    float32 of the sum of the terms' absolute values, as for the Triton kernel."""
    wide = [None if p is None else p.double() for p in parameters]
    exact = reference.group_norm_silu(x.double(), *wide, groups, EPS, silu)
    terms = [None if p is None else p.abs() for p in wide]
    B, C = x.shape[:2]
    grouped = x.double().reshape(B, groups, -1)
    var, mean = torch.var_mean(grouped, dim=2, correction=0, keepdim=True)
    z = ((grouped - mean) * (var + EPS).rsqrt()).abs().reshape(x.shape)
    weight, bias, scale, shift = (None if p is None else p.reshape(-1, C, 1, 1) for p in terms)
    z = z * (1 if weight is None else weight) + (0 if bias is None else bias)
    z = z * (1 if scale is None else 1 + scale) + (0 if shift is None else shift)
    unit = torch.finfo(x.dtype).eps / 2
    roundings = 2.0**-24 * (16 + math.sqrt(grouped.shape[2]))
    bound = unit * (exact.abs() + torch.finfo(x.dtype).tiny) + roundings * (1 + z) * 1.1
    error = (y.double() - exact).abs() / bound
    return float(error.nan_to_num(math.inf).max())
