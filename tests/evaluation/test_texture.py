"""What the figures of texture are, and that they see damage which a classifier's features do not.

`pytest -s tests/evaluation/test_texture.py -k damage` prints the table of docs/protocol.md.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from scipy import ndimage

from advkd.data import ImageSet, dataset, dataset_names
from advkd.evaluation import figures
from advkd.evaluation.distances import projected
from advkd.evaluation.features import load_features
from advkd.evaluation.figures import compare, measure
from advkd.evaluation.texture import (
    DIRECTIONS,
    FAINT,
    FLOOR,
    PATCH,
    PATCHES,
    band_patches,
    decibels,
    laplacian_bands,
    power_spectra,
    spectrum_distance,
    texture_distance,
)
from advkd.pretrained import resolve

SIDES = [8, 28, 32, 33]
LEVEL = 2 / 255  # an 8-bit level in [-1, 1]


def some(count: int, side: int, channels: int = 1, seed: int = 0) -> torch.Tensor:
    """Noise with coarse and fine parts, in [-1, 1]."""
    draw = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, channels, -(-side // 4), -(-side // 4), generator=draw)
    coarse = coarse.repeat_interleave(4, 2).repeat_interleave(4, 3)[:, :, :side, :side]
    fine = torch.randn(count, channels, side, side, generator=draw)
    return (0.4 * coarse + 0.1 * fine).clamp(-1, 1)


# The Laplacian pyramid


def blurred(x: np.ndarray) -> np.ndarray:
    kernel = np.array([1, 4, 6, 4, 1]) / 16
    for axis in (2, 3):
        x = ndimage.correlate1d(x, kernel, axis=axis, mode="mirror")
    return x


def widened(low: np.ndarray, side: int) -> np.ndarray:
    """Images at half the resolution, at the resolution above."""
    spread = np.zeros((*low.shape[:2], side, side))
    spread[:, :, ::2, ::2] = 4 * low
    return blurred(spread)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("channels", [1, 3])
def test_bands_and_the_rest_give_the_images_back(side: int, channels: int) -> None:
    x = some(3, side, channels).double()
    bands = [band.numpy() for band in laplacian_bands(x)]
    rest = x.numpy()
    for _ in bands:
        rest = blurred(rest)[:, :, ::2, ::2]
    for band in reversed(bands):
        assert np.abs(band).max() > 0.1
        rest = band + widened(rest, band.shape[-1])
    np.testing.assert_allclose(rest, x.numpy(), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("side", "sides"),
    [(8, [8]), (28, [28, 14]), (32, [32, 16]), (33, [33, 17]), (64, [64, 32, 16])],
)
def test_the_last_band_holds_two_patches(side: int, sides: list[int]) -> None:
    x = some(2, side, 3)
    assert [tuple(band.shape) for band in laplacian_bands(x)] == [(2, 3, s, s) for s in sides]
    shapes = [patches.shape for patches in band_patches(x, seed=0)]
    assert shapes == [(2 * PATCHES, 3 * PATCH**2)] * len(sides)


@pytest.mark.parametrize("side", SIDES)
def test_constant_images_have_no_texture(side: int) -> None:
    shades = torch.tensor([-1.0, 0.3, 1.0]).reshape(3, 1, 1, 1).expand(3, 1, side, side)
    for band in laplacian_bands(shades.double()):
        assert float(band.abs().max()) < 1e-12
    assert np.abs(power_spectra(shades)).max() < 1e-12
    assert decibels(power_spectra(shades)) == pytest.approx(10 * np.log10(FLOOR))


def test_patches_are_compressed_bands() -> None:
    """Every pixel of an 8x8 image's only band, in the places where its patches lie."""
    x = some(1, 8, 2)
    expected = np.arcsinh(laplacian_bands(x.double())[0][0].numpy() / FAINT)
    windows = [
        expected[:, top : top + PATCH, left : left + PATCH].ravel().astype(np.float32)
        for top in range(2)
        for left in range(2)
    ]
    (patches,) = band_patches(x, seed=0)
    found = {int(np.abs(np.stack(windows) - patch).max(1).argmin()) for patch in patches}
    assert found == set(range(4))
    for patch in patches:
        assert min(np.abs(window - patch).max() for window in windows) < 1e-6
    assert np.array_equal(band_patches(x, seed=0)[0], patches)
    assert not np.array_equal(band_patches(x, seed=1)[0], patches)


