"""The Triton attention against float64: under Triton's interpreter, and on a device.

The interpreter is chosen when Triton is imported, so its cases run in a process of their own: this
file as a script.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from advkd.kernels import attention as module

from advkd.ops import reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NAMES = ("out", "lse", "dq", "dk", "dv")
Shape = tuple[int, int, int, int, int]

# (B, H, N, M, D): one element, ragged and even lengths in both orders, D of every variant.
CASES: tuple[Shape, ...] = (
    (2, 1, 64, 1, 8), (1, 2, 17, 49, 8), (1, 2, 49, 64, 24), (1, 1, 100, 17, 24),
    (1, 1, 1, 256, 48), (1, 2, 64, 64, 64), (1, 1, 196, 100, 64), (1, 1, 49, 17, 96),
    (1, 1, 1, 1, 96), (1, 1, 64, 64, 128), (1, 1, 17, 64, 136), (1, 1, 64, 64, 256),
    (1, 1, 49, 1, 512), (1, 1, 17, 49, 320),
)  # fmt: skip
# Too long for the interpreter.
DEVICE_CASES: tuple[Shape, ...] = (
    (1, 2, 1024, 1024, 40), (2, 8, 1024, 1024, 64), (1, 1, 4096, 4096, 128), (1, 4, 4096, 77, 64),
    (2, 1, 256, 256, 512), (70000, 1, 3, 5, 8),
)  # fmt: skip
SCALES = (0.0, -0.3, 1e-4, 30.0)


def qkv(shape: Shape, dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
    """q, k, v and grad_out as the layers hand them over: views of (B, N, H * D)."""
    batch, heads, queries, keys, dim = shape
    torch.manual_seed(sum(shape))
    return [
        torch.randn(batch, n, heads * dim)
        .to(device, dtype)
        .view(batch, n, heads, dim)
        .transpose(1, 2)
        for n in (queries, keys, keys, queries)
    ]


def exact(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, scale: float) -> list[Tensor]:
    """out, lse, dq, dk, dv in float64, by autograd of the explicit softmax."""
    leaves = [x.detach().double().requires_grad_() for x in (q, k, v)]
    scores = scale * leaves[0] @ leaves[1].transpose(-1, -2)
    out = torch.softmax(scores, dim=-1) @ leaves[2]
    grads = torch.autograd.grad(out, leaves, grad.double())
    return [out.detach(), torch.logsumexp(scores.detach(), dim=-1), *grads]


def magnitudes(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, scale: float, tiny: float, of_scores: bool
) -> list[Tensor]:
    """What `exact` returns, each as the sum of its terms' absolute values."""
    q, k, v, grad = (x.double() for x in (q, k, v, grad))
    scores = scale * q @ k.transpose(-1, -2)
    p = torch.softmax(scores, dim=-1) + tiny
    out = (p @ v).abs()
    q, k, v, grad = (x.abs() for x in (q, k, v, grad))
    terms = abs(scale) * q @ k.transpose(-1, -2)
    lse = 1 + terms.amax(-1) + torch.logsumexp(scores, dim=-1).abs()
    p = p * (1 + terms) if of_scores else p
    ds = abs(scale) * p * (grad @ v.transpose(-1, -2) + (out * grad).sum(-1, keepdim=True)) + tiny
    return [p @ v, lse, ds @ k, ds.transpose(-1, -2) @ q, p.transpose(-1, -2) @ grad]


def errors(
    got: list[Tensor], q: Tensor, k: Tensor, v: Tensor, grad: Tensor, scale: float
) -> dict[str, float]:
    """The largest error of each result over its tolerance.

    A result may be off by
      4 roundings to the dtype (p or ds, out in delta, lse in p, the result) and
      8 + sqrt(D) + sqrt(N + M) roundings to float32 (the formula's, and those of its sums)
    of its magnitude. A score's own terms, too, count among the latter, because an error of a score
    is a relative one of its probability. Below the smallest normal number a rounding is an absolute
    one. A rounding to a half type is a whole unit, because the interpreter truncates bfloat16.
    """
    info = torch.finfo(q.dtype)
    unit = 4 * info.eps / (2 if q.dtype == torch.float32 else 1)
    sums = (8 + math.sqrt(q.shape[3]) + math.sqrt(q.shape[2] + k.shape[2])) * 2.0**-24
    by_dtype = magnitudes(q, k, v, grad, scale, info.tiny, False)
    by_sums = magnitudes(q, k, v, grad, scale, info.tiny, True)
    bounds = [unit * a + sums * b + info.tiny for a, b in zip(by_dtype, by_sums, strict=True)]
    bounds[1] = sums * by_sums[1]
    truths = exact(q, k, v, grad, scale)
    return {
        name: float(((x.double() - truth).abs() / bound).max())
        for name, x, truth, bound in zip(NAMES, got, truths, bounds, strict=True)
    }


