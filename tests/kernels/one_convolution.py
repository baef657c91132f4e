"""A convolution as a plan of one step, for the tests of every algorithm: its numbers, its exact
result by torch, and a run of it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Geometry = tuple[int, int, int, int, bool]  # kernel, stride, padding before, after, upsampled


def numbers_of(
    sizes: tuple[int, int, int, int, int], geometry: Geometry, silu: bool, gap: int
) -> dict[str, int]:
    """What a step says of its sizes (B, H, W, C, D) and of where it reads, behind `gap` channels of
    buffer 0, and writes, buffer 1; the bias comes first among the weights."""
    (_, H, W, C, D), (kernel, stride, before, after, upsample) = sizes, geometry
    return {
        "height": H, "width": W, "in_channels": C, "out_channels": D, "kernel": kernel,
        "stride": stride, "pad_before": before, "pad_after": after, "upsample": int(upsample),
        "silu": int(silu), "bias": 0, "x": 0, "x_channel": gap, "y": 1, "y_channel": 0,
    }  # fmt: skip


def convolved(x: Tensor, weight: Tensor, geometry: Geometry, bias: Tensor | None = None) -> Tensor:
    """x (B, H, W, C) float64 convolved, (B, H', W', D)."""
    _, stride, before, after, upsample = geometry
    x = x.permute(0, 3, 1, 2)
    if upsample:
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
    x = F.pad(x, (before, after, before, after))
    return F.conv2d(x, weight.double(), bias, stride).permute(0, 2, 3, 1)


def carried_out(plan: Any, x: Tensor, shape: torch.Size, threads: int) -> Tensor:
    """The result of a plan for images x, each of `shape`; NaN where nothing was written."""
    x = x.contiguous()
    y = torch.full((x.shape[0], *shape), float("nan"))
    plan.run(
        x=x.data_ptr(), y=y.data_ptr(), conditioning=0, labels=0, images=x.shape[0],
        threads=threads, nan_fill=True,
    )  # fmt: skip
    return y
