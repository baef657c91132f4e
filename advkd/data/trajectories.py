"""The store of a teacher's trajectories: what a student learns from.

A folder of memory-mapped shards `shard-NNNNN.npy`, closed one by one by a JSON with their checksum,
under an `index.json` that says which teacher, seed and times made them. Each target is stored at
the size of the head that learns it: a shard is (n, P), an image's K targets one after the other. A
store without sizes, as earlier versions left them, has all at full size, (n, K, C, S, S). x_T and
labels are not stored: they follow from (seed, image number).
"""

from __future__ import annotations

import hashlib
import json
import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from advkd import processes
from advkd.config import (
    MAX_CLASSES,
    MAX_SIDE,
    TARGETS,
    ConfigError,
    TrajectoryConfig,
    build,
    one_of,
    within,
)
from advkd.engine.cache import engine_for, engine_named
from advkd.engine.interface import Engine, input_shape
from advkd.engine.noise import Noise, Purpose
from advkd.engine.sampling import saved_steps, table_of
from advkd.files import (
    CheckpointError,
    created,
    read_json,
    remove_stale,
    replacing,
    tensors_hash,
    write_json,
)
from advkd.models.layers import area_resized
from advkd.models.unet import UNet
from advkd.names import SAMPLERS

INDEX = "index.json"
MAX_SHARD = 1 << 30  # bytes of a shard's targets as they are sampled, in float32 at full size


class _Stopped(Exception):
    """Ends a shard in the middle."""


@dataclass(frozen=True)
class TrajectoryIndex:
    """What makes a store what it is; two stores are alike where all of this is equal."""

    teacher: str  # hash of the weights
    schedule: dict[str, Any]
    seed: int = within(0, 0, 2**64 - 1)
    sampler: str = one_of("ddim", SAMPLERS)
    steps: int = within(1, 1, 1_000_000)
    eta: float = within(0.0, 0, 1)
    target: str = one_of("denoised", TARGETS)
    saved: tuple[int, ...] = within((), 1, 1_000_000)  # steps after which a target is stored
    shape: tuple[int, ...] = within((), 1, MAX_SIDE)  # (C, S, S)
    sizes: tuple[int, ...] = within((), 1, MAX_SIDE)  # pixels of each target's side; empty = S
    dtype: str = one_of("float16", ("float16", "float32"))
    shard: int = within(1, 1, 1_000_000)
    num_classes: int | None = within(None, 1, MAX_CLASSES)
    engine: str = "eager"  # by name; images of two engines differ in their last bits

    @property
    def sides(self) -> tuple[int, ...]:
        """The pixels of each target's side."""
        return self.sizes or (self.shape[-1],) * len(self.saved)

    @property
    def places(self) -> list[slice]:
        """Where in an image's row each target is."""
        ends = list(accumulate((self.shape[0] * side**2 for side in self.sides), initial=0))
        return [slice(*place) for place in pairwise(ends)]

    @property
    def shard_shape(self) -> tuple[int, ...]:
        """The shape of a shard's array."""
        if self.sizes:
            return self.shard, self.places[-1].stop
        return self.shard, len(self.saved), *self.shape

    @property
    def noise(self) -> Noise:
        """Where x_T, labels and the noise of the steps come from."""
        return Noise(self.seed, Purpose.TRAINING)


