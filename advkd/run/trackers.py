"""Where a training's numbers and pictures go beside `metrics.jsonl`, which stays their source:
TensorBoard's event files, trackio or Weights & Biases, each a library of its own."""

from __future__ import annotations

import abc
import contextlib
import hashlib
import importlib
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from advkd.config import Config, ConfigError, as_tree, to_toml

PROJECT = "advkd"


class Tracker(abc.ABC):
    """One training as a tracker shows it."""

    @abc.abstractmethod
    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        """Add the values of a step."""

    @abc.abstractmethod
    def picture(self, step: int, pixels: np.ndarray) -> None:
        """Add a picture, uint8 (H, W, 3)."""

    @abc.abstractmethod
    def close(self) -> None:
        """Write what is left."""


class _TensorBoard(Tracker):
    """Event files in `tensorboard/STAGE` of the run's folder: `tensorboard --logdir runs`."""

    def __init__(self, library: Any, folder: Path, stage: str, first: int, config: Config):
        # What an earlier, interrupted call wrote from step `first` on is not shown twice.
        self._writer = library.SummaryWriter(str(folder / "tensorboard" / stage), purge_step=first)
        self._writer.add_text("config", f"```\n{to_toml(config)}```", first)

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def picture(self, step: int, pixels: np.ndarray) -> None:
        self._writer.add_image("preview", pixels, step, dataformats="HWC")
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _Runs(Tracker):
    """A run of trackio or of Weights & Biases, which speak alike; those of a folder are a group."""

    def __init__(self, library: Any, folder: Path, stage: str, first: int, config: Config):
        self._library = library
        with contextlib.redirect_stdout(sys.stderr):  # stdout is for the closing table
            library.init(
                project=PROJECT,
                name=f"{config.name} {stage}",
                group=config.name,
                config=as_tree(config),
                resume="allow",
                **self.settings(folder, stage, config),
            )

    def settings(self, folder: Path, stage: str, config: Config) -> dict[str, Any]:
        """What only one of the libraries takes."""
        return {}

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        self._library.log(dict(values), step=step)

    def picture(self, step: int, pixels: np.ndarray) -> None:
        self._library.log({"preview": self._library.Image(pixels)}, step=step)

    def close(self) -> None:
        with contextlib.redirect_stdout(sys.stderr):
            self._library.finish()


class _WeightsAndBiases(_Runs):
    def settings(self, folder: Path, stage: str, config: Config) -> dict[str, Any]:
        """Where it keeps its files, and an identity: a call that goes on continues the same run."""
        training = f"{folder.resolve()} {stage} {to_toml(config)}"
        return {"dir": str(folder), "id": hashlib.sha256(training.encode()).hexdigest()[:16]}


_Make = Callable[[Any, Path, str, int, Config], Tracker]
# The tracker's class, and the module that it needs, by the name that is also the extra's.
_TRACKERS: dict[str, tuple[_Make, str]] = {
    "tensorboard": (_TensorBoard, "torch.utils.tensorboard"),
    "trackio": (_Runs, "trackio"),
    "wandb": (_WeightsAndBiases, "wandb"),
}


def tracker_library(name: str) -> Any:
    """The module of a tracker; ConfigError where it is not installed."""
    try:
        return importlib.import_module(_TRACKERS[name][1])
    except ImportError:
        raise ConfigError(
            f"--log {name} needs the library {name}, which is not installed: "
            f"pip install 'advkd[{name}]'"
        ) from None


def open_tracker(folder: Path, stage: str, first: int, config: Config) -> Tracker | None:
    """The tracker that `run.log` names, for a training whose next values are of step `first`; None
    for "none". ConfigError where its library is not installed."""
    name = config.run.log
    if name == "none":
        return None
    return _TRACKERS[name][0](tracker_library(name), folder, stage, first, config)
