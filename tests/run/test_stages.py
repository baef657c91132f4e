"""A run's parts below the command line: its images, features, stages and pictures."""

from __future__ import annotations

import dataclasses
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import advkd.deploy.model_file
import advkd.run.evaluation
import advkd.run.stages
from advkd import ops
from advkd.config import (
    Config,
    ConfigError,
    DataConfig,
    DiscriminatorConfig,
    EvaluateConfig,
    StudentConfig,
    TeacherConfig,
    TrajectoryConfig,
    UNetConfig,
    load_preset,
    to_toml,
)
from advkd.console import StopSignals
from advkd.data import DataError, ImageSet, dataset
from advkd.data.split import MIN_IMAGES, hold_out, real_images
from advkd.data.trajectories import Trajectories, sample_trajectories
from advkd.diffusion import Schedule
from advkd.engine.noise import Noise, Purpose
from advkd.engine.sampling import generate
from advkd.errors import CheckpointError, Interrupted
from advkd.evaluation.features import FeatureNet, save_features
from advkd.files import read_json, write_json
from advkd.models.student import Student
from advkd.models.unet import UNet
from advkd.pretrained import save_student, save_teacher
from advkd.run.check import check
from advkd.run.evaluation import features_of
from advkd.run.folder import STAGES, stored_config
from advkd.run.model_card import _of_hub
from advkd.run.run import Run
from advkd.run.stages import PICTURE_SEED, make_trajectories, model_file_of, pictures_of

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
    discriminator=DiscriminatorConfig(widths=(8, 8), groups=4),
    evaluate=EvaluateConfig(num=12, blocks=2, teacher_steps=4),
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
    run = Run(tmp_path, CONFIG)
    run.finish("teacher", 1.0)
    return run


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
    with pytest.raises(DataError, match=f"numbers holds {MIN_IMAGES - 1} images"):
        hold_out(numbered(MIN_IMAGES - 1))


def test_the_images_that_ship() -> None:
    for source in (dataset("fashion-mnist"), "fashion-mnist"):
        images = real_images(source, 28, 1, True)
        assert (len(images.train), len(images.held_out)) == (10_000, 2000)
        assert images.train.classes is not None and images.train.classes[5] == "sandal"
    images = real_images("avatars", 8, 1, True)
    assert images.train.pixels.shape == (10_500, 1, 8, 8) and len(images.held_out) == 2100


def test_a_data_set_without_test_images_has_a_part_held_out(tmp_path: Path) -> None:
    np.save(tmp_path / "some.npy", np.zeros((50, 8, 8), np.uint8))
    text = 'size = 8\nchannels = 1\n[splits]\ntrain = "some.npy"\n'
    (tmp_path / "dataset.toml").write_text(text)
    images = real_images(str(tmp_path), 8, 1, True)
    assert (len(images.train), len(images.held_out)) == (40, 10)


GREY, RGB = (28, 1), (32, 3)  # the shapes of the data sets that ship


@pytest.mark.parametrize(
    ("source", "path", "shape", "name", "has"),
    [
        # Neither images nor a teacher: the default data set, in no other shape and no other set.
        ("", "", GREY, "fashion-mnist", True),
        ("", "", RGB, None, False),
        ("", "", (28, 3), None, False),
        # Images that are named are of no data set but the one that they name.
        ("", "pictures", GREY, None, True),
        ("", "pictures", RGB, None, True),
        ("", "avatars", RGB, "avatars", True),
        ("", "avatars", (16, 3), "avatars", True),
        # So is a teacher, whatever the shape of its images.
        ("folder", "", GREY, None, False),
        ("folder", "", RGB, None, False),
        ("folder", "pictures", RGB, None, True),
        ("folder", "avatars", RGB, "avatars", True),
        ("zoo:fashion-mnist", "", GREY, "fashion-mnist", True),
        ("zoo:fashion-mnist", "pictures", GREY, "fashion-mnist", True),
        ("zoo:avatars", "", RGB, "avatars", True),
        ("zoo:avatars", "fashion-mnist", RGB, "fashion-mnist", True),
        ("zoo:x", "", GREY, None, False),
    ],
)
def test_which_data_set_a_run_is_of(
    source: str, path: str, shape: tuple[int, int], name: str | None, has: bool
) -> None:
    size, channels = shape
    data = {"path": path, "size": size, "channels": channels}
    run = Run(Path("nowhere"), changed(teacher={"source": source}, data=data))
    assert (run.dataset and run.dataset.name) == name
    assert run.has_images == has


