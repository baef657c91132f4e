"""The loop that both trainings share: logs, signals, finite values, the device's settings."""

from __future__ import annotations

import errno
import json
import math
import os
import signal
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from advkd.config import DistillConfig, RunConfig
from advkd.console import StopSignals, progress_bar
from advkd.device import deterministic
from advkd.parallel import Workers
from advkd.training import checkpoint as checkpoint_module
from advkd.training import loop
from advkd.training.checkpoint import Checkpoint, CheckpointWriter, latest_checkpoint
from advkd.training.ema import Ema
from advkd.training.inputs import Ahead
from advkd.training.loop import (
    MetricsLog,
    Readings,
    Training,
    TrainingError,
    Value,
    on_host,
    run_training,
)


def test_ema_follows_the_parameters() -> None:
    model = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(0.0)
    ema = Ema(model, 0.9)
    expected = 0.0
    for step in range(200):
        with torch.no_grad():
            model.weight.fill_(float(step))
        ema.at(step)
        ema.update(model)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
    torch.testing.assert_close(ema.model.weight, torch.full((1, 2), expected))
    assert model.weight[0, 0] == 199
    assert not ema.model.weight.requires_grad and not ema.model.training


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_metrics_are_cut_back_to_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    log = MetricsLog(path, "teacher", 0)
    for step in (10, 20, 30):
        log.write(step, loss=1 / step)
    MetricsLog(path, "distill", 0).write(30, loss=0.5)
    with path.open("a") as file:
        file.write('{"stage": "teacher", "st')  # a crash
    MetricsLog(path, "teacher", 20).write(21, loss=float("inf"))
    found = [(entry["stage"], entry["step"]) for entry in lines(path)]
    assert found == [("teacher", 10), ("teacher", 20), ("distill", 30), ("teacher", 21)]
    assert lines(path)[0]["loss"] == 0.1
    MetricsLog(path, "teacher", 0)
    assert [entry["stage"] for entry in lines(path)] == ["distill"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_are_noted_and_handlers_come_back(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopSignals() as stop:
        assert not stop.requested
        os.kill(os.getpid(), number)
        assert stop.requested
    assert signal.getsignal(number) is before
    with pytest.raises(KeyError), StopSignals():
        raise KeyError
    assert signal.getsignal(number) is before


def test_signals_outside_the_main_thread_are_left_alone() -> None:
    found: list[bool] = []

    def run() -> None:
        with StopSignals() as stop:
            found.append(stop.requested)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [False]


class Toy(Training):
    """Counts its steps; `observed` has torch's settings as each step found them."""

    stage = "toy"

    def __init__(self, device: str):
        self.device = torch.device(device)
        self.modules, self.optimizers = {}, {}
        self.inputs = Ahead(lambda step: (), torch.device("cpu"))
        self.observed: list[tuple[Any, ...]] = []

    def step(self, step: int, workers: Workers) -> dict[str, Value]:
        self.observed.append(repeatability())
        return {"loss": torch.tensor(float(step)), "x": torch.tensor(2.0)}

    def brief(self, values: dict[str, float]) -> dict[str, str]:
        return {"loss": f"{values['loss']}"}


def test_values_are_read_together_and_the_first_that_is_not_finite_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    transfers: list[int] = []

    def counted(values: Sequence[Tensor]) -> list[float]:
        transfers.append(len(values))
        return on_host(values)

    monkeypatch.setattr(loop, "on_host", counted)
    readings = Readings("toy", {"b": 7.0})
    readings.add(3, {"a": torch.tensor(1.5), "lr": 0.5})
    readings.add(4, {"a": torch.tensor(-2.0), "c": torch.tensor(0.25)})
    assert transfers == []
    assert readings.read() == {"a": -2.0, "b": 7.0, "c": 0.25, "lr": 0.5}
    assert transfers == [3]
    assert readings.read() == {"a": -2.0, "b": 7.0, "c": 0.25, "lr": 0.5}
    for bad in ("nan", "inf", "-inf"):
        readings.add(5, {"a": torch.tensor(1.5)})
        readings.add(6, {"a": torch.tensor(1.5), "b": torch.tensor(float(bad)), "c": math.nan})
        readings.add(7, {"a": torch.tensor(math.nan)})
        with pytest.raises(TrainingError, match=rf"^b is {bad} at step 6 of stage toy; "):
            readings.read()


@pytest.mark.parametrize(("minutes", "steps"), [(0.0, [4, 8, 10]), (1.0, [8, 10]), (9.0, [10])])
def test_checkpoints_are_some_minutes_apart(
    minutes: float, steps: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a training whose steps take ten seconds, as the loop's clock has it."""
    toy, now, written = Toy("cpu"), [0.0], []

    def slow(step: int, workers: Workers) -> dict[str, Value]:
        now[0] += 10.0
        return {"loss": 1.0}

    toy.step = slow  # type: ignore[method-assign]
    monkeypatch.setattr(loop.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(
        CheckpointWriter, "save", lambda writer, checkpoint: written.append(checkpoint.step)
    )
    settings = DistillConfig(steps=10, checkpoint_every=4)
    run_training(toy, tmp_path, settings, RunConfig(checkpoint_minutes=minutes))
    assert written == steps


def test_what_fails_in_the_writer_ends_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the next step, and not only when the training ends; the checkpoint before it stays."""
    toy, original = Toy("cpu"), checkpoint_module.save_checkpoint

    def full(folder: Path, name: str, checkpoint: Checkpoint) -> None:
        if checkpoint.step > 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(folder, name, checkpoint)

    monkeypatch.setattr(checkpoint_module, "save_checkpoint", full)
    settings = DistillConfig(steps=1000, checkpoint_every=1)
    with pytest.raises(OSError, match="No space left"):
        run_training(toy, tmp_path, settings, RunConfig(checkpoint_minutes=0.0))
    assert len(toy.observed) <= 3
    found = latest_checkpoint(tmp_path / "checkpoints", "toy")
    assert found is not None and found.step == 1


def repeatability() -> tuple[Any, ...]:
    """All of torch's settings that a training changes."""
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.backends.cudnn.deterministic,
        torch.backends.cudnn.benchmark,
        torch.utils.deterministic.fill_uninitialized_memory,
        os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
        torch.backends.cudnn.conv.fp32_precision,
        torch.backends.cuda.matmul.fp32_precision,
    )


def test_a_training_on_cuda_is_repeatable_and_leaves_torch_as_it_was(tmp_path: Path) -> None:
    before = repeatability()
    toy = Toy("cuda")  # whose steps need no GPU
    run_training(toy, tmp_path, DistillConfig(steps=2, log_every=1), RunConfig(tf32=False))
    assert toy.observed == [(True, True, True, False, False, ":4096:8", "ieee", "ieee")] * 2
    assert repeatability() == before
    toy = Toy("cpu")
    run_training(toy, tmp_path / "cpu", DistillConfig(steps=1), RunConfig())
    assert toy.observed == [before]


def test_what_the_user_asked_of_torch_is_not_weakened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    torch.use_deterministic_algorithms(True)
    try:
        before = repeatability()
        with pytest.raises(KeyError), deterministic(torch.device("cuda")):
            assert repeatability()[:6] == (True, False, True, False, False, ":16:8")
            raise KeyError
        assert repeatability() == before
        assert before[:4] == (True, False, torch.backends.cudnn.deterministic, True)
    finally:
        torch.use_deterministic_algorithms(False)


def test_progress_is_silent_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("teacher", 3, 1) as bar:
        bar.update()
        bar.set_postfix(loss="1")
    assert capsys.readouterr() == ("", "")
