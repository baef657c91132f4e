"""Files are whole or absent, whatever happens while they are written; nothing is a pickle."""

from __future__ import annotations

import ast
import errno
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import advkd
from advkd import files as files_module
from advkd.files import (
    LISTED,
    MAX_HEADER,
    MAX_NESTING,
    MAX_TEXT,
    CheckpointError,
    load_strictly,
    read_header,
    read_json,
    read_tensors,
    read_text,
    remove_stale,
    replacing,
    seal,
    tensors_hash,
    write_bytes,
    write_json,
    write_tensors,
)
from advkd.training import checkpoint as checkpoint_module
from advkd.training.checkpoint import (
    KEPT,
    Checkpoint,
    CheckpointWriter,
    drop_checkpoints,
    latest_checkpoint,
    optimizer_tensors,
    restore_optimizer,
    save_checkpoint,
)

from ..killing import ended_at


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def checkpoint(step: int) -> Checkpoint:
    tensors = {"weight": torch.full((3, 2), float(step)), "count": torch.tensor(step)}
    return Checkpoint(step, tensors, {"seconds": 0.1 * step, "note": "ü"})


def latest_without_warning(folder: Path) -> Checkpoint | None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return latest_checkpoint(folder, "stage")


def test_write_replaces_and_makes_folders(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file"
    for content in (b"first", b"second", b""):
        write_bytes(path, content)
        assert path.read_bytes() == content
        assert files(path.parent) == ["file"]


KILLED_WRITER = """
    import os, signal, sys
    from pathlib import Path
    from advkd.files import replacing
    with replacing(Path(sys.argv[1]) / "shard-00000.npy") as temporary:
        temporary.write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_process_left_is_removed_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = textwrap.dedent(KILLED_WRITER)
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)])
    assert done.returncode == -signal.SIGKILL
    (left,) = files(tmp_path)
    assert re.fullmatch(r"\.shard-00000\.npy\.\d+\.tmp", left)
    others = [".lock", "shard-00001.npy", ".mine.tmp", ".x.7a.tmp", f".x.{os.getppid()}.tmp"]
    for name in others:
        (tmp_path / name).touch()
    (tmp_path / ".folder.999999999.tmp").mkdir()
    with replacing(tmp_path / "own") as own:
        own.touch()
        assert remove_stale(tmp_path) == [tmp_path / left]
        assert files(tmp_path) == sorted([*others, ".folder.999999999.tmp", own.name])
        # A process of the same number wrote before this one began.
        monkeypatch.setattr(files_module, "_STARTED", time.time() + 60)
        assert remove_stale(tmp_path) == [own]
        own.touch()
    assert remove_stale(tmp_path / "absent") == []


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_failing_writer_leaves_the_old_file_and_no_other(tmp_path: Path, error: type) -> None:
    path = tmp_path / "file"
    write_bytes(path, b"old")
    with pytest.raises(error), replacing(path) as temporary:
        temporary.write_bytes(b"half of the n")
        raise error
    assert path.read_bytes() == b"old"
    assert files(tmp_path) == ["file"]


def fill_disk_in_write(monkeypatch: pytest.MonkeyPatch) -> None:
    def write_half(path: Path, content: bytes) -> int:
        with path.open("wb") as file:
            file.write(content[: len(content) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(Path, "write_bytes", write_half)


def fill_disk_in_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)


@pytest.mark.parametrize("fill_disk", [fill_disk_in_write, fill_disk_in_fsync])
def test_full_disk_is_an_error_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fill_disk: Callable
) -> None:
    save_checkpoint(tmp_path, "stage", checkpoint(1))
    save_checkpoint(tmp_path, "stage", checkpoint(2))
    before = {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}
    with monkeypatch.context() as patch:
        fill_disk(patch)
        with pytest.raises(OSError) as caught:
            save_checkpoint(tmp_path, "stage", checkpoint(3))
    assert caught.value.errno == errno.ENOSPC
    assert {name: (tmp_path / name).read_bytes() for name in files(tmp_path)} == before
    found = latest_without_warning(tmp_path)
    assert found is not None and found.step == 2


def test_json_round_trip_and_errors(tmp_path: Path) -> None:
    content = {"b": [1, 2.5, None], "a": {"ü": "ß\n"}}
    write_json(tmp_path / "x.json", content)
    assert read_json(tmp_path / "x.json") == content
    assert list(read_json(tmp_path / "x.json")) == ["b", "a"]
    with pytest.raises(CheckpointError, match=r"absent\.json does not exist"):
        read_json(tmp_path / "absent.json")
    for broken in (b'{"a": 1', b"\xff\xfe{}", b"[1]", b"3"):
        (tmp_path / "x.json").write_bytes(broken)
        with pytest.raises(CheckpointError, match=r"x\.json cannot be read"):
            read_json(tmp_path / "x.json")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_json(tmp_path)


def test_a_byte_order_mark_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(b'\xef\xbb\xbf{"a": "\xc3\xbc"}')
    assert read_json(tmp_path / "x.json") == {"a": "ü"}
    assert read_text(tmp_path / "x.json")[0] == "{"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"[" * 100_000, "nested"),
        (b'{"a": ' * 33 + b"1" + b"}" * 33, "nested deeper than 32"),
        (b'{"a": [[' * 300 + b"1" + b"]]}" * 300, "nested"),
        (b'{"a": ' + b"1" * 5000 + b"}", "digits"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (b"<html></html>", "web page"),
        (b"\x80\x02}q\x00", "pickle"),
        (b'{"a": "\xe4"}', "UTF-8"),
    ],
)
def test_what_is_no_json_is_named(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"x\.json cannot be read: .*{words}"):
        read_json(tmp_path / "x.json")


def test_json_is_read_down_to_its_bound(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(b'{"a": ' * MAX_NESTING + b"1" + b"}" * MAX_NESTING)
    assert "a" in read_json(tmp_path / "x.json")


@pytest.mark.parametrize("size", [MAX_TEXT + 1, 1 << 40])
def test_a_text_of_any_size_is_refused_at_its_bound(tmp_path: Path, size: int) -> None:
    """The file is sparse, so a reader that takes all of it would need a terabyte."""
    with (tmp_path / "x.json").open("wb") as file:
        file.truncate(size)
    with pytest.raises(CheckpointError, match=rf"x\.json.*larger than {MAX_TEXT}"):
        read_json(tmp_path / "x.json")


def test_what_is_not_a_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x")
    for read in (read_json, read_tensors, read_text):
        with pytest.raises(CheckpointError, match="not a file"):
            read(tmp_path / "x")
        with pytest.raises(CheckpointError, match="not a file"):
            read(Path("/dev/zero"))


def test_tensors_round_trip_bit_for_bit(tmp_path: Path) -> None:
    base = torch.randn(4, 6, 5, 3, generator=torch.Generator().manual_seed(0))
    tensors = {
        "channels_last": base.contiguous(memory_format=torch.channels_last),
        "strided": base[:, ::2, 1:, :],
        "transposed": base.transpose(0, 3),
        "scalar": torch.tensor(float("nan")),
        "empty": torch.zeros(0, 3),
        "half": base.half(),
        "bfloat16": base.bfloat16(),
        "double": base.double(),
        "int64": torch.tensor([2**62, -1]),
        "uint8": torch.arange(9, dtype=torch.uint8),
        "bool": base > 0,
        "parameter": nn.Parameter(base[0]),
    }
    sha256 = write_tensors(tmp_path / "x.safetensors", tensors)
    again = read_tensors(tmp_path / "x.safetensors", sha256)
    assert set(again) == set(tensors)
    for name, tensor in tensors.items():
        assert again[name].dtype == tensor.dtype, name
        torch.testing.assert_close(again[name], tensor.detach(), rtol=0, atol=0, equal_nan=True)
    assert tensors_hash(again) == tensors_hash(tensors)


def test_tensors_hash_sees_every_difference() -> None:
    tensors = {"a": torch.zeros(2, 3), "b": torch.zeros(1)}
    others = [
        {"a": torch.zeros(3, 2), "b": torch.zeros(1)},
        {"a": torch.zeros(2, 3).double(), "b": torch.zeros(1)},
        {"a": -torch.zeros(2, 3), "b": torch.zeros(1)},
        {"a": torch.zeros(2, 3), "c": torch.zeros(1)},
        {"a": torch.zeros(2, 3)},
    ]
    hashes = {tensors_hash(tensors), *(tensors_hash(other) for other in others)}
    assert len(hashes) == 1 + len(others)
    assert tensors_hash(dict(reversed(tensors.items()))) == tensors_hash(tensors)


@pytest.mark.parametrize("damage", ["truncated", "altered", "emptied", "absent"])
def test_damaged_tensors_are_detected(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "x.safetensors"
    sha256 = write_tensors(path, {"a": torch.zeros(100)})
    break_file(path, damage)
    with pytest.raises(CheckpointError, match=r"x\.safetensors"):
        read_tensors(path, sha256)
    if damage != "altered":  # a flipped bit of a weight shows only in the checksum
        with pytest.raises(CheckpointError, match=r"x\.safetensors"):
            read_tensors(path)


def break_file(path: Path, damage: str) -> None:
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        path.write_bytes(content[: len(content) * 2 // 3])
    elif damage == "altered":
        # A digit of JSON, or a bit of a tensor.
        at = len(content) - 5 if path.suffix == ".safetensors" else re.search(rb"\d", content)
        at = at if isinstance(at, int) else at.start()
        content[at] ^= 1
        path.write_bytes(content)
    elif damage == "emptied":
        path.write_bytes(b"")
    else:
        path.unlink()


def with_header(header: object, data: bytes = bytes(8)) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype: object, shape: object, *offsets: object) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    "content",
    [
        with_header([1, 2]),
        with_header(b"{"),
        with_header(b"[" * 10_000),
        with_header(b"\xff\xfe\x00"),
        with_header({"a": [1]}),
        with_header({"a": {"dtype": "F32", "shape": [2]}}),
        with_header({"a": entry("F32", [2], 0, 8) | {"extra": 1}}),
        with_header({"a": entry("F8_E4M3", [8], 0, 8)}),
        with_header({"a": entry(["F32"], [2], 0, 8)}),
        with_header({"a": entry("F32", 2, 0, 8)}),
        with_header({"a": entry("F32", ["2"], 0, 8)}),
        with_header({"a": entry("F32", [2.0], 0, 8)}),
        with_header({"a": entry("F32", [-2], 0, -8)}),
        with_header({"a": entry("F32", [True, 2], 0, 8)}),
        with_header({"a": entry("F32", [2], 8, 0)}),
        with_header({"a": entry("F32", [2], 0, 8, 8)}),
        with_header({"a": entry("F32", [3], 0, 12)}),
        with_header({"a": entry("F32", [1], 0, 4)}),
        with_header({"a": entry("F32", [1], 0, 4), "b": entry("F32", [1], 0, 4)}),
        with_header({"a": entry("F32", [1], 0, 4), "b": entry("F32", [1], 2, 6)}),
        with_header({"a": entry("F32", [10**15], 0, 4 * 10**15)}),
        with_header({"a": entry("F32", [1] * 10**5, 0, 4)}, bytes(4)),
        (MAX_HEADER + 1).to_bytes(8, "little") + bytes(MAX_HEADER + 2),
    ],
)
def test_headers_that_are_not_of_their_file_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    for read in (read_header, read_tensors):
        with pytest.raises(CheckpointError, match=r"x\.safetensors is not a whole safetensors"):
            read(path)


def test_a_header_says_what_its_file_holds(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    tensors = {"a": torch.zeros(2, 3), "b": torch.zeros((), dtype=torch.int64), "c": torch.ones(0)}
    write_tensors(path, tensors)
    header = read_header(path)
    assert {n: (i.shape, i.dtype) for n, i in header.items()} == {
        n: (tuple(t.shape), t.dtype) for n, t in tensors.items()
    }


def test_checkpoint_round_trip(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path, "stage") is None
    assert latest_checkpoint(tmp_path / "absent", "stage") is None
    saved = checkpoint(7)
    save_checkpoint(tmp_path, "stage", saved)
    found = latest_without_warning(tmp_path)
    assert found is not None
    assert (found.step, found.values) == (7, saved.values)
    assert found.tensors.keys() == saved.tensors.keys()
    assert all(torch.equal(found.tensors[k], v) for k, v in saved.tensors.items())


def test_the_last_two_are_kept_and_other_names_left_alone(tmp_path: Path) -> None:
    assert KEPT == 2
    save_checkpoint(tmp_path, "other", checkpoint(1))
    for step in (5, 90, 100):
        save_checkpoint(tmp_path, "stage", checkpoint(step))
    assert files(tmp_path) == [
        "other-00000001.json",
        "other-00000001.safetensors",
        "stage-00000090.json",
        "stage-00000090.safetensors",
        "stage-00000100.json",
        "stage-00000100.safetensors",
    ]
    drop_checkpoints(tmp_path, "stage")
    assert files(tmp_path) == ["other-00000001.json", "other-00000001.safetensors"]
    drop_checkpoints(tmp_path, "other")
    assert not tmp_path.exists()


@pytest.mark.parametrize("suffix", ["json", "safetensors"])
@pytest.mark.parametrize("damage", ["truncated", "altered", "emptied", "absent"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, suffix: str, damage: str) -> None:
    for step in (1, 2):
        save_checkpoint(tmp_path, "stage", checkpoint(step))
    break_file(tmp_path / f"stage-00000002.{suffix}", damage)
    if (suffix, damage) == ("json", "absent"):  # never closed: nothing to warn of
        found = latest_without_warning(tmp_path)
    else:
        with pytest.warns(UserWarning, match=r"passed over.*stage-00000002"):
            found = latest_checkpoint(tmp_path, "stage")
    assert found is not None and found.step == 1
    assert torch.equal(found.tensors["weight"], torch.full((3, 2), 1.0))


def test_every_altered_character_of_the_closing_file_is_detected(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, "stage", checkpoint(3))
    closing = tmp_path / "stage-00000003.json"
    content = closing.read_bytes()
    meaning = json.loads(content)
    for at in range(0, len(content), 3):
        altered = bytearray(content)
        altered[at] ^= 1
        closing.write_bytes(altered)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = latest_checkpoint(tmp_path, "stage")
        if found is not None:
            assert json.loads(altered) == meaning  # white space


def test_two_damaged_checkpoints_leave_none(tmp_path: Path) -> None:
    for step in (1, 2):
        save_checkpoint(tmp_path, "stage", checkpoint(step))
        break_file(tmp_path / f"stage-0000000{step}.safetensors", "truncated")
    with pytest.warns(UserWarning, match="passed over"):
        assert latest_checkpoint(tmp_path, "stage") is None


def test_a_new_checkpoint_is_never_pushed_out_by_damaged_later_ones(tmp_path: Path) -> None:
    for step in (10, 20):
        save_checkpoint(tmp_path, "stage", checkpoint(step))
        break_file(tmp_path / f"stage-000000{step}.safetensors", "truncated")
    save_checkpoint(tmp_path, "stage", checkpoint(5))
    found = latest_without_warning(tmp_path)
    assert found is not None and found.step == 5
    assert files(tmp_path) == ["stage-00000005.json", "stage-00000005.safetensors"]


def test_what_a_crash_left_half_written_goes(tmp_path: Path) -> None:
    (tmp_path / ".stage-00000004.safetensors.123.tmp").write_bytes(b"half")
    (tmp_path / "stage-00000003.safetensors").write_bytes(b"never closed")
    save_checkpoint(tmp_path, "stage", checkpoint(5))
    assert files(tmp_path) == ["stage-00000005.json", "stage-00000005.safetensors"]


def test_a_snapshot_is_of_its_moment_and_one_is_written_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The training goes on, and changes its tensors, while a slow disk takes the snapshot."""
    weight = torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last)
    may_write, events = threading.Event(), []

    def slow(folder: Path, name: str, given: Checkpoint) -> None:
        assert may_write.wait(60)
        events.append(f"writes {given.step}")
        save_checkpoint(folder, name, given)
        events.append(f"wrote {given.step}")

    monkeypatch.setattr(checkpoint_module, "save_checkpoint", slow)
    states = []
    with CheckpointWriter(tmp_path, "stage") as writer:
        for step in (1, 2):
            states.append(weight.clone())
            writer.save(Checkpoint(step, {"weight": weight}, {}))
            events.append(f"goes on from {step}")
            weight.mul_(2)
            writer.check()
            may_write.set()
        assert events.index("goes on from 1") < events.index("writes 1")
        assert events.index("wrote 1") < events.index("goes on from 2")
    assert events.index("writes 2") < events.index("wrote 2")
    for step, state in enumerate(states, 1):
        tensors = read_tensors(tmp_path / f"stage-{step:08d}.safetensors")
        assert torch.equal(tensors["weight"], state)