def within(worst: dict[str, float]) -> bool:
    """Whether all errors are below their tolerances, and none is NaN."""
    return all(error < 1 for error in worst.values())


def run(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, scale: float) -> list[Tensor]:
    out, lse = module.forward(q, k, v, scale)
    return [out, lse, *module.backward(grad, q, k, v, out, lse, scale)]


def same_bits(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(
        torch.equal(x.contiguous().view(torch.uint8), y.contiguous().view(torch.uint8))
        for x, y in zip(a, b, strict=True)
    )


def layouts(x: Tensor) -> dict[str, Tensor]:
    """x in other layouts: only the first needs no copy."""
    batch, heads, rows, dim = x.shape
    padded = x.new_zeros(batch, heads, rows, dim + 4)
    padded[..., :dim] = x
    shifted = x.new_zeros(x.numel() + 1)
    shifted[1:] = x.reshape(-1)
    return {
        "packed": torch.stack([x, x, x], dim=3).transpose(1, 2)[..., 1, :].transpose(1, 2),
        "columns first": x.transpose(2, 3).contiguous().transpose(2, 3),
        "rows of no 8": padded[..., :dim],
        "no 16 bytes": shifted[1:].view(batch, heads, rows, dim),
    }


def spoilt(kind: str, dtype: torch.dtype) -> list[Tensor]:
    """Inputs, of which some are not finite, of more than one tile in each direction."""
    q, k, v, grad = qkv((1, 1, 70, 100, 24), dtype)
    if kind.startswith("NaN"):
        {"q": q, "k": k, "v": v, "grad": grad}[kind.split()[-1]][0, 0, 5, 3] = math.nan
    elif kind == "inf in v":
        v[0, 0, 80, 3] = math.inf
    elif kind == "inf in q":
        q[0, 0, 5, 3] = math.inf
    else:  # scores of -inf, of the first so many keys
        q.abs_()
        k[0, 0, : int(kind.split()[0])] = -math.inf
    return [q, k, v, grad]


SPOILT = (
    "NaN in q", "NaN in k", "NaN in v", "NaN in grad", "inf in v", "inf in q",
    "1 key at -inf", "65 keys at -inf", "100 keys at -inf",
)  # fmt: skip


def not_finite_as_in_torch(kind: str, dtype: torch.dtype) -> dict[str, bool]:
    """Whether out is NaN, inf, -inf where torch's is, and gradients are finite where torch's are.

    Only that of the gradients, because grad_out v^T - delta takes two roads to what torch sums in
    one: an infinity here may be NaN there.
    """
    q, k, v, grad = spoilt(kind, dtype)
    scale = 24**-0.5
    out, _, *grads = run(q, k, v, grad, scale)
    expected = reference.attention(q, k, v, scale)[0]
    same = all(
        torch.equal(of(out), of(expected)) for of in (torch.isnan, torch.isposinf, torch.isneginf)
    )
    theirs = reference.attention_backward(grad, q, k, v, scale)
    finite = [torch.equal(x.isfinite(), y.isfinite()) for x, y in zip(grads, theirs, strict=True)]
    return dict(zip(("out", *NAMES[2:]), (same, *finite), strict=True))


def formula(shape: Shape, dtype: torch.dtype, device: str = "cpu") -> dict[str, float]:
    """The errors of a case, which also fails where a result has another layout or dtype."""
    inputs = qkv(shape, dtype, device)
    scale = shape[4] ** -0.5
    got = run(*inputs, scale)
    out, lse, dq, dk, dv = got
    for x, like in ((out, inputs[0]), (dq, inputs[0]), (dk, inputs[1]), (dv, inputs[2])):
        assert x.shape == like.shape
        assert x.dtype == dtype
        assert x.transpose(1, 2).is_contiguous()
    assert lse.dtype == torch.float32
    return errors(got, *inputs, scale)


def interpret() -> dict[str, Any]:
    """All that the tests below ask of the interpreter."""
    picked = set()
    pick = module.pick

    def noting(*arguments: Any) -> module.Variant:
        picked.add(pick(*arguments))
        return pick(*arguments)

    module.pick = noting
    results: dict[str, Any] = {
        "formula": {str(dtype): [formula(shape, dtype) for shape in CASES] for dtype in DTYPES},
        "not finite": {
            kind: [not_finite_as_in_torch(kind, dtype) for dtype in DTYPES[:2]] for kind in SPOILT
        },
    }
    inputs = qkv((1, 2, 49, 64, 24), torch.float16)
    results["scale"] = [errors(run(*inputs, scale), *inputs, scale) for scale in SCALES]
    plain = run(*(x.contiguous() for x in inputs), 0.2)
    results["again"] = same_bits(plain, run(*(x.contiguous() for x in inputs), 0.2))
    results["layouts"] = {
        name: same_bits(plain, run(*(layouts(x)[name] for x in inputs), 0.2))
        for name in layouts(inputs[0])
    }
    # Those for many queries, here with few.
    results["rest"] = {}
    for variant in [v for v in module.VARIANTS if v not in picked]:
        module.pick = lambda kernel, *rest, v=variant: (
            v if kernel == v.kernel else pick(kernel, *rest)
        )
        shape = (1, 1, variant.block_n + 2, 65, variant.block_d)
        results["rest"][repr(variant)] = formula(shape, torch.float16)
    return results


def as_a_script() -> None:
    """Prints what `interpret` returns, with Triton's bfloat16 repaired, torch.empty NaN-filled."""
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    # The interpreter keeps bfloat16 as uint16, and its dot multiplies those integers.
    def widened(x: Any) -> Any:
        if x.dtype.scalar != tl.bfloat16:
            return x
        return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    dot = InterpreterBuilder.create_dot
    InterpreterBuilder.create_dot = lambda self, a, b, *rest: dot(
        self, widened(a), widened(b), *rest
    )
    for name in ("empty", "empty_like"):
        make = getattr(torch, name)
        setattr(torch, name, lambda *a, make=make, **k: make(*a, **k).fill_(math.nan))
    json.dump(interpret(), sys.stdout)


@pytest.fixture(scope="module")
def interpreted() -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, __file__],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_interpreted_kernels_are_the_formula(
    interpreted: dict[str, Any], dtype: torch.dtype
) -> None:
    for shape, worst in zip(CASES, interpreted["formula"][str(dtype)], strict=True):
        assert within(worst), (shape, worst)


