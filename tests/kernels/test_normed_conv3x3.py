"""GroupNorm-SiLU with the convolution behind it: against float64, gradients of every order, what is
stored, and the two ops that it is made of elsewhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from advkd import ops
from advkd.models.layers import Conv3x3, GroupNormSiLU, ResnetBlock, normed_conv
from advkd.ops import _normed_conv3x3

pytestmark = pytest.mark.skipif(ops.extension is None, reason="the C++ extension is not installed")

GROUPS, EPS = 4, 1e-5
# (B, C, H, W, C_out): one pixel, sides beside a tile's, channels that no vector divides, more tiles
# than a block holds, a side that is cut into blocks.
SHAPES = [
    (1, 16, 1, 1, 1),
    (2, 20, 7, 7, 33),
    (1, 12, 9, 6, 70),
    (9, 48, 14, 14, 48),
    (2, 8, 3, 300, 5),
    (40, 16, 8, 8, 40),
]
# 4 times the roundings that Winograd's transformations let grow 31.5 times, as in test_conv3x3.py.
TOLERANCE = 4 * 31.5 * torch.finfo(torch.float32).eps / 2


def inputs(shape: tuple[int, ...], mean: float = 0.5) -> list[Tensor]:
    """x, the norm's weight and bias, weight, bias, addend, residual; and the output's gradient."""
    B, C, H, W, D = shape
    generator = torch.Generator().manual_seed(sum(shape))
    sizes = ((B, C, H, W), (C,), (C,), (D, C, 3, 3), (D,), (B, D), (B, D, H, W), (B, D, H, W))
    made = [torch.randn(size, generator=generator) for size in sizes]
    made[0] = made[0] + mean
    made[3] = made[3] / (9 * C) ** 0.5
    return [t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t for t in made]


def called(given: list[Tensor | None], backend: str | None) -> Tensor:
    x, norm_weight, norm_bias, *rest = given
    assert x is not None and norm_weight is not None and norm_bias is not None
    return ops.normed_conv3x3(x, norm_weight, norm_bias, GROUPS, EPS, *rest, backend=backend)  # type: ignore[arg-type]


def both_ways(args: list[Tensor], backend: str | None) -> list[Tensor]:
    """The output, and the gradients of all that is given."""
    *leaves, grad = (t.detach() for t in args)
    leaves = [t.requires_grad_() for t in leaves]
    out = called(list(leaves), backend)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def exactly(args: list[Tensor]) -> list[Tensor]:
    return both_ways([t.double() for t in args], "reference")


def assert_close(got: list[Tensor], truth: list[Tensor], tolerance: float = TOLERANCE) -> None:
    for mine, exact in zip(got, truth, strict=True):
        assert mine.dtype == torch.float32
        error = float((mine.detach().double() - exact.detach()).norm() / exact.detach().norm())
        assert error <= tolerance, error


def fused_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Filled with the kernels that are called from now on."""
    found: list[str] = []
    extension = ops.extension

    class Counting:
        def __getattr__(self, name: str) -> Any:
            if name.startswith("normed"):
                found.append(name)
            return getattr(extension, name)

    monkeypatch.setattr(_normed_conv3x3, "fused_extension", Counting)
    return found


@pytest.mark.parametrize("shape", SHAPES)
def test_fused_is_the_formula(shape: tuple[int, ...], isa: str, nan_filled: None) -> None:
    args = inputs(shape)
    assert_close(both_ways(args, "fused"), exactly(args))


@pytest.mark.parametrize(
    "given", [(False, False, False), (True, False, True), (False, True, False)]
)
def test_absent_parameters(given: tuple[bool, ...]) -> None:
    args = inputs(SHAPES[1])
    rest = [t if there else None for t, there in zip(args[4:7], given, strict=True)]
    results = []
    for dtype, backend in ((torch.float32, "fused"), (torch.float64, "reference")):
        wide = [t if t is None else t.to(dtype).detach() for t in (*args[:4], *rest)]
        leaves = [t.requires_grad_() for t in wide if t is not None]
        out = called(wide, backend)
        results.append([out, *torch.autograd.grad(out, leaves, args[7].to(dtype))])
    assert_close(*results)


