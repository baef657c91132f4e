"""The protocol: which images are sampled, what is stored, and which stored files are trusted."""

from __future__ import annotations

import dataclasses
import json
import signal
import statistics
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import advkd.evaluation.protocol
import advkd.evaluation.timing
from advkd.config import ConfigError, StudentConfig, UNetConfig
from advkd.console import progress_bar
from advkd.data import ImageSet, for_shape
from advkd.diffusion import Schedule
from advkd.engine.noise import Purpose
from advkd.engine.sampling import generate
from advkd.evaluate import BLOCKS as DEFAULT_BLOCKS
from advkd.evaluate import NUM as DEFAULT_NUM
from advkd.evaluate import TEACHER_STEPS
from advkd.evaluation import figures, stored
from advkd.evaluation.distances import frechet_distance, projected, sliced_wasserstein
from advkd.evaluation.features import FeatureNet, extract, load_features
from advkd.evaluation.figures import (
    FIGURES,
    Evaluation,
    Images,
    Measures,
    compare,
    evaluation_of,
    measure,
)
from advkd.evaluation.protocol import (
    EVALUATION_SEED,
    REFERENCE_SEED,
    Protocol,
    Reference,
    evaluate_network,
    evaluate_networks,
    evaluate_real,
    evaluate_teacher,
    images_hash,
    images_reference,
    make_protocol,
    protocol_words,
    sampling_bar,
    teacher_reference,
)
from advkd.evaluation.stored import load_evaluation, save_evaluation, shipped_evaluation
from advkd.evaluation.texture import (
    DIRECTIONS,
    PATCHES,
    band_patches,
    decibels,
    power_spectra,
    spectrum_distance,
    texture_distance,
)
from advkd.evaluation.timing import TIMED_ROUNDS, count_parameters, measure_milliseconds
from advkd.files import seal
from advkd.models.student import Student
from advkd.models.unet import UNet
from advkd.pretrained import load_teacher, resolve