def test_interpreted_variants_for_long_sequences_are_the_formula(
    interpreted: dict[str, Any],
) -> None:
    """With the cases above, every variant ran."""
    assert interpreted["rest"]
    for variant, worst in interpreted["rest"].items():
        assert "'forward'" in variant
        assert within(worst), (variant, worst)


def test_any_scale_will_do(interpreted: dict[str, Any]) -> None:
    for scale, worst in zip(SCALES, interpreted["scale"], strict=True):
        assert within(worst), (scale, worst)


def test_infinities_and_nan_go_where_they_go_in_torch(interpreted: dict[str, Any]) -> None:
    for kind, by_dtype in interpreted["not finite"].items():
        for same in by_dtype:
            assert all(same.values()), (kind, same)


def test_a_second_run_has_the_same_bits(interpreted: dict[str, Any]) -> None:
    assert interpreted["again"]


def test_the_layout_does_not_matter(interpreted: dict[str, Any]) -> None:
    assert interpreted["layouts"] == dict.fromkeys(interpreted["layouts"], True)


@pytest.mark.parametrize("shape", [(0, 2, 5, 6, 8), (2, 0, 5, 6, 8), (1, 2, 0, 6, 8)])
def test_without_queries_the_gradients_of_the_keys_are_zero(shape: Shape) -> None:
    inputs = qkv(shape, torch.float16)
    out, lse, dq, dk, dv = run(*inputs, 1.0)
    assert lse.shape == shape[:3]
    for x, like in ((out, inputs[0]), (dq, inputs[0]), (dk, inputs[1]), (dv, inputs[2])):
        assert x.shape == like.shape
        assert not x.any()


