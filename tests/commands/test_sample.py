"""The command that samples: what it writes is what `generate` draws; what cannot be is refused."""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import advkd.sample
import advkd.sample_network
from advkd.config import StudentConfig, UNetConfig
from advkd.console import StopSignals
from advkd.diffusion import Schedule
from advkd.engine.noise import Noise, Purpose
from advkd.engine.sampling import generate
from advkd.models.student import Student
from advkd.models.unet import UNet
from advkd.pretrained import (
    load_student,
    load_teacher,
    save_student,
    save_teacher,
)
from advkd.sample import main

STUDENT = StudentConfig(stages=(4, 8), widths=(8, 8), attention=(4,), groups=4)
TEACHER = UNetConfig(
    sample_size=8,
    block_out_channels=(8, 8),
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    layers_per_block=1,
    norm_num_groups=4,
)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Students are prepared in a folder of the test's own, whether or not there is a GPU."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("ADVKD_CACHE", str(folder))
    monkeypatch.setattr(advkd.sample, "has_gpu_driver", lambda: False)
    return folder


@pytest.fixture(params=["by torch", "prepared"])
def student(
    request: pytest.FixtureRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> str:
    return _prepared(_student(tmp_path / "student"), request.param, capsys)


@pytest.fixture(params=["by torch", "prepared"])
def conditional(
    request: pytest.FixtureRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> str:
    folder = _student(tmp_path / "conditional", num_classes=3)
    return _prepared(folder, request.param, capsys)


def _prepared(folder: str, how: str, capsys: pytest.CaptureFixture[str]) -> str:
    """The student, sampled once where it is to be prepared."""
    if how == "prepared":
        archive = Path(folder).with_name("first.npz")
        assert main(["--student", folder, "--num", "1", "--npz", str(archive)]) == 0
        archive.unlink()
        capsys.readouterr()
    return folder


@pytest.fixture
def teacher(tmp_path: Path) -> str:
    torch.manual_seed(1)
    save_teacher(UNet(TEACHER, Schedule(num_train_timesteps=6)), tmp_path / "teacher")
    return str(tmp_path / "teacher")


def _student(
    folder: Path, channels: int = 1, names: tuple[str, ...] | None = None, **settings: Any
) -> str:
    torch.manual_seed(0)
    student = Student(STUDENT, 8, channels, **settings)
    student.class_names = names
    save_student(student, folder)
    return str(folder)


def _arrays(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as archive:
        return dict(archive)


def test_writes_what_generate_samples(
    student: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    png, npz = tmp_path / "new" / "grid.png", tmp_path / "new" / "images.npz"
    arguments = ["--student", student, "--num", "5", "--seed", "7", "--first", "2"]
    assert main([*arguments, "--out", str(png), "--npz", str(npz)]) == 0

    expected = generate(load_student(student), 5, 7, first=2)
    arrays = _arrays(npz)
    assert list(arrays) == ["images"] and arrays["images"].dtype == np.float32
    assert np.array_equal(arrays["images"], expected.numpy())

    # 5 images stand in 3 columns and 2 rows, each pixel 8x8 of the 64 pixels of a tile.
    grid = np.asarray(Image.open(png))
    assert grid.shape == (128, 192)
    pixels = ((expected + 1) * 127.5).round().to(torch.uint8).numpy()
    tiles = grid[4::8, 4::8].reshape(2, 8, 3, 8).transpose(0, 2, 1, 3).reshape(6, 8, 8)
    assert np.array_equal(tiles[:5], pixels[:, 0]) and not tiles[5].any()

    said = capsys.readouterr()
    assert said.err == ""
    assert re.fullmatch(
        rf"5 images \(1x8x8\) of {re.escape(student)} in one network pass, seed 7, in \d+\.\d\d s: "
        rf"{re.escape(str(png))}, {re.escape(str(npz))}\n",
        said.out,
    )


def test_an_image_is_the_same_alone(student: str, tmp_path: Path) -> None:
    npz = tmp_path / "images.npz"
    assert main(["--student", student, "--num", "9", "--npz", str(npz)]) == 0
    among = _arrays(npz)["images"][6:7]
    assert main(["--student", student, "--num", "1", "--first", "6", "--npz", str(npz)]) == 0
    assert np.allclose(_arrays(npz)["images"], among, rtol=0, atol=1e-4 * np.abs(among).max())


def test_exit_at_gives_that_head(student: str, tmp_path: Path) -> None:
    npz = tmp_path / "images.npz"
    assert main(["--student", student, "--num", "2", "--exit-at", "1", "--npz", str(npz)]) == 0
    expected = generate(load_student(student), 2, 0, exit_at=1)
    assert expected.shape == (2, 1, 4, 4)
    assert np.array_equal(_arrays(npz)["images"], expected.numpy())


def test_labels(conditional: str, tmp_path: Path) -> None:
    npz = tmp_path / "images.npz"
    arguments = ["--student", conditional, "--num", "6", "--first", "4", "--npz", str(npz)]
    assert main(arguments) == 0
    drawn = _arrays(npz)
    assert drawn["labels"].dtype == np.int64
    labels = Noise(0, Purpose.SAMPLING).labels(torch.arange(4, 10), 3)
    assert labels is not None and np.array_equal(drawn["labels"], labels.numpy())

    assert main([*arguments, "--class", "2"]) == 0
    of_one = _arrays(npz)
    assert np.array_equal(of_one["labels"], np.full(6, 2))
    same = drawn["labels"] == 2
    assert 0 < same.sum() < 6
    difference = np.abs(of_one["images"] - drawn["images"]).max((1, 2, 3))
    assert (difference[same] == 0).all() and (difference[~same] > 0).all()


NAMES = ("ankle boot", "1", "Bag", "BAG", "Stra\u00dfe", "line\nbreak")


@pytest.fixture(params=["by torch", "prepared"])
def named(
    request: pytest.FixtureRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> str:
    folder = _student(tmp_path / "named", num_classes=6, names=NAMES)
    return _prepared(folder, request.param, capsys)


@pytest.mark.parametrize(
    ("given", "label", "words"),
    [
        ("ankle boot", 0, "class 0 (ankle boot)"),
        ("Ankle BOOT", 0, "class 0 (ankle boot)"),
        ("0", 0, "class 0 (ankle boot)"),
        ("1", 1, "class 1 (1)"),
        ("Bag", 2, "class 2 (Bag)"),
        ("BAG", 3, "class 3 (BAG)"),
        ("3", 3, "class 3 (BAG)"),
        ("STRASSE", 4, "class 4 (Stra\u00dfe)"),
        ("5", 5, r"class 5 (line\nbreak)"),
    ],
)
def test_a_class_by_number_or_name(
    given: str,
    label: int,
    words: str,
    named: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    npz = tmp_path / "images.npz"
    arguments = ["--student", named, "--num", "2", "--npz", str(npz)]
    assert main([*arguments, "--class", given]) == 0
    assert np.array_equal(_arrays(npz)["labels"], [label, label])
    said = capsys.readouterr().out
    assert f"in one network pass, {words}, seed 0" in said and said.count("\n") == 1


def test_a_name_that_is_a_number_comes_before_the_number(tmp_path: Path) -> None:
    """Of the digits from 1 up, which folders are named after, 1 has the label 0."""
    digits = _student(tmp_path / "digits", num_classes=3, names=("1", "2", "3"))
    npz = tmp_path / "images.npz"
    for given, label in (("1", 0), ("3", 2), ("0", 0)):
        assert main(["--student", digits, "--num", "1", "--npz", str(npz), "--class", given]) == 0
        assert _arrays(npz)["labels"].tolist() == [label]


def test_a_class_of_a_teacher(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    unet = UNet(dataclasses.replace(TEACHER, num_class_embeds=2), Schedule(num_train_timesteps=6))
    unet.class_names = ("cat", "dog")
    save_teacher(unet, tmp_path / "teacher")
    npz = tmp_path / "images.npz"
    arguments = ["--teacher", str(tmp_path / "teacher"), "--steps", "2", "--npz", str(npz)]
    assert main([*arguments, "--num", "2", "--class", "dog"]) == 0
    assert "by DDIM in 2 steps, eta 0, class 1 (dog), seed 0" in capsys.readouterr().out
    expected = generate(unet.eval(), 2, 0, 2, y=torch.tensor([1, 1]))
    assert np.allclose(_arrays(npz)["images"], expected.numpy(), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            "ankle boots",
            "--class 'ankle boots' names no class of this network; the nearest is 'ankle",
        ),
        ("", "--class '' names no class of this network; the nearest is"),
        ("bag", "--class 'bag' could be 'Bag' and 'BAG'"),
        ("6", "--class 6 is not between 0 and 5"),
        ("-1", "--class -1 is not between 0 and 5"),
        ("9" * 5000, "9... names no class of this network"),
        ("a\nb", r"--class 'a\nb' names no class of this network"),
    ],
)
def test_names_of_no_class(
    given: str,
    message: str,
    named: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["--student", named, "--class", given]
    _refused(arguments, message, tmp_path, monkeypatch, capsys)


def test_a_name_where_classes_have_none(
    conditional: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    message = "--class 'bag': this network's classes have no names, only numbers from 0 to 2"
    arguments = ["--student", conditional, "--class", "bag"]
    _refused(arguments, message, tmp_path, monkeypatch, capsys)


@pytest.mark.parametrize(
    ("options", "settings"),
    [
        ([], {"steps": 3}),
        (["--eta", "0.5"], {"steps": 3, "eta": 0.5}),
        (["--sampler", "ddpm"], {"sampler": "ddpm"}),
    ],
)
def test_teacher(
    teacher: str, tmp_path: Path, options: list[str], settings: dict[str, Any]
) -> None:
    npz = tmp_path / "images.npz"
    steps = [] if "ddpm" in options else ["--steps", "3"]
    arguments = ["--teacher", teacher, "--num", "3", "--npz", str(npz), *steps, *options]
    assert main(arguments) == 0
    expected = generate(load_teacher(teacher), 3, 0, **settings)
    assert np.array_equal(_arrays(npz)["images"], expected.numpy())


def test_teacher_with_its_scheduler_elsewhere(teacher: str, tmp_path: Path) -> None:
    npz = tmp_path / "images.npz"
    arguments = ["--num", "2", "--steps", "2", "--npz", str(npz)]
    folders = ["--teacher", f"{teacher}/unet", "--scheduler", f"{teacher}/scheduler"]
    assert main([*folders, *arguments]) == 0
    bare = _arrays(npz)["images"]
    assert main(["--teacher", teacher, *arguments]) == 0
    assert np.array_equal(_arrays(npz)["images"], bare)


def test_without_a_network_the_shipped_student_is_sampled(
    student: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert advkd.sample.SHIPPED == "zoo:fashion-mnist-student"
    monkeypatch.setattr(advkd.sample, "SHIPPED", student)
    monkeypatch.chdir(tmp_path)
    assert main(["--num", "4"]) == 0
    assert Image.open("samples.png").size == (128, 128)


def test_more_channels_than_a_png_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    student = _student(tmp_path / "student", channels=2)
    assert main(["--student", student]) == 1
    assert "a PNG has 1 or 3 channels, these images 2" in capsys.readouterr().err
    assert main(["--student", student, "--num", "2", "--npz", "images.npz"]) == 0
    assert not Path("samples.png").exists()
    assert _arrays(Path("images.npz"))["images"].shape == (2, 2, 8, 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num", "0"], "--num 0 is below 1"),
        (["--dtype", "bfloat16", "--device", "cpu"], "--dtype bfloat16 is for a GPU"),
        (["--device", "cuda:99"], "'cuda:99' does not exist"),
        (["--device", "gpu"], "'gpu' is not one of auto, cpu, cuda, cuda:N"),
        (["--seed", "-1"], "--seed -1 is not between 0 and 2^64 - 1"),
        (["--seed", str(1 << 64)], "is not between 0 and 2^64 - 1"),
        (["--first", "-1"], "--first -1 is not between 0 and"),
        (["--threads", "-1"], "--threads -1 is negative"),
        (["--out", "grid.jpg"], "--out grid.jpg does not name a .png file"),
        (["--npz", "images"], "--npz images does not name a .npz file"),
        (["--steps", "3", "--eta", "1"], "--steps, --eta needs --teacher"),
        (["--sampler", "ddim"], "--sampler needs --teacher"),
        (["--exit-at", "3"], "exit_at=3 is not between 1 and 2"),
        (["--class", "1"], "--class needs a class-conditional network"),
        (["--class", "bag"], "--class needs a class-conditional network"),
    ],
)
def test_refused_for_a_student(
    student: str,
    options: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _refused(["--student", student, *options], message, tmp_path, monkeypatch, capsys)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--exit-at", "1"], "--exit-at is for a student"),
        (["--steps", "0"], "--steps 0 is below 1"),
        (["--sampler", "ddpm", "--steps", "3"], "--sampler ddpm takes all steps"),
        (["--steps", "3", "--eta", "2"], "eta"),
        (["--scheduler", "nowhere"], "nowhere"),
    ],
)
def test_refused_for_a_teacher(
    teacher: str,
    options: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _refused(["--teacher", teacher, *options], message, tmp_path, monkeypatch, capsys)


def test_a_class_that_does_not_exist(
    conditional: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["--student", conditional, "--class", "3"]
    _refused(arguments, "--class 3 is not between 0 and 2", tmp_path, monkeypatch, capsys)


def test_a_folder_that_does_not_exist(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _refused(["--student", "absent"], "there is no folder absent", tmp_path, monkeypatch, capsys)


def _refused(
    arguments: list[str],
    message: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The command says one sentence, ends with 1 and leaves the folder as it was."""
    monkeypatch.chdir(folder)
    before = sorted(folder.rglob("*"))
    assert main(arguments) == 1
    said = capsys.readouterr()
    assert said.out == "" and message in said.err
    assert said.err.startswith("advkd: ") and said.err.count("\n") == 1
    assert sorted(folder.rglob("*")) == before


def test_student_and_teacher_exclude_each_other() -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--student", "a", "--teacher", "b"])
    assert ended.value.code == 2


def test_ctrl_c_ends_at_the_next_pass(
    teacher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = []
    arrived = threading.Event()

    class Watched(StopSignals):
        def _request(self, *details: Any) -> None:
            super()._request(*details)
            arrived.set()

    def interrupted(*given: Any, callback: Callable[[int, int], None], **settings: Any) -> Any:
        def report(done: int, total: int) -> None:
            passes.append(done)
            if done == 2:
                os.kill(os.getpid(), signal.SIGINT)
                assert arrived.wait(60)
            callback(done, total)

        return generate(*given, callback=report, **settings)

    monkeypatch.setattr(advkd.sample_network, "StopSignals", Watched)
    monkeypatch.setattr(advkd.sample_network, "generate", interrupted)
    npz = tmp_path / "images.npz"
    assert main(["--teacher", teacher, "--num", "1", "--steps", "5", "--npz", str(npz)]) == 130
    assert passes == [1, 2] and not npz.exists()
