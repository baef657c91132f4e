"""GroupNorm-SiLU: against float64, in the shapes that break kernels; gradients; compilation."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from advkd import ops
from advkd.models.layers import ResnetBlock
from advkd.ops import _group_norm_silu, reference

needs_extension = pytest.mark.skipif(
    ops.extension is None, reason="the C++ extension is not installed"
)
FORWARD = torch.ops.advkd.group_norm_silu
BACKWARD = torch.ops.advkd.group_norm_silu_backward

# (shape, groups): one element, odd sizes, few and many channels, a group per channel, one group,
# groups of 3 channels, several blocks in a group, an image beyond the cache, a short last block
SHAPES = [
    ((1, 1, 1, 1), 1),
    ((2, 6, 1, 1), 3),
    ((3, 30, 7, 5), 5),
    ((2, 48, 17, 3), 16),
    ((2, 7, 13, 11), 7),
    ((3, 32, 28, 28), 8),
    ((1, 20, 64, 65), 1),
    ((1, 8, 130, 131), 2),
    ((1, 4100, 2, 1), 41),
]
LAYOUTS = [torch.contiguous_format, torch.channels_last]
NAMES = ("y", "dx", "dweight", "dbias", "dscale", "dshift")


class Inputs(NamedTuple):
    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    scale: Tensor | None
    shift: Tensor | None
    grad_y: Tensor


def inputs(
    shape: tuple[int, ...],
    memory_format: torch.memory_format = torch.contiguous_format,
    dtype: torch.dtype = torch.float32,
    mean: float = 0.0,
) -> Inputs:
    generator = torch.Generator().manual_seed(3)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)

    B, C = shape[:2]
    x, grad_y = normal(*shape) + mean, normal(*shape)
    x, grad_y = (t.contiguous(memory_format=memory_format) for t in (x, grad_y))
    return Inputs(x, normal(C), normal(C), normal(B, C), normal(B, C), grad_y)


def both_ways(
    args: Inputs, groups: int, activation: str = "silu", backend: str = "fused"
) -> list[Any]:
    """y, dx, dweight, dbias, dscale, dshift; None where there is no such parameter."""
    leaves = [t if t is None else t.detach().requires_grad_() for t in args[:5]]
    x, weight, bias, scale, shift = leaves
    y = ops.group_norm_silu(
        x, weight, bias, groups, 1e-5, activation, scale, shift, backend=backend
    )
    slopes = iter(torch.autograd.grad(y, [t for t in leaves if t is not None], args.grad_y))
    return [y.detach(), *(t if t is None else next(slopes) for t in leaves)]


def exact(args: Inputs, groups: int, silu: bool) -> list[tuple[Tensor, Tensor]]:
    """The same in float64 by the formula; and each result's size, which its rounding follows: the
    sum of the magnitudes of the terms that it is a sum of."""
    shape, B = args.x.shape, args.x.shape[0]
    x, grad_y = (t.double().reshape(B, groups, shape[1] // groups, -1) for t in (args.x, args[5]))
    w, b, s, t = (
        torch.tensor(absent, dtype=torch.float64)
        if p is None
        else p.double().reshape(-1, groups, shape[1] // groups, 1)
        for p, absent in zip(args[1:5], (1, 0, 0, 0), strict=True)
    )
    variance, mean = torch.var_mean(x, dim=(2, 3), correction=0, keepdim=True)
    rstd = 1 / torch.sqrt(variance + 1e-5)
    xhat = (x - mean) * rstd
    near = xhat.abs() + 1  # the mean is rounded too
    gain = 1 + s
    n = xhat * w + b
    u = n * gain + t
    gate = torch.sigmoid(u)
    y, slope = (u * gate, gate * (1 + u * (1 - gate))) if silu else (u, torch.ones_like(u))
    size_u = near * (w * gain).abs() + (b * gain).abs() + t.abs()
    g, size_g = grad_y * slope, grad_y.abs() * (1 + size_u)
    k, size_k = g * w * gain, size_g * (w * gain).abs()

    def group_mean(terms: Tensor) -> Tensor:
        return terms.mean(dim=(2, 3), keepdim=True)

    def of_channels(terms: Tensor) -> Tensor:
        return terms.sum(dim=(0, 3)).flatten()

    def of_samples(terms: Tensor) -> Tensor:
        return terms.sum(dim=3).flatten(1)

    dx = rstd * (k - group_mean(k) - xhat * group_mean(k * xhat))
    size_dx = rstd * (size_k + group_mean(size_k) + near * group_mean(size_k * near))
    return [
        (y.reshape(shape), (size_u + y.abs()).reshape(shape)),
        (dx.reshape(shape), size_dx.reshape(shape)),
        (of_channels(g * gain * xhat), of_channels(size_g * near * gain.abs())),
        (of_channels(g * gain), of_channels(size_g * gain.abs())),
        (of_samples(g * n), of_samples(size_g * (near * w.abs() + b.abs()))),
        (of_samples(g), of_samples(size_g)),
    ]


def assert_close(got: list[Any], args: Inputs, groups: int, silu: bool = True) -> None:
    # A term takes 16 roundings at most (exp's polynomial included), and a lane adds up at most 256
    # of them, whose roundings do a random walk: 16 + sqrt(256). Half types are widened exactly and
    # round the result once more; one that is subnormal has an absolute error.
    for name, result, (truth, size) in zip(NAMES, got, exact(args, groups, silu), strict=True):
        if result is None:
            continue
        wide = torch.finfo(reference.wide_dtype(result.dtype)).eps / 2
        held = torch.finfo(result.dtype)
        allowed = 32 * wide * size + held.eps / 2 * truth.abs() + held.smallest_normal * held.eps
        excess = ((result.double() - truth).abs() / allowed).max()
        assert excess <= 1, (name, float(excess))


@pytest.mark.parametrize(("activation", "mean"), [("silu", 0.0), ("silu", 1e4), ("none", 1e4)])
@pytest.mark.parametrize("memory_format", LAYOUTS)
@pytest.mark.parametrize(("shape", "groups"), SHAPES)
def test_both_ways_are_the_formula(
    shape: tuple[int, ...], groups: int, memory_format: torch.memory_format, mean: float,
    activation: str, isa: str, nan_filled: None,
) -> None:  # fmt: skip
    args = inputs(shape, memory_format, mean=mean)
    results = both_ways(args, groups, activation)
    assert results[0].stride() == results[1].stride() == args.x.stride()
    assert_close(results, args, groups, activation == "silu")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("memory_format", LAYOUTS)
@pytest.mark.parametrize(("shape", "groups"), SHAPES[:5] + SHAPES[7:8])
def test_other_dtypes(
    shape: tuple[int, ...], groups: int, memory_format: torch.memory_format, dtype: torch.dtype,
    isa: str, nan_filled: None,
) -> None:  # fmt: skip
    args = inputs(shape, memory_format, dtype)
    results = both_ways(args, groups)
    assert all(result.dtype == dtype for result in results)
    assert_close(results, args, groups)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_convert_as_in_torch(dtype: torch.dtype, isa: str) -> None:
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    numbers = every[every.isfinite()].float()
    halfway = (numbers[:-1] + numbers[1:]) / 2
    # A group of one element is 0, so that the op without activation gives the bias.
    bias = torch.cat([numbers, halfway, numbers * (1 + 2.0**-11), numbers * 1.1])
    x = torch.zeros(1, len(bias), 1, 1, dtype=dtype)
    y = ops.group_norm_silu(x, None, bias, len(bias), 1e-5, "none", backend="fused").flatten()
    assert torch.equal(y, bias.to(dtype))
    # Two channels in a group, a and 0, become 1 and -1, if a is read as it is, however small.
    large = every[(every.abs() > 1e-15) & (every.abs() < 1e15)]  # so that their squares are finite
    x = torch.stack([large, torch.zeros_like(large)], dim=1).reshape(1, -1, 1, 1)
    y = ops.group_norm_silu(x, None, None, len(large), 0.0, "none", backend="fused")
    assert torch.equal(y.reshape(-1, 2)[:, 0], large.sign())


@pytest.mark.parametrize("given", list(itertools.product([True, False], repeat=4)))
def test_absent_parameters(given: tuple[bool, ...]) -> None:
    for memory_format in LAYOUTS:
        args = inputs((2, 12, 5, 3), memory_format)
        given_only = [t if there else None for t, there in zip(args[1:5], given, strict=True)]
        args = Inputs(args.x, *given_only, args.grad_y)
        for backend in ("fused", "reference"):
            assert_close(both_ways(args, 4, backend=backend), args, 4)


@pytest.mark.parametrize("memory_format", LAYOUTS)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_outliers_and_scales(memory_format: torch.memory_format, scale: float) -> None:
    args = inputs((2, 8, 40, 40), memory_format)
    x = args.x * scale
    x[0, 0, 0, 0] = 1e4 * scale  # the first element, about which a block is centred
    args = args._replace(x=x)
    assert_close(both_ways(args, 4), args, 4)


@pytest.mark.parametrize("memory_format", LAYOUTS)
@pytest.mark.parametrize("activation", ["silu", "none"])
def test_stores_that_pass_the_cache_write_the_same(
    memory_format: torch.memory_format, activation: str, isa: str, nan_filled: None
) -> None:
    args = inputs((5, 8, 240, 240), memory_format)  # 9 MiB, and one image 1.8
    whole = both_ways(args, 4, activation)[:2]
    one = Inputs(*(t[:1] if t is not None and t.dim() > 1 else t for t in args))
    for a, b in zip(whole, both_ways(one, 4, activation)[:2], strict=True):
        assert torch.equal(a[:1], b)
        assert a.isfinite().all()


@pytest.mark.parametrize("memory_format", LAYOUTS)
def test_a_constant_group_gives_the_bias(memory_format: torch.memory_format) -> None:
    bias = inputs((2, 8, 9, 9)).bias
    assert bias is not None
    x = torch.full((2, 8, 9, 9), 12345.678).contiguous(memory_format=memory_format)
    y = ops.group_norm_silu(x, None, bias, 2, 1e-5, "none")
    torch.testing.assert_close(y, bias.view(1, -1, 1, 1).expand_as(y), rtol=0, atol=1e-6)


@pytest.mark.parametrize("memory_format", LAYOUTS)
@pytest.mark.parametrize(("shape", "groups"), [((7, 24, 31, 33), 4), ((1, 6, 200, 201), 2)])
def test_bits_repeat_and_do_not_depend_on_threads(
    shape: tuple[int, ...], groups: int, memory_format: torch.memory_format, set_threads: Any
) -> None:
    args = inputs(shape, memory_format)
    results = []
    for threads in (1, 2, 3, 8):
        set_threads(threads)
        results += [both_ways(args, groups) for _ in range(2)]
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("memory_format", LAYOUTS)
def test_an_image_does_not_depend_on_its_batch(memory_format: torch.memory_format) -> None:
    args = inputs((9, 24, 31, 33), memory_format)._replace(scale=None, shift=None)
    whole = both_ways(args, 4)[:2]
    for i in (0, 8):
        one = args._replace(x=args.x[i : i + 1], grad_y=args.grad_y[i : i + 1])
        for a, b in zip(whole, both_ways(one, 4)[:2], strict=True):
            assert torch.equal(a[i : i + 1], b)


def test_non_contiguous_inputs_keep_their_kind_of_layout() -> None:
    args = inputs((2, 12, 9, 8))
    _, weight, bias, scale, shift = (
        None if t is None else torch.stack([t, t], dim=-1)[..., 0].narrow(-1, 0, 8)
        for t in (None, *args[1:5])
    )
    for memory_format in LAYOUTS:
        x = args.x.contiguous(memory_format=memory_format)[:, :8]
        grad_y = args.grad_y[:1, :1, :1, :1].expand(2, 8, 9, 8)
        part = Inputs(x, weight, bias, scale, shift, grad_y)
        results = both_ways(part, 4)
        for result in results[:2]:
            assert result.is_contiguous(memory_format=memory_format)
        assert_close(results, part, 4)
    transposed = args._replace(x=args.x.transpose(2, 3), grad_y=args.grad_y.transpose(2, 3))
    assert_close(both_ways(transposed, 4), transposed, 4)


@pytest.mark.parametrize("backend", ["fused", "reference"])
@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 10), (2, 6, 3, 4, 5)])
def test_other_ranks(shape: tuple[int, ...], backend: str) -> None:
    args = inputs(shape)
    assert_close(both_ways(args, 3, backend=backend), args, 3)


@pytest.mark.parametrize("backend", ["fused", "reference"])
def test_five_dimensions_keep_channels_last(backend: str) -> None:
    args = inputs((2, 6, 3, 4, 5), torch.channels_last_3d)
    results = both_ways(args, 3, backend=backend)
    assert results[0].stride() == args.x.stride()
    if backend == "fused":
        assert results[1].stride() == args.x.stride()
    assert_close(results, args, 3)


def test_film_may_have_sizes_of_one_behind() -> None:
    x, weight, bias, scale, shift, _ = inputs((2, 8, 4, 4))
    assert scale is not None
    assert shift is not None
    y = ops.group_norm_silu(x, weight, bias, 2, 1e-5, "silu", scale, shift)
    wide, tall = scale[:, :, None, None], shift[:, :, None]
    assert torch.equal(ops.group_norm_silu(x, weight, bias, 2, 1e-5, "silu", wide, tall), y)


@pytest.mark.parametrize(
    ("shape", "backend"),
    [((0, 8, 4, 4), "reference"), ((0, 8, 4, 4), "fused"), ((2, 8, 0, 4), "fused")],
)
def test_empty_inputs(shape: tuple[int, ...], backend: str, nan_filled: None) -> None:
    y, *slopes = both_ways(inputs(shape), 2, backend=backend)
    assert y.shape == shape
    assert not any(slope.any() for slope in slopes)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", ["x", "grad_y"])
@pytest.mark.parametrize("memory_format", LAYOUTS)
def test_nonfinite_values_spread_as_in_torch(
    memory_format: torch.memory_format, place: str, bad: float
) -> None:
    args = inputs((2, 8, 6, 6), memory_format)
    args._asdict()[place][1, 5, 2, 3] = bad
    results = both_ways(args, 4)
    for got, expected in zip(results, both_ways(args, 4, backend="reference"), strict=True):
        assert torch.equal(got.isfinite(), expected.isfinite())
    y, dx = results[:2]
    assert not dx[1, 4:6].isfinite().any()
    assert y[1, 4:6].isnan().all() if place == "x" else y.isfinite().all()
    for t in (y, dx):
        assert t[0].isfinite().all()
        assert t[1, :4].isfinite().all()
        assert t[1, 6:].isfinite().all()


def test_silu_and_its_slope_are_right_over_the_whole_range(isa: str) -> None:
    u = torch.cat([torch.linspace(-87, 87, 4001), torch.tensor([-1e4, 1e4, -1e-30, 0.0])])
    # A group of one element is 0, so that the op is SiLU of the shift.
    x, shift = torch.zeros(1, len(u), 1, 1), u[None].requires_grad_()
    y = ops.group_norm_silu(x, None, None, len(u), 1e-5, shift=shift, backend="fused")
    (slope,) = torch.autograd.grad(y.sum(), shift)
    truth = u.double().requires_grad_()
    exact_y = F.silu(truth)
    (exact_slope,) = torch.autograd.grad(exact_y.sum(), truth)
    # The slope is a difference of gate (1 + u) and gate^2 u.
    size = torch.sigmoid(truth) * (1 + truth.abs())
    # Eight roundings, and those of the exponent of e^-u = 2^(-u log2 e): of log2 e and of the
    # product, each relative to |u|.
    roundings = 8 + 2 * truth.abs()
    for got, expected, terms in ((y, exact_y, exact_y.abs()), (slope, exact_slope, size)):
        error = (got.flatten().double() - expected).abs()
        assert torch.all(error <= roundings * 2**-24 * terms + 1e-30)


def small_inputs() -> list[Tensor]:
    """x, weight, bias, scale, shift in float64, as leaves."""
    args = inputs((2, 4, 3, 2), dtype=torch.float64)[:5]
    return [t.requires_grad_() for t in args if t is not None]


@pytest.mark.parametrize("activation", ["silu", "none"])
def test_gradients_and_their_gradients(activation: str) -> None:
    def op(x: Tensor, *parameters: Tensor) -> Tensor:
        weight, bias, scale, shift = (*parameters, *(None,) * (4 - len(parameters)))
        return ops.group_norm_silu(x, weight, bias, 2, 1e-5, activation, scale, shift)

    args = small_inputs()
    assert torch.autograd.gradcheck(op, args)
    for given in (5, 3, 1):
        assert torch.autograd.gradgradcheck(op, args[:given])


def test_gradients_of_the_op_itself() -> None:
    op = lambda *x: FORWARD(*x, 2, 1e-5, True)[0]  # noqa: E731
    assert torch.autograd.gradcheck(op, small_inputs())
    assert torch.autograd.gradgradcheck(op, small_inputs())


def test_third_derivatives() -> None:
    def slope(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        y = ops.group_norm_silu(x, weight, None, 1, 1e-5)
        return torch.autograd.grad(y.sin().sum(), (x, weight), create_graph=True)

    x, weight, *_ = (t.detach() for t in small_inputs())
    args = [t.requires_grad_() for t in (x[:1, :1].clone(), weight[:1].clone())]
    assert torch.autograd.gradgradcheck(slope, args)


def test_only_what_needs_a_gradient_gets_one() -> None:
    x, weight, bias, *_ = inputs((2, 8, 4, 4))
    assert weight is not None
    assert ops.group_norm_silu(x, weight, bias, 2, 1e-5).grad_fn is None
    y = ops.group_norm_silu(x, weight.requires_grad_(), bias, 2, 1e-5)
    y.sum().backward()
    assert weight.grad is not None
    assert x.grad is None
    with torch.no_grad():
        assert ops.group_norm_silu(x, weight, bias, 2, 1e-5).grad_fn is None


@needs_extension
def test_inference_mode_goes_past_the_dispatcher(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias, scale, shift, _ = inputs((2, 8, 4, 4))
    expected = [
        ops.group_norm_silu(x, weight, bias, 2, 1e-5, "silu", *film)
        for film in ((), (scale, shift))
    ]
    monkeypatch.setattr(_group_norm_silu, "_GROUP_NORM_SILU", None)  # the way by the dispatcher
    with torch.inference_mode():
        inside = [t if t is None else t.clone() for t in (x, weight, bias)]
        got = ops.group_norm_silu(*inside, 2, 1e-5)
    assert got.is_inference()
    assert torch.equal(got, expected[0])
    monkeypatch.undo()
    with torch.inference_mode():
        assert torch.equal(ops.group_norm_silu(*inside, 2, 1e-5, "silu", scale, shift), expected[1])


@needs_extension
def test_training_runs_the_fused_op() -> None:
    x, weight, bias, *_ = inputs((2, 8, 6, 6))
    weight = nn.Parameter(weight)
    y = ops.group_norm_silu(x, weight, bias, 2, 1e-5)
    assert y.grad_fn is not None
    assert "GroupNormSilu" in y.grad_fn.name()
    with ops.use_backend("reference"):
        y = ops.group_norm_silu(x, weight, bias, 2, 1e-5)
    assert y.grad_fn is not None
    assert y.grad_fn.name() == "SiluBackward0"


def test_the_r1_gradient_is_the_references() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(ResnetBlock(4, 8, None, 4), ResnetBlock(8, 8, None, 4)).double()
    x = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    slopes = []
    for backend in (None, "reference"):
        network.zero_grad()
        image = x.clone().requires_grad_()
        with ops.use_backend(backend):
            (slope,) = torch.autograd.grad(network(image).sum(), image, create_graph=True)
            slope.square().sum().backward()
        slopes.append([p.grad for p in network.parameters() if p.grad is not None])
        assert len(slopes[-1]) > 10
    for fused, plain in zip(*slopes, strict=True):
        torch.testing.assert_close(fused, plain)


def test_ops_are_registered_correctly() -> None:
    *some, grad_y = inputs((2, 6, 5, 3), torch.channels_last)
    args = [t.requires_grad_() for t in some if t is not None]
    torch.library.opcheck(FORWARD, (*args, 3, 1e-5, True))
    _, mean, rstd = (t.detach() for t in FORWARD(*args, 3, 1e-5, True))
    absent = (args[0], None, args[2], None, None)
    torch.library.opcheck(BACKWARD, (grad_y, *absent, mean, rstd, 3, 1e-5, False))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backend", [None, "reference"])
def test_half_precision_with_float32_parameters(dtype: torch.dtype, backend: str | None) -> None:
    wide, narrow = inputs((2, 8, 6, 6)), inputs((2, 8, 6, 6), dtype=dtype)
    args = wide._replace(x=narrow.x, grad_y=narrow.grad_y)
    for autocast in (False, True):
        with ops.use_backend(backend), torch.autocast("cpu", dtype, enabled=autocast):
            results = both_ways(args, 2, backend=None)  # type: ignore[arg-type]
            plain = F.group_norm(args.x, 2, args.weight, args.bias)
            y = ops.group_norm_silu(wide.x, wide.weight, wide.bias, 2, 1e-5)
        assert results[0].dtype == results[1].dtype == plain.dtype == dtype
        assert all(slope.dtype == torch.float32 for slope in results[2:])
        assert y.dtype == torch.float32  # as torch's group_norm under autocast on the CPU
        assert_close(results, args, 2)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.norm = nn.GroupNorm(2, 8)
        self.film = nn.Parameter(torch.full((8,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        h = ops.group_norm_silu(self.conv(x), self.norm.weight, self.norm.bias, 2, 1e-5)
        film = self.film.expand(x.shape[0], -1)
        return ops.group_norm_silu(h, None, None, 4, 1e-5, "none", film, None)


@pytest.mark.parametrize("grad", [True, False])
def test_a_module_compiles_without_graph_breaks(grad: bool) -> None:
    torch._dynamo.reset()
    block, x = Block(), torch.randn(2, 3, 9, 9)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    with torch.set_grad_enabled(grad):
        got, expected = compiled(x), block(x)
    torch.testing.assert_close(got, expected)
    assert got.requires_grad == grad
    if grad:
        slopes = [
            torch.autograd.grad(y.sin().sum(), list(block.parameters())) for y in (got, expected)
        ]
        torch.testing.assert_close(*slopes)


def test_a_module_exports_with_and_without_the_op() -> None:
    block, x = Block().requires_grad_(False), torch.randn(2, 3, 9, 9)
    batch = {"x": {0: torch.export.Dim("batch", min=2)}}
    more = torch.randn(5, 3, 9, 9)
    for backend, expected in ((None, ops.extension is not None), ("reference", False)):
        with ops.use_backend(backend):
            program = torch.export.export(block, (x,), dynamic_shapes=batch)
        assert ("advkd.group_norm_silu" in str(program.graph)) == expected
        torch.testing.assert_close(program.module()(more), block(more))


@pytest.mark.parametrize("memory_format", LAYOUTS)
def test_an_exported_op_runs_without_the_extension(
    memory_format: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    *args, grad_y = inputs((2, 6, 5, 3), memory_format)

    def results() -> tuple[Tensor, ...]:
        y, mean, rstd = FORWARD(*args, 3, 1e-5, True)
        return y, mean, rstd, *BACKWARD(grad_y, *args, mean, rstd, 3, 1e-5, True)

    fused = results()
    monkeypatch.setattr("advkd.ops._backend.extension_missing", "it was left out")
    for got, expected in zip(results(), fused, strict=True):
        assert got.stride() == expected.stride()
        assert got.dtype == expected.dtype
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"num_groups": 5}, ValueError, "num_groups=5 does not divide channels=8"),
        ({"num_groups": 0}, ValueError, "num_groups=0"),
        ({"weight": torch.ones(7)}, ValueError, r"weight has the shape \(7,\)"),
        ({"bias": torch.ones(8, 1)}, ValueError, r"bias has the shape \(8, 1\)"),
        ({"scale": torch.ones(8)}, ValueError, r"scale has the shape \(8,\)"),
        ({"shift": torch.ones(2, 8, 4, 4)}, ValueError, r"shift has .* must be \(2, 8\)"),
        ({"bias": torch.ones(8, dtype=torch.int32)}, TypeError, "bias is torch.int32"),
        ({"x": torch.zeros(8)}, ValueError, "B, C"),
        ({"x": torch.zeros(2, 8, dtype=torch.int64)}, TypeError, "floating"),
        ({"activation": "relu"}, ValueError, "activation='relu'"),
        ({"eps": -1.0}, ValueError, "eps=-1.0"),
        ({"eps": float("nan")}, ValueError, "eps=nan"),
        ({"backend": "fast"}, ValueError, "backend is 'fast'"),
        ({"bias": torch.zeros(8, device="meta")}, ValueError, "one device"),
    ],
)
def test_bad_arguments_are_refused(
    change: dict[str, Any], error: type[Exception], words: str
) -> None:
    x, weight, bias, *_ = inputs((2, 8, 4, 4))
    args = {"x": x, "weight": weight, "bias": bias, "num_groups": 2, "eps": 1e-5} | change
    with pytest.raises(error, match=words):
        ops.group_norm_silu(**args)


@pytest.mark.gpu
@pytest.mark.parametrize("memory_format", LAYOUTS)
@pytest.mark.parametrize(("shape", "groups"), SHAPES)
def test_cuda_is_the_formula(
    shape: tuple[int, ...], groups: int, memory_format: torch.memory_format
) -> None:
    args = inputs(shape, memory_format)
    results = both_ways(Inputs(*(t if t is None else t.cuda() for t in args)), groups)
    assert_close([result.cpu() for result in results], args, groups)


@pytest.mark.gpu
def test_autocast_keeps_half_types() -> None:
    x, weight, bias = (t.cuda() for t in inputs((2, 8, 6, 6))[:3] if t is not None)
    with torch.autocast("cuda", torch.float16):
        for backend in ("fused", "reference"):
            y = ops.group_norm_silu(x.half(), weight, bias, 2, 1e-5, backend=backend)
            assert y.dtype == torch.float16
