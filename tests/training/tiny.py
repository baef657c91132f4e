"""Trainings small enough for a test: configurations, images, trajectories, and what they leave."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from advkd.config import (
    Config,
    DataConfig,
    DiscriminatorConfig,
    DistillConfig,
    RunConfig,
    StudentConfig,
    TrajectoryConfig,
    UNetConfig,
    override,
)
from advkd.data.images import ImageSet
from advkd.data.trajectories import Trajectories, index_of, sample_trajectories
from advkd.diffusion import Schedule
from advkd.models.unet import UNet

CPU = torch.device("cpu")

TEACHER = [
    "run.threads=1",
    "run.device=cpu",
    "run.checkpoint_minutes=0",
    "data.size=8",
    "data.flip=true",
    "unet.sample_size=8",
    "unet.block_out_channels=[8, 16]",
    "unet.down_block_types=['DownBlock2D', 'AttnDownBlock2D']",
    "unet.up_block_types=['AttnUpBlock2D', 'UpBlock2D']",
    "unet.layers_per_block=1",
    "unet.norm_num_groups=4",
    "teacher.steps=12",
    "teacher.batch=6",
    "teacher.warmup=2",
    "teacher.autocast=off",
    "teacher.log_every=2",
    "teacher.checkpoint_every=5",
]

UNET = UNetConfig(
    sample_size=8,
    block_out_channels=(8, 16),
    down_block_types=("DownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "UpBlock2D"),
    layers_per_block=1,
    norm_num_groups=4,
)
CONFIG = Config(
    run=RunConfig(device="cpu", checkpoint_minutes=0.0),
    data=DataConfig(size=8),
    unet=UNET,
    trajectory=TrajectoryConfig(num=24, steps=6, dtype="float32", shard=12),
    student=StudentConfig(stages=(4, 4, 8), widths=(16, 16, 8), attention=(4,), groups=4),
    discriminator=DiscriminatorConfig(widths=(4, 8, 16), attention=(4,), groups=4),
    distill=DistillConfig(
        steps=12, batch=6, warmup=2, r1_every=3, inner_every=2, log_every=1, checkpoint_every=4
    ),
)


def teacher_config(*overrides: str) -> Config:
    """The configuration of a tiny teacher, with other settings."""
    return override(Config(), [*TEACHER, *overrides])


def changed(**changes: Any) -> Config:
    """CONFIG with other settings of the distillation."""
    return dataclasses.replace(CONFIG, distill=dataclasses.replace(CONFIG.distill, **changes))


def squares(labels: bool = False, channels: int = 1) -> ImageSet:
    """Bright squares on black, the label being the corner that they are in."""
    rng = np.random.default_rng(0)
    pixels = np.zeros((40, channels, 8, 8), np.uint8)
    corner = rng.integers(4, size=40)
    for image, c in zip(pixels, corner, strict=True):
        image[:, 4 * (c // 2) :, 4 * (c % 2) :][:, :4, :4] = rng.integers(128, 255)
    return ImageSet(pixels, corner.astype(np.int64) if labels else None, "squares")


def photos(labels: bool, size: int = 8) -> ImageSet:
    """Training images that look like nothing a teacher made."""
    pixels = np.random.default_rng(3).integers(0, 256, (20, 1, size, size), dtype=np.uint8)
    return ImageSet(pixels, np.arange(20, dtype=np.int64) % 3 if labels else None, "photos")


def sampled(
    folder: Path, num_classes: int | None = None, sizes: tuple[int, ...] = ()
) -> Trajectories:
    """The trajectories that CONFIG asks for, of a teacher without training."""
    torch.manual_seed(0)
    config = dataclasses.replace(UNET, num_class_embeds=num_classes)
    unet = UNet(config, Schedule(num_train_timesteps=20)).eval().requires_grad_(False)
    index = index_of(unet, CONFIG.trajectory, 3, 0, 8, sizes)
    store = sample_trajectories(unet, folder, index, CONFIG.trajectory.num, threads=1)
    assert store is not None
    return store


def metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
