"""Random numbers of a training, each a function of (seed, step, stream).

No random state is carried from step to step, so a resumed training repeats its numbers by
construction, and torch's global generators are left as a user's program had them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


def mixed_seed(seed: int, step: int, stream: str) -> int:
    """A 63-bit seed that depends on nothing but (seed, step, stream)."""
    mixed = (seed * 0x9E3779B97F4A7C15 + step * 0xD1B54A32D192ED03) % 2**64
    for byte in stream.encode():
        mixed = (mixed ^ byte) * 0x100000001B3 % 2**64
    mixed ^= mixed >> 32  # torch's CPU generator takes the low 32 bits only
    return mixed % 2**63


def generator_at(seed: int, step: int, stream: str) -> torch.Generator:
    """A CPU generator that starts from `mixed_seed(seed, step, stream)`."""
    return torch.Generator("cpu").manual_seed(mixed_seed(seed, step, stream))


@contextlib.contextmanager
def global_seed(seed: int, device: torch.device) -> Iterator[None]:
    """Start torch's global generators (the CPU's and the device's) from `seed` within `with`.

    Initialization and dropout know no other generators. Afterwards both go on where they were.
    """
    on_cuda = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if on_cuda else []):
        torch.default_generator.manual_seed(seed)
        if on_cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield
