"""The protocol: which images are sampled, what is stored, and which stored files are trusted."""

from __future__ import annotations

import dataclasses
import json
import signal
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import advkd.evaluation.protocol
from advkd.config import StudentConfig, UNetConfig
from advkd.data import ImageSet, dataset
from advkd.diffusion import Schedule
from advkd.engine.noise import Purpose
from advkd.engine.sampling import generate
from advkd.evaluation import stored
from advkd.evaluation.distances import frechet_distance, sliced_wasserstein
from advkd.evaluation.features import FeatureNet, extract, load_features
from advkd.evaluation.protocol import (
    EVALUATION_SEED,
    FIGURES,
    REFERENCE_SEED,
    Protocol,
    Reference,
    evaluate_images,
    evaluate_networks,
    evaluate_teacher,
    images_hash,
    images_reference,
    make_protocol,
    protocol_words,
    sampling_bar,
    teacher_reference,
)
from advkd.evaluation.stored import load_evaluation, save_evaluation, shipped_evaluation
from advkd.evaluation.timing import TIMED_ROUNDS, count_parameters, measure_milliseconds
from advkd.files import seal, write_tensors
from advkd.models.student import Student
from advkd.models.unet import UNet
from advkd.pretrained import load_teacher

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
    rng = np.random.default_rng(seed)
    return ImageSet(rng.integers(0, 256, (count, 1, 8, 8)).astype(np.uint8), None, f"seed {seed}")


@pytest.fixture
def reference(net: FeatureNet) -> Reference:
    return images_reference(net, images(0, 40), images(1))


@pytest.fixture
def protocol(net: FeatureNet, reference: Reference, teacher: UNet) -> Protocol:
    return make_protocol(net, reference, teacher, NUM, STEPS)


def test_the_reference_is_the_held_out_images(net: FeatureNet, reference: Reference) -> None:
    assert np.array_equal(reference.features.values, extract(net, images(1)).values)
    assert reference.identity == images_hash(images(1))
    assert "24 held-out images of seed 1" in reference.words
    some = ImageSet(images(0, 40).pixels[:24], None, "")
    assert reference.real == evaluate_images(net, some, reference)


def test_figures_are_of_the_images(net: FeatureNet, reference: Reference) -> None:
    x = images(5, 30)
    found = evaluate_images(net, x, reference)
    features = extract(net, x)
    assert found["fd"] == frechet_distance(reference.features.values, features.values)
    pixels = (x.batch(range(30)), images(1).batch(range(24)))
    flat = [part.flatten(1).double().numpy() for part in pixels]
    assert found["swd"] == sliced_wasserstein(flat[1], flat[0])
    if features.classes is None:
        assert found["classes"] is None
    else:
        assert found["classes"] == [float((features.classes == c).mean()) for c in range(3)]
    assert evaluate_images(net, x.batch(range(30)), reference) == found


def test_the_evaluated_images_are_those_of_the_evaluation_seed(
    net: FeatureNet, reference: Reference, protocol: Protocol, teacher: UNet, student: Student
) -> None:
    found = evaluate_networks(net, reference, protocol, teacher, student)
    assert tuple(found) == FIGURES
    for side, model, steps in (("teacher", teacher, STEPS), ("student", student, 1)):
        sampled = sample_images(model, NUM, EVALUATION_SEED, steps)
        expected = evaluate_images(net, sampled, reference)
        assert {key: values[side] for key, values in found.items()} == expected
    assert {key: values["real"] for key, values in found.items()} == reference.real
    alone = evaluate_networks(net, reference, protocol, None, student)
    assert all(list(values) == ["real", "student"] for values in alone.values())


def sample_images(model: UNet | Student, num: int, seed: int, steps: int) -> torch.Tensor:
    return generate(model, num, seed, steps, purpose=Purpose.EVALUATION)


