"""Distillation: a student learns a teacher's trajectories against a discriminator.

L_D = sum_k w_k [ softplus(-D(x^(k))) + softplus(D(xhat^(k)))
                  + gamma_1/2 |grad_x D(x^(k))|^2 + gamma_2/2 |grad_x D(xhat^(k))|^2 ]
L_G = sum_k w_k [ lambda_adv softplus(-D(xhat^(k))) + lambda_rec rho(xhat^(k) - x^(k)) ]
      + lambda_div max(0, d_y - |xhat^(K) - xhat'^(K)|)

with x^(k) the teacher's k-th target and xhat^(k) the image of the student's k-th head. The two
softplus terms are the logistic loss; `losses` has them, rho and their alternatives by name. A
"paired" adversary sees x_T beside either image. A "fresh" one does not see it, and its xhat^(k)
grow from noise that is used once and never reconstructed; its x^(K) may be training images in
place of the teacher's, and its xhat^(K) may be held apart from xhat'^(K), the image of another
noise of the same label y (`diversity`).
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from advkd import device, processes
from advkd.card import Facts
from advkd.config import Config, ConfigError, DistillConfig
from advkd.data.images import ImageSet
from advkd.data.trajectories import Trajectories
from advkd.device import autocast
from advkd.models.discriminator import Discriminator
from advkd.models.student import Student
from advkd.parallel import Workers
from advkd.publish import publish_student
from advkd.training import losses
from advkd.training.augment import Augmentation
from advkd.training.batches import Batch, Batches, Drawn, Labeled
from advkd.training.checkpoint import drop_checkpoints
from advkd.training.diversity import missing_distance, typical_of_data
from advkd.training.ema import Ema
from advkd.training.graphs import Steps
from advkd.training.inputs import Ahead, on_device
from advkd.training.loop import Follower, Training, Value, run_training
from advkd.training.losses import find_loss, generator_gradient
from advkd.training.schedule import active_heads, adversary_heads, head_weights, learning_rate
from advkd.training.settings import rated_on, set_rate
from advkd.training.streams import generator_at, global_seed

STAGE = "distill"

# Submodules that are not yet active take no part in a step.
_UNUSED_IS_ZERO: dict[str, Any] = {"allow_unused": True, "materialize_grads": True}


def check_settings(settings: DistillConfig, K: int) -> None:
    """ConfigError for settings that K heads cannot be trained with, beyond each one's bounds."""
    find_loss(losses.RECONSTRUCTION, "rho", settings.rho)
    find_loss(losses.ADVERSARIAL, "adversarial_loss", settings.adversarial_loss)
    head_weights(settings.head_weights, K)
    if settings.adversary == "paired" and (settings.translate or settings.cutout):
        raise ConfigError(
            "distill.translate and cutout move images away from their noise, which a paired "
            "adversary sees beside them: set distill.adversary=fresh, or both to 0"
        )
    if settings.adversary == "paired" and settings.lambda_div:
        raise ConfigError(
            "distill.lambda_div holds images of fresh noise apart: set distill.adversary=fresh, or "
            "lambda_div=0"
        )
    if settings.lambda_rec > 0:
        return
    if settings.lambda_adv <= 0:
        raise ConfigError("distill.lambda_rec=0 and lambda_adv=0 leave the student without a loss")
    if settings.adversary_after > 0:
        raise ConfigError(
            f"distill.adversary_after={settings.adversary_after:g} with lambda_rec=0 leaves steps "
            "without a loss"
        )


def _widened(x: Tensor) -> Tensor:
    """x, in float32 where autocast made it narrower."""
    return x.float() if x.dtype == torch.bfloat16 else x


class Adversary(NamedTuple):
    """The discriminator's side of a step, before any gradient is taken."""

    loss: Tensor  # L_D without the gradient penalty
    fakes: list[Tensor]  # the images that D saw, as leaves
    ratios: list[Tensor]  # (B,) of each: the student's derivative over D's


class StepPlan(NamedTuple):
    """What a step computes: of how many heads, the reconstruction's weight (0: none), the heads
    that D sees with their weights, and those whose gradient is penalized."""

    heads: int
    reconstruct: float
    seen: dict[int, float]
    penalize: tuple[int, ...]
    apart: int = 0  # by which weight images of a label are held apart (0: not)

    @property
    def kind(self) -> Hashable:
        """The same for plans that compute the same."""
        return self._replace(seen=tuple(self.seen.items()))  # type: ignore[arg-type]


