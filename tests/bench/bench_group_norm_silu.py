"""GroupNorm-SiLU on channels_last maps: ours, torch's two ops, and the two compiled."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from advkd import ops

from .measuring import Contender, Contest, assert_right, compiled, device, l2_bytes
from .shapes import GROUP_NORM_SILU, NormShape

EPS = 1e-5


def two_ops(x: Tensor, weight: Tensor, bias: Tensor, groups: int) -> Tensor:
    return F.silu(F.group_norm(x, groups, weight, bias, EPS))


def one_op(x: Tensor, weight: Tensor, bias: Tensor, groups: int) -> Tensor:
    return ops.group_norm_silu(x, weight, bias, groups, EPS, backend="fused")


IMPLEMENTATIONS: dict[str, Callable[..., Tensor]] = {
    "ours": one_op,
    "eager": two_ops,
    "compile": compiled(two_ops),
}


def inputs(shape: NormShape) -> tuple[list[Tensor], Tensor]:
    """x, weight and bias, and the gradient of y."""
    torch.manual_seed(0)
    size = (shape.batch, shape.channels, shape.size, shape.size)
    x, grad = (
        torch.randn(size, device=device()).to(memory_format=torch.channels_last) for _ in range(2)
    )
    weight, bias = torch.randn(2, shape.channels, device=device())
    return [x, weight, bias], grad


@functools.lru_cache(maxsize=1)
def truth(shape: NormShape) -> list[Tensor]:
    """y and the gradients of x, weight and bias in float64."""
    args, grad = inputs(shape)
    args = [arg.double().requires_grad_() for arg in args]
    y = two_ops(*args, shape.groups)
    return [y.detach(), *torch.autograd.grad(y, args, grad.double())]


def moved_bytes(shape: NormShape, inputs_read: int) -> int:
    """Compulsory traffic: every input is read once, or twice where one sample of it does not stay
    in the cache (half of L2) from the sums to their use; one result is written."""
    sample = shape.channels * shape.size**2 * 4
    reads = inputs_read * (2 if sample > l2_bytes() // 2 else 1)
    return shape.batch * sample * (reads + 1)


def forward_contest(shape: NormShape) -> Contest:
    args, _ = inputs(shape)
    terms = shape.channels // shape.groups * shape.size**2

    def contender(norm: Callable[..., Tensor]) -> Contender:
        @torch.no_grad()
        def run(_: Any) -> Tensor:
            return norm(*args, shape.groups)

        return Contender(run, lambda: assert_right(run(None), truth(shape)[0], terms))

    contenders = {name: contender(norm) for name, norm in IMPLEMENTATIONS.items()}
    return Contest(contenders, moved_bytes(shape, 1))


def backward_contest(shape: NormShape) -> Contest:
    args, grad = inputs(shape)
    args = [arg.requires_grad_() for arg in args]
    terms = shape.batch * shape.channels // shape.groups * shape.size**2

    def contender(norm: Callable[..., Tensor]) -> Contender:
        def forward() -> Tensor:
            return norm(*args, shape.groups)

        def backward(y: Tensor) -> tuple[Tensor, ...]:
            return torch.autograd.grad(y, args, grad)

        def check() -> None:
            names = ("the gradient of x", "that of the weight", "that of the bias")
            for name, got, expected in zip(
                names, backward(forward()), truth(shape)[1:], strict=True
            ):
                assert_right(got, expected, terms, name)

        return Contender(backward, check, forward)

    contenders = {name: contender(norm) for name, norm in IMPLEMENTATIONS.items()}
    return Contest(contenders, moved_bytes(shape, 2))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", GROUP_NORM_SILU, ids=lambda shape: shape.name)
def test_forward(contest: Any, shape: NormShape, implementation: str) -> None:
    contest("group_norm_silu forward", shape.name, implementation, lambda: forward_contest(shape))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", GROUP_NORM_SILU, ids=lambda shape: shape.name)
def test_backward(contest: Any, shape: NormShape, implementation: str) -> None:
    contest("group_norm_silu backward", shape.name, implementation, lambda: backward_contest(shape))
