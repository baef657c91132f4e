"""Configuration: frozen dataclasses, TOML presets, and overrides such as `distill.lr=2e-4`.

A preset is a TOML file whose tables are the fields of `Config`. Every number has its range and
every choice its list, declared beside the field. A key that does not exist, or a value of another
type or outside its range, is a ConfigError; it names the nearest key or choice. TOML has no null,
so a field that may be None takes the text "none".
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.resources
import math
import re
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from advkd.names import SAMPLERS

TARGETS = ("denoised", "state")
DOWN_BLOCKS = ("DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D")
UP_BLOCKS = ("UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D")
RESAMPLERS = ("conv", "resnet")
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
TRACKERS = ("none", "tensorboard", "trackio", "wandb")
VARIANCE_TYPES = ("fixed_small", "fixed_small_log", "fixed_large")
MAX_TEXT = 1 << 20  # bytes of a preset
MAX_SIDE = 4096  # pixels of an image's side
MAX_WIDTH = 16384  # channels of a layer
MAX_CLASSES = 100_000
MAX_CLUSTERS = 1024
CLASS_WIDTH = 16  # of a class's embedding in the students that `config_for` designs
MAX_NAME = 255  # characters of a class's name; a folder's has no more
MAX_COUNT = 1 << 40  # of images, steps and the like; fresh noise has image numbers from here on
MIN_EVALUATED = 6  # images of a block: 5 nearest neighbors need one more


class ConfigError(ValueError):
    """A configuration that cannot be used; the message is one sentence."""


def within(default: Any, low: float, high: float = math.inf, *, above: bool = False) -> Any:
    """A field whose number, or every number of its list, lies in [low, high]; with `above` low
    itself is excluded."""
    return field(default=default, metadata={"range": (low, high, above)})


def one_of(default: Any, choices: Sequence[str]) -> Any:
    """A field whose text, or every text of its list, is one of the choices."""
    return field(default=default, metadata={"choices": tuple(choices)})


@dataclass(frozen=True)
class RunConfig:
    """What holds for the whole run."""

    seed: int = within(0, 0, 2**64 - 1)  # of initialization, data order and trajectories
    threads: int = within(0, 0, 1024)  # torch's threads; 0 leaves them as they are
    shares: int = within(0, 0, 4096)  # of a batch, whose number fixes the bits; docs/scaling.md
    reduce: str = one_of("exact", ("exact", "fast"))  # how several processes add up gradients
    device: str = "auto"  # auto | cpu | cuda | cuda:N
    dtype: str = one_of("float32", ("float32", "bfloat16"))  # in which student and D compute
    checkpoint_minutes: float = within(1.0, 0, 1e6)  # between two of a training, at least
    preview_every: int = within(100, 0, MAX_COUNT)  # steps, at least, between previews; 0 = none
    log: str = one_of("none", TRACKERS)  # a tracker beside metrics.jsonl
    tf32: bool = True  # on CUDA float32 is multiplied as TF32: by convolutions and by products
    compile: str = one_of("graph", ("off", "graph"))  # graph: on CUDA a kind of step is captured


@dataclass(frozen=True)
class DataConfig:
    """Images to learn from, and how they are cut."""

    path: str = ""  # folder, .npz/.npy, IDX file or data set; empty = that of a teacher that ships
    size: int = within(28, 1, MAX_SIDE)  # pixels of a side
    channels: int = within(1, 1, 3)  # 1 or 3
    crop: bool = True  # resize the shorter side and cut the center; else resize both sides
    flip: bool = True  # mirror half of the training images
    clusters: int = within(0, 0, MAX_CLUSTERS)  # of images, a power of 2, in the place of classes


@dataclass(frozen=True)
class UNetConfig:
    """The teacher's network, in the words of diffusers' `UNet2DModel`."""

    sample_size: int | None = within(28, 1, MAX_SIDE)  # pixels of a side; None = any
    in_channels: int = within(1, 1, 1024)
    out_channels: int = within(1, 1, 1024)
    block_out_channels: tuple[int, ...] = within((16, 32, 64), 1, MAX_WIDTH)
    down_block_types: tuple[str, ...] = one_of(
        ("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"), DOWN_BLOCKS
    )
    up_block_types: tuple[str, ...] = one_of(("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"), UP_BLOCKS)
    mid_block_type: str | None = one_of("UNetMidBlock2D", ("UNetMidBlock2D",))  # None = no block
    layers_per_block: int = within(2, 1, 64)
    # None = one head over all channels; a list has an entry a level, the highest resolution first
    attention_head_dim: int | tuple[int, ...] | None = within(None, 1, MAX_WIDTH)
    norm_num_groups: int = within(8, 1, MAX_WIDTH)
    attn_norm_num_groups: int | None = within(None, 1, MAX_WIDTH)  # of the middle block's attention
    norm_eps: float = within(1e-5, 0, 1)
    freq_shift: int = within(0, 0, 1)
    flip_sin_to_cos: bool = True
    time_embedding_dim: int | None = within(None, 1, MAX_WIDTH)  # None = 4 block_out_channels[0]
    resnet_time_scale_shift: str = one_of("default", ("default", "scale_shift"))  # or FiLM
    downsample_padding: int = within(1, 0, 1)
    downsample_type: str = one_of("conv", RESAMPLERS)  # of levels with attention on the way down
    upsample_type: str = one_of("conv", RESAMPLERS)  # of levels with attention on the way up
    mid_block_scale_factor: float = within(1.0, 0, 1e6, above=True)
    add_attention: bool = True
    center_input_sample: bool = False
    dropout: float = within(0.0, 0, 1)
    num_class_embeds: int | None = within(None, 1, MAX_CLASSES)  # None = unconditional
    class_embed_type: str | None = one_of(None, ("timestep",))  # None = a table; else as the time


@dataclass(frozen=True)
class ScheduleConfig:
    """The noise schedule a teacher of our own is trained with; see `advkd.diffusion.Schedule`."""

    num_train_timesteps: int = within(1000, 1, 1_000_000)
    beta_schedule: str = one_of("linear", BETA_SCHEDULES)
    beta_start: float = within(1e-4, 0, 1, above=True)
    beta_end: float = within(0.02, 0, 1, above=True)
    prediction_type: str = one_of("epsilon", PREDICTION_TYPES)
    clip_sample: bool = True
    variance_type: str = one_of("fixed_large", VARIANCE_TYPES)


@dataclass(frozen=True)
class TeacherConfig:
    """Training of a teacher."""

    source: str = ""  # folder of a teacher to use as it is; "zoo:NAME" = one that ships
    scheduler: str = ""  # where scheduler_config.json is, if not beside the source
    init: str = ""  # folder of a teacher whose weights the training starts from
    steps: int = within(20_000, 1, MAX_COUNT)
    batch: int = within(64, 1, 1_000_000)
    accumulate: int = within(1, 1, 1_000_000)  # parts of a batch, computed one after another
    lr: float = within(1e-3, 0, 10, above=True)
    warmup: int = within(500, 0, MAX_COUNT)  # steps of linear warm-up; then a cosine to lr_final
    lr_final: float = within(0.02, 0, 1)  # as a share of lr
    weight_decay: float = within(0.0, 0, 10)
    beta2: float = within(0.99, 0, 0.999999)
    grad_clip: float = within(1.0, 0, 1e9, above=True)
    ema: float = within(0.999, 0, 1)
    recompute: bool = False  # activations in the backward pass, block by block, to save memory
    autocast: str = one_of("auto", ("auto", "on", "off"))  # bfloat16; auto: on GPUs
    log_every: int = within(50, 1, MAX_COUNT)
    checkpoint_every: int = within(1000, 1, MAX_COUNT)


@dataclass(frozen=True)
class TrajectoryConfig:
    """Which of the teacher's trajectories are sampled, and which of their states are stored."""

    num: int = within(5000, 1, MAX_COUNT)
    sampler: str = one_of("ddim", SAMPLERS)
    steps: int = within(20, 1, 1_000_000)  # of ddim; ddpm takes all steps of the schedule
    eta: float = within(0.0, 0, 1)
    target: str = one_of("denoised", TARGETS)  # denoised: clean estimates x0_hat; state: x_t
    dtype: str = one_of("float16", ("float16", "float32"))  # of the store
    shard: int = within(250, 1, 1_000_000)  # images sampled at once, into a file; 1 GiB at most


