"""Runs by several processes, as torchrun launches them, and what they leave."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

STAGES = Path(__file__).with_name("stages.py")  # the part of a run whose bits are compared
SMALL = """
name = "small"

[run]
checkpoint_minutes = 0.0

[data]
size = 8

[unet]
sample_size = 8
block_out_channels = [8, 16]
down_block_types = ["DownBlock2D", "AttnDownBlock2D"]
up_block_types = ["AttnUpBlock2D", "UpBlock2D"]
layers_per_block = 1
norm_num_groups = 4
dropout = 0.1
num_class_embeds = 3

[teacher]
steps = 8
batch = 19
accumulate = 2
warmup = 2
log_every = 2
checkpoint_every = 2

[trajectory]
num = 70
steps = 4
shard = 10

[student]
stages = [4, 8]
widths = [16, 8]
attention = [4]
groups = 4

[discriminator]
widths = [4, 8]
groups = 4

[distill]
steps = 10
batch = 13
warmup = 2
r1_every = 3
r2_gamma = 0.5
adversary = "fresh"
adversary_after = 0.3
translate = 1
cutout = 2
lambda_div = 1.0
log_every = 1
checkpoint_every = 2

[evaluate]
num = 30
blocks = 2
teacher_steps = 4
"""


def prepared(folder: Path) -> list[str]:
    """The options of a small run on images in `folder`."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (90, 8, 8), dtype=np.uint8)
    np.savez(folder / "images.npz", images=images, labels=np.arange(90) % 3)
    (folder / "small.toml").write_text(SMALL)
    options = {"preset": "small.toml", "data": "images.npz", "runs": "runs", "device": "cpu"}
    paths = ("preset", "data", "runs")
    return [
        text
        for key, value in options.items()
        for text in (f"--{key}", str(folder / value) if key in paths else value)
    ]


def launched(
    count: int,
    command: Sequence[str],
    node: Sequence[str] = ("--standalone",),
    environment: Mapping[str, str] | None = None,
) -> subprocess.Popen[str]:
    """`python command` as `count` processes under torchrun, or for 0 as one without it."""
    torchrun = ["-m", "torch.distributed.run", *node, f"--nproc-per-node={count}"]
    own = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return subprocess.Popen(
        [sys.executable, *(torchrun if count else []), *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env=own | dict(environment or {}),
    )


def ended(process: subprocess.Popen[str], seconds: float = 100.0) -> tuple[int, list[str]]:
    """The exit status, and what advkd itself said; a process that hangs fails the test."""
    try:
        output, _ = process.communicate(timeout=seconds)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, re.findall(r"^advkd: (.*)", output, re.MULTILINE) or [output]


def left_by(run: Path) -> dict[str, str]:
    """SHA-256 of what a run's stages left, by name; of what was logged without the times."""
    files = sorted(
        path
        for path in run.rglob("*")
        if path.suffix in (".npy", ".safetensors") or path.name in ("index.json", "data.json")
    )
    found = {str(f.relative_to(run)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found["metrics.jsonl"] = json.dumps([entry | {"seconds": 0} for entry in lines])
    return found
