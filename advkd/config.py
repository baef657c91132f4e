"""Configuration: frozen dataclasses, TOML presets, and overrides such as `distill.lr=2e-4`.

A preset is a TOML file whose tables are the fields of `Config`. A key that does not exist, or a
value of another type, is a ConfigError that names the nearest key. TOML has no null, so a field
that may be None takes the text "none".
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.resources
import re
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


class ConfigError(ValueError):
    """A configuration that cannot be used; the message is one sentence."""


@dataclass(frozen=True)
class RunConfig:
    """What holds for the whole run."""

    seed: int = 0  # of initialisation, data order and trajectories
    threads: int = 0  # torch's threads; 0 leaves them as they are
    device: str = "auto"  # auto | cpu | cuda


@dataclass(frozen=True)
class DataConfig:
    """Images to learn from, and how they are cut."""

    path: str = ""  # folder, .npz/.npy or IDX file; empty = the Fashion-MNIST that ships
    size: int = 28  # pixels of a side
    channels: int = 1
    crop: bool = True  # resize the shorter side and cut the centre; else resize both sides
    flip: bool = True  # mirror half of the training images


@dataclass(frozen=True)
class UNetConfig:
    """The teacher's network, in the words of diffusers' `UNet2DModel`."""

    sample_size: int | None = 28  # pixels of a side; None = whatever comes
    in_channels: int = 1
    out_channels: int = 1
    block_out_channels: tuple[int, ...] = (16, 32, 64)
    down_block_types: tuple[str, ...] = ("DownBlock2D", "DownBlock2D", "AttnDownBlock2D")
    up_block_types: tuple[str, ...] = ("AttnUpBlock2D", "UpBlock2D", "UpBlock2D")
    layers_per_block: int = 2
    attention_head_dim: int | None = None  # None = one head as wide as the block
    norm_num_groups: int = 8
    norm_eps: float = 1e-5
    freq_shift: int = 0
    flip_sin_to_cos: bool = True
    downsample_padding: int = 1
    mid_block_scale_factor: float = 1.0
    add_attention: bool = True
    center_input_sample: bool = False
    dropout: float = 0.0
    num_class_embeds: int | None = None  # None = unconditional


@dataclass(frozen=True)
class ScheduleConfig:
    """The noise schedule a teacher of our own is trained with; see `advkd.diffusion.Schedule`."""

    num_train_timesteps: int = 1000
    beta_schedule: str = "linear"
    beta_start: float = 1e-4
    beta_end: float = 0.02
    prediction_type: str = "epsilon"
    clip_sample: bool = True
    variance_type: str = "fixed_large"


@dataclass(frozen=True)
class TeacherConfig:
    """Training of a teacher."""

    source: str = ""  # folder of a teacher to use as it is; "zoo:NAME" = one that ships
    init: str = ""  # folder of a teacher whose weights the training starts from
    steps: int = 20_000
    batch: int = 64
    lr: float = 1e-3
    warmup: int = 500  # steps of linear warm-up; then cosine down to lr_final * lr
    lr_final: float = 0.02
    weight_decay: float = 0.0
    beta2: float = 0.99
    grad_clip: float = 1.0
    ema: float = 0.999
    autocast: str = "auto"  # bfloat16 where the hardware has it: auto | on | off
    log_every: int = 50
    checkpoint_every: int = 1000


@dataclass(frozen=True)
class TrajectoryConfig:
    """Which of the teacher's trajectories are drawn, and what is kept of them."""

    num: int = 5000
    sampler: str = "ddim"  # ddim | ddpm
    steps: int = 20  # of ddim; ddpm takes all steps of the schedule
    eta: float = 0.0
    target: str = "denoised"  # denoised: clean estimates x0_hat; state: x_t itself
    dtype: str = "float16"  # of the store: float16 | float32
    shard: int = 250  # images drawn at once and stored in one file


