"""What a training step asks of the host: `python -m tests.bench.step_operations`.

Operations are counted as torch dispatches them, views left out: on a GPU each is a launch or more.
A captured step is one launch, a copy for each input, a setting or two, and a copy of its values.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from advkd.config import override
from advkd.data import dataset
from advkd.parallel import Workers
from advkd.training.distill import Distillation
from advkd.training.inputs import leaves
from advkd.training.loop import Training
from advkd.training.teacher import TeacherTraining

from .bench_distillation_step import CONFIG, sampled_store

GRAPH_AND_VALUES = 2  # its launch, and the copy of what it wrote


class Counting(TorchDispatchMode):
    """Counts operations that are no views."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.operations += not func.is_view
        return func(*args, **(kwargs or {}))


def row(name: str, training: Training, step: int) -> str:
    """A line of the table: the step a second time, when the optimizers have their memory."""
    with Workers(1, torch.device("cpu")) as workers:
        values = training.step(step, workers)
        with Counting() as counting:
            training.step(step, workers)
    # The average's weight, and a learning rate of each network.
    settings = 1 + sum(name.startswith("grad") for name in values)
    captured = GRAPH_AND_VALUES + len(leaves(training.inputs(step))) + settings
    return f"| {name} | {counting.operations} | {captured} |"


def main() -> None:
    images = dataset("fashion-mnist").train()
    with tempfile.TemporaryDirectory() as folder:
        student = Distillation(
            override(CONFIG, ["run.device=cpu"]), sampled_store(Path(folder)), images
        )
        first, period = student.adversary_start, CONFIG.distill.r1_every
        penalized = -(-first // period) * period
        print("| step of the default run | operations | launches when captured |")
        print("|---|---|---|")
        print(row("student, reconstruction", student, 0))
        print(row("student and D", student, penalized + 1))
        print(row("student and D with penalty", student, penalized))
    teacher = override(CONFIG, ["run.device=cpu", "teacher.source="])
    print(row("teacher", TeacherTraining(teacher, images), 0))


if __name__ == "__main__":
    main()
