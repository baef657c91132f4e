"""Mutated files through every reader: a sentence of our own that names a file, or a result.

`python tests/test_hostile_files.py PART PARTS OUT FOLDER` is what the tests start twice, side by
side: an address space that has 1 GiB left, and for every input its error, if any, and its seconds.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import gzip
import hashlib
import io
import json
import math
import random
import resource
import shutil
import struct
import subprocess
import sys
import time
import warnings
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from advkd.config import (
    ConfigError,
    StudentConfig,
    TrajectoryConfig,
    UNetConfig,
    load_preset,
    to_toml,
)
from advkd.data.images import DataError, load_images
from advkd.data.trajectories import Trajectories, index_of, sample_trajectories
from advkd.diffusion import Schedule, ddim_table, ddpm_table
from advkd.evaluation.features import FeatureNet, load_features, save_features
from advkd.evaluation.figures import FIGURES, Evaluation
from advkd.evaluation.stored import load_evaluation, save_evaluation
from advkd.files import (
    CheckpointError,
    load_strictly,
    read_json,
    seal,
    write_bytes,
    write_json,
)
from advkd.models.student import Student
from advkd.models.unet import UNet
from advkd.pretrained import WEIGHTS, load_student, load_teacher, save_student, save_teacher
from advkd.report.charts import LIGHT, chart, panels_of
from advkd.report.inputs import read_metrics, read_summary
from advkd.report.page import write_report
from advkd.report.pictures import Pictures
from advkd.report.tables import final_table
from advkd.training.checkpoint import (
    Checkpoint,
    latest_checkpoint,
    optimizer_tensors,
    restore_optimizer,
    save_checkpoint,
)
from advkd.training.loop import MetricsLog, TrainingError

SEED = 20240531
INPUTS = 320  # of each reader
PARTS = 2  # processes
LEFT = 1 << 30  # bytes of address space that a reader may take
SECONDS = 5.0
LONGEST = 2000  # characters of a message

OWN = (ConfigError, DataError, CheckpointError, TrainingError)
Rng = random.Random

UNET = UNetConfig(
    sample_size=8,
    block_out_channels=(8, 16),
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    layers_per_block=1,
    norm_num_groups=4,
)
STUDENT = StudentConfig("unet", (4, 8), (16, 8), attention=(4,), groups=4)
NAMES = ("bag", "coat", "shirt")


# Mutations.


def odd_value(rng: Rng) -> Any:
    """A value that a JSON or TOML file should not hold where a sensible one was."""
    nested: Any = 1
    for _ in range(rng.choice((2, 30, 60))):
        nested = [nested] if rng.random() < 0.5 else {"a": nested}
    values = [
        *(None, True, False, 0, -1, 1, 2, 3, 7, 2**31, 2**63, 2**64, 10**15, 10**30, 10**400),
        *(0.0, -0.5, 0.5, 1.5, 1e308, -1e308, 5e-324, math.nan, math.inf, -math.inf),
        *("", "1", "none", "zoo:x", "\ud800", "ü" * 3000, "../../x", "\x00"),
        *([], {}, [1, 2], [8, 8, 8], [[1]], ["a"], [None], [-1], [0] * 5000, {"a": {"b": 1}}),
        nested,
    ]
    return rng.choice(values)


def altered(value: Any, rng: Rng) -> Any:
    """A value near the one there: negative, larger, of another type, within a list."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return rng.choice((str(value), [value], odd_value(rng)))
    return rng.choice((-value, value + 1, value * 1000, value * 10**15, str(value), [value], 0))


