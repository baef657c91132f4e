"""What is compared, run by the advkd of whichever tree is first on the path; version 0.1 too.

`python workloads.py bits FOLDER` prints a JSON object of SHA-256 by name. `python workloads.py
time FOLDER` reads names from stdin and prints, for each, the seconds that it took.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from advkd.config import load_preset, override
from advkd.models.student import Student
from advkd.parallel import Workers
from advkd.pretrained import CheckpointError, load_teacher, zoo

try:
    from advkd.data import dataset
    from advkd.data.trajectories import index_of, sample_trajectories
    from advkd.engine.sampling import generate
    from advkd.training.distill import Distillation
    from advkd.training.teacher import TeacherTraining

    def training_images() -> Any:
        return dataset("fashion-mnist").train()

except ImportError:  # version 0.1
    from advkd.distill import Distillation
    from advkd.sampling import generate
    from advkd.teacher import TeacherTraining
    from advkd.trajectory import draw_trajectories as sample_trajectories
    from advkd.trajectory import index_of

    from advkd.data import shipped

    def training_images() -> Any:
        return shipped("train")


STEPS = 50  # of the teacher, and of the student before the discriminator enters
# Version 0.1's default run in small, whatever the default is by now.
SETTINGS = [
    *("unet.block_out_channels=[16,32,64]", "unet.num_class_embeds=none"),
    *("schedule.beta_schedule=linear", "schedule.prediction_type=epsilon"),
    *("teacher.batch=32", "teacher.lr=1e-3", "teacher.ema=0.9995"),
    *("trajectory.num=125", "trajectory.steps=20", "trajectory.shard=125"),
    *("student.stages=[7,14,28]", "student.widths=[96,48,16]", "student.attention=[7]"),
    *(f"distill.steps={2 * STEPS}", "distill.adversary_after=0.5", "distill.adversary=fresh"),
    *("distill.batch=32", "distill.lr_d=1e-3", "distill.lambda_rec=3.0", "distill.r1_gamma=0.1"),
    *("distill.r1_every=16", "distill.ema=0.999"),
]
DEFAULT = override(load_preset("fashion-mnist"), SETTINGS)
try:
    UNLABELLED = zoo("fashion-mnist-unlabelled").as_posix()
except CheckpointError:  # its name up to version 0.2
    UNLABELLED = "zoo:fashion-mnist"


def sha256(tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].detach().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def store(folder: Path) -> Any:
    """The first shard of the default run's trajectories."""
    unet = load_teacher(UNLABELLED)
    index = index_of(unet, DEFAULT.trajectory, len(DEFAULT.student.stages), 0, 28)
    return sample_trajectories(unet, folder, index, DEFAULT.trajectory.num)


def teacher_training() -> TeacherTraining:
    config = dataclasses.replace(
        DEFAULT, teacher=dataclasses.replace(DEFAULT.teacher, source="", steps=STEPS)
    )
    return TeacherTraining(config, training_images())


def bits(folder: Path) -> dict[str, str]:
    """Hashes of the teacher's trajectories and of trainings by them, the student's without D."""
    found = {}
    trajectories = store(folder)
    shard = (folder / "shard-00000.npy").read_bytes()
    found["trajectories"] = hashlib.sha256(shard).hexdigest()
    for name, training in (
        ("teacher", teacher_training()),
        ("student", Distillation(DEFAULT, trajectories, training_images())),
    ):
        with Workers(2, training.device) as workers:
            for step in range(STEPS):
                training.step(step, workers)
        for key, module in training.modules.items():
            if key != "d":
                found[f"{name} {key}, {STEPS} steps"] = sha256(module.state_dict())
    return found


def timed(folder: Path) -> dict[str, Callable[[], object]]:
    """What is timed, by name; CPU time at one thread."""
    torch.set_num_threads(1)
    teacher, student = load_teacher(UNLABELLED), Student(DEFAULT.student, 28, 1).eval()
    distillation = Distillation(DEFAULT, store(folder), training_images())
    training = teacher_training()
    workers = Workers(1, torch.device("cpu"))
    return {
        "teacher, DDIM-10 of 16 images": lambda: generate(teacher, 16, 0, 10),
        "teacher, DDIM-10 of 1 image": lambda: generate(teacher, 1, 0, 10),
        "student, 64 images": lambda: generate(student, 64, 0),
        "student, 1 image": lambda: generate(student, 1, 0),
        "step of the teacher": lambda: training.step(1, workers),
        "step without D": lambda: distillation.step(1, workers),
        "step with D": lambda: distillation.step(STEPS + 1, workers),
        "step with D and penalty": lambda: distillation.step(64, workers),
    }


def main() -> None:
    mode, folder = sys.argv[1], Path(sys.argv[2])
    if mode == "bits":
        print(json.dumps(bits(folder)))
        return
    workloads = timed(folder)
    print(json.dumps(list(workloads)), flush=True)
    for line in sys.stdin:
        began = time.process_time()
        with contextlib.redirect_stdout(sys.stderr):
            workloads[line.strip()]()
        print(time.process_time() - began, flush=True)


if __name__ == "__main__":
    main()
