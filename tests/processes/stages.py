"""The stages of a run that several processes share, in one process of torchrun.

Arguments are those of `advkd train`. The environment's MOMENT, "STAGE:STEP:RANK:SIGNAL", lets a
process send itself a signal at the beginning of a step, unless torchrun has started it again;
ALONE, "RANK OPTION...", gives one process further options.
"""

from __future__ import annotations

import os
import sys

from advkd import processes, train
from advkd.training.distill import Distillation
from advkd.training.loop import Training
from advkd.training.teacher import TeacherTraining


def end_at(stage: str, at: int, rank: int, number: int) -> None:
    """Let this process send itself a signal."""
    kind: type[Training] = TeacherTraining if stage == "teacher" else Distillation
    original = kind.step

    def step(training, number_of_step, workers):  # type: ignore[no-untyped-def]
        if number_of_step == at and processes.rank() == rank:
            os.kill(os.getpid(), number)
        return original(training, number_of_step, workers)

    kind.step = step  # type: ignore[method-assign]


if __name__ == "__main__":
    options = sys.argv[1:]
    if "MOMENT" in os.environ and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        stage, *numbers = os.environ["MOMENT"].split(":")
        end_at(stage, *map(int, numbers))
    if "ALONE" in os.environ:
        who, *further = os.environ["ALONE"].split()
        options += further if who == os.environ["RANK"] else []
    train.STAGES = train.STAGES[:3]
    train._conclude = lambda run, args: None  # type: ignore[assignment]
    sys.exit(train.main(options))
