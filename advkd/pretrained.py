"""Folders that hold a network: teachers in diffusers' layout, students in our own.

Such folders may come from anywhere. Settings are checked first, then a network is built without
memory and compared with the header of its weights' file; only what fits is read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.resources
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from advkd.config import (
    MAX_CLASSES,
    MAX_SIDE,
    TARGETS,
    ConfigError,
    StudentConfig,
    build,
    check_lengths,
    one_of,
    within,
)
from advkd.device import without_memory
from advkd.diffusion import LEARNED_RANGE, Schedule
from advkd.files import (
    CheckpointError,
    check_fit,
    listed,
    load_strictly,
    read_header,
    read_json,
    read_tensors,
    write_json,
    write_tensors,
)
from advkd.hub import download, is_repository
from advkd.models.student import Student
from advkd.models.unet import UNet, config_from_diffusers, config_to_diffusers

WEIGHTS = "diffusion_pytorch_model.safetensors"
# A key of a teacher's unet/config.json. Where a key begins with an underscore, diffusers passes
# over it without a warning and writes it again with the rest: names outlive a fine-tuning there.
CLASS_NAMES = "_class_names"

# Attention names of uploads older than diffusers 0.15, and what they are called since.
DEPRECATED_ATTENTION = {
    "query": "to_q",
    "key": "to_k",
    "value": "to_v",
    "proj_attn": "to_out.0",
}
# Parts of a tensor's name that torch.compile, DDP, FSDP and activation checkpointing add.
_WRAPPERS = {"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
PICKLES = (".bin", ".ckpt", ".pt", ".pth")

Network = TypeVar("Network", bound=nn.Module)


def zoo(name: str) -> Path:
    """The folder of a network that ships with the package; CheckpointError if there is none."""
    folder = Path(str(importlib.resources.files("advkd") / "zoo"))
    known = sorted(entry.name for entry in folder.glob("*") if entry.is_dir())
    if name not in known:
        raise CheckpointError(f"the zoo has no {name!r}; it has {', '.join(known)}")
    return folder / name


def resolve(source: str | Path) -> Path:
    """A folder by path, `zoo:NAME`, or a repository of the Hugging Face hub, OWNER/NAME or
    OWNER/NAME@REVISION, downloaded; CheckpointError if it does not exist."""
    text = str(source)
    if text.startswith("zoo:"):
        return zoo(text[4:])
    if is_repository(text):
        return download(text)
    if not Path(source).is_dir():
        raise CheckpointError(f"there is no folder {text}")
    return Path(source)


def load_network(
    make: Callable[[], Network],
    config: Path,
    file: Path | Sequence[Path],
    *,
    sha256: str | None = None,
    rename: Callable[[str], str] = lambda name: name,
) -> Network:
    """Make a network and load its weights from a safetensors file: float32, on the CPU, frozen.

    `make()` runs on device `meta`, and what it returns is compared with the header of `file` before
    any memory is taken; a large network's file may be several. `config` is the file that it has its
    settings from. Names in `file` are freed of what wrappers such as torch.compile add, then passed
    to `rename`. Raises CheckpointError, naming the file, for settings that no network has, for
    weights that are absent, broken, not the ones written (`sha256`) or of another network, and for
    NaN or infinity.
    """
    try:
        with without_memory():
            network = make()
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:
        raise CheckpointError(f"{config} describes no network: {_brief(error)}") from None
    network = network.float().eval().requires_grad_(False)
    files = [file] if isinstance(file, Path) else list(file)
    headers = {one: read_header(one) for one in files}
    stored = [name for header in headers.values() for name in header]
    names = _names(stored, rename, files[0])
    infos = {names[name]: info for header in headers.values() for name, info in header.items()}
    check_fit(network.state_dict(), infos, files[0], f"the network that {config} describes")
    tensors: dict[str, torch.Tensor] = {}
    for one in files:
        tensors |= {names[name]: tensor for name, tensor in read_tensors(one, sha256).items()}
    load_strictly(network, tensors, files[0])
    check_finite(network, files[0])
    return network


def check_finite(network: nn.Module, file: Path) -> None:
    """Raise CheckpointError where a network that was read from `file` has NaN or infinity."""
    for name, tensor in network.state_dict().items():
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"{file} cannot be used: {name} holds NaN or infinity")


def _brief(error: Exception) -> str:
    """The first line of an error, cut where it repeats long content of a file."""
    return f"{str(error).partition(chr(10))[0]:.500}"


def _names(stored: Sequence[str], rename: Callable[[str], str], file: Path) -> dict[str, str]:
    """The network's name for each stored one; CheckpointError where two have the same."""
    names = {}
    for name in stored:
        if name in names:
            raise CheckpointError(f"{file} and the files beside it hold twice: {name:.200}")
        parts = (part for part in name.split(".") if part not in _WRAPPERS)
        names[name] = rename(".".join(parts))
    found = list(names.values())
    if len(set(found)) < len(found):
        twice = sorted({name for name in found if found.count(name) > 1})
        raise CheckpointError(f"{file} holds twice, by two names each: {listed(twice)}")
    return names


