"""Schedules and step tables against diffusers' schedulers, with shared noise, in float64."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from diffusers.schedulers import scheduling_ddpm

from advkd.diffusion import (
    BETA_SCHEDULES,
    PREDICTION_TYPES,
    TIMESTEP_SPACINGS,
    VARIANCE_TYPES,
    Schedule,
    StepTable,
    ddim_table,
    ddpm_table,
    timesteps_of,
)
from advkd.engine.eager import general_step

SHAPE = (2, 3, 4, 4)
SCALES = torch.linspace(0.5, 1.5, 3, dtype=torch.float64).view(1, 3, 1, 1)


def network(x: torch.Tensor, t: int) -> torch.Tensor:
    """Stands for a UNet: bounded, not linear, and it depends on the time."""
    return torch.tanh(SCALES * x + math.sin(0.01 * t)) - 0.1 * x.mean()


def noise(step: int) -> torch.Tensor:
    """z of a step; step -1 is x_T."""
    generator = torch.Generator().manual_seed(100 + step)
    return torch.randn(SHAPE, generator=generator, dtype=torch.float64)


def run_whole_table(table: StepTable) -> list[torch.Tensor]:
    """The same by the eager engine's step, which knows thresholds and learned variances."""
    x, states = noise(-1), []
    for i, t in enumerate(table.timesteps.tolist()):
        out = network(x, t)
        x, _ = general_step(table, i, x, out, predicted_variance(x, t), noise(i))
        states.append(x)
    return states


def predicted_variance(x: torch.Tensor, t: int) -> torch.Tensor:
    """What a network gives behind its prediction; not only in [-1, 1]."""
    return 1.5 * torch.sin(3 * x + 0.01 * t)


def run_table(table: StepTable) -> list[torch.Tensor]:
    """The loop that StepTable's docstring states; every x_prev."""
    x, states = noise(-1), []
    for i, (t, row) in enumerate(zip(table.timesteps, table.coefficients, strict=True)):
        a_x, a_m, c_0, c_x, c_m, sigma = row.tolist()
        m = network(x, int(t))
        x0_hat = a_x * x + a_m * m
        if table.clip:
            x0_hat = x0_hat.clamp(-table.clip, table.clip)
        x = c_0 * x0_hat + c_x * x + c_m * m + sigma * noise(i)
        states.append(x)
    return states


def in_float64(scheduler: DDIMScheduler | DDPMScheduler, schedule: Schedule) -> None:
    """Give diffusers' scheduler its own schedule in float64 (it computes betas in float32).

    That the two schedules are the same is test_alpha_bar_is_diffusers'.
    """
    alpha_bar = torch.from_numpy(schedule.alpha_bar)
    scheduler.alphas_cumprod = alpha_bar
    scheduler.one = torch.tensor(1.0, dtype=torch.float64)
    scheduler.final_alpha_cumprod = scheduler.one if schedule.set_alpha_to_one else alpha_bar[0]


def run_ddim(schedule: Schedule, steps: int, eta: float, float64: bool = True) -> list:
    scheduler = DDIMScheduler.from_config(schedule.to_diffusers())
    if float64:
        in_float64(scheduler, schedule)
    scheduler.set_timesteps(steps)
    x, states = noise(-1), []
    for i, t in enumerate(scheduler.timesteps.tolist()):
        x = scheduler.step(network(x, t), t, x, eta=eta, variance_noise=noise(i)).prev_sample
        states.append(x)
    return states


def run_ddpm(
    schedule: Schedule, steps: int | None, monkeypatch: pytest.MonkeyPatch, float64: bool = True
) -> list:
    scheduler = DDPMScheduler.from_config(schedule.to_diffusers())
    if float64:
        in_float64(scheduler, schedule)
    if steps is not None:
        scheduler.set_timesteps(steps)
    x, states = noise(-1), []
    for i, t in enumerate(scheduler.timesteps.tolist()):
        monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *_, i=i, **__: noise(i))
        out = network(x, t)
        if schedule.variance_type == "learned_range":
            out = torch.cat([out, predicted_variance(x, t)], dim=1)
        x = scheduler.step(out, t, x).prev_sample
        states.append(x)
    return states


def assert_same(ours: list[torch.Tensor], theirs: list[torch.Tensor], rtol: float) -> None:
    """Every state, relative to that state's largest value."""
    assert len(ours) == len(theirs)
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert torch.isfinite(b).all()
        assert (a - b).abs().max() <= rtol * b.abs().max(), f"state {i}"