@dataclass(frozen=True)
class StudentConfig:
    """The one-pass generator. One submodule per entry of `stages`: its resolution."""

    family: str = "unet"  # unet | pyramid
    stages: tuple[int, ...] = (7, 14, 28)
    widths: tuple[int, ...] = (96, 48, 16)  # channels of each stage
    blocks: int = 1  # residual blocks in a stage
    attention: tuple[int, ...] = (7,)  # resolutions with self-attention
    groups: int = 8


@dataclass(frozen=True)
class DiscriminatorConfig:
    """The judge of the student's images in training; one network for every head."""

    widths: tuple[int, ...] = (48, 96)  # channels at S/2, S/4, ...
    attention: tuple[int, ...] = ()  # resolutions with self-attention
    groups: int = 8


@dataclass(frozen=True)
class DistillConfig:
    """Training of the student; symbols as in docs/method.md."""

    steps: int = 2000
    batch: int = 32
    lr: float = 1e-3
    lr_d: float = 3e-4
    warmup: int = 100
    lr_final: float = 0.1
    beta1: float = 0.5
    beta2: float = 0.99
    lambda_adv: float = 1.0
    lambda_rec: float = 10.0
    rho: str = "huber"  # the reconstruction loss, by its name in advkd.training.losses
    adversarial_loss: str = "logistic"  # by its name there too: logistic | relativistic
    huber_delta: float = 0.1
    head_weights: tuple[float, ...] = ()  # w_k; empty = 1 for the last head, 0.25 for the others
    inner_every: int = 4  # the heads before the last are judged every so many steps
    r1_gamma: float = 1.0
    r1_every: int = 16
    schedule: str = "joint"  # joint | progressive
    adversary: str = "paired"  # paired: D sees x_T; fresh: it judges images of new noise
    adversary_after: float = 0.0  # share of the steps before D enters: reconstruction alone
    real_images: bool = True  # fresh: the last head is compared with training images, if any
    grad_clip: float = 10.0
    ema: float = 0.999
    log_every: int = 20
    checkpoint_every: int = 200


@dataclass(frozen=True)
class EvaluateConfig:
    """How teacher and student are judged; see docs/protocol.md."""

    num: int = 2000
    teacher_steps: int = 50
    features: str = ""  # folder of a feature network; empty = the one that ships, if it fits


