"""Diffusion: noise schedules, and samplers written as six numbers a step.

`alpha_bar[t]` is the cumulative product of DDPM (Ho et al. 2020), T its length. Everything here is
float64 numpy; networks and tensors come in above.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import reprlib
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
VARIANCE_TYPES = ("fixed_small", "fixed_small_log", "fixed_large")
LEARNED_RANGE = "learned_range"  # a variance between the smallest and the largest, by the network
TIMESTEP_SPACINGS = ("leading", "linspace", "trailing")

MAX_TRAIN_TIMESTEPS = 1_000_000
MIN_ALPHA_BAR = 1e-60  # 1 / sqrt(alpha_bar) stays within float32

# Settings of diffusers' schedulers that change nothing at these values and are refused at others.
_INERT: dict[str, tuple[Any, ...]] = {
    "_class_name": ("DDPMScheduler", "DDIMScheduler"),
    "predict_epsilon": (True, None),
    "timestep_values": (None,),
    "sigma_max": (None,),  # of schedulers whose noise is not DDPM's
    "sigma_min": (None,),
}
# Of diffusers before 0.3, without any effect here.
_IGNORED = {"tensor_format"}
# Settings that say nothing at None.
_OPTIONAL = {"trained_betas", "thresholding", "rescale_betas_zero_snr"}


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A `scheduler_config.json` in diffusers' own words; `alpha_bar` follows from it.

    Raises ValueError for a value of another type, outside its range or not implemented here.
    """

    num_train_timesteps: int = 1000
    beta_schedule: str = "linear"
    beta_start: float = 1e-4
    beta_end: float = 0.02
    prediction_type: str = "epsilon"
    clip_sample: bool = True
    clip_sample_range: float = 1.0
    variance_type: str = "fixed_small"
    timestep_spacing: str = "leading"
    steps_offset: int = 0
    set_alpha_to_one: bool = True
    trained_betas: tuple[float, ...] | None = None  # (T,), in place of a beta_schedule
    rescale_betas_zero_snr: bool = False  # to pure noise at the end (Lin et al. 2024, algorithm 1)
    thresholding: bool = False  # x0_hat is clipped to a quantile of itself (Saharia et al. 2022)
    dynamic_thresholding_ratio: float = 0.995
    sample_max_value: float = 1.0

    def __post_init__(self) -> None:
        for name, allowed in (
            ("beta_schedule", BETA_SCHEDULES),
            ("prediction_type", PREDICTION_TYPES),
            ("variance_type", (*VARIANCE_TYPES, LEARNED_RANGE)),
            ("timestep_spacing", TIMESTEP_SPACINGS),
            ("clip_sample", (True, False)),
            ("set_alpha_to_one", (True, False)),
            ("rescale_betas_zero_snr", (True, False)),
            ("thresholding", (True, False)),
        ):
            value = getattr(self, name)
            if type(value) is not type(allowed[0]) or value not in allowed:
                choices = ", ".join(map(str, allowed))
                raise ValueError(f"{name}={reprlib.repr(value)} is not supported; known: {choices}")
        T = self.num_train_timesteps
        _check_number("num_train_timesteps", T, 1, MAX_TRAIN_TIMESTEPS, whole=True)
        _check_number("steps_offset", self.steps_offset, 0, T - 1, whole=True)
        _check_number("clip_sample_range", self.clip_sample_range, 1e-6, 1e6)
        _check_number("dynamic_thresholding_ratio", self.dynamic_thresholding_ratio, 0, 1)
        _check_number("sample_max_value", self.sample_max_value, 1, 1e6)
        for name in ("beta_start", "beta_end"):
            _check_number(name, getattr(self, name), 1e-12, 0.999)
        self._check_betas()

    def _check_betas(self) -> None:
        T, betas = self.num_train_timesteps, self.trained_betas
        if betas is not None:
            if not isinstance(betas, tuple) or len(betas) != T:
                raise ValueError(
                    f"trained_betas is not a list of {T} numbers: {reprlib.repr(betas)}"
                )
            for beta in betas:
                _check_number("an entry of trained_betas", beta, 1e-12, 1 - 1e-6)
        if self.rescale_betas_zero_snr and T < 2:
            raise ValueError("rescale_betas_zero_snr needs two training times or more")
        words = f"beta_start={self.beta_start} to beta_end={self.beta_end}"
        if _alpha_bar(self)[-2 if self.rescale_betas_zero_snr else -1] < MIN_ALPHA_BAR:
            raise ValueError(
                f"after {T} steps of {'trained_betas' if betas else words} "
                f"alpha_bar is below {MIN_ALPHA_BAR:g}: use smaller betas or fewer steps"
            )

    @classmethod
    def from_diffusers(cls, settings: Mapping[str, Any]) -> Schedule:
        """Read the content of a `scheduler_config.json` (DDPM or DDIM scheduler of diffusers).

        A setting that these schedulers do not have is ignored with a warning, as diffusers ignores
        it. ValueError names a setting that this package does not implement at its value.
        """
        for name, inert in _INERT.items():
            if name in settings and settings[name] not in inert:
                value = reprlib.repr(settings[name])
                raise ValueError(f"scheduler setting {name}={value} is not supported")
        known = {field.name for field in dataclasses.fields(cls)}
        ignored = [name for name in settings if name not in known | set(_INERT) | _IGNORED]
        ignored = [name for name in ignored if not name.startswith("_")]
        if ignored:
            warnings.warn(
                "ignored settings that DDPMScheduler and DDIMScheduler do not have: "
                f"{reprlib.repr(sorted(ignored))}",
                stacklevel=2,
            )
        ours = {name: value for name, value in settings.items() if name in known}
        ours = {k: v for k, v in ours.items() if v is not None or k not in _OPTIONAL}
        if isinstance(ours.get("trained_betas"), list):
            ours["trained_betas"] = tuple(ours["trained_betas"])
        if not ours.get("thresholding"):
            for name in ("dynamic_thresholding_ratio", "sample_max_value"):
                ours.pop(name, None)
        return cls(**ours)

    @property
    def scheduler(self) -> str:
        """The class of diffusers that samples by it; DDIM's knows no learned variance."""
        return "DDPMScheduler" if self.variance_type == LEARNED_RANGE else "DDIMScheduler"

    def to_diffusers(self) -> dict[str, Any]:
        """The content of a `scheduler_config.json` that diffusers reads."""
        return {"_class_name": self.scheduler, **self.settings()}

    def settings(self) -> dict[str, Any]:
        """Its fields, without those of later versions that stand at a default: a store that was
        begun by an earlier version says the same."""
        later = {
            *("trained_betas", "rescale_betas_zero_snr", "thresholding"),
            *("dynamic_thresholding_ratio", "sample_max_value"),
        }
        fields = {f.name: f.default for f in dataclasses.fields(self)}
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in vars(self).items()
            if name in fields and not (name in later and value == fields[name])
        }

    @functools.cached_property
    def alpha_bar(self) -> NDArray[np.float64]:
        """(T,) float64, falling from almost 1 towards 0, or with `rescale_betas_zero_snr` to 0."""
        return _alpha_bar(self)

    @property
    def clip(self) -> float:
        """The bound on |x0_hat| during sampling; 0 means none."""
        if self.thresholding:
            return 1.0 if self.threshold is None else 0.0
        return self.clip_sample_range if self.clip_sample else 0.0

    @property
    def threshold(self) -> tuple[float, float] | None:
        """The quantile of |x0_hat| that it is clipped to, and the most that this may be; None
        without thresholding, and where it could only be 1."""
        if not self.thresholding or self.sample_max_value == 1:
            return None
        return self.dynamic_thresholding_ratio, self.sample_max_value