def test_a_large_mean_costs_as_many_digits_as_it_has() -> None:
    for mean in (10.0, 100.0):
        args = inputs(SHAPES[3], mean)
        got, truth = both_ways(args, "fused"), exactly(args)
        assert_close(got[:1], truth[:1], TOLERANCE + mean * torch.finfo(torch.float32).eps)


def test_any_strides_are_taken() -> None:
    args = inputs(SHAPES[1])
    x, norm_weight, norm_bias, weight, bias, addend, residual, grad = args
    views = [
        torch.cat([x, x], dim=1)[:, : x.shape[1]],
        torch.stack([norm_weight, norm_weight], dim=1)[:, 0],
        norm_bias,
        weight.contiguous(),
        torch.stack([bias, bias], dim=1)[:, 0],
        addend.t().contiguous().t(),
        residual.contiguous(),
        grad[:1, :, :1, :1].expand_as(grad),
    ]
    assert_close(both_ways(views, "fused"), exactly(views))


def test_bits_repeat_and_do_not_depend_on_threads(set_threads: Any) -> None:
    for shape in ((2, 40, 16, 16, 70), SHAPES[3]):
        args, results = inputs(shape), []
        for threads in (1, 2, 3, 8):
            set_threads(threads)
            results += [both_ways(args, "fused") for _ in range(2)]
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_an_image_does_not_depend_on_its_neighbors() -> None:
    x, norm_weight, norm_bias, weight, bias, addend, residual, _ = inputs((20, 16, 7, 7, 24))
    whole = called([x, norm_weight, norm_bias, weight, bias, addend, residual], "fused")
    some = slice(3, 19)
    part = called(
        [x[some], norm_weight, norm_bias, weight, bias, addend[some], residual[some]], "fused"
    )
    assert torch.equal(whole[some], part)


def test_the_norms_result_is_not_stored() -> None:
    args = [t.requires_grad_() for t in inputs(SHAPES[3])[:7]]
    kept: list[Tensor] = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t)
    with hooks:
        out = called(list(args), None)
    assert out.grad_fn is not None and "NormedConv3x3" in out.grad_fn.name()
    maps = [t for t in kept if t.numel() >= args[0].numel()]
    assert [t.data_ptr() for t in maps] == [args[0].data_ptr()]