def test_the_writers_error_is_raised_unless_another_ends_the_training(tmp_path: Path) -> None:
    broken = Checkpoint(1, {"weight": torch.ones(1)}, {"no JSON": object()})
    with pytest.raises(TypeError, match="JSON"), CheckpointWriter(tmp_path, "stage") as writer:
        writer.save(broken)
    with pytest.raises(TypeError, match="JSON"), CheckpointWriter(tmp_path, "stage") as writer:
        writer.save(broken)
        writer.save(broken)
    with pytest.raises(KeyError), CheckpointWriter(tmp_path, "stage") as writer:
        writer.save(broken)
        raise KeyError


SAVING = """
from pathlib import Path
import torch
from advkd.training.checkpoint import Checkpoint, save_checkpoint
third = Checkpoint(3, {"weight": torch.full((3, 2), 3.0), "count": torch.tensor(3)}, {"note": "x"})
"""
# Two files are written, synced and renamed, and two of the oldest checkpoint removed.
CHANGES = {"open": 6, "os.rename": 2, "os.remove": 4}  # at least


def test_sigkill_at_any_moment_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    moments = [(event, "*", n) for event in CHANGES for n in range(1, 16)]
    folders = [tmp_path / f"{event}{n}" for event, _, n in moments]
    for folder in folders:
        for step in (1, 2):
            save_checkpoint(folder, "stage", checkpoint(step))
    work = 'save_checkpoint(Path(arguments[index]), "stage", third)'
    codes, _ = ended_at(moments, SAVING, work, [str(folder) for folder in folders])
    steps: dict[str, list[int]] = {event: [] for event in CHANGES}
    for (event, _, n), folder, code in zip(moments, folders, codes, strict=True):
        assert code == -signal.SIGKILL or (code == 0 and n > CHANGES[event])
        found = latest_without_warning(folder)
        assert found is not None and (code != 0 or found.step == 3)
        assert torch.equal(found.tensors["weight"], torch.full((3, 2), float(found.step)))
        steps[event].append(found.step)
        save_checkpoint(folder, "stage", checkpoint(4))
        assert len(files(folder)) == 2 * KEPT
    assert codes.count(0) >= len(CHANGES)  # each list of moments reaches past the last
    for event, found_steps in steps.items():
        assert found_steps == sorted(found_steps), event
        assert (found_steps[0], found_steps[-1]) == (2, 3), event


