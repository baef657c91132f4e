"""Attention: against float64, in the shapes that break kernels; gradients; compilation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from advkd import ops
from advkd.config import DiscriminatorConfig
from advkd.models.discriminator import Discriminator
from advkd.ops import reference

pytestmark = pytest.mark.skipif(ops.extension is None, reason="the C++ extension is not installed")

# (B, H, N, M, D): lengths that vectors, tiles and blocks divide or do not, every kind of head_dim
SHAPES = [
    (1, 1, 1, 1, 8),
    (2, 3, 2, 1, 16),
    (1, 2, 1, 17, 24),
    (1, 2, 17, 2, 512),
    (3, 1, 49, 49, 64),
    (2, 1, 49, 49, 96),
    (1, 2, 64, 100, 48),
    (1, 1, 257, 64, 128),
    (2, 2, 100, 257, 16),
    (1, 1, 64, 1024, 64),
    (1, 1, 1024, 100, 8),
    (1, 1, 100, 256, 256),
    (1, 1, 49, 1024, 512),
]
ATTENTION = torch.ops.advkd.attention
BACKWARD = torch.ops.advkd.attention_backward


def inputs(
    shape: tuple[int, ...], dtype: torch.dtype = torch.float32, spread: float = 1.0
) -> list[Tensor]:
    """q, k, v and grad_out, as the networks have them: (B, N, H * D) with the heads apart."""
    B, H, N, M, D = shape
    generator = torch.Generator().manual_seed(7)
    return [
        (torch.randn(B, n, H * D, generator=generator, dtype=torch.float64) * spread)
        .to(dtype)
        .unflatten(2, (H, D))
        .transpose(1, 2)
        for n in (N, M, M, N)
    ]


def exact(q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> tuple[list[Tensor], Tensor]:
    """out, lse, dq, dk, dv in float64; and the magnitudes that a row's rounding errors follow."""
    q, k, v = (x.double().detach().requires_grad_() for x in (q, k, v))
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    out = torch.softmax(scores, dim=-1) @ v
    grads = torch.autograd.grad(out, (q, k, v), grad.double())
    results = [out, torch.logsumexp(scores, dim=-1), *grads]
    return [x.detach() for x in results], scores.detach()


def assert_close(got: Tensor, truth: Tensor, terms: int) -> None:
    # `terms` numbers are summed one after the other, twice at most (products, then weights), and
    # their errors add up like a random walk; 16 covers the roundings of one term and the worst of
    # many elements. Relative to the root mean square, with which those errors go.
    eps = torch.finfo(got.dtype).eps
    size = truth.square().mean().sqrt() + truth.abs()
    error = (got.double() - truth).abs()
    assert (error <= 16 * eps * terms**0.5 * size + 16 * eps).all(), float((error / size).max())


def both_ways(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, fused: bool = True
) -> tuple[Tensor, ...]:
    scale = q.shape[-1] ** -0.5
    out, lse = ATTENTION(q, k, v, scale, fused)
    return out, lse, *BACKWARD(grad, q, k, v, out, lse, scale, fused)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_fused_is_the_formula(
    shape: tuple[int, ...], dtype: torch.dtype, isa: str, nan_filled: None
) -> None:
    args = inputs(shape, dtype)
    truth, _ = exact(*args)
    terms = shape[4] + max(shape[2:4])
    for got, expected in zip(both_ways(*args), truth, strict=True):
        assert got.dtype == dtype
        assert_close(got, expected, terms)


