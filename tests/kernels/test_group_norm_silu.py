"""GroupNorm-SiLU: against float64, in the shapes that break kernels; gradients; compilation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from advkd import ops

# (shape, groups): one element, odd sizes, few and many channels, a group per channel, several
# blocks in a group, an image beyond the cache, a short last block
SHAPES = [
    ((1, 1, 1, 1), 1),
    ((2, 6, 1, 1), 3),
    ((3, 30, 7, 5), 5),
    ((2, 48, 17, 3), 16),
    ((2, 7, 13, 11), 7),
    ((5, 32, 28, 28), 8),
    ((1, 20, 64, 65), 1),
    ((1, 8, 160, 161), 2),
    ((1, 4100, 2, 1), 41),
]
LAYOUTS = [torch.contiguous_format, torch.channels_last]


def inputs(
    shape: tuple[int, ...], memory_format: torch.memory_format, mean: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(shape, generator=generator) + mean
    weight = torch.randn(shape[1], generator=generator)
    bias = torch.randn(shape[1], generator=generator)
    return x.contiguous(memory_format=memory_format), weight, bias


def in_float64(x: Tensor, weight: Tensor, bias: Tensor, groups: int, activation: str) -> Tensor:
    grouped = x.double().reshape(x.shape[0], groups, -1)
    variance, mean = torch.var_mean(grouped, dim=2, correction=0, keepdim=True)
    y = ((grouped - mean) / torch.sqrt(variance + 1e-5)).reshape(x.shape)
    channel = (1, -1, *[1] * (x.dim() - 2))
    y = y * weight.double().view(channel) + bias.double().view(channel)
    return F.silu(y) if activation == "silu" else y


def assert_close(got: Tensor, exact: Tensor) -> None:
    # 8 roundings of the formula and sqrt(256) of a lane's sum of at most 256 numbers, relative to
    # the magnitude of the terms (|y| + 1 or more).
    assert ((got.double() - exact).abs() / (1 + exact.abs())).max() < 24 * 2**-24


@pytest.mark.parametrize("activation", ["silu", "none"])
@pytest.mark.parametrize("mean", [0.0, 1e4])
@pytest.mark.parametrize("memory_format", LAYOUTS)
@pytest.mark.parametrize(("shape", "groups"), SHAPES)
def test_fused_forward_is_the_formula(
    shape: tuple[int, ...], groups: int, memory_format: torch.memory_format, mean: float,
    activation: str, isa: str, poisoned: None,
) -> None:  # fmt: skip
    x, weight, bias = inputs(shape, memory_format, mean)
    y = ops.group_norm_silu(x, weight, bias, groups, 1e-5, activation, backend="fused")
    assert y.stride() == x.stride()
    assert_close(y, in_float64(x, weight, bias, groups, activation))


@pytest.mark.parametrize("memory_format", LAYOUTS)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_outliers_and_scales(memory_format: torch.memory_format, scale: float) -> None:
    x, weight, bias = inputs((2, 8, 40, 40), memory_format)
    x = x * scale
    x[0, 0, 0, 0] = 1e4 * scale  # the first element, about which a block is centred
    y = ops.group_norm_silu(x, weight, bias, 4, 1e-5)
    assert_close(y, in_float64(x, weight, bias, 4, "silu"))


@pytest.mark.parametrize("memory_format", LAYOUTS)
def test_a_constant_group_gives_the_bias(memory_format: torch.memory_format) -> None:
    _, weight, bias = inputs((2, 8, 9, 9), memory_format)
    x = torch.full((2, 8, 9, 9), 12345.678).contiguous(memory_format=memory_format)
    y = ops.group_norm_silu(x, weight, bias, 2, 1e-5, "none")
    torch.testing.assert_close(y, bias.view(1, -1, 1, 1).expand_as(y), rtol=0, atol=1e-6)


@pytest.mark.parametrize("memory_format", LAYOUTS)
@pytest.mark.parametrize(("shape", "groups"), [((7, 24, 31, 33), 4), ((1, 6, 200, 201), 2)])
def test_bits_do_not_depend_on_threads(
    shape: tuple[int, ...], groups: int, memory_format: torch.memory_format, set_threads: Any
) -> None:
    x, weight, bias = inputs(shape, memory_format)
    results = []
    for threads in (1, 2, 3, 8):
        set_threads(threads)
        results += [ops.group_norm_silu(x, weight, bias, groups, 1e-5) for _ in range(2)]
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("memory_format", LAYOUTS)
def test_an_image_does_not_depend_on_its_batch(memory_format: torch.memory_format) -> None:
    x, weight, bias = inputs((9, 24, 31, 33), memory_format)
    whole = ops.group_norm_silu(x, weight, bias, 4, 1e-5)
    for i in (0, 8):
        assert torch.equal(
            whole[i : i + 1], ops.group_norm_silu(x[i : i + 1], weight, bias, 4, 1e-5)
        )


def test_non_contiguous_inputs_keep_their_kind_of_layout() -> None:
    x, weight, bias = inputs((2, 12, 9, 8), torch.contiguous_format)
    last = x.contiguous(memory_format=torch.channels_last)
    exact = in_float64(x[:, :8], weight[:8], bias[:8], 4, "silu")
    spread = torch.stack([weight, weight], dim=1)[:8, 0]
    for part, memory_format in zip((x[:, :8], last[:, :8]), LAYOUTS, strict=True):
        y = ops.group_norm_silu(part, spread, bias[:8], 4, 1e-5)
        assert y.is_contiguous(memory_format=memory_format)
        assert_close(y, exact)
    turned = x.transpose(2, 3)
    y = ops.group_norm_silu(turned, weight, bias, 4, 1e-5)
    assert_close(y, in_float64(turned, weight, bias, 4, "silu"))


@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 10), (2, 6, 3, 4, 5)])
def test_other_ranks(shape: tuple[int, ...]) -> None:
    x, weight, bias = inputs(shape, torch.contiguous_format)
    y = ops.group_norm_silu(x, weight, bias, 3, 1e-5)
    assert_close(y, in_float64(x, weight, bias, 3, "silu"))


@pytest.mark.parametrize("backend", ["reference", None])
def test_an_empty_batch_passes(backend: str | None) -> None:
    _, weight, bias = inputs((1, 8, 4, 4), torch.contiguous_format)
    y = ops.group_norm_silu(torch.zeros(0, 8, 4, 4), weight, bias, 2, 1e-5, backend=backend)
    assert y.shape == (0, 8, 4, 4)


def test_nan_spoils_its_group_only() -> None:
    x, weight, bias = inputs((2, 8, 6, 6), torch.contiguous_format)
    x[1, 5, 2, 3] = float("nan")
    for memory_format in LAYOUTS:
        y = ops.group_norm_silu(x.contiguous(memory_format=memory_format), weight, bias, 4, 1e-5)
        assert y[1, 4:6].isnan().all()
        assert y[0].isfinite().all()
        assert y[1, :4].isfinite().all()
        assert y[1, 6:].isfinite().all()


def test_silu_holds_its_digits_over_its_whole_range(isa: str) -> None:
    # With one huge bias per channel and weight 0, the op is SiLU of the bias.
    bias = torch.cat([torch.linspace(-87, 87, 4001), torch.tensor([-1e4, 1e4, -1e-30, 0.0])])
    x = torch.zeros(1, len(bias), 1, 1)
    got = ops.group_norm_silu(x, torch.zeros_like(bias), bias, 1, 1e-5).flatten().double()
    exact = F.silu(bias.double())
    # exp carries the rounding of its argument: |t| 2^-24 relative where |t| is large.
    allowed = exact.abs() * 4 * 2**-23 + 1e-30
    assert torch.all((got - exact).abs() <= allowed)


def test_training_runs_the_plain_ops() -> None:
    x, weight, bias = inputs((2, 8, 6, 6), torch.contiguous_format)
    y = ops.group_norm_silu(x, weight.requires_grad_(), bias, 2, 1e-5)
    assert y.grad_fn is not None
    assert y.grad_fn.name() == "SiluBackward0"
    with torch.no_grad():
        assert ops.group_norm_silu(x, weight, bias, 2, 1e-5).grad_fn is None


@pytest.mark.parametrize("silu", [True, False])
def test_gradients_of_the_custom_op(silu: bool) -> None:
    generator = torch.Generator().manual_seed(5)
    shapes = ((2, 4, 3, 2), (4,), (4,))
    args = [
        torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes
    ]

    def op(*tensors: Tensor) -> Tensor:
        return torch.ops.advkd.group_norm_silu(*tensors, 2, 1e-5, silu)

    assert torch.autograd.gradcheck(op, args)
    assert torch.autograd.gradgradcheck(op, args)


def test_fused_gradients_are_those_of_the_reference() -> None:
    if ops.extension is None:
        pytest.skip("the C++ extension is not installed")
    args = [t.requires_grad_() for t in inputs((2, 8, 6, 5), torch.channels_last)]
    fused, plain = (
        torch.autograd.grad(
            ops.group_norm_silu(*args, 2, 1e-5, backend=backend).square().sum(), args
        )
        for backend in ("fused", None)
    )
    for got, expected in zip(fused, plain, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("memory_format", LAYOUTS)
def test_op_is_registered_correctly(memory_format: torch.memory_format) -> None:
    args = [t.requires_grad_() for t in inputs((2, 6, 5, 3), memory_format)]
    torch.library.opcheck(torch.ops.advkd.group_norm_silu, (*args, 3, 1e-5, True))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.norm = nn.GroupNorm(2, 8)

    def forward(self, x: Tensor) -> Tensor:
        return ops.group_norm_silu(self.conv(x), self.norm.weight, self.norm.bias, 2, 1e-5)


@pytest.mark.parametrize("grad", [True, False])
def test_a_module_compiles_without_graph_breaks(grad: bool) -> None:
    torch._dynamo.reset()
    block = Block()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 3, 9, 9)
    with torch.set_grad_enabled(grad):
        got, expected = compiled(x), block(x)
    torch.testing.assert_close(got, expected)
    assert got.requires_grad == grad


def test_a_module_exports_with_and_without_the_op() -> None:
    block = Block().requires_grad_(False)
    x = torch.randn(2, 3, 9, 9)
    batch = {"x": {0: torch.export.Dim("batch", min=2)}}
    for backend, expected in ((None, ops.extension is not None), ("reference", False)):
        with ops.use_backend(backend):
            program = torch.export.export(block, (x,), dynamic_shapes=batch)
        assert ("advkd.group_norm_silu" in str(program.graph)) == expected
        more = torch.randn(5, 3, 9, 9)
        torch.testing.assert_close(program.module()(more), block(more))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"num_groups": 5}, ValueError, "num_groups=5 does not divide channels=8"),
        ({"num_groups": 0}, ValueError, "num_groups=0"),
        ({"weight": torch.ones(7)}, ValueError, "must both be"),
        ({"bias": torch.ones(8, 1)}, ValueError, "must both be"),
        ({"x": torch.zeros(8)}, ValueError, "B, C"),
        ({"x": torch.zeros(2, 8, dtype=torch.int64)}, TypeError, "floating"),
        ({"activation": "relu"}, ValueError, "activation='relu'"),
        ({"eps": -1.0}, ValueError, "eps=-1.0"),
        ({"backend": "fast"}, ValueError, "backend is 'fast'"),
        ({"bias": torch.zeros(8, device="meta")}, ValueError, "one device"),
    ],
)
def test_bad_arguments_are_refused(
    change: dict[str, Any], error: type[Exception], words: str
) -> None:
    x, weight, bias = inputs((2, 8, 4, 4), torch.contiguous_format)
    args = {"x": x, "weight": weight, "bias": bias, "num_groups": 2, "eps": 1e-5} | change
    with pytest.raises(error, match=words):
        ops.group_norm_silu(**args)


@pytest.mark.gpu
@pytest.mark.parametrize("memory_format", LAYOUTS)
@pytest.mark.parametrize(("shape", "groups"), SHAPES)
def test_cuda_forward_is_the_formula(
    shape: tuple[int, ...], groups: int, memory_format: torch.memory_format
) -> None:
    x, weight, bias = inputs(shape, memory_format)
    exact = in_float64(x, weight, bias, groups, "silu")
    y = ops.group_norm_silu(x.cuda(), weight.cuda(), bias.cuda(), groups, 1e-5)
    assert_close(y.cpu(), exact)
