"""The command that evaluates: its figures are the protocol's, its options fit or are refused."""

from __future__ import annotations

import dataclasses
import shutil
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import advkd.evaluation.protocol
from advkd.config import (
    Config,
    DataConfig,
    EvaluateConfig,
    StudentConfig,
    UNetConfig,
    to_toml,
)
from advkd.data import dataset, load_images
from advkd.data.split import hold_out
from advkd.diffusion import Schedule
from advkd.engine.noise import Purpose
from advkd.engine.sampling import generate
from advkd.evaluate import (
    main,
    mode_of,
    parser,
)
from advkd.evaluation.distances import frechet_distance, precision_recall
from advkd.evaluation.features import (
    FeatureNet,
    accuracy,
    extract,
    load_features,
    save_features,
)
from advkd.evaluation.figures import compare, evaluation_of, measure
from advkd.evaluation.protocol import EVALUATION_SEED, images_reference, make_protocol
from advkd.evaluation.stored import load_evaluation, save_evaluation
from advkd.models.student import Student
from advkd.models.unet import UNet
from advkd.pretrained import (
    load_student,
    load_teacher,
    resolve,
    save_student,
    save_teacher,
)
from advkd.run.folder import FORMAT
from advkd.run.run import Run

STUDENT = StudentConfig(stages=(4, 8), widths=(8, 8), attention=(4,), groups=4)
TEACHER = UNetConfig(
    sample_size=8,
    block_out_channels=(8, 8),
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    layers_per_block=1,
    norm_num_groups=4,
)
IMAGES, NUM, BLOCKS, STEPS = 60, 20, 2, 3
TEXTURE = {"Texture FD ↓": "texture_fd", "Texture SWD ↓": "texture_swd", "Spectrum ↓": "spectrum"}


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images of two classes, features, a student and a teacher, all 1x8x8."""
    folder = tmp_path_factory.mktemp("given")
    draw = np.random.default_rng(0)
    labels = np.arange(IMAGES) % 2
    pixels = draw.integers(0, 128, (IMAGES, 1, 8, 8)) + 100 * labels[:, None, None, None]
    np.savez(folder / "images.npz", images=pixels.astype(np.uint8), labels=labels)
    np.savez(folder / "unlabelled.npz", images=pixels.astype(np.uint8))
    torch.manual_seed(0)
    save_student(Student(STUDENT, 8, 1), folder / "student")
    save_teacher(UNet(TEACHER, Schedule()), folder / "teacher")
    arguments = ["--fit-features", str(folder / "images.npz"), "--steps", "20"]
    assert main([*arguments, "--out", str(folder / "features")]) == 0
    return folder


@pytest.fixture
def networks(given: Path) -> list[str]:
    """Arguments that evaluate the networks on their own."""
    options = {"data": "images.npz", "features": "features"}
    files = [word for name, file in options.items() for word in (f"--{name}", str(given / file))]
    options = {"num": NUM, "blocks": 1, "teacher-steps": STEPS}
    return [*files, *(word for name, n in options.items() for word in (f"--{name}", str(n)))]


def _figures(output: str) -> dict[str, dict[str, str]]:
    """The printed table as text by row and column."""
    header, *rows = output.split("\n\n")[0].splitlines()
    columns = header.split()
    cells = [row.replace(" ± ", "±").rsplit(maxsplit=len(columns)) for row in rows]
    return {name: dict(zip(columns, row, strict=True)) for name, *row in cells}


def test_fitted_features(given: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "features"
    arguments = ["--fit-features", str(given / "images.npz"), "--out", str(out)]
    assert main([*arguments, "--steps", "20", "--seed", "1", "--no-flip"]) == 0
    net = load_features(out)
    images = hold_out(load_images(given / "images.npz"))
    right = accuracy(net, images.held_out)
    assert capsys.readouterr().out == (
        f"{out}: a small classifier and autoencoder, {100 * right:.2f}% right "
        "on 12 held-out images\n"
    )
    assert net.record["steps"] == 20 and net.record["seed"] == 1 and not net.record["flip"]
    assert net.record["held_out_accuracy"] == right and net.record["images"] == 48

    assert main(arguments) == 1
    assert "holds features already" in capsys.readouterr().err


def test_features_of_a_data_set_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("shipped", "fashion-mnist"):
        out = tmp_path / name
        assert main(["--fit-features", name, "--out", str(out), "--steps", "1"]) == 0
        assert "right on 2,000 held-out images" in capsys.readouterr().out
        net = load_features(out)
        assert net.record["images"] == 10_000
        shipped = load_features(resolve(dataset("fashion-mnist").features_source))
        assert net.class_names == shipped.class_names
        assert net.class_names is not None and net.class_names[5] == "sandal"


def test_features_mind_which_images_may_be_mirrored(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "features"
    assert main(["--fit-features", "avatars", "--out", str(out), "--steps", "1"]) == 0
    assert "right on 2,100 held-out images" in capsys.readouterr().out
    net = load_features(out)
    assert (net.channels, net.size, net.record["flip"]) == (3, 32, False)
    assert net.class_names == ("pixel-art", "open-peeps", "lorelei")


def test_fitted_autoencoder(
    given: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "features"
    data = given / "unlabelled.npz"
    assert main(["--fit-features", str(data), "--out", str(out), "--steps", "5"]) == 0
    net = load_features(out)
    assert net.num_classes is None
    held_out = hold_out(load_images(data)).held_out
    x = held_out.batch(np.arange(len(held_out)))
    with torch.inference_mode():
        error = float((net(x).images - x).square().mean())
    expected = f"{out}: a small autoencoder, mean squared error {error:.4f} on 12 held-out images\n"
    assert capsys.readouterr().out == expected


def test_networks_on_their_own(
    given: Path, networks: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    both = ["--student", str(given / "student"), "--teacher", str(given / "teacher")]
    assert main([*both, *networks]) == 0
    said = capsys.readouterr().out
    figures = _figures(said)
    assert list(figures["FD ↓"]) == ["real", "teacher", "student"]

    images = hold_out(load_images(given / "images.npz"))
    net = load_features(given / "features")
    held_out = measure(net, images.held_out)
    real = held_out.features.values
    sampled = {
        "teacher": _sampled(load_teacher(given / "teacher"), STEPS),
        "student": _sampled(load_student(given / "student"), 1),
    }
    for side, samples in sampled.items():
        fake = extract(net, samples)
        expected = frechet_distance(real, fake.values)
        assert float(figures["FD ↓"][side]) == pytest.approx(expected, rel=1e-3)
        precision, recall = precision_recall(real, fake.values)
        assert float(figures["Precision ↑"][side]) == pytest.approx(precision, abs=6e-4)
        assert float(figures["Recall ↑"][side]) == pytest.approx(recall, abs=6e-4)
        block = compare(held_out, measure(net, samples))
        for label, key in TEXTURE.items():
            assert float(figures[label][side].replace(",", "")) == pytest.approx(
                block[key], rel=0.05
            )
        assert fake.classes is not None
        share = 100 * float((fake.classes == 1).mean())
        assert float(figures["class 1, %"][side]) == pytest.approx(share, abs=0.06)
    words = " ".join(said.split("\n\n")[1].split())
    assert words.startswith("20 images of each network (the teacher by DDIM in")
    assert f"DDIM in {STEPS} steps" in words and "12 held-out images" in words
    assert f"a small classifier and autoencoder ({given / 'features'})" in words


def test_blocks_have_a_spread(
    given: Path, networks: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    split = ["--num", str(2 * NUM), "--blocks", "2"]
    assert main(["--student", str(given / "student"), *networks, *split]) == 0
    said = capsys.readouterr().out
    images, net = hold_out(load_images(given / "images.npz")), load_features(given / "features")
    held_out = measure(net, images.held_out)
    sampled = _sampled(load_student(given / "student"), 1, 2 * NUM)
    blocks = [compare(held_out, measure(net, part)) for part in sampled.split(NUM)]
    figures = _figures(said)
    for label, key in {"FD ↓": "fd", **TEXTURE}.items():
        mean, spread = map(float, figures[label]["student"].replace(",", "").split("±"))
        values = [block[key] for block in blocks]
        assert mean == pytest.approx(statistics.fmean(values), rel=0.01)
        assert spread == pytest.approx(statistics.stdev(values), abs=0.01 * mean)
    words = " ".join(said.split("\n\n")[1].split())
    assert "40 images of each network, in 2 blocks of 20" in words


def test_blocks_that_cannot_be(
    given: Path, networks: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    for blocks in (0, 4, 10**12):
        arguments = ["--student", str(given / "student"), *networks, "--blocks", str(blocks)]
        assert main(arguments) == 1
        said = capsys.readouterr()
        assert f"20 images cannot be split into {blocks} blocks of 6 or more" in said.err
        assert said.out == ""


def _sampled(model: Any, steps: int, num: int = NUM) -> torch.Tensor:
    return generate(model, num, EVALUATION_SEED, steps, purpose=Purpose.EVALUATION)


def test_a_student_alone(
    given: Path, networks: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--student", str(given / "student"), *networks]) == 0
    said = capsys.readouterr().out
    assert list(_figures(said)["FD ↓"]) == ["real", "student"]
    assert "DDIM" not in said


def test_a_run_and_its_stored_evaluation(
    given: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = _run(given, tmp_path / "run")
    sampled = _watch_sampling(monkeypatch)
    assert main(["--run", str(run.path)]) == 0
    first = capsys.readouterr().out
    teacher, student = [UNet] * BLOCKS, [Student] * BLOCKS
    assert sampled == [*teacher, *student]
    assert (run.path / "evaluation" / "evaluation.json").is_file()

    assert main(["--run", str(run.path)]) == 0
    assert sampled == [*teacher, *student, *student]
    assert main(["--run", str(run.path), "--fresh"]) == 0
    assert sampled == [*teacher, *student, *student, *teacher, *student]
    assert capsys.readouterr().out == first * 2  # the very same figures, stored or sampled
    assert list(_figures(first)["KID ↓"]) == ["real", "teacher", "student"]
    assert f"{NUM} images of each network" in first

    # Other steps are another protocol, for which nothing is stored.
    other = dataclasses.replace(run.config.evaluate, teacher_steps=STEPS + 1)
    config = dataclasses.replace(run.config, evaluate=other)
    _configure(run.path, config)
    assert main(["--run", str(run.path)]) == 0
    assert sampled[-2 * BLOCKS :] == [*teacher, *student]


def test_what_lies_beside_a_given_teacher_is_not_believed(
    given: Path, networks: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An evaluation by the very protocol, whose images are the reference's own: FD 0."""
    folder = tmp_path / "teacher"
    shutil.copytree(given / "teacher", folder)
    arguments = ["--teacher", str(folder), *networks]
    assert main(arguments) == 0
    before = capsys.readouterr().out

    images, net = hold_out(load_images(given / "images.npz")), load_features(given / "features")
    reference = images_reference(net, images.train, images.held_out)
    protocol = make_protocol(net, reference, load_teacher(folder), NUM, 1, STEPS)
    forged = evaluation_of(reference.measures, [reference.measures])
    assert forged.figure("fd") < 1e-6
    save_evaluation(folder, dataclasses.asdict(protocol), forged)
    assert load_evaluation(folder, dataclasses.asdict(protocol)) == forged
    shutil.copy(folder / "evaluation.json", folder / "judged.json")  # as version 0.1 called it
    assert main(arguments) == 0
    assert capsys.readouterr().out == before
    assert float(_figures(before)["FD ↓"]["teacher"]) > 1


