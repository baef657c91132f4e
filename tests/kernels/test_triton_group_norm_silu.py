"""The Triton GroupNorm-SiLU: numerics by the interpreter, ahead-of-time compilation."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

triton = pytest.importorskip("triton", reason="Triton is not installed")

from advkd.kernels import group_norm_silu as module  # noqa: E402
from advkd.kernels import unavailable_reason  # noqa: E402

# Runs under TRITON_INTERPRET=1, which Triton reads at import; prints each case's largest error.
SCRIPT = """
import json, sys, torch
import torch.nn.functional as F
from advkd.kernels import group_norm_silu as module
empty_like = torch.empty_like
torch.empty_like = lambda x: empty_like(x).fill_(float("nan"))
module.MAX_TILE = int(sys.argv[1])
cases = [((2, 6, 1, 1), 3), ((1, 1, 1, 1), 1), ((2, 6, 7, 5), 2), ((1, 4, 17, 19), 1),
         ((3, 10, 9), 5), ((0, 4, 3, 3), 2)]
results = []
for shape, groups in cases:
    for last in (False, True):
        if last and len(shape) != 4:
            continue
        for dtype, mean in ((torch.float32, 0.0), (torch.float32, 1e4), (torch.bfloat16, 0.0)):
            for silu in (False, True):
                torch.manual_seed(1)
                x = (torch.randn(shape) + mean).to(dtype)
                if last:
                    x = x.contiguous(memory_format=torch.channels_last)
                weight, bias = torch.randn(2, shape[1])
                y = module.group_norm_silu(x, weight, bias, groups, 1e-5, silu)
                exact = torch.group_norm(x.double(), groups, weight.double(), bias.double(), 1e-5)
                exact = F.silu(exact) if silu else exact
                same = y.stride() == x.stride() and y.dtype == dtype
                error = ((y.double() - exact).abs() / (1 + exact.abs())).max() if len(x) else 0.0
                results.append((repr((shape, last, str(dtype), mean, silu)), same, float(error)))
print(json.dumps(results))
"""


def interpret(max_tile: int) -> list[tuple[str, bool, float]]:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(max_tile)],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("max_tile", [8192, 128])
def test_interpreted_kernel_is_the_formula(max_tile: int) -> None:
    """The small tile makes groups of several tiles, whose moments are merged."""
    results = interpret(max_tile)
    assert len(results) == 5 * 2 * 6 + 6
    for case, same_layout, error in results:
        assert same_layout, case
        # bfloat16: an ulp of the output (the interpreter truncates, where hardware rounds);
        # float32: about 16 roundings.
        assert error < (2**-7 if "bfloat16" in case else 16 * 2**-24), case


@pytest.mark.parametrize("size", [1, 2, 127, 128, 129, 4096, 8192, 8193, 1 << 20])
def test_launch_options_fit_the_group(size: int) -> None:
    options = module.launch_options(size)
    tile = options["TILE"]
    assert tile & (tile - 1) == 0
    assert tile <= module.MAX_TILE
    assert options["RESIDENT"] == (size <= tile)
    assert 1 <= options["num_warps"] <= 8


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("resident", [True, False])
def test_kernel_compiles_ahead_of_time(arch: int, resident: bool) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    pointers = dict.fromkeys(("x_ptr", "weight_ptr", "bias_ptr", "y_ptr"), "*fp32")
    scalars = dict.fromkeys(("channels", "pixels", "group_channels"), "i32") | {"eps": "fp32"}
    constants: dict[str, Any] = {
        "LAST": True, "SILU": True, "RESIDENT": resident, "TILE": 1024,
    }  # fmt: skip
    source = ASTSource(
        fn=module._group_norm_silu_kernel,
        signature=pointers | scalars | dict.fromkeys(constants, "constexpr"),
        constexprs=constants,
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32))
    assert ".f64" not in compiled.asm["ptx"]


def test_the_package_says_that_triton_is_there() -> None:
    assert unavailable_reason() is None
