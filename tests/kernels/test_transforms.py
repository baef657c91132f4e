"""Forward-mode AD and the transforms of torch.func, for every op: right, against float64."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from advkd import ops

sys.path.insert(0, str(Path(__file__).parent))
from op_cases import NAMES, cases, normals

DIFFERENTIABLE = [name for name in NAMES if cases(None)[name][1]]
Function = Callable[..., Any]


def case(name: str, dtype: torch.dtype) -> tuple[Function, list[Tensor], list[Tensor]]:
    """An op's first result as a function of its tensors, these, and a tangent of each."""
    backend = "reference" if dtype is torch.float64 else None
    run, tensors = cases(backend, dtype)[name]
    tangents = [t.flip(0) * 0.7 + 0.1 for t in tensors]
    return lambda *given: run(*given)[0], tensors, tangents


def total(function: Function) -> Function:
    return lambda *given: function(*given).sin().sum()


def dual(function: Function, tensors: list[Tensor], tangents: list[Tensor]) -> Tensor:
    with forward_ad.dual_level():
        made = [forward_ad.make_dual(x, t) for x, t in zip(tensors, tangents, strict=True)]
        return forward_ad.unpack_dual(function(*made)).tangent


def tracked_dual(function: Function, tensors: list[Tensor], tangents: list[Tensor]) -> Tensor:
    return dual(function, [x.detach().requires_grad_() for x in tensors], tangents)


def jvp(function: Function, tensors: list[Tensor], tangents: list[Tensor]) -> Tensor:
    return torch.func.jvp(function, tuple(tensors), tuple(tangents))[1]


def hessian_product(function: Function, tensors: list[Tensor], tangents: list[Tensor]) -> Tensor:
    slope = torch.func.grad(total(function))
    return torch.func.jvp(slope, tuple(tensors), tuple(tangents))[1]


def grad(function: Function, tensors: list[Tensor], tangents: list[Tensor]) -> Tensor:
    return torch.func.grad(total(function))(*tensors)


def second_grad(function: Function, tensors: list[Tensor], tangents: list[Tensor]) -> Tensor:
    return torch.func.grad(total(torch.func.grad(total(function))))(*tensors)


def vmap(function: Function, tensors: list[Tensor], tangents: list[Tensor]) -> Tensor:
    pairs = zip(tensors, tangents, strict=True)
    return torch.func.vmap(function)(*(torch.stack([x, x + t]) for x, t in pairs))


def vmapped_grad(function: Function, tensors: list[Tensor], tangents: list[Tensor]) -> Tensor:
    pairs = zip(tensors, tangents, strict=True)
    slope = torch.func.grad(total(function))
    return torch.func.vmap(slope)(*(torch.stack([x, x + t]) for x, t in pairs))


TRANSFORMS = [
    dual, tracked_dual, jvp, hessian_product, grad, second_grad, vmap, vmapped_grad,
]  # fmt: skip


def assert_close(got: Tensor, truth: Tensor) -> None:
    # Some dozens of roundings, of numbers as large as the largest result.
    assert got is not None
    assert got.dtype == torch.float32
    error = (got.double() - truth).abs().max()
    assert error <= 64 * torch.finfo(torch.float32).eps * truth.abs().max(), float(error)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_transforms_are_right(name: str, transform: Function) -> None:
    truth = transform(*case(name, torch.float64))
    assert truth.abs().max() > 0.01
    assert_close(transform(*case(name, torch.float32)), truth)


# The ops past their functions, as a traced program calls them.
DISPATCHED: dict[str, Function] = {
    "group_norm_silu": lambda x, w, b, s, t: torch.ops.advkd.group_norm_silu(
        x, w, b, s, t, 2, 1e-5, True
    )[0],
    "attention": lambda q, k, v: torch.ops.advkd.attention(q, k, v, 8**-0.5, True)[0],
    "conv3x3": lambda x, w, b: torch.ops.advkd.conv3x3(x, w, b, False, True),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", DISPATCHED)
def test_transforms_of_the_ops_themselves_are_right(name: str, transform: Function) -> None:
    _, tensors, tangents = case(name, torch.float32)
    # Winograd's roundings are larger than 64; vmap runs the kernel image by image.
    kernel = name == "conv3x3" and transform is vmap
    truth = transform(*case(name, torch.float64))
    got = transform(DISPATCHED[name], tensors, tangents)
    assert_close(got / 8 if kernel else got, truth / 8 if kernel else truth)


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("name", DISPATCHED)
def test_a_tangent_of_the_outputs_gradient_reaches_the_inputs(
    name: str, create_graph: bool
) -> None:
    function, tensors, _ = case(name, torch.float32)
    leaves = [t.requires_grad_() for t in tensors]
    out = function(*leaves)
    grad_out, tangent = normals(tuple(out.shape), tuple(out.shape))
    with forward_ad.dual_level():
        given = forward_ad.make_dual(grad_out, tangent)
        slopes = torch.autograd.grad(out, leaves, given, create_graph=create_graph)
        got = [forward_ad.unpack_dual(slope).tangent for slope in slopes]
    # The gradient is linear in the output's.
    function, tensors, _ = case(name, torch.float64)
    leaves = [t.requires_grad_() for t in tensors]
    truth = torch.autograd.grad(function(*leaves), leaves, tangent.double())
    for a, b in zip(got, truth, strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("name", DISPATCHED)
def test_a_batch_of_output_gradients_gives_one_of_input_gradients(name: str) -> None:
    function, tensors, _ = case(name, torch.float32)
    leaves = [t.requires_grad_() for t in tensors]
    out = function(*leaves)
    grads = torch.stack(normals(*[tuple(out.shape)] * 3))
    batched = torch.autograd.grad(out, leaves, grads, is_grads_batched=True, retain_graph=True)
    function, tensors, _ = case(name, torch.float64)
    leaves = [t.requires_grad_() for t in tensors]
    out = function(*leaves)
    for i, grad_out in enumerate(grads):
        truth = torch.autograd.grad(out, leaves, grad_out.double(), retain_graph=True)
        for a, b in zip(batched, truth, strict=True):
            assert_close(a[i], b)


@pytest.mark.parametrize("name", DISPATCHED)
def test_gradients_forward_backward_and_in_batches(name: str) -> None:
    _, tensors, _ = case(name, torch.float64)
    small = [t[..., :2, :] if t.dim() == 4 and t.shape[-1] != 3 else t for t in tensors]
    assert torch.autograd.gradcheck(
        DISPATCHED[name], [t.requires_grad_() for t in small], check_forward_ad=True,
        check_batched_grad=True, check_batched_forward_grad=True,
    )  # fmt: skip


@pytest.mark.skipif(ops.extension is None, reason="the C++ extension is not installed")
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_a_kernel_asked_for_under_a_transform_is_refused(name: str) -> None:
    run, tensors = cases("fused")[name]
    refused = "group_norm_silu" if name == "normed_conv3x3" else name  # the first of its two ops
    with pytest.raises(ValueError, match=f"{refused} has no fused backend here: no kernel carries"):
        jvp(lambda *given: run(*given)[0], tensors, tensors)
