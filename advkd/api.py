"""advkd from Python: load a network, sample images.

    import advkd
    student = advkd.load_student("zoo:fashion-mnist-student")
    images = advkd.generate(student, num=64, seed=0)        # (64, 1, 28, 28) in [-1, 1]
    engine = advkd.compile(student, 64)                     # for many calls
    images = advkd.generate(engine, num=64, seed=0)         # the same
"""

from __future__ import annotations

from advkd.engine.cache import compile
from advkd.engine.sampling import generate
from advkd.pretrained import load_student, load_teacher

__all__ = ["compile", "generate", "load_student", "load_teacher"]
