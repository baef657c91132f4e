"""The C++ sampling loop: precision, saved targets, bits, purposes of noise, interrupts, float16."""

from __future__ import annotations

import copy
import dataclasses
import os
import signal
import threading
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from advkd import ops
from advkd.config import UNetConfig
from advkd.diffusion import Schedule, StepTable, ddim_table, ddpm_table
from advkd.engine.networks import lower_unet, time_plan
from advkd.engine.noise import MAX_STEPS, PURPOSE_BITS, Noise, Purpose
from advkd.models.layers import timestep_embedding
from advkd.models.unet import UNet

pytestmark = pytest.mark.skipif(ops.extension is None, reason="the C++ extension is not installed")

SCHEDULE = Schedule(num_train_timesteps=100, clip_sample=False)
CONFIG = UNetConfig(
    sample_size=8,
    in_channels=2,
    out_channels=2,
    block_out_channels=(8, 16),
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    layers_per_block=1,
    norm_num_groups=4,
)
SHAPE = (2, 8, 8)
SEED = 9


def teacher(num_classes: int | None = None) -> UNet:
    torch.manual_seed(0)
    config = dataclasses.replace(CONFIG, num_class_embeds=num_classes)
    return UNet(config, SCHEDULE).eval().requires_grad_(False)


class Loop:
    """A teacher's plan and the C++ loop over it, called as the engine calls them."""

    def __init__(self, unet: UNet, side: int = 8, batch: int = 4):
        low = lower_unet(unet, (side, side), batch, threads=1)
        self.unet, self.side = unet, side
        self.plan, self.time = low.plan.finished(), time_plan(low, unet)
        self.compiled, self.compiled_time = self.plan.compiled(), self.time.compiled()

    def conditioning(self, timesteps: list[int]) -> Tensor:
        """(N, conditioning)"""
        width = self.unet.config.block_out_channels[0]
        x = timestep_embedding(torch.tensor(timesteps), width).contiguous()
        out = torch.full((len(timesteps), self.plan.conditioning), float("nan"))
        self.compiled_time.run(
            x=x.data_ptr(), y=out.data_ptr(), conditioning=0, labels=0, images=len(timesteps),
            threads=1, nan_fill=True,
        )  # fmt: skip
        return out

    def run(self, x: Tensor, t: int, labels: Tensor | None = None) -> Tensor:
        """One network pass: x (B, C, H, W) -> the same shape, channels_last."""
        dense = x.permute(0, 2, 3, 1).contiguous()
        out, conditioning = torch.full_like(dense, float("nan")), self.conditioning([t])
        self.compiled.run(
            x=dense.data_ptr(), y=out.data_ptr(), conditioning=conditioning.data_ptr(),
            labels=0 if labels is None else labels.data_ptr(), images=len(x), threads=1,
            nan_fill=True,
        )  # fmt: skip
        return out.permute(0, 3, 1, 2)

    def sample(
        self,
        table: StepTable,
        indices: Tensor,
        saved: tuple[int, ...] = (),
        *,
        out: Tensor | None = None,
        labels: Tensor | None = None,
        target: str = "denoised",
        seed: int = SEED,
        purpose: int = 0,
        **options: Any,
    ) -> Tensor:
        """(B, K, C, H, W), NaN where nothing was written; `saved` is the last step by default."""
        saved = saved or (len(table),)
        if out is None:
            shape = (len(indices), len(saved), SHAPE[0], self.side, self.side)
            out = torch.full(shape, float("nan"))
        conditioning = self.conditioning(table.timesteps.tolist())
        coefficients = torch.tensor(table.coefficients, dtype=torch.float64)
        indices = indices.contiguous()
        self.compiled.sample(
            coefficients=coefficients.data_ptr(), conditioning=conditioning.data_ptr(),
            steps=len(table), clip=table.clip, seed=seed, purpose=purpose,
            image_index=indices.data_ptr(), labels=0 if labels is None else labels.data_ptr(),
            images=len(indices), saved=list(saved), save_denoised=target == "denoised",
            out=out.data_ptr(), half=out.dtype is torch.float16, image_stride=out.stride(0),
            saved_stride=out.stride(1),
            **{"threads": 2, "on_pass": None, "on_step": None, "nan_fill": False} | options,
        )  # fmt: skip
        return out


@pytest.fixture(scope="module")
def loop() -> Loop:
    return Loop(teacher())


