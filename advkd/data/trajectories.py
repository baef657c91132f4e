"""The store of a teacher's trajectories: what a student learns from.

A folder of memory-mapped shards `shard-NNNNN.npy`, (n, K, C, S, S), closed one by one by a JSON
with their checksum, under an `index.json` that says which teacher, seed and times made them. x_T
and labels are not stored: they are drawn again from (seed, image index).
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from advkd.config import MAX_CLASSES, MAX_COUNT, MAX_SIDE, ConfigError, TrajectoryConfig
from advkd.diffusion import Schedule
from advkd.engine.cpu import Engine
from advkd.engine.cuda import CudaEngine
from advkd.engine.sampling import (
    EVALUATION_SEED,
    TARGETS,
    engine_for,
    sample_eagerly,
    sample_into,
    sample_labels,
    sample_x_T,
    saved_steps,
    shape_of,
    table_of,
)
from advkd.files import (
    CheckpointError,
    read_json,
    replacing,
    tensors_hash,
    write_json,
)
from advkd.models.unet import UNet
from advkd.parallel import Workers

INDEX = "index.json"
PLAIN = "plain"  # the engine of torch's modules and a loop in Python


class _Stopped(Exception):
    """Ends a shard in the middle."""


@dataclass(frozen=True)
class TrajectoryIndex:
    """What makes a store what it is; two stores are alike where all of this is equal."""

    teacher: str  # hash of the weights
    schedule: dict[str, Any]
    seed: int
    sampler: str
    steps: int
    eta: float
    target: str
    kept: list[int]  # numbers of the steps after which something is kept, the last one included
    shape: list[int]  # (C, S, S)
    dtype: str
    shard: int
    num_classes: int | None
    engine: str = PLAIN  # what drew it; images of two engines differ in their last bits


def index_of(
    unet: UNet, settings: TrajectoryConfig, kept: int, seed: int, size: int
) -> TrajectoryIndex:
    """The index of the store that these settings ask for. `kept` = K targets, evenly spaced."""
    if not 0 <= seed < EVALUATION_SEED:
        raise ConfigError(f"seed={seed} is not below 2**63, where seeds for judging begin")
    check_trajectories(settings)
    if unet.config.sample_size not in (None, size):
        side = unet.config.sample_size
        raise ConfigError(f"the teacher makes images of {side}x{side}, but data.size={size}")
    table = table_of(unet.schedule, settings.sampler, settings.steps, settings.eta)
    N = len(table)
    if kept > N:
        raise ConfigError(f"{kept} submodules need at least as many steps, not {N}")
    engine = engine_for(unet, size, settings.shard)
    return TrajectoryIndex(
        teacher=tensors_hash(unet.state_dict()),
        schedule=asdict(unet.schedule),
        seed=seed,
        sampler=settings.sampler,
        steps=N,
        eta=settings.eta if settings.sampler == "ddim" else 1.0,
        target=settings.target,
        kept=saved_steps(N, kept),
        shape=list(shape_of(unet, size)),
        dtype=settings.dtype,
        shard=settings.shard,
        num_classes=unet.config.num_class_embeds,
        engine=PLAIN if engine is None else engine.name,
    )


def check_trajectories(settings: TrajectoryConfig) -> None:
    """ConfigError for settings of a store that cannot be."""
    for key, value, allowed in (
        ("dtype", settings.dtype, ("float16", "float32")),
        ("target", settings.target, TARGETS),
    ):
        if value not in allowed:
            raise ConfigError(f"trajectory.{key}={value!r} is not one of {', '.join(allowed)}")
    for key, number in (("num", settings.num), ("shard", settings.shard)):
        if number < 1:
            raise ConfigError(f"trajectory.{key}={number} is below 1")


class Trajectories:
    """A store that is whole up to `num` trajectories: reads targets, draws x_T and labels."""

    def __init__(self, folder: Path, num: int):
        self.index = _read_index(folder)
        self.num = num
        self._maps = []
        for i in range(-(-num // self.index.shard)):
            _check_shard(folder, i)
            self._maps.append(_mapped(_shard_path(folder, i), self.index))

    @property
    def K(self) -> int:
        return len(self.index.kept)

    def targets(self, indices: Tensor) -> Tensor:
        """x^(1) .. x^(K) of the images `indices` (B,): (B, K, C, S, S) float32."""
        size = self.index.shard
        rows = [self._maps[i // size][i % size] for i in indices.tolist()]
        return torch.from_numpy(np.stack(rows).astype(np.float32))

    def x_T(self, indices: Tensor) -> Tensor:
        """The noise these images grew from: (B, C, S, S) float32, channels_last."""
        C, H, W = self.index.shape
        return sample_x_T(self.index.seed, indices, (C, H, W))

    def labels(self, indices: Tensor) -> Tensor | None:
        """Their class labels (B,) int64, or None for an unconditional teacher."""
        return sample_labels(self.index.seed, indices, self.index.num_classes)


def _read_index(folder: Path) -> TrajectoryIndex:
    try:
        index = TrajectoryIndex(**read_json(folder / INDEX))
        Schedule(**index.schedule)
        wrong = _wrong_keys(index)
    except (TypeError, ValueError) as error:
        reason = f"{error!s:.300}"
        raise CheckpointError(f"{folder / INDEX} is no index of trajectories: {reason}") from None
    if wrong:
        raise CheckpointError(
            f"{folder / INDEX} is no index of trajectories: its {', '.join(wrong)} cannot be"
        )
    return index


def _wrong_keys(index: TrajectoryIndex) -> list[str]:
    """The keys of an index whose values are of another type or outside their range."""

    def are_counts(values: Any, high: int) -> bool:
        return isinstance(values, list) and all(type(v) is int and 1 <= v <= high for v in values)

    texts = ("teacher", "sampler", "engine")
    wrong = [key for key in texts if not isinstance(getattr(index, key), str)]
    sound = {
        "seed": type(index.seed) is int and 0 <= index.seed < 1 << 64,
        "steps": are_counts([index.steps], MAX_COUNT),
        "eta": type(index.eta) in (int, float) and 0 <= index.eta <= 1,
        "target": index.target in TARGETS,
        "shape": are_counts(index.shape, MAX_SIDE) and len(index.shape) == 3,
        "dtype": index.dtype in ("float16", "float32"),
        "shard": are_counts([index.shard], MAX_COUNT),
        "num_classes": index.num_classes is None or are_counts([index.num_classes], MAX_CLASSES),
    }
    wrong += [key for key, fine in sound.items() if not fine]
    if not wrong and not (are_counts(index.kept, index.steps) and index.kept[-1:] == [index.steps]):
        wrong.append("kept")
    return wrong


def _shard_path(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:05d}.npy"


def _mapped(path: Path, index: TrajectoryIndex) -> np.ndarray:
    """A shard mapped into memory; CheckpointError unless it is what the index says."""
    try:
        shard: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # numpy raises whatever its parser of headers makes of the file
        raise CheckpointError(f"{path} is no array: {error!s:.300}") from None
    expected = (index.shard, len(index.kept), *index.shape)
    if getattr(shard, "shape", None) != expected or shard.dtype != np.dtype(index.dtype):
        raise CheckpointError(f"{path} is not a shard of {index.dtype} and shape {expected}")
    return shard


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_shard(folder: Path, number: int) -> None:
    """Raise CheckpointError unless the shard is there and is what was written."""
    path = _shard_path(folder, number)
    written = read_json(path.with_suffix(".json"))
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist")
    if _sha256(path) != written.get("sha256"):
        raise CheckpointError(f"{path} is not the file that was written (checksum differs)")


def _is_whole(folder: Path, number: int) -> bool:
    try:
        _check_shard(folder, number)
    except CheckpointError:
        return False
    return True


def open_store(folder: Path, wanted: TrajectoryIndex) -> TrajectoryIndex:
    """Begin a store, or check that the one there is the wanted one; ConfigError if it is not.

    Returns its index: a store goes on with the engine that began it.
    """
    if not (folder / INDEX).exists():
        if any(folder.glob("shard-*.npy")):
            raise ConfigError(f"{folder} holds shards, but no {INDEX}; remove that folder")
        write_json(folder / INDEX, asdict(wanted))
        return wanted
    found = _read_index(folder)
    if replace(found, engine=wanted.engine) != wanted:
        theirs, ours = asdict(found), asdict(wanted)
        differing = [key for key in ours if ours[key] != theirs[key] and key != "engine"]
        raise ConfigError(
            f"{folder} holds other trajectories (they differ in {', '.join(differing)}); "
            "remove that folder or choose another run name"
        )
    return found


def sample_trajectories(
    unet: UNet,
    folder: Path,
    index: TrajectoryIndex,
    num: int,
    threads: int = 0,
    report: Callable[[int, int], None] | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> Trajectories | None:
    """Draw what is missing of `num` trajectories, shard by shard, and return the whole store.

    A shard is always drawn whole; by the engine, whose bits depend on neither batch nor threads,
    or plainly in one batch by one thread. So the store is the same bits wherever an earlier call
    was cut. `report(images done, images)` is called after every step of a shard; once `stopped()`
    is true it ends within a pass, returning None, and an unfinished shard is drawn anew by the
    next call.
    """
    index = open_store(folder, index)
    shards = -(-num // index.shard)
    missing = [i for i in range(shards) if not _is_whole(folder, i)]
    if missing:
        drawing = _Drawing(unet, folder, index, threads, shards, shards - len(missing))
        drawing.report, drawing.stopped = report, stopped
        try:
            drawing.run(missing)
        except _Stopped:
            return None
    return Trajectories(folder, num)


class _Drawing:
    """Draws missing shards: by the engine, all threads on each, or plainly, a thread for each."""

    report: Callable[[int, int], None] | None = None

    def __init__(
        self,
        unet: UNet,
        folder: Path,
        index: TrajectoryIndex,
        threads: int,
        shards: int,
        finished: int,
    ):
        self.unet, self.folder, self.index = unet, folder, index
        self.threads, self.shards = threads, shards
        self.stopped: Callable[[], bool] = lambda: False
        self.table = table_of(unet.schedule, index.sampler, index.steps, index.eta)
        self.engine = _engine_of(unet, index)
        self._steps_done = finished * len(self.table)
        self._lock = threading.Lock()

    def run(self, missing: list[int]) -> None:
        if self.engine is not None:
            for number in missing:
                self._write(number, self._by_engine(self.engine, number))
            return
        with Workers(self.threads, self.unet.conv_in.weight.device) as workers:
            for _ in workers.map(lambda i: self._write(i, self._plainly(i)), missing):
                pass

    def _check_stopped(self) -> None:
        if self.stopped():
            raise _Stopped

    def _on_step(self, done: int, steps: int) -> None:
        with self._lock:
            self._steps_done += 1
            if self.report is not None:
                images = self._steps_done * self.index.shard // len(self.table)
                self.report(images, self.shards * self.index.shard)

    def _on_plain_step(self, done: int, steps: int) -> None:
        self._check_stopped()
        self._on_step(done, steps)

    def _images(self, number: int) -> tuple[Tensor, Tensor | None]:
        """Numbers and labels of a shard's images."""
        first = number * self.index.shard
        indices = torch.arange(first, first + self.index.shard)
        return indices, sample_labels(self.index.seed, indices, self.index.num_classes)

    def _by_engine(self, engine: Engine | CudaEngine, number: int) -> np.ndarray:
        index = self.index
        indices, y = self._images(number)
        shape = (index.shard, len(index.kept), *index.shape)
        out = torch.empty(shape, dtype=getattr(torch, index.dtype))
        sample_into(
            out, engine, self.table, index.seed, indices, y=y, kept=index.kept,
            target=index.target, threads=self.threads, callback=self._on_step,
            poll=self._check_stopped,
        )  # fmt: skip
        return out.numpy()

    def _plainly(self, number: int) -> np.ndarray:
        index = self.index
        indices, y = self._images(number)
        kept = sample_eagerly(
            self.unet, self.table, index.seed, indices, y=y, kept=index.kept,
            target=index.target, callback=self._on_plain_step, size=index.shape[-1],
        )  # fmt: skip
        stacked: np.ndarray = torch.stack(kept, dim=1).cpu().contiguous().numpy()
        return stacked.astype(index.dtype)

    def _write(self, number: int, values: np.ndarray) -> None:
        path = _shard_path(self.folder, number)
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.save(file, values, allow_pickle=False)
        write_json(path.with_suffix(".json"), {"images": len(values), "sha256": _sha256(path)})


def _engine_of(unet: UNet, index: TrajectoryIndex) -> Engine | CudaEngine | None:
    """What draws this store; ConfigError where that is not to be had here."""
    if index.engine == PLAIN:
        return None
    engine = engine_for(unet, index.shape[-1], index.shard)
    if engine is None or engine.name != index.engine:
        here = PLAIN if engine is None else engine.name
        raise ConfigError(
            f"these trajectories are drawn by the engine {index.engine!r}, but here that is "
            f"{here!r}; remove their folder or choose another run name"
        )
    return engine
