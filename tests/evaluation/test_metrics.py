"""Metrics against known answers, and the feature networks behind them."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch

from advkd.data.images import ImageSet, shipped
from advkd.evaluation.metrics import (
    SHIPPED_FEATURES,
    FeatureNet,
    Features,
    FitSettings,
    Judged,
    accuracy,
    class_histogram,
    extract,
    fit_features,
    frechet_distance,
    judge,
    kernel_distance,
    load_features,
    precision_recall,
    save_features,
    sliced_wasserstein,
)
from advkd.files import CheckpointError

_EPS = np.finfo(np.float64).eps


@pytest.fixture
def draw() -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(3))


@pytest.fixture(scope="module")
def shipped_net() -> FeatureNet:
    return load_features()


@pytest.fixture(scope="module")
def held_out() -> ImageSet:
    return shipped("test")


def _sample(draw: np.random.Generator, count: int, mean: np.ndarray, root: np.ndarray) -> Any:
    """`count` points whose sample mean is `mean` and sample covariance root root^T, exactly."""
    points = draw.standard_normal((count, len(mean)))
    points -= points.mean(0)
    whitener = np.linalg.cholesky(np.linalg.inv(np.cov(points.T)))
    return points @ whitener @ root.T + mean


# Fréchet distance


def test_frechet_of_two_gaussians(draw: np.random.Generator) -> None:
    mean_a, mean_b = draw.standard_normal((2, 6))
    root_a, root_b = draw.standard_normal((2, 6, 6))
    a, b = _sample(draw, 50, mean_a, root_a), _sample(draw, 80, mean_b, root_b)
    cov_a, cov_b = root_a @ root_a.T, root_b @ root_b.T
    geometric = np.trace(scipy.linalg.sqrtm(cov_a @ cov_b)).real
    expected = ((mean_a - mean_b) ** 2).sum() + np.trace(cov_a + cov_b) - 2 * geometric
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-9)


def test_frechet_of_singular_diagonals(draw: np.random.Generator) -> None:
    a = _sample(draw, 40, np.zeros(4), np.diag([2.0, 0.0, 1.0, 0.0]))
    b = _sample(draw, 40, np.array([0.0, 0.0, 0.0, 5.0]), np.diag([0.0, 3.0, 4.0, 0.0]))
    # 5^2 + (2 - 0)^2 + (0 - 3)^2 + (1 - 4)^2
    assert frechet_distance(a, b) == pytest.approx(47, rel=1e-12)


@pytest.mark.parametrize("count", [2, 20, 200])
def test_frechet_of_equal_sets_is_zero(draw: np.random.Generator, count: int) -> None:
    a = 10 * draw.standard_normal((count, 64)) @ draw.standard_normal((64, 64))
    a[:, 5] = 3.0  # a dead feature
    scale = np.trace(np.cov(a.T))
    assert frechet_distance(a, draw.permutation(a)) <= 64**2 * _EPS * scale
    moved = frechet_distance(a, a + np.arange(64.0))
    assert moved == pytest.approx((np.arange(64.0) ** 2).sum(), abs=64**2 * _EPS * scale)


def test_frechet_survives_a_huge_mean(draw: np.random.Generator) -> None:
    a = draw.standard_normal((100, 8))
    assert frechet_distance(a + 1e6, 2 * a + 1e6) == pytest.approx(
        frechet_distance(a, 2 * a), rel=1e-6
    )


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (np.zeros((5, 3)), np.zeros((5, 4)), r"\(5, 3\) and \(5, 4\)"),
        (np.zeros((5, 3)), np.zeros((1, 3)), "1 samples are too few"),
        (np.zeros((5, 3)), np.full((5, 3), np.nan), "not finite"),
    ],
)
def test_distances_refuse_bad_features(a: np.ndarray, b: np.ndarray, message: str) -> None:
    for distance in (frechet_distance, kernel_distance, precision_recall):
        with pytest.raises(ValueError, match=message):
            distance(a, b, **({"k": 1} if distance is precision_recall else {}))


# Kernel distance


def test_kernel_distance_by_hand(draw: np.random.Generator) -> None:
    x, y = draw.standard_normal((2, 7, 4))

    def kernel(p: np.ndarray, q: np.ndarray) -> float:
        return (float(p @ q) / 4 + 1) ** 3

    pairs = [(i, j) for i in range(7) for j in range(7)]
    within = sum(kernel(x[i], x[j]) + kernel(y[i], y[j]) for i, j in pairs if i != j) / 42
    across = sum(kernel(x[i], y[j]) for i, j in pairs) / 49
    # Subsets of everything: each is the same sum in another order.
    assert kernel_distance(x, y, subsets=3) == pytest.approx(within - 2 * across, rel=1e-12)


def test_kernel_distance_is_unbiased(draw: np.random.Generator) -> None:
    values = np.array(
        [
            kernel_distance(*draw.standard_normal((2, 60, 8)), subsets=4, subset_size=30)
            for _ in range(300)
        ]
    )
    assert abs(values.mean()) < 4 * values.std() / math.sqrt(len(values))
    assert (values < 0).any()
    apart = kernel_distance(draw.standard_normal((60, 8)), draw.standard_normal((60, 8)) + 1)
    assert apart > 10 * values.std()


def test_kernel_distance_repeats(draw: np.random.Generator) -> None:
    a, b = draw.standard_normal((2, 90, 8))
    first = kernel_distance(a, b, subset_size=30)
    assert kernel_distance(a, b, subset_size=30) == first
    assert kernel_distance(a, b, subset_size=30, seed=1) != first


# Precision and recall


def test_precision_recall_of_a_lost_mode(draw: np.random.Generator) -> None:
    cluster = draw.standard_normal((100, 4))
    real = np.concatenate([cluster, cluster + 1000])
    assert precision_recall(real, cluster) == (1.0, 0.5)
    assert precision_recall(cluster, real) == (0.5, 1.0)
    assert precision_recall(real, real) == (1.0, 1.0)
    assert precision_recall(real, real + 200) == (0.0, 0.0)


def test_precision_recall_by_hand() -> None:
    real = np.array([[0.0], [1.0], [3.0], [10.0]])
    fake = np.array([[-1.0], [2.5], [20.0], [20.0]])
    # k=1 radii: reals 1, 1, 2, 7; fakes 3.5, 3.5, 0, 0.
    assert precision_recall(real, fake, k=1) == (0.5, 0.75)
    # k=2 radii: reals 3, 2, 3, 9; fakes 21, 17.5, 17.5, 17.5.
    assert precision_recall(real, fake, k=2) == (0.5, 1.0)
    with pytest.raises(ValueError, match="at least 5"):
        precision_recall(real, fake, k=4)


def test_precision_recall_in_pieces(
    draw: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, fake = draw.standard_normal((2, 50, 3))
    whole = precision_recall(real, fake + 1.5)
    monkeypatch.setattr("advkd.evaluation.metrics._ROWS", 7)
    assert precision_recall(real, fake + 1.5) == whole
    assert 0 < whole[0] < 1


# Sliced Wasserstein distance


@pytest.mark.parametrize("counts", [(9, 9), (9, 5), (1, 6)])
def test_sliced_wasserstein_of_single_pixels(
    draw: np.random.Generator, counts: tuple[int, int]
) -> None:
    a, b = (torch.from_numpy(draw.uniform(-1, 1, (n, 1, 1, 1)).astype(np.float32)) for n in counts)
    expected = scipy.stats.wasserstein_distance(a.flatten().numpy(), b.flatten().numpy())
    # In one dimension every direction is +1 or -1 and gives the whole distance.
    assert sliced_wasserstein(a, b, projections=5) == pytest.approx(expected, rel=1e-6)


def test_sliced_wasserstein_of_a_shift(draw: np.random.Generator) -> None:
    a = torch.from_numpy(draw.uniform(-1, 0, (40, 1, 6, 6)).astype(np.float32))
    assert sliced_wasserstein(a, a.flip(0)) == 0.0
    # A shift d moves every projection by |d . direction|; on the sphere that is |d| / sqrt(D)
    # times the mean of a normal's modulus, up to 1 / D and to the chance of 20,000 directions.
    moved = sliced_wasserstein(a, a + 0.5, projections=20_000)
    assert moved == pytest.approx(0.5 * math.sqrt(2 / math.pi), rel=0.02)


def test_sliced_wasserstein_repeats(held_out: ImageSet) -> None:
    x = held_out.batch(range(200))
    some = ImageSet(held_out.pixels[:200], None, "some")
    other = held_out.batch(range(200, 400))
    first = sliced_wasserstein(some, other)
    assert sliced_wasserstein(x, other) == first
    assert sliced_wasserstein(x, other, seed=1) != first


# Networks


def test_shipped_classifier_is_accurate(shipped_net: FeatureNet, held_out: ImageSet) -> None:
    found = accuracy(shipped_net, held_out)
    assert found >= 0.88
    # Another processor may decide single images otherwise.
    assert found == pytest.approx(shipped_net.record["held_out_accuracy"], abs=0.002)
    assert (SHIPPED_FEATURES / "model.safetensors").stat().st_size <= 2**20


def test_judge_tells_real_from_noise(shipped_net: FeatureNet, held_out: ImageSet) -> None:
    train = shipped("train")
    rows = np.arange(500)
    real = Judged(extract(shipped_net, held_out), held_out)
    some = ImageSet(train.pixels[rows], None, "some")
    noise = torch.randn(500, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    noisy_images = (some.batch(rows) + 0.5 * noise).clamp(-1, 1)
    good = judge(real, Judged(extract(shipped_net, some), some))
    noisy = judge(real, Judged(extract(shipped_net, noisy_images), noisy_images))
    assert set(good) == {"fd", "kid", "precision", "recall", "swd", "classes"}
    assert noisy["fd"] > 10 * good["fd"]
    assert noisy["kid"] > 10 * abs(good["kid"])
    assert noisy["swd"] > 2 * good["swd"]
    assert noisy["precision"] < good["precision"]
    assert good["recall"] > 0.5
    assert sum(good["classes"]) == pytest.approx(1)
    assert json.loads(json.dumps(good)) == good
    assert judge(real, Judged(real.features, None))["swd"] is None


def test_extract_ignores_the_batch_size(shipped_net: FeatureNet, held_out: ImageSet) -> None:
    some = ImageSet(held_out.pixels[:37], None, "some")
    whole, pieces = extract(shipped_net, some), extract(shipped_net, some, batch=8)
    assert whole.values.shape == (37, 64)
    assert whole.values.dtype == np.float64
    np.testing.assert_allclose(whole.values, pieces.values, rtol=1e-4, atol=1e-4)
    assert extract(shipped_net, held_out.batch([])).values.shape == (0, 64)


def test_extract_refuses_other_images(shipped_net: FeatureNet) -> None:
    for shape in ((2, 3, 28, 28), (2, 1, 32, 32)):
        with pytest.raises(ValueError, match=r"\(1, 28, 28\), not for a batch"):
            extract(shipped_net, torch.zeros(shape))
    nan_filled = torch.zeros(3, 1, 28, 28)
    nan_filled[1, 0, 4, 4] = math.nan
    with pytest.raises(ValueError, match="image 1 are not finite"):
        extract(shipped_net, nan_filled)


def test_class_histogram() -> None:
    features = Features(np.zeros((4, 64)), np.array([0, 2, 2, 2]), 4)
    shares = class_histogram(features)
    assert shares is not None
    assert shares.tolist() == [0.25, 0, 0.75, 0]
    assert class_histogram(Features(np.zeros((4, 64)), None, None)) is None


@pytest.mark.parametrize("size", [8, 9, 28, 33, 64])
@pytest.mark.parametrize("num_classes", [3, None])
def test_networks_of_every_size(size: int, num_classes: int | None) -> None:
    net = FeatureNet(3, size, num_classes)
    features, output = net(torch.zeros(2, 3, size, size))
    assert features.shape == (2, 64)
    assert output.shape == ((2, 3) if num_classes else (2, 3, size, size))


@pytest.mark.parametrize("arguments", [(0, 28, 10), (1, 7, 10), (1, 28, 1)])
def test_impossible_networks(arguments: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="a feature network needs"):
        FeatureNet(*arguments)


def _bars(draw: np.random.Generator, count: int) -> ImageSet:
    """Class 0: a bright left half, class 1: a bright upper half, with noise."""
    labels = draw.integers(0, 2, count)
    pixels = draw.integers(0, 80, (count, 1, 12, 12), np.uint8)
    pixels[labels == 0, :, :, :6] += 150
    pixels[labels == 1, :, :6] += 150
    return ImageSet(pixels, labels, "bars")


_BRIEF = FitSettings(steps=30, batch_size=32, flip=False, shift=1)


def test_fit_a_classifier(draw: np.random.Generator) -> None:
    images, held_out = _bars(draw, 200), _bars(draw, 100)
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    losses: list[float] = []
    net = fit_features(
        images, settings=_BRIEF, held_out=held_out, progress=lambda _, loss: losses.append(loss)
    )
    assert torch.equal(torch.random.get_rng_state(), before)
    assert len(losses) == _BRIEF.steps
    assert net.record["held_out_accuracy"] == accuracy(net, held_out) >= 0.95
    again = fit_features(images, settings=_BRIEF)
    other = fit_features(images, settings=dataclasses.replace(_BRIEF, seed=1))
    assert all(torch.equal(t, again.state_dict()[n]) for n, t in net.state_dict().items())
    assert not torch.equal(net.to_features.weight, other.to_features.weight)


def test_fit_an_autoencoder(draw: np.random.Generator) -> None:
    images = dataclasses.replace(_bars(draw, 200), labels=None)
    losses: list[float] = []
    settings = dataclasses.replace(_BRIEF, steps=120)
    net = fit_features(images, settings=settings, progress=lambda _, loss: losses.append(loss))
    assert net.num_classes is None
    # Without a look at the features the best guess is the mean image, which leaves the variance.
    guess = float(images.batch(range(200)).var(0).mean())
    assert np.mean(losses[-10:]) < 0.3 * guess
    assert extract(net, images).classes is None
    with pytest.raises(ValueError, match="needs a classifier and labels"):
        accuracy(net, images)


def test_fit_refuses_and_stops(draw: np.random.Generator) -> None:
    with pytest.raises(ValueError, match="steps=0"):
        FitSettings(steps=0)
    images = _bars(draw, 50)
    broken = dataclasses.replace(images, pixels=np.full((50, 1, 12, 12), np.nan, np.float32))
    with pytest.raises(ValueError, match="loss of step 0 is not finite"):
        fit_features(broken, settings=_BRIEF)


@pytest.mark.parametrize("num_classes", [4, None])
def test_saved_features_come_back(tmp_path: Path, num_classes: int | None) -> None:
    net = FeatureNet(3, 12, num_classes).eval()
    net.record = {"data": "nothing", "steps": 0}
    save_features(net, tmp_path / "features")
    back = load_features(tmp_path / "features")
    x = torch.linspace(-1, 1, 2 * 3 * 12 * 12).reshape(2, 3, 12, 12)
    assert torch.equal(back(x)[0], net(x)[0])
    assert (back.record, back.num_classes, back.training) == (net.record, num_classes, False)


def test_altered_features_are_refused(tmp_path: Path) -> None:
    save_features(FeatureNet(1, 12, 4), tmp_path)
    good = json.loads((tmp_path / "config.json").read_text())
    for change, message in (
        ({"size": 16}, r"does not fit the network.*to_features\.weight"),
        ({"channels": "1"}, "channels='1' is no int"),
        ({"num_classes": 1}, "at least 2 classes"),
        ({"width": 3}, "unknown keys: width; missing keys: none"),
        ({"format": "other"}, "does not describe features"),
        ({"sha256": "0"}, "checksum"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**good, **change}))
        with pytest.raises(CheckpointError, match=message):
            load_features(tmp_path)
    with pytest.raises(CheckpointError, match=r"none.config\.json does not exist"):
        load_features(tmp_path / "none")
