"""The Triton GroupNorm-SiLU: numerics by the interpreter against float64, and what it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed")

from advkd.kernels import group_norm_silu as module  # noqa: E402
from advkd.kernels import unavailable_reason  # noqa: E402

# The rule of tolerances: a result may be off by
#   1 rounding to its dtype, a whole unit, because the interpreter truncates bfloat16, and
#   16 + sqrt(elements that are summed) roundings to float32 (the formula's, and those of its sums)
# of the sum of its terms' absolute values. The backward gets the mean rounded to float32, so there
# an x_hat has |mean| rstd further roundings, which count times the slope like any change of x_hat.
# Shared with the scripts below, which run under TRITON_INTERPRET=1 (Triton reads it at import).
COMMON = '''
import json, math, sys
import torch
import torch.nn.functional as F

NAMES = ("x", "weight", "bias", "scale", "shift")
EPS = 1e-5


def inputs(case, device="cpu"):
    """x, weight, bias, scale, shift (None where the case has none) and grad_y."""
    shape, dtype = case["shape"], getattr(torch, case["dtype"])
    torch.manual_seed(sum(shape))
    x = torch.randn(shape) * case["std"] + case["mean"]
    weight, bias = torch.randn(2, shape[1])
    scale, shift = torch.randn(2, shape[0], shape[1])
    given = [
        p.to(device, getattr(torch, case["parameters"])) if name in case["given"] else None
        for name, p in zip(NAMES[1:], (weight, bias, scale, shift))
    ]
    grad = torch.randn(shape).to(device, dtype)
    x = x.to(device, dtype)
    if case["last"]:
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    return [x, *given, grad]


def formula(x, weight, bias, scale, shift, groups, silu):
    # torch's gradient of group_norm fails where one of them is missing.
    weight = x.new_ones(x.shape[1]) if weight is None else weight
    bias = x.new_zeros(x.shape[1]) if bias is None else bias
    y = torch.group_norm(x, groups, weight, bias, EPS)
    per_channel = (*x.shape[:2], *[1] * (x.dim() - 2))
    y = y if scale is None else y * (1 + scale.view(per_channel))
    y = y if shift is None else y + shift.view(per_channel)
    return F.silu(y) if silu else y


def exact(x, *rest):
    """y and the gradients, in float64."""
    *parameters, grad, groups, silu = rest
    leaves = [None if p is None else p.detach().double().requires_grad_() for p in (x, *parameters)]
    y = formula(*leaves, groups, silu)
    found = torch.autograd.grad(y, [p for p in leaves if p is not None], grad.double())
    found = iter(found)
    return [y.detach(), *[None if p is None else next(found) for p in leaves]]


def bounds(x, weight, bias, scale, shift, grad, groups, silu):
    """What y, dx, dweight, dbias, dscale and dshift may be off by, by the rule."""
    unit = torch.finfo(x.dtype).eps if x.dtype != torch.float32 else 2.0**-24
    sample, pixels = x.shape[:2], x[0, 0].numel()
    x, grad = x.double().reshape(*sample, -1), grad.double().reshape(*sample, -1).abs()
    grouped = x.reshape(len(x), groups, -1)
    var, mean = torch.var_mean(grouped, dim=2, correction=0, keepdim=True)
    rstd = (var + EPS).rsqrt()
    x_hat = ((grouped - mean) * rstd).reshape_as(x).abs()
    lost = (mean * rstd).abs().expand_as(grouped).reshape_as(x)
    ones, zeros = x.new_ones(()), x.new_zeros(())
    w, b = (p.double()[None, :, None] if p is not None else q
            for p, q in ((weight, ones), (bias, zeros)))
    f = 1 + scale.double()[:, :, None] if scale is not None else ones
    t = shift.double()[:, :, None] if shift is not None else zeros
    slope, offset = (w * f).abs(), (b * f).abs() + t.abs()
    roundings = 2.0**-24 * (16 + math.sqrt(x.shape[2] * x.shape[1] / groups))
    z = x_hat * slope + offset
    y = unit * (z + 1) + roundings * (1 + z)
    # |silu'| < 1.1 and |silu''| <= 1/2: an error of z is one of g of half of it.
    wide = roundings * (1 + lost)
    g = 1.1 * grad
    g_error = grad * (wide * (1 + z) * (1.1 + slope if silu else 1.0))

    def means(value):
        groupwise = value.reshape_as(grouped).mean(2, keepdim=True)
        return groupwise.expand_as(grouped).reshape_as(value)

    terms = g * slope, g_error * slope + wide * g * slope
    dx = [means(v) + x_hat * means(v * x_hat) + v for v in terms]
    dx[1] = dx[1] + wide * (means(terms[0] * x_hat) + x_hat * means(terms[0] * (1 + x_hat)))
    of_group = rstd.expand_as(grouped).reshape_as(x)
    batch = 2.0**-24 * math.sqrt(x.shape[2] * len(x))
    s1, s2 = (g_error + batch * g).sum(2), (g_error * x_hat + g * (wide + batch * x_hat)).sum(2)
    f, w, b = (value.expand_as(x)[:, :, 0].abs() for value in (f, w, b))
    found = [
        y, of_group * (unit * dx[0] + dx[1]), (f * s2).sum(0), (f * s1).sum(0), w * s2 + b * s1, s1,
    ]
    return [value + 1e-30 for value in found]


def run(module, x, *rest):
    *parameters, grad, groups, silu = rest
    y, *statistics = module.forward(x, parameters, groups, EPS, silu)
    dx, gradients = module.backward(grad, x, parameters, statistics, groups, silu)
    return [y, dx, *gradients]


def outcome(case, module, device="cpu"):
    """Whether layouts and dtypes are those of x, whether gradients fit what was given, whether two
    runs agree, and the largest error over its bound."""
    arguments = [*inputs(case, device), case["groups"], case["silu"]]
    got, again = run(module, *arguments), run(module, *arguments)
    x = arguments[0]
    alike = all(t.stride() == x.stride() and t.dtype == x.dtype for t in got[:2])
    pairs = zip(got[1:], arguments[:5])
    like = all(t is None if p is None else t.dtype == p.dtype for t, p in pairs)
    pairs = [(t, u) for t, u in zip(got, again) if t is not None]
    same = all(torch.equal(t, u) for t, u in pairs)
    if x.numel() == 0:
        return alike, like, same, 0.0 if all((t == 0).all() for t, _ in pairs) else 2.0
    allowed = bounds(*arguments)
    truth = exact(*arguments)
    for i, t in enumerate(got):
        if i > 1 and t is not None and t.dtype != torch.float32:
            allowed[i] = allowed[i] + torch.finfo(t.dtype).eps * truth[i].abs()
    errors = [
        float(((t.double() - e).abs().flatten() / b.flatten()).max())
        for t, e, b in zip(got, truth, allowed) if t is not None
    ]
    return alike, like, same, max(x if x == x else 9.0 for x in errors)
'''

INTERPRETED = """
from advkd.kernels import group_norm_silu as module  # noqa: E402