# Spectra


@pytest.mark.parametrize("side", [28, 33])
@pytest.mark.parametrize("frequency", [3, 6, 11, 14])
def test_a_cosine_peaks_at_its_frequency(side: int, frequency: int) -> None:
    phase = 2 * np.pi * frequency * np.arange(side) / side
    rows = np.broadcast_to(0.5 * np.cos(phase), (side, side))
    x = torch.from_numpy(np.stack([rows, rows.T])[:, None].copy())
    power = power_spectra(x)
    assert list(power.argmax(1) + 1) == [frequency] * 2
    # Upright or lying, it is the same.
    np.testing.assert_allclose(power[0], power[1], rtol=1e-9, atol=1e-12)
    far = np.abs(np.arange(1, power.shape[1] + 1) - frequency) > 2
    assert power[0][far].max() < 1e-3 * power[0].max()


@pytest.mark.parametrize("side", SIDES)
def test_the_bins_hold_all_power(side: int) -> None:
    """Parseval: the bins, each times its coefficients, and the mean are the windowed pixels."""
    x = some(4, side, 3).double().numpy()
    hann = np.hanning(side + 2)[1:-1]
    window = np.outer(hann, hann)
    values = (x - x.mean((2, 3), keepdims=True)) * window
    everything = side**2 * (values**2).sum((2, 3)) / (window**2).sum()
    mean = values.sum((2, 3)) ** 2 / (window**2).sum()
    steps = np.fft.fftfreq(side) * side
    radius = np.rint(np.hypot(*np.meshgrid(steps, steps))).astype(int)
    counts = np.bincount(radius.ravel())[1:]
    power = power_spectra(torch.from_numpy(x))
    assert power.shape == (4, len(counts)) and power.dtype == np.float64
    np.testing.assert_allclose(power @ counts, (everything - mean).mean(1), rtol=1e-9)


def test_every_frequency_of_every_size_has_a_bin() -> None:
    for side in range(8, 130):
        assert np.isfinite(power_spectra(torch.ones(1, 1, side, side))).all()


def test_white_noise_has_its_variance_at_every_frequency() -> None:
    rng = np.random.default_rng(0)
    rounding = rng.uniform(-LEVEL / 2, LEVEL / 2, (3000, 1, 28, 28))
    power = power_spectra(torch.from_numpy(rounding)).mean(0)
    # A Hann window spreads the mean, which is taken out, over the lowest frequencies.
    assert power[2:] == pytest.approx(FLOOR, rel=0.05)


# Distances


def patches_of(x: torch.Tensor, seed: int = 0) -> list[np.ndarray]:
    return [projected(band, DIRECTIONS) for band in band_patches(x, seed)]


def test_distances_of_the_same_images_are_zero() -> None:
    x, y = some(20, 28), 0.5 * some(20, 28, seed=1)
    fewer = y[:13]
    assert texture_distance(patches_of(x), patches_of(x)) == 0
    assert spectrum_distance(power_spectra(x), power_spectra(x.flip(0))) == 0
    for other in (y, fewer):
        a, b = patches_of(x), patches_of(other)
        assert texture_distance(a, b) == pytest.approx(texture_distance(b, a), rel=1e-9)
        assert texture_distance(a, b) > 0.05
        p, q = power_spectra(x), power_spectra(other)
        assert spectrum_distance(p, q) == pytest.approx(spectrum_distance(q, p), rel=1e-9)
    # Half the contrast is 6 dB less, but where the floor is near.
    assert spectrum_distance(power_spectra(x), power_spectra(0.5 * x)) == pytest.approx(
        6.02, abs=0.1
    )


