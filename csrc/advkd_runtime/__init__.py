"""Images of a distilled student, in one network pass, without torch: numpy and a C library.

    import advkd_runtime
    student = advkd_runtime.load("student.advkd")     # `advkd export --format advkd` wrote it
    images = student.generate(num=64, seed=0)         # (64, H, W, C) uint8

Where advkd itself is installed, the same is `advkd.runtime`, and needs no second package.
"""

from .library import ModelError, version
from .student import Student, load

__all__ = ["ModelError", "Student", "__version__", "load"]
__version__ = version()
