"""What one sees of a training while it runs: previews and trackers, which change nothing of it."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import subprocess
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from advkd import processes
from advkd.config import Config, ConfigError, override
from advkd.files import tensors_hash
from advkd.models.student import Student
from advkd.models.unet import UNet
from advkd.report.inputs import read_metrics
from advkd.run import following
from advkd.run.check import check
from advkd.run.following import PREVIEW, Following, preview
from advkd.run.run import Run
from advkd.run.trackers import tracker_library
from advkd.training.distill import distill_student
from advkd.training.teacher import train_teacher

from ..training.tiny import CONFIG, UNET, sampled, squares, teacher_config


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes a preview due whenever its step is."""
    monkeypatch.setattr(following, "LEAST_SECONDS", 0.0)
    monkeypatch.setattr(following, "SHARE", 1.0)


def followed(config: Config, folder: Path, stage: str = "teacher") -> Following:
    return Following(folder, stage, config, config.data.size)


def hash_of(file: Path) -> str:
    return tensors_hash(safetensors.torch.load_file(file))


def of_run(config: Config, **settings: Any) -> Config:
    """A configuration with other settings of the run."""
    return dataclasses.replace(config, run=dataclasses.replace(config.run, **settings))


def teacher_hash(config: Config, folder: Path, follower: Following | None) -> str:
    train_teacher(config, squares(), folder, follower)
    return hash_of(folder / "teacher" / "unet" / "diffusion_pytorch_model.safetensors")


@pytest.mark.usefixtures("at_once")
def test_a_teacher_is_the_same_bits_with_previews(tmp_path: Path) -> None:
    config = teacher_config("run.preview_every=1", "unet.dropout=0.1")
    alone = teacher_hash(config, tmp_path / "alone", None)
    with followed(config, tmp_path / "seen") as follower:
        assert teacher_hash(config, tmp_path / "seen", follower) == alone
    assert (tmp_path / "seen" / PREVIEW).is_file() and not (tmp_path / "alone" / PREVIEW).exists()


@pytest.mark.usefixtures("at_once")
def test_a_student_is_the_same_bits_with_previews(tmp_path: Path) -> None:
    config, store = of_run(CONFIG, preview_every=1), sampled(tmp_path / "store")
    hashes = []
    for name in ("alone", "seen"):
        with followed(config, tmp_path / name, "distill") as follower:
            seen = follower if name == "seen" else None
            distill_student(config, store, tmp_path / name, squares(), follower=seen)
        hashes.append(hash_of(tmp_path / name / "student" / "model.safetensors"))
    assert hashes[0] == hashes[1]
    assert (tmp_path / "seen" / PREVIEW).is_file()


@pytest.mark.gpu
@pytest.mark.usefixtures("at_once")
def test_captured_steps_are_the_same_bits_with_previews(tmp_path: Path) -> None:
    hashes = []
    for every in (0, 1):
        config = teacher_config("run.device=cuda", f"run.preview_every={every}")
        with followed(config, tmp_path / str(every)) as follower:
            hashes.append(teacher_hash(config, tmp_path / str(every), follower))
    assert hashes[0] == hashes[1]
    assert (tmp_path / "1" / PREVIEW).is_file()


@pytest.mark.usefixtures("at_once")
def test_a_preview_takes_the_place_of_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bytes] = []
    original = Following._show

    def show(self: Following, *given: Any) -> None:
        original(self, *given)
        seen.append((tmp_path / PREVIEW).read_bytes())

    monkeypatch.setattr(Following, "_show", show)
    config = teacher_config("run.preview_every=5")
    with followed(config, tmp_path) as follower:
        train_teacher(config, squares(), tmp_path, follower)
    assert len(seen) == len(set(seen)) == 3  # after 5, 10 and the last of 12 steps
    assert not list(tmp_path.glob(".*.tmp"))
    with Image.open(tmp_path / PREVIEW) as picture:
        assert picture.size[0] > 4 * 90 and picture.mode == "RGB"