def test_the_images_of_a_run() -> None:
    for source, path, shape, title in (
        ("", "", GREY, "Fashion-MNIST (train)"),
        ("zoo:avatars", "", RGB, "Avatars (train)"),
        ("", "avatars", RGB, "Avatars (train)"),
    ):
        data = {"path": path, "size": shape[0], "channels": shape[1]}
        images = Run(Path("nowhere"), changed(teacher={"source": source}, data=data)).images()
        assert images is not None and images.train.source == title


def test_a_preset_for_images_of_its_own_takes_none_that_ship(tmp_path: Path) -> None:
    run = Run(tmp_path / "cifar", load_preset("cifar10-32"))
    assert run.images() is None and run.dataset is None
    with pytest.raises(ConfigError, match="give --teacher or --data, such as avatars"):
        check(run, STAGES)


def test_clusters_take_the_place_of_the_classes_of_a_run() -> None:
    config = changed(
        data={"path": "fashion-mnist", "size": 28, "clusters": 4},
        unet={"sample_size": 28, "num_class_embeds": 4},
        teacher={"source": ""},
        student={"stages": (14, 28)},
        evaluate={"num": 200},
    )
    run = Run(Path("nowhere"), config)
    images = run.images()
    assert images is not None and images.train.num_classes == 4 and images.train.classes is None
    check(run, STAGES)
    for num in (None, 10):
        unet = dataclasses.replace(config.unet, num_class_embeds=num)
        other = Run(Path("nowhere"), dataclasses.replace(config, unet=unet))
        with pytest.raises(ConfigError, match=rf"teacher has {num or 'none'}: .*embeds=4 is"):
            check(other, ("teacher",))


def test_markers(run: Run) -> None:
    assert [stage for stage in STAGES if run.is_done(stage)] == ["teacher"]
    assert len({run.marker(stage) for stage in STAGES}) == len(STAGES)
    run.finish("distill", 1.23456)
    assert run.is_done("distill")
    assert run.seconds("distill") == 1.235
    assert run.seconds("trajectories") is None
    run.marker("distill").write_text('{"seconds": "many"}')
    with pytest.raises(CheckpointError, match=r"distill\.done\.json does not say"):
        run.seconds("distill")


# Folders that are not to be gone on with.


def test_a_run_of_version_0_1_is_refused_by_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(to_toml(CONFIG))
    with pytest.raises(ConfigError, match=r"was made by advkd 0\.1 and cannot go on"):
        stored_config(tmp_path)
    with (
        pytest.raises(ConfigError, match=r"made by advkd 0\.1"),
        Run(tmp_path, CONFIG).opened(),
    ):
        pass
    assert (tmp_path / "config.toml").read_text() == to_toml(CONFIG)


def test_a_run_is_what_its_configuration_says(run: Run) -> None:
    with run.opened():
        pass
    assert stored_config(run.path) == CONFIG
    other = Run(run.path, changed(unet={"layers_per_block": 2}))
    with pytest.raises(ConfigError, match=r"another unet\.layers_per_block"), other.opened():
        pass
    with pytest.raises(CheckpointError, match="it has no config"):
        stored_config(run.path / "nowhere")


def test_other_images_than_a_run_began_with_are_refused(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 8, 8), dtype=np.uint8)
    path = tmp_path / "images.npy"
    config = changed(data={"path": str(path)})
    run = tmp_path / "run"
    np.save(path, pixels)
    with Run(run, config).opened():
        first = Run(run, config).images()
        assert first is not None and len(first.train) == 32
        assert Run(run, config).images() is not None
        np.save(path, 255 - pixels)
        with pytest.raises(ConfigError, match="made from other images than"):
            Run(run, config).images()
    with Run(run, config).opened("teacher"):
        assert Run(run, config).images() is not None