def small_network() -> nn.Sequential:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Conv2d(4, 2, 3))
    return network.to(memory_format=torch.channels_last)


def step_with(network: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    x = torch.randn(2, 3, 7, 7, generator=torch.Generator().manual_seed(step))
    optimizer.zero_grad()
    network(x.contiguous(memory_format=torch.channels_last)).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adam])
def test_optimizer_round_trip_is_bitwise(tmp_path: Path, kind: type, fused: bool) -> None:
    """The channels_last weights matter: a fused step walks the moments in memory order."""
    straight = small_network()
    optimizer = kind(straight.parameters(), lr=1e-2, fused=fused)
    for step in range(3):
        step_with(straight, optimizer, step)
    state = {f"net.{k}": v for k, v in straight.state_dict().items()}
    write_tensors(tmp_path / "x.safetensors", state | optimizer_tensors(optimizer, "opt"))

    resumed = small_network()
    optimizer_again = kind(resumed.parameters(), lr=1e-2, fused=fused)
    tensors = read_tensors(tmp_path / "x.safetensors")
    own = {k.removeprefix("net."): v for k, v in tensors.items() if k.startswith("net.")}
    load_strictly(resumed, own, tmp_path)
    restore_optimizer(optimizer_again, tensors, "opt", tmp_path)
    for a, b in zip(straight.parameters(), resumed.parameters(), strict=True):
        for key, value in optimizer.state[a].items():
            found = optimizer_again.state[b][key]
            assert torch.equal(found, value) and found.stride() == value.stride(), key
    for step in range(3, 6):
        step_with(straight, optimizer, step)
        step_with(resumed, optimizer_again, step)
    for a, b in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_two_optimizers_in_one_file_do_not_mix() -> None:
    networks = [small_network(), small_network()]
    optimizers = [torch.optim.Adam(n.parameters(), lr=1e-2) for n in networks]
    tensors: dict[str, Tensor] = {}
    for i, (network, optimizer) in enumerate(zip(networks, optimizers, strict=True)):
        for step in range(i + 1):
            step_with(network, optimizer, step)
        tensors |= optimizer_tensors(optimizer, "d" if i else "dd")
    fresh = torch.optim.Adam(small_network().parameters(), lr=3e-4)
    restore_optimizer(fresh, tensors, "d", Path("checkpoints"))
    first = fresh.param_groups[0]["params"][0]
    assert fresh.state[first]["step"] == 2
    assert fresh.param_groups[0]["lr"] == 3e-4


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.pop("d.0.step"),
        lambda t: t.pop("d.1.exp_avg_sq"),
        lambda t: t.update({"d.9.step": torch.tensor(1.0)}),
        lambda t: t.update({"d.x.step": torch.tensor(1.0)}),
        lambda t: t.update({"d.0.momentum": torch.tensor(1.0)}),
        lambda t: t.update({"d.0.exp_avg": torch.zeros(7)}),
        lambda t: t.update({"d.0.step": torch.zeros(4, 3, 3, 3)}),
        lambda t: t.update({"d.0.step": torch.tensor(1)}),
    ],
)
def test_what_is_not_the_state_of_an_optimizer_is_refused(change: Callable) -> None:
    network = small_network()
    optimizer = torch.optim.Adam(network.parameters())
    step_with(network, optimizer, 0)
    tensors = optimizer_tensors(optimizer, "d")
    change(tensors)
    with pytest.raises(CheckpointError, match=r"checkpoints cannot be used: d\.\w+"):
        restore_optimizer(optimizer, tensors, "d", Path("checkpoints"))


