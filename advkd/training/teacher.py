"""Training a teacher: DDPM's simple loss (Ho et al. 2020, eq. 14) on a UNet."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from advkd import device, processes
from advkd.config import Config, ConfigError
from advkd.data.images import ImageSet
from advkd.device import autocast
from advkd.diffusion import Schedule
from advkd.models.unet import UNet
from advkd.parallel import Workers
from advkd.pretrained import load_teacher, save_teacher
from advkd.training.checkpoint import drop_checkpoints
from advkd.training.ema import Ema
from advkd.training.graphs import Steps
from advkd.training.inputs import Ahead, on_device
from advkd.training.loop import Follower, Training, Value, run_training
from advkd.training.schedule import learning_rate
from advkd.training.settings import rated_on, set_rate
from advkd.training.streams import generator_at, global_seed, mixed_seed

STAGE = "teacher"
STREAM = "teacher"  # of a batch's random numbers; its name is part of the bits
DROPOUT_STREAM = "dropout"

Batch = tuple[Tensor, Tensor, Tensor, Tensor | None]  # clean images, noise, times, labels

# Settings of a network or schedule that its weights do not depend on.
_NOT_LEARNED = {
    *("sample_size", "dropout"),
    *("clip_sample", "clip_sample_range", "variance_type", "timestep_spacing", "steps_offset"),
    *("set_alpha_to_one", "thresholding", "dynamic_thresholding_ratio", "sample_max_value"),
}


def noised(x_0: Tensor, eps: Tensor, alpha_bar: Tensor) -> Tensor:
    """x_t from x_0 (DDPM eq. 4); alpha_bar (B,) at each image's time."""
    level = alpha_bar[:, None, None, None]
    return level.sqrt() * x_0 + (1 - level).sqrt() * eps


def prediction_target(prediction_type: str, x_0: Tensor, eps: Tensor, alpha_bar: Tensor) -> Tensor:
    """The network's target: eps, x_0, or v = sqrt(ab) eps - sqrt(1-ab) x_0 (Salimans & Ho 2022)."""
    if prediction_type == "epsilon":
        return eps
    if prediction_type == "sample":
        return x_0
    level = alpha_bar[:, None, None, None]
    return level.sqrt() * eps - (1 - level).sqrt() * x_0


