"""Triton kernels of advkd; importable without Triton, `available()` then says why not."""

from __future__ import annotations

from advkd.kernels.group_norm_silu import group_norm_silu, unavailable_reason

__all__ = ["group_norm_silu", "unavailable_reason"]