@dataclass(frozen=True)
class Config:
    """Everything a run is made of; stored as `config.toml` beside its results."""

    name: str = "run"
    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    unet: UNetConfig = field(default_factory=UNetConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    trajectory: TrajectoryConfig = field(default_factory=TrajectoryConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)


def presets() -> list[str]:
    """Names of the presets that ship."""
    folder = importlib.resources.files("advkd") / "presets"
    return sorted(entry.name[:-5] for entry in folder.iterdir() if entry.name.endswith(".toml"))


def load_preset(name: str, overrides: Sequence[str] = ()) -> Config:
    """Read a preset by name, or a TOML file by path, and apply `table.key=value` overrides."""
    if name in presets():
        text = (importlib.resources.files("advkd") / "presets" / f"{name}.toml").read_text()
    elif name.endswith(".toml") and Path(name).is_file():
        text = Path(name).read_text()
    else:
        raise ConfigError(f"there is no preset {name!r}{_nearest(name, presets())}")
    return override(parse(text, where=name), overrides)


def config_for(size: int, channels: int) -> Config:
    """A configuration for images that no preset is for: networks by resolution, small for a CPU.

    Resolutions are halved down to 7 or 8 (twice at least). ConfigError for a size that cannot be.
    """
    resolutions = [size]
    while resolutions[-1] % 2 == 0 and (resolutions[-1] > 8 or len(resolutions) < 2):
        resolutions.append(resolutions[-1] // 2)
    n = len(resolutions)
    if not 0 < resolutions[-1] <= 8 or n < 2:
        raise ConfigError(f"size={size} cannot be halved down to 8 or less; try {size // 8 * 8}")
    base = 16 if channels == 1 else 24
    unet = UNetConfig(
        sample_size=size,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=tuple(min(base << i, 128) for i in range(n)),
        down_block_types=("DownBlock2D",) * (n - 1) + ("AttnDownBlock2D",),
        up_block_types=("AttnUpBlock2D",) + ("UpBlock2D",) * (n - 1),
    )
    lowest = resolutions[-1]
    student = StudentConfig(
        stages=tuple(resolutions[::-1]),
        widths=tuple([96] * (n - 2) + [48, base]),
        attention=(lowest,),
    )
    discriminator = DiscriminatorConfig(widths=tuple(min(48 << i, 96) for i in range(n - 1)))
    return Config(
        data=DataConfig(size=size, channels=channels),
        unet=unet,
        student=student,
        discriminator=discriminator,
        distill=DistillConfig(
            lr_d=1e-3, lambda_rec=3.0, r1_gamma=0.1, adversary="fresh", adversary_after=0.35
        ),
    )


def parse(text: str, where: str = "configuration") -> Config:
    """Build a Config from TOML text; `where` names the source in errors."""
    try:
        tree = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{where} is not valid TOML: {error}") from None
    return build(Config, tree, "")


def override(config: Config, assignments: Sequence[str]) -> Config:
    """Apply assignments such as `distill.lr=2e-4` or `unet.attention_head_dim=none`."""
    tree = as_tree(config)
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        if not equals:
            raise ConfigError(f"{assignment!r} is not of the form table.key=value")
        *tables, leaf = key.strip().split(".")
        node = tree
        for table in tables:
            node = node.setdefault(table, {})
            if not isinstance(node, dict):
                raise ConfigError(f"{key.strip()!r} is not a key of the configuration")
        node[leaf] = _literal(value.strip())
    return build(Config, tree, "")


def _literal(text: str) -> Any:
    if text.lower() == "none":
        return None
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def build(cls: type[Any], tree: Mapping[str, Any], path: str) -> Any:
    """Make the dataclass `cls` from a tree of plain values, checking every key and type."""
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]
    values = {}
    for key, value in tree.items():
        where = f"{path}{key}"
        if key not in names:
            raise ConfigError(f"unknown key {where!r}{_nearest(key, names)}")
        values[key] = _checked(hints[key], value, where)
    return cls(**values)


def _checked(hint: Any, value: Any, where: str) -> Any:
    """Return `value` as the type `hint`, or raise: int passes for float, a list for a tuple."""
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where!r} is a table, not {value!r}")
        return build(typing.cast(type, hint), value, f"{where}.")
    if isinstance(hint, types.UnionType):
        inner = next(arg for arg in typing.get_args(hint) if arg is not type(None))
        return None if value in (None, "none") else _checked(inner, value, where)
    if typing.get_origin(hint) is tuple:
        item = typing.get_args(hint)[0]
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{where!r} is a list of {item.__name__}, not {value!r}")
        return tuple(_checked(item, entry, where) for entry in value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not hint:
        raise ConfigError(f"{where!r} is of type {hint.__name__}, not {value!r}")
    return value


def _nearest(key: str, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(key, names, n=1, cutoff=0.0)
    return f"; the nearest is {close[0]!r}" if close else ""


def as_tree(config: Any) -> dict[str, Any]:
    """The configuration as nested dicts of plain values."""
    return {
        f.name: as_tree(value) if dataclasses.is_dataclass(value) else value
        for f in dataclasses.fields(config)
        for value in [getattr(config, f.name)]
    }


def to_toml(config: Config) -> str:
    """TOML text from which `parse` gives the same Config."""
    tree = as_tree(config)
    top = {key: value for key, value in tree.items() if not isinstance(value, dict)}
    lines = [f"{key} = {_toml(value)}" for key, value in top.items()]
    for table, values in tree.items():
        if isinstance(values, dict):
            lines += ["", f"[{table}]"]
            lines += [f"{key} = {_toml(value)}" for key, value in values.items()]
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return '"' + re.sub(r"[\x00-\x1f\x7f]", lambda m: f"\\u{ord(m[0]):04x}", escaped) + '"'
    if value is None:
        return '"none"'
    if isinstance(value, tuple | list):
        return "[" + ", ".join(_toml(entry) for entry in value) + "]"
    return repr(value)
