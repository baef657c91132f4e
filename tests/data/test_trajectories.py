"""The store of trajectories: same bits however it was sampled, resuming, refusals, reading."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import advkd.data.trajectories
from advkd.config import ConfigError, TrajectoryConfig, UNetConfig, build
from advkd.data.trajectories import (
    INDEX,
    Trajectories,
    TrajectoryIndex,
    index_of,
    sample_trajectories,
)
from advkd.diffusion import Schedule, StepTable
from advkd.engine.cache import engine_for
from advkd.engine.noise import FIRST_FRESH, Noise, Purpose
from advkd.engine.sampling import table_of
from advkd.files import CheckpointError, write_json
from advkd.models.layers import area_resized
from advkd.models.unet import UNet

SETTINGS = TrajectoryConfig(num=10, steps=4, dtype="float32", shard=4)
SEED = 5
K = 2


def small_unet(seed: int = 0, num_classes: int | None = None) -> UNet:
    torch.manual_seed(seed)
    config = UNetConfig(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        num_class_embeds=num_classes,
    )
    return UNet(config, Schedule(num_train_timesteps=20)).eval().requires_grad_(False)


def sample(
    unet: UNet, table: StepTable, seed: int, indices: Tensor, saved: Sequence[int] = (), **how: Any
) -> list[Tensor]:
    """What the network's engine saves after the steps `saved` and the last one."""
    noise = Noise(seed, Purpose.TRAINING)
    engine = engine_for(unet, len(indices))
    steps = sorted({*saved, len(table)})
    return list(engine.sample(table, noise, indices, saved=steps, **how).unbind(1))


@pytest.fixture(scope="module")
def unet() -> UNet:
    return small_unet()


def index(unet: UNet, sizes: tuple[int, ...] = (), **changes: Any) -> TrajectoryIndex:
    return index_of(unet, dataclasses.replace(SETTINGS, **changes), K, SEED, 8, sizes)


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("shard-*"))}


