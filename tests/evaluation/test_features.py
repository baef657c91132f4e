"""The networks whose features images are compared by: fitting, files, what they tell apart."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from advkd.data import ImageSet, dataset
from advkd.evaluation.features import (
    FeatureNet,
    Features,
    FitSettings,
    accuracy,
    class_shares,
    extract,
    fit_features,
    load_features,
    reconstruction_error,
    save_features,
)
from advkd.evaluation.figures import FIGURES, Evaluation, compare, evaluation_of, measure
from advkd.files import CheckpointError
from advkd.pretrained import resolve

SHIPPED = resolve(dataset("fashion-mnist").features_source)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(3))


@pytest.fixture(scope="module")
def shipped_net() -> FeatureNet:
    return load_features(SHIPPED)


@pytest.fixture(scope="module")
def held_out() -> ImageSet:
    return dataset("fashion-mnist").test()


def test_shipped_classifier_is_accurate(shipped_net: FeatureNet, held_out: ImageSet) -> None:
    found = accuracy(shipped_net, held_out)
    assert found >= 0.88
    # Another processor may decide single images otherwise.
    assert found == pytest.approx(shipped_net.record["held_out_accuracy"], abs=0.002)
    assert (SHIPPED / "model.safetensors").stat().st_size <= 2**20


def test_figures_tell_real_images_from_noise(shipped_net: FeatureNet, held_out: ImageSet) -> None:
    rows = np.arange(500)
    some = ImageSet(dataset("fashion-mnist").train().pixels[rows], None, "some")
    some_held_out = ImageSet(held_out.pixels[:500], None, "others")
    reference = measure(shipped_net, some_held_out)
    noise = torch.randn(500, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    noisy_images = (some.batch(rows) + 0.5 * noise).clamp(-1, 1)
    good, noisy = (compare(reference, measure(shipped_net, x)) for x in (some, noisy_images))
    assert tuple(good) == FIGURES
    for key in ("fd", "kid", "texture_fd"):
        assert noisy[key] > 10 * abs(good[key])
    for key in ("swd", "texture_swd", "spectrum"):
        assert noisy[key] > 2 * good[key]
    assert noisy["precision"] < good["precision"]
    assert good["recall"] > 0.5
    assert sum(good["classes"]) == pytest.approx(1)
    assert json.loads(json.dumps(good)) == good


def test_extract_ignores_the_batch_size(shipped_net: FeatureNet, held_out: ImageSet) -> None:
    some = ImageSet(held_out.pixels[:37], None, "some")
    whole, pieces = extract(shipped_net, some), extract(shipped_net, some, batch=8)
    assert whole.values.shape == (37, 64)
    assert whole.values.dtype == np.float64
    assert whole.texture.shape[0] == 37 and whole.texture.dtype == np.float64
    for name in ("values", "texture"):
        a, b = getattr(whole, name), getattr(pieces, name)
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    none = extract(shipped_net, held_out.batch([]))
    assert none.values.shape == (0, 64) and none.texture.shape == (0, whole.texture.shape[1])
    assert none.classes is not None and none.classes.shape == (0,)


def test_texture_is_mean_and_deviation_of_the_earlier_layers(shipped_net: FeatureNet) -> None:
    x = torch.rand(3, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    pooled, h = [], x
    with torch.inference_mode():
        for layer in shipped_net.encoder[:-1]:
            h = layer(h)
            pooled += [h.mean((2, 3)), h.flatten(2).std(2)]
        features, texture, logits = shipped_net.look(x)
        output = shipped_net(x)
    torch.testing.assert_close(texture, torch.cat(pooled, 1))
    assert torch.equal(features, output.features) and torch.equal(logits, output.logits)


def test_extract_refuses_other_images(shipped_net: FeatureNet) -> None:
    for shape in ((2, 3, 28, 28), (2, 1, 32, 32)):
        with pytest.raises(ValueError, match=r"\(1, 28, 28\), not for a batch"):
            extract(shipped_net, torch.zeros(shape))
    nan_filled = torch.zeros(3, 1, 28, 28)
    nan_filled[1, 0, 4, 4] = math.nan
    with pytest.raises(ValueError, match="image 1 are not finite"):
        extract(shipped_net, nan_filled)


def test_class_shares() -> None:
    features = Features(np.zeros((4, 64)), np.zeros((4, 9)), np.array([0, 2, 2, 2]), 4)
    shares = class_shares(features)
    assert shares is not None
    assert shares.tolist() == [0.25, 0, 0.75, 0]
    assert class_shares(Features(np.zeros((4, 64)), np.zeros((4, 9)), None, None)) is None


@pytest.mark.parametrize("size", [8, 9, 28, 33, 64])
@pytest.mark.parametrize(
    ("num_classes", "decodes", "kind"),
    [
        (3, None, "a small classifier"),
        (3, False, "a small classifier"),
        (3, True, "a small classifier and autoencoder"),
        (None, None, "a small autoencoder"),
        (None, True, "a small autoencoder"),
    ],
)
def test_networks_of_every_size(
    size: int, num_classes: int | None, decodes: bool | None, kind: str
) -> None:
    net = FeatureNet(3, size, num_classes, decodes)
    x = torch.zeros(2, 3, size, size)
    output = net(x)
    assert output.features.shape == net.look(x)[0].shape == (2, 64)
    assert (output.logits is None) == (num_classes is None) == (net.look(x)[2] is None)
    assert output.logits is None or output.logits.shape == (2, 3)
    assert (output.images is not None) == net.decodes == ("autoencoder" in kind)
    assert output.images is None or output.images.shape == x.shape
    assert net.kind == kind


@pytest.mark.parametrize(
    "arguments",
    [(0, 28, 10), (1, 7, 10), (1, 28, 1), (10**12, 28, 10), (1, 10**12, 10), (1, 28, 10**12)],
)
def test_impossible_networks(arguments: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="a feature network needs"):
        FeatureNet(*arguments)
    with pytest.raises(ValueError, match="without classes has to decode"):
        FeatureNet(1, 28, None, decodes=False)


def _bars(rng: np.random.Generator, count: int) -> ImageSet:
    """Class 0: a bright left half, class 1: a bright upper half, with noise."""
    labels = rng.integers(0, 2, count)
    pixels = rng.integers(0, 80, (count, 1, 12, 12), np.uint8)
    pixels[labels == 0, :, :, :6] += 150
    pixels[labels == 1, :, :6] += 150
    return ImageSet(pixels, labels, "bars")


_BRIEF = FitSettings(steps=30, batch_size=32, flip=False, shift=1)


def test_fit_a_classifier(rng: np.random.Generator) -> None:
    images, held_out = _bars(rng, 200), _bars(rng, 100)
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    losses: list[float] = []
    net = fit_features(
        images, settings=_BRIEF, held_out=held_out, progress=lambda _, loss: losses.append(loss)
    )
    assert torch.equal(torch.random.get_rng_state(), before)
    assert len(losses) == _BRIEF.steps
    assert net.record["held_out_accuracy"] == accuracy(net, held_out) >= 0.95
    assert net.decodes and net.kind == "a small classifier and autoencoder"
    again = fit_features(images, settings=_BRIEF)
    other = fit_features(images, settings=dataclasses.replace(_BRIEF, seed=1))
    assert all(torch.equal(t, again.state_dict()[n]) for n, t in net.state_dict().items())
    assert not torch.equal(net.to_features.weight, other.to_features.weight)


def test_a_classifier_learns_to_decode_too(rng: np.random.Generator) -> None:
    """Two images of one class are told apart: their labels alone would not ask for that."""
    images, held_out = _bars(rng, 200), _bars(rng, 100)
    net = fit_features(images, settings=dataclasses.replace(_BRIEF, steps=80))
    assert accuracy(net, held_out) >= 0.95
    of_one_class = held_out.subset(np.flatnonzero(held_out.labels == 0))
    brighter = of_one_class.batch(range(len(of_one_class))) + 0.2
    shifted = ImageSet(brighter.numpy(), None, "brighter")
    for part in (of_one_class, shifted):
        x = part.batch(range(len(part)))
        # The best guess that looks at nothing is the mean image.
        assert reconstruction_error(net, part) < 0.4 * float((x - x.mean()).square().mean())
    with pytest.raises(ValueError, match="does not decode"):
        reconstruction_error(FeatureNet(1, 12, 2), images)


def test_labels_of_one_class_are_none(rng: np.random.Generator) -> None:
    images = dataclasses.replace(_bars(rng, 60), labels=np.zeros(60, np.int64))
    net = fit_features(images, settings=dataclasses.replace(_BRIEF, steps=1), held_out=images)
    assert (net.num_classes, net.decodes) == (None, True)
    assert "held_out_accuracy" not in net.record


def test_fit_an_autoencoder(rng: np.random.Generator) -> None:
    images = dataclasses.replace(_bars(rng, 200), labels=None)
    losses: list[float] = []
    settings = dataclasses.replace(_BRIEF, steps=80)
    net = fit_features(images, settings=settings, progress=lambda _, loss: losses.append(loss))
    assert net.num_classes is None
    # Without a look at the features the best guess is the mean image, which leaves the variance.
    guess = float(images.batch(range(200)).var(0).mean())
    assert np.mean(losses[-10:]) < 0.3 * guess
    assert extract(net, images).classes is None
    with pytest.raises(ValueError, match="needs a classifier and labels"):
        accuracy(net, images)


def test_fit_refuses_and_stops(rng: np.random.Generator) -> None:
    with pytest.raises(ValueError, match="steps=0"):
        FitSettings(steps=0)
    images = _bars(rng, 50)
    broken = dataclasses.replace(images, pixels=np.full((50, 1, 12, 12), np.nan, np.float32))
    with pytest.raises(ValueError, match="loss of step 0 is not finite"):
        fit_features(broken, settings=_BRIEF)


@pytest.mark.parametrize(("num_classes", "decodes"), [(4, False), (4, True), (None, True)])
def test_saved_features_come_back(tmp_path: Path, num_classes: int | None, decodes: bool) -> None:
    net = FeatureNet(3, 12, num_classes, decodes).eval()
    net.record = {"data": "nothing", "steps": 0}
    save_features(net, tmp_path / "features")
    back = load_features(tmp_path / "features")
    x = torch.linspace(-1, 1, 2 * 3 * 12 * 12).reshape(2, 3, 12, 12)
    for a, b in zip(back(x), net(x), strict=True):
        assert (a is None) == (b is None) and (a is None or torch.equal(a, b))
    assert (back.record, back.num_classes, back.training) == (net.record, num_classes, False)
    assert back.decodes is decodes


@pytest.mark.parametrize("num_classes", [4, None])
def test_features_of_earlier_versions_do_one_of_both(
    tmp_path: Path, num_classes: int | None
) -> None:
    save_features(FeatureNet(1, 12, num_classes), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config.pop("decodes") is (num_classes is None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    back = load_features(tmp_path)
    assert (back.num_classes, back.decodes) == (num_classes, num_classes is None)


def test_features_know_the_names_of_their_classes(rng: np.random.Generator) -> None:
    """The images compared may have other classes than those that the network tells apart."""
    settings = dataclasses.replace(_BRIEF, steps=1)
    images = _bars(rng, 60)
    assert fit_features(images, settings=settings).class_names is None
    named = dataclasses.replace(images, classes=("left", "upper"))
    net = fit_features(named, settings=settings)
    assert net.class_names == ("left", "upper")
    for names in (["left"], "ab", [1, 2], None):  # whatever a record may hold
        net.record["classes"] = names
        assert net.class_names is None


def test_altered_features_are_refused(tmp_path: Path) -> None:
    save_features(FeatureNet(1, 12, 4), tmp_path)
    good = json.loads((tmp_path / "config.json").read_text())
    for change, message in (
        ({"size": 16}, r"does not fit the network.*to_features\.weight"),
        ({"channels": "1"}, "channels='1' is no int"),
        ({"num_classes": 1}, "num_classes=1"),
        ({"num_classes": None}, "without classes has to decode"),
        ({"decodes": 1}, "decodes=1 is no bool"),
        ({"decodes": None}, "decodes=None is no bool"),
        ({"decodes": True}, r"does not fit the network.*from_features"),
        ({"channels": 10**12}, "channels=1000000000000"),
        ({"width": 3}, "unknown keys: width; missing keys: none"),
        ({"format": "other"}, "does not describe features"),
        ({"sha256": "0"}, "checksum"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**good, **change}))
        with pytest.raises(CheckpointError, match=message):
            load_features(tmp_path)
    with pytest.raises(CheckpointError, match=r"none.config\.json does not exist"):
        load_features(tmp_path / "none")


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    net = FeatureNet(1, 12, 4)
    with torch.no_grad():
        net.to_features.weight[3, 5] = math.inf
    save_features(net, tmp_path)
    with pytest.raises(CheckpointError, match=r"to_features\.weight holds values .* not finite"):
        load_features(tmp_path)


@pytest.fixture(params=["float64", "meta", "autocast"])
def ambient(request: pytest.FixtureRequest) -> Iterator[None]:
    """What a program around the package may have set for itself."""
    if request.param == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            yield
        return
    if request.param == "float64":
        torch.set_default_dtype(torch.float64)
    else:
        torch.set_default_device(request.param)
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)


@pytest.fixture(scope="module")
def usual(held_out: ImageSet) -> Any:
    """Weights after a fit, and figures, as they are without any of that."""
    return _fitted(), _figures(held_out)


def _fitted() -> dict[str, torch.Tensor]:
    settings = dataclasses.replace(_BRIEF, steps=4)
    rng = np.random.Generator(np.random.PCG64(3))
    return fit_features(_bars(rng, 60), settings=settings).state_dict()


def _figures(images: ImageSet) -> Evaluation:
    net = load_features(SHIPPED)
    parts = (images.subset(np.arange(start, start + 40)) for start in (0, 40, 80))
    reference, *blocks = (measure(net, part) for part in parts)
    return evaluation_of(reference, blocks)


def test_no_figure_depends_on_ambient_defaults(
    usual: Any, held_out: ImageSet, ambient: None
) -> None:
    weights, figures = usual
    assert _figures(held_out) == figures
    if not torch.is_autocast_enabled("cpu"):  # a training in another precision is another one
        fitted = _fitted()
        assert all(torch.equal(fitted[name], tensor) for name, tensor in weights.items())
