"""Images a second of both trainings on a GPU, by dtype, step by step and by graphs."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from advkd.config import Config, load_preset
from advkd.data import dataset
from advkd.data.images import ImageSet
from advkd.data.trajectories import Trajectories, index_of, sample_trajectories
from advkd.pretrained import load_teacher
from advkd.training.distill import Distillation
from advkd.training.loop import Training
from advkd.training.teacher import TeacherTraining

from .test_training import at_work

DTYPES = {
    "float32": ["run.dtype=float32", "teacher.autocast=off"],
    "bfloat16": ["run.dtype=bfloat16", "teacher.autocast=on"],
}
HOW = {"step by step": "run.compile=off", "graphs": "run.compile=graph"}


def stored(config: Config, folder: Path) -> Trajectories:
    """Few trajectories and hardly drawn: what images show does not change what a step costs."""
    teacher = load_teacher(config.teacher.source).eval().requires_grad_(False)
    heads = len(config.student.stages)
    index = index_of(teacher, config.trajectory, heads, 0, config.data.size)
    found = sample_trajectories(teacher, folder, index, config.trajectory.num)
    assert found is not None
    return found


def trainings(folder: Path) -> Iterator[tuple[str, int, int, Callable[[list[str]], Training]]]:
    """Name, images of a batch, steps after which all kinds have come round, and how it is made."""
    few = ["run.device=cuda", "trajectory.num=64", "trajectory.steps=3", "trajectory.shard=64"]
    default = load_preset("fashion-mnist", few)
    store, images = stored(default, folder), dataset("fashion-mnist").train()

    def student(settings: list[str]) -> Training:
        made = Distillation(load_preset("fashion-mnist", [*few, *settings]), store, images)
        made.adversary_start = 0
        return made

    yield "student, fashion-mnist", default.distill.batch, default.distill.r1_every, student
    large = load_preset("cifar10-32")
    pixels = np.random.default_rng(0).integers(0, 256, (512, 3, 32, 32), dtype=np.uint8)
    noise = ImageSet(pixels, None, "noise")

    def teacher(settings: list[str]) -> Training:
        config = load_preset("cifar10-32", ["run.device=cuda", *settings])
        return TeacherTraining(config, noise)

    yield "teacher, cifar10-32", large.teacher.batch, 1, teacher


def milliseconds(training: Training, period: int, rounds: int) -> float:
    """Of a step, host and device together, the losses being read once at the end."""
    with at_work(training, tf32=True) as workers:
        for step in range(3 * period):  # compiles, and captures all kinds
            training.step(step, workers)
        torch.cuda.synchronize()
        began = time.perf_counter()
        for step in range(3 * period, (3 + rounds) * period):
            training.step(step, workers)
        torch.cuda.synchronize()
        return (time.perf_counter() - began) / (rounds * period) * 1e3


def images_per_second() -> Iterator[str]:
    """Lines of a table. float32 is multiplied as TF32."""
    yield "| training | dtype | batch | steps | ms a step | images/s | GiB |"
    yield "|---|---|---|---|---|---|---|"
    with tempfile.TemporaryDirectory() as folder:
        for name, batch, period, make in trainings(Path(folder)):
            for dtype, settings in DTYPES.items():
                for how, compiled in HOW.items():
                    torch.cuda.empty_cache()
                    torch.cuda.reset_peak_memory_stats()
                    took = milliseconds(
                        make([*settings, compiled]), period, 12 if period > 1 else 20
                    )
                    gib = torch.cuda.max_memory_reserved() / 2**30
                    yield (
                        f"| {name} | {dtype} | {batch} | {how} | {took:.2f} | "
                        f"{batch / took * 1e3:.0f} | {gib:.1f} |"
                    )


if __name__ == "__main__":
    for line in images_per_second():
        print(line, flush=True)