@pytest.mark.parametrize(
    "changes",
    [{"step": "1"}, {"step": 2}, {"step": -1}, {"step": None}, {"values": [1]}, {"sha256": 7}],
    ids=str,
)
def test_a_sealed_file_that_describes_no_checkpoint_is_passed_over(
    tmp_path: Path, changes: dict
) -> None:
    save_checkpoint(tmp_path, "stage", checkpoint(1))
    closing = tmp_path / "stage-00000001.json"
    content = {**json.loads(closing.read_text()), **changes}
    del content["seal"]
    write_json(closing, {**content, "seal": seal(content)})
    with pytest.warns(UserWarning, match=r"passed over.*stage-00000001\.json"):
        assert latest_checkpoint(tmp_path, "stage") is None


def test_load_strictly_names_the_first_few_problems_and_counts_the_rest() -> None:
    network = small_network()
    other = {f"x{i}": torch.zeros(1) for i in range(30)}
    with pytest.raises(CheckpointError) as caught:
        load_strictly(network, other, Path("some/where"))
    count = len(network.state_dict()) + len(other)
    assert str(caught.value).endswith(f"; and {count - LISTED} more")


def test_load_strictly_lists_every_problem() -> None:
    network = small_network()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    tensors = dict(before)
    del tensors["1.bias"], tensors["2.bias"]
    tensors["2.weight"] = torch.zeros(1, 4, 3, 3)
    tensors["3.weight"] = torch.zeros(1)
    tensors["0.bias"] = torch.ones(4)
    with pytest.raises(CheckpointError) as caught:
        load_strictly(network, tensors, Path("some/where"))
    for part in ("some/where", "missing 1.bias", "missing 2.bias", "superfluous 3.weight"):
        assert part in str(caught.value)
    assert "2.weight is (1, 4, 3, 3) instead of (2, 4, 3, 3)" in str(caught.value)
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())


