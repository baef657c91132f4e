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
from typing import Any

# (shape, groups, channels_last): each variant of the forward and of the backward is in one.
CASES = [
    ((1, 32, 16, 16), 8, False),
    ((1, 32, 16, 32), 4, False),
    ((1, 16, 64, 32), 2, False),
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

SCRIPT = """
import json, sys
import numpy as np
import torch
from triton.runtime.interpreter import InterpreterBuilder
from advkd.kernels import group_norm_silu as module

moved, launched = 0, []

def counting(method):
    def count(self, pointers, *rest):
        global moved
        mask = rest[0] if method.__name__ == "create_masked_load" else rest[1]
        addresses = np.asarray(pointers.data)[np.asarray(mask.data)]
        moved += SECTOR * np.unique(addresses // SECTOR).size
        return method(self, pointers, *rest)
    return count

for name in ("create_masked_load", "create_masked_store"):
    setattr(InterpreterBuilder, name, counting(getattr(InterpreterBuilder, name)))

launch = module._launch
def recording(variant, *rest, **options):
    launched.append(variant.name)
    launch(variant, *rest, **options)
module._launch = recording

def taken():
    global moved
    result = moved, list(launched)
    moved, launched[:] = 0, []
    return result

results = []
for shape, groups, last in json.loads(sys.argv[1]):
    x = torch.randn(shape).half()
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    weight, bias = torch.randn(2, shape[1])
    y, mean, rstd = module.forward(x, weight, bias, None, None, groups, 1e-5, True)
    size = x.numel() * x.element_size()
    forward, variants = taken()
    results.append((variants, forward / (2 * size)))
    module.backward(y, x, weight, bias, None, None, mean, rstd, groups, 1e-5, True)
    backward, variants = taken()
    results.append((variants, backward / (3 * size)))
print(json.dumps(results))
""".replace("SECTOR", str(SECTOR))


def measured(cases: list[Any] | None = None) -> list[tuple[list[str], float]]:
    """For each pass of each case: the variants launched, and bytes moved over the minimum."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, json.dumps(cases or CASES)],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return [(variants, ratio) for variants, ratio in json.loads(done.stdout)]


def limit(variants: list[str]) -> float:
    """What a pass may move, over the minimum: 1, 3 / 2 or, backward, 5 / 3 for whole tensors, and
    what comes for each channel, which is little for all but the smallest maps."""
    if "sums" in variants[0]:
        return 2.0
    return 1.05 if len(variants) == 1 else 1.55


def by_variant() -> dict[str, str]:
    """The variant's traffic in the table: of the whole pass that it takes part in."""
    ratios: dict[str, str] = {}
    for variants, ratio in measured():
        for variant in variants:
            ratios.setdefault(variant, f"{ratio:.2f}")
    return ratios
