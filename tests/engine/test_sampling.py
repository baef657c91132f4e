"""Sampling: noise by image number, both backends of the step, what is found, generate."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from advkd import ops
from advkd.config import StudentConfig, UNetConfig
from advkd.diffusion import (
    Schedule,
    StepTable,
    ddim_table,
    ddpm_table,
)
from advkd.engine.cache import compile as advkd_compile
from advkd.engine.cache import engine_for
from advkd.engine.interface import input_shape
from advkd.engine.noise import MAX_STEPS, Noise, Purpose
from advkd.engine.sampling import generate, table_of
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


def sample(
    unet: UNet, table: StepTable, seed: int, indices: Tensor, saved: Sequence[int] = (), **how: Any
) -> list[Tensor]:
    """What the network's engine saves after the steps `saved` and the last one."""
    noise = Noise(seed, Purpose.TRAINING)
    engine = engine_for(unet, len(indices))
    steps = sorted({*saved, len(table)})
    return list(engine.sample(table, noise, indices, saved=steps, **how).unbind(1))


def x_T_of(seed: int, indices: Tensor, shape: tuple[int, int, int]) -> Tensor:
    return Noise(seed, Purpose.TRAINING).x_T(indices, shape)


def labels_of(seed: int, indices: Tensor, num_classes: int) -> Tensor:
    labels = Noise(seed, Purpose.TRAINING).labels(indices, num_classes)
    assert labels is not None
    return labels


# x_T and labels.


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 5, 7)])
def test_x_T_has_the_same_bits_in_any_batch_order_and_thread_count(
    shape: tuple[int, int, int], set_threads: Callable[[int], None]
) -> None:
    set_threads(1)
    whole = x_T_of(7, torch.arange(40), shape)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    set_threads(2)
    assert torch.equal(x_T_of(7, order, shape), whole[order])
    one_by_one = torch.cat([x_T_of(7, numbers(i), shape) for i in range(40)])
    assert torch.equal(one_by_one, whole)
    with ops.use_backend("reference"):
        assert torch.equal(x_T_of(7, torch.arange(40), shape), whole)


def test_x_T_is_channels_last_and_depends_on_the_seed() -> None:
    x_T = x_T_of(0, torch.arange(3), (3, 4, 4))
    assert x_T.is_contiguous(memory_format=torch.channels_last)
    assert not torch.equal(x_T, x_T_of(1, torch.arange(3), (3, 4, 4)))
    assert x_T_of((1 << 64) - 1, torch.arange(3), (3, 4, 4)).isfinite().all()
    assert x_T_of(0, torch.arange(0), (3, 4, 4)).shape == (0, 3, 4, 4)


def test_x_T_is_standard_normal() -> None:
    x_T = x_T_of(3, torch.arange(1000), (1, 8, 8)).double()
    n = x_T.numel()
    assert abs(x_T.mean()) < 5 / n**0.5
    assert abs(x_T.square().mean() - 1) < 5 * (2 / n) ** 0.5
    # Neither between images nor between neighbouring pixels.
    assert abs((x_T[1:] * x_T[:-1]).mean()) < 5 / n**0.5
    assert abs((x_T[..., 1:] * x_T[..., :-1]).mean()) < 5 / n**0.5


def test_labels_do_not_depend_on_the_batch() -> None:
    labels = labels_of(5, torch.arange(3000), 3)
    assert torch.equal(labels_of(5, numbers(2999, 4), 3), labels[[2999, 4]])
    counts = torch.bincount(labels, minlength=3)
    assert len(counts) == 3
    assert (counts - 1000).abs().max() < 5 * (3000 * 2 / 9) ** 0.5


# The loop.


