"""Exponential moving averages of a network's parameters."""

from __future__ import annotations

import copy
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

Network = TypeVar("Network", bound=nn.Module)


class Ema(Generic[Network]):
    """An exponential moving average of a network's parameters; `model` is what gets saved.

    The decay grows from 0.1 to `decay`, so that the initial weights are forgotten early.
    """

    def __init__(self, model: Network, decay: float):
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, model: Network, step: int) -> None:
        """Move the average toward the network's parameters after `step` (from 0)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        averaged: list[Tensor] = list(self.model.parameters())
        current: list[Tensor] = list(model.parameters())
        torch._foreach_lerp_(averaged, current, 1 - decay)