PICKLERS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def pickling(source: str) -> list[str]:
    """What in a file's code would read or write a pickle."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names if a.name.split(".")[0] in PICKLERS]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found += [n for n in names if n.split(".")[0] in PICKLERS or TORCH.fullmatch(n)]
        elif isinstance(node, ast.Attribute) and TORCH.fullmatch(ast.unparse(node)):
            found.append(ast.unparse(node))
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("np.load", "numpy.load"):
            given = {keyword.arg: keyword.value for keyword in node.keywords}
            if "allow_pickle" not in given or ast.unparse(given["allow_pickle"]) != "False":
                found.append(ast.unparse(node))
    return found


TORCH = re.compile(r"torch\.(jit\.)?(save|load)")


def test_no_pickle_anywhere_in_the_package() -> None:
    sources = list(Path(advkd.__file__).parent.rglob("*.py"))
    assert len(sources) > 10
    found = {path.name: pickling(path.read_text()) for path in sources}
    # Of `advkd convert` alone, in a process of its own: tests/test_convert.py.
    assert {name: calls for name, calls in found.items() if calls} == {"pickles.py": ["torch.load"]}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "torch.save(x, path)",
        "from torch import load",
        "def f():\n    return torch.load(path, weights_only=True)",
        "np.load(path)",
        "np.load(path, mmap_mode='r', allow_pickle=True)",
    ],
)
def test_the_search_for_pickles_finds_them(source: str) -> None:
    assert pickling(source)
    assert not pickling("safetensors.torch.save(x)\nnp.load(path, allow_pickle=False)")
