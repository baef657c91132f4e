"""Judging: which images are drawn, what is stored and when it is used again, speed, words."""

from __future__ import annotations

import dataclasses
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import advkd.evaluation.protocol
from advkd.config import StudentConfig, UNetConfig
from advkd.data.images import ImageSet
from advkd.diffusion import Schedule
from advkd.engine.sampling import EVALUATION_SEED, generate
from advkd.evaluation.metrics import (
    FeatureNet,
    Judged,
    extract,
    judge,
)
from advkd.evaluation.protocol import (
    REFERENCE_SEED,
    Protocol,
    Reference,
    drawing,
    evaluate_student,
    evaluate_teacher,
    images_hash,
    images_reference,
    make_protocol,
    measure_milliseconds,
    parameters,
    protocol_words,
    side_by_side,
    teacher_reference,
)
from advkd.models.student import Student
from advkd.models.unet import UNet

STUDENT = StudentConfig(stages=(4, 8), widths=(8, 8), attention=(), groups=4)
TEACHER = UNetConfig(
    sample_size=8,
    block_out_channels=(8, 16),
    down_block_types=("DownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "UpBlock2D"),
    layers_per_block=1,
    norm_num_groups=4,
)
NUM, STEPS = 20, 3


@pytest.fixture(scope="module")
def teacher() -> UNet:
    torch.manual_seed(0)
    return UNet(TEACHER, Schedule(num_train_timesteps=20)).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def student() -> Student:
    torch.manual_seed(0)
    return Student(STUDENT, 8, 1).eval().requires_grad_(False)


@pytest.fixture(scope="module", params=[None, 3], ids=["autoencoder", "classifier"])
def net(request: pytest.FixtureRequest) -> FeatureNet:
    torch.manual_seed(0)
    return FeatureNet(1, 8, request.param).eval()


def images(seed: int, count: int = 24) -> ImageSet:
    draw = np.random.default_rng(seed)
    return ImageSet(draw.integers(0, 256, (count, 1, 8, 8)).astype(np.uint8), None, f"seed {seed}")


@pytest.fixture
def reference(net: FeatureNet) -> Reference:
    return images_reference(net, images(0, 40), images(1))


@pytest.fixture
def protocol(net: FeatureNet, reference: Reference, teacher: UNet) -> Protocol:
    return make_protocol(net, reference, teacher, NUM, STEPS)


def test_the_reference_is_the_held_out_images(net: FeatureNet, reference: Reference) -> None:
    assert np.array_equal(reference.judged.features.values, extract(net, images(1)).values)
    assert reference.identity == images_hash(images(1))
    assert "24 held-out images of seed 1" in reference.words
    some = ImageSet(images(0, 40).pixels[:24], None, "")
    assert reference.real == judge(reference.judged, Judged(extract(net, some), some))


def test_figures_are_of_images_from_the_seeds_of_judging(
    net: FeatureNet, reference: Reference, protocol: Protocol, teacher: UNet, student: Student
) -> None:
    for found, drawn in (
        (
            evaluate_student(net, student, reference.judged, protocol),
            generate(student, NUM, EVALUATION_SEED),
        ),
        (
            evaluate_teacher(net, teacher, reference.judged, protocol),
            generate(teacher, NUM, EVALUATION_SEED, STEPS),
        ),
    ):
        expected = judge(reference.judged, Judged(extract(net, drawn), drawn))
        assert expected.keys() == found.keys()
        for key in ("fd", "kid", "precision", "recall", "swd"):
            assert found[key] == pytest.approx(expected[key], rel=1e-3, abs=1e-5)
        assert found["classes"] == expected["classes"]


def draws(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The seeds of every sampling from now on."""
    seeds: list[int] = []

    def counting(model: Any, num: int, seed: int, *args: Any, **kwargs: Any) -> torch.Tensor:
        seeds.append(seed)
        return generate(model, num, seed, *args, **kwargs)

    monkeypatch.setattr(advkd.judging, "generate", counting)
    return seeds


def test_a_stored_judgement_is_used_again(
    net: FeatureNet,
    reference: Reference,
    protocol: Protocol,
    teacher: UNet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seeds = draws(monkeypatch)
    own, other = tmp_path / "own", tmp_path / "other"
    first = evaluate_teacher(net, teacher, reference.judged, protocol, (other, own), keep=own)
    assert len(seeds) == 1
    again = evaluate_teacher(net, teacher, reference.judged, protocol, (other, own), keep=own)
    assert len(seeds) == 1
    assert again["swd"] == first["swd"]
    assert again["classes"] == first["classes"]
    for key in ("fd", "kid", "precision", "recall"):  # features are stored as float32
        assert again[key] == pytest.approx(first[key], rel=1e-5, abs=1e-8)
    assert not other.exists()


@pytest.mark.parametrize(
    "change",
    [
        {"num": NUM + 1},
        {"teacher_steps": STEPS + 1},
        {"teacher": "other"},
        {"features": "other"},
        {"reference": "other"},
        {"seed": EVALUATION_SEED + 5},
    ],
)
def test_a_judgement_by_another_protocol_is_not_used(
    net: FeatureNet,
    reference: Reference,
    protocol: Protocol,
    teacher: UNet,
    change: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    evaluate_teacher(net, teacher, reference.judged, protocol, keep=tmp_path)
    seeds = draws(monkeypatch)
    changed = dataclasses.replace(protocol, **change)
    evaluate_teacher(net, teacher, reference.judged, changed, (tmp_path,))
    assert seeds == [changed.seed]


@pytest.mark.parametrize("name", ["judged.json", "judged.safetensors"])
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_damaged_judgement_is_not_used(
    net: FeatureNet,
    reference: Reference,
    protocol: Protocol,
    teacher: UNet,
    name: str,
    damage: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    evaluate_teacher(net, teacher, reference.judged, protocol, keep=tmp_path)
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[:-20])
    if damage == "gone":
        path.unlink()
    seeds = draws(monkeypatch)
    evaluate_teacher(net, teacher, reference.judged, protocol, (tmp_path,))
    assert len(seeds) == 1


def test_protocols_tell_networks_and_images_apart(
    net: FeatureNet, reference: Reference, protocol: Protocol, teacher: UNet
) -> None:
    torch.manual_seed(1)
    other = UNet(TEACHER)
    assert make_protocol(net, reference, other, NUM, STEPS).teacher != protocol.teacher
    altered = images(1)
    altered.pixels[3, 0, 2, 2] ^= 1
    assert images_hash(altered) != images_hash(images(1)) == reference.identity
    as_float = ImageSet(images(1).pixels.astype(np.float32), None, "")
    assert images_hash(as_float) != reference.identity
    net.record, before = {"steps": 1}, net.record
    assert make_protocol(net, reference, teacher, NUM, STEPS) == protocol
    net.record = before
    assert protocol.seed >= 1 << 63


def test_without_images_other_samples_of_the_teacher_are_the_reference(
    net: FeatureNet, teacher: UNet, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds = draws(monkeypatch)
    reference = teacher_reference(net, teacher, NUM, STEPS)
    assert reference.real is None
    protocol = make_protocol(net, reference, teacher, NUM, STEPS)
    figures = evaluate_teacher(net, teacher, reference.judged, protocol)
    assert seeds == [REFERENCE_SEED, EVALUATION_SEED]
    assert figures["fd"] > 1e-6  # not the same images
    assert figures["swd"] is not None


def test_the_protocol_in_words(reference: Reference, protocol: Protocol) -> None:
    words = protocol_words(protocol, reference, "a small classifier that ships with advkd")
    for part in (
        f"{NUM} images of each network",
        f"DDIM in {STEPS} steps, eta 0",
        "24 held-out images of seed 1",
        "a small classifier that ships",
        "5 nearest neighbours",
    ):
        assert part in words
    alone = dataclasses.replace(protocol, teacher="")
    assert "DDIM" not in protocol_words(alone, reference, "x")


def test_side_by_side(reference: Reference) -> None:
    assert reference.real is not None
    figures = side_by_side({"real": reference.real, "teacher": None, "student": reference.real})
    assert set(figures) == {"fd", "kid", "precision", "recall", "swd", "classes"}
    assert all(list(values) == ["real", "student"] for values in figures.values())
    assert figures["fd"]["student"] == reference.real["fd"]


def test_milliseconds_are_of_as_many_passes_as_told(
    teacher: UNet, student: Student, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, int, int]] = []

    def counting(model: Any, num: int, seed: int, steps: int, **kwargs: Any) -> torch.Tensor:
        calls.append((type(model).__name__, steps, kwargs["batch"]))
        return generate(model, num, seed, steps, **kwargs)

    monkeypatch.setattr(advkd.judging, "generate", counting)
    found = measure_milliseconds(teacher, student, STEPS, images=4)
    assert set(found) == {"teacher", "student"}
    assert all(value > 0 for value in found.values())
    assert len({batch for _, _, batch in calls}) == 1  # the same for both
    assert calls.count(("UNet", STEPS, calls[0][2])) == advkd.evaluation.protocol.TIMED_ROUNDS
    assert {steps for name, steps, _ in calls if name == "Student"} == {1}


def test_parameters() -> None:
    assert parameters(torch.nn.Linear(3, 5)) == 20


@pytest.mark.parametrize("when", ["in a pass", "after the last"])
def test_a_signal_while_drawing_stops_it(when: str) -> None:
    before = signal.getsignal(signal.SIGINT)
    passes = 0
    with pytest.raises(KeyboardInterrupt), drawing(1) as report:
        for done in range(1, 5):
            report(done, 4)
            passes += 1
            if done == (2 if when == "in a pass" else 4):
                signal.raise_signal(signal.SIGINT)
    assert passes == (2 if when == "in a pass" else 4)
    assert signal.getsignal(signal.SIGINT) == before
