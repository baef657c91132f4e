"""3x3 convolution for training: against float64, gradients of every order, the cost model."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from advkd import ops
from advkd.config import DiscriminatorConfig
from advkd.models.discriminator import Discriminator
from advkd.models.layers import Conv3x3
from advkd.ops import _conv3x3

CONV = torch.ops.advkd.conv3x3
WGRAD = torch.ops.advkd.conv3x3_wgrad

pytestmark = pytest.mark.skipif(ops.extension is None, reason="the C++ extension is not installed")

# (B, C, H, W, D), D channels out: one pixel, sides beside a tile's, channels that no vector
# divides, panels of one to five, more tiles than a block holds, a side that is cut into blocks.
SHAPES = [
    (1, 1, 1, 1, 1),
    (2, 3, 2, 5, 17),
    (3, 16, 4, 4, 16),
    (2, 20, 7, 7, 33),
    (1, 17, 9, 6, 70),
    (9, 48, 14, 14, 48),
    (2, 8, 3, 300, 5),
    (1, 8, 290, 6, 20),
    (3, 17, 11, 10, 18),
    (40, 16, 8, 8, 40),
]

# By how much the roundings of what the last transformation sums grow against the root mean square
# of its result, as in test_convolution.py; for the gradient of the weights it is 24.2.
GROWTH = 31.5
TRANSFORMATIONS = 24  # roundings of the transformations on the way of one product


def inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """x, weight, bias and the output's gradient; all channels_last."""
    B, C, H, W, D = shape
    generator = torch.Generator().manual_seed(sum(shape))
    sizes = ((B, C, H, W), (D, C, 3, 3), (D,), (B, D, H, W))
    normals = [torch.randn(size, generator=generator, dtype=dtype) for size in sizes]
    return [t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t for t in normals]


def both_ways(args: list[Tensor], backend: str | None) -> list[Tensor]:
    """The output, and the gradients of x, weight and bias."""
    *leaves, grad = (t.detach() for t in args)
    leaves = [t.requires_grad_() for t in leaves]
    out = ops.conv3x3(*leaves, backend=backend)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def exactly(args: list[Tensor]) -> list[Tensor]:
    return both_ways([t.double() for t in args], "reference")


def assert_close(got: Tensor, truth: Tensor, terms: int) -> None:
    # Roundings walk at random; 4 is for the worst of many elements.
    eps = torch.finfo(torch.float32).eps / 2
    size = truth.square().mean().sqrt() + truth.abs()
    worst = float(((got.double() - truth).abs() / size).max())
    assert worst <= 4 * eps * GROWTH * (terms + TRANSFORMATIONS) ** 0.5, worst


@pytest.mark.parametrize("shape", SHAPES)
def test_fused_is_the_formula(shape: tuple[int, ...], isa: str, nan_filled: None) -> None:
    args = inputs(shape)
    B, C, H, W, D = shape
    terms = (9 * C, 9 * D, B * H * W, B * H * W)
    for got, truth, count in zip(both_ways(args, "fused"), exactly(args), terms, strict=True):
        assert got.dtype == torch.float32
        assert_close(got, truth, count)


def test_reference_is_torchs() -> None:
    x, weight, bias, grad = inputs(SHAPES[3])
    assert torch.equal(CONV(x, weight, bias, False, False), F.conv2d(x, weight, bias, padding=1))
    leaf = x.requires_grad_()
    (slope,) = torch.autograd.grad(F.conv2d(leaf, weight, padding=1), leaf, grad)
    torch.testing.assert_close(CONV(grad, weight, None, True, False), slope)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_any_strides_are_taken(layout: torch.memory_format) -> None:
    args = inputs(SHAPES[3])
    expected = both_ways(args, "fused")
    x, weight, bias, grad = args
    views = [
        torch.cat([x, x], dim=1)[:, : x.shape[1]],
        weight.contiguous(memory_format=layout),
        torch.stack([bias, bias], dim=1)[:, 0],
        grad.contiguous(),
    ]
    for got, plain in zip(both_ways(views, "fused"), expected, strict=True):
        torch.testing.assert_close(got, plain, rtol=1e-5, atol=1e-5)
    args[3] = grad[:1, :, :1, :1].expand_as(grad)
    for got, truth in zip(both_ways(args, "fused"), exactly(args), strict=True):
        assert_close(got, truth, grad.numel())


