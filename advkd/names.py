"""Names that settings and commands share; here, so that a command's options need no settings."""

from __future__ import annotations

SAMPLERS = ("ddim", "ddpm")