class Distillation(Training):
    """Student, average, discriminator, their optimizers and the trajectories they learn from."""

    stage = STAGE

    def __init__(self, config: Config, trajectories: Trajectories, images: ImageSet | None = None):
        """Raises ConfigError where settings, trajectories and images do not fit one another."""
        self.settings, self.stages = config.distill, config.student.stages
        index = trajectories.index
        C, size, _ = index.shape
        if len(self.stages) != trajectories.K:
            raise ConfigError(
                f"the store has {trajectories.K} targets, the student {len(self.stages)} heads"
            )
        check_settings(self.settings, len(self.stages))
        self.rho = losses.RECONSTRUCTION[self.settings.rho]
        self.adversarial = losses.ADVERSARIAL[self.settings.adversarial_loss]
        self.weights = head_weights(self.settings.head_weights, len(self.stages))
        self.paired = self.settings.adversary == "paired"
        self.adversary_start = round(self.settings.adversary_after * self.settings.steps)
        self.device = device.resolve(config.run.device)
        real = None if self.paired or not self.settings.real_images else images
        self.batches = Batches(config, trajectories, real)
        self.inputs = Ahead(self.drawn, self.device)
        self.autocast = "on" if config.run.dtype == "bfloat16" else "off"
        with global_seed(config.run.seed, self.device):
            student = Student(config.student, size, C, index.target, index.num_classes)
            D = Discriminator(
                config.discriminator, size, C, self.stages, index.num_classes, self.paired
            )
        if self.settings.lambda_div:
            generator = generator_at(config.run.seed, 0, "diversity")
            self.typical = typical_of_data(real, trajectories, generator).to(self.device)
        self.student = student.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.discriminator = D.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.ema = Ema(self.student, self.settings.ema)
        betas = (self.settings.beta1, self.settings.beta2)
        self.optimizer, self.optimizer_d = (
            rated_on(self.device, torch.optim.Adam(net.parameters(), betas=betas, fused=True))
            for net in (self.student, self.discriminator)
        )
        self.modules = {
            "student": self.student,
            "ema": self.ema.model,
            "d": self.discriminator,
        }
        self.optimizers = {"optimizer": self.optimizer, "optimizer_d": self.optimizer_d}
        self.steps = Steps(
            self.device, [self.optimizer, self.optimizer_d], config.run.compile == "graph"
        )

    def batch(self, step: int) -> Batch:
        """The batch that belongs to `step`, with the targets that the step takes."""
        return self.made(on_device(self.drawn(step), self.device))

    def drawn(self, step: int) -> Drawn:
        """What this batch is made of, on the host."""
        plan = self.plan(step)
        fresh = not self.paired and step >= self.adversary_start
        return self.batches.drawn(step, self.targets_of(plan), fresh, plan.apart > 0)

    def made(self, drawn: Drawn) -> Batch:
        """The batch made of what is drawn, where that lies."""
        return self.batches.made(drawn)

    def targets_of(self, plan: StepPlan) -> list[int]:
        """The heads whose targets a step takes: to reconstruct, and as D's real images."""
        last = len(self.stages) - 1
        shown = {*plan.seen, *plan.penalize}
        if self.batches.images is not None:
            shown.discard(last)
        reconstructed = range(plan.heads) if plan.reconstruct else ()
        return sorted({*reconstructed, *shown})

    def states(self, given: Labeled, depth: int | None = None) -> list[Tensor]:
        """The images of the student's heads, in float32 whatever computes them."""
        with autocast(self.autocast, self.device):
            images = self.student.states(given.x, given.y, depth)
        return [_widened(image) for image in images]

    def logits(self, batch: Batch, k: int, fake: Tensor) -> tuple[Tensor, Tensor]:
        """D's logits (B,) of the real images of head k, and of the student's, in one call."""
        real, y_real = batch.real(k)
        fake, y_fake = batch.fake(fake)
        real, fake = self._as_seen(batch.of_real, real, k), self._as_seen(batch.of_fake, fake, k)
        y = None if y_real is None or y_fake is None else torch.cat([y_real, y_fake])
        x_T = torch.cat([batch.x_T, batch.x_T]) if self.paired else None
        with autocast(self.autocast, self.device):
            logits = self.discriminator(torch.cat([real, fake]), x_T, k, y)
        of_real, of_fake = _widened(logits).chunk(2)
        return of_real, of_fake

    def _as_seen(self, augmentation: Augmentation | None, x: Tensor, k: int) -> Tensor:
        """Images of head k as D sees them: those of the last head moved and covered."""
        last = k == len(self.stages) - 1
        return augmentation(x) if augmentation is not None and last else x

    def reconstruction(
        self, batch: Batch, images: list[Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """sum_k w_k lambda_rec rho(xhat^(k) - x^(k)), and rho of every head to log."""
        s = self.settings
        logged: dict[str, Tensor] = {}
        total = images[0].new_zeros(())
        for k, image in enumerate(images):
            rho = self.rho(image - batch.targets[k], s.huber_delta)
            total = total + self.weights[k] * s.lambda_rec * rho
            logged[f"rec_{k + 1}"] = rho.detach()
        return total, logged

    def adversary(
        self, batch: Batch, images: list[Tensor], heads: dict[int, float]
    ) -> tuple[Adversary, dict[str, Tensor]]:
        """The adversarial part of L_D over `heads`, with the weight of each, and values to log."""
        fakes, ratios = [], []
        logged: dict[str, Tensor] = {}
        total = batch.x_T.new_zeros(())
        for k, weight in heads.items():
            fake = images[k].detach().requires_grad_()
            real_logits, fake_logits = self.logits(batch, k, fake)
            terms = self.adversarial(real_logits, fake_logits)
            total = total + weight * terms.discriminator
            fakes.append(fake)
            ratios.append(terms.ratio)
            logged[f"adv_{k + 1}"] = terms.generator
            logged[f"logit_gap_{k + 1}"] = (real_logits - fake_logits).detach().mean()
        logged["loss_d"] = total.detach()
        return Adversary(total, fakes, ratios), logged

    def penalty(
        self, batch: Batch, heads: Sequence[int], fakes: list[Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """sum_k w_k gamma/2 E|grad_x D|^2 over `heads`, and each expectation to log.

        R1 is over D's real images (Mescheder et al. 2018), R2 over the student's, `fakes`.
        """
        s = self.settings
        real = [batch.real(k) for k in heads]
        fake = [batch.fake(fakes[k]) for k in heads] if s.r2_gamma else []
        total = batch.x_T.new_zeros(())
        logged: dict[str, Tensor] = {}
        for name, gamma, images, augmentation in (
            ("r1", s.r1_gamma, real, batch.of_real),
            ("r2", s.r2_gamma, fake, batch.of_fake),
        ):
            if gamma:
                weighted = batch.x_T.new_zeros(())
                for k, (x, y) in zip(heads, images, strict=True):
                    slope = self.squared_slope(batch, x, y, k, augmentation)
                    weighted = weighted + self.weights[k] * slope
                logged[name] = weighted.detach()
                total = total + gamma / 2 * weighted
        return total, logged

    def squared_slope(
        self, batch: Batch, x: Tensor, y: Tensor | None, k: int, augmentation: Augmentation | None
    ) -> Tensor:
        """E|grad_x D(x)|^2 at images x of head k, which D sees moved and covered; in float32
        throughout, for it is differentiated twice."""
        x = x.detach().requires_grad_()
        seen = self._as_seen(augmentation, x, k)
        logits = self.discriminator(seen, batch.x_T if self.paired else None, k, y)
        (gradient,) = torch.autograd.grad(logits.sum(), x, create_graph=True)
        return gradient.square().sum(dim=(1, 2, 3)).mean()

    def diversity(self, batch: Batch, images: list[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """lambda_div max(0, d_y - |xhat^(K) - xhat'^(K)|), and the maximum to log."""
        assert batch.other is not None
        other = self.states(batch.other)[-1]
        y = batch.other.y
        typical = self.typical if y is None else self.typical[y]
        missing = missing_distance(images[-1], other, typical).mean()
        return self.settings.lambda_div * missing, {"div": missing.detach()}

    def gradients(self, batch: Batch, plan: StepPlan) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Gradients of L_G in the student's and of L_D in D's parameters, and values to log.

        Where D sees no head there are the student's gradients alone.
        """
        of_g = list(self.student.parameters())
        logged: dict[str, Tensor] = {}
        outputs: list[Tensor] = []  # what the student is differentiated through
        images: list[Tensor] = []
        if plan.reconstruct or batch.fresh is None:
            images = self.states(Labeled(batch.x_T, batch.y), plan.heads)
        if plan.reconstruct:
            rec, logged = self.reconstruction(batch, images)
            outputs = [rec * plan.reconstruct]
        if not plan.seen:
            return list(torch.autograd.grad(outputs, of_g, **_UNUSED_IS_ZERO)), logged
        if batch.fresh is not None:
            images = self.states(batch.fresh, plan.heads)
        (loss_d, fakes, ratios), logged_d = self.adversary(batch, images, plan.seen)
        logged |= logged_d
        if plan.penalize:
            penalty, logged_p = self.penalty(batch, plan.penalize, images)
            logged |= logged_p
            loss_d = loss_d + penalty * self.settings.r1_every
        found = torch.autograd.grad(
            loss_d, [*fakes, *self.discriminator.parameters()], **_UNUSED_IS_ZERO
        )
        if plan.apart:
            diversity, logged_div = self.diversity(batch, images)
            logged |= logged_div
            outputs.append(diversity * plan.apart)
        given = [torch.ones_like(output) for output in outputs] + [
            self.settings.lambda_adv * generator_gradient(gradient, ratio)
            for gradient, ratio in zip(found[: len(fakes)], ratios, strict=True)
        ]
        outputs += [images[k] for k in plan.seen]
        found_g = torch.autograd.grad(outputs, of_g, grad_outputs=given, **_UNUSED_IS_ZERO)
        return [*found_g, *found[len(fakes) :]], logged

    def plan(self, step: int) -> StepPlan:
        """What `step` computes."""
        s = self.settings
        heads = active_heads(s.schedule, len(self.stages), step, s.steps, s.grow_until)
        if step < self.adversary_start:
            return StepPlan(heads, 1, {}, ())
        seen = adversary_heads(self.weights, heads, step, s.adversary_heads, s.inner_every)
        penalized: Sequence[int] = ()
        if (s.r1_gamma or s.r2_gamma) and step % s.r1_every == 0:
            penalized = range(heads) if s.adversary_heads == "all" else [heads - 1]
        reconstruct = s.rec_every if s.lambda_rec and step % s.rec_every == 0 else 0
        last = heads == len(self.stages)
        apart = s.div_every if s.lambda_div and last and step % s.div_every == 0 else 0
        return StepPlan(heads, reconstruct, seen, tuple(penalized), apart)

    def step(self, step: int, workers: Workers) -> dict[str, Value]:
        """One step of both networks, or of the student alone; returns values to log."""
        s = self.settings
        plan = self.plan(step)
        lr = learning_rate(step, s.lr, s.warmup, s.steps, s.lr_final)
        set_rate(self.optimizer, lr)
        rates = {"lr": lr}
        if plan.seen:  # D has a warm-up of its own
            since = step - self.adversary_start
            after = s.steps - self.adversary_start
            rates["lr_d"] = learning_rate(since, s.lr_d, s.warmup, after, s.lr_final)
            set_rate(self.optimizer_d, rates["lr_d"])
        self.ema.at(step)
        values = self.steps(
            plan.kind, self.inputs(step), lambda drawn: self.carried_out(drawn, plan, step, workers)
        )
        return {**values, **rates}

    def carried_out(
        self, drawn: Drawn, plan: StepPlan, step: int, workers: Workers
    ) -> dict[str, Value]:
        """The device's part of a step: its batch, the gradients and what they move."""
        s, batch = self.settings, self.made(drawn)
        networks = {"grad_g": (self.student, self.optimizer)}
        if plan.seen:
            networks["grad_d"] = (self.discriminator, self.optimizer_d)

        def gradients_of(share: slice) -> tuple[list[Tensor], dict[str, Tensor]]:
            return self.gradients(batch.share(share), plan)

        parameters = [p for network, _ in networks.values() for p in network.parameters()]
        values = workers.gradients(gradients_of, s.batch, parameters)
        for name, (network, _) in networks.items():
            values[name] = torch.nn.utils.clip_grad_norm_(network.parameters(), s.grad_clip)
        optimizers = [optimizer for _, optimizer in networks.values()]
        return self.update(values, step, optimizers, self.student)

    def brief(self, values: dict[str, float]) -> dict[str, str]:
        """The last active head's losses and its logit gap."""
        numbers = [int(key[4:]) for key in values if key.startswith(("rec_", "adv_"))]
        last = max(numbers, default=0)
        shown = {"rec": f"rec_{last}", "adv": f"adv_{last}", "gap": f"logit_gap_{last}"}
        return {name: f"{values[key]:.3f}" for name, key in shown.items() if key in values}


def distill_student(
    config: Config,
    trajectories: Trajectories,
    run: Path,
    images: ImageSet | None = None,
    class_names: tuple[str, ...] | None = None,
    follower: Follower | None = None,
) -> float:
    """Train a student from scratch, or on from its last checkpoint; save `run/student`.

    `images` are the training images, where there are any, for a fresh adversary; `class_names` are
    those of the teacher, and `follower` may watch. Returns the seconds of training, interrupted
    parts included. Raises TrainingError on a value that is not finite and Interrupted after a
    signal, both with the state on disk.
    """
    training = Distillation(config, trajectories, images)
    seconds = run_training(training, run, config.distill, config.run, follower)
    if processes.is_first():
        training.ema.model.class_names = class_names
        facts = Facts(f"{config.name} student")
        publish_student(training.ema.model, run / "student", facts=facts)
        drop_checkpoints(run / "checkpoints", STAGE)
    return seconds