def mutated_tree(tree: Any, rng: Rng) -> Any:
    """A JSON tree with one to three of its entries changed, removed or added."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        places = [tree]
        for node in places:
            children = node.values() if isinstance(node, dict) else node
            places += [child for child in children if isinstance(child, dict | list)]
        node = rng.choice([place for place in places if place] or [None])
        if node is None:
            return odd_value(rng)
        key = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
        action = rng.randrange(8)
        if action == 0:
            del node[key]
        elif action == 1 and isinstance(node, dict):
            node[rng.choice(("extra", "_private", key + "s", "\ud800"))] = odd_value(rng)
        elif action == 2 and isinstance(node, list):
            node.append(odd_value(rng))
        elif action == 3:
            other = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
            node[key], node[other] = node[other], node[key]
        else:
            node[key] = altered(node[key], rng) if rng.random() < 0.4 else odd_value(rng)
    return tree


def mutated_bytes(content: bytes, rng: Rng) -> bytes:
    """Bytes flipped, cut, inserted, repeated, or another file altogether."""
    data, n = bytearray(content), max(1, len(content))
    action = rng.randrange(8)
    if action <= 2:
        # Half of the flips hit the first bytes, where headers are.
        near = min(n, 128) if rng.random() < 0.5 else n
        for _ in range(rng.choice((1, 1, 2, 8))):
            at = rng.randrange(near)
            if at < len(data):
                data[at] = rng.randrange(256)
    elif action == 3:
        del data[rng.randrange(n) :]
    elif action == 4:
        data[rng.randrange(n) : 0] = rng.randbytes(rng.choice((1, 8, 200)))
    elif action == 5:
        first = rng.randrange(n)
        data[rng.randrange(n) : 0] = data[first : first + rng.randrange(1, 64)]
    elif action == 6:
        del data[(first := rng.randrange(n)) : first + rng.randrange(1, 64)]
    else:
        lfs = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
        others = (b"", b"[" * 5000, b"\xff\xfe", b"\xef\xbb\xbf" + content, b"PK\x03\x04", lfs)
        return rng.choice((*others, b"<!DOCTYPE html><html></html>", bytes(n)))
    return bytes(data)


def mutated_json(content: bytes, rng: Rng) -> bytes:
    return json.dumps(mutated_tree(json.loads(content), rng)).encode()


def mutated_lines(content: bytes, rng: Rng) -> bytes:
    """JSON lines with one of them changed."""
    lines = content.splitlines()
    at = rng.randrange(len(lines))
    lines[at] = mutated_json(lines[at], rng)
    return b"\n".join(lines) + b"\n"


def mutated_toml(content: bytes, rng: Rng) -> bytes:
    """TOML with the values of one to three keys replaced, or lines removed or repeated."""
    lines = content.decode().splitlines()
    for _ in range(rng.choice((1, 1, 2, 3))):
        at = rng.choice([i for i, line in enumerate(lines) if line])
        key, equals, _ = lines[at].partition(" = ")
        action = rng.randrange(6)
        if action == 0:
            del lines[at]
        elif action == 1:
            lines.append(lines[at])
        elif equals:
            odd = odd_value(rng)
            texts = (json.dumps(odd), repr(odd), "0x" + "f" * 5000, "1979-05-27", "[" * 2000, "nan")
            lines[at] = f"{key} = {rng.choice(texts)}"
        else:
            lines[at] = rng.choice(("[x.y]", "[[run]]", "[run.seed]", "["))
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def mutated_safetensors(content: bytes, rng: Rng) -> bytes:
    """A safetensors file whose header is changed, or whose tensors hold NaN."""
    length = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    if rng.random() < 0.15:
        return content[: 8 + length] + struct.pack("<f", math.nan) * (len(data) // 4)
    if rng.random() < 0.15:  # a tensor of another name, with all else in order
        name = rng.choice(list(header))
        header[f"module.{name}" if rng.random() < 0.5 else f"{name}x"] = header.pop(name)
    else:
        header = mutated_tree(header, rng)
    text = json.dumps(header).encode()
    length = len(text) if rng.random() < 0.9 else rng.choice((0, 2**40, 2**63, len(text) + 9))
    return length.to_bytes(8, "little") + text + data


def mutated_npy(content: bytes, rng: Rng) -> bytes:
    """An .npy file with another header."""
    start = content.index(b"{")
    end = content.index(b"\n", start)
    header = content[start:end].decode().strip()
    array = np.load(io.BytesIO(content), allow_pickle=False)
    shapes = ("(10**9,)", "(1000000000, 1000000)", "(-1,)", "()", "('a',)", "(2.5,)", "None",
              "(0, 5)", "(99999999999999999999999,)", "(" * 300)  # fmt: skip
    descrs = ("'O'", "'<f8'", "'|V5'", "'<U9'", "[('a', '<f4')]", "'<M8[s]'", "1", "'x'", "'<c8'")
    if rng.random() < 0.5:
        header = header.replace(repr(array.shape), rng.choice(shapes))
    else:
        header = header.replace(repr(array.dtype.str), rng.choice(descrs))
    text = (header + "\n").encode()
    version = rng.choice((b"\x01\x00", b"\x02\x00", b"\x09\x00"))
    size = struct.pack("<H" if version[0] == 1 else "<I", len(text))
    return content[:6] + version + size + text + content[end + 1 :]


def mutated_npz(content: bytes, rng: Rng) -> bytes:
    """An .npz archive with one of its arrays mutated, renamed or another file."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(out, "w") as new:
        chosen = rng.choice(old.namelist())
        for name in old.namelist():
            inner = old.read(name)
            if name == chosen:
                inner = rng.choice((mutated_npy, mutated_bytes))(inner, rng)
                name = rng.choice((name, name, name, "x", "../y.npy", "a/b.npy"))
            new.writestr(name, inner, rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)))
    return out.getvalue()


