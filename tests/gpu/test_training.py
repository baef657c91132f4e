"""Trainings on a real GPU: captured steps do what eager ones do, without a wait for the device."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from advkd.config import Config, override
from advkd.data.trajectories import Trajectories
from advkd.device import deterministic, tensor_float32
from advkd.errors import Interrupted, TrainingError
from advkd.files import read_tensors
from advkd.parallel import Workers
from advkd.training.checkpoint import latest_checkpoint
from advkd.training.distill import Distillation
from advkd.training.loop import Training, Value, run_training
from advkd.training.teacher import TeacherTraining, train_teacher

from ..training.tiny import changed, photos, sampled, squares, teacher_config

pytestmark = pytest.mark.gpu

STEPS = 20
CUDA = "run.device=cuda"
FRESH = {"adversary": "fresh", "adversary_after": 0.2, "lambda_div": 1.0, "r2_gamma": 0.5}
KINDS = ("teacher", "dropout", "paired", "fresh")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Trajectories:
    return sampled(tmp_path_factory.mktemp("trajectories"))


def config_of(kind: str, *settings: str) -> Config:
    """A tiny training for the GPU."""
    if kind in ("teacher", "dropout"):
        dropout = "unet.dropout=0.1" if kind == "dropout" else "unet.dropout=0"
        return teacher_config(CUDA, f"teacher.steps={STEPS}", dropout, *settings)
    given: dict[str, Any] = FRESH if kind == "fresh" else {}
    return override(changed(steps=STEPS, **given), [CUDA, *settings])


def made(kind: str, store: Trajectories, *settings: str) -> Training:
    config = config_of(kind, *settings)
    if kind in ("teacher", "dropout"):
        return TeacherTraining(config, squares())
    return Distillation(config, store, photos(False))


@contextlib.contextmanager
def at_work(training: Training, tf32: bool = False) -> Iterator[Workers]:
    """What the loop puts around steps."""
    with (
        contextlib.closing(training),
        deterministic(training.device),
        tensor_float32(training.device, tf32),
        Workers(0, training.device) as workers,
    ):
        yield workers


def carried_out(training: Training, steps: int = STEPS) -> dict[str, Tensor]:
    """The values of all steps, one after the other, by name."""
    found: dict[str, list[Value]] = {}
    with at_work(training) as workers:
        for step in range(steps):
            for name, value in training.step(step, workers).items():
                found.setdefault(name, []).append(value)
    return {name: torch.tensor([float(v) for v in values]) for name, values in found.items()}


def weights_of(training: Training) -> Tensor:
    modules = training.modules.values()
    return torch.cat([p.detach().double().flatten() for m in modules for p in m.parameters()])


@pytest.mark.parametrize("kind", KINDS)
def test_captured_steps_do_what_eager_ones_do(kind: str, store: Trajectories) -> None:
    start = weights_of(made(kind, store))
    eager, captured = (made(kind, store, f"run.compile={how}") for how in ("off", "graph"))
    expected, found = carried_out(eager), carried_out(captured)
    assert len(captured.steps._graphs) >= (1 if kind in ("teacher", "dropout") else 4)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values, rtol=1e-3, atol=1e-4, msg=name)
    moved = (weights_of(eager) - start).norm()
    assert moved > 0
    assert (weights_of(captured) - weights_of(eager)).norm() <= 1e-3 * moved


@pytest.mark.parametrize("compile", ["off", "graph"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_never_waits_for_the_device(kind: str, store: Trajectories, compile: str) -> None:
    training = made(kind, store, f"run.compile={compile}")
    with at_work(training) as workers:
        for step in [*range(STEPS)] * 2:  # compiles, captures
            training.step(step, workers)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for step in range(STEPS):
                training.step(step, workers)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("kind", ["teacher", "fresh"])
def test_bfloat16_trains_like_float32(kind: str, store: Trajectories) -> None:
    how = {"float32": "teacher.autocast=off", "bfloat16": "teacher.autocast=on"}
    losses = {}
    for dtype, autocast in how.items():
        training = made(kind, store, f"run.dtype={dtype}", autocast)
        values = carried_out(training)
        assert all(value.isfinite().all() for value in values.values())
        assert {p.dtype for m in training.modules.values() for p in m.parameters()} == {
            torch.float32
        }
        losses[dtype] = values["loss" if kind == "teacher" else "rec_3"]
    assert not torch.equal(*losses.values())
    torch.testing.assert_close(losses["bfloat16"], losses["float32"], rtol=0.02, atol=1e-3)


def test_accumulated_gradients_are_the_batchs(store: Trajectories) -> None:
    found = []
    for accumulate in (1, 3):
        training = made("paired", store, "run.compile=off")
        with at_work(training) as workers:
            workers.accumulate = accumulate
            training.step(0, workers)
        found.append(torch.cat([p.grad.flatten() for p in training.modules["d"].parameters()]))
    assert (found[0] - found[1]).norm() <= 1e-4 * found[0].norm()


@pytest.mark.parametrize("compile", ["off", "graph"])
@pytest.mark.parametrize("kind", ["teacher", "fresh"])
def test_a_step_that_is_not_finite_is_named_and_changes_nothing(
    kind: str, store: Trajectories, compile: str, tmp_path: Path
) -> None:
    """Steps 0 to 4 are good and kept; 7 is not, which step 10's reading finds."""
    training = made(kind, store, f"run.compile={compile}")
    config = config_of(kind)
    settings = config.teacher if kind == "teacher" else config.distill
    settings = dataclasses.replace(settings, log_every=10, checkpoint_every=5)
    drawn, carried, states = training.inputs, training.step, {}

    def nan_filled(step: int) -> Any:
        found = drawn(step)
        first = found[0] if kind == "teacher" else found.targets[0]
        if step == 7:
            first.fill_(float("nan"))
        return found

    def watched(step: int, workers: Workers) -> Any:
        states[step] = weights_of(training)
        return carried(step, workers)

    training.inputs, training.step = nan_filled, watched  # type: ignore[assignment, method-assign]
    training.close = drawn.close  # type: ignore[method-assign]
    name = "loss" if kind == "teacher" else "rec_1"
    with pytest.raises(TrainingError, match=rf"^{name} is nan at step 7 of stage"):
        run_training(training, tmp_path, settings, config.run)
    assert torch.equal(states[7], states[8])
    assert not torch.equal(states[6], states[7]) and not torch.equal(states[8], states[9])
    assert weights_of(training).isfinite().all()
    found = latest_checkpoint(tmp_path / "checkpoints", training.stage)
    assert found is not None and found.step == 5


@pytest.mark.parametrize("compile", ["off", "graph"])
def test_interrupted_and_resumed_is_the_same_to_the_bit(
    compile: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = teacher_config(CUDA, f"run.compile={compile}", f"teacher.steps={STEPS}")
    train_teacher(config, squares(), tmp_path / "straight")
    original = TeacherTraining.step

    def interrupted(self: TeacherTraining, step: int, workers: Workers) -> Any:
        if step == 11:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, step, workers)

    with monkeypatch.context() as patch:
        patch.setattr(TeacherTraining, "step", interrupted)
        with pytest.raises(Interrupted):
            train_teacher(config, squares(), tmp_path / "resumed")
    train_teacher(config, squares(), tmp_path / "resumed")
    straight, resumed = (
        read_tensors(tmp_path / name / "teacher/unet/diffusion_pytorch_model.safetensors")
        for name in ("straight", "resumed")
    )
    assert all(torch.equal(resumed[name], tensor) for name, tensor in straight.items())