def test_a_run_needs_no_other_folder(
    given: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its own copy of the teacher is evaluated; the folder that it was copied from may be gone."""
    run = _run(given, tmp_path / "run")
    teacher = dataclasses.replace(run.config.teacher, source=str(tmp_path / "gone"))
    _configure(run.path, dataclasses.replace(run.config, teacher=teacher))
    assert main(["--run", str(run.path)]) == 0
    assert list(_figures(capsys.readouterr().out)["FD ↓"]) == ["real", "teacher", "student"]


def _configure(folder: Path, config: Config) -> None:
    """Give a run's folder another configuration."""
    (folder / "config.toml").write_text(f"format = {FORMAT}\n{to_toml(config)}")


def _run(given: Path, folder: Path) -> Run:
    """A run whose teacher and student stand."""
    config = Config(
        data=DataConfig(path=str(given / "images.npz"), size=8),
        evaluate=EvaluateConfig(
            num=NUM, blocks=BLOCKS, teacher_steps=STEPS, features=str(given / "features")
        ),
    )
    run = Run(folder, config)
    with run.opened():
        save_teacher(load_teacher(given / "teacher"), folder / "teacher")
        save_student(load_student(given / "student"), folder / "student")
        run.finish("teacher", 1.0)
        run.finish("distill", 1.0)
    return run


def _watch_sampling(monkeypatch: pytest.MonkeyPatch) -> list[type]:
    """The kinds of networks that are sampled, in order."""
    sampled: list[type] = []

    def watched(model: Any, *arguments: Any, **settings: Any) -> Any:
        sampled.append(type(model))
        return generate(model, *arguments, **settings)

    monkeypatch.setattr(advkd.evaluation.protocol, "generate", watched)
    return sampled


def test_runs_that_cannot_be_evaluated(
    given: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--run", str(tmp_path)]) == 1
    assert "is no run of advkd train" in capsys.readouterr().err
    run = _run(given, tmp_path / "run")
    run.marker("distill").unlink()
    assert main(["--run", str(run.path)]) == 1
    assert "has not finished stage distill" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either --run, or --student and --teacher, or --fit-features"),
        (["--run", "a", "--student", "b"], "give either --run"),
        (["--run", "a", "--num", "5"], "--num does not go with --run"),
        (["--run", "a", "--blocks", "5"], "--blocks does not go with --run"),
        (["--student", "a", "--steps", "5"], "--steps does not go with --student or --teacher"),
        (["--fit-features", "a", "--fresh"], "--fresh does not go with --fit-features"),
        (["--fit-features", "shipped"], "--fit-features needs --out FOLDER"),
        (["--student", "absent"], "there is no folder absent"),
    ],
)
def test_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 1
    said = capsys.readouterr()
    assert said.out == "" and message in said.err and said.err.count("\n") == 1


