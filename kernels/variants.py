"""Every variant of every kernel that the heuristics of the launchers can pick.

Each kernel's module has `variants() -> list[Build]` (kernels/compilation.py); this is all of them.
tests/kernels/aot.py compiles them for GPUs that need not be there and checks what comes out.
"""

from __future__ import annotations

from advkd.kernels import attention, bias_residual, group_norm_silu
from advkd.kernels.compilation import Build

# Each variant costs compilations in CI and a row that a reader has to look at.
MOST_VARIANTS = 64


def all_builds() -> list[Build]:
    """Every build, variants in the order of their modules' lists."""
    return [*group_norm_silu.variants(), *bias_residual.variants(), *attention.variants()]


def all_variants() -> list[str]:
    """The names of the variants, each once."""
    return list(dict.fromkeys(build.variant for build in all_builds()))