def mutated_png(content: bytes, rng: Rng) -> bytes:
    """A PNG with another header and the header's right checksum."""
    sides = [rng.choice((0, 1, 7, 8, 65_535, 2**31 - 1, 2**32 - 1)) for _ in range(2)]
    rest = bytes(rng.choice((0, 1, 2, 3, 4, 6, 8, 16, 255)) for _ in range(5))
    chunk = b"IHDR" + struct.pack(">II", *sides) + rng.choice((content[24:29], rest))
    return content[:12] + chunk + struct.pack(">I", zlib.crc32(chunk)) + content[33:]


def mutated_idx(content: bytes, rng: Rng) -> bytes:
    """An IDX file with other numbers in its header, packed as it was."""
    packed = content[:2] == b"\x1f\x8b"
    data = bytearray(gzip.decompress(content) if packed else content)
    at = 4 * rng.randrange(1 + data[3])
    data[at : at + 4] = struct.pack(">I", rng.choice((0, 1, 2**31, 2**32 - 1, 0x0803, 0x0D03, 9)))
    return gzip.compress(bytes(data)) if packed else bytes(data)


STRUCTURAL: dict[str, Callable[[bytes, Rng], bytes]] = {
    ".json": mutated_json,
    ".jsonl": mutated_lines,
    ".toml": mutated_toml,
    ".safetensors": mutated_safetensors,
    ".npy": mutated_npy,
    ".npz": mutated_npz,
    ".png": mutated_png,
    ".gz": mutated_idx,
    "": mutated_idx,
}


def mutate(path: Path, rng: Rng) -> None:
    content = path.read_bytes()
    structural = STRUCTURAL.get(path.suffix, mutated_bytes)
    path.write_bytes((structural if rng.random() < 0.7 else mutated_bytes)(content, rng))


# Readers.


@dataclass(frozen=True)
class Reader:
    """One kind of files: what writes them, which of them are mutated, and what reads them.

    `seal` makes the files' checksums right again, so that more than the checksum is tested; it is
    called for half of the inputs.
    """

    write: Callable[[Path], object]
    files: tuple[str, ...]
    read: Callable[[Path], object]
    seal: Callable[[Path], object] | None = None


def write_teacher(folder: Path) -> None:
    torch.manual_seed(0)
    unet = UNet(dataclasses.replace(UNET, num_class_embeds=3), Schedule(num_train_timesteps=50))
    unet.class_names = NAMES
    save_teacher(unet, folder)


def read_teacher(folder: Path) -> None:
    """The teacher, and the tables that its schedule gives."""
    schedule = load_teacher(folder).schedule
    steps = min(3, schedule.num_train_timesteps)
    for table in (ddim_table(schedule, steps, 1.0), ddpm_table(schedule, steps)):
        assert np.isfinite(table.coefficients.astype(np.float32)).all()