# Unwritten results are NaN.
for name in ("empty", "empty_like"):
    make = getattr(torch, name)
    setattr(torch, name, lambda *a, make=make, **k: make(*a, **k).fill_(float("nan")))
"""


def interpret(script: str, *arguments: str) -> Any:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COMMON + INTERPRETED + script, *arguments],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def case(
    shape: tuple[int, ...], groups: int, *, last: bool = False, dtype: str = "float32",
    mean: float = 0.0, std: float = 1.0, given: str = "weight bias scale shift", silu: bool = True,
    parameters: str = "float32",
) -> dict[str, Any]:  # fmt: skip
    return {
        "shape": shape, "groups": groups, "last": last, "dtype": dtype, "mean": mean, "std": std,
        "given": given.split(), "silu": silu, "parameters": parameters,
    }  # fmt: skip


CASES = [
    # Odd sides, both layouts, a huge mean; with and without SiLU and parameters.
    case((2, 6, 7, 5), 3),
    case((2, 6, 7, 5), 3, last=True),
    case((2, 6, 7, 5), 3, mean=1e4, given="weight bias"),
    case((2, 6, 7, 5), 3, last=True, mean=1e4, silu=False),
    case((2, 6, 7, 5), 2, given="", silu=False),
    case((2, 6, 7, 5), 2, given="scale"),
    case((2, 6, 7, 5), 2, given="bias shift", dtype="float16"),
    case((2, 8, 4, 4), 2, given="weight shift", dtype="bfloat16"),
    case((2, 8, 4, 4), 2, last=True, dtype="bfloat16"),
    case((2, 16, 4, 4), 4, last=True, dtype="float16", given="weight bias"),
    # As a network in half precision has it.
    case((2, 16, 4, 4), 4, last=True, dtype="float16", parameters="float16"),
    case((2, 16, 4, 4), 4, last=True, dtype="bfloat16", parameters="bfloat16", silu=False),
    # 3-D, 5-D, one pixel, C = G, G = 1, three channels a group, a long batch, none.
    case((3, 10, 9), 5),
    case((1, 64, 3, 3), 2, last=True),
    case((2, 4, 3, 2, 5), 2),
    case((2, 4, 3, 2, 5), 2, last=True),
    case((3, 5, 1, 1), 5),
    case((3, 6), 2),
    case((2, 5, 3, 4), 5, last=True),
    case((1, 40, 5, 5), 1),
    case((2, 48, 2, 3), 16, last=True),
    case((2, 48, 2, 3), 16),
    case((70, 4, 2, 2), 2),
    case((0, 4, 3, 3), 2),
    # Large groups, which several programs share.
    case((1, 4, 68, 64), 1, mean=1e4),
    case((1, 8, 67, 33), 2),
    case((1, 2, 131, 129), 1, dtype="bfloat16"),
    case((1, 70, 9, 10), 1, last=True),
    case((1, 8, 33, 40), 2, last=True, mean=1e4),
]  # fmt: skip


def test_interpreted_kernels_are_the_formula() -> None:
    script = "print(json.dumps([outcome(c, module) for c in json.loads(sys.argv[1])]))"
    for given, (alike, like, same, error) in zip(
        CASES, interpret(script, json.dumps(CASES)), strict=True
    ):
        assert alike, ("layout or dtype", given)
        assert like, ("gradients of what is not there", given)
        assert same, ("two runs differ", given)
        assert error < 1, (error, given)


def test_the_cases_take_both_ways_and_all_kinds_of_tiles() -> None:
    taken = set()
    for c in CASES:
        batch, channels, *sides = c["shape"]
        pixels = int(torch.Size(sides).numel())
        if batch:
            itemsize = 4 if c["dtype"] == "float32" else 2
            row = channels if c["last"] else 0
            problem = module.Problem(batch, channels, pixels, c["groups"], c["last"], itemsize, row)
            picked = [module.pick(kernel, problem, (0, 0)) for kernel in module.KERNELS]
            taken |= {(v.kernel, v.last, v.channels) for v in picked if v is not None}
    assert taken >= {
        (v.kernel, v.last, v.channels) for v in module.VARIANTS if (v.kernel, v.channels) not in
        # Interpreting its large tiles takes long; it differs in nothing else.
        (("forward", 256), ("apply", 64))
    }  # fmt: skip


NONFINITE = """
results = []
for last in (False, True):
    for value in (float("inf"), float("-inf"), float("nan")):
        for case in json.loads(sys.argv[1]):
            x, weight, bias, scale, shift, grad = inputs(case | {"last": last})
            x[0, 1, 0, 1] = value
            affine = weight, bias, scale, shift
            y = module.forward(x, affine, case["groups"], EPS, case["silu"])[0]
            truth = formula(x, weight, bias, scale, shift, case["groups"], case["silu"])
            apart = (y - truth).nan_to_num().abs().max()
            where = torch.equal(y.isnan(), truth.isnan()) and y.isnan().any()
            results.append(bool(where and y.isfinite().any() and apart < 1e-5))