@pytest.mark.parametrize(("every", "steps"), [(0, []), (4, [4, 12]), (100, [12])])
def test_previews_are_some_steps_and_some_time_apart(
    every: int, steps: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """12 steps of a second each: a preview that takes one is followed by 99 without."""
    now, shown = [0.0], []
    monkeypatch.setattr(following.time, "monotonic", lambda: now[0])

    def one(network: Any, heading: str, size: int) -> np.ndarray:
        now[0] += 1.0
        shown.append(int(heading.split()[2]))
        return np.zeros((4, 4, 3), np.uint8)

    monkeypatch.setattr(following, "preview", one)
    config = teacher_config(f"run.preview_every={every}")
    with followed(config, tmp_path) as follower:
        for step in range(1, 13):
            now[0] += 1.0
            follower.stepped(step, 12, UNet(config.unet))
    assert shown == steps


def test_previews_are_of_the_same_noise_and_leave_torchs_generators_alone() -> None:
    torch.manual_seed(0)
    unet = UNet(dataclasses.replace(UNET, num_class_embeds=3)).eval()
    student = Student(CONFIG.student, 8, 3, num_classes=5).eval()
    state = torch.get_rng_state()
    for network in (unet, student):
        sheet = preview(network, "now", 8)
        assert sheet.dtype == np.uint8 and np.array_equal(preview(network, "now", 8), sheet)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled()


def test_what_overflows_is_shown_black() -> None:
    torch.manual_seed(0)
    student = Student(CONFIG.student, 8, 1).eval()
    with torch.no_grad():
        student.heads[-1].conv.bias.fill_(float("nan"))
    assert preview(student, "now", 8).shape[2] == 3


def test_only_the_first_process_follows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = teacher_config("run.preview_every=1")
    monkeypatch.setattr(processes, "is_first", lambda: False)
    with followed(config, tmp_path) as follower:
        train_teacher(config, squares(), tmp_path, follower)
    assert not tmp_path.exists() or not list(tmp_path.glob("*.png"))


def tensorboard_of(folder: Path) -> tuple[dict[str, list[tuple[int, float]]], list[int]]:
    """The scalars and the steps of pictures that TensorBoard shows of a folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    scalars = {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }
    pictures = [event.step for event in events.Images("preview")]
    assert events.Images("preview")[0].encoded_image_string.startswith(b"\x89PNG")
    return scalars, pictures


@pytest.mark.usefixtures("at_once")
def test_tensorboard_shows_what_metrics_say(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    config = teacher_config("run.preview_every=6", "run.log=tensorboard")
    with followed(config, tmp_path) as follower:
        train_teacher(config, squares(), tmp_path, follower)
    scalars, pictures = tensorboard_of(tmp_path / "tensorboard" / "teacher")
    entries = read_metrics(tmp_path / "metrics.jsonl")
    assert {"loss", "lr", "grad_norm", "seconds"} == set(scalars)
    for tag, values in scalars.items():
        expected = [(entry["step"], np.float32(entry[tag])) for entry in entries]
        assert values == expected
    assert pictures == [6, 12]


def test_tensorboard_shows_a_step_once_after_an_interruption(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    config = teacher_config("run.preview_every=0", "run.log=tensorboard")
    for steps in ((2, 4, 6, 8), (6, 8, 10)):
        with followed(config, tmp_path) as follower:
            for step in steps:
                follower.logged(step, {"loss": 1.0 / step})
                follower.stepped(step, 10, None)
            follower._tracker.picture(step, np.zeros((4, 4, 3), np.uint8))
    scalars, _ = tensorboard_of(tmp_path / "tensorboard" / "teacher")
    assert [step for step, _ in scalars["loss"]] == [2, 4, 6, 8, 10]


class Recorded(types.ModuleType):
    """A library that speaks as trackio and wandb do, and notes what it is told."""

    def __init__(self, name: str):
        super().__init__(name)
        self.told: list[tuple[str, Any]] = []

    def init(self, **settings: Any) -> None:
        self.told.append(("init", settings))
        print("a greeting")

    def log(self, values: dict[str, Any], step: int) -> None:
        self.told.append((f"step {step}", values))

    def Image(self, pixels: np.ndarray) -> str:
        return f"image {pixels.shape[2]} {pixels.dtype}"

    def finish(self) -> None:
        self.told.append(("finish", None))


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("name", ["trackio", "wandb"])
def test_runs_of_trackers(
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    library = Recorded(name)
    monkeypatch.setitem(sys.modules, name, library)
    config = teacher_config("run.preview_every=6", f"run.log={name}", "teacher.log_every=6")
    with followed(config, tmp_path) as follower:
        train_teacher(config, squares(), tmp_path, follower)
    kinds = [kind for kind, _ in library.told]
    assert kinds == ["init", "step 6", "step 6", "step 12", "step 12", "finish"]
    settings = library.told[0][1]
    assert settings["name"] == "run teacher" and settings["project"] == "advkd"
    assert settings["config"]["teacher"]["steps"] == 12 and settings["resume"] == "allow"
    assert ("id" in settings) == (name == "wandb")
    logged = [values for kind, values in library.told if kind.startswith("step")]
    assert logged[1] == logged[3] == {"preview": "image 3 uint8"}
    entries = read_metrics(tmp_path / "metrics.jsonl")
    assert [entry["step"] for entry in entries] == [6, 12]
    for entry, values in zip(entries, logged[::2], strict=True):
        assert entry == {"stage": "teacher", "step": entry["step"], **values}
    assert capsys.readouterr().out == ""


REAL = """
import sys
from pathlib import Path
import numpy as np
from advkd.config import Config, override
from advkd.run.trackers import open_tracker

name = sys.argv[1]
config = override(Config(), [f"run.log={name}", "name=toy"])
for steps in ((10, 20), (30,)):
    tracker = open_tracker(Path("run"), "teacher", steps[0], config)
    for step in steps:
        tracker.numbers(step, {"loss": 1.0 / step})
    tracker.picture(step, np.zeros((8, 8, 3), np.uint8))
    tracker.close()
"""


@pytest.mark.parametrize("name", ["trackio", "wandb"])
def test_the_libraries_themselves_offline(name: str, tmp_path: Path) -> None:
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    (tmp_path / "run").mkdir()
    environment = os.environ | {
        "WANDB_MODE": "offline", "TRACKIO_DIR": str(tmp_path / "trackio"), "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", REAL, name], cwd=tmp_path, env=environment, capture_output=True,
        text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    written = tmp_path / ("trackio" if name == "trackio" else "run")
    assert done.stdout == "" and len(list(written.rglob("*.png"))) == 2


def test_a_tracker_that_fails_ends_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = Recorded("wandb")
    monkeypatch.setitem(sys.modules, "wandb", library)

    def refuse(values: dict[str, Any], step: int) -> None:
        raise ConnectionError("the server is gone\nand more")

    monkeypatch.setattr(library, "log", refuse, raising=False)
    config = teacher_config("run.preview_every=0", "run.log=wandb")
    with (
        pytest.warns(UserWarning, match=r"metrics\.jsonl goes on: the server is gone$") as said,
        followed(config, tmp_path) as follower,
    ):
        train_teacher(config, squares(), tmp_path, follower)
    assert len(said) == 1
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 6


def test_a_full_disk_ends_previews_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, grid: np.ndarray) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(following, "save_png", full)
    config = teacher_config("run.preview_every=6")
    with (
        pytest.warns(UserWarning, match="No space left on device"),
        followed(config, tmp_path) as follower,
    ):
        train_teacher(config, squares(), tmp_path, follower)
    assert (tmp_path / "teacher" / "model_index.json").is_file()


@pytest.mark.parametrize("name", ["tensorboard", "trackio", "wandb"])
def test_a_missing_library_is_named_before_work_begins(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    absent = "torch.utils.tensorboard" if name == "tensorboard" else name
    monkeypatch.setitem(sys.modules, absent, None)
    words = rf"--log {name} needs the library {name}, .* pip install 'advkd\[{name}\]'"
    with pytest.raises(ConfigError, match=words):
        tracker_library(name)
    run = Run(tmp_path, override(CONFIG, [f"run.log={name}"]))
    with pytest.raises(ConfigError, match=words):
        check(run, ("teacher",))


def test_without_a_tracker_no_library_is_read(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with followed(CONFIG, tmp_path) as follower:
            follower.logged(1, {"loss": 1.0})
    assert not list(tmp_path.iterdir())