def write_student(folder: Path) -> None:
    torch.manual_seed(0)
    student = Student(STUDENT, 8, 1, num_classes=3)
    student.class_names = NAMES
    save_student(student, folder)


def write_features(folder: Path) -> None:
    torch.manual_seed(0)
    save_features(FeatureNet(1, 8, 3, decodes=True), folder)


def sealed_features(folder: Path) -> None:
    config = read_json(folder / "config.json")
    config["sha256"] = sha256(folder / "model.safetensors")
    write_json(folder / "config.json", config)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def small_training() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    network = nn.Linear(3, 2)
    optimizer = torch.optim.Adam(network.parameters())
    network(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return network, optimizer


def write_checkpoint(folder: Path) -> None:
    network, optimizer = small_training()
    tensors = {f"student.{name}": tensor for name, tensor in network.state_dict().items()}
    tensors |= optimizer_tensors(optimizer, "optimizer")
    values = {"seconds": 1.5, "logged": {"loss": 0.25}}
    save_checkpoint(folder, "stage", Checkpoint(3, tensors, values))


def read_checkpoint(folder: Path) -> None:
    """The checkpoint, into the network and the optimizer that it is of, and a step from there."""
    found = latest_checkpoint(folder, "stage")
    if found is None:
        return
    network, optimizer = small_training()
    closing, prefix = folder / "stage-00000003.json", "student."
    own = {n[len(prefix) :]: t for n, t in found.tensors.items() if n.startswith(prefix)}
    load_strictly(network, own, closing)
    restore_optimizer(optimizer, found.tensors, "optimizer", closing)
    optimizer.step()


def sealed_checkpoint(folder: Path) -> None:
    closing = folder / "stage-00000003.json"
    content = read_json(closing)
    content.pop("seal", None)
    if (folder / "stage-00000003.safetensors").stat().st_size:
        content["sha256"] = sha256(folder / "stage-00000003.safetensors")
    write_json(closing, {**content, "seal": seal(content)})


def write_trajectories(folder: Path) -> None:
    torch.manual_seed(0)
    unet = UNet(UNET, Schedule(num_train_timesteps=50)).eval()
    settings = TrajectoryConfig(num=4, shard=2, steps=2)
    sample_trajectories(unet, folder, index_of(unet, settings, 2, 0, 8, (4, 8)), 4, threads=1)


def read_trajectories(folder: Path) -> None:
    store = Trajectories(folder, 4)
    indices = torch.arange(4)
    for k in range(store.K):
        store.targets(indices, k)
    store.x_T(indices)
    store.labels(indices)


def sealed_shards(folder: Path) -> None:
    for shard in folder.glob("*.npy"):
        write_json(shard.with_suffix(".json"), {"images": 2, "sha256": sha256(shard)})


def write_metrics(folder: Path) -> None:
    log = MetricsLog(folder / "metrics.jsonl", "distill", 0)
    for step in range(1, 6):
        log.write(step, seconds=0.1 * step, loss=1 / step, d_real=0.5, d_fake=-0.5)


def read_log(folder: Path) -> None:
    MetricsLog(folder / "metrics.jsonl", "distill", 3)


def read_curves(folder: Path) -> None:
    panels = panels_of(read_metrics(folder / "metrics.jsonl"))
    if panels:
        chart(panels[:1], LIGHT)


def write_summary(folder: Path) -> None:
    sides = {"real": 0.5, "teacher": 12.25, "student": 30.0}
    spread = {side: {"mean": value, "std": 0.25} for side, value in sides.items()}
    summary = {key: sides for key in ("fd", "kid", "precision", "recall", "swd")}
    summary |= {key: spread for key in ("texture_fd", "texture_swd", "spectrum")}
    counts = {"teacher": 50, "student": 1}
    costs = {"passes": counts, "ms_per_image": counts, "parameters": counts, "speed_up": 50.0}
    shares = {side: [0.25, 0.75] for side in sides}
    words = {"name": "it", "protocol": "fair", "features": "few", "student_family": "unet"}
    more = {"classes": shares, "class_names": ["bag", "coat"], "seconds": {"teacher": 1.0}}
    more["spectra"] = {side: [1.5, -20.0, -40] for side in sides}
    write_json(folder / "summary.json", summary | costs | words | more | {"teacher_steps": 50})


def read_and_show_summary(folder: Path) -> None:
    summary, image = read_summary(folder / "summary.json"), torch.zeros(1, 1, 4, 4)
    final_table(summary, "ascii")
    write_report(folder, summary, [], Pictures(image, image, None), "")


PROTOCOL = {"num": 14, "blocks": 2, "teacher_steps": 2, "teacher": "t"}


def write_evaluation(folder: Path) -> None:
    block = {**dict.fromkeys(FIGURES, 0.5), "classes": [0.25, 0.75]}
    save_evaluation(folder, PROTOCOL, Evaluation([block, block], [1.5, -20.0]))


def read_evaluation(folder: Path) -> None:
    found = load_evaluation(folder, PROTOCOL)
    if found is not None:
        for key in FIGURES:
            found.figure(key)


def sealed_evaluation(folder: Path) -> None:
    content = read_json(folder / "evaluation.json")
    content.pop("seal", None)
    write_json(folder / "evaluation.json", {**content, "seal": seal(content)})


def write_preset(folder: Path) -> None:
    write_bytes(folder / "mine.toml", to_toml(load_preset("smoke")).encode())


def some_pixels(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def write_pngs(folder: Path) -> None:
    for i, pixels in enumerate(some_pixels(3, 9, 8, 3)):
        Image.fromarray(pixels).save(folder / f"{i}.png")


def write_npy(folder: Path) -> None:
    np.save(folder / "images.npy", some_pixels(4, 8, 8))


def write_npz(folder: Path) -> None:
    np.savez_compressed(folder / "images.npz", images=some_pixels(4, 8, 8), labels=np.arange(4))


def write_idx(folder: Path) -> None:
    images = struct.pack(">IIII", 0x0803, 4, 8, 8) + some_pixels(4, 8, 8).tobytes()
    labels = struct.pack(">II", 0x0801, 4) + bytes(range(4))
    (folder / "train-images-idx3-ubyte").write_bytes(images)
    (folder / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(labels))


READERS: dict[str, Reader] = {
    "unet settings": Reader(write_teacher, ("unet/config.json",), read_teacher),
    "scheduler": Reader(write_teacher, ("scheduler/scheduler_config.json",), read_teacher),
    "teacher": Reader(write_teacher, (f"unet/{WEIGHTS}", "model_index.json"), read_teacher),
    "student": Reader(write_student, ("config.json", "model.safetensors"), load_student),
    "checkpoint": Reader(
        write_checkpoint,
        ("stage-00000003.json", "stage-00000003.safetensors"),
        read_checkpoint,
        sealed_checkpoint,
    ),
    "trajectories": Reader(
        write_trajectories,
        ("index.json", "index.json", "shard-00000.json", "shard-00001.npy"),
        read_trajectories,
        sealed_shards,
    ),
    "log": Reader(write_metrics, ("metrics.jsonl",), read_log),
    "features": Reader(
        write_features, ("config.json", "model.safetensors"), load_features, sealed_features
    ),
    "curves": Reader(write_metrics, ("metrics.jsonl",), read_curves),
    "summary": Reader(write_summary, ("summary.json",), read_and_show_summary),
    "evaluation of the teacher": Reader(
        write_evaluation, ("evaluation.json",), read_evaluation, sealed_evaluation
    ),
    "preset": Reader(write_preset, ("mine.toml",), lambda f: load_preset(str(f / "mine.toml"))),
    "folder of images": Reader(write_pngs, ("0.png",), load_images),
    "npy": Reader(write_npy, ("images.npy",), lambda f: load_images(f / "images.npy")),
    "npz": Reader(write_npz, ("images.npz",), lambda f: load_images(f / "images.npz")),
    "idx": Reader(
        write_idx,
        ("train-images-idx3-ubyte", "train-labels-idx1-ubyte.gz"),
        lambda f: load_images(f / "train-images-idx3-ubyte"),
    ),
}


# One process's part.


def outcome(reader: Reader, folder: Path) -> str:
    """What is wrong with how the reader takes these files; empty where nothing is."""
    began = time.monotonic()
    fault = ""
    try:
        reader.read(folder)
    except (*OWN, ValueError, OSError) as error:
        message = str(error)
        if not isinstance(error, (*OWN, OSError)) and type(error) is not ValueError:
            fault = f"{type(error).__name__}: {message}"
        elif not any(path.name in message for path in folder.rglob("*")):
            fault = f"names no file: {message}"
        elif len(message) > LONGEST:
            fault = f"a message of {len(message)} characters"
    except Exception as error:
        fault = f"{type(error).__name__}: {error}"
    seconds = time.monotonic() - began
    return fault[:300] or (f"took {seconds:.1f} s" if seconds > SECONDS else "")


def faults_of(name: str, numbers: range, folder: Path) -> list[str]:
    """The faults that a reader shows on these of its inputs."""
    reader = READERS[name]
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    reader.write(folder)
    reader.read(folder)  # what is not mutated is taken
    if reader.seal is not None:
        reader.seal(folder)
        reader.read(folder)
    whole = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    faults = []
    for number in numbers:
        rng = Rng(f"{SEED} {name} {number}")
        changed = folder / rng.choice(reader.files)
        mutate(changed, rng)
        if reader.seal is not None and rng.random() < 0.5:
            with contextlib.suppress(CheckpointError):  # what is no JSON cannot be sealed
                reader.seal(folder)
        fault = outcome(reader, folder)
        if fault:
            faults.append(f"input {number}, {changed.name}: {fault}")
        for path, content in whole.items():
            path.write_bytes(content)
    return faults


def limit_memory() -> None:
    """Leave this process LEFT bytes of address space beyond what it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + LEFT
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def run_part(part: int, parts: int, out: Path, folder: Path) -> None:
    """Write the faults of every `parts`-th input of every reader to `out`, as JSON."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for name in READERS:
        faults_of(name, range(0), folder)  # imports and thread pools take their memory here
    limit_memory()
    found, seconds = {}, {}
    for name in READERS:
        began = time.monotonic()
        found[name] = faults_of(name, range(part, INPUTS, parts), folder)
        seconds[name] = time.monotonic() - began
    out.write_text(json.dumps({"faults": found, "seconds": seconds}))


# The tests.


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each process found."""
    folder = tmp_path_factory.mktemp("hostile")
    outs = [folder / f"{part}.json" for part in range(PARTS)]
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(part), str(PARTS), str(out), str(folder / str(part))],
            stderr=subprocess.PIPE,
            text=True,
        )
        for part, out in enumerate(outs)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=540)
        assert process.returncode == 0, errors[-3000:]
    return [json.loads(out.read_text()) for out in outs]


def test_there_are_enough_inputs() -> None:
    assert INPUTS * len(READERS) >= 5000


@pytest.mark.parametrize("name", READERS)
def test_mutated_files_end_in_a_sentence(name: str, parts: list[dict[str, Any]]) -> None:
    assert [fault for part in parts for fault in part["faults"][name]] == []


def test_a_reader_at_fault_is_found(tmp_path: Path) -> None:
    """Foreign exceptions, messages that name nothing, and slowness are distinguished."""

    def failing(error: Exception) -> Reader:
        def read(folder: Path) -> None:
            raise error

        return Reader(write_student, ("config.json",), read)

    write_student(tmp_path)
    assert outcome(failing(KeyError("x")), tmp_path).startswith("KeyError")
    assert outcome(failing(json.JSONDecodeError("x", "config.json", 0)), tmp_path)
    assert outcome(failing(ValueError("math domain error")), tmp_path).startswith("names no file")
    assert outcome(failing(CheckpointError("config.json " + "x" * LONGEST)), tmp_path)
    assert outcome(failing(CheckpointError("config.json is broken")), tmp_path) == ""


if __name__ == "__main__":
    run_part(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4]))
