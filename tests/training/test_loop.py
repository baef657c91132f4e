"""What both training loops share."""

from __future__ import annotations

import itertools
import json
import os
import signal
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

from advkd.console import StopSignals, progress_bar
from advkd.device import autocast, pick_device
from advkd.training.ema import Ema
from advkd.training.loop import (
    MetricsLog,
    TrainingError,
    check_finite,
    generator_at,
    learning_rate,
)


def test_generators_depend_on_seed_step_and_stream_only() -> None:
    def draw(seed: int, step: int, stream: str) -> tuple[float, ...]:
        return tuple(torch.rand(4, generator=generator_at(seed, step, stream)).tolist())

    torch.manual_seed(5)
    first = draw(3, 7, "teacher")
    torch.manual_seed(6)
    assert draw(3, 7, "teacher") == first
    draws = {
        draw(seed, step, stream)
        for seed in (0, 1, 2, 2**62)
        for step in (*range(50), 10**7)
        for stream in ("", "teacher", "distill", "distil2")
    }
    assert len(draws) == 4 * 51 * 4


def test_generators_leave_the_global_one_alone() -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    torch.rand(3, generator=generator_at(0, 0, "x"))
    assert torch.equal(torch.rand(3), expected)


def test_learning_rate_warms_up_and_falls() -> None:
    rates = [learning_rate(step, 0.5, 10, 110, 0.1) for step in range(110)]
    assert rates[0] == pytest.approx(0.05)
    assert rates[9] == rates[10] == 0.5
    assert all(a < b for a, b in itertools.pairwise(rates[:10]))
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))
    assert rates[60] == pytest.approx(0.5 * (0.1 + 0.9 * 0.5))
    assert learning_rate(110, 0.5, 10, 110, 0.1) == pytest.approx(0.05)
    assert learning_rate(200, 0.5, 10, 110, 0.1) == pytest.approx(0.05)
    assert learning_rate(0, 0.5, 0, 100, 0.1) == 0.5
    assert learning_rate(3, 0.5, 10, 5, 0.1) == pytest.approx(0.2)
    assert learning_rate(0, 1.0, 0, 0, 0.0) == 1.0


def test_ema_follows_the_parameters() -> None:
    model = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(0.0)
    ema = Ema(model, 0.9)
    expected = 0.0
    for step in range(200):
        with torch.no_grad():
            model.weight.fill_(float(step))
        ema.update(model, step)
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


def test_check_finite() -> None:
    assert check_finite("the loss", torch.tensor(1.5), 3) == 1.5
    for bad in ("nan", "inf", "-inf"):
        with pytest.raises(TrainingError, match=rf"the loss is {bad} at step 3"):
            check_finite("the loss", torch.tensor(float(bad)), 3)


def test_autocast_modes() -> None:
    x = torch.ones(2, 2)
    with autocast("on", torch.device("cpu")):
        assert (x @ x).dtype == torch.bfloat16
    with autocast("off", torch.device("cpu")):
        assert (x @ x).dtype == torch.float32
    with autocast("auto", torch.device("cpu")):
        assert (x @ x).dtype in (torch.float32, torch.bfloat16)
    with pytest.raises(ValueError, match="'sometimes'"):
        autocast("sometimes", torch.device("cpu"))


def test_pick_device() -> None:
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_progress_is_silent_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("teacher", 3, 1) as bar:
        bar.update()
        bar.set_postfix(loss="1")
    assert capsys.readouterr() == ("", "")