def by_hand(unet: UNet, table: StepTable, noise: Noise, indices: Tensor) -> tuple[list, list]:
    """States x_t and estimates x0_hat after every step, in float64 from the table's definition."""
    unet = unet.double()
    x_t = noise.x_T(indices, (1, 8, 8)).double()
    states, estimates = [], []
    for i, t in enumerate(table.timesteps.tolist()):
        a_x, a_m, c_0, c_x, c_m, sigma = table.coefficients[i].tolist()
        m = unet(x_t, t)
        x0_hat = a_x * x_t + a_m * m
        if table.clip:
            x0_hat = x0_hat.clamp(-table.clip, table.clip)
        x_t = c_0 * x0_hat + c_x * x_t + c_m * m
        if sigma:
            word = noise.step_word(i)
            z = ops.philox_normal(noise.seed, indices, word, (1, 8, 8))
            x_t = x_t + sigma * z.double()
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
    states, estimates = by_hand(unet, table, Noise(9, Purpose.TRAINING), numbers(5, 0))
    expected = (estimates if target == "denoised" else states)[:-1]
    expected = [expected[1], expected[3], states[-1]]
    with ops.use_backend(backend):
        found = sample(unet, table, 9, numbers(5, 0), saved=(2, 4, N), target=target)
    assert len(found) == 3
    # Every step is a handful of roundings and a network some dozens of layers deep.
    tolerance = 100 * N * EPS
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == torch.float32
        assert (ours - theirs).abs().max() <= tolerance * max(1.0, theirs.abs().max().item())


def test_the_last_target_is_always_the_final_sample(unet: UNet) -> None:
    table = ddim_table(SCHEDULE, 4)
    alone = sample(unet, table, 0, numbers(0, 1))
    assert len(alone) == 1
    for saved in ((), (4,), (2, 4), (1, 2, 3)):
        for target in ("denoised", "state"):
            found = sample(unet, table, 0, numbers(0, 1), saved=saved, target=target)
            assert len(found) == len(set(saved) - {4}) + 1
            assert torch.equal(found[-1], alone[0])


def test_saved_states_are_no_views_of_one_buffer(unet: UNet) -> None:
    found = sample(unet, ddim_table(SCHEDULE, 4), 0, numbers(0), saved=(1, 2, 3), target="state")
    assert len({state.data_ptr() for state in found}) == 4
    assert not torch.equal(found[0], found[1])


def test_steps_to_save_that_do_not_exist_are_errors(unet: UNet) -> None:
    table = ddim_table(SCHEDULE, 4)
    engine, noise = engine_for(unet, 1), Noise(0, Purpose.TRAINING)
    for saved in ((0, 4), (2, 5), (3, 1), (2, 2)):
        with pytest.raises(ValueError, match="saved"):
            engine.sample(table, noise, numbers(0), saved=saved)
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
        found = sample(unet, ddim_table(schedule, 5), 0, torch.arange(4), saved=(1, 2, 3))[:-1]
        largest = max(x.abs().max().item() for x in found)
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


def test_on_step_may_stop_it(unet: UNet) -> None:
    seen = []

    def callback(done: int, steps: int) -> None:
        seen.append((done, steps))
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample(unet, ddim_table(SCHEDULE, 5), 0, numbers(0), on_step=callback)
    assert seen == [(1, 5), (2, 5), (3, 5)]


def test_table_of() -> None:
    assert len(table_of(SCHEDULE, "ddim", 7, 0.0)) == 7
    assert len(table_of(SCHEDULE, "ddpm", 7, 0.0)) == 20
    with pytest.raises(ValueError, match="'euler' is not one of"):
        table_of(SCHEDULE, "euler", 7, 0.0)


def test_the_shape_of_a_networks_images() -> None:
    assert input_shape(small_unet()) == (1, 8, 8)
    assert input_shape(small_unet(), (16, 8)) == (1, 16, 8)
    nameless = UNet(dataclasses.replace(SMALL, sample_size=None))
    with pytest.raises(ValueError, match="sample_size"):
        input_shape(nameless)
    assert input_shape(nameless, (8, 8)) == (1, 8, 8)
    assert generate(nameless, 1, 0, 2, size=16).shape == (1, 1, 16, 16)
    assert input_shape(small_student()) == (1, 8, 8)
    for model, size in ((nameless, (9, 8)), (small_student(), (16, 16))):
        with pytest.raises(ValueError, match=r"9x8|16x16"):
            input_shape(model, size)


def test_a_teacher_that_also_predicts_a_variance_is_refused() -> None:
    unet = UNet(dataclasses.replace(SMALL, out_channels=2), SCHEDULE)
    with pytest.raises(ValueError, match="takes 1 channels and gives 2"):
        generate(unet, 1, 0, 2)


def test_area_resized_averages() -> None:
    image = torch.arange(16.0).reshape(1, 1, 4, 4)
    assert area_resized(image, 4) is image
    assert area_resized(image, 2).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    assert area_resized(image, 1).item() == 7.5


