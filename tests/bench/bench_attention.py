"""Attention: ours, torch's scaled_dot_product_attention, and its formula as it is or compiled."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from advkd import ops

from .measuring import Contender, Contest, assert_right, compiled, device
from .shapes import ATTENTION, AttentionShape


def formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    return torch.softmax(scores, dim=-1) @ v


IMPLEMENTATIONS: dict[str, Callable[..., Tensor]] = {
    "ours": functools.partial(ops.attention, backend="fused"),
    "sdpa": F.scaled_dot_product_attention,
    "eager": formula,
    "compile": compiled(formula),
}


def inputs(shape: AttentionShape) -> list[Tensor]:
    """q, k, v and the gradient of the result, as the layers have them: heads apart in a row."""
    torch.manual_seed(0)
    size = (shape.batch, shape.tokens, shape.heads, shape.head_dim)
    return [torch.randn(size, device=device()).transpose(1, 2) for _ in range(4)]


@functools.cache
def truth(shape: AttentionShape) -> list[Tensor]:
    """The result and the gradients of q, k and v in float64."""
    *args, grad = (x.double() for x in inputs(shape))
    args = [x.requires_grad_() for x in args]
    out = formula(*args)
    return [out.detach(), *torch.autograd.grad(out, args, grad)]


def terms(shape: AttentionShape) -> int:
    return shape.head_dim + shape.tokens


def forward_contest(shape: AttentionShape) -> Contest:
    *args, _ = inputs(shape)

    def contender(attend: Callable[..., Tensor]) -> Contender:
        @torch.no_grad()
        def run(_: Any) -> Tensor:
            return attend(*args)

        return Contender(run, lambda: assert_right(run(None), truth(shape)[0], terms(shape)))

    size = args[0].numel() * args[0].element_size()
    return Contest({name: contender(f) for name, f in IMPLEMENTATIONS.items()}, 4 * size)


def both_ways_contest(shape: AttentionShape) -> Contest:
    *args, grad = inputs(shape)
    args = [x.requires_grad_() for x in args]

    def contender(attend: Callable[..., Tensor]) -> Contender:
        def run(_: Any) -> tuple[Tensor, ...]:
            out = attend(*args)
            return out, *torch.autograd.grad(out, args, grad)

        def check() -> None:
            names = ("the result", "the gradient of q", "that of k", "that of v")
            for name, got, expected in zip(names, run(None), truth(shape), strict=True):
                assert_right(got.detach(), expected, terms(shape), name)

        return Contender(run, check)

    # q, k, v, the result and its gradient are read, the result and three gradients written; the
    # forward reads q, k and v too.
    size = args[0].numel() * args[0].element_size()
    return Contest({name: contender(f) for name, f in IMPLEMENTATIONS.items()}, 12 * size)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", ATTENTION, ids=lambda shape: shape.name)
def test_forward(contest: Any, shape: AttentionShape, implementation: str) -> None:
    contest("attention forward", shape.name, implementation, lambda: forward_contest(shape))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", ATTENTION, ids=lambda shape: shape.name)
def test_forward_and_backward(contest: Any, shape: AttentionShape, implementation: str) -> None:
    contest(
        "attention forward and backward",
        shape.name,
        implementation,
        lambda: both_ways_contest(shape),
    )
