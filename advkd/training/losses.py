"""The losses of a distillation, by name: adding one is a function and a name.

@reconstruction_loss("huber")        chosen by distill.rho
@adversarial_loss("logistic")        chosen by distill.adversarial_loss
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from advkd.config import ConfigError, nearest

Loss = TypeVar("Loss")


class AdversarialTerms(NamedTuple):
    """An adversarial loss of one head's logits, for both networks."""

    discriminator: Tensor  # (), a mean over the batch, which D minimizes
    generator: Tensor  # () without gradient: the student's own loss, to be logged
    ratio: Tensor  # (B,) without gradient: the student's dL/dD(xhat) over D's, image by image


ReconstructionLoss = Callable[[Tensor, float], Tensor]  # (xhat - x, huber_delta) -> ()
AdversarialLoss = Callable[[Tensor, Tensor], AdversarialTerms]  # (D(x), D(xhat)), each (B,)

RECONSTRUCTION: dict[str, ReconstructionLoss] = {}
ADVERSARIAL: dict[str, AdversarialLoss] = {}


def reconstruction_loss(name: str) -> Callable[[ReconstructionLoss], ReconstructionLoss]:
    """Register rho: the error of one head's images and `distill.huber_delta` -> its mean, 0-d."""
    return _registering(RECONSTRUCTION, name)


def adversarial_loss(name: str) -> Callable[[AdversarialLoss], AdversarialLoss]:
    """Register an adversarial loss: D's logits of real and of generated images -> its terms."""
    return _registering(ADVERSARIAL, name)


def _registering(registry: dict[str, Loss], name: str) -> Callable[[Loss], Loss]:
    def register(loss: Loss) -> Loss:
        if registry.setdefault(name, loss) is not loss:
            raise ValueError(f"there already is a loss named {name!r}")
        return loss

    return register


def find_loss(registry: Mapping[str, Loss], key: str, name: str) -> Loss:
    """The loss of a registry that `distill.KEY` names; ConfigError where there is none."""
    if name not in registry:
        known = ", ".join(sorted(registry))
        raise ConfigError(
            f"distill.{key}={name!r} is not one of {known}{nearest(name, list(registry))}"
        )
    return registry[name]


@reconstruction_loss("l2")
def squared_error(error: Tensor, delta: float) -> Tensor:
    """rho(e) = e^2, averaged."""
    return error.square().mean()


@reconstruction_loss("huber")
def huber(error: Tensor, delta: float) -> Tensor:
    """Huber's function divided by delta, averaged: e^2 / (2 delta) up to delta, then
    |e| - delta / 2."""
    return F.huber_loss(error, torch.zeros_like(error), delta=delta) / delta


# Logits below are held here, where sigmoid still has all digits of float32 on its way through D.
LOWEST_LOGIT = -30.0


def held(logits: Tensor) -> Tensor:
    """Logits as they are, but none below LOWEST_LOGIT; their own gradient is 1 everywhere.

    softplus has the slope sigmoid(D), which vanishes in float32 for an image that D is sure of,
    and then no ratio recovers the student's gradient from D's. Held, the slope stays at
    sigmoid(-30) = 1e-13: too little to move D, and all that the ratio needs.
    """
    value = logits.detach()
    return value.clamp(min=LOWEST_LOGIT) + (logits - value)


@adversarial_loss("logistic")
def logistic(real: Tensor, fake: Tensor) -> AdversarialTerms:
    """softplus(-D(x)) + softplus(D(xhat)), against softplus(-D(xhat)) (Goodfellow et al. 2014).

    The derivatives in D(xhat) are sigmoid(D) and -sigmoid(-D); their ratio is -exp(-D).
    """
    logits = held(fake)
    return AdversarialTerms(
        discriminator=F.softplus(-real).mean() + F.softplus(logits).mean(),
        generator=F.softplus(-fake.detach()).mean(),
        ratio=-torch.exp(-logits.detach()),
    )


@adversarial_loss("relativistic")
def relativistic(real: Tensor, fake: Tensor) -> AdversarialTerms:
    """softplus(D(xhat) - D(x)), against softplus(D(x) - D(xhat)), image by image
    (Jolicoeur-Martineau 2019; Huang et al. 2024).

    The ratio of the derivatives in D(xhat) is -exp(D(x) - D(xhat)).
    """
    gap = held(fake - real)
    return AdversarialTerms(
        discriminator=F.softplus(gap).mean(),
        generator=F.softplus((real - fake).detach()).mean(),
        ratio=-torch.exp(-gap.detach()),
    )


def generator_gradient(fake_gradient: Tensor, ratio: Tensor) -> Tensor:
    """The gradient of the student's adversarial loss in xhat (B, C, H, W), from that of D's loss.

    Both are D's gradient times a number of the image, so one backward pass through D serves both
    networks. It needs a D in which no image sees another (GroupNorm, never BatchNorm).
    """
    return fake_gradient * ratio[:, None, None, None]