def save_teacher(unet: UNet, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write a diffusers pipeline folder: unet/, scheduler/ and, last, model_index.json.

    Raises ConfigError where `unet.class_names` are not names of its classes.
    """
    names = _class_names(unet.class_names, unet.num_classes)
    tensors = {name: tensor.to(dtype) for name, tensor in unet.state_dict().items()}
    write_tensors(folder / "unet" / WEIGHTS, tensors)
    settings = config_to_diffusers(unet.config) | ({CLASS_NAMES: names} if names else {})
    write_json(folder / "unet" / "config.json", settings)
    write_json(folder / "scheduler" / "scheduler_config.json", unet.schedule.to_diffusers())
    write_json(
        folder / "model_index.json",
        {
            "_class_name": unet.schedule.scheduler.replace("Scheduler", "Pipeline"),
            "scheduler": ["diffusers", unet.schedule.scheduler],
            "unet": ["diffusers", "UNet2DModel"],
        },
    )


def load_teacher(
    source: str | Path,
    scheduler: str | Path | None = None,
    weights: Sequence[Path] | None = None,
) -> UNet:
    """Load a DDPM UNet as diffusers or advkd saved it, in float32 on the CPU, ready to sample.

    `source` is a pipeline folder, a flat folder as the google/ddpm-* uploads are, a bare `unet/`
    folder (then `scheduler` names the folder or file of its scheduler_config.json), `zoo:NAME`, or
    OWNER/NAME, a repository of the Hugging Face hub. Only safetensors are read:
    `diffusion_pytorch_model.safetensors` or the one variant that stands in its place, such as
    `diffusion_pytorch_model.fp16.safetensors`, or in several parts with an index. `weights` are
    safetensors files in place of the folder's own. Raises CheckpointError for a file that is
    absent, broken or does not fit, ConfigError for an architecture or a scheduler setting that is
    not supported; both name the file.
    """
    folder = resolve(source)
    unet_folder = _unet_folder(folder)
    schedule_file = _scheduler_file(folder, scheduler)
    with _naming(schedule_file):
        schedule = Schedule.from_diffusers(read_json(schedule_file))
    config_file = unet_folder / "config.json"
    settings = read_json(config_file)
    with _naming(config_file):
        config = config_from_diffusers(settings)
        names = _class_names(settings.get(CLASS_NAMES), config.num_class_embeds)
    learned = schedule.variance_type == LEARNED_RANGE
    if learned and config.out_channels != 2 * config.in_channels:
        raise ConfigError(
            f"{schedule_file} has variance_type={LEARNED_RANGE!r}, but the network of "
            f"{config_file} gives {config.out_channels} channels for {config.in_channels}, not "
            "twice as many"
        )
    files = weights or _weights_files(unet_folder)
    unet = load_network(lambda: UNet(config, schedule), config_file, files, rename=_modern)
    unet.class_names = names
    return unet


def _unet_folder(folder: Path) -> Path:
    """Where the network of a pipeline's folder lies, or of a checkpoint of diffusers' trainings."""
    if (folder / "unet").is_dir():
        if (folder / "unet_ema").is_dir():
            warnings.warn(
                f"{folder} has unet/ and its average unet_ema/: unet/ is taken; name the other to "
                "take that",
                stacklevel=3,
            )
        return folder / "unet"
    return folder / "unet_ema" if (folder / "unet_ema").is_dir() else folder


@contextlib.contextmanager
def _naming(file: Path) -> Iterator[None]:
    """Turn a ValueError about a file's content into a ConfigError that names the file."""
    try:
        yield
    except ValueError as error:
        raise ConfigError(f"{file}: {_brief(error)}") from None


def _modern(name: str) -> str:
    """Map a deprecated attention tensor name to today's; others stay."""
    match = re.fullmatch(r"(.*attentions\.\d+)\.(\w+)\.(weight|bias)", name)
    if match and match[2] in DEPRECATED_ATTENTION:
        return f"{match[1]}.{DEPRECATED_ATTENTION[match[2]]}.{match[3]}"
    return name


def _weights_files(folder: Path) -> list[Path]:
    """The safetensors files of a unet folder; CheckpointError says what is there instead."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    stem = WEIGHTS.partition(".")[0]
    files = sorted(file.name for file in folder.iterdir() if file.is_file())
    whole = [n for n in files if re.fullmatch(rf"{stem}\.\w+\.safetensors", n)]
    indices = [n for n in files if re.fullmatch(rf"{stem}\.safetensors\.index(\.\w+)?\.json", n)]
    variants = [*whole, *indices]
    if len(variants) > 1:
        raise CheckpointError(
            f"{folder} has several weights ({', '.join(variants)}); rename one to {WEIGHTS}, or "
            "move the others away"
        )
    if variants:
        one = folder / variants[0]
        return _listed_files(one) if indices else [one]
    parts = [n for n in files if re.search(r"-\d+-of-\d+\.safetensors$", n)]
    if parts:
        raise CheckpointError(
            f"{folder} holds its weights in several files ({parts[0]}, ...) without the "
            f"{WEIGHTS}.index.json that lists them"
        )
    pickles = [name for name in files if name.endswith(PICKLES)]
    if pickles:
        raise CheckpointError(
            f"{folder} holds only a pickle ({pickles[0]}), which no command reads but one: "
            f"advkd convert {folder} NEW_FOLDER"
        )
    raise CheckpointError(f"{folder} has no {WEIGHTS}")


def pickles_of(source: str | Path) -> list[Path]:
    """The pickles that a folder of diffusers has for its weights: one, or several parts; none
    where it has safetensors. CheckpointError where they could be either of several networks."""
    folder = _unet_folder(resolve(source))
    if any(folder.glob("*.safetensors")):
        return []
    stem = WEIGHTS.partition(".")[0]
    pickles = sorted(file for file in folder.iterdir() if file.suffix in PICKLES)
    usual = [file for file in pickles if file.name == f"{stem}.bin"]
    parts = [file for file in pickles if re.fullmatch(rf"{stem}-\d+-of-\d+\.bin", file.name)]
    found = usual or parts or pickles
    if not found:
        raise CheckpointError(f"{folder} has no {WEIGHTS}, and no {stem}.bin")
    if len(found) > 1 and found != parts:
        names = ", ".join(file.name for file in found)
        raise CheckpointError(f"{folder} has several weights ({names}); rename one to {stem}.bin")
    return found


def _listed_files(index: Path) -> list[Path]:
    """The files of weights that are cut into several, as the index says, which lies beside them."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise CheckpointError(f"{index} cannot be used: it has no weight_map")
    names = {str(name) for name in places.values()}
    wrong = sorted(name for name in names if Path(name).name != name or not name.strip("."))
    if wrong:
        raise CheckpointError(f"{index} cannot be used: {wrong[0]!r:.200} is no file beside it")
    return [index.with_name(name) for name in sorted(names)]


def _scheduler_file(folder: Path, scheduler: str | Path | None) -> Path:
    if scheduler is not None:
        given = Path(scheduler)
        return given / "scheduler_config.json" if given.is_dir() else given
    for candidate in (folder / "scheduler", folder):
        if (candidate / "scheduler_config.json").is_file():
            return candidate / "scheduler_config.json"
    raise CheckpointError(
        f"{folder} has no scheduler_config.json; name its folder with scheduler=… (or --scheduler)"
    )


def _class_names(names: Any, num_classes: int | None) -> tuple[str, ...] | None:
    """Names of a network's classes, or None; ConfigError unless each class has one of its own."""
    if names is None:
        return None
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise ConfigError("class_names is not a list of texts")
    if len(names) != num_classes:
        raise ConfigError(f"class_names has {len(names)} names for {num_classes or 'no'} classes")
    check_lengths("class_names", names)
    if len(set(names)) < len(names):
        raise ConfigError("class_names has one name twice")
    return tuple(names)


@dataclasses.dataclass(frozen=True)
class _StudentFile:
    """What a student's config.json says."""

    size: int = within(28, 1, MAX_SIDE)
    channels: int = within(1, 1, 1024)
    target: str = one_of("denoised", TARGETS)
    num_classes: int | None = within(None, 1, MAX_CLASSES)
    class_names: tuple[str, ...] | None = None
    student: StudentConfig = dataclasses.field(default_factory=StudentConfig)


def save_student(student: Student, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write model.safetensors and, last, config.json.

    Raises ConfigError where `student.class_names` are not names of its classes.
    """
    names = _class_names(student.class_names, student.num_classes)
    tensors = {name: tensor.to(dtype) for name, tensor in student.state_dict().items()}
    write_tensors(folder / "model.safetensors", tensors)
    write_json(
        folder / "config.json",
        {
            "size": student.size,
            "channels": student.channels,
            "target": student.target,
            "num_classes": student.num_classes,
            **({"class_names": names} if names else {}),
            "student": dataclasses.asdict(student.config),
        },
    )


def load_student(source: str | Path) -> Student:
    """Load a student that `save_student` wrote, in float32 on the CPU, from a folder, `zoo:NAME` or
    a repository of the Hugging Face hub, OWNER/NAME.

    Raises CheckpointError for a file that is absent, broken or does not fit.
    """
    folder = resolve(source)
    file = folder / "config.json"
    settings = read_json(file)
    missing = [key for key in ("size", "channels", "student") if key not in settings]
    if missing:
        raise CheckpointError(f"{file} describes no student: it lacks {', '.join(missing)}")
    try:
        s = build(_StudentFile, settings, "")
        names = _class_names(s.class_names, s.num_classes)
    except ConfigError as error:
        raise CheckpointError(f"{file} describes no student: {_brief(error)}") from None
    student = load_network(
        lambda: Student(s.student, s.size, s.channels, s.target, s.num_classes),
        file,
        folder / "model.safetensors",
    )
    student.class_names = names
    return student
