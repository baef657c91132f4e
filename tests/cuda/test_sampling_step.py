"""The CUDA sampling step and the loop around it, emulated: the CPU's bits in any order of threads.

Memory ends at guard pages, shared memory and results begin as NaN, and work is done only when
somebody waits for it.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness import ORDERS, ToyLoop, expected

from advkd.diffusion import Schedule, StepTable, ddim_table, ddpm_table
from advkd.engine.noise import Noise, Purpose

SEED = (1 << 63) + 12345
TYPES = [torch.float32, torch.float16, torch.bfloat16]
# Whole vectors, parts of tiles, odd sides, one element, planes that begin inside a Philox block.
SHAPES = [(1, 1, 1), (3, 8, 8), (3, 7, 5), (1, 28, 28), (4, 6, 11), (3, 20, 20), (5, 13, 17)]


def check(
    cuda: Any, table: StepTable, batch: int, shape: tuple[int, int, int], dtype: torch.dtype,
    target: str = "denoised", align: int | None = None, half: bool = False, chunk: int = 3,
    purpose: Purpose = Purpose.TRAINING,
) -> None:  # fmt: skip
    """The targets at a third, two thirds and the end have the very bits of the CPU's loop."""
    N = len(table)
    saved = sorted({max(1, N // 3), max(1, 2 * N // 3), N})
    indices, noise = torch.arange(batch) * 3 + (1 << 32) - 2, Noise(SEED, purpose)
    loop = ToyLoop(cuda, batch, shape, dtype, align)
    got = loop.run(table, noise, indices, saved=saved, target=target, half=half, chunk=chunk)
    want = expected(table, noise, indices, shape, dtype, saved, target)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b.half() if half else b)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_noise_and_update_have_the_cpus_bits(
    cuda: Any, shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    check(cuda, ddim_table(Schedule(), 4, eta=1.0), 3, shape, dtype)


@pytest.mark.parametrize("purpose", Purpose)
def test_every_purpose_has_noise_of_its_own(cuda: Any, purpose: Purpose) -> None:
    """That of the CPU for this purpose, and another than that of any other purpose."""
    table = ddim_table(Schedule(), 3, eta=1.0)
    check(cuda, table, 2, (3, 8, 8), torch.float32, purpose=purpose)
    others = [p for p in Purpose if p is not purpose]
    indices = torch.arange(2)
    ours, *theirs = (
        expected(table, Noise(SEED, p), indices, (3, 8, 8), torch.float32, [3], "state")[0]
        for p in (purpose, *others)
    )
    assert not any(torch.equal(ours, other) for other in theirs)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("shape", [(3, 7, 5), (3, 24, 24)])
def test_bits_do_not_depend_on_the_order_of_threads(
    cuda: Any, shape: tuple[int, int, int], order: int
) -> None:
    cuda.set_order(order)
    check(cuda, ddim_table(Schedule(), 3, eta=0.5), 2, shape, torch.float32)


@pytest.mark.parametrize("batch", [1, 2, 17, 65])
def test_batches(cuda: Any, batch: int) -> None:
    check(cuda, ddim_table(Schedule(), 3, eta=1.0), batch, (3, 6, 6), torch.bfloat16)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_fifty_steps(cuda: Any, eta: float) -> None:
    check(cuda, ddim_table(Schedule(), 50, eta=eta), 2, (3, 8, 8), torch.float32, chunk=7)


@pytest.mark.parametrize("target", ["denoised", "state"])
@pytest.mark.parametrize("half", [False, True])
def test_saved_targets(cuda: Any, target: str, half: bool) -> None:
    table = ddim_table(Schedule(clip_sample=False), 9, eta=0.0)
    check(cuda, table, 2, (3, 8, 8), torch.float16, target, half=half)
    check(cuda, table, 2, (3, 7, 5), torch.float32, target, half=half)


def test_ddpm(cuda: Any) -> None:
    table = ddpm_table(Schedule(num_train_timesteps=12))
    check(cuda, table, 2, (3, 8, 8), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(3, 8, 8), (3, 8, 9)])
def test_memory_that_does_not_begin_at_16_bytes(
    cuda: Any, shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    # 3 x 8 x 9 elements are aligned for no half type; the tensors end at a guard page all the same.
    table = ddim_table(Schedule(), 2, eta=1.0)
    check(cuda, table, 1, shape, dtype, align=4 if shape[2] == 9 else None)


def test_many_channels(cuda: Any) -> None:
    table = ddim_table(Schedule(), 2, eta=1.0)
    check(cuda, table, 2, (128, 3, 5), torch.float32)
    with pytest.raises(ValueError, match="from 1 to 128 channels"):
        check(cuda, table, 2, (129, 3, 5), torch.float32)


def test_nan_stays_and_a_run_leaves_nothing_behind(cuda: Any) -> None:
    """Two runs over the same buffers, with other seeds and lengths, and the first again."""
    loop = ToyLoop(cuda, 2, (3, 8, 8), torch.float32)
    indices = torch.arange(2)
    tables = [ddim_table(Schedule(), n, eta=1.0) for n in (4, 7, 4)]
    found = [
        loop.run(table, Noise(seed, Purpose.SAMPLING), indices, saved=[len(table)], target="state")
        for table, seed in zip(tables, (1, 2, 1), strict=True)
    ]
    assert torch.equal(found[0][0], found[2][0])
    assert not torch.equal(found[0][0], found[1][0])
    coefficients = tables[0].coefficients.copy()
    coefficients[2, 0] = float("nan")
    broken = StepTable(tables[0].timesteps, coefficients, tables[0].clip)
    noise = Noise(1, Purpose.SAMPLING)
    assert loop.run(broken, noise, indices, saved=[4], target="state")[0].isnan().all()