def _check_number(name: str, value: Any, low: float, high: float, whole: bool = False) -> None:
    """Raise ValueError unless this is a number from `low` to `high`, of int where it is whole."""
    kinds = (int,) if whole else (int, float)
    if type(value) not in kinds or not low <= value <= high:
        kind = "a whole number" if whole else "a number"
        raise ValueError(f"{name}={reprlib.repr(value)} is not {kind} from {low:g} to {high:g}")


def _alpha_bar(schedule: Schedule) -> NDArray[np.float64]:
    alpha_bar = np.cumprod(1.0 - _betas(schedule), dtype=np.float64)
    if not schedule.rescale_betas_zero_snr:
        return alpha_bar
    roots = np.sqrt(alpha_bar)
    shifted: NDArray[np.float64] = (roots - roots[-1]) * (roots[0] / (roots[0] - roots[-1]))
    return shifted**2


def _betas(schedule: Schedule) -> NDArray[np.float64]:
    T = schedule.num_train_timesteps
    if schedule.trained_betas is not None:
        return np.array(schedule.trained_betas, dtype=np.float64)
    if schedule.beta_schedule == "linear":
        return np.linspace(schedule.beta_start, schedule.beta_end, T)
    if schedule.beta_schedule == "scaled_linear":
        return np.linspace(schedule.beta_start**0.5, schedule.beta_end**0.5, T) ** 2

    def level(u: float) -> float:  # Nichol & Dhariwal 2021, eq. 17
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    return np.array([min(1 - level((i + 1) / T) / level(i / T), 0.999) for i in range(T)])


@dataclasses.dataclass(frozen=True)
class StepTable:
    """A sampler as a table: step i calls the network at `timesteps[i]` and then computes

        x0_hat = clip(a_x * x_t + a_m * m)
        x_prev = c_0 * x0_hat + c_x * x_t + c_m * m + sigma * z,    z ~ N(0, I)

    where m is the network's output. `coefficients[i]` = (a_x, a_m, c_0, c_x, c_m, sigma).

    Two kinds of samplers take more, which the eager engine alone knows. With a `threshold` (q, top)
    each image's x0_hat is clipped to [-s, s] and divided by s, the q-quantile of its magnitudes but
    at least 1 and at most `top`. With `log_variances` the network gives numbers v in [-1, 1] behind
    its prediction, and where sigma is not 0, sigma^2 = exp(low + (v + 1) / 2 (high - low)) for each
    number of an image; (low, high) = log_variances[i].
    """

    timesteps: NDArray[np.int64]
    coefficients: NDArray[np.float64]
    clip: float
    threshold: tuple[float, float] | None = None
    log_variances: NDArray[np.float64] | None = None  # (steps, 2)

    @property
    def is_plain(self) -> bool:
        """Whether six numbers a step are all."""
        return self.threshold is None and self.log_variances is None

    def __len__(self) -> int:
        return len(self.timesteps)