def test_networks_that_do_not_fit(
    given: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    student = ["--student", str(given / "student")]
    assert main(student) == 1
    assert "no data set ships with 8x8 pixels" in capsys.readouterr().err
    assert main([*student, "--data", str(given / "images.npz")]) == 1
    assert "give --features FOLDER" in capsys.readouterr().err
    save_student(Student(STUDENT, 8, 3), tmp_path / "rgb")
    assert main(["--student", str(tmp_path / "rgb"), "--teacher", str(given / "teacher")]) == 1
    assert "different sizes or channels" in capsys.readouterr().err


def test_networks_on_their_own_are_compared_with_what_ships_in_their_shape(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And the protocol says which data set that is."""
    config = StudentConfig(stages=(16, 32), widths=(8, 8), attention=(), groups=4)
    save_student(Student(config, 32, 3), tmp_path / "student")
    save_features(FeatureNet(3, 32), tmp_path / "features")
    arguments = ["--student", str(tmp_path / "student"), "--num", "6", "--blocks", "1"]
    for given in ([], ["--features", str(tmp_path / "features")]):
        assert main([*arguments, *given]) == 0
        words = " ".join(capsys.readouterr().out.split())
        assert "compared with 2,100 held-out images of Avatars (test)." in words
        assert ("autoencoder that comes with Avatars" in words) is not bool(given)


def test_features_that_ship_are_for_the_images_that_they_come_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = StudentConfig(stages=(14, 28), widths=(8, 8), attention=(), groups=4)
    save_student(Student(config, 28, 1), tmp_path / "student")
    np.savez(tmp_path / "own.npz", images=np.zeros((40, 28, 28), np.uint8))
    arguments = ["--student", str(tmp_path / "student"), "--num", "6", "--blocks", "1"]
    assert main([*arguments, "--data", str(tmp_path / "own.npz")]) == 1
    assert "no features come with these images of 1x28x28: fit some" in capsys.readouterr().err
    assert main([*arguments, "--data", "avatars"]) == 1
    assert "no features come with Avatars of 1x28x28: fit some" in capsys.readouterr().err
    for data in ([], ["--data", "fashion-mnist"]):
        assert main([*arguments, *data]) == 0
        words = " ".join(capsys.readouterr().out.split()).replace("Fashion- MNIST", "Fashion-MNIST")
        assert "held-out images of Fashion-MNIST (test)." in words
        assert "a small classifier that comes with Fashion-MNIST" in words


def test_modes() -> None:
    assert mode_of(parser().parse_args(["--run", "a", "--fresh"])) == "run"
    assert mode_of(parser().parse_args(["--teacher", "a", "--num", "9", "--fresh"])) == "networks"
    assert mode_of(parser().parse_args(["--fit-features", "a", "--no-crop"])) == "fit_features"


def test_holding_out_takes_every_image_once() -> None:
    images = dataset("fashion-mnist").test()
    parts = hold_out(images)
    assert len(parts.held_out) == 400 and len(parts.train) == 1600
    together = np.concatenate([parts.train.pixels, parts.held_out.pixels])
    assert sorted(p.tobytes() for p in together) == sorted(p.tobytes() for p in images.pixels)
    again = hold_out(images)
    assert np.array_equal(again.held_out.pixels, parts.held_out.pixels)