@pytest.mark.parametrize("beta_schedule", BETA_SCHEDULES)
def test_alpha_bar_is_diffusers(beta_schedule: str) -> None:
    schedule = Schedule(beta_schedule=beta_schedule, beta_start=2e-4, beta_end=0.018)
    theirs = DDIMScheduler.from_config(schedule.to_diffusers()).alphas_cumprod.double().numpy()
    factors = schedule.alpha_bar / np.concatenate([[1.0], schedule.alpha_bar[:-1]])
    # float32 is half an ulp of 1 off in each factor 1 - beta (which may be small) and product.
    bound = np.cumsum(np.finfo(np.float32).eps * (1 / factors + 1))
    assert (np.abs(theirs / schedule.alpha_bar - 1) <= bound).all()
    assert schedule.alpha_bar.dtype == np.float64
    assert (np.diff(schedule.alpha_bar) < 0).all()


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("clip_sample", [True, False])
@pytest.mark.parametrize("beta_schedule", ["linear", "squaredcos_cap_v2"])
def test_ddim_is_diffusers(
    eta: float, prediction_type: str, clip_sample: bool, beta_schedule: str
) -> None:
    schedule = Schedule(
        prediction_type=prediction_type, clip_sample=clip_sample, beta_schedule=beta_schedule
    )
    assert_same(run_table(ddim_table(schedule, 25, eta)), run_ddim(schedule, 25, eta), 1e-9)


@pytest.mark.parametrize("spacing", TIMESTEP_SPACINGS)
@pytest.mark.parametrize("steps", [1, 2, 7, 30, 50])
@pytest.mark.parametrize("set_alpha_to_one", [True, False])
@pytest.mark.parametrize("steps_offset", [0, 1])
def test_ddim_spacing_is_diffusers(
    spacing: str, steps: int, set_alpha_to_one: bool, steps_offset: int
) -> None:
    schedule = Schedule(
        timestep_spacing=spacing, set_alpha_to_one=set_alpha_to_one, steps_offset=steps_offset
    )
    for eta in (0.0, 1.0):
        ours, theirs = run_table(ddim_table(schedule, steps, eta)), run_ddim(schedule, steps, eta)
        assert_same(ours, theirs, 1e-9)


