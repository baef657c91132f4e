"""The Triton kernel of bias, residual and factor, by the interpreter against float64."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

triton = pytest.importorskip("triton", reason="Triton is not installed")

from advkd.kernels import bias_residual as module  # noqa: E402

# The result is rounded once to its dtype, after three roundings to float32 (the interpreter
# truncates bfloat16).
FOUND = """
import json, math, sys
import torch

def found(rows, channels, dtype, total, first, has_bias, has_residual, scale, device="cpu"):
    torch.manual_seed(rows)
    dtype = getattr(torch, dtype)
    x, residual = torch.randn(2, rows, channels).to(device, dtype)
    bias = torch.randn(channels).to(device) if has_bias else None
    wide = torch.full((rows, total), math.nan, dtype=dtype, device=device)
    out = wide[:, first : first + channels]
    given = residual if has_residual else None
    assert module.bias_residual(x, bias, given, scale, out) is out
    truth = x.double()
    terms = truth.abs() + 1
    for other in (bias, given):
        if other is not None:
            truth, terms = truth + other.double(), terms + other.double().abs()
    unit = torch.finfo(dtype).eps * (truth * scale).abs() + 4 * 2.0**-24 * terms * abs(scale)
    error = float(((out.double() - truth * scale).abs() / unit).max()) if rows else 0.0
    outside = torch.cat([wide[:, :first], wide[:, first + channels :]], dim=1)
    in_place = module.bias_residual(x, bias, given, scale, x)
    return error, bool(outside.isnan().all()), torch.equal(in_place, out)
"""

CASES = [
    (5, 8, "float32", 8, 0, True, True, 1.0),
    (300, 24, "float32", 40, 16, True, True, 0.5),
    (7, 3, "float32", 10, 5, True, True, 1.0),  # rows that allow no vectors
    (64, 64, "float16", 192, 64, False, True, 2.0**-0.5),
    (33, 16, "bfloat16", 16, 0, True, False, 1.0),
    (1, 1, "bfloat16", 3, 1, True, True, 3.0),
    (0, 8, "float32", 8, 0, True, True, 1.0),
]


def check(results: list[Any]) -> None:
    for given, (error, outside, in_place) in zip(CASES, results, strict=True):
        assert error < 1, given
        assert outside, ("it wrote outside of its channels", given)
        assert in_place, given


def test_interpreted_kernel_is_the_formula() -> None:
    script = (
        "from advkd.kernels import bias_residual as module\n" + FOUND
        + "print(json.dumps([found(*c) for c in json.loads(sys.argv[1])]))"
    )  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, json.dumps(CASES)],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    check(json.loads(done.stdout))


@pytest.mark.gpu
def test_kernel_on_a_device() -> None:
    namespace: dict[str, Any] = {"module": module}
    exec(FOUND, namespace)
    check([namespace["found"](*case, device="cuda") for case in CASES])
