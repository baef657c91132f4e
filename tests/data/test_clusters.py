"""Clusters: equal in size, of like images, always the same, and in the place of classes."""

from __future__ import annotations

import numpy as np
import pytest

from advkd.data import DataError, ImageSet, clusters
from advkd.data.clusters import SIDE, Clusters, clustered, fit_clusters
from advkd.data.split import hold_out, with_clusters


def noise(num: int, channels: int = 2, size: int = 2 * SIDE) -> ImageSet:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (num, channels, size, size), dtype=np.uint8)
    return ImageSet(pixels, None, "noise")


def stated(clusters: Clusters, image: np.ndarray) -> int:
    """From the root down to a leaf, one image and one node at a time."""
    small = image.reshape(image.shape[0], SIDE, -1, SIDE, image.shape[-1] // SIDE).mean((2, 4))
    node, inner = 0, len(clusters.thresholds)
    while node < inner:
        beyond = small.flatten() @ clusters.directions[node] > clusters.thresholds[node]
        node = 2 * node + (2 if beyond else 1)
    return node - inner


def test_clusters_are_equal_in_size_and_as_stated() -> None:
    images = noise(64)
    clusters = fit_clusters(images, 8)
    found = clusters.labels(images)
    assert np.bincount(found).tolist() == [8] * 8
    floats = images.batch(np.arange(64)).double().numpy()
    assert found.tolist() == [stated(clusters, image) for image in floats]
    assert np.array_equal(clusters.labels(images.subset(range(5, 9))), found[5:9])
    assert np.array_equal(fit_clusters(images, 8).directions, clusters.directions)


def test_more_images_than_are_made_small_at_once() -> None:
    images = noise(2100, 1, SIDE)
    assert np.bincount(fit_clusters(images, 4).labels(images)).tolist() == [525] * 4


@pytest.mark.parametrize("size", [SIDE - 2, SIDE + 2, 4 * SIDE])
def test_like_images_are_together(size: int) -> None:
    kinds = np.random.default_rng(1).integers(20, 230, (4, 3, size, size))
    pixels = np.repeat(kinds, 16, axis=0) + np.arange(16).repeat(4).reshape(64, 1, 1, 1)
    images = ImageSet(pixels.astype(np.uint8), None, "kinds")
    found = fit_clusters(images, 4).labels(images).reshape(4, 16)
    assert sorted(set(row) for row in found.tolist()) == sorted({i} for i in found[:, 0])
    assert len(set(found[:, 0])) == 4


def test_images_that_are_all_alike() -> None:
    """Some clusters stay empty; every image still has one."""
    images = ImageSet(np.full((8, 1, 9, 9), 7, np.uint8), None, "grey")
    found = fit_clusters(images, 8).labels(images)
    assert ((found >= 0) & (found < 8)).all() and len(set(found)) == 1


def test_they_take_the_place_of_classes() -> None:
    images = noise(60)
    named = ImageSet(images.pixels, np.arange(60) % 2, "named", ("a", "b"), ("a note",))
    split = hold_out(named)
    found = with_clusters(split, 4)
    assert found.train.num_classes == 4 and found.train.classes is None
    assert found.train.notes == ("a note", "4 clusters of like images in the place of classes")
    assert np.array_equal(found.train.pixels, split.train.pixels)
    clusters = fit_clusters(split.train, 4)  # what is held out has no part in finding them
    assert np.array_equal(
        clustered(split.held_out, clusters).labels, clusters.labels(found.held_out)
    )
    assert np.array_equal(found.held_out.labels, clusters.labels(split.held_out))


@pytest.mark.parametrize(
    ("num", "message"),
    [(1, "not a power of 2"), (24, "not a power of 2"), (64, "noise has 60 images for .*=64")],
)
def test_what_cannot_be(num: int, message: str) -> None:
    with pytest.raises(DataError, match=message):
        fit_clusters(noise(60), num)


def test_very_many_images_are_halved_by_a_part_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    images = noise(3000)
    expected = fit_clusters(images, 4)
    together = expected.labels(images)
    monkeypatch.setattr(clusters, "MAX_POINTS", 700 * 8 * 2 * SIDE**2)  # 700 images
    assert np.array_equal(expected.labels(images), together)
    found = fit_clusters(images, 4)
    assert not np.array_equal(found.directions, expected.directions)
    assert np.array_equal(fit_clusters(images, 4).directions, found.directions)
    shares = np.bincount(found.labels(images)) / len(images)
    assert np.abs(shares - 1 / 4).max() < 5 * np.sqrt(3 / 16 / 700)  # as of 700 picked at random
    monkeypatch.setattr(clusters, "MAX_POINTS", 1)
    assert len(fit_clusters(images, 4).thresholds) == 3  # there are as many as clusters