# Purposes.


def test_no_purpose_shares_a_number_of_the_generator_with_another() -> None:
    """Whatever the seed: step words of two purposes are never equal."""
    steps = [*range(64), MAX_STEPS - 2, MAX_STEPS - 1, ops.LABEL_STEP, ops.X_T_STEP]
    words = [Noise(0, purpose).step_word(step) for purpose in Purpose for step in steps]
    assert len(set(words)) == len(steps) * len(Purpose)
    assert all(0 <= word < 1 << 32 for word in words)
    # For any step: the high byte, which no step reaches, says the purpose.
    high = {(purpose << 24 ^ base) >> 24 for purpose in Purpose for base in (0, 0xFF << 24)}
    assert len(high) == 2 * len(Purpose)
    assert MAX_STEPS <= 1 << 24


@pytest.mark.parametrize("seed", [0, 1, (1 << 64) - 1])
def test_an_image_that_is_sampled_never_grows_from_a_noise_of_training(seed: int) -> None:
    trained = x_T_of(seed, torch.arange(2000), (1, 8, 8)).flatten(1)
    for purpose in (Purpose.SAMPLING, Purpose.EVALUATION):
        sampled = Noise(seed, purpose).x_T(torch.arange(2000), (1, 8, 8)).flatten(1)
        assert (torch.cdist(sampled, trained) > 1.0).all()


@pytest.mark.parametrize("backend", ["fused", "reference"])
@pytest.mark.parametrize("purpose", Purpose)
def test_a_sampler_takes_all_of_its_noise_from_its_purpose(purpose: Purpose, backend: str) -> None:
    unet = small_unet()
    table = ddpm_table(SCHEDULE, 5)
    noise = Noise(3, purpose)
    with ops.use_backend(backend):
        found = engine_for(unet, 2).sample(table, noise, numbers(1, 4), saved=[5])[:, 0]
    expected = by_hand(unet, table, noise, numbers(1, 4))[0][-1]
    assert (found - expected).abs().max() <= 500 * EPS * max(1.0, expected.abs().max().item())


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


def test_generate_samples_as_asked() -> None:
    unet = small_unet()
    for sampler, eta, table in (
        ("ddim", 0.5, ddim_table(SCHEDULE, 4, 0.5)),
        ("ddpm", 0.0, ddpm_table(SCHEDULE)),
    ):
        images = generate(unet, 3, 11, 4, sampler=sampler, eta=eta)
        noise = Noise(11, Purpose.SAMPLING)
        expected = engine_for(unet, 3).sample(table, noise, torch.arange(3), saved=[len(table)])
        expected = expected[:, 0].clamp(-1, 1)
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
    labels = Noise(2, Purpose.SAMPLING).labels(torch.arange(6), 4)
    assert labels is not None and len(set(labels.tolist())) > 1
    given = generate(model, 6, 2, 3, y=labels, batch=4)
    torch.testing.assert_close(given, drawn, rtol=1e-4, atol=1e-4)
    assert (generate(model, 6, 2, 3, y=(labels + 1) % 4) - drawn).abs().max() > 1e-3
    with pytest.raises(ValueError, match=r"\(5,\).*not \(6,\)"):
        generate(model, 6, 2, 3, y=labels[:5])
    with pytest.raises(ValueError, match="label"):
        generate(model, 6, 2, 3, y=labels + 4)


def test_generate_leaves_early() -> None:
    student = small_student()
    images = generate(student, 3, 0, exit_at=1)
    x_T = Noise(0, Purpose.SAMPLING).x_T(torch.arange(3), (1, 8, 8))
    expected = student.states(x_T)[0].clamp(-1, 1)
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
    with pytest.raises(ValueError, match="2\\^63"):
        generate(small_student(), 2, 0, first=(1 << 63) - 1)


def test_generate_takes_every_64_bit_seed() -> None:
    for seed in (0, 1 << 63, (1 << 64) - 1):
        assert generate(small_student(), 1, seed).isfinite().all()
    for seed in (-1, 1 << 64):
        with pytest.raises(ValueError, match="seed"):
            generate(small_student(), 1, seed)


# Samplers that take more than six numbers a step.