def index_of(
    unet: UNet,
    settings: TrajectoryConfig,
    K: int,
    seed: int,
    size: int,
    sizes: Sequence[int] = (),
) -> TrajectoryIndex:
    """The index of the store that these settings ask for, of K targets, evenly spaced, each stored
    at one of the K `sizes`, or at full size.

    A shard has fewer images than `settings.shard` where these would take more than MAX_SHARD bytes.
    Raises ConfigError for what the teacher cannot give.
    """
    if unet.config.sample_size not in (None, size):
        side = unet.config.sample_size
        raise ConfigError(f"the teacher makes images of {side}x{side}, but data.size={size}")
    table = table_of(unet.schedule, settings.sampler, settings.steps, settings.eta)
    N = len(table)
    if K > N:
        raise ConfigError(f"{K} submodules need at least as many steps, not {N}")
    shape = input_shape(unet, (size, size))
    shard = max(1, min(settings.shard, MAX_SHARD // (4 * K * math.prod(shape))))
    return TrajectoryIndex(
        teacher=tensors_hash(unet.state_dict()),
        schedule=unet.schedule.settings(),
        seed=seed,
        sampler=settings.sampler,
        steps=N,
        eta=settings.eta if settings.sampler == "ddim" else 1.0,
        target=settings.target,
        saved=tuple(saved_steps(N, K)),
        shape=shape,
        sizes=tuple(sizes),
        dtype=settings.dtype,
        shard=shard,
        num_classes=unet.num_classes,
        engine=engine_for(unet, shard, size=(size, size), table=table).name,
    )


class Trajectories:
    """A store that is whole up to `num` trajectories: targets on disk, x_T and labels by seed."""

    def __init__(self, folder: Path, num: int):
        self.index = _read_index(folder)
        self.num = num
        shards = range(-(-num // self.index.shard))
        maps = [_opened(folder, i, self.index) for i in shards]
        self._rows = [found.reshape(self.index.shard, -1) for found in maps]

    @property
    def K(self) -> int:
        return len(self.index.saved)

    def targets(self, indices: Tensor, k: int) -> Tensor:
        """The targets of head k (0 .. K-1, or -1 for the last) of the images `indices` (B,):
        (B, C, r, r) of the store's dtype, r = `index.sides[k]`. No other head's are read."""
        shard, place, side = self.index.shard, self.index.places[k], self.index.sides[k]
        rows = [self._rows[i // shard][i % shard, place] for i in indices.tolist()]
        return torch.from_numpy(np.stack(rows)).view(len(rows), -1, side, side)

    def x_T(self, indices: Tensor) -> Tensor:
        """The noise these images grew from: (B, C, S, S) float32, channels_last."""
        return self.index.noise.x_T(indices, self.index.shape)

    def labels(self, indices: Tensor) -> Tensor | None:
        """Their class labels (B,) int64, or None for an unconditional teacher."""
        return self.index.noise.labels(indices, self.index.num_classes)


def _read_index(folder: Path) -> TrajectoryIndex:
    path = folder / INDEX
    try:
        index = cast(TrajectoryIndex, build(TrajectoryIndex, read_json(path), ""))
    except (ConfigError, TypeError) as error:
        raise CheckpointError(f"{path} is no index of trajectories: {error}") from None
    if len(index.shape) != 3 or not index.saved:
        raise CheckpointError(f"{path} is no index of trajectories: shape or saved is wrong")
    if len(index.sides) != len(index.saved) or any(index.shape[-1] % r for r in index.sides):
        raise CheckpointError(f"{path} is no index of trajectories: sizes are wrong")
    return index


def _shard_path(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:05d}.npy"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# Checksums of shards that this process has read whole, by path; with the file's size and time.
_verified: dict[Path, tuple[int, int, object]] = {}


def _check_shard(folder: Path, number: int) -> None:
    """Raise CheckpointError unless the shard is there and is what was written."""
    path = _shard_path(folder, number).resolve()
    sha256 = read_json(path.with_suffix(".json")).get("sha256")
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist")
    state = path.stat()
    found = (state.st_size, state.st_mtime_ns, sha256)
    if _verified.get(path) == found:
        return
    if _sha256(path) != sha256:
        raise CheckpointError(f"{path} is not the file that was written (checksum differs)")
    _verified[path] = found


def _opened(folder: Path, number: int, index: TrajectoryIndex) -> np.ndarray:
    """A shard, memory-mapped. CheckpointError if it is not what the index says."""
    _check_shard(folder, number)
    path = _shard_path(folder, number)
    shape = index.shard_shape
    try:
        found: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # numpy raises whatever its parser makes of the header
        raise CheckpointError(f"{path} is not a whole array: {error!s:.200}") from None
    if not isinstance(found, np.ndarray):
        raise CheckpointError(f"{path} is an archive and not an array")
    if found.shape != shape or found.dtype != index.dtype:
        raise CheckpointError(
            f"{path} holds {found.dtype} {found.shape}, not {index.dtype} {shape}"
        )
    return found


def _is_whole(folder: Path, number: int) -> bool:
    try:
        _check_shard(folder, number)
    except CheckpointError:
        return False
    return True


def open_store(folder: Path, wanted: TrajectoryIndex) -> TrajectoryIndex:
    """Begin a store, or check that the one there is the wanted one; ConfigError if it is not.

    Returns its index: a store goes on with the engine that began it, and one without sizes as it
    is.
    """
    if not (folder / INDEX).exists():
        if any(folder.glob("shard-*.npy")):
            raise ConfigError(f"{folder} holds shards, but no {INDEX}; remove that folder")
        write_json(folder / INDEX, asdict(wanted))
        return wanted
    found = _read_index(folder)
    if not found.sizes:
        wanted = replace(wanted, sizes=())
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
    """Sample what is missing of `num` trajectories, shard by shard, and return the whole store.

    A shard is always sampled whole, in one batch, so the store is the same bits wherever an earlier
    call was cut and whatever the number of threads and processes. Of several processes, which see
    one folder, each takes the shards that it is first to claim, and none returns before all are
    there. `report(images done, images)` is called after
    every step of a shard; once `stopped()` is true it ends within a network pass, returning None,
    and the next call samples an unfinished shard anew. Raises ConfigError where the store there is
    another, or goes on by an engine that is not to be had here.
    """
    index = processes.in_turn(lambda: open_store(folder, index))
    shards = -(-num // index.shard)
    missing = _missing(folder, shards)
    cut = False
    if missing:
        try:
            _, H, W = index.shape
            engine = engine_named(index.engine, unet, index.shard, size=(H, W))
        except ValueError as error:
            raise ConfigError(
                f"{folder} cannot go on with its trajectories: {error}; remove that folder or "
                "choose another run name"
            ) from None
        progress = _Progress(index, shards, shards - len(missing), report, stopped)
        try:
            _sample_shards(engine, unet, folder, index, missing, threads, progress)
        except _Stopped:
            cut = processes.stopping(True)
    processes.barrier()
    if processes.is_first():
        _remove_claims(folder)
    if cut or processes.stopping(False):
        return None
    return Trajectories(folder, num)


def _missing(folder: Path, shards: int) -> list[int]:
    """The shards that are still to be sampled, as the first process sees them; each process begins
    elsewhere among them. Claims and half-written files that killed processes left are gone."""
    found: list[int] = []
    if processes.is_first():
        remove_stale(folder)
        _remove_claims(folder)
        found = [i for i in range(shards) if not _is_whole(folder, i)]
    missing: list[int] = json.loads(processes.exchange(json.dumps(found))[0])
    first = len(missing) * processes.rank() // processes.count()
    return missing[first:] + missing[:first]


def _claim(folder: Path, number: int) -> bool:
    """Whether this process is the one to sample a shard. Only the first to ask gets it, also in a
    folder that machines share."""
    return processes.count() == 1 or created(folder / f"shard-{number:05d}.claim")


def _remove_claims(folder: Path) -> None:
    for claim in folder.glob("shard-*.claim"):
        claim.unlink(missing_ok=True)


class _Progress:
    """Counts steps of shards, from any thread, and ends the sampling on demand."""

    def __init__(
        self,
        index: TrajectoryIndex,
        shards: int,
        finished: int,
        report: Callable[[int, int], None] | None,
        stopped: Callable[[], bool],
    ):
        self._index, self._shards = index, shards
        self._report, self._stopped = report, stopped
        self._steps_done = finished * index.steps
        self._lock = threading.Lock()

    def poll(self) -> None:
        if processes.stopping(self._stopped()):
            raise _Stopped

    def taken(self) -> None:
        """Count a shard that another process has claimed."""
        with self._lock:
            self._steps_done += self._index.steps

    def on_step(self, done: int, steps: int) -> None:
        with self._lock:
            self._steps_done += 1
            if self._report is not None:
                images = self._steps_done * self._index.shard // self._index.steps
                self._report(images, self._shards * self._index.shard)


def _sample_shards(
    engine: Engine,
    unet: UNet,
    folder: Path,
    index: TrajectoryIndex,
    missing: list[int],
    threads: int,
    progress: _Progress,
) -> None:
    """Sample shards and write them, each as soon as it is whole."""
    table = table_of(unet.schedule, index.sampler, index.steps, index.eta)
    whole = (index.shard, len(index.saved), *index.shape)
    dtype = getattr(torch, index.dtype)

    def sample(number: int) -> None:
        if not _claim(folder, number):
            progress.taken()
            return
        first = number * index.shard
        indices = torch.arange(first, first + index.shard, dtype=torch.int64, device="cpu")
        sampled_as = torch.float32 if index.sizes else dtype  # averaged before it is rounded
        out = torch.empty(whole, dtype=sampled_as, device="cpu")
        engine.sample(
            table, index.noise, indices, index.noise.labels(indices, index.num_classes),
            saved=index.saved, target=index.target, out=out, threads=threads,
            on_step=progress.on_step, poll=progress.poll,
        )  # fmt: skip
        if index.sizes:
            rows = torch.empty(index.shard_shape, dtype=dtype, device="cpu")
            for k, (place, side) in enumerate(zip(index.places, index.sides, strict=True)):
                rows[:, place] = area_resized(out[:, k], side).flatten(1)
            out = rows
        _write(folder, number, out.numpy())

    for _ in engine.map(sample, missing, threads):
        pass


def _write(folder: Path, number: int, values: np.ndarray) -> None:
    path = _shard_path(folder, number)
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.save(file, values, allow_pickle=False)
    write_json(path.with_suffix(".json"), {"images": len(values), "sha256": _sha256(path)})
