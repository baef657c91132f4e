"""Distillation: a student learns a teacher's trajectories, a discriminator judges both.

L_D = sum_k w_k [ softplus(-D(x^(k))) + softplus(D(xhat^(k))) + gamma/2 |grad_x D(x^(k))|^2 ]
L_G = sum_k w_k [ lambda_adv softplus(-D(xhat^(k))) + lambda_rec rho(xhat^(k) - x^(k)) ]

with x^(k) the teacher's k-th kept target and xhat^(k) the student's k-th head. An adversary that
is "paired" sees x_T too and judges both for the same x_T. One that is "fresh" does not see it, and
its xhat^(k) grow from noise that is used once and never reconstructed; its x^(K) may be training
images in place of the teacher's.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from advkd.config import Config, ConfigError, DistillConfig
from advkd.data.images import ImageSet
from advkd.data.trajectories import Trajectories
from advkd.device import pick_device
from advkd.engine.noise import FIRST_FRESH
from advkd.models.discriminator import Discriminator
from advkd.models.layers import area_resized
from advkd.models.student import Student
from advkd.parallel import Workers
from advkd.pretrained import save_student
from advkd.training.checkpoint import drop_checkpoints
from advkd.training.ema import Ema
from advkd.training.loop import (
    Training,
    check_finite,
    generator_at,
    learning_rate,
    run_training,
)

STAGE = "distill"
STREAM = "distil"  # of its random numbers; version 0.1 called the stage so
SCHEDULES = ("joint", "progressive")
ADVERSARIES = ("paired", "fresh")

# Submodules that are not yet active take no part in a step.
_UNUSED_IS_ZERO: dict[str, Any] = {"allow_unused": True, "materialize_grads": True}


def reconstruction(error: Tensor, rho: str, delta: float) -> Tensor:
    """rho(error) averaged: "l2", or "huber" scaled so that it is |error| far from 0."""
    if rho == "l2":
        return error.square().mean()
    if rho == "huber":
        return F.huber_loss(error, torch.zeros_like(error), delta=delta) / delta
    raise ConfigError(f"distill.rho={rho!r} is not one of huber, l2")


def generator_gradient(fake_gradient: Tensor, logits: Tensor) -> Tensor:
    """The gradient of softplus(-D(x)) in x, from that of softplus(D(x)), per image.

    Both are D's gradient times a number of the image: sigmoid(D) for the one, -sigmoid(-D) for
    the other; their ratio is -exp(-D). So one backward pass through D serves both networks. It
    needs a D in which no image sees another (GroupNorm, never BatchNorm).
    """
    ratio = -torch.exp(-logits.clamp(min=-30.0))
    return fake_gradient * ratio[:, None, None, None]


def active_heads(schedule: str, K: int, step: int, steps: int) -> int:
    """How many heads train at `step`: all (joint), or one more in each K-th of the training."""
    if schedule not in SCHEDULES:
        raise ConfigError(f"distill.schedule={schedule!r} is not one of {SCHEDULES}")
    return K if schedule == "joint" else min(K, 1 + step * K // steps)


def head_weights(given: tuple[float, ...], K: int) -> tuple[float, ...]:
    """w_1 .. w_K: as configured, or 1 for the last head and 0.25 for the others."""
    if given and len(given) != K:
        raise ConfigError(f"distill.head_weights has {len(given)} entries, the student {K} heads")
    return given or (0.25,) * (K - 1) + (1.0,)


def check_settings(settings: DistillConfig, K: int) -> None:
    """ConfigError for settings with which K heads cannot be trained."""
    for key in ("steps", "batch", "r1_every", "inner_every", "log_every", "checkpoint_every"):
        value = getattr(settings, key)
        if value < 1:
            raise ConfigError(f"distill.{key}={value} is below 1")
    head_weights(settings.head_weights, K)
    active_heads(settings.schedule, K, 0, settings.steps)
    reconstruction(torch.zeros(1), settings.rho, settings.huber_delta)
    if settings.adversary not in ADVERSARIES:
        raise ConfigError(f"distill.adversary={settings.adversary!r} is not one of {ADVERSARIES}")
    after = settings.adversary_after
    if not 0 <= after <= 1:
        raise ConfigError(f"distill.adversary_after={after:g} is not a share, from 0 to 1")
    if after > 0 and settings.lambda_rec <= 0:
        raise ConfigError(
            f"distill.adversary_after={after:g} with lambda_rec={settings.lambda_rec:g} leaves "
            "steps without a loss"
        )


def judged_heads(
    weights: tuple[float, ...], heads: int, step: int, inner_every: int
) -> dict[int, float]:
    """The heads that D sees at `step`, with their weights.

    The last active one always; those before it every `inner_every` steps and then that many times
    as heavy, so that the sum over the steps is the loss's and their cost a fraction.
    """
    judged = {}
    if step % inner_every == 0:
        judged = {k: weights[k] * inner_every for k in range(heads - 1)}
    return {**judged, heads - 1: weights[heads - 1]}


class Labelled(NamedTuple):
    """Images or noise (B, C, S, S) and their labels (B,) int64, or None."""

    x: Tensor
    y: Tensor | None

    def share(self, part: slice) -> Labelled:
        return Labelled(self.x[part], None if self.y is None else self.y[part])


@dataclass(frozen=True)
class Batch:
    """What one step learns from.

    x_T (B, C, S, S) and labels y or None; the targets x^(k), each at its head's resolution. Of a
    fresh adversary also the noise whose images D judges, and the training images that D takes for
    real in the last target's place, or None.
    """

    x_T: Tensor
    targets: list[Tensor]
    y: Tensor | None
    fresh: Labelled | None = None
    images: Labelled | None = None

    def share(self, part: slice) -> Batch:
        x_T, y = Labelled(self.x_T, self.y).share(part)
        return Batch(
            x_T,
            [x[part] for x in self.targets],
            y,
            self.fresh.share(part) if self.fresh else None,
            self.images.share(part) if self.images else None,
        )

    def real(self, k: int) -> Labelled:
        """What D takes for real at head k (0 .. K-1)."""
        if self.images is not None and k == len(self.targets) - 1:
            return self.images
        return Labelled(self.targets[k], self.y)


class Distillation(Training):
    """Student, average, discriminator, their optimisers and the trajectories they learn from."""

    stage = STAGE

    def __init__(self, config: Config, trajectories: Trajectories, images: ImageSet | None = None):
        self.config, self.settings = config, config.distill
        self.trajectories = trajectories
        self.device = pick_device(config.run.device)
        index = trajectories.index
        C, size, _ = index.shape
        self.stages = config.student.stages
        if len(self.stages) != trajectories.K:
            raise ConfigError(
                f"the store keeps {trajectories.K} targets, the student has {len(self.stages)}"
            )
        check_settings(self.settings, len(self.stages))
        torch.manual_seed(config.run.seed)
        student = Student(config.student, size, C, index.target, index.num_classes)
        self.paired = self.settings.adversary == "paired"
        self.first_judged = round(self.settings.adversary_after * self.settings.steps)
        self.images = None if self.paired or not self.settings.real_images else images
        if self.images is not None:
            _check_images(self.images, trajectories)
        D = Discriminator(
            config.discriminator, size, C, self.stages, index.num_classes, self.paired
        )
        self.student = student.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.discriminator = D.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.ema = Ema(self.student, self.settings.ema)
        self.weights = head_weights(self.settings.head_weights, len(self.stages))
        betas = (self.settings.beta1, self.settings.beta2)
        self.optimizer, self.optimizer_d = (
            torch.optim.Adam(net.parameters(), betas=betas, fused=True)
            for net in (self.student, self.discriminator)
        )
        self.modules = {
            "student": self.student,
            "ema": self.ema.model,
            "d": self.discriminator,
        }
        self.optimizers = {"optimizer": self.optimizer, "optimizer_d": self.optimizer_d}

    def batch(self, step: int) -> Batch:
        """The trajectories that belong to `step`."""
        generator = generator_at(self.config.run.seed, step, STREAM)
        indices = torch.randint(self.trajectories.num, (self.settings.batch,), generator=generator)
        targets = self.trajectories.targets(indices)
        y = self.trajectories.labels(indices)
        fresh = images = None
        if not self.paired and step >= self.first_judged:
            fresh = self._fresh_noise(step)
            images = None if self.images is None else self._real_images(self.images, generator)
        return Batch(
            self.trajectories.x_T(indices).to(self.device),
            [
                area_resized(targets[:, k], size)
                .to(self.device)
                .contiguous(memory_format=torch.channels_last)
                for k, size in enumerate(self.stages)
            ],
            None if y is None else y.to(self.device),
            fresh,
            images,
        )

    def _fresh_noise(self, step: int) -> Labelled:
        """Noise that no other step sees."""
        first, index = FIRST_FRESH + step * self.settings.batch, self.trajectories.index
        numbers = torch.arange(first, first + self.settings.batch)
        C, H, W = index.shape
        y = index.noise.labels(numbers, index.num_classes)
        x_T = index.noise.x_T(numbers, (C, H, W))
        return Labelled(x_T.to(self.device), None if y is None else y.to(self.device))

    def _real_images(self, images: ImageSet, generator: torch.Generator) -> Labelled:
        """Training images, with labels where the student has them."""
        B = self.settings.batch
        rows = torch.randint(len(images), (B,), generator=generator).numpy()
        flip = torch.rand(B, generator=generator).numpy() < (0.5 if self.config.data.flip else 0)
        x = images.batch(rows, flip).contiguous(memory_format=torch.channels_last)
        y = None
        if self.student.num_classes is not None and images.labels is not None:
            y = torch.as_tensor(images.labels[rows], device=self.device)
        return Labelled(x.to(self.device), y)

    def judge(self, batch: Batch, k: int, fake: Tensor) -> tuple[Tensor, Tensor]:
        """D's logits of the real and of the student's images of head k, in one call."""
        real, y_real = batch.real(k)
        y_fake = batch.fresh.y if batch.fresh else batch.y
        y = None if y_real is None or y_fake is None else torch.cat([y_real, y_fake])
        x_T = torch.cat([batch.x_T, batch.x_T]) if self.paired else None
        logits = self.discriminator(torch.cat([real, fake]), x_T, k, y)
        of_real, of_fake = logits.chunk(2)
        return of_real, of_fake

    def gradients(
        self, batch: Batch, heads: int, judged: dict[int, float], penalise: bool
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Gradients of L_G in the student's and of L_D in D's parameters, and what is logged.

        `judged` are the heads that D sees in this step, with the weight of each; where it sees none
        there are the student's gradients alone.
        """
        s = self.settings
        images = self.student.states(batch.x_T, batch.y, depth=heads)
        logged: dict[str, Tensor] = {}
        rec = images[0].new_zeros(())
        for k, image in enumerate(images):
            rec_k = reconstruction(image - batch.targets[k], s.rho, s.huber_delta)
            rec = rec + self.weights[k] * s.lambda_rec * rec_k
            logged[f"rec_{k + 1}"] = rec_k.detach()
        of_g = list(self.student.parameters())
        if not judged:
            return list(torch.autograd.grad(rec, of_g, **_UNUSED_IS_ZERO)), logged
        drawn = images
        if batch.fresh is not None:
            drawn = self.student.states(batch.fresh.x, batch.fresh.y, depth=heads)
        fakes, logits = [], []
        loss_d = rec.new_zeros(())
        for k, weight in judged.items():
            fake = drawn[k].detach().requires_grad_()
            real_logits, fake_logits = self.judge(batch, k, fake)
            fakes.append(fake)
            logits.append(fake_logits.detach())
            loss = F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean()
            loss_d = loss_d + weight * loss
            logged[f"adv_{k + 1}"] = F.softplus(-logits[-1]).mean()
            logged[f"margin_{k + 1}"] = (real_logits - fake_logits).detach().mean()
        logged["loss_d"] = loss_d.detach()
        if penalise:
            penalty = self.r1(batch, heads)
            logged["r1"] = penalty.detach()
            loss_d = loss_d + penalty * (s.r1_gamma / 2 * s.r1_every)
        found = torch.autograd.grad(
            loss_d, [*fakes, *self.discriminator.parameters()], **_UNUSED_IS_ZERO
        )
        cotangents = [
            s.lambda_adv * generator_gradient(gradient, logit)
            for gradient, logit in zip(found[: len(fakes)], logits, strict=True)
        ]
        found_g = torch.autograd.grad(
            [rec, *(drawn[k] for k in judged)],
            of_g,
            grad_outputs=[torch.ones_like(rec), *cotangents],
            **_UNUSED_IS_ZERO,
        )
        return [*found_g, *found[len(fakes) :]], logged

    def r1(self, batch: Batch, heads: int) -> Tensor:
        """sum_k w_k E|grad_x D(x^(k))|^2 on what D takes for real (Mescheder et al. 2018)."""
        total = batch.x_T.new_zeros(())
        for k in range(heads):
            x, y = batch.real(k)
            x = x.detach().requires_grad_()
            logits = self.discriminator(x, batch.x_T if self.paired else None, k, y)
            (gradient,) = torch.autograd.grad(logits.sum(), x, create_graph=True)
            total = total + self.weights[k] * gradient.square().sum(dim=(1, 2, 3)).mean()
        return total

    def step(self, step: int, workers: Workers) -> dict[str, float]:
        """One step of both networks, or of the student alone; returns what is logged."""
        s = self.settings
        batch = self.batch(step)
        heads = active_heads(s.schedule, len(self.stages), step, s.steps)
        lr = learning_rate(step, s.lr, s.warmup, s.steps, s.lr_final)
        networks = {"grad_g": (self.student, self.optimizer, lr)}
        since, judged, penalise = step - self.first_judged, {}, False
        if since >= 0:  # D has a warm-up of its own
            judged = judged_heads(self.weights, heads, step, s.inner_every)
            penalise = s.r1_gamma > 0 and step % s.r1_every == 0
            lr_d = learning_rate(since, s.lr_d, s.warmup, s.steps - self.first_judged, s.lr_final)
            networks["grad_d"] = (self.discriminator, self.optimizer_d, lr_d)

        def gradients_of(share: slice) -> tuple[list[Tensor], dict[str, Tensor]]:
            return self.gradients(batch.share(share), heads, judged, penalise)

        parameters = [p for network, _, _ in networks.values() for p in network.parameters()]
        values = workers.gradients(gradients_of, s.batch, parameters)
        logged = {key: check_finite(key, value, step) for key, value in values.items()}
        for name, (network, _, _) in networks.items():
            norm = torch.nn.utils.clip_grad_norm_(network.parameters(), s.grad_clip)
            logged[name] = check_finite(name, norm, step)
        for _, optimizer, rate in networks.values():  # when all of the step is known to be finite
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
        self.ema.update(self.student, step)
        return {**logged, "lr": lr}

    def brief(self, values: dict[str, float]) -> dict[str, str]:
        last = max(int(key[4:]) for key in values if key.startswith("rec_"))
        shown = {name: f"{name}_{last}" for name in ("rec", "adv", "margin")}
        return {name: f"{values[key]:.3f}" for name, key in shown.items() if key in values}