@pytest.mark.parametrize("shape", [SHAPES[4], SHAPES[8]])
def test_reference_is_the_formula(shape: tuple[int, ...]) -> None:
    args = inputs(shape, torch.float64)
    for got, expected in zip(both_ways(*args, fused=False), exact(*args)[0], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_round_only_at_the_ends(dtype: torch.dtype) -> None:
    args = inputs(SHAPES[6], dtype)
    out, lse, *grads = both_ways(*args)
    truth, _ = exact(*args)
    assert lse.dtype == torch.float32
    for got, expected in zip((out, *grads), (truth[0], *truth[2:]), strict=True):
        assert got.dtype == dtype
        # out is rounded twice: the backward uses the rounded one.
        size = expected.abs() + expected.square().mean().sqrt()
        assert ((got.double() - expected).abs() <= 2 * torch.finfo(dtype).eps * size).all()


def test_scores_far_apart_lose_no_digits() -> None:
    args = inputs((1, 2, 49, 600, 64), spread=8.0)
    args[1][0, 0, 590] *= 4  # the maximum comes in a late tile of keys
    truth, scores = exact(*args)
    # A score s is rounded by s eps, which its weight exp(s) carries on.
    eps = torch.finfo(torch.float32).eps * float(scores.abs().max())
    for got, expected in zip(both_ways(*args)[:2], truth[:2], strict=True):
        size = expected.abs() + expected.square().mean().sqrt()
        assert ((got.double() - expected).abs() <= 8 * eps * size).all()


def test_the_layout_joins_the_heads_without_a_copy() -> None:
    q, k, v, _ = inputs((2, 3, 9, 5, 16))
    for backend in ("fused", "reference"):
        out = ops.attention(q, k, v, backend=backend)
        assert out.transpose(1, 2).is_contiguous()


def test_any_strides_are_taken() -> None:
    q, k, v, grad = inputs((2, 2, 9, 17, 16))
    views = [
        q.contiguous(),
        k.transpose(2, 3).contiguous().transpose(2, 3),  # the last dimension is not consecutive
        torch.cat([v, v], dim=3)[..., :16],
        grad[:1, :, :1, :1].expand_as(grad),
    ]
    plain = [x.clone(memory_format=torch.contiguous_format) for x in views]
    for got, expected in zip(both_ways(*views), both_ways(*plain), strict=True):
        assert torch.equal(got, expected)


def test_bits_repeat_and_do_not_depend_on_threads(set_threads: Any) -> None:
    for shape in ((3, 2, 49, 49, 64), (1, 1, 257, 1024, 32)):
        args = inputs(shape)
        results = []
        for threads in (1, 2, 3, 8):
            set_threads(threads)
            results += [both_ways(*args) for _ in range(2)]
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_a_sample_does_not_depend_on_its_batch() -> None:
    q, k, v, _ = inputs((20, 1, 49, 49, 64))
    whole = ops.attention(q, k, v)
    assert torch.equal(whole[7:8], ops.attention(q[7:8], k[7:8], v[7:8]))


@pytest.mark.parametrize(("batch", "queries"), [(0, 4), (2, 0)])
def test_empty_inputs(batch: int, queries: int, nan_filled: None) -> None:
    q, k, v, grad = (x.requires_grad_() for x in inputs((batch, 2, queries, 3, 8)))
    out = ops.attention(q, k, v)
    assert out.shape == q.shape
    for x, slope in zip((q, k, v), torch.autograd.grad(out, (q, k, v), grad), strict=True):
        assert slope.shape == x.shape
        assert not slope.any()


@pytest.mark.parametrize("keys", [17, 600])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_nonfinite_values_spread_as_in_torch(keys: int, bad: float, place: int) -> None:
    args = inputs((1, 1, 5, keys, 8))[:3]
    args[place][0, 0, 3, 2] = bad
    got = ops.attention(*args)
    expected = reference.attention(*args, 8**-0.5)[0]
    assert torch.equal(got.isfinite(), expected.isfinite())
    assert torch.equal(got.isnan(), expected.isnan())


@pytest.mark.parametrize("keys", [17, 300])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", [0, 1, 2, 3])
def test_nonfinite_values_spread_to_the_gradients_as_in_torch(
    keys: int, bad: float, place: int
) -> None:
    args = inputs((1, 1, 5, keys, 8))
    args[place][0, 0, 3, 2] = bad
    grads = both_ways(*args)[2:]
    for got, expected in zip(grads, both_ways(*args, fused=False)[2:], strict=True):
        assert torch.equal(got.isfinite(), expected.isfinite())


def test_a_key_infinitely_far_has_no_weight() -> None:
    q, k, v, _ = inputs((1, 1, 3, 600, 8))
    q[..., 0] = 1.0
    k[:, :, :512, 0] = float("-inf")  # a whole tile of them
    got = ops.attention(q, k, v)
    torch.testing.assert_close(got, ops.attention(q, k[:, :, 512:], v[:, :, 512:]))
    everywhere = torch.full_like(k, float("-inf"))
    assert ops.attention(q.abs(), everywhere, v).isnan().all()


def small_inputs(shape: tuple[int, ...] = (2, 1, 3, 5, 8)) -> list[Tensor]:
    return [x.requires_grad_() for x in inputs(shape, torch.float64)[:3]]


def test_gradients_and_their_gradients() -> None:
    args = small_inputs()
    assert torch.autograd.gradcheck(ops.attention, args)
    assert torch.autograd.gradgradcheck(ops.attention, args)
    op = lambda *x: ATTENTION(*x, 0.3, True)[0]  # noqa: E731
    assert torch.autograd.gradcheck(op, args)
    assert torch.autograd.gradgradcheck(op, args)


def test_third_derivatives() -> None:
    def slope(*args: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(ops.attention(*args).sin().sum(), args, create_graph=True)

    assert torch.autograd.gradgradcheck(slope, small_inputs((1, 1, 2, 3, 8)))


def test_only_what_needs_a_gradient_gets_one() -> None:
    q, k, v, _ = inputs((1, 2, 4, 4, 8))
    assert ops.attention(q, k, v).grad_fn is None
    out = ops.attention(q, k.requires_grad_(), v)
    out.sum().backward()
    assert k.grad is not None
    assert q.grad is None
    with torch.no_grad():
        assert ops.attention(q, k, v).grad_fn is None


def test_the_r1_gradient_is_the_references() -> None:
    torch.manual_seed(0)
    config = DiscriminatorConfig(widths=(4, 8, 16), attention=(4,), groups=4)
    discriminator = Discriminator(config, 16, 1, [16]).double()
    x, noise = torch.randn(2, 2, 1, 16, 16, dtype=torch.float64)
    slopes = []
    for backend in ("fused", "reference"):
        discriminator.zero_grad()
        image = x.clone().requires_grad_()
        with ops.use_backend(backend):
            logits = discriminator(image, noise, 0)
            (slope,) = torch.autograd.grad(logits.sum(), image, create_graph=True)
            slope.square().sum().backward()
        slopes.append([p.grad for p in discriminator.parameters() if p.grad is not None])
        assert len(slopes[-1]) > 10
    for fused, plain in zip(*slopes, strict=True):
        torch.testing.assert_close(fused, plain)


def test_ops_are_registered_correctly() -> None:
    q, k, v, grad = (x.requires_grad_() for x in inputs((2, 2, 5, 3, 8)))
    torch.library.opcheck(ATTENTION, (q, k, v, 0.3, True))
    out, lse = (x.detach() for x in ATTENTION(q, k, v, 0.3, True))
    torch.library.opcheck(BACKWARD, (grad, q, k, v, out, lse, 0.3, True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_runs_in_its_dtype(dtype: torch.dtype) -> None:
    q, k, v, _ = inputs((1, 2, 9, 9, 16))
    plain = ops.attention(q.to(dtype), k.to(dtype), v.to(dtype))
    with torch.autocast("cpu", dtype):
        assert F.scaled_dot_product_attention(q, k, v).dtype == dtype
        assert torch.equal(ops.attention(q, k, v), plain)
        out = ops.attention(q.requires_grad_(), k, v)
        assert ops.attention(q.double(), k.double(), v.double()).dtype == torch.float64
    out.float().sum().backward()
    assert q.grad is not None
    assert q.grad.dtype == torch.float32


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(16, 48)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.proj(x).unflatten(2, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        return ops.attention(q, k, v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("grad", [True, False])
def test_a_module_compiles_without_graph_breaks(grad: bool) -> None:
    torch._dynamo.reset()
    block, x = Block(), torch.randn(2, 9, 16)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    with torch.set_grad_enabled(grad):
        got, expected = compiled(x), block(x)
    torch.testing.assert_close(got, expected)
    assert got.requires_grad == grad
    if grad:
        slopes = [
            torch.autograd.grad(y.square().sum(), list(block.parameters())) for y in (got, expected)
        ]
        torch.testing.assert_close(*slopes)


def test_a_module_exports_with_and_without_the_op() -> None:
    block, x = Block().requires_grad_(False), torch.randn(2, 9, 16)
    sizes = {"x": {0: torch.export.Dim("batch", min=2)}}
    more = torch.randn(5, 9, 16)
    for backend, expected in ((None, True), ("reference", False)):
        with ops.use_backend(backend):
            program = torch.export.export(block, (x,), dynamic_shapes=sizes)
        assert ("advkd.attention" in str(program.graph)) == expected
        torch.testing.assert_close(program.module()(more), block(more))


def test_an_exported_op_runs_without_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    args = inputs((1, 2, 9, 9, 16))
    fused = both_ways(*args)
    monkeypatch.setattr("advkd.ops._backend.extension_missing", "it was left out")
    for got, expected in zip(both_ways(*args), fused, strict=True):
        assert got.stride() == expected.stride()
        torch.testing.assert_close(got, expected)


def test_heads_that_no_kernel_takes_run_the_reference() -> None:
    q, k, v, _ = inputs((1, 2, 5, 5, 12))
    plain = ops.attention(q, k, v, backend="reference")
    assert torch.equal(ops.attention(q, k, v), plain)
    with pytest.raises(ValueError, match="head_dim=12 is no multiple of 8"):
        ops.attention(q, k, v, backend="fused")


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"q": torch.zeros(2, 4, 8)}, ValueError, "must be \\(B, H, N, D\\)"),
        ({"k": torch.zeros(1, 2, 4, 16)}, ValueError, "must agree"),
        ({"v": torch.zeros(1, 2, 5, 8)}, ValueError, "must agree"),
        ({"q": torch.zeros(1, 3, 4, 8)}, ValueError, "must agree"),
        ({"k": torch.zeros(1, 2, 0, 8), "v": torch.zeros(1, 2, 0, 8)}, ValueError, "needs a key"),
        ({"q": torch.zeros(1, 2, 4, 8).double()}, TypeError, "one floating dtype"),
        ({"k": torch.zeros(1, 2, 4, 8, device="meta")}, ValueError, "one device"),
        ({"backend": "fast"}, ValueError, "backend is 'fast'"),
    ],
)
def test_bad_arguments_are_refused(
    change: dict[str, Any], error: type[Exception], words: str
) -> None:
    q, k, v, _ = inputs((1, 2, 4, 4, 8))
    with pytest.raises(error, match=words):
        ops.attention(**({"q": q, "k": k, "v": v} | change))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES)
def test_cuda_is_the_formula(shape: tuple[int, ...]) -> None:
    args = inputs(shape)
    got = both_ways(*(x.cuda() for x in args))
    for result, expected in zip(got, exact(*args)[0], strict=True):
        assert_close(result.cpu(), expected, shape[4] + max(shape[2:4]))