print(json.dumps(results))
"""


def test_infinity_and_nan_stay_in_their_group_as_in_torch() -> None:
    """In one pass and in two, also where tiles hold several groups."""
    cases = [case((2, 8, 3, 4), 4, given="weight bias"), case((1, 8, 67, 33), 2, given="shift")]
    results = interpret(NONFINITE, json.dumps(cases))
    assert len(results) == 12
    assert all(results), results


WITHIN = """
# (B, C, H, W), groups, channels of the tensor around x, the first of x, dtype; whether each image
# has numbers of its own that are added; whether there is FiLM, by the halves of a vector.
def found(shape, groups, total, first, dtype, by_image, film=False, device="cpu"):
    torch.manual_seed(1)
    B, C, H, W = shape
    whole = torch.randn(B, H, W, total).to(device, getattr(torch, dtype)).permute(0, 3, 1, 2)
    x = whole[:, first : first + C]
    added = (3 * torch.randn(B, 2 * C).to(device))[:, :C] if by_image else torch.randn(C).to(device)
    weight, bias = torch.randn(2, C).to(device)
    scale = shift = None
    if film:
        vectors = torch.randn(B if by_image else 1, 2 * C).to(device).expand(B, -1)
        scale, shift = vectors[:, :C], vectors[:, C:]
    y, mean, rstd = module.forward(x, (weight, bias, scale, shift), groups, EPS, True, added)
    scale, shift = (None if t is None else t.double() for t in (scale, shift))
    wide = (x.double() + added.double().view(-1, C, 1, 1)).requires_grad_(False)
    truth = formula(wide, weight.double(), bias.double(), scale, shift, groups, True)
    flat = wide.reshape(B, groups, -1)
    mean_error = float((mean - flat.mean(2)).abs().max())
    variance = flat.var(2, correction=0)
    rstd_error = float((rstd * (variance + EPS).sqrt() - 1).abs().max())
    step = torch.finfo(x.dtype).eps if dtype != "float32" else 2.0**-18
    error = float(((y.double() - truth).abs() / (step * (1 + truth.abs()))).max())
    dense = y.permute(0, 2, 3, 1).is_contiguous()
    return bool(dense and y.dtype == x.dtype), max(mean_error, rstd_error), error
