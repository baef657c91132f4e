"""Lowers a teacher or a student to a flat plan that the C++ engine runs (csrc/cpu/plan.cpp).

A plan is plain data: operations on buffers of one arena, which is laid out for the buffers' life
times, and weights that are packed once. Activations are (B, H, W, C). It is made for a batch size
and a number of threads, which decide each convolution's algorithm, and runs any batch: an image's
bits depend on the plan alone.

    engine = lower(student, (28, 28), batch=1, threads=1)
    images = engine.run(x_T)                       # (B, C, H, W) in and out
"""

from __future__ import annotations

from advkd.plan._data import ALGORITHMS, INPUT, OUTPUT, Buffer, Op, Part, Plan
from advkd.plan._engine import Engine, describe, lower
from advkd.plan._kept import engine_for
from advkd.plan._lowering import LoweringError

__all__ = [
    "ALGORITHMS",
    "INPUT",
    "OUTPUT",
    "Buffer",
    "Engine",
    "LoweringError",
    "Op",
    "Part",
    "Plan",
    "describe",
    "engine_for",
    "lower",
]
