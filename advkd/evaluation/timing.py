"""What networks cost: milliseconds per image, and parameters."""

from __future__ import annotations

import statistics
import time

import torch
from torch import nn

from advkd.engine.noise import Purpose
from advkd.engine.sampling import generate
from advkd.models.student import Student
from advkd.models.unet import UNet

TIMED_IMAGES = 64
TIMED_ROUNDS = 3
STUDENT_RUNS = 9  # of the student in a round, since one is short


def measure_milliseconds(
    teacher: UNet, student: Student, teacher_steps: int, images: int = TIMED_IMAGES
) -> dict[str, float]:
    """Milliseconds of wall time per image of both, sampled in batches of the same size.

    The two take turns and the median of the rounds counts, so that what else runs on the machine
    slows both.
    """
    on_cpu = next(teacher.parameters()).is_cpu
    batch = -(-images // torch.get_num_threads()) if on_cpu else images

    def seconds(model: UNet | Student, steps: int) -> float:
        began = time.perf_counter()
        generate(model, images, 0, steps, batch=batch, purpose=Purpose.EVALUATION)
        return time.perf_counter() - began

    seconds(student, 1)  # the first call also allocates and picks algorithms
    seconds(teacher, 1)
    rounds: dict[str, list[float]] = {"teacher": [], "student": []}
    for _ in range(TIMED_ROUNDS):
        runs = [seconds(student, 1) for _ in range(STUDENT_RUNS)]
        rounds["student"].append(statistics.median(runs))
        rounds["teacher"].append(seconds(teacher, teacher_steps))
    return {name: statistics.median(times) / images * 1e3 for name, times in rounds.items()}


def count_parameters(model: nn.Module) -> int:
    """The number of values that a network learns."""
    return sum(p.numel() for p in model.parameters())
