"""The CUDA kernel of Philox normals, emulated: the CPU's bits in any order of threads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness import ORDERS, guarded, nan_filled

from advkd import ops

SEED = (1 << 63) + 12345
INDICES = torch.tensor([0, 7, (1 << 40) + 3, -1])
# Whole blocks of threads, parts of one, planes that begin inside a Philox block, one element.
SHAPES = [(1, 1, 1), (3, 7, 5), (1, 16, 32), (4, 6, 11), (3, 20, 20), (5, 33, 31)]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_normals_have_the_cpus_bits(
    cuda: Any, shape: tuple[int, int, int], channels_last: bool, order: int
) -> None:
    cuda.set_order(order)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    want = ops.philox_normal(SEED, INDICES, 0xFFFFFFFF, shape, memory_format=layout)
    got, indices = nan_filled(cuda, want), guarded(cuda, INDICES)
    cuda.cuda_philox_normal(
        seed=SEED, image_index=indices.data_ptr(), step=0xFFFFFFFF,
        sizes=(len(indices), shape[0], shape[1] * shape[2]), channels_last=channels_last,
        out=got.data_ptr(), device=0, stream=0,
    )  # fmt: skip
    cuda.synchronize()
    assert torch.equal(got, want)


def test_no_images_and_too_many(cuda: Any) -> None:
    sizes: dict[str, Any] = {
        "seed": 0, "image_index": 0, "step": 0, "channels_last": False, "out": 0, "device": 0,
        "stream": 0,
    }  # fmt: skip
    cuda.launches()
    cuda.cuda_philox_normal(sizes=(0, 3, 64), **sizes)
    assert cuda.launches() == {}
    with pytest.raises(ValueError, match="at most 2\\^31 blocks"):
        cuda.cuda_philox_normal(sizes=(1 << 31, 1, 1), **sizes)
