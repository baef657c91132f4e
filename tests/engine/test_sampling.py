"""Sampling: noise by image number, both backends of the step, what is kept, generate."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from advkd import ops
from advkd.config import StudentConfig, TrajectoryConfig, UNetConfig
from advkd.data.trajectories import index_of
from advkd.diffusion import (
    Schedule,
    StepTable,
    ddim_table,
    ddpm_table,
)
from advkd.engine.sampling import (
    EVALUATION_SEED,
    generate,
    sample,
    sample_labels,
    sample_x_T,
    shape_of,
    table_of,
)
from advkd.models.layers import area_resized
from advkd.models.student import Student
from advkd.models.unet import UNet

EPS = torch.finfo(torch.float32).eps
SMALL = UNetConfig(
    sample_size=8,
    block_out_channels=(8, 16),
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    layers_per_block=1,
    norm_num_groups=4,
)
SCHEDULE = Schedule(num_train_timesteps=20, clip_sample=False)


def small_unet(num_classes: int | None = None, schedule: Schedule = SCHEDULE) -> UNet:
    torch.manual_seed(0)
    config = dataclasses.replace(SMALL, num_class_embeds=num_classes)
    return UNet(config, schedule).eval().requires_grad_(False)


def small_student(num_classes: int | None = None, target: str = "denoised") -> Student:
    torch.manual_seed(0)
    config = StudentConfig(stages=(4, 8), widths=(16, 8), attention=(4,), groups=4)
    return Student(config, 8, 1, target, num_classes).eval().requires_grad_(False)


@pytest.fixture
def unet() -> UNet:
    return small_unet()


def numbers(*which: int) -> Tensor:
    return torch.tensor(which, dtype=torch.int64)


# x_T and labels.


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 5, 7)])
def test_x_T_has_the_same_bits_in_any_batch_order_and_thread_count(
    shape: tuple[int, int, int], set_threads: Callable[[int], None]
) -> None:
    set_threads(1)
    whole = sample_x_T(7, torch.arange(40), shape)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    set_threads(2)
    assert torch.equal(sample_x_T(7, order, shape), whole[order])
    one_by_one = torch.cat([sample_x_T(7, numbers(i), shape) for i in range(40)])
    assert torch.equal(one_by_one, whole)
    with ops.use_backend("reference"):
        assert torch.equal(sample_x_T(7, torch.arange(40), shape), whole)


def test_x_T_is_channels_last_and_depends_on_the_seed() -> None:
    x_T = sample_x_T(0, torch.arange(3), (3, 4, 4))
    assert x_T.is_contiguous(memory_format=torch.channels_last)
    assert not torch.equal(x_T, sample_x_T(1, torch.arange(3), (3, 4, 4)))
    assert sample_x_T(EVALUATION_SEED, torch.arange(3), (3, 4, 4)).isfinite().all()
    assert sample_x_T(0, torch.arange(0), (3, 4, 4)).shape == (0, 3, 4, 4)


def test_x_T_is_standard_normal() -> None:
    x_T = sample_x_T(3, torch.arange(1000), (1, 8, 8)).double()
    n = x_T.numel()
    assert abs(x_T.mean()) < 5 / n**0.5
    assert abs(x_T.square().mean() - 1) < 5 * (2 / n) ** 0.5
    # Neither between images nor between neighbouring pixels.
    assert abs((x_T[1:] * x_T[:-1]).mean()) < 5 / n**0.5
    assert abs((x_T[..., 1:] * x_T[..., :-1]).mean()) < 5 / n**0.5


def test_labels_do_not_depend_on_the_batch() -> None:
    labels = sample_labels(5, torch.arange(3000), 3)
    assert torch.equal(sample_labels(5, numbers(2999, 4), 3), labels[[2999, 4]])
    counts = torch.bincount(labels, minlength=3)
    assert len(counts) == 3
    assert (counts - 1000).abs().max() < 5 * (3000 * 2 / 9) ** 0.5


# The loop.


def by_hand(unet: UNet, table: StepTable, seed: int, indices: Tensor) -> tuple[list, list]:
    """States x_t and estimates x0_hat after every step, in float64 from the table's definition."""
    unet = unet.double()
    x_t = sample_x_T(seed, indices, (1, 8, 8)).double()
    states, estimates = [], []
    for i, t in enumerate(table.timesteps.tolist()):
        a_x, a_m, c_0, c_x, c_m, sigma = table.coefficients[i].tolist()
        m = unet(x_t, t)
        x0_hat = a_x * x_t + a_m * m
        if table.clip:
            x0_hat = x0_hat.clamp(-table.clip, table.clip)
        x_t = c_0 * x0_hat + c_x * x_t + c_m * m
        if sigma:
            x_t = x_t + sigma * ops.philox_normal(seed, indices, i, (1, 8, 8)).double()
        states.append(x_t)
        estimates.append(x0_hat)
    unet.float()
    return states, estimates


