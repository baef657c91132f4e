"""Triton kernels of advkd. This package imports without Triton; its modules need it."""

from __future__ import annotations

from importlib.util import find_spec

# Looked up once: torch.compile cannot follow a search for modules.
_FOUND = find_spec("triton") is not None


def unavailable_reason() -> str | None:
    """Why the kernels cannot be imported here, as a clause; None where they can."""
    return None if _FOUND else "Triton is not installed"
