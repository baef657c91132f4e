"""The stages of a run in order: teacher, trajectories, distill, evaluate, report.

Each is one function that takes the run, leaves its result in the folder and returns its seconds.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import numpy as np
import torch

from advkd import processes
from advkd.config import ConfigError, to_toml
from advkd.console import StopSignals, progress_bar
from advkd.data import describe, probe
from advkd.data.trajectories import Trajectories, index_of, sample_trajectories
from advkd.deploy.model_file import model_bytes
from advkd.engine.cache import engine_for
from advkd.engine.lowering import LoweringError
from advkd.engine.noise import Noise, Purpose
from advkd.engine.sampling import saved_steps, table_of
from advkd.errors import CheckpointError, Interrupted
from advkd.files import write_json
from advkd.models.layers import area_resized
from advkd.pretrained import save_teacher
from advkd.report.inputs import read_metrics, read_summary
from advkd.report.page import write_report
from advkd.report.pictures import Pictures
from advkd.run.check import check
from advkd.run.evaluation import costs, figures_of_run
from advkd.run.folder import STAGES, seconds_in
from advkd.run.following import Following
from advkd.run.model_card import describe_student
from advkd.run.run import Run
from advkd.training.distill import distill_student
from advkd.training.teacher import train_teacher

PICTURED = 48  # images of each side in the report's grids
PICTURE_SEED = 0
PICTURED_PATHS = 8  # trajectories in the report


def run_stages(run: Run, stages: tuple[str, ...]) -> None:
    """Carry out these stages in order, each unless its result stands.

    Whatever a later stage would refuse is refused before the first. Raises CheckpointError where a
    stage is missing that one of these needs. Several processes meet before and after each stage.
    """
    processes.in_turn(lambda: check(run, stages))
    first = processes.is_first()
    if first and run.config.data.path and not all(map(run.is_done, stages)):
        _announce(run)
    for stage in stages:
        due = str(not first or _is_due(run, stage))
        if processes.exchange(due)[0] == str(True):
            seconds = _MAKERS[stage](run) if first or stage in _SHARED else 0.0
            if first:
                run.finish(stage, seconds)
        processes.barrier()


def _is_due(run: Run, stage: str) -> bool:
    """Whether a stage is to be carried out; CheckpointError where one that it needs is missing."""
    missing = [s for s in STAGES[: STAGES.index(stage)] if not run.is_done(s)]
    if missing:
        raise CheckpointError(f"stage {stage} needs {missing[0]}, which {run.path} lacks")
    return not run.is_done(stage)


def _announce(run: Run) -> None:
    """Say on stderr which of the user's images were taken, and what was passed over."""
    images, d = run.images(), run.config.data
    if images is not None:
        lines = describe(probe(d.path, size=d.size, channels=d.channels, crop=d.crop))
        if d.clusters:
            lines.append(images.train.notes[-1])
        lines.append(f"held out to evaluate by: {len(images.held_out):,} images")
        print("\n".join(f"advkd: {line}" for line in lines), file=sys.stderr)


def make_teacher(run: Run) -> float:
    """Take the teacher that the configuration names, or train one."""
    began = time.monotonic()
    if run.config.teacher.source:
        if processes.is_first():
            save_teacher(run.given_teacher(), run.path / "teacher")
        return time.monotonic() - began
    images = run.images()
    if images is None:
        raise ConfigError("there is neither a teacher to take nor data to train one on")
    with following(run, "teacher") as follower:
        return train_teacher(run.config, images.train, run.path, follower)