def timesteps_of(schedule: Schedule, steps: int) -> NDArray[np.int64]:
    """The `steps` timesteps of a respaced sampler, descending, spaced as in diffusers.

    Raises ValueError unless there are 1 to T of them.
    """
    T = schedule.num_train_timesteps
    if not 1 <= steps <= T:
        raise ValueError(f"steps={steps} is not between 1 and num_train_timesteps={T}")
    if schedule.timestep_spacing == "linspace":
        return np.linspace(0, T - 1, steps).round()[::-1].astype(np.int64)
    if schedule.timestep_spacing == "trailing":
        # Cut, because arange's rounding can add one more time, -1.
        return np.round(np.arange(T, 0, -T / steps)).astype(np.int64)[:steps] - 1
    times = (np.arange(steps) * (T // steps)).round()[::-1].astype(np.int64)
    times = times + schedule.steps_offset
    if times[0] >= T:
        raise ValueError(f"steps_offset={schedule.steps_offset} leaves the {T} training times")
    return times


def _estimates(schedule: Schedule, alpha_bar: float) -> tuple[float, float, float, float]:
    """x0_hat = a_x*x_t + a_m*m and eps_hat = b_x*x_t + b_m*m for the schedule's prediction type."""
    a, s = math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)
    if schedule.prediction_type == "epsilon":
        if a == 0:
            raise ValueError(
                "rescale_betas_zero_snr leaves nothing but noise at the last training time, where "
                "prediction_type='epsilon' says nothing of the image: leave that time out by fewer "
                "steps of timestep_spacing='leading', or take a teacher that predicts v"
            )
        return 1 / a, -s / a, 0.0, 1.0
    if schedule.prediction_type == "sample":
        return 0.0, 1.0, 1 / s, -a / s
    return a, -s, s, a  # v = a*eps - s*x0 (Salimans & Ho 2022)


def ddim_table(schedule: Schedule, steps: int, eta: float = 0.0) -> StepTable:
    """DDIM (Song et al. 2021, eq. 12) in `steps` steps; eta = 0 is deterministic, 1 like DDPM.

    eps_hat is the network's own, not recomputed from the clipped x0_hat.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta={eta} is not between 0 and 1")
    times = timesteps_of(schedule, steps)
    stride = schedule.num_train_timesteps // steps
    last = 1.0 if schedule.set_alpha_to_one else float(schedule.alpha_bar[0])
    rows = []
    for t in times:
        now = float(schedule.alpha_bar[t])
        before = float(schedule.alpha_bar[t - stride]) if t - stride >= 0 else last
        sigma = eta * math.sqrt(max((1 - before) / (1 - now) * (1 - now / before), 0.0))
        towards = math.sqrt(max(1 - before - sigma**2, 0.0))
        a_x, a_m, b_x, b_m = _estimates(schedule, now)
        rows.append((a_x, a_m, math.sqrt(before), towards * b_x, towards * b_m, sigma))
    return StepTable(times, np.array(rows), schedule.clip, schedule.threshold)


def ddpm_table(schedule: Schedule, steps: int | None = None) -> StepTable:
    """DDPM ancestral sampling (Ho et al. 2020, eq. 7 and algorithm 2); by default in T steps.

    Learned variances are those of Nichol and Dhariwal 2021, eq. 15.
    """
    steps = schedule.num_train_timesteps if steps is None else steps
    times = timesteps_of(schedule, steps)
    levels = [float(schedule.alpha_bar[t]) for t in times] + [1.0]
    rows, bounds = [], []
    for t, now, before in zip(times, levels, levels[1:], strict=False):
        alpha = now / before
        beta = 1 - alpha
        c_0 = math.sqrt(before) * beta / (1 - now)
        c_x = math.sqrt(alpha) * (1 - before) / (1 - now)
        small = max((1 - before) / (1 - now) * beta, 1e-20)
        variance = beta if schedule.variance_type == "fixed_large" else small
        a_x, a_m, _, _ = _estimates(schedule, now)
        rows.append((a_x, a_m, c_0, c_x, 0.0, math.sqrt(variance) if t > 0 else 0.0))
        bounds.append((math.log(small), math.log(beta)))
    learned = np.array(bounds) if schedule.variance_type == LEARNED_RANGE else None
    return StepTable(times, np.array(rows), schedule.clip, schedule.threshold, learned)
