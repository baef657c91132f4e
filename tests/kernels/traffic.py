"""Counts the bytes that the Triton kernels move, by Triton's interpreter.

Each load and store of each program counts the 32-byte sectors that it touches, as a GPU moves
them; caches would only lower that. The minimum is to read every input and to write every result
once. Shapes are the smallest that fill some tiles of each variant: more would change no ratio.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Collection
from typing import Any

# (shape, groups, channels_last): each variant of the forward and of the backward is in one.
CASES = [
    ((1, 32, 16, 16), 8, False),
    ((1, 32, 16, 32), 4, False),
    ((1, 16, 64, 32), 2, False),
    ((1, 32, 4, 4), 8, True),
    ((1, 32, 8, 8), 8, True),
    ((1, 32, 16, 16), 8, True),
    ((1, 32, 32, 32), 8, True),
    ((1, 128, 8, 8), 4, True),
    ((1, 128, 16, 16), 4, True),
    ((1, 512, 8, 8), 4, True),
    ((1, 16, 64, 64), 2, False),
    ((1, 512, 8, 8), 1, False),
    ((1, 32, 64, 32), 8, True),
    ((1, 128, 32, 16), 4, True),
]
SECTOR = 32

COUNTING = """
import json, sys
import numpy as np
import torch
from triton.runtime.interpreter import InterpreterBuilder

moved, touched = 0, []

def counting(method):
    def count(self, pointers, *rest):
        global moved
        mask = rest[0] if method.__name__ == "create_masked_load" else rest[1]
        addresses = np.asarray(pointers.data)[np.asarray(mask.data)]
        sectors = np.unique(addresses // SECTOR)
        moved += SECTOR * sectors.size
        touched.append(sectors)
        return method(self, pointers, *rest)
    return count

for name in ("create_masked_load", "create_masked_store"):
    setattr(InterpreterBuilder, name, counting(getattr(InterpreterBuilder, name)))

def taken():
    global moved
    result = moved, SECTOR * np.unique(np.concatenate(touched)).size
    moved, touched[:] = 0, []
    return result
""".replace("SECTOR", str(SECTOR))

GROUP_NORM_SILU = """
from advkd.kernels import group_norm_silu as module

launched = []
launch = module._launch
def recording(launched_now, *rest):
    launched.append(launched_now.variant.name)
    launch(launched_now, *rest)
module._launch = recording

results = []
for shape, groups, last in json.loads(sys.argv[1]):
    x = torch.randn(shape).half()
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    weight, bias = torch.randn(2, shape[1])
    affine = weight, bias, None, None
    y, *statistics = module.forward(x, affine, groups, 1e-5, True)
    size = x.numel() * x.element_size()
    results.append((list(launched), taken()[0] / (2 * size)))
    launched.clear()
    if shape[2] * shape[3] < 64:  # there what comes for each channel is as much as the map
        continue
    module.backward(y, x, affine, statistics, groups, True)
    results.append((list(launched), taken()[0] / (3 * size)))
    launched.clear()
print(json.dumps(results))
"""

BIAS_RESIDUAL = """
from advkd.kernels.bias_residual import bias_residual

x, residual = torch.randn(2, 256, 64).half()
bias_residual(x, torch.randn(64), residual, 1.0, torch.empty(256, 96).half()[:, 32:])
print(json.dumps(taken()[0] / (3 * 2 * x.numel())))
"""

# Each kernel alone, at 256 queries and keys.
ATTENTION = """
from advkd.kernels import attention as module

launch, results = module._launch, {}
for variant in module.VARIANTS:
    def only(kernel, *rest):
        if kernel == variant.kernel:
            launch(kernel, *rest)
    module.pick, module._launch = lambda *_: variant, only
    module._grid_and_options.cache_clear()
    dtype = torch.float16 if variant.half else torch.float32
    q, k, v, out = torch.randn(4, 1, 256, 1, variant.out_d).to(dtype).transpose(2, 3)
    if variant.kernel == "forward":
        module.forward(q, k, v, 0.1)
    else:
        module.backward(out, q, k, v, out, torch.ones(1, 1, 256), 0.1)
    bytes_moved, least = taken()
    results[variant.name()] = bytes_moved / least
print(json.dumps(results))
"""


def _interpreted(script: str, *arguments: str) -> Any:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COUNTING + script, *arguments],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=1800,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def group_norm_silu() -> list[tuple[list[str], float]]:
    """For each pass of each case: the variants launched, and bytes moved over the minimum."""
    results = _interpreted(GROUP_NORM_SILU, json.dumps(CASES))
    return [(variants, ratio) for variants, ratio in results]


def limit(variants: list[str]) -> float:
    """What a pass may move, over the minimum: 1, 3 / 2 or, backward, 5 / 3 for whole tensors, and
    what comes for each channel, which is little for all but the smallest maps."""
    if "sums" in variants[0]:
        return 2.0
    if variants[0].endswith(" 16x16"):
        return 1.25
    return 1.05 if len(variants) == 1 else 1.55


def by_variant(names: Collection[str]) -> dict[str, str]:
    """The table's column: GroupNorm-SiLU's of the whole pass, attention's of the kernel alone."""
    ratios: dict[str, float] = {}
    if any(name.startswith("group_norm_silu") for name in names):
        for variants, ratio in group_norm_silu():
            ratios = dict.fromkeys(variants, ratio) | ratios
    if "bias_residual" in names:
        ratios["bias_residual"] = _interpreted(BIAS_RESIDUAL)
    if any(name.startswith("attention") for name in names):
        ratios |= _interpreted(ATTENTION)
    return {name: f"{ratios[name]:.2f}" for name in names}