# Checks before anything is made.


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"student": {"stages": (2, 8)}}, "student.stages"),
        ({"student": {"widths": (9, 8)}}, "9"),
        ({"student": {"groups": 3}}, "3"),
        ({"discriminator": {"widths": (8,) * 5}}, "halvings|level"),
        ({"discriminator": {"groups": 3, "attention": (4,)}}, "3"),
        ({"distill": {"inner_every": 0}}, "distill.inner_every=0"),
        ({"distill": {"head_weights": (1.0,)}}, "head_weights"),
        ({"distill": {"rho": "l1"}}, "rho"),
        ({"trajectory": {"target": "x0"}}, "trajectory.target='x0'"),
        ({"trajectory": {"num": 0}}, "trajectory.num=0"),
        ({"trajectory": {"sampler": "euler"}}, "trajectory.sampler='euler'"),
        ({"trajectory": {"eta": 2.0}}, "trajectory.eta=2.0"),
        ({"trajectory": {"steps": 1}}, "trajectory.steps=1"),
        ({"trajectory": {"steps": 21}}, "trajectory.steps=21.*20"),
        ({"evaluate": {"num": 3}}, "evaluate.num=3"),
        ({"evaluate": {"blocks": 0}}, "evaluate.blocks=0"),
        ({"evaluate": {"blocks": 10**9}}, "evaluate.blocks=1000000000"),
        ({"evaluate": {"blocks": 3}}, "12 images cannot be split into 3 blocks of 6 or more"),
        ({"evaluate": {"teacher_steps": 21}}, "evaluate.teacher_steps=21.*20"),
        ({"evaluate": {"features": "nowhere"}}, "nowhere"),
        ({"data": {"channels": 2}}, "data.channels=2"),
        ({"data": {"channels": 3}}, "data.channels=3"),
        ({"data": {"size": 16}}, "data.size=16"),
        ({"run": {"device": "cuda:99"}}, "cuda:99"),
        ({"run": {"device": "abacus"}}, "abacus"),
    ],
)
def test_check_refuses_what_a_later_stage_would(
    changes: dict[str, dict[str, Any]], words: str, run: Run
) -> None:
    check(run, STAGES)
    with pytest.raises((ValueError, CheckpointError), match=words):
        check(Run(run.path, changed(**changes)), STAGES)


def test_check_refuses_features_of_another_shape(run: Run, tmp_path: Path) -> None:
    save_features(FeatureNet(1, 16), tmp_path / "features16")
    config = changed(evaluate={"features": str(tmp_path / "features16")})
    with pytest.raises(ConfigError, match=r"for 16x16 images.*not 8x8"):
        check(Run(run.path, config), STAGES)


def test_check_needs_a_teacher_or_images(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="given"):
        check(Run(tmp_path, CONFIG), STAGES)


def test_check_of_the_teacher_alone_minds_only_the_teacher(run: Run) -> None:
    check(Run(run.path, changed(student={"stages": (2, 8)})), ("teacher",))


def test_check_leaves_the_random_state_alone(run: Run) -> None:
    state = torch.random.get_rng_state()
    check(run, STAGES)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_the_default_and_the_presets_that_ship_their_teacher_are_sound(tmp_path: Path) -> None:
    for name in ("fashion-mnist", "fashion-mnist-full", "fashion-mnist-paper", "smoke"):
        check(Run(tmp_path / name, load_preset(name)), STAGES)


# Trajectories.


def test_a_signal_ends_the_trajectories(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: Any) -> Trajectories | None:
        signal.raise_signal(signal.SIGTERM)
        return sample_trajectories(*args)

    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(advkd.run.stages, "sample_trajectories", interrupted)
        with pytest.raises(Interrupted, match="finished shards stay"):
            make_trajectories(run)
    assert signal.getsignal(signal.SIGTERM) == before
    assert not list((run.path / "trajectories").glob("shard-*"))
    make_trajectories(run)
    assert len(list((run.path / "trajectories").glob("shard-*.npy"))) == 2