@given(
    st.sampled_from(sorted(module.KERNELS)),
    st.tuples(*[st.integers(1, n) for n in (300, 40, 70000, 70000)]),
    st.integers(1, 64),
    st.sampled_from(DTYPES),
    st.sampled_from([(8, 0), (8, 6), (8, 9), (9, 0), (9, 4), (10, 0), (12, 0)]),
)
def test_the_heuristic_picks_tiles_that_fit(
    kernel: str,
    lengths: tuple[int, int, int, int],
    eighths: int,
    dtype: torch.dtype,
    capability: tuple[int, int],
) -> None:
    head_dim = 8 * eighths
    """That it stays in the list, test_variants.py asks of the launchers."""
    variant = module.pick(kernel, (*lengths, head_dim), dtype, capability)
    assert variant.kernel == kernel
    if kernel != "delta":
        assert variant.half == (dtype != torch.float32)
        # The whole head in one tile, or the scores from several.
        assert variant.chunked or head_dim <= variant.block_d == variant.out_d
        assert module.PADDED.value % variant.block_n == 0 or kernel == "forward"


def test_what_the_kernels_do_not_take_is_a_sentence() -> None:
    assert module.supports(64, torch.float16) is None
    assert "float64" in str(module.supports(64, torch.float64))
    for head_dim in (0, 7, 520):
        assert str(head_dim) in str(module.supports(head_dim, torch.float32))
    q, k, v, _ = qkv((1, 1, 3, 4, 12), torch.float32)
    with pytest.raises(ValueError, match=r"head dimensions 8, 16, \.\.\., 512, not 12"):
        module.forward(q, k, v, 1.0)
    with pytest.raises(TypeError, match=r"float32 and torch\.float16"):
        module.forward(*(x[..., :8] for x in (q, k.half(), v)), 1.0)


def test_only_what_needs_it_is_copied() -> None:
    x = qkv((2, 3, 5, 6, 24), torch.bfloat16)[0]
    assert module._readable(x) is x
    for name, other in layouts(x).items():
        assert torch.equal(other, x)
        assert (module._readable(other) is other) == (name == "packed"), name
    far = torch.empty_strided((1, 1, 2, 8), (8, 8, 1 << 24, 1), device="meta")
    assert module._readable(far).is_contiguous()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", CASES + DEVICE_CASES, ids=str)
def test_kernels_on_a_device_are_the_formula(
    shape: Shape, dtype: torch.dtype, nan_filled: None
) -> None:
    worst = formula(shape, dtype, "cuda")
    assert within(worst), worst


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_second_run_on_a_device_has_the_same_bits(dtype: torch.dtype) -> None:
    for shape in ((2, 8, 1000, 1000, 64), (2, 1, 256, 256, 512)):
        inputs = qkv(shape, dtype, "cuda")
        first = run(*inputs, 0.1)
        assert all(same_bits(first, run(*inputs, 0.1)) for _ in range(5))


@pytest.mark.gpu
def test_more_elements_than_32_bits_count() -> None:
    """The last heads, which lie behind 2^31 elements, are right."""
    if torch.cuda.mem_get_info()[0] < 40 << 30:
        pytest.skip("needs 40 GB of memory on the device")
    batch, keys = (1 << 31) // (256 * 64) + 1, 8
    inputs = [
        torch.randn(batch, rows, 64, dtype=torch.float16, device="cuda").view(batch, 1, rows, 64)
        for rows in (256, keys, keys, 256)
    ]
    assert inputs[0].numel() > 1 << 31
    got = [x[-2:] for x in run(*inputs, 0.125)]
    worst = errors(got, *(x[-2:] for x in inputs), 0.125)
    assert within(worst), worst


if __name__ == "__main__":
    as_a_script()