def numbers(*which: int) -> Tensor:
    return torch.tensor(which, dtype=torch.int64)


def exactly(table: StepTable, indices: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """States and clean estimates after every step, in float64 from the table's definition."""
    unet = copy.deepcopy(teacher()).double()
    x_t = ops.philox_normal(SEED, indices, ops.X_T_STEP, SHAPE).double()
    states, estimates = [], []
    with ops.use_backend("reference"):
        for i, t in enumerate(table.timesteps.tolist()):
            a_x, a_m, c_0, c_x, c_m, sigma = table.coefficients[i].tolist()
            m = unet(x_t, t)
            x0_hat = a_x * x_t + a_m * m
            if table.clip:
                x0_hat = x0_hat.clamp(-table.clip, table.clip)
            z = ops.philox_normal(SEED, indices, i, SHAPE).double()
            x_t = c_0 * x0_hat + c_x * x_t + c_m * m + sigma * z
            states.append(x_t)
            estimates.append(x0_hat)
    return states, estimates


def distance(found: Tensor, truth: Tensor) -> float:
    return float((found.double() - truth).norm() / truth.norm())


TABLES = {
    "ddim": ddim_table(SCHEDULE, 6),
    "ddim, eta 0.5": ddim_table(SCHEDULE, 6, 0.5),
    "ddpm": ddpm_table(SCHEDULE, 6),
    "ddim, clipped": ddim_table(dataclasses.replace(SCHEDULE, clip_sample=True), 6),
}


@pytest.mark.parametrize("target", ["denoised", "state"])
@pytest.mark.parametrize("name", TABLES)
def test_saved_targets(loop: Loop, name: str, target: str) -> None:
    table, indices = TABLES[name], numbers(5, 0, 1 << 40)
    states, estimates = exactly(table, indices)
    between = estimates if target == "denoised" else states
    found = loop.sample(table, indices, (1, 4, 6), target=target)
    for ours, truth in zip(found.unbind(1), (between[0], between[3], states[-1]), strict=True):
        assert distance(ours, truth) <= 1e-4


def test_a_trajectory_of_50_steps_stays_close(loop: Loop) -> None:
    """The accuracy budget of a whole trajectory; a network this size is far within it."""
    table, indices = ddim_table(SCHEDULE, 50), numbers(0, 1)
    assert distance(loop.sample(table, indices)[:, 0], exactly(table, indices)[0][-1]) <= 1e-3


@pytest.mark.parametrize("cycles", [1e3, 1e4, 1e5])
def test_bits_do_not_depend_on_which_operations_are_shared(loop: Loop, cycles: float) -> None:
    table, indices = TABLES["ddpm"], numbers(0, 1)
    alone = loop.sample(table, indices, threads=1, nan_fill=True)
    assert ops.extension is not None
    ops.extension.set_worth_sharing(cycles)
    assert torch.equal(loop.sample(table, indices, threads=3, nan_fill=True), alone)


@pytest.mark.parametrize("name", TABLES)
def test_bits_depend_neither_on_batch_nor_on_threads(loop: Loop, name: str) -> None:
    table, indices = TABLES[name], torch.arange(100, 119)
    whole = loop.sample(table, indices, (2, 6), threads=1)
    for threads in (1, 2, 5):
        backward = loop.sample(table, indices.flip(0), (2, 6), threads=threads)
        assert torch.equal(backward, whole.flip(0))
        for part in ([0], [18, 3], [4, 5, 6, 7, 8]):
            found = loop.sample(table, indices[part], (2, 6), threads=threads)
            assert torch.equal(found, whole[part])


def test_nothing_is_read_that_was_not_written(loop: Loop) -> None:
    table, indices = TABLES["ddim, eta 0.5"], torch.arange(6)
    clean = loop.sample(table, indices, (3, 6))
    assert torch.equal(loop.sample(table, indices, (3, 6), nan_fill=True), clean)
    assert clean.isfinite().all()


def test_labels_choose_the_class_of_each_image() -> None:
    loop, table = Loop(teacher(num_classes=3)), TABLES["ddim"]
    labels = numbers(2, 0, 1, 2, 1)
    together = loop.sample(table, torch.arange(5), labels=labels)
    for i in range(5):
        alone = loop.sample(table, numbers(i), labels=labels[i : i + 1].clone())
        assert torch.equal(alone[0], together[i])
    assert not torch.equal(loop.sample(table, torch.arange(5), labels=labels.flip(0)), together)


# Purposes of noise.


@pytest.mark.parametrize("name", ["ddim, eta 0.5", "ddpm"])
@pytest.mark.parametrize("purpose", Purpose)
def test_a_purpose_has_the_noise_that_noise_names(
    loop: Loop, purpose: Purpose, name: str
) -> None:
    """The loop in Python, with the same network passes and the noise of `Noise`."""
    table, indices, noise = TABLES[name], numbers(5, 0, 1 << 40), Noise(SEED, purpose)
    x_t = noise.x_T(indices, SHAPE)
    for i, t in enumerate(table.timesteps.tolist()):
        x_t, _ = ops.sampling_step(
            x_t, loop.run(x_t, t), table.coefficients[i], clip=table.clip, seed=SEED,
            image_index=indices, step=noise.step_word(i),
        )  # fmt: skip
    assert torch.equal(loop.sample(table, indices, purpose=purpose)[:, 0], x_t)


def test_no_two_purposes_share_a_word() -> None:
    """Words of x_T, of labels, and of the first, some and the last steps of any sampler."""
    words = [ops.X_T_STEP, ops.LABEL_STEP, 0, 1, 2, 999, 1000, 0x7FFFFE, MAX_STEPS - 1]
    found = {word ^ (purpose << PURPOSE_BITS) for purpose in range(128) for word in words}
    assert len(found) == 128 * len(words)
    assert all(0 <= word <= 0xFFFFFFFF for word in found)
    for purpose in Purpose:
        ours = {Noise(SEED, purpose).step_word(word) for word in words}
        assert ours == {word ^ (purpose << PURPOSE_BITS) for word in words}


def test_purposes_and_steps_that_do_not_exist_are_refused(loop: Loop) -> None:
    table = TABLES["ddim"]
    assert loop.sample(table, numbers(0), purpose=127).isfinite().all()
    for purpose in (-1, 128):
        with pytest.raises(ValueError, match=f"purpose={purpose} is not between 0 and 127"):
            loop.sample(table, numbers(0), purpose=purpose)
    for saved in ((0,), (7,), (3, 2), (3, 3)):
        with pytest.raises(ValueError, match="steps to save do not ascend"):
            loop.sample(table, numbers(0), saved)


# Where targets go.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_targets_land_in_the_callers_memory(loop: Loop, dtype: torch.dtype) -> None:
    table, indices = TABLES["ddpm"], torch.arange(5)
    expected = loop.sample(table, indices, (2, 3, 6)).to(dtype)
    room = torch.full((7, 4, *SHAPE), -9.0, dtype=dtype)
    loop.sample(table, indices, (2, 3, 6), out=room[1:6, 1:])
    assert torch.equal(room[1:6, 1:], expected)
    assert (room[0] == -9).all()
    assert (room[6] == -9).all()
    assert (room[:, 0] == -9).all()
    by_k = torch.empty(3, 5, *SHAPE, dtype=dtype)
    loop.sample(table, indices, (2, 3, 6), out=by_k.transpose(0, 1))
    assert torch.equal(by_k.transpose(0, 1), expected)


def halves(values: np.ndarray[Any, np.dtype[np.float32]]) -> np.ndarray[Any, np.dtype[np.uint16]]:
    """The bits of float16 that the loop saves for x0_hat = values.

    The network is a convolution with weights 0, so its output is the bias: the values. The two
    steps' coefficients make x0_hat of it, and the first step's is saved.
    """
    n = len(values)
    weights = torch.cat([torch.from_numpy(values), torch.zeros(-n % 16)])
    packed = len(weights)
    weights = torch.cat([weights, torch.zeros(packed * n)])
    part = {"x": 0, "x_channel": 0, "y": 1, "y_channel": 0}
    convolution = {
        "height": 1, "width": 1, "in_channels": n, "out_channels": n, "kernel": 1, "stride": 1,
        "pad_before": 0, "pad_after": 0, "upsample": 0, "algorithm": 0, "silu": 0, "bias": 0,
        "packed": packed, **part,
    }  # fmt: skip
    assert ops.extension is not None
    plan = ops.extension.Plan(
        buffers=[(0, 1, n), (0, 1, n)], ops=[("convolution", convolution, 1.0)], arena=0,
        conditioning=0, classes=0, batch=1, weights=weights.data_ptr(),
        weights_size=weights.numel(),
    )  # fmt: skip
    coefficients = torch.tensor([[0.0, 1.0, 0.0, 0.0, 0.0, 0.0]] * 2, dtype=torch.float64)
    index, out = numbers(0), torch.zeros(n, dtype=torch.float16)
    plan.sample(
        coefficients=coefficients.data_ptr(), conditioning=0, steps=2, clip=0.0, seed=0,
        purpose=0, image_index=index.data_ptr(), labels=0, images=1, saved=[1],
        save_denoised=True, out=out.data_ptr(), half=True, image_stride=n, saved_stride=n,
        threads=1, on_pass=None, on_step=None, nan_fill=True,
    )  # fmt: skip
    return out.numpy().view(np.uint16)


def test_half_precision_rounds_as_numpy_does() -> None:
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    finite = np.sort(every[np.isfinite(every)].astype(np.float32))
    middles = (finite[1:] + finite[:-1]) / 2
    generator = np.random.default_rng(0)
    anything = generator.integers(0, 1 << 32, 20_000, dtype=np.uint32).view(np.float32)
    edges = np.float32([65519, 65520, 65536, 1e30, -1e30, np.inf, -np.inf, 2**-25, 2**-26, 0])
    above = np.nextafter(middles, np.float32(np.inf))
    values = np.concatenate([finite, middles, above, anything[~np.isnan(anything)], edges])
    values += np.float32(0)  # -0.0 becomes 0.0, as in a sum that begins with 0
    with np.errstate(over="ignore"):
        expected = values.astype(np.float16).view(np.uint16)
    parts = np.array_split(values, 256)  # a square matrix of weights for each
    found = np.concatenate([halves(part) for part in parts])
    assert np.array_equal(found, expected)
    assert np.isnan(halves(np.float32([np.nan])).view(np.float16)).all()


# Progress and interruption.


@pytest.mark.parametrize("threads", [1, 2])
def test_callbacks_count_steps_and_parts(loop: Loop, threads: int) -> None:
    steps: list[int] = []
    parts: list[int] = []
    loop.sample(
        TABLES["ddim"], torch.arange(10), threads=threads, on_step=steps.append,
        on_pass=lambda: parts.append(1),
    )  # fmt: skip
    assert steps == [1, 2, 3, 4, 5, 6]
    assert len(parts) == 6 * (3 if threads == 1 else 4)


def test_parts_are_as_large_as_a_cache_serves_well() -> None:
    parts: list[int] = []
    loop = Loop(teacher(), side=40, batch=16)
    table = ddim_table(SCHEDULE, 2)
    fitting = (1 << 20) // loop.plan.arena
    assert 4 <= fitting < 16
    out = loop.sample(table, torch.arange(16), threads=1, on_pass=lambda: parts.append(1))
    assert len(parts) == 2 * -(-16 // fitting)
    assert torch.equal(loop.sample(table, numbers(13))[0], out[13])


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("which", ["on_step", "on_pass"])
def test_an_exception_ends_the_loop(loop: Loop, which: str, threads: int) -> None:
    calls: list[int] = []

    def stop(*args: object) -> None:
        calls.append(1)
        if len(calls) >= 3:
            raise KeyError("enough")

    with pytest.raises(KeyError, match="enough"):
        loop.sample(TABLES["ddim"], torch.arange(16), threads=threads, **{which: stop})
    assert len(calls) <= 3 + threads
    assert loop.sample(TABLES["ddim"], torch.arange(2)).isfinite().all()


@pytest.mark.parametrize("threads", [1, 2])
def test_ctrl_c_ends_the_loop_within_a_step(loop: Loop, threads: int) -> None:
    steps: list[int] = []

    def press(done: int) -> None:
        steps.append(done)
        if done == 2:
            os.kill(os.getpid(), signal.SIGINT)

    # Whoever started the tests may have them ignore the signal.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            loop.sample(TABLES["ddim"], torch.arange(16), threads=threads, on_step=press)
    finally:
        signal.signal(signal.SIGINT, before)
    assert steps[-1] <= 3


def test_loops_side_by_side(loop: Loop) -> None:
    table = TABLES["ddim, eta 0.5"]
    expected = loop.sample(table, torch.arange(8), threads=1)
    found: dict[int, Tensor] = {}

    def sample(i: int) -> None:
        found[i] = loop.sample(table, torch.arange(8), threads=2)

    workers = [threading.Thread(target=sample, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(torch.equal(found[i], expected) for i in range(4))
