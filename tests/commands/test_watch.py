"""`advkd watch`: the page of a run that trains, has not begun to, or is finished."""

from __future__ import annotations

import json
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from advkd import watch
from advkd.config import Config
from advkd.report.live import LiveServer
from advkd.report.pictures import save_png
from advkd.run.folder import STAGES, RunFolder
from advkd.run.following import PREVIEW


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A run that has just begun."""
    folder = RunFolder(tmp_path / "toy", Config(name="toys & <b>"))
    with folder.opened():
        pass
    return folder


def log(run: RunFolder, *entries: dict[str, object]) -> None:
    lines = "".join(f"{json.dumps(entry)}\n" for entry in entries)
    (run.path / "metrics.jsonl").write_text(lines + '{"stage": "tea')  # a line being written


@contextmanager
def served(path: Path) -> Iterator[str]:
    """The address of a run's page."""
    with LiveServer(0, lambda: watch.live_of(path)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.address
        server.shutdown()


def read(address: str) -> str:
    with urllib.request.urlopen(address, timeout=60) as answer:
        assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
        return str(answer.read().decode())


def test_a_run_that_begins_trains_and_ends(run: RunFolder) -> None:
    with served(run.path) as address:
        page = read(address)
        assert "toys &amp; &lt;b&gt;" in page and "There is no preview yet" in page
        assert "The teacher is being made." in page and 'http-equiv="refresh"' in page
        log(
            run,
            {"stage": "teacher", "step": 50, "seconds": 20.0, "loss": 0.5},
            {"stage": "teacher", "step": 5000, "seconds": 300.0, "loss": 0.25},
        )
        save_png(run.path / PREVIEW, np.zeros((8, 8, 3), np.uint8))
        page = read(address)
        assert "Step 5,000 of 20,000, after 5 min 00 s; at this pace 15 min 00 s are left" in page
        assert page.count("data:image/png;base64,") == 3  # the preview, a chart for light and dark
        for stage in STAGES:
            run.finish(stage, 1.0)
        (run.path / "report" / "report.html").write_text("<p>Done.")
        page = read(address)
        assert "The run is finished." in page and "refresh" not in page
        assert read(f"{address}report.html") == "<p>Done."


def test_the_student_counts_its_own_steps(run: RunFolder) -> None:
    for stage in ("teacher", "trajectories"):
        run.finish(stage, 1.0)
    log(run, {"stage": "teacher", "step": 20_000, "seconds": 900.0, "loss": 0.25})
    assert watch.live_of(run.path).state == "The student is being distilled."
    log(run, {"stage": "distill", "step": 1000, "seconds": 30.0, "rec_1": 0.25})
    assert "Step 1,000 of 2,000, after 30 s" in watch.live_of(run.path).state


def test_what_is_not_there_or_broken(run: RunFolder) -> None:
    with served(run.path) as address:
        for page, code in (("report.html", 404), ("../config.toml", 404)):
            with pytest.raises(urllib.error.HTTPError) as error:
                read(f"{address}{page}")
            assert error.value.code == code
        (run.path / "metrics.jsonl").write_text("{\n{}\n")
        with pytest.raises(urllib.error.HTTPError) as error:
            read(address)
        assert error.value.code == 500 and "line 1 is not JSON" in error.value.read().decode()


def test_the_command(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    def stopped(server: LiveServer) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LiveServer, "serve_forever", stopped)
        assert watch.main([str(run.path), "--port", "0"]) == 0
    assert f"{run.path}: http://127.0.0.1:" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["absent"], "absent is no run of advkd train: it has no config.toml"),
        (["RUN", "--port", "70000"], "--port 70000 is not between 0 and 65535"),
        (["RUN", "--port", "TAKEN"], "cannot be had: Address already in use"),
    ],
)
def test_what_is_refused(
    arguments: list[str], words: str, run: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    with LiveServer(0, lambda: watch.live_of(run.path)) as other:
        given = {"RUN": str(run.path), "TAKEN": str(other.server_port)}
        assert watch.main([given.get(argument, argument) for argument in arguments]) == 1
    assert words in capsys.readouterr().err
