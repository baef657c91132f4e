"""Triton kernels of advkd. This package imports without Triton; its modules need it."""

from __future__ import annotations

from importlib.util import find_spec


def unavailable_reason() -> str | None:
    """Why the kernels cannot be imported here, as a clause; None where they can."""
    return None if find_spec("triton") else "Triton is not installed"
