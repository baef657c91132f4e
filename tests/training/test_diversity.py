"""Images of one label are held apart up to the distance that the data's own have."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from advkd.data.images import ImageSet
from advkd.data.trajectories import Trajectories
from advkd.training.diversity import missing_distance, typical_distances, typical_of_data


def plain(values: list[float]) -> Tensor:
    """Images of one value each."""
    return torch.tensor(values).reshape(-1, 1, 1, 1).expand(-1, 1, 3, 3)


def test_the_distances_are_those_of_neighbors_within_a_label() -> None:
    x, y = plain([0.0, 9.0, 1.0, 9.5, 3.0, 5.0]), torch.tensor([0, 1, 0, 1, 0, 3])
    found = typical_distances(x.__getitem__, torch.arange(6), y, 4)
    torch.testing.assert_close(found[:2], torch.tensor([1.5, 0.5]))
    everything = (9.0 + 8.0 + 8.5 + 6.5 + 2.0) / 5  # where a label has no two images
    torch.testing.assert_close(found[2:], torch.full((2,), everything))
    found = typical_distances(x.__getitem__, torch.arange(6), None, None)
    torch.testing.assert_close(found, torch.tensor([everything]))
    assert typical_distances(x.__getitem__, torch.arange(1), None, None).item() == 0


@pytest.mark.parametrize("size", [8, 64, 128])
def test_images_in_parts_have_the_bits_of_all_at_once(size: int) -> None:
    x = torch.randn(152, 3, size, size, generator=torch.Generator().manual_seed(0))
    rows = torch.randperm(152, generator=torch.Generator().manual_seed(1))
    y, most = (rows < 51).long(), 0  # labels of one and of two parts

    def images_of(some: Tensor) -> Tensor:
        nonlocal most
        most = max(most, len(some))
        return x[some]

    found = typical_distances(images_of, rows, y, 2)
    for label in range(2):
        own = x[rows[y == label]]
        assert found[label] == (own[1:] - own[:-1]).abs().mean(dim=(1, 2, 3)).mean()
    assert most == 51


def test_only_what_is_too_close_is_pushed() -> None:
    a = plain([0.0, 0.0]).clone().requires_grad_()
    missing = missing_distance(a, plain([0.5, 2.0]), torch.tensor([1.0, 1.0]))
    torch.testing.assert_close(missing, torch.tensor([0.5, 0.0]))
    (gradient,) = torch.autograd.grad(missing.sum(), a)
    torch.testing.assert_close(gradient[0], torch.full((1, 3, 3), 1 / 9))  # away from 0.5
    assert not gradient[1].any()


@pytest.mark.parametrize("classes", [False, True])
def test_it_looks_at_images_else_at_what_trajectories_end_in(
    request: pytest.FixtureRequest, classes: bool
) -> None:
    store: Trajectories = request.getfixturevalue("store_with_classes" if classes else "store")
    num = store.index.num_classes
    of_store = typical_of_data(None, store, torch.Generator().manual_seed(0))
    assert of_store.shape == (num or 1,) and (of_store > 0).all()
    gray = np.linspace(-1, 1, 40, dtype=np.float32).reshape(-1, 1, 1, 1)
    labels = np.arange(40) % (num or 2)
    images = ImageSet(np.broadcast_to(gray, (40, 1, 8, 8)).copy(), labels, "ramps")
    found = typical_of_data(images, store, torch.Generator().manual_seed(0))
    assert found.shape == (num or 1,)
    # Two independent numbers between -1 and 1 are 2/3 apart.
    assert abs(float(found.mean()) - 2 / 3) < 0.2