def test_projections_are_along_unit_directions() -> None:
    values = np.full((10, 9), 2.0, np.float32)
    found = projected(values, DIRECTIONS)
    assert found.shape == (10, DIRECTIONS) and found.dtype == np.float32
    rng = np.random.default_rng(0)
    one = projected(rng.standard_normal((4000, 9)).astype(np.float32), DIRECTIONS)
    assert one.std(0) == pytest.approx(1, abs=0.06)
    assert (np.diff(one, axis=0) >= 0).all()
    assert np.array_equal(projected(values, DIRECTIONS), found)
    assert not np.array_equal(projected(values, DIRECTIONS, seed=1), found)


def test_an_image_has_the_same_spectrum_and_bands_in_every_batch() -> None:
    x = some(9, 28, 3)
    pieces = np.concatenate([power_spectra(x[:4]), power_spectra(x[4:])])
    np.testing.assert_allclose(pieces, power_spectra(x), rtol=1e-12)
    whole = laplacian_bands(x.double())
    for k, (a, b) in enumerate(
        zip(laplacian_bands(x[:4].double()), laplacian_bands(x[4:].double()), strict=True)
    ):
        torch.testing.assert_close(torch.cat([a, b]), whole[k], rtol=0, atol=1e-14)


def test_images_may_have_any_precision_and_place_in_memory() -> None:
    x = some(6, 28, 3)
    strided = x.contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        for other in (strided, x.double()):
            for a, b in zip(band_patches(x, 0), band_patches(other, 0), strict=True):
                np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)
            np.testing.assert_allclose(power_spectra(x), power_spectra(other), rtol=1e-9)


# Known damage


DROPPED = {"fashion-mnist": 5}  # a class; 0 of other data sets
# How far above the worst block of real images every damage is, at least.
MARGINS = {"texture_fd": 2.5, "texture_swd": 1.25, "spectrum": 1.5}
# Avatars hold so much contour that a grid or grain adds little to any channel's mean or deviation.
HARDLY_SEEN = {("avatars", "texture_fd"): ("checkerboard", "stripes", "noise")}
BLOCK = 2000

Pixels = np.ndarray  # (N, C, S, S) in [-1, 1]


def blur(x: Pixels, rng: np.random.Generator) -> Pixels:
    return ndimage.gaussian_filter(x, (0, 0, 0.6, 0.6), mode="nearest")


def checkerboard(x: Pixels, rng: np.random.Generator) -> Pixels:
    row, column = np.indices(x.shape[2:])
    return x + 0.05 * (1 - 2 * ((row + column) % 2))


def stripes(x: Pixels, rng: np.random.Generator) -> Pixels:
    return x + 0.05 * (1 - 2 * (np.arange(x.shape[3]) % 2))


def noise(x: Pixels, rng: np.random.Generator) -> Pixels:
    return x + rng.normal(0, 4 * LEVEL, x.shape)


def dither(x: Pixels, rng: np.random.Generator) -> Pixels:
    dithered = x + rng.uniform(-0.49, 0.49, x.shape) * LEVEL
    # Rounding takes it away; networks' images, which are not rounded, have the like.
    np.testing.assert_allclose(np.rint((dithered + 1) / LEVEL) * LEVEL - 1, x, atol=1e-6)
    return dithered


DAMAGES: dict[str, Callable[[Pixels, np.random.Generator], Pixels]] = {
    "blur": blur,
    "checkerboard": checkerboard,
    "stripes": stripes,
    "noise": noise,
}


class Rated(NamedTuple):
    """A data set's name, and figures by theirs: of each block of real images, of each damage to the
    first, of a dither."""

    name: str
    real: list[dict[str, Any]]
    damaged: dict[str, dict[str, Any]]
    dithered: dict[str, Any]