class TeacherTraining(Training):
    """Network, average, optimizer and data of a teacher in training."""

    stage = STAGE

    def __init__(self, config: Config, images: ImageSet):
        """Raises ConfigError where the images, or `teacher.init`, do not fit the configuration."""
        check_data(config, images)
        self.config = config
        self.settings = config.teacher
        self.images = images
        self.device = device.resolve(config.run.device)
        with global_seed(config.run.seed, self.device):
            unet = _initial_unet(config)
        names = images.classes or ()
        # A network for more classes than there are would have some without a name.
        unet.class_names = names if len(names) == unet.num_classes else None
        unet = unet.to(self.device)
        self.unet = unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.ema = Ema(self.unet, self.settings.ema)
        self.unet.recompute = self.settings.recompute
        optimizer = torch.optim.AdamW(
            self.unet.parameters(),
            betas=(0.9, self.settings.beta2),
            weight_decay=self.settings.weight_decay,
            fused=True,
        )
        self.optimizer = rated_on(self.device, optimizer)
        self.modules = {"unet": self.unet, "ema": self.ema.model}
        self.optimizers = {"optimizer": self.optimizer}
        self.steps = Steps(self.device, [self.optimizer], config.run.compile == "graph")
        alpha_bar = self.unet.schedule.alpha_bar
        self.alpha_bar = torch.tensor(alpha_bar, dtype=torch.float32, device=self.device)
        self.inputs = Ahead(self.drawn, self.device)

    def batch(self, step: int) -> Batch:
        """The clean images, noise, times and labels that belong to `step`, on the device."""
        return on_device(self.drawn(step), self.device)

    def drawn(self, step: int) -> Batch:
        """The same on the host."""
        generator = generator_at(self.config.run.seed, step, STREAM)
        B = self.settings.batch
        indices = torch.randint(len(self.images), (B,), generator=generator).numpy()
        flip = torch.rand(B, generator=generator).numpy() < (0.5 if self.config.data.flip else 0)
        x_0 = self.images.batch(indices, flip)
        eps = torch.randn(x_0.shape, generator=generator)
        t = torch.randint(len(self.alpha_bar), (B,), generator=generator)
        y = None
        if self.unet.class_embedding is not None and self.images.labels is not None:
            y = torch.from_numpy(self.images.labels[indices])
        return x_0, eps, t, y

    def loss(self, x_0: Tensor, eps: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        """The simple loss of a batch or a share of it: a 0-d tensor."""
        alpha_bar = self.alpha_bar[t]
        x_t = noised(x_0, eps, alpha_bar).contiguous(memory_format=torch.channels_last)
        with autocast(self.settings.autocast, self.device):
            predicted = self.unet(x_t, t, y)
        target = prediction_target(self.unet.schedule.prediction_type, x_0, eps, alpha_bar)
        return F.mse_loss(predicted.float(), target)

    def step(self, step: int, workers: Workers) -> dict[str, Value]:
        """One optimizer step; returns values to log."""
        s = self.settings
        lr = learning_rate(step, s.lr, s.warmup, s.steps, s.lr_final)
        set_rate(self.optimizer, lr)
        self.ema.at(step)
        with global_seed(mixed_seed(self.config.run.seed, step, DROPOUT_STREAM), self.device):
            values = self.steps(
                STAGE, self.inputs(step), lambda batch: self.carried_out(batch, step, workers)
            )
        return {**values, "lr": lr}

    def carried_out(self, batch: Batch, step: int, workers: Workers) -> dict[str, Value]:
        """The device's part of a step: its gradients and what they move."""
        s, parameters = self.settings, list(self.unet.parameters())

        def gradients_of(share: slice) -> tuple[Sequence[Tensor], dict[str, Tensor]]:
            x_0, eps, t, y = batch
            if workers.numbered and self.config.unet.dropout:
                self._seed_dropout(step, share)
            loss = self.loss(x_0[share], eps[share], t[share], None if y is None else y[share])
            return torch.autograd.grad(loss, parameters), {"loss": loss.detach()}

        values = workers.gradients(gradients_of, s.batch, parameters)
        values["grad_norm"] = torch.nn.utils.clip_grad_norm_(parameters, s.grad_clip)
        return self.update(values, step, [self.optimizer], self.unet)

    def _seed_dropout(self, step: int, share: slice) -> None:
        """Let dropout's numbers be those of this share of the step, whoever computes it."""
        stream = f"{DROPOUT_STREAM} from {share.start}"
        seed = mixed_seed(self.config.run.seed, step, stream)
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def brief(self, values: dict[str, float]) -> dict[str, str]:
        """The loss."""
        return {"loss": f"{values['loss']:.4f}"}


def check_data(config: Config, images: ImageSet) -> None:
    """ConfigError where channels or labels of the images do not fit the teacher."""
    unet = config.unet
    if {unet.in_channels, unet.out_channels} != {images.channels}:
        raise ConfigError(
            f"the teacher takes {unet.in_channels} channels and gives {unet.out_channels}; "
            f"{images.source} has {images.channels}"
        )
    if unet.num_class_embeds is None:
        return
    if images.labels is None or images.num_classes is None:
        raise ConfigError(f"a class-conditional teacher needs labels; {images.source} has none")
    if images.num_classes > unet.num_class_embeds:
        raise ConfigError(
            f"unet.num_class_embeds={unet.num_class_embeds} is too small: {images.source} has "
            f"labels up to {images.num_classes - 1}"
        )


def _initial_unet(config: Config) -> UNet:
    """The network that a training starts with: a new one, or `teacher.init`.

    An unconditional one may become conditional; to begin with, its classes are then alike.
    """
    unet = UNet(config.unet, Schedule(**vars(config.schedule)))
    if config.teacher.init:
        given = load_teacher(config.teacher.init)
        of_classes = unet.class_embedding if given.class_embedding is None else None
        free = _NOT_LEARNED | {"num_class_embeds"} if of_classes else _NOT_LEARNED
        differing = [
            name
            for ours, theirs in ((unet.config, given.config), (unet.schedule, given.schedule))
            for name, value in vars(theirs).items()
            if name not in free and getattr(ours, name, value) != value
        ]
        if differing:
            raise ConfigError(
                f"{config.teacher.init} was trained with another {', '.join(differing)} than this "
                "configuration asks for"
            )
        unet.load_state_dict(given.state_dict(), strict=of_classes is None)
        if of_classes is not None:
            last = getattr(of_classes, "linear_2", of_classes)
            for parameter in last.parameters():
                torch.nn.init.zeros_(parameter)
    return unet


def train_teacher(
    config: Config, images: ImageSet, run: Path, follower: Follower | None = None
) -> float:
    """Train from scratch, from `teacher.init`, or on from the last checkpoint; save `run/teacher`.

    `follower` may watch. Returns the seconds of training, interrupted parts included. Raises
    TrainingError on a value that is not finite and Interrupted after a signal, both with the state
    on disk.
    """
    training = TeacherTraining(config, images)
    # Dropout has one generator, whose numbers several threads would take in any order.
    of_run = dataclasses.replace(config.run, threads=1) if config.unet.dropout else config.run
    seconds = run_training(training, run, config.teacher, of_run, follower)
    if processes.is_first():
        save_teacher(training.ema.model, run / "teacher")
        drop_checkpoints(run / "checkpoints", STAGE)
    return seconds
