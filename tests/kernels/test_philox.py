"""Philox4x32-10 and its normals: published vectors, bits across backends, quality."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from scipy import stats

from advkd import ops
from advkd.ops import reference

# counter, key, output: Random123's file kat_vectors, philox4x32 with 10 rounds
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (
        (0xFFFFFFFF,) * 4,
        (0xFFFFFFFF,) * 2,
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
SHAPES = [(1, 1, 1), (3, 7, 5), (5, 33, 31), (2, 64, 64), (1, 1, 257), (17, 2, 3)]
LAYOUTS = [torch.contiguous_format, torch.channels_last]
INDICES = torch.tensor([0, 7, (1 << 40) + 3])


def known_answer(counter: tuple[int, ...], key: tuple[int, ...], backend: str) -> list[int]:
    block, step, low, high = counter
    index = low | high << 32
    index = index - (1 << 64) if index >= 1 << 63 else index
    numbers = ops.philox_uint32(
        key[0] | key[1] << 32, torch.tensor([index]), step, 4, first_block=block, backend=backend
    )
    return numbers[0].tolist()


@pytest.mark.parametrize(("counter", "key", "output"), KNOWN_ANSWERS)
def test_fused_numbers_are_the_published_ones(
    counter: tuple[int, ...], key: tuple[int, ...], output: tuple[int, ...], isa: str
) -> None:
    assert known_answer(counter, key, "fused") == list(output)


@pytest.mark.parametrize(("counter", "key", "output"), KNOWN_ANSWERS)
def test_reference_numbers_are_the_published_ones(
    counter: tuple[int, ...], key: tuple[int, ...], output: tuple[int, ...]
) -> None:
    assert known_answer(counter, key, "reference") == list(output)


@pytest.mark.parametrize("count", [0, 1, 5, 256, 257, 5000])
def test_numbers_agree_and_fill_every_place(count: int, isa: str, nan_filled: None) -> None:
    args = (12345, INDICES, 3, count)
    fused = ops.philox_uint32(*args, backend="fused")
    assert fused.shape == (3, count)
    assert torch.equal(fused, ops.philox_uint32(*args, backend="reference"))


@pytest.mark.parametrize("memory_format", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", [0, (1 << 63) + 5])
def test_normals_are_the_same_bits_in_cpp_and_torch(
    seed: int, shape: tuple[int, int, int], memory_format: torch.memory_format, isa: str,
    nan_filled: None,
) -> None:  # fmt: skip
    fused, plain = (
        ops.philox_normal(
            seed, INDICES, ops.X_T_STEP, shape, memory_format=memory_format, backend=backend
        )
        for backend in ("fused", "reference")
    )
    assert fused.stride() == plain.stride()
    assert fused.is_contiguous(memory_format=memory_format)
    assert torch.equal(fused, plain)


def test_many_normals_are_the_same_bits_in_cpp_and_torch(isa: str) -> None:
    args = (99, torch.arange(16), 4, (3, 128, 128))
    fused = ops.philox_normal(*args, backend="fused")
    plain = ops.philox_normal(*args, backend="reference")
    assert torch.equal(fused.view(torch.int32), plain.view(torch.int32))


@pytest.mark.parametrize("backend", ["fused", "reference"])
def test_normals_do_not_depend_on_layout_batch_or_threads(backend: str, set_threads: Any) -> None:
    if backend == "fused" and ops.extension is None:
        pytest.skip("the C++ extension is not installed")
    shape = (3, 37, 41)
    whole = ops.philox_normal(1, torch.arange(9), 2, shape, backend=backend)
    last = ops.philox_normal(
        1, torch.arange(9), 2, shape, memory_format=torch.channels_last, backend=backend
    )
    assert torch.equal(whole, last)
    picked = torch.tensor([8, 0, 5])
    set_threads(5)
    assert torch.equal(whole[picked], ops.philox_normal(1, picked, 2, shape, backend=backend))
    # An index tensor with gaps in memory names the same images.
    gaps = torch.stack([picked, picked + 1], dim=1)[:, 0]
    assert torch.equal(whole[picked], ops.philox_normal(1, gaps, 2, shape, backend=backend))


def test_normal_n_is_made_from_its_own_numbers() -> None:
    bits = ops.philox_uint32(3, torch.tensor([11]), 6, 8)[0].tolist()
    normals = ops.philox_normal(3, torch.tensor([11]), 6, (2, 2, 2)).flatten().tolist()
    for pair in range(4):
        u, turn = (bits[2 * pair] + 0.5) / 2**32, bits[2 * pair + 1] / 2**32
        radius = math.sqrt(-2 * math.log(u))
        assert normals[2 * pair] == pytest.approx(
            radius * math.cos(2 * math.pi * turn), rel=1e-5, abs=1e-6
        )
        assert normals[2 * pair + 1] == pytest.approx(
            radius * math.sin(2 * math.pi * turn), rel=1e-5, abs=1e-6
        )


def hard_bits() -> torch.Tensor:
    """Random 32-bit numbers and the neighborhoods of all powers of two and of their multiples."""
    powers = torch.tensor([1 << k for k in range(33)])
    near = (powers[:, None] + torch.arange(-64, 65)).flatten()
    thirds = (torch.arange(1, 8)[:, None] << 29) + torch.arange(-64, 65)
    bits = torch.cat([near, thirds.flatten(), torch.randint(1 << 32, (1 << 20,))])
    return bits & 0xFFFFFFFF


def test_radius_is_within_two_ulp() -> None:
    bits = hard_bits()
    u = (bits.float().double() + 0.5) / 2**32
    # The formula's own rounding of u to float32 is no error of the logarithm.
    u = u.float().double()
    exact = torch.sqrt(-2 * torch.log(u))
    radius = reference._box_muller_radius(bits).double()
    assert torch.all(radius[u == 1] == 0)
    away = u < 1
    relative = ((radius - exact).abs() / exact)[away].max().item()
    assert relative < 2 * 2**-23


def test_sine_and_cosine_are_within_two_ulp() -> None:
    bits = hard_bits()
    angle = bits.double() * (2 * math.pi / 2**32)
    sine, cosine = reference._box_muller_angle(bits)
    eps = 2.0**-23
    # Float64's own argument error near the zeros of the functions is allowed for by the 1e-14.
    assert torch.all((sine - angle.sin()).abs() <= 2 * eps * angle.sin().abs() + 1e-14)
    assert torch.all((cosine - angle.cos()).abs() <= 2 * eps * angle.cos().abs() + 1e-14)


def test_normals_are_normal() -> None:
    sample = ops.philox_normal(2024, torch.arange(64), 1, (3, 128, 128)).double().flatten()
    n = len(sample)
    # Each bound is 5 standard errors of the estimate for n independent normals.
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10170)):
        error = (sample**power).mean().item() - moment
        assert abs(error) < 5 * math.sqrt(variance / n), power
    assert stats.kstest(sample.numpy(), "norm").pvalue > 1e-4
    for bound in (3.0, 4.0, 4.5):
        expected = 2 * stats.norm.sf(bound) * n
        found = (sample.abs() > bound).sum().item()
        assert abs(found - expected) < 5 * math.sqrt(expected), bound
    assert 4.8 < sample.abs().max() < 6.0


def test_tails_reach_beyond_six() -> None:
    assert 6.7 < reference._box_muller_radius(torch.tensor([0])).item() < 6.8


@pytest.mark.parametrize("other", ["pixel", "image", "step", "seed"])
def test_neighboring_normals_are_uncorrelated(other: str) -> None:
    args = {"seed": 5, "image_index": torch.arange(16), "step": 3, "shape": (1, 256, 256)}
    first = ops.philox_normal(**args)
    if other == "pixel":
        second = first.roll(1, dims=-1)
    elif other == "image":
        second = ops.philox_normal(**args | {"image_index": torch.arange(16) + 1})
    else:
        second = ops.philox_normal(**args | {other: args[other] + 1})
    correlation = (first * second).mean().item()
    square = (first.square() * second.square()).mean().item() - 1
    assert abs(correlation) < 5 / math.sqrt(first.numel())
    assert abs(square) < 5 * math.sqrt(8 / first.numel())


def test_labels_are_uniform_and_fixed() -> None:
    labels = ops.philox_labels(4, torch.arange(20000), 7)
    counts = torch.bincount(labels, minlength=7)
    assert len(counts) == 7
    assert stats.chisquare(counts.numpy()).pvalue > 1e-4
    assert torch.equal(labels[100:110], ops.philox_labels(4, torch.arange(100, 110), 7))
    assert torch.equal(labels, ops.philox_labels(4, torch.arange(20000), 7, backend="reference"))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"seed": -1}, ValueError, "seed=-1"),
        ({"seed": 1 << 64}, ValueError, "seed="),
        ({"step": 1 << 32}, ValueError, "step="),
        ({"image_index": torch.zeros(3)}, TypeError, "int64"),
        ({"image_index": torch.zeros(1, 3, dtype=torch.int64)}, ValueError, "2 dimensions"),
        ({"shape": (3, 4)}, ValueError, "shape="),
        ({"shape": (3, 0, 4)}, ValueError, "shape="),
        ({"memory_format": torch.preserve_format}, ValueError, "memory_format"),
        ({"backend": "cuda"}, ValueError, "backend is 'cuda'"),
    ],
)
def test_bad_arguments_are_refused(
    change: dict[str, Any], error: type[Exception], words: str
) -> None:
    args = {"seed": 1, "image_index": torch.arange(2), "step": 1, "shape": (1, 2, 2)} | change
    with pytest.raises(error, match=words):
        ops.philox_normal(**args)


def test_no_image_gives_no_normals() -> None:
    empty = torch.empty(0, dtype=torch.int64)
    assert ops.philox_normal(1, empty, 1, (3, 4, 5)).shape == (0, 3, 4, 5)
    assert ops.philox_normal(1, empty, 1, (3, 4, 5), backend="reference").shape == (0, 3, 4, 5)


@pytest.mark.parametrize("fused", [True, False])
def test_ops_are_registered_correctly(fused: bool) -> None:
    if fused and ops.extension is None:
        pytest.skip("the C++ extension is not installed")
    torch.library.opcheck(torch.ops.advkd.philox_uint32, (3, INDICES, 4, 9, 1, fused))
    torch.library.opcheck(torch.ops.advkd.philox_normal, (3, INDICES, 4, 2, 3, 5, True, fused))


@pytest.mark.gpu
def test_normals_on_cuda_are_the_same_bits() -> None:
    args = (99, torch.arange(4), 4, (3, 64, 64))
    cuda = ops.philox_normal(99, torch.arange(4, device="cuda"), 4, (3, 64, 64))
    assert torch.equal(cuda.cpu(), ops.philox_normal(*args, backend="reference"))
