"""Training steps of one version of advkd, timed on demand; `against_version` runs it in each tree.

Arguments: a TOML file and settings that go over it. A line on stdin, of a part's name and a number
of steps, is answered by their seconds of CPU time. Names of version 0.1 are tried where those of
today are missing.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from advkd.config import load_preset
from advkd.parallel import Workers
from advkd.pretrained import load_teacher

try:
    from advkd.data import dataset
    from advkd.data.trajectories import index_of, sample_trajectories
    from advkd.training.distill import Distillation
    from advkd.training.teacher import TeacherTraining

    def training_images() -> Any:
        return dataset("fashion-mnist").train()
except ImportError:
    from advkd.distill import Distillation
    from advkd.teacher import TeacherTraining
    from advkd.trajectory import (
        draw_trajectories as sample_trajectories,
    )
    from advkd.trajectory import index_of

    from advkd.data import shipped

    def training_images() -> Any:
        return shipped("train")


def parts(path: str, settings: list[str]) -> dict[str, Callable[[], object]]:
    """A step of each kind, on one batch that is made beforehand."""
    few = [*settings, "run.device=cpu", "trajectory.num=64", "trajectory.steps=3"]
    config = load_preset(path, few)
    workers = Workers(1, torch.device("cpu"))
    images = training_images()
    teacher = load_teacher(config.teacher.source).eval().requires_grad_(False)
    heads = len(config.student.stages)
    index = index_of(teacher, config.trajectory, heads, config.run.seed, config.data.size)
    with tempfile.TemporaryDirectory() as folder:
        store = sample_trajectories(teacher, Path(folder), index, config.trajectory.num, threads=1)
        student = Distillation(config, store, images)
        own = TeacherTraining(load_preset(path, [*few, "teacher.source="]), images)
        for training in (student, own):
            fixed(training)
    return {
        "student, reconstruction": lambda: student.step(0, workers),
        "teacher": lambda: own.step(0, workers),
    }


def fixed(training: Any) -> None:
    """Gives the training its first batch in every step."""
    name = "drawn" if hasattr(training, "drawn") else "batch"
    batch = getattr(training, name)(0)
    setattr(training, name, lambda _: batch)


def main() -> None:
    torch.set_num_threads(1)
    path, *settings = sys.argv[1:]
    runs = parts(path, settings)
    print("ready", flush=True)
    for line in sys.stdin:
        part, steps = line.rstrip("\n").rsplit(" ", 1)
        start = time.process_time()
        for _ in range(int(steps)):
            runs[part]()
        print(time.process_time() - start, flush=True)


if __name__ == "__main__":
    main()