def test_only_what_needs_a_gradient_gets_one(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = fused_calls(monkeypatch)
    args = inputs(SHAPES[3])
    full = both_ways(args, None)[1:]
    assert calls == ["normed_conv3x3", "normed_conv3x3_dgrad", "normed_conv3x3_wgrad"]
    kernels = ["dgrad", "dgrad", "dgrad", "wgrad", "wgrad", None, None]
    for i, kernel in enumerate(kernels):
        calls.clear()
        leaves = [t.detach() for t in args[:7]]
        leaves[i].requires_grad_()
        (slope,) = torch.autograd.grad(called(list(leaves), None), leaves[i], args[7])
        assert torch.equal(slope, full[i])
        assert calls[1:] == ([] if kernel is None else [f"normed_conv3x3_{kernel}"])


def second_slopes(args: list[Tensor], backend: str | None) -> list[Tensor]:
    """The gradient of a nonlinear function of the first gradients."""
    leaves = [t.detach().requires_grad_() for t in args[:7]]
    out = called(list(leaves), backend).sin()
    slopes = torch.autograd.grad(out, leaves, args[7], create_graph=True)
    return list(torch.autograd.grad(sum(s.square().mean() for s in slopes), leaves))


def test_fused_second_derivatives() -> None:
    # Errors of one convolution pass through two more, through the sine and through the norm.
    args = inputs((2, 16, 7, 7, 17))
    truth = second_slopes([t.double() for t in args], "reference")
    assert_close(second_slopes(args, None), truth, 8 * TOLERANCE)


def test_gradients_in_batches_are_those_one_by_one() -> None:
    args = inputs(SHAPES[3])
    leaf = args[0].requires_grad_()
    out = called([leaf, *args[1:7]], None)
    grads = torch.stack([args[7], 2 * args[7]])
    (together,) = torch.autograd.grad(out, leaf, grads, is_grads_batched=True, retain_graph=True)
    for mine, grad in zip(together, grads, strict=True):
        torch.testing.assert_close(mine, torch.autograd.grad(out, leaf, grad, retain_graph=True)[0])


def test_where_the_kernels_do_not_pay_the_two_ops_run(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = fused_calls(monkeypatch)
    args = inputs(SHAPES[3])
    for backend, change in (
        ("reference", lambda t: t),
        (None, torch.Tensor.contiguous),
        (None, torch.Tensor.double),
        (None, lambda t: t.to("meta")),
    ):
        called([change(t) for t in args[:7]], backend)
    with torch.autocast("cpu", torch.bfloat16):
        called(list(args[:7]), None)
    assert calls == []
    given: list[Tensor | None] = [*args[:7]]
    torch.testing.assert_close(called(given, None), called(given, "reference"), rtol=0, atol=1e-4)
    assert calls == ["normed_conv3x3"]


def block_and_input() -> tuple[ResnetBlock, Tensor, Tensor]:
    torch.manual_seed(0)
    block = ResnetBlock(32, 48, 24, 8).to(memory_format=torch.channels_last)
    x = torch.randn(4, 32, 14, 14).contiguous(memory_format=torch.channels_last)
    return block, x, torch.randn(4, 24)


@pytest.mark.parametrize("grad", [True, False])
def test_a_block_compiles_without_graph_breaks(grad: bool) -> None:
    torch._dynamo.reset()
    block, x, temb = block_and_input()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    with torch.set_grad_enabled(grad):
        got, expected = compiled(x, temb), block(x, temb)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_an_exported_block_has_the_two_ops() -> None:
    block, x, temb = block_and_input()
    block.requires_grad_(False)
    program = torch.export.export(block, (x, temb))
    assert {"advkd.conv3x3", "advkd.group_norm_silu"} <= {
        str(node.target).removesuffix(".default") for node in program.graph.nodes
    }
    torch.testing.assert_close(program.module()(x, temb), block(x, temb), rtol=1e-5, atol=1e-5)


def test_a_block_is_the_references(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = fused_calls(monkeypatch)
    block, x, temb = block_and_input()
    fused = block(x, temb)
    assert calls == ["normed_conv3x3"] * 2
    with ops.use_backend("reference"):
        truth = block.double()(x.double(), temb.double())
    assert_close([fused], [truth], 2 * TOLERANCE)


def test_hooks_and_other_modules_are_called() -> None:
    norm, conv = GroupNormSiLU(4, 16), Conv3x3(16, 16)
    x = torch.randn(2, 16, 14, 14).contiguous(memory_format=torch.channels_last)
    expected = normed_conv(norm, conv, x, residual=x)
    seen: list[Tensor] = []
    hook = conv.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    torch.testing.assert_close(normed_conv(norm, conv, x, residual=x), expected)
    torch.testing.assert_close(seen[0], norm(x))
    hook.remove()
    doubled = nn.Sequential(conv, nn.Hardtanh(-9, 9))
    torch.testing.assert_close(normed_conv(norm, doubled, x, residual=x), expected)  # type: ignore[arg-type]
    plain = GroupNormSiLU(4, 16, activation="none")
    torch.testing.assert_close(normed_conv(plain, conv, x), conv(plain(x)))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": torch.zeros(1, 4, 8)}, "must be \\(B, C, H, W\\)"),
        ({"weight": torch.zeros(2, 5, 3, 3)}, "does not fit"),
        ({"num_groups": 3}, "does not divide"),
        ({"addend": torch.zeros(2, 2)}, "addend has the shape \\(2, 2\\), but must be \\(1, 2\\)"),
        ({"residual": torch.zeros(1, 2, 8, 7)}, "residual has the shape"),
        ({"backend": "fast"}, "backend is 'fast'"),
    ],
)
def test_bad_arguments_are_refused(change: dict[str, Any], words: str) -> None:
    good: dict[str, Any] = {
        "x": torch.zeros(1, 4, 8, 8),
        "norm_weight": torch.zeros(4),
        "norm_bias": torch.zeros(4),
        "num_groups": 2,
        "eps": 1e-5,
        "weight": torch.zeros(2, 4, 3, 3),
    }
    with pytest.raises(ValueError, match=words):
        ops.normed_conv3x3(**(good | change))