TABLES = {
    "ddim": ddim_table(SCHEDULE, 5),
    "ddim, eta 0.5": ddim_table(SCHEDULE, 5, 0.5),
    "ddim, eta 1": ddim_table(SCHEDULE, 5, 1.0),
    "ddpm": ddpm_table(SCHEDULE, 6),
    "ddim, clipped": ddim_table(Schedule(num_train_timesteps=20, clip_sample_range=0.3), 5),
    "ddpm, x0": ddpm_table(dataclasses.replace(SCHEDULE, prediction_type="sample"), 6),
    "ddim, v": ddim_table(dataclasses.replace(SCHEDULE, prediction_type="v_prediction"), 5, 0.5),
}


@pytest.mark.parametrize("backend", ["fused", "reference"])
@pytest.mark.parametrize("target", ["denoised", "state"])
@pytest.mark.parametrize("name", TABLES)
def test_loop_equals_the_definition(unet: UNet, name: str, target: str, backend: str) -> None:
    if backend == "fused" and ops.extension is None:
        pytest.skip("the C++ extension is not installed")
    table = TABLES[name]
    N = len(table)
    states, estimates = by_hand(unet, table, 9, numbers(5, 0))
    expected = (estimates if target == "denoised" else states)[:-1]
    expected = [expected[1], expected[3], states[-1]]
    with ops.use_backend(backend):
        kept = sample(unet, table, 9, numbers(5, 0), keep=(2, 4, N), target=target)
    assert len(kept) == 3
    # Every step is a handful of roundings and a network some dozens of layers deep.
    tolerance = 100 * N * EPS
    for ours, theirs in zip(kept, expected, strict=True):
        assert ours.dtype == torch.float32
        assert (ours - theirs).abs().max() <= tolerance * max(1.0, theirs.abs().max().item())


def test_last_kept_is_always_the_final_sample(unet: UNet) -> None:
    table = ddim_table(SCHEDULE, 4)
    alone = sample(unet, table, 0, numbers(0, 1))
    assert len(alone) == 1
    for keep in ((), (4,), (2, 4), (1, 2, 3)):
        for target in ("denoised", "state"):
            kept = sample(unet, table, 0, numbers(0, 1), keep=keep, target=target)
            assert len(kept) == len(set(keep) - {4}) + 1
            assert torch.equal(kept[-1], alone[0])


def test_kept_states_are_no_views_of_one_buffer(unet: UNet) -> None:
    kept = sample(unet, ddim_table(SCHEDULE, 4), 0, numbers(0), keep=(1, 2, 3), target="state")
    assert len({state.data_ptr() for state in kept}) == 4
    assert not torch.equal(kept[0], kept[1])


def test_steps_to_keep_that_do_not_exist_are_errors(unet: UNet) -> None:
    table = ddim_table(SCHEDULE, 4)
    for keep in ((0, 4), (2, 5), (3, 1), (2, 2)):
        with pytest.raises(ValueError, match="keep"):
            sample(unet, table, 0, numbers(0), keep=keep)
    with pytest.raises(ValueError, match="'noisy' is not one of"):
        sample(unet, table, 0, numbers(0), target="noisy")


def test_eta_0_is_deterministic_and_eta_1_draws_noise_of_its_seed(unet: UNet) -> None:
    for eta, noisy in ((0.0, False), (1.0, True)):
        table = ddim_table(SCHEDULE, 5, eta)
        runs = [sample(unet, table, 4, numbers(0, 1, 2))[-1] for _ in range(2)]
        assert torch.equal(*runs)
        assert bool((table.coefficients[:-1, 5] > 0).all()) == noisy
    # The noise goes with the image's number, not with its place.
    swapped = sample(unet, table, 4, numbers(2, 0))[-1]
    torch.testing.assert_close(swapped, runs[0][[2, 0]], rtol=1e-4, atol=1e-4)


