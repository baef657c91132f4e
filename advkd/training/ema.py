"""Exponential moving averages of a network's parameters."""

from __future__ import annotations

import copy
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from advkd.training.settings import set_to, setting_on

Network = TypeVar("Network", bound=nn.Module)


class Ema(Generic[Network]):
    """An exponential moving average of a network's parameters; `model` is what gets saved.

    The decay grows from 0.1 to `decay`, so that the initial weights are forgotten early.
    """

    def __init__(self, model: Network, decay: float):
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay
        self._weight = setting_on(next(model.parameters()).device)

    def at(self, step: int) -> None:
        """Let `update` move the average as far as belongs to `step` (from 0)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        self._weight = set_to(self._weight, 1 - decay)

    @torch.no_grad()
    def update(self, model: Network, bad: Tensor | None = None) -> None:
        """Move the average toward the network's parameters; not where the flag `bad` (0-d) is 1."""
        averaged: list[Tensor] = list(self.model.parameters())
        current: list[Tensor] = list(model.parameters())
        if not isinstance(self._weight, Tensor):
            torch._foreach_lerp_(averaged, current, self._weight)
            return
        moves = torch._foreach_sub(current, averaged)
        torch._foreach_mul_(moves, self._weight if bad is None else self._weight * (1 - bad))
        torch._foreach_add_(averaged, list(moves))