def _check_images(images: ImageSet, trajectories: Trajectories) -> None:
    index = trajectories.index
    C, size, _ = index.shape
    if (images.channels, images.size) != (C, size):
        raise ConfigError(
            f"{images.source} has images of {images.size}x{images.size} with {images.channels} "
            f"channels, the trajectories {size}x{size} with {C}"
        )
    if index.num_classes is None:
        return
    if images.labels is None or (images.num_classes or 0) > index.num_classes:
        raise ConfigError(
            f"the student has {index.num_classes} classes and {images.source} no labels that fit: "
            "set distill.real_images=false"
        )


def distill_student(
    config: Config, trajectories: Trajectories, run: Path, images: ImageSet | None = None
) -> float:
    """Train a student from scratch, or on from its last checkpoint; save `run/student`.

    `images` are the training images, where there are any, for a fresh adversary. Returns the
    seconds of training, earlier sessions included. Raises TrainingError on a non-finite loss and
    Interrupted after a signal, both with the state on disk.
    """
    training = Distillation(config, trajectories, images)
    s = config.distill
    seconds = run_training(
        training, run, s.steps, s.log_every, s.checkpoint_every, config.run.threads
    )
    save_student(training.ema.model, run / "student")
    drop_checkpoints(run / "checkpoints", STAGE)
    return seconds
