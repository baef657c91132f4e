"""Peak memory of sampling 64 images of 32 x 32 with google/ddpm-cifar10-32's architecture, by the
engine and by torch eager, each in a process of its own.

OMP_NUM_THREADS=1 python -m tests.bench.peak_memory

Told is by how much the peak of resident memory grows: from when the teacher stands, and from before
it was made, where both sides hold torch's own weights too.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

from advkd import ops
from advkd.diffusion import ddim_table
from advkd.engine.cache import engine_for
from advkd.engine.noise import Noise, Purpose

from .bench_sampling_loop import teacher_of

IMAGES, STEPS = 64, 2  # of a sampler; each step takes the same memory


def resident(name: str) -> float:
    """MiB of VmRSS or VmHWM, the resident memory now or at its peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) / 1024
    raise OSError(f"the system does not tell {name}")


def measure(contender: str) -> None:
    before = resident("VmRSS")
    unet = teacher_of("cifar10-32")
    made = resident("VmRSS")
    # Making the teacher may have taken more for a moment: the peak is counted anew from here.
    Path("/proc/self/clear_refs").write_text("5")
    table, indices = ddim_table(unet.schedule, STEPS), torch.arange(IMAGES)
    with ops.use_backend("reference" if contender == "eager" else None):
        engine = engine_for(unet, IMAGES)
        engine.sample(table, Noise(0, Purpose.TRAINING), indices, saved=[STEPS])
    peak = resident("VmHWM")
    print(f"{peak - made:.0f} {peak - before:.0f}")


def main() -> None:
    if len(sys.argv) > 1:
        return measure(sys.argv[1])
    found = {}
    for contender in ("ours", "eager"):
        command = [sys.executable, "-m", "tests.bench.peak_memory", contender]
        run = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ)
        found[contender] = [int(word) for word in run.stdout.split()]
    for i, since in enumerate(("the teacher stands", "before it was made")):
        ours, eager = found["ours"][i], found["eager"][i]
        print(f"since {since}: ours {ours} MiB, eager {eager} MiB, {ours / eager:.2f} of it")


if __name__ == "__main__":
    main()