def test_a_signal_after_the_last_pass_is_not_lost(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def late(*args: Any) -> Trajectories | None:
        store = sample_trajectories(*args)
        signal.raise_signal(signal.SIGINT)
        return store

    with monkeypatch.context() as patch:
        patch.setattr(advkd.run.stages, "sample_trajectories", late)
        with pytest.raises(Interrupted):
            make_trajectories(run)
    earlier = run.path / "trajectories" / "seconds.json"
    assert read_json(earlier)["seconds"] > 0
    write_json(earlier, {"seconds": 1000.0})
    assert 1000 < make_trajectories(run) < 1100  # earlier calls count
    assert make_trajectories(run) < 100
    assert not StopSignals().requested


# Features.


def test_the_features_to_evaluate_by(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(advkd.run.evaluation, "FEATURE_STEPS", 2)
    make_trajectories(run)
    fitted = features_of(run)  # none ship for 8x8, and there are no images: on the trajectories
    assert (fitted.size, fitted.channels, fitted.num_classes) == (8, 1, None)
    assert (fitted.record["images"], fitted.record["data"]) == (12, "samples of the teacher")

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("fitted again")

    monkeypatch.setattr(advkd.run.evaluation, "fit_features", refuse)
    assert torch.equal(features_of(run).to_features.weight, fitted.to_features.weight)

    save_features(FeatureNet(1, 8, 3), tmp_path / "mine")
    given = Run(tmp_path, changed(evaluate={"features": str(tmp_path / "mine")}))
    assert features_of(given).num_classes == 3

    data = {"size": 28, "path": "fashion-mnist"}
    shipped = Run(tmp_path / "other", changed(data=data))
    assert (features_of(shipped).size, features_of(shipped).num_classes) == (28, 10)
    data["path"], config = "", changed(data=data, teacher={"source": "zoo:fashion-mnist"})
    assert features_of(Run(tmp_path / "other", config)).num_classes == 10


@pytest.mark.parametrize(
    ("size", "path"),
    [
        (28, "pictures.npz"),  # of the shape of Fashion-MNIST
        (14, "fashion-mnist"),  # in another shape than that of its features
    ],
)
def test_features_of_other_images_are_not_taken(
    size: int, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(advkd.run.evaluation, "FEATURE_STEPS", 1)
    monkeypatch.chdir(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 28, 28), dtype=np.uint8)
    np.savez(tmp_path / "pictures.npz", images=pixels)
    run = Run(tmp_path / "run", changed(data={"size": size, "path": path}))
    net = features_of(run)
    assert net.size == size and net.record["steps"] == 1
    assert (run.path / "features" / "config.json").is_file()


@pytest.mark.parametrize("flip", [True, False])
def test_features_are_fitted_as_the_data_may_be_flipped(
    run: Run, flip: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(advkd.run.evaluation, "FEATURE_STEPS", 1)
    make_trajectories(run)
    assert features_of(Run(run.path, changed(data={"flip": flip}))).record["flip"] is flip


# Pictures.


@pytest.mark.parametrize("target", ["denoised", "state"])
def test_pictures_show_teacher_and_student_from_the_same_noise(run: Run, target: str) -> None:
    config = changed(trajectory={"target": target})
    run = Run(run.path, config)
    pictures = pictures_of(run, 4)
    teacher, student = run.teacher(), run.student()
    assert pictures.data is None
    assert len(pictures.teacher) == len(pictures.student)
    num = len(pictures.teacher)
    noise = Noise(PICTURE_SEED, Purpose.EVALUATION)
    expected = generate(teacher, num, noise.seed, 4, purpose=noise.purpose)
    torch.testing.assert_close(pictures.teacher, expected, rtol=1e-4, atol=1e-4)
    x_T = noise.x_T(torch.arange(num), (1, 8, 8))
    torch.testing.assert_close(pictures.student, student(x_T).clamp(-1, 1), rtol=1e-4, atol=1e-4)
    assert [x.shape[-1] for x in pictures.heads] == [4, 8]
    assert [x.shape for x in pictures.trajectory] == [x.shape for x in pictures.heads]
    assert list(pictures.times) == [10, 0]  # of 20 times in 4 steps: 15, 10, 5, 0


def test_more_heads_than_steps_still_give_pictures(tmp_path: Path, run: Run) -> None:
    stages, widths = (4, 4, 4, 8, 8, 8), (8,) * 6
    student = StudentConfig(stages=stages, widths=widths, attention=(), groups=4)
    save_student(Student(student, 8, 1), tmp_path / "student")
    assert len(pictures_of(run, 2).heads) == 6


def test_a_report_is_made_anew_from_the_evaluation_that_stands(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", Config())
    report = run.path / "report"
    with run.opened():
        for stage in STAGES:
            run.finish(stage, 1.0)
        for name in ("summary.json", "report.html", "grid.png"):
            (report / name).write_text("{}")
    with run.opened("report"):
        assert run.is_done("evaluate") and not run.is_done("report")
        assert sorted(file.name for file in report.iterdir()) == [
            "evaluate.done.json",
            "summary.json",
        ]
    with run.opened("evaluate"):
        assert not report.exists()


def test_a_student_that_has_no_model_file_says_why(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ops.extension is None or isinstance(model_file_of(run), bytes)
    monkeypatch.setattr(advkd.deploy.model_file, "extension", None)
    assert str(model_file_of(run)).startswith("the C++ extension is not installed")


@pytest.mark.parametrize(
    ("path", "name"),
    [("hf:me/photos", "me/photos"), ("hf:/data/photos", ""), ("/data/photos", ""), ("", "")],
)
def test_a_model_card_names_a_data_set_of_the_hub(path: str, name: str) -> None:
    assert _of_hub(path) == name
