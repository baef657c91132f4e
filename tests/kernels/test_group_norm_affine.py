"""GroupNorm as a scale and shift of every channel, as the engine's plans apply it."""

from __future__ import annotations

import pytest
import torch

from advkd import ops

pytestmark = pytest.mark.skipif(ops.extension is None, reason="the C++ extension is not installed")


@pytest.mark.parametrize("mean", [0.0, 1e4])
@pytest.mark.parametrize(
    ("channels", "groups", "pixels"),
    [(1, 1, 1), (8, 4, 9), (24, 2, 35), (128, 32, 64), (96, 1, 49), (200, 25, 300), (144, 12, 5)],
)
def test_it_equals_float64(isa: str, channels: int, groups: int, pixels: int, mean: float) -> None:
    assert ops.extension is not None
    torch.manual_seed(channels)
    x = torch.randn(3, pixels, channels) + mean
    weight, bias = torch.randn(channels), torch.randn(channels)
    weights = torch.cat([weight, bias, torch.eye(channels).reshape(-1), torch.zeros(16 * channels)])
    sizes = ((3, pixels, 1, channels, channels), 1, 1, 0, 0, False)
    _, size = ops.extension.convolution_plan(*sizes, 1)
    packed = torch.zeros(2 * channels + size)
    packed[: 2 * channels] = weights[: 2 * channels]
    identity = torch.eye(channels).contiguous()
    at = packed[2 * channels :]
    ops.extension.convolution_pack(*sizes, identity.data_ptr(), at.data_ptr())
    whole = -(-channels // 16) * 16

    def part(name: str, buffer: int) -> dict[str, int]:
        return {name: buffer, f"{name}_channel": 0}

    norm = {
        "channels": channels, "groups": groups, "pixels": pixels, "weight": 0, "bias": channels,
        **part("x", 0), **part("scale", 2), **part("shift", 3),
    }  # fmt: skip
    convolution = {
        "height": pixels, "width": 1, "in_channels": channels, "out_channels": channels,
        "kernel": 1, "stride": 1, "pad_before": 0, "pad_after": 0, "upsample": 0, "algorithm": 0,
        "silu": 0, "packed": 2 * channels, **part("x", 0), **part("x_scale", 2),
        **part("x_shift", 3), **part("y", 1),
    }  # fmt: skip
    plan = ops.extension.Plan(
        buffers=[(0, pixels, channels), (0, pixels, channels), (0, 1, channels),
                 (whole, 1, channels)],
        ops=[("norm", norm, 1e-5), ("convolution", convolution, 1.0)],
        arena=2 * whole, conditioning=0, classes=0, batch=3, weights=packed.data_ptr(),
        weights_size=packed.numel(),
    )  # fmt: skip
    y = torch.full_like(x, float("nan"))
    plan.run(
        x=x.data_ptr(), y=y.data_ptr(), conditioning=0, labels=0, images=3, threads=2,
        nan_fill=True,
    )  # fmt: skip
    nchw = x.transpose(1, 2).double()
    truth = torch.nn.functional.group_norm(nchw, groups, weight.double(), bias.double(), 1e-5)
    # x * scale + shift rounds relative to its two terms, which are large where the mean is.
    variance = nchw.reshape(3, groups, -1).var(-1, unbiased=False)
    rstd = (variance + 1e-5).rsqrt().repeat_interleave(channels // groups, 1)[..., None]
    term = (nchw * rstd * weight.double()[:, None]).abs()
    error = (y.transpose(1, 2).double() - truth).abs()
    eps = torch.finfo(torch.float32).eps
    assert (error <= eps * (4 * term + 4 * bias.abs()[:, None] + pixels**0.5)).all()
