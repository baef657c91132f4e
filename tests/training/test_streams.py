"""Random numbers by (seed, step, stream), and torch's global generators left alone."""

from __future__ import annotations

import pytest
import torch

from advkd.training.streams import generator_at, global_seed, mixed_seed

CPU = torch.device("cpu")


def numbers(seed: int, step: int, stream: str) -> tuple[float, ...]:
    return tuple(torch.rand(4, generator=generator_at(seed, step, stream)).tolist())


def test_generators_depend_on_seed_step_and_stream_only() -> None:
    torch.manual_seed(5)
    first = numbers(3, 7, "teacher")
    torch.manual_seed(6)
    assert numbers(3, 7, "teacher") == first
    found = {
        numbers(seed, step, stream)
        for seed in (0, 1, 2, 2**62)
        for step in (*range(50), 10**7)
        for stream in ("", "teacher", "distill", "distil2")
    }
    assert len(found) == 4 * 51 * 4


def test_the_streams_numbers_are_fixed() -> None:
    """They are part of every training's bits."""
    assert mixed_seed(0, 0, "teacher") == 0x27B1CCDD9F581A83
    assert mixed_seed(2**64 - 1, 10**6, "distil") == 0x35C945B20C84192C


def test_generators_leave_the_global_one_alone() -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    torch.rand(3, generator=generator_at(0, 0, "x"))
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("error", [False, True])
def test_the_global_generator_is_seeded_for_a_while(error: bool) -> None:
    torch.manual_seed(5)
    inside = torch.rand(3)
    torch.manual_seed(1)
    expected = torch.rand(2), torch.rand(2)
    torch.manual_seed(1)
    first = torch.rand(2)
    try:
        with global_seed(5, CPU):
            assert torch.equal(torch.rand(3), inside)
            if error:
                raise KeyError
    except KeyError:
        pass
    assert torch.equal(first, expected[0]) and torch.equal(torch.rand(2), expected[1])