@dataclass(frozen=True)
class StudentConfig:
    """The one-pass generator. One submodule per entry of `stages`: its resolution."""

    family: str = one_of("unet", ("unet", "pyramid"))
    stages: tuple[int, ...] = within((7, 14, 28), 1, MAX_SIDE)
    widths: tuple[int, ...] = within((96, 48, 16), 1, MAX_WIDTH)  # channels of each stage
    blocks: int = within(1, 1, 64)  # residual blocks in a stage
    attention: tuple[int, ...] = within((7,), 1, MAX_SIDE)  # resolutions with self-attention
    groups: int = within(8, 1, MAX_WIDTH)
    class_width: int = within(0, 0, MAX_WIDTH)  # of a class's embedding; 0 = 4 widths[0]


@dataclass(frozen=True)
class DiscriminatorConfig:
    """The adversary of the student in training; one network for every head."""

    widths: tuple[int, ...] = within((24, 48, 96), 1, MAX_WIDTH)  # channels at S, S/2, S/4, ...
    attention: tuple[int, ...] = within((), 1, MAX_SIDE)  # resolutions with self-attention
    groups: int = within(8, 1, MAX_WIDTH)  # of the attention's normalization


@dataclass(frozen=True)
class DistillConfig:
    """Training of the student; symbols as in docs/method.md."""

    steps: int = within(2000, 1, MAX_COUNT)
    batch: int = within(32, 1, 1_000_000)
    accumulate: int = within(1, 1, 1_000_000)  # parts of a batch, computed one after another
    lr: float = within(1e-3, 0, 10, above=True)
    lr_d: float = within(3e-4, 0, 10, above=True)
    warmup: int = within(100, 0, MAX_COUNT)
    lr_final: float = within(0.1, 0, 1)  # as a share of lr
    beta1: float = within(0.5, 0, 0.999999)
    beta2: float = within(0.99, 0, 0.999999)
    lambda_adv: float = within(1.0, 0, 1e9)
    lambda_rec: float = within(10.0, 0, 1e9)
    rho: str = "huber"  # the reconstruction loss, by its name in advkd.training.losses
    adversarial_loss: str = "logistic"  # by its name there too: logistic | relativistic
    huber_delta: float = within(0.1, 0, 1e9, above=True)
    head_weights: tuple[float, ...] = within((), 0, 1e9)  # w_k; empty = 1 for the last, else 0.25
    lambda_div: float = within(0.0, 0, 1e9)  # fresh: holds two images of a label apart
    div_every: int = within(2, 1, MAX_COUNT)  # images are held apart every so many steps
    rec_every: int = within(1, 1, MAX_COUNT)  # once D is in, reconstruct every so many steps
    adversary_heads: str = one_of("all", ("last", "all"))  # that D sees, of the active ones
    inner_every: int = within(4, 1, MAX_COUNT)  # D sees the heads before the last every so often
    r1_gamma: float = within(1.0, 0, 1e9)
    r1_every: int = within(16, 1, MAX_COUNT)
    r2_gamma: float = within(0.0, 0, 1e9)  # as r1_gamma, of the student's images
    translate: int = within(0, 0, MAX_SIDE)  # fresh: pixels by which D's images are moved at most
    cutout: int = within(0, 0, MAX_SIDE)  # fresh: pixels of the square that is covered in them
    schedule: str = one_of("joint", ("joint", "progressive"))
    grow_until: float = within(0.5, 0, 1)  # progressive: share of the steps before the last head
    adversary: str = one_of("paired", ("paired", "fresh"))  # D sees x_T; or images of new noise
    adversary_after: float = within(0.0, 0, 1)  # share of the steps before D enters
    real_images: bool = True  # fresh: the last head is compared with training images, if any
    grad_clip: float = within(10.0, 0, 1e9, above=True)
    ema: float = within(0.999, 0, 1)
    log_every: int = within(20, 1, MAX_COUNT)
    checkpoint_every: int = within(200, 1, MAX_COUNT)