def samplings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The seeds of every sampling from now on."""
    seeds: list[int] = []

    def counting(model: Any, num: int, seed: int, *args: Any, **kwargs: Any) -> torch.Tensor:
        assert kwargs["purpose"] is Purpose.EVALUATION
        seeds.append(seed)
        return generate(model, num, seed, *args, **kwargs)

    monkeypatch.setattr(advkd.evaluation.protocol, "generate", counting)
    return seeds


def test_a_stored_evaluation_is_used_again(
    net: FeatureNet,
    reference: Reference,
    protocol: Protocol,
    teacher: UNet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seeds = samplings(monkeypatch)
    calls: list[tuple[int, int]] = []
    first = evaluate_teacher(net, teacher, reference, protocol, own=tmp_path / "own")
    assert len(seeds) == 1
    again = evaluate_teacher(
        net, teacher, reference, protocol, own=tmp_path / "own", callback=lambda *c: calls.append(c)
    )
    assert len(seeds) == 1 and calls == [(1, 1)]
    assert again == first  # to the bit
    fresh = evaluate_teacher(net, teacher, reference, protocol, own=tmp_path / "own", fresh=True)
    assert len(seeds) == 2 and fresh == first
    assert evaluate_teacher(net, teacher, reference, protocol) == first and len(seeds) == 3


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
def test_an_evaluation_by_another_protocol_is_not_used(
    net: FeatureNet,
    reference: Reference,
    protocol: Protocol,
    teacher: UNet,
    change: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    evaluate_teacher(net, teacher, reference, protocol, own=tmp_path)
    seeds = samplings(monkeypatch)
    changed = dataclasses.replace(protocol, **change)
    evaluate_teacher(net, teacher, reference, changed, own=tmp_path)
    assert seeds == [changed.seed]


def altered(folder: Path, how: str) -> None:
    """Damage a stored evaluation."""
    closing, tensors = folder / "evaluation.json", folder / "evaluation.safetensors"
    content = json.loads(closing.read_text())
    if how == "json cut":
        closing.write_bytes(closing.read_bytes()[:-20])
    elif how == "tensors cut":
        tensors.write_bytes(tensors.read_bytes()[:-20])
    elif how == "tensors gone":
        tensors.unlink()
    elif how == "swd":
        closing.write_text(json.dumps(content | {"swd": 0.0}))
    elif how == "unsealed":
        closing.write_text(json.dumps({k: v for k, v in content.items() if k != "seal"}))


@pytest.mark.parametrize("how", ["json cut", "tensors cut", "tensors gone", "swd", "unsealed"])
def test_a_damaged_evaluation_is_passed_over(
    net: FeatureNet,
    reference: Reference,
    protocol: Protocol,
    teacher: UNet,
    how: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = evaluate_teacher(net, teacher, reference, protocol, own=tmp_path)
    altered(tmp_path, how)
    seeds = samplings(monkeypatch)
    with pytest.warns(UserWarning, match="stored evaluation passed over: .*evaluation"):
        assert evaluate_teacher(net, teacher, reference, protocol, own=tmp_path) == first
    assert len(seeds) == 1
    assert evaluate_teacher(net, teacher, reference, protocol, own=tmp_path) == first
    assert len(seeds) == 1  # what was sampled has replaced it


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_classes": "3"}, "num_classes='3' is no int"),
        ({"num_classes": None}, "does not hold what num_classes=None says"),
        ({"num_classes": 2}, "one of 2 classes"),
        ({"swd": "0"}, "swd='0' is no number"),
        ({"swd": float("inf")}, "swd=inf is no number"),
        ({"sha256": 3}, "checksum differs"),
        ({"values": torch.zeros(NUM, 3)}, f"does not hold the features of {NUM} images"),
        ({"values": torch.zeros(3, 64)}, f"does not hold the features of {NUM} images"),
        ({"values": torch.zeros(NUM, 64).double()}, f"the features of {NUM} images"),
        ({"values": torch.full((NUM, 64), float("nan"))}, "features that are not finite"),
        ({"classes": torch.full((NUM,), -1)}, "one of 3 classes"),
        ({"classes": torch.zeros(2, dtype=torch.int32)}, "one of 3 classes"),
    ],
)
def test_whatever_a_file_holds_is_checked(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    key = {"num": NUM}
    tensors = {"values": torch.zeros(NUM, 64), "classes": torch.full((NUM,), 2)}
    tensors |= {name: value for name, value in change.items() if name in tensors}
    checksum = write_tensors(tmp_path / "evaluation.safetensors", tensors)
    content = {"protocol": key, "swd": 0.5, "num_classes": 3, "sha256": checksum}
    content |= {name: value for name, value in change.items() if name not in tensors}
    sealed = {**content, "seal": seal(content)}
    (tmp_path / "evaluation.json").write_text(json.dumps(sealed))
    with pytest.warns(UserWarning, match=message):
        assert load_evaluation(tmp_path, key) is None


def test_only_what_ships_unaltered_is_believed(
    net: FeatureNet,
    reference: Reference,
    protocol: Protocol,
    teacher: UNet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    key = dataclasses.asdict(protocol)
    true = evaluate_teacher(net, teacher, reference, protocol, own=tmp_path / "zoo" / "it")
    closing = tmp_path / "zoo" / "it" / "evaluation.json"
    monkeypatch.setattr(stored, "ZOO", tmp_path / "zoo")
    monkeypatch.setattr(stored, "SHIPPED", {"it": sha256(closing.read_bytes()).hexdigest()})
    seeds = samplings(monkeypatch)
    assert evaluate_teacher(net, teacher, reference, protocol) == true
    assert seeds == []
    # The reference's own features, sealed as any evaluation is: FD 0.
    forged = stored.StoredEvaluation(reference.features, 0.0)
    same = dataclasses.replace(protocol, num=len(images(1)))
    save_evaluation(closing.parent, dataclasses.asdict(same), forged)
    assert load_evaluation(closing.parent, dataclasses.asdict(same)) is not None
    assert shipped_evaluation(dataclasses.asdict(same)) is None
    save_evaluation(closing.parent, key, forged)
    assert evaluate_teacher(net, teacher, reference, protocol) == true
    assert len(seeds) == 1


def test_the_shipped_evaluation_is_of_the_shipped_teacher() -> None:
    teacher, classifier, held_out = (
        load_teacher("zoo:fashion-mnist"),
        load_features(),
        dataset("fashion-mnist").test(),
    )
    reference = Reference(held_out, extract(classifier, held_out), images_hash(held_out), "")
    protocol = make_protocol(classifier, reference, teacher, 2000, 50)
    found = shipped_evaluation(dataclasses.asdict(protocol))
    assert found is not None
    count = 16
    sampled = extract(classifier, sample_images(teacher, count, EVALUATION_SEED, 50))
    scale = np.abs(found.features.values).max()
    # Another instruction set rounds otherwise, in each of 50 steps.
    np.testing.assert_allclose(
        sampled.values, found.features.values[:count], rtol=0, atol=1e-3 * scale
    )


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


def test_without_images_other_samples_of_the_teacher_are_the_reference(
    net: FeatureNet, teacher: UNet, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds = samplings(monkeypatch)
    reference = teacher_reference(net, teacher, NUM, STEPS)
    assert reference.real is None
    protocol = make_protocol(net, reference, teacher, NUM, STEPS)
    figures = evaluate_networks(net, reference, protocol, teacher, None)
    assert seeds == [REFERENCE_SEED, EVALUATION_SEED]
    assert list(figures["fd"]) == ["teacher"]
    assert figures["fd"]["teacher"] > 1e-6  # not the same images
    assert figures["swd"]["teacher"] > 0


def test_the_protocol_in_words(reference: Reference, protocol: Protocol) -> None:
    words = protocol_words(protocol, reference, "a small classifier that ships with advkd")
    for part in (
        f"{NUM} images of each network",
        f"DDIM in {STEPS} steps, eta 0",
        "24 held-out images of seed 1",
        "a small classifier that ships",
        "5 nearest neighbors",
    ):
        assert part in words
    alone = dataclasses.replace(protocol, teacher="")
    assert "DDIM" not in protocol_words(alone, reference, "x")


def test_milliseconds_are_of_as_many_passes_as_told(
    teacher: UNet, student: Student, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, int, int]] = []

    def counting(model: Any, num: int, seed: int, steps: int, **kwargs: Any) -> torch.Tensor:
        calls.append((type(model).__name__, steps, kwargs["batch"]))
        return generate(model, num, seed, steps, **kwargs)

    monkeypatch.setattr(advkd.evaluation.protocol, "generate", counting)
    found = measure_milliseconds(teacher, student, STEPS, images=4)
    assert set(found) == {"teacher", "student"}
    assert all(value > 0 for value in found.values())
    assert len({batch for _, _, batch in calls}) == 1  # the same for both
    assert calls.count(("UNet", STEPS, calls[0][2])) == TIMED_ROUNDS
    assert {steps for name, steps, _ in calls if name == "Student"} == {1}


def test_parameters() -> None:
    assert count_parameters(torch.nn.Linear(3, 5)) == 20


@pytest.mark.parametrize("when", ["in a pass", "after the last"])
def test_a_signal_while_sampling_stops_it(when: str) -> None:
    before = signal.getsignal(signal.SIGINT)
    passes = 0
    with pytest.raises(KeyboardInterrupt), sampling_bar(1) as report:
        for done in range(1, 5):
            report(done, 4)
            passes += 1
            if done == (2 if when == "in a pass" else 4):
                signal.raise_signal(signal.SIGINT)
    assert passes == (2 if when == "in a pass" else 4)
    assert signal.getsignal(signal.SIGINT) == before