def test_clipping_is_the_schedules(unet: UNet) -> None:
    clipped = Schedule(num_train_timesteps=20, clip_sample=True, clip_sample_range=0.25)
    for schedule, bound in ((clipped, 0.25), (SCHEDULE, None)):
        kept = sample(unet, ddim_table(schedule, 5), 0, torch.arange(4), keep=(1, 2, 3))[:-1]
        largest = max(x.abs().max().item() for x in kept)
        if bound is None:
            assert largest > 1  # so the clipped ones had something to lose
        else:
            assert largest <= bound


def test_images_do_not_depend_on_their_batch(unet: UNet) -> None:
    table = ddpm_table(SCHEDULE, 5)
    together = sample(unet, table, 1, torch.arange(6))[-1]
    alone = torch.cat([sample(unet, table, 1, numbers(i))[-1] for i in range(6)])
    torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-4)


def test_class_conditional_teacher() -> None:
    unet = small_unet(num_classes=3)
    torch.nn.init.normal_(unet.class_embedding.weight, std=3.0)
    table = ddim_table(SCHEDULE, 3)
    y = numbers(0, 2)
    images = sample(unet, table, 0, numbers(0, 1), y=y)[-1]
    other = sample(unet, table, 0, numbers(0, 1), y=numbers(0, 1))[-1]
    torch.testing.assert_close(images[0], other[0], rtol=1e-4, atol=1e-4)
    assert (images[1] - other[1]).abs().max() > 1e-2
    with pytest.raises(ValueError, match="class-conditional"):
        sample(unet, table, 0, numbers(0))
    with pytest.raises(ValueError, match="unconditional"):
        sample(small_unet(), table, 0, numbers(0), y=numbers(0))


def test_callback_of_sample_may_stop_it(unet: UNet) -> None:
    seen = []

    def callback(done: int, steps: int) -> None:
        seen.append((done, steps))
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample(unet, ddim_table(SCHEDULE, 5), 0, numbers(0), callback=callback)
    assert seen == [(1, 5), (2, 5), (3, 5)]


def test_table_of() -> None:
    assert len(table_of(SCHEDULE, "ddim", 7, 0.0)) == 7
    assert len(table_of(SCHEDULE, "ddpm", 7, 0.0)) == 20
    with pytest.raises(ValueError, match="'euler' is not one of"):
        table_of(SCHEDULE, "euler", 7, 0.0)


def test_shape_of() -> None:
    assert shape_of(small_unet()) == (1, 8, 8)
    assert shape_of(small_unet(), 16) == (1, 16, 16)
    nameless = UNet(dataclasses.replace(SMALL, sample_size=None))
    with pytest.raises(ValueError, match="sample_size"):
        shape_of(nameless)
    assert shape_of(nameless, 8) == (1, 8, 8)


def test_area_resized_averages() -> None:
    image = torch.arange(16.0).reshape(1, 1, 4, 4)
    assert area_resized(image, 4) is image
    assert area_resized(image, 2).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    assert area_resized(image, 1).item() == 7.5


# Seeds.


@pytest.mark.parametrize("seed", [EVALUATION_SEED, EVALUATION_SEED + 1, (1 << 64) - 1, -1])
def test_trajectories_refuse_the_seeds_of_judging(unet: UNet, seed: int) -> None:
    with pytest.raises(ValueError, match=str(seed)):
        index_of(unet, TrajectoryConfig(steps=4), 2, seed, 8)
    last = EVALUATION_SEED - 1
    assert index_of(unet, TrajectoryConfig(steps=4), 2, last, 8).seed == last


# generate.


@pytest.mark.parametrize("make", [small_unet, small_student])
@pytest.mark.parametrize(("num", "batch", "threads"), [(5, 2, 2), (4, 64, 1), (1, 1, 0), (0, 4, 1)])
def test_generate_shapes_and_range(
    make: Callable[[], UNet | Student], num: int, batch: int, threads: int
) -> None:
    before = torch.get_num_threads()
    model = make()
    images = generate(model, num, 3, 4, batch=batch, threads=threads)
    assert images.shape == (num, 1, 8, 8)
    assert images.dtype == torch.float32
    assert images.is_contiguous()
    assert not images.requires_grad
    assert torch.get_num_threads() == before
    if num:
        assert images.abs().max() <= 1
        whole = generate(model, 7, 3, 4, batch=7, threads=1)
        torch.testing.assert_close(images, whole[:num], rtol=1e-4, atol=1e-4)
        rest = generate(model, 7 - num, 3, 4, first=num)
        torch.testing.assert_close(rest, whole[num:], rtol=1e-4, atol=1e-4)


