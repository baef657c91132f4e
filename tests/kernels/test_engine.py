"""The engine's loop: kept targets, a trajectory's precision, bits, interrupts, half precision."""

from __future__ import annotations

import copy
import dataclasses
import gc
import os
import signal
import threading
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from advkd import ops
from advkd.config import UNetConfig
from advkd.diffusion import (
    Schedule,
    StepTable,
    ddim_table,
    ddpm_table,
)
from advkd.engine import sampling
from advkd.engine.cpu import Engine, lower
from advkd.engine.sampling import (
    engine_for,
    generate,
    sample,
    sample_into,
    sample_x_T,
)
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


def teacher(num_classes: int | None = None) -> UNet:
    torch.manual_seed(0)
    config = dataclasses.replace(CONFIG, num_class_embeds=num_classes)
    return UNet(config, SCHEDULE).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return lower(teacher(), (8, 8), batch=4)


def numbers(*which: int) -> Tensor:
    return torch.tensor(which, dtype=torch.int64)


def drawn(
    engine: Engine,
    table: StepTable,
    indices: Tensor,
    kept: tuple[int, ...] = (),
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Tensor:
    kept = kept or (len(table),)
    out = torch.full((len(indices), len(kept), *SHAPE), float("nan"), dtype=dtype)
    sample_into(out, engine, table, 9, indices, kept=kept, **options)
    return out


def exactly(table: StepTable, indices: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """States and clean estimates after every step, in float64 from the table's definition."""
    unet = copy.deepcopy(teacher()).double()
    x_t = sample_x_T(9, indices, SHAPE).double()
    states, estimates = [], []
    with ops.use_backend("reference"):
        for i, t in enumerate(table.timesteps.tolist()):
            a_x, a_m, c_0, c_x, c_m, sigma = table.coefficients[i].tolist()
            m = unet(x_t, t)
            x0_hat = a_x * x_t + a_m * m
            if table.clip:
                x0_hat = x0_hat.clamp(-table.clip, table.clip)
            z = ops.philox_normal(9, indices, i, SHAPE).double()
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
def test_what_is_kept(engine: Engine, name: str, target: str) -> None:
    table, indices = TABLES[name], numbers(5, 0, 1 << 40)
    states, estimates = exactly(table, indices)
    between = estimates if target == "denoised" else states
    found = drawn(engine, table, indices, (1, 4, 6), target=target)
    for ours, truth in zip(found.unbind(1), (between[0], between[3], states[-1]), strict=True):
        assert distance(ours, truth) <= 1e-4


def test_a_trajectory_of_50_steps_stays_close() -> None:
    """The accuracy budget of a whole trajectory; a network this size is far within it."""
    table, indices = ddim_table(SCHEDULE, 50), numbers(0, 1)
    engine = lower(teacher(), (8, 8), batch=2)
    assert distance(drawn(engine, table, indices)[:, 0], exactly(table, indices)[0][-1]) <= 1e-3


@pytest.mark.parametrize("cycles", [1e3, 1e4, 1e5])
def test_operations_of_one_pass_may_be_shared_or_not(engine: Engine, cycles: float) -> None:
    table, indices = TABLES["ddpm"], numbers(0, 1)
    alone = drawn(engine, table, indices, threads=1, nan_fill=True)
    assert ops.extension is not None
    ops.extension.set_worth_sharing(cycles)
    assert torch.equal(drawn(engine, table, indices, threads=3, nan_fill=True), alone)


@pytest.mark.parametrize("name", TABLES)
def test_bits_depend_neither_on_batch_nor_on_threads(engine: Engine, name: str) -> None:
    table, indices = TABLES[name], torch.arange(100, 119)
    whole = drawn(engine, table, indices, (2, 6), threads=1)
    for threads in (1, 2, 5):
        assert torch.equal(drawn(engine, table, indices.flip(0), (2, 6), threads=threads),
                           whole.flip(0))  # fmt: skip
        for part in ([0], [18, 3], [4, 5, 6, 7, 8]):
            found = drawn(engine, table, indices[part], (2, 6), threads=threads)
            assert torch.equal(found, whole[part])


def test_nothing_is_read_that_was_not_written(engine: Engine) -> None:
    table, indices = TABLES["ddim, eta 0.5"], torch.arange(6)
    clean = drawn(engine, table, indices, (3, 6))
    assert torch.equal(drawn(engine, table, indices, (3, 6), nan_fill=True), clean)
    assert clean.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_targets_land_in_the_callers_memory(engine: Engine, dtype: torch.dtype) -> None:
    table, indices = TABLES["ddpm"], torch.arange(5)
    expected = drawn(engine, table, indices, (2, 3, 6)).to(dtype)
    room = torch.full((7, 4, *SHAPE), -9.0, dtype=dtype)
    sample_into(room[1:6, 1:], engine, table, 9, indices, kept=(2, 3, 6))
    assert torch.equal(room[1:6, 1:], expected)
    assert (room[0] == -9).all()
    assert (room[6] == -9).all()
    assert (room[:, 0] == -9).all()
    by_k = torch.empty(3, 5, *SHAPE, dtype=dtype)
    sample_into(by_k.transpose(0, 1), engine, table, 9, indices, kept=(2, 3, 6))
    assert torch.equal(by_k.transpose(0, 1), expected)


def test_memory_that_does_not_fit_is_refused(engine: Engine) -> None:
    table, indices = TABLES["ddim"], torch.arange(2)
    for out in (
        torch.empty(2, 2, *SHAPE),
        torch.empty(3, 1, *SHAPE),
        torch.empty(2, 1, 8, 8, 2).permute(0, 1, 4, 2, 3),
        torch.empty(2, 1, *SHAPE, dtype=torch.float64),
    ):
        with pytest.raises(ValueError, match="out"):
            sample_into(out, engine, table, 9, indices, kept=(6,))
    for kept in ((0,), (7,), (3, 2)):
        with pytest.raises(ValueError, match="keep"):
            sample_into(torch.empty(2, len(kept), *SHAPE), engine, table, 9, indices, kept=kept)


def test_half_precision_rounds_as_numpy_does() -> None:
    assert ops.extension is not None
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    finite = np.sort(halves[np.isfinite(halves)].astype(np.float32))
    middles = (finite[1:] + finite[:-1]) / 2
    generator = np.random.default_rng(0)
    anything = generator.integers(0, 1 << 32, 20_000, dtype=np.uint32).view(np.float32)
    edges = np.float32([65519, 65520, 65536, 1e30, -1e30, np.inf, -np.inf, 2**-25, 2**-26, 0, -0.0])
    above = np.nextafter(middles, np.float32(np.inf))
    values = np.concatenate([finite, middles, above, anything[~np.isnan(anything)], edges])
    with np.errstate(over="ignore"):
        expected = values.astype(np.float16).view(np.uint16)
    found = np.array([ops.extension.half_of(float(v)) for v in values], dtype=np.uint16)
    assert np.array_equal(found, expected)
    assert np.isnan(np.uint16(ops.extension.half_of(float("nan"))).view(np.float16))


# Progress and interruption.


@pytest.mark.parametrize("threads", [1, 2])
def test_callbacks_count_steps_and_parts(engine: Engine, threads: int) -> None:
    steps: list[tuple[int, int]] = []
    parts: list[int] = []
    drawn(
        engine, TABLES["ddim"], torch.arange(10), threads=threads,
        callback=lambda done, total: steps.append((done, total)), poll=lambda: parts.append(1),
    )  # fmt: skip
    assert steps == [(i, 6) for i in range(1, 7)]
    assert len(parts) == 6 * (3 if threads == 1 else 4)


def test_parts_are_as_large_as_a_cache_serves_well() -> None:
    parts: list[int] = []
    engine = lower(teacher(), (40, 40), batch=16)
    fitting = (1 << 20) // engine.plan.arena
    assert 4 <= fitting < 16
    out = torch.empty(16, 1, 2, 40, 40)
    sample_into(
        out, engine, ddim_table(SCHEDULE, 2), 0, torch.arange(16), kept=[2], threads=1,
        poll=lambda: parts.append(1),
    )  # fmt: skip
    assert len(parts) == 2 * -(-16 // fitting)
    alone = torch.empty(1, 1, 2, 40, 40)
    sample_into(alone, engine, ddim_table(SCHEDULE, 2), 0, torch.tensor([13]), kept=[2])
    assert torch.equal(alone[0], out[13])


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("which", ["callback", "poll"])
def test_an_exception_ends_the_loop(engine: Engine, which: str, threads: int) -> None:
    calls: list[int] = []

    def stop(*args: object) -> None:
        calls.append(1)
        if len(calls) >= 3:
            raise KeyError("enough")

    with pytest.raises(KeyError, match="enough"):
        drawn(engine, TABLES["ddim"], torch.arange(16), threads=threads, **{which: stop})
    assert len(calls) <= 3 + threads
    assert drawn(engine, TABLES["ddim"], torch.arange(2)).isfinite().all()


@pytest.mark.parametrize("threads", [1, 2])
def test_ctrl_c_ends_the_loop_within_a_step(engine: Engine, threads: int) -> None:
    steps: list[int] = []

    def press(done: int, total: int) -> None:
        steps.append(done)
        if done == 2:
            os.kill(os.getpid(), signal.SIGINT)

    # Whoever started the tests may have them ignore the signal.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            drawn(engine, TABLES["ddim"], torch.arange(16), threads=threads, callback=press)
    finally:
        signal.signal(signal.SIGINT, before)
    assert steps[-1] <= 3


def test_loops_side_by_side(engine: Engine) -> None:
    table = TABLES["ddim, eta 0.5"]
    expected = drawn(engine, table, torch.arange(8), threads=1)
    found: dict[int, Tensor] = {}

    def draw(i: int) -> None:
        found[i] = drawn(engine, table, torch.arange(8), threads=2)

    workers = [threading.Thread(target=draw, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(torch.equal(found[i], expected) for i in range(4))


# What sampling uses it for.


def test_sample_and_generate_run_on_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("the plain loop")

    unet = teacher()
    table = ddim_table(SCHEDULE, 4)
    with ops.use_backend("reference"):
        expected = sample(unet, table, 0, torch.arange(3), keep=(2,))
    monkeypatch.setattr(sampling, "sample_eagerly", refuse)
    found = sample(unet, table, 0, torch.arange(3), keep=(2,))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert generate(unet, 3, 0, 4).shape == (3, *SHAPE)
    with ops.use_backend("reference"), pytest.raises(AssertionError, match="plain"):
        generate(unet, 3, 0, 4)


def by_numpy(unet: UNet) -> None:
    """Past torch altogether."""
    unet.conv_in.weight.detach().numpy()[0, 0, 0, 0] += 1


def by_an_optimizer(unet: UNet) -> None:
    unet.conv_in.requires_grad_(True)
    unet.conv_in(torch.ones(1, *SHAPE)).sum().backward()
    torch.optim.SGD(unet.conv_in.parameters(), lr=0.1).step()
    unet.requires_grad_(False)


def load(unet: UNet, assign: bool) -> None:
    state = {name: value * 1.5 for name, value in unet.state_dict().items()}
    unet.load_state_dict(state, assign=assign)


def transposed(unet: UNet) -> None:
    """The same memory and shape, read in another order."""
    weight = unet.mid_block.resnets[0].conv1.weight
    weight.data = weight.data.transpose(0, 1)


def by_inference(unet: UNet) -> None:
    """A tensor of inference mode counts no versions."""
    with torch.inference_mode():
        weight = unet.conv_in.weight.clone()
    del unet.conv_in.weight
    unet.conv_in.weight = torch.nn.Parameter(weight, requires_grad=False)
    assert engine_for(unet, 8, 4) is not None
    with torch.inference_mode():
        unet.conv_in.weight.add_(1)


def other_module(unet: UNet) -> None:
    torch.manual_seed(1)
    like = unet.conv_out
    unet.conv_out = torch.nn.Conv2d(like.in_channels, like.out_channels, 3, padding=1)
    unet.requires_grad_(False)


def changes() -> dict[str, Callable[[UNet], object]]:
    return {
        "a weight": lambda unet: unet.conv_out.weight.mul_(2),
        "one number of a weight, past autograd": lambda unet: unet.conv_in.weight.data[0, 0].add_(
            1
        ),
        "one number of a weight, past torch": by_numpy,
        "two rows swapped": lambda unet: unet.conv_out.weight.data.copy_(
            unet.conv_out.weight.data.flip(0)
        ),
        "other memory": lambda unet: setattr(
            unet.conv_in.weight, "data", unet.conv_in.weight.data * 2
        ),
        "the same memory, transposed": transposed,
        "a step of an optimizer": by_an_optimizer,
        "a state that is loaded": lambda unet: load(unet, assign=False),
        "a state that is assigned": lambda unet: load(unet, assign=True),
        "a tensor of inference mode": by_inference,
        "a module": other_module,
        "an eps": lambda unet: setattr(unet.conv_norm_out, "eps", 10.0),
        "a scale": lambda unet: setattr(unet.mid_block.resnets[0], "scale", 3.0),
    }


@pytest.mark.parametrize("what", changes())
def test_a_changed_network_has_another_engine(what: str) -> None:
    unet = teacher()
    before = engine_for(unet, 8, 4)
    assert engine_for(unet, 8, 4) is before
    changes()[what](unet)
    after = engine_for(unet, 8, 4)
    assert after is not None
    assert after is not before
    x = sample_x_T(0, torch.arange(2), SHAPE)
    with ops.use_backend("reference"):
        torch.testing.assert_close(after.run(x, 3), unet(x, 3), rtol=1e-4, atol=1e-4)


def test_a_hook_or_another_precision_ends_the_engine() -> None:
    unet = teacher()
    assert engine_for(unet, 8, 4) is not None
    hook = unet.conv_in.register_forward_hook(lambda *_: None)
    assert engine_for(unet, 8, 4) is None
    hook.remove()
    assert engine_for(unet, 8, 4) is not None
    assert engine_for(unet.double(), 8, 4) is None


def test_a_kept_engine_does_not_keep_its_network() -> None:
    unet = teacher()
    assert engine_for(unet, 8, 4) is not None
    gone = weakref.ref(unet)
    del unet
    gc.collect()
    assert gone() is None


def test_where_there_is_no_engine() -> None:
    assert engine_for(teacher().double(), 8, 4) is None
    strange = teacher()
    strange.mid_block.extra = torch.nn.Identity()
    assert engine_for(strange, 8, 4) is None
    with ops.use_backend("reference"):
        assert engine_for(teacher(), 8, 4) is None
    assert sample(strange, ddim_table(SCHEDULE, 2), 0, torch.arange(2))[0].isfinite().all()


# The statistics of GroupNorm.


@pytest.mark.parametrize("mean", [0.0, 1e4])
@pytest.mark.parametrize(
    ("channels", "groups", "pixels"),
    [(1, 1, 1), (8, 4, 9), (24, 2, 35), (128, 32, 64), (96, 1, 49), (200, 25, 300), (144, 12, 5)],
)
def test_group_norm(isa: str, channels: int, groups: int, pixels: int, mean: float) -> None:
    assert ops.extension is not None
    torch.manual_seed(channels)
    x = torch.randn(3, pixels, channels) + mean
    weight, bias = torch.randn(channels), torch.randn(channels)
    weights = torch.cat([weight, bias, torch.eye(channels).reshape(-1), torch.zeros(16 * channels)])
    sizes = ((3, pixels, 1, channels, channels), 1, 1, 0, 0, False)
    _, size = ops.extension.convolution_plan(*sizes, 1)
    packed = torch.zeros(2 * channels + size)
    packed[: 2 * channels] = weights[: 2 * channels]
    identity = torch.eye(channels).contiguous()
    at = packed[2 * channels :]
    ops.extension.convolution_pack(*sizes, identity.data_ptr(), at.data_ptr())
    whole = -(-channels // 16) * 16

    def part(name: str, buffer: int) -> dict[str, int]:
        return {name: buffer, f"{name}_channel": 0}

    norm = {
        "channels": channels, "groups": groups, "pixels": pixels, "weight": 0, "bias": channels,
        **part("x", 0), **part("scale", 2), **part("shift", 3),
    }  # fmt: skip
    convolution = {
        "height": pixels, "width": 1, "in_channels": channels, "out_channels": channels,
        "kernel": 1, "stride": 1, "pad_before": 0, "pad_after": 0, "upsample": 0, "algorithm": 0,
        "silu": 0, "packed": 2 * channels, **part("x", 0), **part("x_scale", 2),
        **part("x_shift", 3), **part("y", 1),
    }  # fmt: skip
    plan = ops.extension.Plan(
        buffers=[(0, pixels, channels), (0, pixels, channels), (0, 1, channels),
                 (whole, 1, channels)],
        ops=[("norm", norm, 1e-5), ("convolution", convolution, 1.0)],
        arena=2 * whole, row=0, classes=0, batch=3, weights=packed.data_ptr(),
        weights_size=packed.numel(),
    )  # fmt: skip
    y = torch.empty_like(x)
    plan.run(x=x.data_ptr(), y=y.data_ptr(), row=0, labels=0, images=3, threads=2, nan_fill=True)
    nchw = x.transpose(1, 2).double()
    truth = torch.nn.functional.group_norm(nchw, groups, weight.double(), bias.double(), 1e-5)
    # x * scale + shift rounds relative to its two terms, which are large where the mean is.
    variance = nchw.reshape(3, groups, -1).var(-1, unbiased=False)
    rstd = (variance + 1e-5).rsqrt().repeat_interleave(channels // groups, 1)[..., None]
    term = (nchw * rstd * weight.double()[:, None]).abs()
    error = (y.transpose(1, 2).double() - truth).abs()
    eps = torch.finfo(torch.float32).eps
    assert (error <= eps * (4 * term + 4 * bias.abs()[:, None] + pixels**0.5)).all()