STUDENT = StudentConfig(stages=(4, 8), widths=(8, 8), attention=(), groups=4)
TEACHER = UNetConfig(
    sample_size=8,
    block_out_channels=(8, 16),
    down_block_types=("DownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "UpBlock2D"),
    layers_per_block=1,
    norm_num_groups=4,
)
NUM, BLOCKS, STEPS = 40, 2, 3


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
    return make_protocol(net, reference, teacher, NUM, BLOCKS, STEPS)


def figures_of(net: FeatureNet, reference: Reference, x: Images) -> dict[str, Any]:
    """The figures of one block."""
    return compare(reference.measures, measure(net, x))


def test_the_reference_is_the_held_out_images(net: FeatureNet, reference: Reference) -> None:
    features = extract(net, images(1))
    assert np.array_equal(reference.measures.features.values, features.values)
    assert np.array_equal(reference.measures.features.texture, features.texture)
    assert reference.identity == images_hash(images(1))
    assert "24 held-out images of seed 1" in reference.words
    assert reference.train is not None
    assert np.array_equal(reference.train.pixels, images(0, 40).pixels)


@pytest.mark.parametrize(
    ("count", "num", "blocks", "sizes"),
    [
        (40, NUM, BLOCKS, [20, 20]),
        (40, 30, 1, [30]),
        (50, 60, 3, [20, 20]),  # not as many blocks as of a network
        (15, NUM, BLOCKS, [15]),
    ],
)
def test_real_blocks_are_training_images_each_once(
    net: FeatureNet,
    reference: Reference,
    protocol: Protocol,
    count: int,
    num: int,
    blocks: int,
    sizes: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    train = images(0, count)
    seen: list[ImageSet] = []

    def watched(net: FeatureNet, part: ImageSet) -> Measures:
        seen.append(part)
        return measure(net, part)

    monkeypatch.setattr(advkd.evaluation.protocol, "measure", watched)
    given = dataclasses.replace(reference, train=train)
    wanted = dataclasses.replace(protocol, num=num, blocks=blocks)
    found = evaluate_real(net, given, wanted)
    assert [len(part) for part in seen] == sizes
    assert found.blocks == [figures_of(net, reference, part) for part in seen]
    names = [pixels.tobytes() for part in seen for pixels in part.pixels]
    assert len(set(names)) == len(names)
    assert set(names) <= {pixels.tobytes() for pixels in train.pixels}
    # An order that is random but fixed.
    assert names != [pixels.tobytes() for pixels in train.pixels[: len(names)]]
    assert evaluate_real(net, given, wanted) == found


def test_figures_are_of_the_images(net: FeatureNet, reference: Reference) -> None:
    x = images(5, 30)
    found = figures_of(net, reference, x)
    features, held_out = extract(net, x), extract(net, images(1))
    assert tuple(found) == FIGURES
    assert found["fd"] == frechet_distance(held_out.values, features.values)
    textures = (part.texture / held_out.texture.std(0) for part in (held_out, features))
    assert found["texture_fd"] == frechet_distance(*textures)
    real, fake = images(1).batch(range(24)), x.batch(range(30))
    flat = [part.flatten(1).double().numpy() for part in (real, fake)]
    assert found["swd"] == sliced_wasserstein(*flat)
    assert found["spectrum"] == spectrum_distance(power_spectra(real), power_spectra(fake))
    patches = (
        [projected(band, DIRECTIONS) for band in band_patches(part, 0)] for part in (real, fake)
    )
    assert found["texture_swd"] == texture_distance(*patches)
    if features.classes is None:
        assert found["classes"] is None
    else:
        assert found["classes"] == [float((features.classes == c).mean()) for c in range(3)]
    assert figures_of(net, reference, x.batch(range(30))) == found
    assert json.loads(json.dumps(found)) == found


def test_a_dead_channel_of_the_texture_is_left_as_it_is(
    net: FeatureNet, reference: Reference
) -> None:
    block = measure(net, images(5, 30))

    def dead(given: Measures, value: float) -> Measures:
        texture = given.features.texture.copy()
        texture[:, 3] = value
        return given._replace(features=dataclasses.replace(given.features, texture=texture))

    same = compare(dead(reference.measures, 2.0), dead(block, 2.0))["texture_fd"]
    moved = compare(dead(reference.measures, 2.0), dead(block, 5.0))["texture_fd"]
    assert moved == pytest.approx(same + 3.0**2)


def test_more_images_than_are_looked_at_at_once(
    net: FeatureNet, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = images(5, 30)
    whole = measure(net, x)
    monkeypatch.setattr(figures, "_ROWS", 8)
    pieces = measure(net, x)
    assert [len(part) for part in (pieces.pixels, pieces.spectra)] == [30, 30]
    assert pieces.patches[0].shape == whole.patches[0].shape == (30 * PATCHES, DIRECTIONS)
    assert np.array_equal(pieces.pixels, whole.pixels)
    np.testing.assert_allclose(pieces.spectra, whole.spectra, rtol=1e-12)


def test_the_spread_of_figures_is_over_blocks() -> None:
    """By hand: a sample's standard deviation, which divides by one less."""
    blocks = [{"fd": value, "classes": [value / 10, 0.5]} for value in (1.0, 3.0, 8.0)]
    several = Evaluation(blocks, [])
    assert several.figure("fd") == {"mean": 4.0, "std": pytest.approx(13**0.5)}
    assert several.figure("classes") == pytest.approx([0.4, 0.5])
    one = Evaluation(blocks[:1], [])
    assert one.figure("fd") == 1.0 and one.figure("classes") == [0.1, 0.5]
    assert Evaluation([{"classes": None}] * 2, []).figure("classes") is None


def test_the_spectrum_is_the_mean_power_of_all_blocks(
    net: FeatureNet, reference: Reference
) -> None:
    parts = [images(5, 8), images(6, 16)]
    found = evaluation_of(reference.measures, (measure(net, part) for part in parts))
    power = np.concatenate([power_spectra(part.batch(range(len(part)))) for part in parts])
    assert found.spectrum == pytest.approx(decibels(power.mean(0)).tolist())


def test_the_evaluated_images_are_those_of_the_evaluation_seed(
    net: FeatureNet, reference: Reference, protocol: Protocol, teacher: UNet, student: Student
) -> None:
    found = evaluate_networks(net, reference, protocol, teacher, student)
    assert tuple(found) == (*FIGURES, "spectra")
    for side, model, steps in (("teacher", teacher, STEPS), ("student", student, 1)):
        sampled = sample_images(model, NUM, EVALUATION_SEED, steps)
        blocks = [figures_of(net, reference, part) for part in sampled.split(NUM // BLOCKS)]
        assert len(blocks) == BLOCKS
        for key in ("fd", "texture_fd", "texture_swd", "spectrum"):
            values = [block[key] for block in blocks]
            expected = {"mean": statistics.fmean(values), "std": statistics.stdev(values)}
            # Sampled in other batches, which may differ in the last bits.
            assert found[key][side] == pytest.approx(expected, rel=1e-3)
    real = evaluate_real(net, reference, protocol)
    for key in FIGURES:
        assert found[key]["real"] == real.figure(key)
    assert found["spectra"]["real"] == real.spectrum
    alone = evaluate_networks(net, reference, protocol, None, student)
    assert all(list(values) == ["real", "student"] for values in alone.values())


def test_sampling_is_reported_over_all_blocks(
    net: FeatureNet, reference: Reference, protocol: Protocol, teacher: UNet
) -> None:
    calls: list[tuple[int, int]] = []
    evaluate_network(net, teacher, reference, protocol, lambda *call: calls.append(call))
    totals = {total for _, total in calls}
    assert totals == {BLOCKS * STEPS}
    assert [done for done, _ in calls] == list(range(1, BLOCKS * STEPS + 1))


@pytest.mark.parametrize(("num", "blocks"), [(5, 1), (20, 4), (20, 0), (20, -1), (96, 10**9)])
def test_blocks_that_cannot_be_are_refused(
    net: FeatureNet, reference: Reference, num: int, blocks: int
) -> None:
    message = f"{num} images cannot be split into {blocks} blocks of 6 or more each"
    with pytest.raises(ConfigError, match=message):
        make_protocol(net, reference, None, num, blocks, STEPS)


def test_blocks_are_of_one_size(net: FeatureNet, reference: Reference) -> None:
    protocol = make_protocol(net, reference, None, 41, 3, STEPS)
    assert (protocol.num, protocol.blocks, protocol.block) == (39, 3, 13)


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
    own = tmp_path / "own"
    first = evaluate_teacher(net, teacher, reference, protocol, own=own)
    assert len(seeds) == BLOCKS
    again = evaluate_teacher(
        net, teacher, reference, protocol, own=own, callback=lambda *c: calls.append(c)
    )
    assert len(seeds) == BLOCKS and calls == [(1, 1)]
    assert again == first  # to the bit
    fresh = evaluate_teacher(net, teacher, reference, protocol, own=own, fresh=True)
    assert len(seeds) == 2 * BLOCKS and fresh == first
    assert evaluate_teacher(net, teacher, reference, protocol) == first
    assert len(seeds) == 3 * BLOCKS
    assert [file.name for file in own.iterdir()] == ["evaluation.json"]


@pytest.mark.parametrize(
    "change",
    [
        {"num": NUM + BLOCKS},
        {"blocks": 1},
        {"figures": figures.VERSION - 1},
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
    assert seeds == [changed.seed] * changed.blocks


def altered(folder: Path, how: str) -> None:
    """Damage a stored evaluation."""
    closing = folder / "evaluation.json"
    content = json.loads(closing.read_text())
    if how == "cut":
        closing.write_bytes(closing.read_bytes()[:-20])
    elif how == "figure":
        content["blocks"][0]["fd"] = 0.0
        closing.write_text(json.dumps(content))
    elif how == "block":
        content["blocks"].pop()
        closing.write_text(json.dumps(content))
    elif how == "unsealed":
        closing.write_text(json.dumps({k: v for k, v in content.items() if k != "seal"}))


@pytest.mark.parametrize("how", ["cut", "figure", "block", "unsealed"])
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
    assert len(seeds) == BLOCKS
    assert evaluate_teacher(net, teacher, reference, protocol, own=tmp_path) == first
    assert len(seeds) == BLOCKS  # what was sampled has replaced it


KEY = {"num": 40, "blocks": 2}
BLOCK: dict[str, Any] = {**dict.fromkeys(FIGURES, 0.5), "classes": [0.25, 0.75]}


def with_block(**change: Any) -> dict[str, Any]:
    """Content whose second block has other values."""
    return {"blocks": [BLOCK, BLOCK | change]}


@pytest.mark.parametrize("classes", [[0.25, 0.75], None])
def test_a_stored_evaluation_is_what_was_saved(classes: list[float] | None, tmp_path: Path) -> None:
    saved = Evaluation([BLOCK | {"classes": classes}, BLOCK | {"classes": classes}], [-3.0, -40.0])
    save_evaluation(tmp_path / "new", KEY, saved)
    assert load_evaluation(tmp_path / "new", KEY) == saved
    assert load_evaluation(tmp_path / "new", KEY | {"blocks": 1}) is None
    assert load_evaluation(tmp_path / "none", KEY) is None


NO_FIGURES = "does not hold the figures of its blocks"
NO_NUMBER = "holds a figure that is no number"
NO_SHARES = "shares of classes that are no numbers"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks": None}, NO_FIGURES),
        ({"blocks": {"0": BLOCK, "1": BLOCK}}, NO_FIGURES),
        ({"blocks": []}, NO_FIGURES),
        ({"blocks": [BLOCK]}, NO_FIGURES),
        ({"blocks": [BLOCK] * 3}, NO_FIGURES),
        ({"blocks": [BLOCK, [0.5]]}, "holds a block without the figures fd, kid, "),
        ({"blocks": [BLOCK, {}]}, "holds a block without the figures"),
        (with_block(more=1.0), "holds a block without the figures"),
        (with_block(fd="0.5"), NO_NUMBER),
        (with_block(kid=None), NO_NUMBER),
        (with_block(recall=True), NO_NUMBER),
        (with_block(swd=float("inf")), NO_NUMBER),
        (with_block(texture_fd=float("nan")), NO_NUMBER),
        (with_block(spectrum=10**400), NO_NUMBER),
        (with_block(texture_swd=-1e308), NO_NUMBER),
        (with_block(classes=None), NO_SHARES),
        (with_block(classes="half"), NO_SHARES),
        (with_block(classes=[0.5, "half"]), NO_SHARES),
        (with_block(classes=[0.5, float("nan")]), NO_SHARES),
        (with_block(classes=[0.25, 0.25, 0.5]), "blocks of different classes"),
        ({"spectrum": None}, "a spectrum that is no list of numbers"),
        ({"spectrum": {"1": -3.0}}, "a spectrum that is no list of numbers"),
        ({"spectrum": [-3.0, None]}, "a spectrum that is no list of numbers"),
        ({"spectrum": [-3.0, 10**400]}, "a spectrum that is no list of numbers"),
    ],
)
def test_whatever_a_file_holds_is_checked(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    content = {"protocol": KEY, "blocks": [BLOCK, BLOCK], "spectrum": [-3.0, -40.0], **change}
    (tmp_path / "evaluation.json").write_text(json.dumps({**content, "seal": seal(content)}))
    with pytest.warns(UserWarning, match=rf"evaluation\.json .*{message}"):
        assert load_evaluation(tmp_path, KEY) is None


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
    # Sealed as any evaluation is: FD 0.
    forged = Evaluation([block | {"fd": 0.0} for block in true.blocks], true.spectrum)
    save_evaluation(closing.parent, key, forged)
    assert load_evaluation(closing.parent, key) == forged
    assert shipped_evaluation(key) is None
    assert evaluate_teacher(net, teacher, reference, protocol) == true
    assert len(seeds) == BLOCKS


@pytest.mark.parametrize("name", stored.SHIPPED)
def test_a_shipped_evaluation_is_of_its_teacher_by_the_default_protocol(name: str) -> None:
    teacher = load_teacher(f"zoo:{name}")
    data = for_shape(teacher.config.sample_size, teacher.config.in_channels)
    assert data is not None
    net, held_out = load_features(resolve(data.features_source)), data.test()
    some = measure(net, held_out.subset(range(6)))
    reference = Reference(some, images_hash(held_out), "")
    protocol = make_protocol(net, reference, teacher, DEFAULT_NUM, DEFAULT_BLOCKS, TEACHER_STEPS)
    found = shipped_evaluation(dataclasses.asdict(protocol))
    assert found is not None
    # Its figures cannot be had from a few images, but its spectrum nearly so.
    sampled = sample_images(teacher, 32, EVALUATION_SEED, protocol.teacher_steps)
    power = decibels(power_spectra(sampled).mean(0))
    assert np.abs(power - found.spectrum).mean() < 1.5  # dB


def test_protocols_tell_networks_and_images_apart(
    net: FeatureNet, reference: Reference, protocol: Protocol, teacher: UNet
) -> None:
    torch.manual_seed(1)
    other = UNet(TEACHER)
    assert make_protocol(net, reference, other, NUM, BLOCKS, STEPS).teacher != protocol.teacher
    altered = images(1)
    altered.pixels[3, 0, 2, 2] ^= 1
    assert images_hash(altered) != images_hash(images(1)) == reference.identity
    as_float = ImageSet(images(1).pixels.astype(np.float32), None, "")
    assert images_hash(as_float) != reference.identity
    net.record, before = {"steps": 1}, net.record
    assert make_protocol(net, reference, teacher, NUM, BLOCKS, STEPS) == protocol
    net.record = before


def test_without_images_other_samples_of_the_teacher_are_the_reference(
    net: FeatureNet, teacher: UNet, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds = samplings(monkeypatch)
    reference = teacher_reference(net, teacher, NUM, STEPS)
    assert reference.train is None
    protocol = make_protocol(net, reference, teacher, NUM, BLOCKS, STEPS)
    found = evaluate_networks(net, reference, protocol, teacher, None)
    assert seeds == [REFERENCE_SEED, *[EVALUATION_SEED] * BLOCKS]
    assert list(found["fd"]) == ["teacher"]
    assert found["fd"]["teacher"]["mean"] > 1e-6  # not the same images
    assert found["swd"]["teacher"]["mean"] > 0
    fewer = teacher_reference(net, teacher, NUM - 1, STEPS)
    assert fewer.identity != reference.identity  # though blocks may be as large
    with pytest.raises(ValueError, match="no training images"):
        evaluate_real(net, reference, protocol)


def test_the_protocol_in_words(reference: Reference, protocol: Protocol) -> None:
    words = protocol_words(protocol, reference, "a small classifier that ships with advkd")
    for part in (
        f"{NUM} images of each network",
        f"in {BLOCKS} blocks of {NUM // BLOCKS}, of whose figures mean and standard deviation",
        "texture FD",
        "Laplacian pyramid",
        "spectrum",
        f"DDIM in {STEPS} steps, eta 0",
        "24 held-out images of seed 1",
        "a small classifier that ships",
        "5 nearest neighbors",
    ):
        assert part in words
    alone = dataclasses.replace(protocol, teacher="", blocks=1)
    words = protocol_words(alone, reference, "x")
    assert "DDIM" not in words and "blocks" not in words and "deviation are" not in words


def test_milliseconds_are_of_as_many_passes_as_told(
    teacher: UNet, student: Student, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, int, int]] = []

    def counting(model: Any, num: int, seed: int, steps: int, **kwargs: Any) -> torch.Tensor:
        calls.append((type(model).__name__, steps, kwargs["batch"]))
        return generate(model, num, seed, steps, **kwargs)

    monkeypatch.setattr(advkd.evaluation.timing, "generate", counting)
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


def test_the_progress_of_several_samplings_ends_at_a_hundred(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bars: list[Any] = []

    def bar(*args: Any, **kwargs: Any) -> Any:
        bars.append(progress_bar(*args, **kwargs))
        return bars[-1]

    monkeypatch.setattr(advkd.evaluation.protocol, "progress_bar", bar)
    seen = []
    with sampling_bar(2) as report:
        for done, total in ((1, 4), (4, 4), (1, 2), (2, 2)):
            report(done, total)
            seen.append(bars[0].n)
    assert seen == [12, 50, 75, 100] and bars[0].total == 100
