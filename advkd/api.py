"""advkd from Python: load a network, draw images.

    import advkd
    student = advkd.load_student("zoo:fashion-mnist-student")
    images = advkd.generate(student, num=64, seed=0)        # (64, 1, 28, 28) in [-1, 1]
"""

from __future__ import annotations

from advkd.engine.sampling import generate
from advkd.pretrained import load_student, load_teacher

__all__ = ["generate", "load_student", "load_teacher"]
