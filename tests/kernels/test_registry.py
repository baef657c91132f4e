"""An op is a reference, a file per backend and one registration: a toy one, added as documented."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from advkd import ops
from advkd.ops import Kernel, _registry, address, register, registered

pytestmark = pytest.mark.skipif(ops.extension is None, reason="the C++ extension is not installed")
CALLS: list[int] = []  # elements that the toy kernel has worked on


def reference(x: Tensor, offset: Tensor | None, power: int) -> Tensor:
    """x^power + offset."""
    return x**power if offset is None else x**power + offset


def kernel(x: Tensor, offset: Tensor | None, power: int) -> Tensor:
    """The same in float32, by addresses, as a C++ kernel would be called."""
    out = torch.empty_like(x.contiguous())
    source = (ctypes.c_float * x.numel()).from_address(address(x.contiguous(), torch.float32))
    target = (ctypes.c_float * x.numel()).from_address(address(out, torch.float32))
    for i, value in enumerate(source):
        target[i] = value**power
    CALLS.append(x.numel())
    return out if offset is None else out + offset


@pytest.fixture(scope="module")
def toy() -> Iterator[_registry.Op]:
    op = register(
        "toy(Tensor x, Tensor? offset, int power, bool fused) -> Tensor",
        reference,
        cpu=Kernel(kernel, (torch.float32,), lambda x: "x is empty" if x.numel() == 0 else None),
    )
    yield op
    _registry._OPS.pop("toy")


@pytest.fixture(autouse=True)
def no_calls() -> None:
    CALLS.clear()


def inputs(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(2, 3).to(dtype).requires_grad_() for _ in range(2)]


def test_the_kernel_serves_what_it_takes(toy: _registry.Op) -> None:
    x, offset = (t.detach() for t in inputs())
    torch.testing.assert_close(toy(x, offset, 3, True), x**3 + offset)
    torch.testing.assert_close(toy.fused(x, None, 3), x**3)
    assert CALLS == [6, 6]
    assert torch.equal(toy(x, offset, 3, False), x**3 + offset)
    assert torch.equal(toy(x.double(), None, 2, True), x.double() ** 2)
    assert toy(x[:0], None, 3, True).shape == (0, 3)
    assert CALLS == [6, 6]


def test_it_says_why_the_kernel_does_not_serve(toy: _registry.Op) -> None:
    x = inputs()[0]
    assert toy.unavailable(x) is None
    assert toy.unavailable(x[:0]) == "x is empty"
    assert toy.unavailable(x.double()) == "the C++ kernel takes float32, not torch.float64"
    assert toy.unavailable(x.to("meta")) == "no kernel serves tensors on meta"


def test_torch_finds_no_fault_with_it(toy: _registry.Op) -> None:
    x, offset = inputs()
    torch.library.opcheck(torch.ops.advkd.toy, (x, offset, 3, True))
    torch.library.opcheck(torch.ops.advkd.toy, (x, None, 2, True))


def test_its_gradients_are_the_references(toy: _registry.Op) -> None:
    run = lambda x, offset: toy(x, offset, 3, True)  # noqa: E731
    double = inputs(torch.float64)
    assert torch.autograd.gradcheck(run, double, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(run, double)
    x, offset = inputs()
    out = toy(x, offset, 3, True)
    assert CALLS == [6]
    (slope,) = torch.autograd.grad(out.sum(), x)
    torch.testing.assert_close(slope, 3 * x**2)


def test_it_compiles_and_exports(toy: _registry.Op) -> None:
    torch._dynamo.reset()
    x, offset = (t.detach() for t in inputs())

    class Module(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return toy(x, offset, 3, True)

    expected = x**3 + offset
    compiled = torch.compile(Module(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected)
    program = torch.export.export(Module(), (x,))
    assert "advkd.toy" in str(program.graph)
    torch.testing.assert_close(program.module()(x), expected)


def test_it_is_listed(toy: _registry.Op) -> None:
    assert toy in registered()
    rows = {name: (backend, reason) for name, backend, reason in ops.describe()}
    assert rows["toy"][0].startswith("fused, C++")
    assert "toy on CUDA" not in rows


def test_every_op_is_described_once() -> None:
    names = [name for name, _, _ in ops.describe()]
    assert len(set(names)) == len(names)
    for op in registered():
        assert (op.name in names) == (not op.derived)
        assert (f"{op.name} on CUDA" in names) == (op.cuda is not None and not op.derived)


class OnCuda(torch.nn.Module):
    """The ops that have a Triton kernel."""

    def forward(self, x: Tensor, weight: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        return ops.group_norm_silu(x, weight, weight, 2, 1e-5), ops.attention(q, q, q)


def test_the_compiler_follows_calls_on_a_gpu() -> None:
    """Traced with tensors that only say that they are on a GPU; `strict` traces the bytecode."""
    torch._dynamo.reset()
    with FakeTensorMode():
        shapes = ((2, 8, 9, 9), (8,), (2, 1, 16, 32))
        tensors = tuple(torch.empty(shape, device="cuda") for shape in shapes)
        program = torch.export.export(OnCuda(), tensors, strict=True)
    traced = str(program.graph)
    assert "advkd.group_norm_silu" in traced and "advkd.attention" in traced