def with_features() -> list[str]:
    return [name for name in dataset_names() if dataset(name).features_source]


@pytest.fixture(scope="module", params=with_features())
def rated(request: pytest.FixtureRequest) -> Rated:
    """Blocks of training images, whole and damaged, compared with held-out images."""
    data = dataset(request.param)
    net = load_features(resolve(data.features_source))
    train, held_out = data.train(), data.test()
    reference = measure(net, held_out.subset(np.arange(min(BLOCK, len(held_out)))))
    order = np.random.default_rng(0).permutation(len(train))
    rows = order[:BLOCK]
    rng = np.random.default_rng(1)

    def figures_of(what: str, images: ImageSet | torch.Tensor) -> dict[str, Any]:
        found = compare(reference, measure(net, images))
        print(f"{what:14}", *(f"{key} {found[key]:.4g}" for key in ("fd", *MARGINS)))
        return found

    def changed(change: Callable[[Pixels, np.random.Generator], Pixels]) -> torch.Tensor:
        pixels = train.batch(rows).double().numpy()
        return torch.from_numpy(change(pixels, rng).clip(-1, 1)).float()

    with pytest.MonkeyPatch.context() as patch:
        # The slow figures that nothing here asks for.
        for name, value in (("kernel_distance", 0.0), ("precision_recall", (0.0, 0.0))):
            patch.setattr(figures, name, lambda *arguments, value=value: value)
        real = [
            figures_of(f"real, block {i}", train.subset(order[i * BLOCK : (i + 1) * BLOCK]))
            for i in range(3)
        ]
        damaged = {what: figures_of(what, changed(how)) for what, how in DAMAGES.items()}
        damaged["dropped class"] = figures_of(
            "dropped class", train.subset(dropped(train, order, request.param))
        )
        return Rated(request.param, real, damaged, figures_of("dither", changed(dither)))


def dropped(train: ImageSet, order: np.ndarray, name: str) -> np.ndarray:
    """The first block's rows, those of one class replaced by others from beyond the blocks."""
    assert train.labels is not None
    rows, spare = order[:BLOCK].copy(), order[3 * BLOCK :]
    label = DROPPED.get(name, 0)
    lost = train.labels[rows] == label
    rows[lost] = spare[train.labels[spare] != label][: lost.sum()]
    assert lost.any() and (train.labels[rows] != label).all() and len(set(rows)) == BLOCK
    return rows


@pytest.mark.parametrize("what", [*DAMAGES, "dropped class"])
@pytest.mark.parametrize("key", MARGINS)
def test_every_damage_is_seen(rated: Rated, key: str, what: str) -> None:
    worst = max(block[key] for block in rated.real)
    hardly = what in HARDLY_SEEN.get((rated.name, key), ())
    assert (rated.damaged[what][key] > MARGINS[key] * worst) is not hardly


@pytest.mark.parametrize("key", MARGINS)
def test_what_8_bits_cannot_show_is_no_damage(rated: Rated, key: str) -> None:
    """Flat colours have so little power at high frequencies that a dither adds to it."""
    rel = 0.3 if rated.name == "avatars" and key == "spectrum" else 0.02
    assert rated.dithered[key] == pytest.approx(rated.real[0][key], rel=rel)


@pytest.mark.parametrize("rated", ["fashion-mnist"], indirect=True)
def test_fd_does_not_see_damage_to_texture(rated: Rated) -> None:
    """Noise is a tenth of a dropped class to it, at most, and a blur is less than one."""

    def excess(key: str, what: str) -> float:
        return float(rated.damaged[what][key] - max(block[key] for block in rated.real))

    lost = {key: excess(key, "dropped class") for key in ("fd", "texture_fd")}
    assert excess("fd", "noise") < 0.1 * lost["fd"]
    assert excess("fd", "blur") < lost["fd"]
    assert excess("texture_fd", "noise") > 0.5 * lost["texture_fd"]
    assert excess("texture_fd", "blur") > 5 * lost["texture_fd"]