def with_variance(schedule: Schedule) -> UNet:
    """A teacher that gives a variance behind its prediction, neither of them the other's twin."""
    torch.manual_seed(4)
    config = dataclasses.replace(SMALL, in_channels=2, out_channels=4)
    return UNet(config, schedule).eval().requires_grad_(False)


LEARNED = dataclasses.replace(SCHEDULE, variance_type="learned_range")


def test_a_learned_variance_is_no_part_of_ddim() -> None:
    """All engines give the prediction, as the same network without the variance gives it."""
    unet, indices = with_variance(LEARNED), numbers(3, 0, 7)
    alone = UNet(dataclasses.replace(unet.config, out_channels=2), SCHEDULE).eval()
    tensors = unet.state_dict()
    for name in ("conv_out.weight", "conv_out.bias"):
        tensors[name] = tensors[name][:2]
    alone.load_state_dict(tensors)
    table = ddim_table(unet.schedule, 5, 0.5)
    for backend in ("fused", "reference") if ops.extension is not None else ("reference",):
        with ops.use_backend(backend):
            found, wanted = (sample(model, table, 1, indices)[-1] for model in (unet, alone))
            assert (found - wanted).abs().max() <= 16 * EPS * wanted.abs().max()
            x = x_T_of(1, indices, (2, 8, 8))
            assert engine_for(unet, 3).run(x, t=7).shape == (3, 2, 8, 8)


def test_ddpm_takes_the_learned_variance() -> None:
    """Step by step as the paper has it, in float64."""
    unet, indices = with_variance(LEARNED), numbers(5, 2)
    table = ddpm_table(unet.schedule)
    engine = engine_for(unet, 2, table=table)
    assert engine.name == "eager"
    noise = Noise(1, Purpose.TRAINING)
    (found,) = engine.sample(table, noise, indices, saved=[20]).unbind(1)
    x = noise.x_T(indices, (2, 8, 8)).double()
    wide = UNet(unet.config, unet.schedule).double().eval()
    wide.load_state_dict(unet.state_dict())
    for i, t in enumerate(table.timesteps.tolist()):
        m, v = wide(x, t).chunk(2, dim=1)
        a_x, a_m, c_0, c_x, c_m, sigma = table.coefficients[i]
        low, high = table.log_variances[i]
        z = ops.philox_normal(1, indices, noise.step_word(i), (2, 8, 8)).double()
        spread = (low + (v + 1) / 2 * (high - low)).div(2).exp() if sigma else 0.0
        x = c_0 * (a_x * x + a_m * m) + c_x * x + c_m * m + spread * z
    assert (found - x).abs().max() <= 1e-5 * x.abs().max()
    images = generate(unet, 2, seed=1, sampler="ddpm")
    assert torch.isfinite(images).all()
    assert not torch.equal(images, generate(unet, 2, seed=2, sampler="ddpm"))


def test_an_image_of_a_learned_variance_does_not_depend_on_its_batch() -> None:
    unet = with_variance(LEARNED)
    together = generate(unet, 3, seed=9, sampler="ddpm")
    alone = torch.cat([generate(unet, 1, seed=9, sampler="ddpm", first=i) for i in range(3)])
    assert (together - alone).abs().max() <= 1e-5


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_thresholding_is_sampled_by_torch_alone(sampler: str) -> None:
    usual = small_unet(schedule=dataclasses.replace(SCHEDULE, clip_sample=True))
    fixed, free = (
        small_unet(schedule=dataclasses.replace(SCHEDULE, thresholding=True, sample_max_value=top))
        for top in (1.0, 3.0)
    )
    images = [
        generate(unet, 2, seed=0, steps=5, sampler=sampler, purpose=Purpose.SAMPLING)
        for unet in (usual, fixed, free)
    ]
    assert torch.equal(images[0], images[1])  # a threshold of 1 is a clip to 1
    assert not torch.equal(images[1], images[2])
    table = table_of(free.schedule, sampler, 5, 0.0)
    assert engine_for(free, 2, table=table).name == "eager"
    if ops.extension is not None:
        with pytest.raises(ValueError, match="eager engine alone"):
            engine_for(free, 2).sample(table, Noise(0, Purpose.SAMPLING), numbers(0), saved=[5])
        with pytest.raises(ValueError, match="pass the teacher itself"):
            generate(advkd_compile(free), 1, seed=0, steps=5, sampler=sampler)
