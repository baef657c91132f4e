"""Numbers that change from step to step, such as a learning rate.

A CPU takes them as they are. Other devices read them where they lie, so that neither the host waits
nor a captured step has to be captured again.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

Setting = float | Tensor  # a number of the host, or a 0-d tensor of a device


def is_host(device: torch.device) -> bool:
    """Whether the device is the host itself, which nothing has to wait for."""
    return device.type == "cpu"


def setting_on(device: torch.device) -> Setting:
    """A setting for work on a device, 0 to begin with."""
    return 0.0 if is_host(device) else torch.zeros((), device=device)


def set_to(setting: Setting, value: float) -> Setting:
    """The setting with another value: a tensor stays where it is."""
    return setting.fill_(value) if isinstance(setting, Tensor) else value


Optimizer = TypeVar("Optimizer", bound=torch.optim.Optimizer)


def rated_on(device: torch.device, optimizer: Optimizer) -> Optimizer:
    """The optimizer with a learning rate for `set_rate` to set."""
    for group in optimizer.param_groups:
        group["lr"] = setting_on(device)
    return optimizer


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set an optimizer's learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = set_to(group["lr"], rate)