"""

WITHIN_CASES = [
    ((2, 8, 4, 4), 2, 8, 0, "float32", False),
    ((2, 8, 4, 4), 2, 24, 8, "float32", False),
    ((2, 8, 5, 3), 4, 24, 16, "float16", True),
    ((1, 12, 7, 5), 4, 20, 4, "float32", True),
    ((2, 6, 3, 5), 3, 7, 1, "float32", True),  # begins at no 16 bytes
    ((1, 8, 33, 40), 2, 16, 8, "float32", True),  # in two passes
    ((1, 16, 8, 8), 4, 48, 32, "bfloat16", False),
    ((2, 8, 5, 3), 4, 8, 0, "float32", False, True),
    ((2, 8, 4, 4), 2, 24, 8, "float32", True, True),
    ((2, 8, 33, 40), 2, 16, 8, "float32", True, True),  # in two passes
    ((2, 16, 8, 8), 4, 48, 32, "bfloat16", True, True),
]


def test_channels_of_a_wider_tensor_and_what_is_added_to_them() -> None:
    script = WITHIN + "print(json.dumps([found(*c) for c in json.loads(sys.argv[1])]))"
    results = interpret(script, json.dumps(WITHIN_CASES))
    for given, (alike, statistics, error) in zip(WITHIN_CASES, results, strict=True):
        assert alike, given
        assert statistics < 1e-5, (given, statistics)
        assert error < 1.01, (given, error)


@pytest.mark.gpu
def test_channels_of_a_wider_tensor_on_a_device() -> None:
    namespace: dict[str, Any] = {"module": module}
    exec(COMMON + WITHIN, namespace)
    large = ((3, 128, 32, 32), 32, 384, 128, "bfloat16", True)
    for given in (*WITHIN_CASES, large, ((2, 128, 128, 128), 32, 256, 128, "float32", False)):
        alike, statistics, error = namespace["found"](*given, device="cuda")
        assert alike and statistics < 1e-5 and error < 1.01, given


def test_a_group_that_is_too_large_is_refused() -> None:
    x = torch.empty(1, 4, 1 << 14, 1 << 14, device="meta")
    with pytest.raises(ValueError, match="too large"):
        module.forward(x, (None,) * 4, 2, 1e-5, True)


def test_gradients_of_an_empty_batch_are_zero() -> None:
    x, parameter, film = torch.empty(0, 4, 3), torch.ones(4), torch.empty(0, 4)
    affine = (parameter, parameter, film, film)
    y, mean, rstd = module.forward(x, affine, 2, 1e-5, True)
    assert y.shape == x.shape
    assert mean.shape == (0, 2)
    dx, gradients = module.backward(x, x, affine, (mean, rstd), 2, True)
    for grad, argument in zip((dx, *gradients), (x, *affine), strict=True):
        assert grad is not None
        assert torch.equal(grad, torch.zeros_like(argument))


@pytest.mark.gpu
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(
    ("shape", "groups"),
    [((2, 128, 256, 256), 32), ((2, 256, 32, 32), 32), ((4, 512, 8, 8), 32), ((2, 48, 28, 28), 16),
     ((64, 128, 7, 7), 32)],
)  # fmt: skip
def test_kernels_on_a_device(shape: tuple[int, ...], groups: int, dtype: str, last: bool) -> None:
    namespace: dict[str, Any] = {}
    exec(COMMON, namespace)
    for mean in (0.0, 1e4 if dtype == "float32" else 0.0):
        given = case(shape, groups, last=last, dtype=dtype, mean=mean)
        alike, like, same, error = namespace["outcome"](given, module, "cuda")
        assert alike and like and same
        assert error < 1


def test_the_package_says_that_triton_is_there() -> None:
    assert unavailable_reason() is None
