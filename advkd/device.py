"""Where networks run, decided in one place."""

from __future__ import annotations

import contextlib
from typing import Any

import torch


def pick_device(name: str) -> torch.device:
    """The device that `run.device` means; "auto" takes a GPU where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def autocast(mode: str, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """bfloat16 autocast: "on", "off", or "auto" where the hardware computes in bfloat16."""
    if mode not in ("auto", "on", "off"):
        raise ValueError(f"autocast={mode!r} is not one of auto, on, off")
    if mode == "auto":
        has = (
            torch.cuda.is_bf16_supported(including_emulation=False)
            if device.type == "cuda"
            else torch.cpu._is_avx512_bf16_supported()
        )
        mode = "on" if has else "off"
    return torch.autocast(device.type, torch.bfloat16, enabled=mode == "on")
