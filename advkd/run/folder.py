"""The folder of a run: which stages are done, what it was made from, and one process at a time.

Each stage leaves a marker with its seconds, and `config.toml` says what the folder was made from.
A stage whose marker stands is skipped, so running the same command again goes on where it stopped;
another configuration is refused.
"""

from __future__ import annotations

import contextlib
import math
import shutil
import tomllib
import uuid
from collections.abc import Iterator
from pathlib import Path

from advkd import processes
from advkd.config import Config, ConfigError, as_tree, parse, to_toml
from advkd.files import CheckpointError, hold, read_json, read_text, write_bytes, write_json
from advkd.training.checkpoint import drop_checkpoints

FORMAT = 2  # of run folders; version 0.1 wrote none
STAGES = ("teacher", "trajectories", "distill", "evaluate", "report")

# The tables of the configuration that a stage's result depends on, beside the stages before it.
_DEPENDS = {
    "teacher": ("data", "unet", "schedule", "teacher"),
    "trajectories": ("trajectory",),
    "distill": ("student", "discriminator", "distill"),
    "evaluate": ("evaluate",),
    "report": (),
}
# Keys that change no result.
_HARMLESS = (
    *("log_every", "checkpoint_every", "checkpoint_minutes", "preview_every", "log"),
    *("compile", "recompute"),
)
_MARK = ".processes"  # by which the processes of a run tell whether they see the same folder
_FOLDERS = {
    "teacher": "teacher",
    "trajectories": "trajectories",
    "distill": "student",
    "evaluate": "report",
    "report": "report",
}


class RunFolder:
    """A run on disk: markers, lock and configuration."""

    def __init__(self, path: Path, config: Config):
        self.path, self.config = path, config

    def marker(self, stage: str) -> Path:
        """The file that closes a stage."""
        return self.path / _FOLDERS[stage] / f"{stage}.done.json"

    def is_done(self, stage: str) -> bool:
        """Whether a stage's result stands."""
        return self.marker(stage).is_file()

    def finish(self, stage: str, seconds: float) -> None:
        """Close a stage that took so many seconds."""
        write_json(self.marker(stage), {"seconds": round(seconds, 3)})

    def seconds(self, stage: str) -> float | None:
        """What a stage took; None for one that is not done. CheckpointError for a broken marker."""
        return seconds_in(self.marker(stage)) if self.is_done(stage) else None

    @contextlib.contextmanager
    def opened(self, redo: str | None = None) -> Iterator[None]:
        """Create the folder, or check that what is in it was made by this configuration.

        `redo` names a stage whose result, and those of all later ones, are removed first.
        Of processes that share the run the first does all this, and the others wait for it.

        Raises ConfigError where a result stands that another configuration made, CheckpointError
        while another run is at work on the folder, or where a process sees another folder.
        """
        if not processes.is_first():
            self._find(processes.exchange("")[0])
            yield
            return
        with hold(self.path):
            self._prepare(redo)
            self._find(processes.exchange(self._marked() if processes.count() > 1 else "")[0])
            yield

    def _prepare(self, redo: str | None) -> None:
        stored = self.path / "config.toml"
        first = len(STAGES) if redo is None else STAGES.index(redo)
        if stored.is_file():
            found = stored_config(self.path)
            if first:
                self._refuse_other(found, STAGES[:first])
        for stage in reversed(STAGES[first:]):
            self._remove(stage)
        write_bytes(stored, f"format = {FORMAT}\n{to_toml(self.config)}".encode())

    def _marked(self) -> str:
        """A text that no other folder holds, written where `_find` looks for it."""
        mark = uuid.uuid4().hex
        write_bytes(self.path / _MARK, mark.encode())
        return mark

    def _find(self, mark: str) -> None:
        """CheckpointError for the process that does not see the folder so marked."""
        if processes.count() == 1:
            return
        file = self.path / _MARK
        found = read_text(file) if file.is_file() else ""
        if found != mark:
            raise CheckpointError(
                f"process {processes.rank()} does not see process 0's {self.path}: the machines of "
                "a run need one folder that all of them share (--runs)"
            )
        processes.barrier()
        if processes.is_first():
            file.unlink()

    def _refuse_other(self, stored: Config, stages: tuple[str, ...]) -> None:
        for i, stage in enumerate(stages):
            tables = ("run", *_DEPENDS[stage]) if i == 0 else _DEPENDS[stage]
            differing = _differing(stored, self.config, tables)
            begun = [later for later in stages[i:] if self._has_begun(later)]
            if differing and begun:
                raise ConfigError(
                    f"{self.path} was made with another {', '.join(differing)}; choose another "
                    f"--name, or --redo {stage} to remove its {' and '.join(begun)}"
                )

    def _has_begun(self, stage: str) -> bool:
        checkpoints = any((self.path / "checkpoints").glob(f"{stage}-*"))
        return self.is_done(stage) or checkpoints or (self.path / _FOLDERS[stage]).exists()

    def _remove(self, stage: str) -> None:
        self.marker(stage).unlink(missing_ok=True)  # first: what is half removed is no result
        folder = self.path / _FOLDERS[stage]
        if stage == "report":  # in the folder of the evaluation, whose result may stand
            kept = {"summary.json", self.marker("evaluate").name}
            for file in folder.glob("*"):
                if file.name not in kept:
                    file.unlink()
        else:
            shutil.rmtree(folder, ignore_errors=True)
        drop_checkpoints(self.path / "checkpoints", stage)
        if stage == "teacher":
            (self.path / "data.json").unlink(missing_ok=True)
        if stage in ("teacher", "trajectories"):  # what features may have been fitted on
            shutil.rmtree(self.path / "features", ignore_errors=True)


def seconds_in(file: Path) -> float:
    """The seconds that a marker holds; CheckpointError for one that holds none."""
    found = read_json(file).get("seconds")
    if isinstance(found, bool) or not isinstance(found, int | float) or not math.isfinite(found):
        raise CheckpointError(f"{file} does not say how many seconds it took")
    return float(found)


def stored_config(path: Path) -> Config:
    """The configuration that a run folder was made from.

    Raises CheckpointError for a folder that is no run, ConfigError for one of version 0.1.
    """
    file = path / "config.toml"
    if not file.is_file():
        raise CheckpointError(f"{path} is no run of advkd train: it has no config.toml")
    text = read_text(file)
    try:
        form = tomllib.loads(text).get("format")
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{file} is not valid TOML: {error}") from None
    if form != FORMAT:
        made = "advkd 0.1" if form is None else f"another version of advkd (format {form!r})"
        raise ConfigError(
            f"{path} was made by {made} and cannot go on: choose another --name or --runs; its "
            "teacher/ and student/ still load"
        )
    return parse(text.replace(f"format = {FORMAT}\n", "", 1), where=str(file))


def _differing(a: Config, b: Config, tables: tuple[str, ...]) -> list[str]:
    """Keys of these tables that differ in a way that changes results."""
    # Where the shares of a batch are fixed, their sum does not depend on who computes them.
    harmless = (*_HARMLESS, "threads") if a.run.shares and b.run.shares else _HARMLESS
    tree_a, tree_b = as_tree(a), as_tree(b)
    return [
        f"{table}.{key}"
        for table in tables
        for key in sorted(set(tree_a[table]) | set(tree_b[table]))
        if key not in harmless and tree_a[table].get(key) != tree_b[table].get(key)
    ]
