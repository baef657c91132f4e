"""A run's parts below the command line: its images, features, stages and pictures."""

from __future__ import annotations

import dataclasses
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import advkd.run.stages
from advkd.config import (
    Config,
    ConfigError,
    DataConfig,
    DiscriminatorConfig,
    DistillConfig,
    StudentConfig,
    TeacherConfig,
    TrajectoryConfig,
    UNetConfig,
)
from advkd.console import Interrupted, StopSignals
from advkd.data.images import ImageSet
from advkd.data.trajectories import Trajectories, sample_trajectories
from advkd.diffusion import Schedule
from advkd.engine.sampling import EVALUATION_SEED, generate, sample_x_T
from advkd.evaluation.features import FeatureNet, FitSettings, save_features
from advkd.files import read_json, write_json
from advkd.models.student import Student
from advkd.models.unet import UNet
from advkd.pretrained import save_student, save_teacher
from advkd.run.stages import (
    MIN_IMAGES,
    STAGES,
    Run,
    draw_pictures,
    features_of,
    has_images,
    hold_out,
    make_trajectories,
    read_images,
)

CONFIG = Config(
    data=DataConfig(size=8),
    unet=UNetConfig(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
    ),
    teacher=TeacherConfig(source="given"),
    trajectory=TrajectoryConfig(num=12, steps=4, shard=6),
    student=StudentConfig(stages=(4, 8), widths=(8, 8), attention=(), groups=4),
    discriminator=DiscriminatorConfig(widths=(8,), groups=4),
)


