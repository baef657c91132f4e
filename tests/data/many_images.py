"""A set that does not fit into memory: `python -m tests.data.many_images [--num 200000]`.

Writes a zip of so many 32x32 images with labels, decodes it into a cache of its own, kills that
once and goes on, and prints seconds, images per second and the most anonymous memory (RssAnon,
sampled every 10 ms) of each step. Takes about two minutes for 200,000 images, and 4 KB of disk for
each.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

from advkd.data import cache

DIFFERENT = 500  # images; the others are their copies, since encoding takes longer than decoding
LEAST = 100_000  # images, of 3 KiB each
LIMIT = 1 << 30  # bytes of anonymous memory


def write_zip(path: Path, num: int) -> None:
    """Images of blocks of color, stored as EDM's dataset_tool does."""
    rng = np.random.default_rng(0)
    contents = []
    for _ in range(DIFFERENT):
        blocks = rng.integers(0, 256, (8, 8, 3), np.uint8).repeat(4, 0).repeat(4, 1)
        Image.fromarray(blocks).save(file := io.BytesIO(), "PNG")
        contents.append(file.getvalue())
    names = [f"{number // 1000:05d}/img{number:08d}.png" for number in range(num)]
    with zipfile.ZipFile(path, "w") as archive:
        for number, name in enumerate(names):
            archive.writestr(name, contents[number % DIFFERENT])
        labels = [[name, number % 10] for number, name in enumerate(names)]
        archive.writestr("dataset.json", json.dumps({"labels": labels}))


class Memory:
    """The most anonymous memory that this process has had, in bytes."""

    def __init__(self) -> None:
        self.peak = 0
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            with open("/proc/self/status") as status:
                lines = [line for line in status if line.startswith("RssAnon")]
            self.peak = max(self.peak, 1024 * int(lines[0].split()[1]))
            time.sleep(0.01)


def read(path: Path) -> None:
    """What trainings and evaluations do with a set, step by step."""
    from advkd.data import probe
    from advkd.data.split import hold_out, with_clusters
    from advkd.evaluation.protocol import images_hash

    memory, began = Memory(), time.monotonic()

    def say(what: str, images: int) -> None:
        nonlocal began
        seconds = time.monotonic() - began
        speed, peak = images / seconds, memory.peak / 2**20
        print(f"{what:<44} {seconds:8.1f} s {speed:10,.0f}/s {peak:7.0f} MiB", flush=True)
        began = time.monotonic()

    source = probe(path)
    say("names, labels and headers", len(source))
    images = source.load()
    say("pixels, decoded or checked", len(images))
    parts = hold_out(images)
    words = images_hash(parts.train)[:16]
    say(f"identity, {words}", len(images))
    for step in range(1000):
        rows = np.random.default_rng(step).integers(0, len(parts.train), 128)
        parts.train.batch(rows, rows % 2 == 0)
    say("1,000 batches of 128", 128_000)
    with_clusters(parts, 32)
    say("32 clusters", len(images))
    if memory.peak >= LIMIT:
        sys.exit(f"{memory.peak:,} bytes of anonymous memory")


def main() -> None:
    """Write the set, and read it in processes of their own."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--num", type=int, default=200_000)
    parser.add_argument("--read", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.read:
        read(args.read)
        return
    if args.num < LEAST:
        parser.error(f"--num {args.num}: fewer than {LEAST:,} images may fit into memory")
    with tempfile.TemporaryDirectory() as folder:
        path, decoded = Path(folder, "images.zip"), Path(folder, "cache")
        write_zip(path, args.num)
        command = [sys.executable, "-m", "tests.data.many_images", "--read", str(path)]
        environment = os.environ | {cache.CACHE_VARIABLE: str(decoded)}
        killed = subprocess.Popen(command, env=environment)
        while killed.poll() is None and not list(decoded.glob("images-*/shard-00001.json")):
            time.sleep(0.01)
        killed.kill()
        killed.wait()
        print(f"killed: {len(list(decoded.glob('images-*/*.json')))} shards stand", flush=True)
        for what in ("gone on with", "begun again"):
            print(f"{what}:", flush=True)
            subprocess.run(command, env=environment, check=True)


if __name__ == "__main__":
    main()
