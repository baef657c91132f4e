"""advkd from Python: load a network, sample images.

    import advkd
    student = advkd.load_student("zoo:fashion-mnist-student")
    images = advkd.generate(student, num=64, seed=0)        # (64, 1, 28, 28) in [-1, 1]
    engine = advkd.compile(student, 64)                     # for many calls
    images = advkd.generate(engine, num=64, seed=0)         # the same
    student.save_pretrained("mine")                         # with a model card and a pipeline
    student.push_to_hub("OWNER/NAME")                       # of the Hugging Face hub
"""

from __future__ import annotations

from advkd.engine.cache import compile
from advkd.engine.sampling import generate
from advkd.models.student import Student
from advkd.models.unet import UNet
from advkd.pretrained import load_student, load_teacher
from advkd.publish import push_folder

__all__ = [
    "Student", "UNet", "compile", "generate", "load_student", "load_teacher", "push_folder",
]  # fmt: skip