def make_trajectories(run: Run) -> float:
    """Sample the teacher's trajectories."""
    unet = run.teacher()
    settings = run.config.trajectory
    folder = run.path / "trajectories"
    earlier = folder / "seconds.json"  # of earlier calls that were stopped
    began = time.monotonic() - (seconds_in(earlier) if earlier.is_file() else 0.0)
    sizes, seed = run.config.student.stages, run.config.run.seed
    index = index_of(unet, settings, len(sizes), seed, run.config.data.size, sizes)
    with StopSignals() as stop, progress_bar("trajectories", settings.num, unit="image") as bar:

        def report(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        threads = run.config.run.threads
        store = sample_trajectories(
            unet, folder, index, settings.num, threads, report, lambda: stop.requested
        )
    processes.barrier()  # reading the store back takes some longer than others
    stopped = processes.any_of(store is None or stop.requested)
    if processes.is_first():
        if stopped:
            write_json(earlier, {"seconds": time.monotonic() - began})
        else:
            earlier.unlink(missing_ok=True)
    if stopped:
        raise Interrupted("stopped while sampling trajectories; finished shards stay")
    return time.monotonic() - began


def make_student(run: Run) -> float:
    """Distill the student."""
    store = Trajectories(run.path / "trajectories", run.config.trajectory.num)
    images, names = run.images(), run.stored_teacher().class_names
    train = None if images is None else images.train
    with following(run, "distill") as follower:
        return distill_student(run.config, store, run.path, train, names, follower)


def following(run: Run, stage: str) -> Following:
    """What shows a stage's training while it runs."""
    return Following(run.path, stage, run.config, run.config.data.size)


def make_evaluation(run: Run) -> float:
    """Evaluate teacher and student, and measure their speed, into report/summary.json."""
    began = time.monotonic()
    found = figures_of_run(run)
    teacher, student, steps = run.teacher(), run.student(), run.config.evaluate.teacher_steps
    summary = found.figures | costs(teacher, student, steps)
    summary |= {
        "name": run.config.name,
        "student_family": student.config.family,
        "teacher_steps": steps,
        "protocol": found.protocol,
        "features": found.features,
    }
    if found.class_names is not None:
        summary["class_names"] = found.class_names
    write_json(run.path / "report" / "summary.json", summary)
    return time.monotonic() - began


def make_report(run: Run) -> float:
    """Sample the pictures and write report/report.html."""
    began = time.monotonic()
    summary = read_summary(run.path / "report" / "summary.json")
    seconds = {stage: run.seconds(stage) for stage in STAGES[:-1]}
    summary["seconds"] = {stage: value for stage, value in seconds.items() if value is not None}
    metrics = read_metrics(run.path / "metrics.jsonl")
    pictures = pictures_of(run, summary["teacher_steps"])
    settings, student = to_toml(run.config), model_file_of(run)
    write_report(run.path, summary, metrics, pictures, settings, student)
    describe_student(run, summary)
    return time.monotonic() - began


def model_file_of(run: Run) -> bytes | str:
    """The student's model file, or why it has none, as a clause."""
    try:
        return model_bytes(run.stored_student())
    except LoweringError as error:
        return str(error)


@torch.inference_mode()
def pictures_of(run: Run, steps: int) -> Pictures:
    """Samples of teacher and student from the same x_T, real images, and the heads' path."""
    teacher, student, images = run.teacher(), run.student(), run.images()
    noise, numbers = Noise(PICTURE_SEED, Purpose.EVALUATION), torch.arange(PICTURED, device="cpu")
    y = noise.labels(numbers, student.num_classes)
    sizes = student.config.stages
    table = table_of(teacher.schedule, "ddim", max(steps, len(sizes)), 0.0)
    saved = saved_steps(len(table), len(sizes))
    engine = engine_for(teacher, PICTURED, size=(student.size, student.size), table=table)
    target = run.config.trajectory.target
    states = engine.sample(table, noise, numbers, y, saved=saved, target=target).cpu().unbind(1)
    x_T = noise.x_T(numbers.to(run.device), (student.channels, student.size, student.size))
    heads = [x.cpu() for x in student.states(x_T, None if y is None else y.to(run.device))]
    data = None
    if images is not None:
        train = images.train
        data = train.batch(np.random.default_rng(1).permutation(len(train))[:PICTURED])
    few = PICTURED_PATHS
    return Pictures(
        teacher=states[-1].clamp(-1, 1),
        student=heads[-1].clamp(-1, 1),
        data=data,
        trajectory=[area_resized(x[:few], s) for x, s in zip(states, sizes, strict=True)],
        heads=[x[:few] for x in heads],
        times=[int(table.timesteps[i - 1]) if i < len(table) else 0 for i in saved],
    )


_SHARED = ("teacher", "trajectories", "distill")  # by all processes; the first makes the others
_MAKERS: dict[str, Callable[[Run], float]] = {
    "teacher": make_teacher,
    "trajectories": make_trajectories,
    "distill": make_student,
    "evaluate": make_evaluation,
    "report": make_report,
}