@dataclass(frozen=True)
class EvaluateConfig:
    """How teacher and student are evaluated; see docs/protocol.md."""

    num: int = within(2000, MIN_EVALUATED, 1_000_000)  # images of each network, in all
    blocks: int = within(5, 1, 1000)  # that they are split into, for the spread of the figures
    teacher_steps: int = within(50, 1, 1_000_000)  # of DDIM
    features: str = ""  # folder of a feature network; empty = the data set's, else one is fitted


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
        text = _read(Path(name))
    else:
        raise ConfigError(f"there is no preset {name!r}{nearest(name, presets())}")
    return override(parse(text, where=name), overrides)


def _read(path: Path) -> str:
    """The text of a preset, with or without a byte order mark; ConfigError if it is none."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_TEXT + 1)
        if len(content) > MAX_TEXT:
            raise ConfigError(f"{path} cannot be read: it is larger than {MAX_TEXT} bytes")
        return content.decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} cannot be read: byte {error.start} is not UTF-8") from None


def resolutions_for(size: int) -> list[int]:
    """The resolutions of the networks that `config_for` designs, highest first: halved down to 8 or
    less, at least once. ConfigError for a size that cannot be."""
    found = [size]
    while found[-1] % 2 == 0 and (found[-1] > 8 or len(found) < 2):
        found.append(found[-1] // 2)
    if len(found) < 2 or found[-1] > 8:
        raise ConfigError(
            f"no networks are designed for images of {size}x{size} pixels by themselves, since "
            f"{size} cannot be halved down to 8 or less{_nearest_sizes(size)}"
        )
    return found


def _nearest_sizes(size: int) -> str:
    """The sizes below and above that can be, as advice."""
    below = size // 8 * 8
    near = [side for side in (below, below + 8) if 8 <= side != size]
    fitting = [side for side in near if side & (side - 1) == 0 or _halves(side)]
    return f": resize to {' or '.join(map(str, fitting))}" if fitting else ""


def _halves(size: int) -> bool:
    while size > 8 and size % 2 == 0:
        size //= 2
    return size <= 8


def config_for(size: int, channels: int, num_classes: int | None = None) -> Config:
    """A configuration for images that no preset is for: networks by resolution, small for a CPU,
    and conditional on `num_classes` where these are given.

    ConfigError for a size that cannot be halved down to 8 or less.
    """
    resolutions = resolutions_for(size)
    n = len(resolutions)
    base = 16 if channels == 1 else 24
    unet = UNetConfig(
        sample_size=size,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=tuple(min(base << i, 128) for i in range(n)),
        down_block_types=("DownBlock2D",) * (n - 1) + ("AttnDownBlock2D",),
        up_block_types=("AttnUpBlock2D",) + ("UpBlock2D",) * (n - 1),
        num_class_embeds=num_classes,
    )
    lowest = resolutions[-1]
    student = StudentConfig(
        stages=tuple(resolutions[::-1]),
        widths=tuple([96] * (n - 2) + [48, base]),
        attention=(lowest,),
        class_width=CLASS_WIDTH if num_classes else 0,
    )
    discriminator = DiscriminatorConfig(widths=tuple(min(24 << i, 96) for i in range(n)))
    return Config(
        data=DataConfig(size=size, channels=channels),
        unet=unet,
        schedule=ScheduleConfig(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction"),
        student=student,
        discriminator=discriminator,
        distill=DistillConfig(
            lr=2e-3,
            lr_d=1e-3,
            lambda_rec=7.0,
            r1_gamma=1.0,
            r1_every=8,
            adversary="fresh",
            adversary_heads="last",
            adversary_after=0.1,
        ),
    )


def parse(text: str, where: str = "configuration") -> Config:
    """Build a Config from TOML text; `where` names the source in errors."""
    try:
        tree = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # also a number of too many digits
        raise ConfigError(f"{where} is not valid TOML: {error!s:.200}") from None
    try:
        return typing.cast(Config, build(Config, tree, ""))
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


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
    """Make the dataclass `cls` from a tree of plain values, checking every key, type and bound."""
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    values = {}
    for key, value in tree.items():
        where = f"{path}{key}"
        if key not in fields:
            raise ConfigError(f"unknown key {where!r:.100}{nearest(str(key)[:100], list(fields))}")
        values[key] = _checked(hints[key], value, where)
        _bounded(fields[key].metadata, values[key], where)
    return cls(**values)


def _bounded(metadata: Mapping[str, Any], value: Any, where: str) -> None:
    """Raise ConfigError unless the value, or every entry of a list, is within its bounds."""
    for entry in value if isinstance(value, tuple) else (value,):
        if entry is None:
            continue
        if isinstance(entry, float) and not math.isfinite(entry):
            raise ConfigError(f"{where}={entry} is not a finite number")
        if "range" in metadata:
            low, high, above = metadata["range"]
            if not (low < entry <= high if above else low <= entry <= high):
                words = _range_words(low, high, above)
                raise ConfigError(f"{where}={_shown(entry)} is not {words}")
        choices = metadata.get("choices")
        if choices and entry not in choices:
            raise ConfigError(f"{where}={_shown(entry)} is not one of {', '.join(choices)}")


def _range_words(low: float, high: float, above: bool) -> str:
    low_words, high_words = (f"{n:,}" if isinstance(n, int) else f"{n:g}" for n in (low, high))
    bottom = f"above {low_words}" if above else f"{low_words} or more"
    return bottom if high >= MAX_COUNT else f"{bottom} and at most {high_words}"


def _checked(hint: Any, value: Any, where: str) -> Any:
    """Return `value` as the type `hint`, or raise: int passes for float, a list for a tuple."""
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where!r} is a table, not {_shown(value)}")
        return build(typing.cast(type, hint), value, f"{where}.")
    if isinstance(hint, types.UnionType):
        if value is None or value == "none":
            return None
        inner = [arg for arg in typing.get_args(hint) if arg is not type(None)]
        is_list = isinstance(value, list | tuple)
        fitting = [arg for arg in inner if (typing.get_origin(arg) is tuple) == is_list]
        return _checked((fitting or inner)[0], value, where)
    if typing.get_origin(hint) is tuple:
        item = typing.get_args(hint)[0]
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{where!r} is a list of {item.__name__}, not {_shown(value)}")
        return tuple(_checked(item, entry, where) for entry in value)
    if typing.get_origin(hint) is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where!r} is a table, not {_shown(value)}")
        return dict(value)
    if hint is float and type(value) is int and abs(value) < 1 << 1000:
        return float(value)
    if type(value) is not hint:
        raise ConfigError(f"{where!r} is of type {hint.__name__}, not {_shown(value)}")
    return value


def _shown(value: Any) -> str:
    """A value as a message shows it: cut where it is long."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number of too many digits
        return "a value too long to show"
    return text if len(text) <= 100 else f"{text[:97]}..."


def check_lengths(key: str, names: Sequence[str]) -> None:
    """ConfigError unless every name of classes has 1 to MAX_NAME characters."""
    if not all(1 <= len(name) <= MAX_NAME for name in names):
        raise ConfigError(f"{key} has a name that is not of 1 to {MAX_NAME} characters")


def nearest(key: str, names: Sequence[str]) -> str:
    """Advice that names the nearest of the names, as a clause."""
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