def changed(**tables: dict[str, Any]) -> Config:
    """CONFIG with other values in some of its tables."""
    return dataclasses.replace(
        CONFIG,
        **{
            table: dataclasses.replace(getattr(CONFIG, table), **values)
            for table, values in tables.items()
        },
    )


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run without images that has a teacher and a student."""
    torch.manual_seed(0)
    save_teacher(UNet(CONFIG.unet, Schedule(num_train_timesteps=20)), tmp_path / "teacher")
    save_student(Student(CONFIG.student, 8, 1), tmp_path / "student")
    return Run(CONFIG, tmp_path, has_images=False)


def numbered(count: int) -> ImageSet:
    pixels = np.zeros((count, 1, 8, 8), np.uint8)
    pixels[:, 0, 0, 0], pixels[:, 0, 0, 1] = np.arange(count) % 256, np.arange(count) // 256
    return ImageSet(pixels, np.arange(count), "numbers")


@pytest.mark.parametrize(("count", "held"), [(MIN_IMAGES, 6), (104, 20), (11_000, 2000)])
def test_what_is_held_out_is_never_trained_on(count: int, held: int) -> None:
    images = hold_out(numbered(count))
    assert len(images.held_out) == held
    train, held_out = images.train.labels, images.held_out.labels
    assert train is not None and held_out is not None
    assert sorted([*train, *held_out]) == list(range(count))
    assert set(held_out) != set(range(held)) and set(held_out) != set(range(count - held, count))
    for part in (images.train, images.held_out):
        low, high = part.pixels[:, 0, 0, :2].astype(int).T
        number = low + 256 * high
        assert np.array_equal(number, part.labels)
    again = hold_out(numbered(count)).held_out.labels
    assert again is not None and np.array_equal(again, held_out)


def test_too_few_images_are_an_error() -> None:
    with pytest.raises(ConfigError, match=f"numbers holds {MIN_IMAGES - 1} images"):
        hold_out(numbered(MIN_IMAGES - 1))


def test_the_images_that_ship() -> None:
    images = read_images(changed(data={"size": 28}))
    assert (len(images.train), len(images.held_out)) == (10_000, 2000)
    with pytest.raises(ConfigError, match="28x28 with 1 channel, not 8x8"):
        read_images(CONFIG)
    with pytest.raises(ConfigError, match="with 3: give --data"):
        read_images(changed(data={"size": 28, "channels": 3}))


@pytest.mark.parametrize(
    ("source", "path", "has"),
    [
        ("", "", True),
        ("zoo:fashion-mnist", "", True),
        ("folder", "", False),
        ("folder", "pictures", True),
    ],
)
def test_a_given_teacher_alone_has_no_images(source: str, path: str, has: bool) -> None:
    assert has_images(changed(teacher={"source": source}, data={"path": path})) == has


def test_markers(run: Run) -> None:
    assert not any(run.is_done(stage) for stage in STAGES)
    assert len({run.marker(stage) for stage in STAGES}) == len(STAGES)
    run.finish("distill", 1.23456)
    assert run.is_done("distill")
    assert run.seconds("distill") == 1.235
    assert run.seconds("teacher") is None


@pytest.mark.parametrize(
    "changes",
    [
        {"student": {"stages": (2, 8)}},
        {"student": {"widths": (9, 8)}},
        {"discriminator": {"widths": (8, 8, 8, 8)}},
        {"distill": {"inner_every": 0}},
        {"distill": {"head_weights": (1.0,)}},
        {"trajectory": {"target": "x0"}},
        {"trajectory": {"num": 0}},
    ],
)
def test_check_refuses_what_a_later_stage_would(
    changes: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    Run(CONFIG, tmp_path).check()
    with pytest.raises(ValueError, match=r"\S"):
        Run(changed(**changes), tmp_path).check()


def test_check_leaves_the_random_state_alone(tmp_path: Path) -> None:
    state = torch.random.get_rng_state()
    Run(CONFIG, tmp_path).check()
    assert torch.equal(torch.random.get_rng_state(), state)


# Trajectories.


def test_a_signal_ends_the_trajectories(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: Any) -> Trajectories | None:
        signal.raise_signal(signal.SIGTERM)
        return sample_trajectories(*args)

    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(advkd.run, "sample_trajectories", interrupted)
        with pytest.raises(Interrupted, match="finished shards are kept"):
            make_trajectories(run)
    assert signal.getsignal(signal.SIGTERM) == before
    assert not list((run.folder / "trajectories").glob("shard-*"))
    make_trajectories(run)
    assert len(list((run.folder / "trajectories").glob("shard-*.npy"))) == 2


def test_a_signal_after_the_last_pass_is_not_lost(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def late(*args: Any) -> Trajectories | None:
        store = sample_trajectories(*args)
        signal.raise_signal(signal.SIGINT)
        return store

    with monkeypatch.context() as patch:
        patch.setattr(advkd.run, "sample_trajectories", late)
        with pytest.raises(Interrupted):
            make_trajectories(run)
    earlier = run.folder / "trajectories" / "seconds.json"
    assert read_json(earlier)["seconds"] > 0
    write_json(earlier, {"seconds": 1000.0})
    assert 1000 < make_trajectories(run) < 1100  # all sessions count
    assert make_trajectories(run) < 100
    assert not StopSignals().requested


# Features.


def test_the_features_that_judge(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(advkd.run, "FitSettings", lambda steps: FitSettings(steps=2))
    make_trajectories(run)
    fitted = features_of(run)  # none ship for 8x8, and there are no images: on the trajectories
    assert (fitted.size, fitted.channels, fitted.num_classes) == (8, 1, None)
    assert (fitted.record["images"], fitted.record["data"]) == (12, "samples of the teacher")

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("fitted again")

    monkeypatch.setattr(advkd.run, "fit_features", refuse)
    assert torch.equal(features_of(run).to_features.weight, fitted.to_features.weight)

    save_features(FeatureNet(1, 8, 3), tmp_path / "mine")
    given = Run(changed(evaluate={"features": str(tmp_path / "mine")}), tmp_path, False)
    assert features_of(given).num_classes == 3

    shipped = Run(changed(data={"size": 28}), tmp_path / "other", False)
    assert (features_of(shipped).size, features_of(shipped).num_classes) == (28, 10)


# Pictures.


@pytest.mark.parametrize("target", ["denoised", "state"])
def test_pictures_show_teacher_and_student_from_the_same_noise(run: Run, target: str) -> None:
    config = changed(trajectory={"target": target})
    run = Run(config, run.folder, has_images=False)
    pictures = draw_pictures(run, 4)
    teacher, student = run.teacher(), run.student()
    assert pictures.data is None
    assert len(pictures.teacher) == len(pictures.student)
    num = len(pictures.teacher)
    expected = generate(teacher, num, EVALUATION_SEED, 4)
    torch.testing.assert_close(pictures.teacher, expected, rtol=1e-4, atol=1e-4)
    x_T = sample_x_T(EVALUATION_SEED, torch.arange(num), (1, 8, 8))
    torch.testing.assert_close(pictures.student, student(x_T).clamp(-1, 1), rtol=1e-4, atol=1e-4)
    assert [x.shape[-1] for x in pictures.heads] == [4, 8]
    assert [x.shape for x in pictures.trajectory] == [x.shape for x in pictures.heads]
    assert list(pictures.times) == [10, 0]  # of 20 times in 4 steps: 15, 10, 5, 0


def test_more_heads_than_steps_still_give_pictures(tmp_path: Path, run: Run) -> None:
    stages, widths = (4, 4, 4, 8, 8, 8), (8,) * 6
    student = StudentConfig(stages=stages, widths=widths, attention=(), groups=4)
    save_student(Student(student, 8, 1), tmp_path / "student")
    assert len(draw_pictures(run, 2).heads) == 6


def test_the_settings_of_distillation_in_the_default_are_sound() -> None:
    config = dataclasses.replace(Config(), distill=DistillConfig())
    Run(config, Path("nowhere")).check()
