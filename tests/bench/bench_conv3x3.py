"""3x3 convolution that keeps the size: ours, whose weights are packed on each call, and torch's."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from advkd import ops

from .measuring import Contender, Contest, assert_right, device
from .shapes import CONV3X3, ConvolutionShape

IMPLEMENTATIONS: dict[str, Callable[..., Tensor]] = {
    "ours": functools.partial(ops.conv3x3, backend="fused"),
    "eager": functools.partial(F.conv2d, padding=1),
}

pytestmark = pytest.mark.skipif(device() == "cuda", reason="the fused convolution is for the CPU")


def inputs(shape: ConvolutionShape) -> list[Tensor]:
    """x, weight, bias and the gradient of the result; channels_last."""
    torch.manual_seed(0)
    x = torch.randn(shape.batch, shape.channels, shape.size, shape.size)
    weight = torch.randn(shape.out, shape.channels, 3, 3)
    grad = torch.randn(shape.batch, shape.out, shape.size, shape.size)
    x, weight, grad = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight, grad))
    return [x, weight, torch.randn(shape.out), grad]


@functools.cache
def truth(shape: ConvolutionShape) -> list[Tensor]:
    """The result and the gradients of x, weight and bias in float64."""
    *args, grad = (t.double() for t in inputs(shape))
    args = [t.requires_grad_() for t in args]
    out = F.conv2d(*args, padding=1)
    return [out.detach(), *torch.autograd.grad(out, args, grad)]


def terms(shape: ConvolutionShape) -> list[int]:
    """Of the result and the gradients; 16 times as many for Winograd, whose last transformation
    lets roundings grow (tests/kernels/test_convolution.py)."""
    pixels = shape.batch * shape.size**2
    return [16 * n for n in (9 * shape.channels + 24, 9 * shape.out + 24, pixels, pixels)]


def forward_contest(shape: ConvolutionShape) -> Contest:
    *args, _ = inputs(shape)

    def contender(convolve: Callable[..., Tensor]) -> Contender:
        @torch.no_grad()
        def run(_: Any) -> Tensor:
            return convolve(*args)

        return Contender(run, lambda: assert_right(run(None), truth(shape)[0], terms(shape)[0]))

    return Contest({name: contender(f) for name, f in IMPLEMENTATIONS.items()})


def both_ways_contest(shape: ConvolutionShape) -> Contest:
    *args, grad = inputs(shape)
    args = [t.requires_grad_() for t in args]

    def contender(convolve: Callable[..., Tensor]) -> Contender:
        def run(_: Any) -> tuple[Tensor, ...]:
            out = convolve(*args)
            return out, *torch.autograd.grad(out, args, grad)

        def check() -> None:
            names = ("the result", "the gradient of x", "that of the weight", "that of the bias")
            parts = zip(names, run(None), truth(shape), terms(shape), strict=True)
            for name, got, expected, count in parts:
                assert_right(got.detach(), expected, count, name)

        return Contender(run, check)

    return Contest({name: contender(f) for name, f in IMPLEMENTATIONS.items()})


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", CONV3X3, ids=lambda shape: shape.name)
def test_forward(contest: Any, shape: ConvolutionShape, implementation: str) -> None:
    contest("conv3x3 forward", shape.name, implementation, lambda: forward_contest(shape))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", CONV3X3, ids=lambda shape: shape.name)
def test_forward_and_backward(contest: Any, shape: ConvolutionShape, implementation: str) -> None:
    contest(
        "conv3x3 forward and backward",
        shape.name,
        implementation,
        lambda: both_ways_contest(shape),
    )