def test_generated_images_can_be_used_in_training() -> None:
    images = generate(small_student(), 2, 0)
    weight = torch.ones((), requires_grad=True)
    (images * weight).sum().backward()  # inference tensors would refuse
    assert weight.grad is not None
    images += 1


def test_generate_is_clamped_but_the_sampler_is_not() -> None:
    unet = small_unet()
    unet.conv_out.weight.mul_(100)
    assert sample(unet, ddim_table(SCHEDULE, 3), 0, torch.arange(4))[-1].abs().max() > 1
    assert generate(unet, 4, 0, 3).abs().max() == 1


def test_generate_samples_as_told() -> None:
    unet = small_unet()
    for sampler, eta, table in (
        ("ddim", 0.5, ddim_table(SCHEDULE, 4, 0.5)),
        ("ddpm", 0.0, ddpm_table(SCHEDULE)),
    ):
        images = generate(unet, 3, 11, 4, sampler=sampler, eta=eta)
        expected = sample(unet, table, 11, torch.arange(3))[-1].clamp(-1, 1)
        torch.testing.assert_close(images, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("make", "passes"), [(small_unet, 3 * 4), (small_student, 3)], ids=["teacher", "student"]
)
def test_callback_of_generate_counts_passes(
    make: Callable[[], UNet | Student], passes: int
) -> None:
    seen: list[tuple[int, int]] = []
    generate(
        make(), 5, 0, 4, batch=2, threads=2, callback=lambda done, total: seen.append((done, total))
    )
    assert sorted(done for done, _ in seen) == list(range(1, passes + 1))
    assert {total for _, total in seen} == {passes}


def test_callback_of_generate_may_stop_it() -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    before = torch.get_num_threads()
    with pytest.raises(KeyboardInterrupt):
        generate(small_unet(), 4, 0, 4, batch=1, threads=2, callback=stop)
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("make", [small_unet, small_student])
def test_generate_by_class(make: Callable[..., UNet | Student]) -> None:
    model = make(num_classes=4)
    model.class_embedding.weight.normal_(std=3.0)
    drawn = generate(model, 6, 2, 3)
    labels = sample_labels(2, torch.arange(6), 4)
    assert len(set(labels.tolist())) > 1
    given = generate(model, 6, 2, 3, y=labels, batch=4)
    torch.testing.assert_close(given, drawn, rtol=1e-4, atol=1e-4)
    assert (generate(model, 6, 2, 3, y=(labels + 1) % 4) - drawn).abs().max() > 1e-3
    with pytest.raises(ValueError, match="5 labels"):
        generate(model, 6, 2, 3, y=labels[:5])
    with pytest.raises(ValueError, match="label"):
        generate(model, 6, 2, 3, y=labels + 4)


def test_generate_leaves_early() -> None:
    student = small_student()
    images = generate(student, 3, 0, exit_at=1)
    expected = student.states(sample_x_T(0, torch.arange(3), (1, 8, 8)))[0].clamp(-1, 1)
    assert images.shape == (3, 1, 4, 4)
    torch.testing.assert_close(images, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="exit_at=3"):
        generate(student, 1, 0, exit_at=3)
    with pytest.raises(ValueError, match="'state'"):
        generate(small_student(target="state"), 1, 0, exit_at=1)


def test_what_generate_cannot_do_is_an_error() -> None:
    with pytest.raises(ValueError, match="num=-1"):
        generate(small_student(), -1, 0)
    with pytest.raises(ValueError, match="threads=-1"):
        generate(small_student(), 1, 0, threads=-1)
    with pytest.raises(ValueError, match="batch=0"):
        generate(small_student(), 1, 0, batch=0)
    with pytest.raises(ValueError, match="exit_at"):
        generate(small_unet(), 1, 0, 3, exit_at=1)
    with pytest.raises(ValueError, match="unconditional"):
        generate(small_unet(), 1, 0, 3, y=numbers(0))
    with pytest.raises(ValueError, match="steps=21"):
        generate(small_unet(), 1, 0, 21)
