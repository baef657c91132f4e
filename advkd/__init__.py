"""advkd distills a diffusion model into a generator that makes an image in one network pass.

`load_teacher`, `load_student`, `generate`, `compile` and `push_folder` are the Python interface,
beside the networks' classes `UNet` and `Student`: `advkd.api`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from advkd.api import (
        Student,
        UNet,
        compile,
        generate,
        load_student,
        load_teacher,
        push_folder,
    )

__all__ = [
    "Student",
    "UNet",
    "compile",
    "generate",
    "load_student",
    "load_teacher",
    "push_folder",
]


def __getattr__(name: str) -> Any:
    # Lazy, so that `import advkd` and the commands' --help do not wait for torch.
    if name in __all__:
        return getattr(importlib.import_module("advkd.api"), name)
    raise AttributeError(f"module 'advkd' has no attribute {name!r}")