@pytest.mark.parametrize("variance_type", VARIANCE_TYPES)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("beta_schedule", ["linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("clip_sample", [True, False])
def test_ddpm_is_diffusers(
    variance_type: str,
    prediction_type: str,
    beta_schedule: str,
    clip_sample: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    schedule = Schedule(
        num_train_timesteps=100,
        variance_type=variance_type,
        prediction_type=prediction_type,
        beta_schedule=beta_schedule,
        clip_sample=clip_sample,
        clip_sample_range=0.8,
    )
    ours = run_table(ddpm_table(schedule))
    assert_same(ours, run_ddpm(schedule, None, monkeypatch), 1e-9)


@pytest.mark.parametrize("steps", [None, 25])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("beta_schedule", ["linear", "squaredcos_cap_v2"])
def test_learned_variances_are_diffusers(
    steps: int | None, prediction_type: str, beta_schedule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    schedule = Schedule(
        num_train_timesteps=100,
        variance_type="learned_range",
        prediction_type=prediction_type,
        beta_schedule=beta_schedule,
    )
    table = ddpm_table(schedule, steps)
    assert not table.is_plain and ddim_table(schedule, 10, 1.0).is_plain
    assert_same(run_whole_table(table), run_ddpm(schedule, steps, monkeypatch), 1e-9)
    assert schedule.to_diffusers()["_class_name"] == "DDPMScheduler"


@pytest.mark.parametrize("ratio", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("most", [1.0, 1.2, 100.0])
def test_thresholding_is_diffusers(
    ratio: float, most: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    schedule = Schedule(
        num_train_timesteps=100,
        thresholding=True,
        dynamic_thresholding_ratio=ratio,
        sample_max_value=most,
    )
    for eta in (0.0, 1.0):
        table = ddim_table(schedule, 20, eta)
        assert table.is_plain == (most == 1)
        assert_same(run_whole_table(table), run_ddim(schedule, 20, eta), 1e-9)
    theirs = run_ddpm(schedule, None, monkeypatch)
    assert_same(run_whole_table(ddpm_table(schedule)), theirs, 1e-9)
    if most == 1:
        assert_same(run_table(ddpm_table(schedule)), theirs, 1e-9)


def test_a_plain_table_is_the_same_to_every_step() -> None:
    for table in (ddim_table(Schedule(), 10, 0.5), ddpm_table(Schedule(), 10)):
        assert_same(run_whole_table(table), run_table(table), 1e-12)


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
@pytest.mark.parametrize("spacing", TIMESTEP_SPACINGS)
def test_zero_snr_at_the_end_is_diffusers(
    prediction_type: str, spacing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    schedule = Schedule(
        num_train_timesteps=100,
        prediction_type=prediction_type,
        rescale_betas_zero_snr=True,
        timestep_spacing=spacing,
    )
    assert schedule.alpha_bar[-1] == 0 and (np.diff(schedule.alpha_bar) < 0).all()
    theirs = DDIMScheduler.from_config(schedule.to_diffusers()).alphas_cumprod.double().numpy()
    # Of float32's rounding of numbers around 1, squared and multiplied up again.
    np.testing.assert_allclose(theirs, schedule.alpha_bar, atol=100 * 2**-22)
    for steps in (7, 100):
        for eta in (0.0, 0.5):  # with 1, diffusers takes the root of a rounded 0 below 0
            ours = run_table(ddim_table(schedule, steps, eta))
            assert_same(ours, run_ddim(schedule, steps, eta), 1e-9)
        ours = run_table(ddpm_table(schedule, steps))
        assert_same(ours, run_ddpm(schedule, steps, monkeypatch), 1e-9)


def test_noise_is_no_prediction_at_zero_snr() -> None:
    """Refused where the last time takes part, which fewer steps leave out."""
    schedule = Schedule(rescale_betas_zero_snr=True)
    assert np.isfinite(ddim_table(schedule, 50).coefficients).all()
    with pytest.raises(ValueError, match=r"rescale_betas_zero_snr.*'epsilon'"):
        ddpm_table(schedule)


def test_betas_of_ones_own_are_diffusers(monkeypatch: pytest.MonkeyPatch) -> None:
    betas = tuple(np.geomspace(1e-4, 0.2, 60).tolist())
    schedule = Schedule.from_diffusers(
        {"trained_betas": list(betas), "num_train_timesteps": 60, "beta_schedule": "linear"}
    )
    assert schedule.trained_betas == betas
    assert Schedule.from_diffusers(schedule.to_diffusers()) == schedule
    theirs = DDPMScheduler.from_config(schedule.to_diffusers()).alphas_cumprod.double().numpy()
    np.testing.assert_allclose(theirs, schedule.alpha_bar, rtol=60 * 2**-22)
    assert_same(run_table(ddpm_table(schedule)), run_ddpm(schedule, None, monkeypatch), 1e-9)


def test_a_store_begun_before_says_the_same() -> None:
    """The fields that were there then, and no others, unless they stand at another value."""
    assert list(Schedule().settings()) == [
        *("num_train_timesteps", "beta_schedule", "beta_start", "beta_end", "prediction_type"),
        *("clip_sample", "clip_sample_range", "variance_type", "timestep_spacing"),
        *("steps_offset", "set_alpha_to_one"),
    ]
    schedule = Schedule(thresholding=True, sample_max_value=1.5)
    _ = schedule.alpha_bar
    assert schedule.settings() == Schedule().settings() | {
        "thresholding": True,
        "sample_max_value": 1.5,
    }


@pytest.mark.parametrize("spacing", TIMESTEP_SPACINGS)
@pytest.mark.parametrize("steps", [1, 7, 30, 100])
@pytest.mark.parametrize("steps_offset", [0, 1])
def test_respaced_ddpm_is_diffusers(
    spacing: str, steps: int, steps_offset: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    schedule = Schedule(timestep_spacing=spacing, steps_offset=steps_offset)
    ours = run_table(ddpm_table(schedule, steps))
    assert_same(ours, run_ddpm(schedule, steps, monkeypatch), 1e-9)


def test_whole_thousand_steps_against_unchanged_diffusers(monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers' own float32 schedule leads to the same final sample.

    DDPM's is further off: it takes beta from 1 - alpha_bar[t] / alpha_bar[t-1] in float32, which
    leaves a beta of 1e-4 with an error of 6e-4.
    """
    schedule = Schedule()
    ours = run_table(ddpm_table(schedule))
    assert len(ours) == 1000
    assert_same(ours[-1:], run_ddpm(schedule, None, monkeypatch, float64=False)[-1:], 6e-4)
    for eta in (0.0, 0.5, 1.0):
        ours = run_table(ddim_table(schedule, 50, eta))
        assert_same(ours[-1:], run_ddim(schedule, 50, eta, float64=False)[-1:], 1e-5)


@pytest.mark.parametrize("spacing", TIMESTEP_SPACINGS)
@pytest.mark.parametrize("T", [1, 7, 100, 1000])
def test_timesteps_are_as_many_as_asked_and_descend(spacing: str, T: int) -> None:
    schedule = Schedule(num_train_timesteps=T, timestep_spacing=spacing)
    for steps in range(1, T + 1, max(1, T // 97)):
        times = timesteps_of(schedule, steps)
        assert times.dtype == np.int64
        assert len(times) == steps
        assert times[0] < T and times[-1] >= 0
        assert (np.diff(times) < 0).all()


def test_last_step_of_ddim_is_the_clean_estimate() -> None:
    table = ddim_table(Schedule(), 20)
    assert table.coefficients[-1, 2:].tolist() == [1.0, 0.0, 0.0, 0.0]
    assert not ddim_table(Schedule(), 20, 0.0).coefficients[:, 5].any()
    assert (ddim_table(Schedule(), 20, 1.0).coefficients[:-1, 5] > 0).all()


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_a_perfect_network_gives_back_the_clean_image(prediction_type: str) -> None:
    schedule = Schedule(prediction_type=prediction_type, clip_sample=False)
    rng = np.random.default_rng(0)
    x_0, eps = rng.standard_normal((2, 8))
    table = ddim_table(schedule, 10)
    for t, row in zip(table.timesteps, table.coefficients, strict=True):
        a, s = math.sqrt(schedule.alpha_bar[t]), math.sqrt(1 - schedule.alpha_bar[t])
        x_t = a * x_0 + s * eps
        m = {"epsilon": eps, "sample": x_0, "v_prediction": a * eps - s * x_0}[prediction_type]
        np.testing.assert_allclose(row[0] * x_t + row[1] * m, x_0, atol=1e-10)
        before = t - 100
        level = schedule.alpha_bar[before] if before >= 0 else 1.0
        x_prev = row[2] * x_0 + row[3] * x_t + row[4] * m
        np.testing.assert_allclose(
            x_prev, math.sqrt(level) * x_0 + math.sqrt(1 - level) * eps, atol=1e-10
        )


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"beta_schedule": "sigmoid"}, "sigmoid"),
        ({"prediction_type": "flow"}, "flow"),
        ({"variance_type": "learned"}, "learned"),
        ({"variance_type": "fixed_large_log"}, "fixed_large_log"),
        ({"timestep_spacing": "karras"}, "karras"),
        ({"thresholding": 1}, "thresholding"),
        ({"thresholding": True, "sample_max_value": 0.5}, "sample_max_value"),
        ({"thresholding": True, "dynamic_thresholding_ratio": 1.5}, "dynamic_thresholding_ratio"),
        ({"rescale_betas_zero_snr": "yes"}, "rescale_betas_zero_snr"),
        ({"rescale_betas_zero_snr": True, "num_train_timesteps": 1}, "two training times"),
        ({"trained_betas": [0.1, 0.2]}, "trained_betas"),
        ({"trained_betas": [0.1] * 5000}, "list of 1000 numbers"),
        ({"trained_betas": 0.1}, "trained_betas"),
        ({"trained_betas": [0.1, "0.2"], "num_train_timesteps": 2}, "trained_betas"),
        ({"trained_betas": [0.1, 1.0], "num_train_timesteps": 2}, "trained_betas"),
        ({"trained_betas": [0.1, math.nan], "num_train_timesteps": 2}, "trained_betas"),
        ({"trained_betas": [0.5] * 1000}, "alpha_bar"),
        ({"predict_epsilon": False}, "predict_epsilon"),
        ({"_class_name": "ScoreSdeVeScheduler"}, "ScoreSdeVeScheduler"),
        ({"sigma_max": 1348.0}, "sigma_max"),
        ({"num_train_timesteps": 0}, "num_train_timesteps"),
        ({"num_train_timesteps": 10**15}, "num_train_timesteps"),
        ({"num_train_timesteps": "1000"}, "num_train_timesteps"),
        ({"num_train_timesteps": [1000]}, "num_train_timesteps"),
        ({"num_train_timesteps": True}, "num_train_timesteps"),
        ({"beta_start": "0.0001"}, "beta_start"),
        ({"beta_start": -1e-4}, "beta_start"),
        ({"beta_start": 0}, "beta_start"),
        ({"beta_start": {"a": [1]}}, "beta_start"),
        ({"beta_end": 1.0}, "beta_end"),
        ({"beta_end": math.nan}, "beta_end"),
        ({"beta_end": math.inf}, "beta_end"),
        ({"beta_end": 10**400}, "beta_end"),
        ({"beta_end": 0.9}, "alpha_bar"),
        ({"clip_sample": 1}, "clip_sample"),
        ({"clip_sample": "yes"}, "clip_sample"),
        ({"clip_sample_range": 0.0}, "clip_sample_range"),
        ({"clip_sample_range": None}, "clip_sample_range"),
        ({"clip_sample_range": math.nan}, "clip_sample_range"),
        ({"set_alpha_to_one": None}, "set_alpha_to_one"),
        ({"steps_offset": -1}, "steps_offset"),
        ({"steps_offset": 1000}, "steps_offset"),
        ({"steps_offset": 0.5}, "steps_offset"),
        ({"prediction_type": ["epsilon"]}, "prediction_type"),
        ({"beta_schedule": "x" * 10**6}, "beta_schedule"),
    ],
)
def test_unsupported_scheduler_setting_is_an_error(settings: dict, word: str) -> None:
    with pytest.raises(ValueError, match=word) as caught:
        Schedule.from_diffusers(settings)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "settings",
    [
        {"trained_betas": None, "thresholding": None, "sigma_max": None},
        {"dynamic_thresholding_ratio": 0.9, "sample_max_value": 2.0, "_anything": [1]},
        {"rescale_betas_zero_snr": None, "thresholding": False},
        {"beta_start": 0.001, "beta_end": 0.001},
    ],
)
def test_settings_that_change_nothing_are_taken_without_a_word(settings: dict) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = Schedule.from_diffusers(settings)
    betas = {key: settings[key] for key in ("beta_start", "beta_end") if key in settings}
    assert found == Schedule(**betas)


def test_settings_that_diffusers_ignores_are_ignored_aloud() -> None:
    with pytest.warns(UserWarning, match=r"solver_order.*use_karras_sigmas"):
        found = Schedule.from_diffusers({"use_karras_sigmas": True, "solver_order": 2})
    assert found == Schedule()


@pytest.mark.parametrize("beta_schedule", BETA_SCHEDULES)
@pytest.mark.parametrize("T", [1, 2, 10_000])
def test_every_schedule_that_is_taken_has_finite_tables(beta_schedule: str, T: int) -> None:
    for start, end in ((1e-4, 0.02), (1e-12, 1e-12), (0.005, 0.005)):
        schedule = Schedule(T, beta_schedule, start, end)
        for steps in (1, min(T, 7)):
            for table in (ddim_table(schedule, steps, 1.0), ddpm_table(schedule, steps)):
                assert np.isfinite(table.coefficients.astype(np.float32)).all()


@pytest.mark.parametrize("kind", [DDIMScheduler, DDPMScheduler])
def test_schedule_reads_what_diffusers_saves(kind: type, tmp_path) -> None:
    kind(
        num_train_timesteps=500,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        clip_sample=False,
        timestep_spacing="trailing",
        steps_offset=1,
    ).save_pretrained(tmp_path)
    schedule = Schedule.from_diffusers(kind.load_config(tmp_path))
    assert schedule == Schedule(
        num_train_timesteps=500,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        clip_sample=False,
        timestep_spacing="trailing",
        steps_offset=1,
    )


def test_schedule_reads_the_first_uploads() -> None:
    """The google/ddpm-* folders were written by diffusers 0.1, with keys it no longer has."""
    settings = {
        "_class_name": "DDPMScheduler",
        "_diffusers_version": "0.1.1",
        "beta_end": 0.02,
        "beta_schedule": "linear",
        "beta_start": 0.0001,
        "clip_sample": True,
        "num_train_timesteps": 1000,
        "tensor_format": "np",
        "timestep_values": None,
        "trained_betas": None,
        "variance_type": "fixed_large",
    }
    assert Schedule.from_diffusers(settings) == Schedule(variance_type="fixed_large")


def test_diffusers_reads_what_we_write() -> None:
    schedule = Schedule(num_train_timesteps=77, variance_type="fixed_large", clip_sample=False)
    for kind in (DDIMScheduler, DDPMScheduler):
        config = kind.from_config(schedule.to_diffusers()).config
        assert config["num_train_timesteps"] == 77
        assert config["clip_sample"] is False
    assert config["variance_type"] == "fixed_large"
    assert Schedule.from_diffusers(schedule.to_diffusers()) == schedule


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda: ddim_table(Schedule(), 0), "steps=0"),
        (lambda: ddim_table(Schedule(), 1001), "steps=1001"),
        (lambda: ddim_table(Schedule(), 10, -0.1), "eta"),
        (lambda: ddim_table(Schedule(), 10, 1.1), "eta"),
        (lambda: ddim_table(Schedule(), 10, math.nan), "eta"),
        (lambda: ddim_table(Schedule(steps_offset=200), 10), "steps_offset"),
        (lambda: ddpm_table(Schedule(), 1001), "steps=1001"),
    ],
)
def test_a_sampler_that_cannot_be_is_an_error(call, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        call()