@pytest.fixture(scope="module")
def store(unet: UNet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole store of 10 trajectories in shards of 4, sampled by one thread."""
    folder = tmp_path_factory.mktemp("store") / "trajectories"
    assert sample_trajectories(unet, folder, index(unet), 10, threads=1) is not None
    return folder


class StopAfter:
    """`stopped` that becomes true after so many network passes."""

    def __init__(self, passes: int):
        self.left = passes
        self.lock = threading.Lock()

    def __call__(self) -> bool:
        with self.lock:
            self.left -= 1
            return self.left < 0


# Sampling.


def test_files_of_a_store(store: Path) -> None:
    assert sorted(path.name for path in store.iterdir()) == [
        "index.json",
        *(f"shard-0000{i}.{kind}" for i in range(3) for kind in ("json", "npy")),
    ]
    shard = np.load(store / "shard-00002.npy", allow_pickle=False)
    assert shard.shape == (4, K, 1, 8, 8)  # sampled whole, also where num ends in its middle
    assert shard.dtype == np.float32


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_targets_are_stored_at_the_sizes_of_their_heads(
    store: Path, unet: UNet, tmp_path: Path, dtype: str
) -> None:
    """Averaged in float32, then rounded; what a head does not learn from is not stored."""
    wanted = index(unet, (2, 8), dtype=dtype)
    found = sample_trajectories(unet, tmp_path, wanted, 10, threads=1)
    assert found is not None and found.index == wanted
    shard = np.load(tmp_path / "shard-00000.npy", allow_pickle=False)
    assert shard.shape == (4, 2 * 2 + 8 * 8) and shard.dtype == dtype
    whole, chosen = Trajectories(store, 10), torch.tensor([9, 0, 5, 0])
    for k, side in enumerate((2, 8)):
        targets = found.targets(chosen, k)
        expected = area_resized(whole.targets(chosen, k), side).to(getattr(torch, dtype))
        assert targets.shape == (4, 1, side, side) and torch.equal(targets, expected)
    assert torch.equal(found.targets(chosen, -1), found.targets(chosen, 1))


def test_a_store_without_sizes_goes_on_as_it_is(store: Path, unet: UNet, tmp_path: Path) -> None:
    """Earlier versions left one; one with sizes is not taken for one with others."""
    sample_trajectories(unet, tmp_path, index(unet), 3, threads=1)
    content = json.loads((tmp_path / INDEX).read_text())
    del content["sizes"]  # which they did not know
    write_json(tmp_path / INDEX, content)
    found = sample_trajectories(unet, tmp_path, index(unet, (4, 8)), 10, threads=1)
    assert found is not None and found.index.sides == (8, 8)
    assert shards(tmp_path) == shards(store)
    other = tmp_path / "other"
    sample_trajectories(unet, other, index(unet, (4, 8)), 3)
    for sizes in ((2, 8), ()):
        with pytest.raises(ConfigError, match=r"other trajectories \(they differ in sizes\)"):
            sample_trajectories(unet, other, index(unet, sizes), 3)


def test_a_shard_stays_below_a_size(unet: UNet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(advkd.data.trajectories, "MAX_SHARD", 3 * K * 8 * 8 * 4 + 1)
    assert [index(unet, shard=n).shard for n in (1, 3, 4, 1000)] == [1, 3, 3, 3]
    monkeypatch.setattr(advkd.data.trajectories, "MAX_SHARD", 1)
    assert index(unet).shard == 1


@pytest.mark.parametrize("sizes", [[8], [4, 8, 8], [3, 8], [16, 8], [0, 8]])
def test_sizes_that_cannot_be_are_an_error(
    store: Path, unet: UNet, tmp_path: Path, sizes: list[int]
) -> None:
    content = json.loads((store / INDEX).read_text())
    write_json(tmp_path / INDEX, {**content, "sizes": sizes})
    with pytest.raises(CheckpointError, match=r"index\.json is no index of trajectories: .*sizes"):
        Trajectories(tmp_path, 10)


def test_two_threads_sample_the_same_bits(store: Path, unet: UNet, tmp_path: Path) -> None:
    sample_trajectories(unet, tmp_path, index(unet), 10, threads=2)
    assert shards(tmp_path) == shards(store)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("passes", [0, 2, 5, 11])
def test_resuming_gives_the_same_bits(
    store: Path, unet: UNet, tmp_path: Path, passes: int, threads: int
) -> None:
    stop = StopAfter(passes)
    assert sample_trajectories(unet, tmp_path, index(unet), 10, threads, stopped=stop) is None
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("shard-*.npy")}
    assert len(before) < 3
    if threads == 1:
        assert len(before) == passes // 4  # whatever was finished is kept
    assert sample_trajectories(unet, tmp_path, index(unet), 10, threads) is not None
    assert shards(tmp_path) == shards(store)
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())


def test_a_finished_store_is_not_sampled_again(store: Path, unet: UNet) -> None:
    def report(done: int, total: int) -> None:
        raise AssertionError("a network pass")

    again = sample_trajectories(unet, store, index(unet), 10, report=report)
    assert again is not None
    assert again.num == 10


def test_a_store_grows(store: Path, unet: UNet, tmp_path: Path) -> None:
    sample_trajectories(unet, tmp_path, index(unet), 3, threads=1)
    assert len(list(tmp_path.glob("*.npy"))) == 1
    sample_trajectories(unet, tmp_path, index(unet), 10, threads=1)
    assert shards(tmp_path) == shards(store)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def _alter(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-7] ^= 1
    path.write_bytes(bytes(content))


def _empty(path: Path) -> None:
    path.write_text("{}")


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("shard-00001.npy", _truncate),
        ("shard-00001.npy", _alter),
        ("shard-00001.npy", Path.unlink),
        ("shard-00001.json", _truncate),
        ("shard-00001.json", _empty),
        ("shard-00001.json", Path.unlink),
    ],
)
def test_a_damaged_shard_is_an_error_and_is_sampled_again(
    store: Path, unet: UNet, tmp_path: Path, name: str, damage: Callable[[Path], None]
) -> None:
    for file in store.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    damage(tmp_path / name)
    with pytest.raises(CheckpointError, match="shard-00001"):
        Trajectories(tmp_path, 10)
    seen: list[tuple[int, int]] = []
    sample_trajectories(
        unet, tmp_path, index(unet), 10, threads=1, report=lambda *done: seen.append(done)
    )
    assert seen == [(9, 12), (10, 12), (11, 12), (12, 12)]  # one shard of three
    assert shards(tmp_path) == shards(store)


def test_report_counts_images(unet: UNet, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    sample_trajectories(
        unet, tmp_path, index(unet), 10, threads=2, report=lambda *done: seen.append(done)
    )
    assert seen == [(n, 12) for n in range(1, 13)]


def test_an_error_while_sampling_is_raised(
    unet: UNet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(OSError, match="No space"):
        sample_trajectories(unet, tmp_path, index(unet), 10, threads=2)
    assert [path.name for path in tmp_path.iterdir()] == [INDEX]


# Another store.


@pytest.mark.parametrize(
    ("differs", "changes"),
    [
        ("steps, saved", {"steps": 5}),
        ("eta", {"eta": 0.5}),
        ("target", {"target": "state"}),
        ("dtype", {"dtype": "float16"}),
        ("shard", {"shard": 5}),
        ("sampler, steps, eta, saved", {"sampler": "ddpm"}),
    ],
)
def test_a_store_made_otherwise_is_refused(
    store: Path, unet: UNet, differs: str, changes: dict[str, Any]
) -> None:
    before = shards(store)
    with pytest.raises(ConfigError, match=rf"other trajectories \(they differ in {differs}\)"):
        sample_trajectories(unet, store, index(unet, **changes), 10)
    assert shards(store) == before


def test_a_store_of_another_teacher_seed_or_number_of_heads_is_refused(
    store: Path, unet: UNet
) -> None:
    other = small_unet(seed=1)
    with pytest.raises(ConfigError, match=r"differ in teacher\)"):
        sample_trajectories(other, store, index(other), 10)
    with pytest.raises(ConfigError, match=r"differ in seed\)"):
        sample_trajectories(unet, store, index_of(unet, SETTINGS, K, SEED + 1, 8), 10)
    with pytest.raises(ConfigError, match=r"differ in saved\)"):
        sample_trajectories(unet, store, index_of(unet, SETTINGS, K + 1, SEED, 8), 10)
    unet.schedule, before = Schedule(num_train_timesteps=40), unet.schedule
    try:
        with pytest.raises(ConfigError, match=r"differ in schedule\)"):
            sample_trajectories(unet, store, index(unet), 10)
    finally:
        unet.schedule = before


def test_shards_without_an_index_are_refused(store: Path, unet: UNet, tmp_path: Path) -> None:
    for file in store.glob("shard-*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ConfigError, match=r"shards, but no index\.json"):
        sample_trajectories(unet, tmp_path, index(unet), 10)


def test_an_index_that_is_none_is_an_error(unet: UNet, tmp_path: Path) -> None:
    write_json(tmp_path / INDEX, {"teacher": "abc"})
    with pytest.raises(CheckpointError, match=r"index\.json"):
        sample_trajectories(unet, tmp_path, index(unet), 10)
    with pytest.raises(CheckpointError, match=r"index\.json"):
        Trajectories(tmp_path, 10)


def test_index_survives_its_file(store: Path, unet: UNet) -> None:
    found = Trajectories(store, 10).index
    assert found == index(unet)
    assert found.saved == (2, 4)


@pytest.mark.parametrize(
    ("heads", "changes", "words"),
    [
        (2, {"sampler": "euler"}, "'euler'"),
        (2, {"eta": 1.5}, "eta=1.5"),
        (2, {"steps": 21}, "steps=21"),
        (5, {}, "5 submodules"),
    ],
)
def test_settings_that_cannot_be_are_refused(
    unet: UNet, heads: int, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        index_of(unet, dataclasses.replace(SETTINGS, **changes), heads, SEED, 8)


def test_a_size_that_is_not_the_teachers_is_refused(unet: UNet) -> None:
    with pytest.raises(ConfigError, match=r"8x8.*data\.size=16"):
        index_of(unet, SETTINGS, K, SEED, 16)


# What is saved.


@pytest.mark.parametrize("heads", range(1, 12))
@pytest.mark.parametrize("steps", [11, 12, 17, 20])
def test_saved_steps_ascend_evenly_to_the_last(unet: UNet, heads: int, steps: int) -> None:
    found = index_of(unet, TrajectoryConfig(steps=steps), heads, SEED, 8).saved
    assert found[-1] == steps
    assert len(found) == len(set(found)) == heads
    gaps = np.diff([0, *found])
    assert gaps.min() >= 1
    assert gaps.max() - gaps.min() <= 2


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("target", ["denoised", "state"])
@pytest.mark.parametrize(("sampler", "eta"), [("ddim", 0.0), ("ddim", 1.0), ("ddpm", 0.0)])
def test_targets_are_what_the_sampler_saves(
    unet: UNet, tmp_path: Path, sampler: str, eta: float, target: str, dtype: str
) -> None:
    wanted = index(unet, sampler=sampler, eta=eta, target=target, dtype=dtype, shard=3)
    store = sample_trajectories(unet, tmp_path, wanted, 5)
    assert store is not None
    assert store.K == K
    table = table_of(unet.schedule, sampler, SETTINGS.steps, eta)
    steps = [len(table) // 2, len(table)]
    chosen = torch.tensor([4, 0, 3, 0])
    targets = sample(unet, table, SEED, chosen, saved=steps, target=target)
    found = [store.targets(chosen, k) for k in range(K)]
    assert all(x.shape == (4, 1, 8, 8) and x.dtype == getattr(torch, dtype) for x in found)
    assert all(torch.equal(x[1], x[3]) for x in found)
    assert torch.equal(store.x_T(chosen), Noise(SEED, Purpose.TRAINING).x_T(chosen, (1, 8, 8)))
    # Sampled in another batch; and half precision keeps 11 bits.
    tolerance = 1e-4 if dtype == "float32" else 1e-3
    for ours, theirs in zip(found, targets, strict=True):
        torch.testing.assert_close(ours.float(), theirs, rtol=tolerance, atol=tolerance)


def test_targets_are_stored_as_they_are_sampled(store: Path, unet: UNet) -> None:
    """In the store's own batch the bits agree: nothing is clipped or rounded on the way."""
    table = table_of(unet.schedule, "ddim", SETTINGS.steps, 0.0)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    targets = sample(unet, table, SEED, torch.arange(4, 8), saved=[2, 4])
    torch.set_num_threads(before)
    for k, expected in enumerate(targets):
        assert torch.equal(Trajectories(store, 10).targets(torch.arange(4, 8), k), expected)


def test_class_conditional_trajectories(tmp_path: Path) -> None:
    unet = small_unet(num_classes=3)
    unet.class_embedding.weight.normal_(std=3.0)
    store = sample_trajectories(unet, tmp_path, index(unet), 6)
    assert store is not None
    chosen = torch.arange(6)
    labels = store.labels(chosen)
    assert labels is not None
    assert torch.equal(labels, Noise(SEED, Purpose.TRAINING).labels(chosen, 3))
    table = table_of(unet.schedule, "ddim", SETTINGS.steps, 0.0)
    targets = sample(unet, table, SEED, chosen, y=labels, saved=[2])
    torch.testing.assert_close(store.targets(chosen, -1), targets[-1], rtol=1e-4, atol=1e-4)


def test_unconditional_trajectories_have_no_labels(store: Path) -> None:
    assert Trajectories(store, 10).labels(torch.arange(3)) is None


def test_a_store_that_is_too_short_is_an_error(store: Path) -> None:
    with pytest.raises(CheckpointError, match="shard-00003"):
        Trajectories(store, 13)


@pytest.mark.parametrize("seed", [0, 1 << 63, (1 << 64) - 1])
def test_trajectories_take_every_64_bit_seed(unet: UNet, seed: int) -> None:
    assert index_of(unet, SETTINGS, K, seed, 8).noise == Noise(seed, Purpose.TRAINING)


def test_a_store_ends_before_the_numbers_of_fresh_noise() -> None:
    with pytest.raises(ConfigError, match=r"trajectory\.num="):
        build(TrajectoryConfig, {"num": FIRST_FRESH + 1}, "trajectory.")


def test_a_shard_is_hashed_once_by_a_process(
    store: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for file in store.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    hashed: list[Path] = []
    sha256 = advkd.data.trajectories._sha256
    monkeypatch.setattr(
        advkd.data.trajectories, "_sha256", lambda path: (hashed.append(path), sha256(path))[1]
    )
    for _ in range(3):
        Trajectories(tmp_path, 10)
    assert len(hashed) == 3  # shards
    _alter(tmp_path / "shard-00000.npy")
    with pytest.raises(CheckpointError, match="shard-00000"):
        Trajectories(tmp_path, 10)


def test_what_a_killed_process_left_is_removed(store: Path, unet: UNet, tmp_path: Path) -> None:
    for file in store.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    stale = tmp_path / f".shard-00007.npy.{process.pid}.tmp"
    stale.write_bytes(b"half")
    sample_trajectories(unet, tmp_path, index(unet), 10)
    assert not stale.exists()