def test_results_are_channels_last() -> None:
    x, weight, bias, _ = inputs(SHAPES[3])
    for out in (CONV(x, weight, bias, False, fused) for fused in (True, False)):
        assert out.is_contiguous(memory_format=torch.channels_last)


def test_bits_repeat_and_do_not_depend_on_threads(set_threads: Any) -> None:
    for shape in ((2, 40, 16, 16, 70), (9, 48, 14, 14, 48)):
        args, results = inputs(shape), []
        for threads in (1, 2, 3, 8):
            set_threads(threads)
            results += [both_ways(args, "fused") for _ in range(2)]
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_threads_of_python_do_not_disturb_each_other() -> None:
    args = [inputs(shape) for shape in SHAPES[3:6]] * 4
    alone = [both_ways(arg, "fused") for arg in args]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda arg: both_ways(arg, "fused"), args))
    for mine, theirs in zip(alone, together, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


@pytest.mark.parametrize("threads", [1, 2])
def test_an_image_does_not_depend_on_its_neighbors(set_threads: Any, threads: int) -> None:
    # Batches of about a size: much smaller ones may be convolved by another algorithm.
    set_threads(threads)
    x, weight, bias, _ = inputs((20, 16, 7, 7, 24))
    whole = ops.conv3x3(x, weight, bias, backend="fused")
    part = ops.conv3x3(x[3:19], weight, bias, backend="fused")
    assert torch.equal(whole[3:19], part)


def test_no_images(nan_filled: None) -> None:
    out, *grads = both_ways(inputs((0, 5, 7, 7, 4)), "fused")
    assert out.shape == (0, 4, 7, 7)
    assert all(not grad.any() for grad in grads)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", [0, 1, 2, 3])
def test_nonfinite_values_are_not_lost(place: int, bad: float) -> None:
    # It spreads further than in torch, over the whole of its tiles.
    args = inputs((2, 16, 7, 7, 16))
    args[place][(0,) * args[place].dim()] = bad
    plain = both_ways(args, "reference")
    for got, expected in zip(both_ways(args, "fused"), plain, strict=True):
        assert not (got.isfinite() & ~expected.isfinite()).any()


@pytest.mark.parametrize("transposed", [False, True])
def test_gradients_and_their_gradients(transposed: bool) -> None:
    # In float64, so with torch's convolutions: this is about how the ops differentiate each other.
    C, D = (4, 3) if transposed else (3, 4)
    x, weight, bias, grad = inputs((2, 3, 3, 4, 4), torch.float64)
    args = [t.requires_grad_() for t in ((grad, weight) if transposed else (x, weight, bias))]
    assert args[0].shape[1] == C

    def conv(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return CONV(x, weight, bias, transposed, True)

    assert conv(*args).shape[1] == D
    assert torch.autograd.gradcheck(conv, args)
    assert torch.autograd.gradgradcheck(conv, args)


def test_gradients_of_wgrad() -> None:
    x, _, _, grad = (t.requires_grad_() for t in inputs((2, 3, 3, 4, 4), torch.float64))
    assert torch.autograd.gradcheck(lambda g, x: WGRAD(g, x, True), (grad, x))
    assert torch.autograd.gradgradcheck(lambda g, x: WGRAD(g, x, True), (grad, x))


def second_slopes(args: list[Tensor], backend: str) -> list[Tensor]:
    """The gradient of a nonlinear function of the first gradients."""
    leaves = [t.detach().requires_grad_() for t in args[:3]]
    out = ops.conv3x3(*leaves, backend=backend).sin()
    slopes = torch.autograd.grad(out, leaves, args[3], create_graph=True)
    return list(torch.autograd.grad(sum(s.square().sum() for s in slopes), leaves))


def test_fused_second_derivatives() -> None:
    # The scale keeps the sine's argument of the order of 1. Errors of one convolution pass through
    # two more, and through the sine.
    args = inputs((2, 16, 7, 7, 17))
    args[1] = args[1] / 12
    exact = second_slopes([t.double() for t in args], "reference")
    for got, truth in zip(second_slopes(args, "fused"), exact, strict=True):
        assert_close(got, truth, 9 * 9 * 17 + 2 * 7 * 7)


def test_the_r1_gradient_is_the_references() -> None:
    torch.manual_seed(0)
    discriminator = Discriminator(DiscriminatorConfig(widths=(16, 16, 32)), 16, 1, [16])
    discriminator.to(memory_format=torch.channels_last)
    x, noise = torch.randn(2, 4, 1, 16, 16)
    slopes = []
    for backend in (None, "reference"):
        image = x.clone().requires_grad_()
        with ops.use_backend(backend):
            logits = discriminator(image, noise, 0)
            (slope,) = torch.autograd.grad(logits.sum(), image, create_graph=True)
            parameters = list(discriminator.parameters())
            penalty = slope.square().sum()
            found = torch.autograd.grad(penalty, parameters, allow_unused=True)
        slopes.append(torch.cat([s.flatten() for s in found if s is not None]))
    error = float((slopes[0] - slopes[1]).norm() / slopes[1].norm())
    assert 0 < error <= 1e-4  # fused indeed; about ten layers, each within 1e-5


def test_what_follows_may_be_done_in_its_place() -> None:
    leaves = [t.requires_grad_() for t in inputs((3, 16, 4, 4, 16))[:3]]

    def gradients(inplace: bool) -> tuple[Tensor, ...]:
        out = F.leaky_relu(ops.conv3x3(*leaves, backend="fused"), 0.2, inplace=inplace)
        return torch.autograd.grad(out.square().sum(), leaves)

    for got, want in zip(gradients(True), gradients(False), strict=True):
        assert torch.equal(got, want)


def test_only_what_needs_a_gradient_gets_one() -> None:
    x, weight, bias, _ = inputs(SHAPES[3])
    assert ops.conv3x3(x, weight, bias, backend="fused").grad_fn is None
    out = ops.conv3x3(x, weight, bias.requires_grad_(), backend="fused")
    out.sum().backward()
    assert bias.grad is not None
    assert x.grad is None
    with torch.no_grad():
        assert ops.conv3x3(x, weight, bias, backend="fused").grad_fn is None


def test_ops_are_registered_correctly() -> None:
    x, weight, bias, grad = (t.requires_grad_() for t in inputs((2, 5, 7, 6, 4)))
    torch.library.opcheck(CONV, (x, weight, bias, False, True))
    torch.library.opcheck(CONV, (grad, weight, None, True, True))
    torch.library.opcheck(WGRAD, (grad, x, True))


def test_autocast_runs_in_its_dtype() -> None:
    x, weight, bias, _ = inputs((4, 32, 14, 14, 32))
    dtype = torch.bfloat16
    plain = F.conv2d(x.to(dtype), weight.to(dtype), bias.to(dtype), padding=1)
    with torch.autocast("cpu", dtype):
        assert torch.equal(ops.conv3x3(x, weight, bias), plain)
        assert torch.equal(ops.conv3x3(x, weight, bias, backend="fused"), plain)
        out = ops.conv3x3(x.requires_grad_(), weight, bias, backend="fused")
    out.float().sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Conv3x3(32, 48), Conv3x3(48, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.silu(self.first(x)))


def block_and_input(batch: int = 4) -> tuple[Block, Tensor]:
    torch.manual_seed(0)
    block = Block().to(memory_format=torch.channels_last)
    return block, torch.randn(batch, 32, 14, 14).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("grad", [True, False])
def test_a_module_compiles_without_graph_breaks(grad: bool) -> None:
    torch._dynamo.reset()
    block, x = block_and_input()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    with torch.set_grad_enabled(grad):
        got, expected = compiled(x), block(x)
    torch.testing.assert_close(got, expected)
    if grad:
        slopes = [
            torch.autograd.grad(y.square().sum(), list(block.parameters())) for y in (got, expected)
        ]
        torch.testing.assert_close(*slopes)


def test_a_module_exports_with_and_without_the_op() -> None:
    block, x = block_and_input()
    block.requires_grad_(False)
    sizes = {"x": {0: torch.export.Dim("batch", min=2)}}
    more = block_and_input(7)[1]
    for backend, expected in ((None, True), ("reference", False)):
        with ops.use_backend(backend):
            program = torch.export.export(block, (x,), dynamic_shapes=sizes)
        assert ("advkd.conv3x3" in str(program.graph)) == expected
        torch.testing.assert_close(program.module()(more), block(more))


def test_an_exported_op_runs_without_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias, grad = inputs(SHAPES[3])

    def results() -> list[Tensor]:
        return [CONV(x, weight, bias, False, True), *WGRAD(grad, x, True)]

    fused = results()
    monkeypatch.setattr("advkd.ops._backend.extension_missing", "it was left out")
    for got, expected in zip(results(), fused, strict=True):
        assert got.stride() == expected.stride()
        assert_close(got, expected.double(), 9 * 33)


def pays(batch: int, channels: int, size: int, out: int) -> bool:
    x = torch.empty(batch, channels, size, size).to(memory_format=torch.channels_last)
    return _conv3x3.pays(x, torch.empty(out, channels, 3, 3))


def test_the_cost_model_takes_the_layers_of_the_presets() -> None:
    for layer in ((16, 16, 28, 16), (16, 48, 14, 48), (16, 96, 7, 96), (16, 128, 32, 128)):
        assert pays(*layer), layer


def test_the_cost_model_leaves_to_torch_what_has_little_to_save() -> None:
    for layer in ((16, 1, 28, 16), (16, 2, 14, 48), (1, 256, 1, 256), (1, 256, 4, 256)):
        assert not pays(*layer), layer
    x, weight, bias, _ = inputs((16, 1, 28, 28, 16))
    assert torch.equal(ops.conv3x3(x, weight, bias), F.conv2d(x, weight, bias, padding=1))


def test_the_cost_model_leaves_other_layouts_and_types_to_torch() -> None:
    x, weight, bias, _ = inputs((16, 48, 14, 14, 48))
    assert _conv3x3.pays(x, weight)
    for other in (x.contiguous(), x.double(), x.bfloat16()):
        assert not _conv3x3.pays(other, weight)
        w, b = weight.to(other.dtype), bias.to(other.dtype)
        assert torch.equal(ops.conv3x3(other, w, b), F.conv2d(other, w, b, padding=1))


def test_the_layer_is_torchs_by_its_names_and_numbers() -> None:
    layers = []
    for make in (Conv3x3, lambda a, b: nn.Conv2d(a, b, 3, padding=1)):
        torch.manual_seed(0)
        layers.append(make(5, 7))
    mine, plain = (layer.state_dict() for layer in layers)
    assert list(mine) == list(plain)
    assert all(torch.equal(mine[name], plain[name]) for name in plain)
    x = torch.randn(2, 5, 6, 6)
    with ops.use_backend("reference"):
        assert torch.equal(layers[0](x), layers[1](x))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"x": torch.zeros(4, 8, 8)}, ValueError, "must be \\(B, C, H, W\\)"),
        ({"weight": torch.zeros(2, 5, 3, 3)}, ValueError, "does not fit"),
        ({"weight": torch.zeros(2, 4, 5, 5)}, ValueError, "does not fit"),
        ({"bias": torch.zeros(3)}, ValueError, "bias \\(3,\\) must be \\(2,\\)"),
        ({"x": torch.zeros(1, 4, 8, 8, dtype=torch.int64)}, TypeError, "must be floating"),
        ({"x": torch.zeros(1, 4, 8, 8).double()}, TypeError, "one dtype"),
        ({"bias": torch.zeros(2, device="meta")}, ValueError, "one device"),
        ({"backend": "fast"}, ValueError, "backend is 'fast'"),
    ],
)
def test_bad_arguments_are_refused(
    change: dict[str, Any], error: type[Exception], words: str
) -> None:
    good = {"x": torch.zeros(1, 4, 8, 8), "weight": torch.zeros(2, 4, 3, 3), "bias": torch.zeros(2)}
    with pytest.raises(error, match=words):
        ops.conv3x3(**(good | change))


def test_the_ops_themselves_refuse_shapes_that_do_not_fit() -> None:
    x, weight = torch.zeros(1, 4, 8, 8), torch.zeros(2, 4, 3, 3)
    with pytest.raises(ValueError, match="does not fit"):
        CONV(x, weight, None, True, True)
    with pytest.raises(ValueError, match="is of no output of x"):
        WGRAD(torch.zeros(1, 2, 7, 8), x, True)


def test_a_type_without_a_kernel_is_refused_if_fused_is_asked_for() -> None:
    x, weight, bias, _ = inputs(SHAPES[3], torch.float64)
    with pytest.raises(ValueError, match="takes float32, not"):
        ops.conv3x3(x, weight, bias, backend="fused")
