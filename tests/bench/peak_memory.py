"""Peak memory of sampling 64 images of 32 x 32 with google/ddpm-cifar10-32's architecture, by the
engine and by torch eager, and of a distillation step of the default preset, with the fused ops and
with plain torch; each in a process of its own.

OMP_NUM_THREADS=1 python -m tests.bench.peak_memory

The figure is by how much the peak of resident memory grows: from when the networks stand, and from
before they were made, where both sides hold torch's own weights too.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from advkd import device, ops
from advkd.config import override
from advkd.data import dataset
from advkd.diffusion import ddim_table
from advkd.engine.cache import engine_for
from advkd.engine.noise import Noise, Purpose
from advkd.parallel import Workers
from advkd.training.distill import Distillation

from .bench_distillation_step import CONFIG, sampled_store
from .bench_sampling_loop import teacher_of
from .report import markdown

IMAGES, STEPS = 64, 2  # of a sampler; each step takes the same memory
CONTENDERS = ("ours", "eager")


def resident(name: str) -> float:
    """MiB of VmRSS or VmHWM, the resident memory now or at its peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) / 1024
    raise OSError(f"the system does not tell {name}")


def sampling() -> Callable[[], object]:
    unet = teacher_of("cifar10-32")
    table, indices = ddim_table(unet.schedule, STEPS), torch.arange(IMAGES)

    def run() -> object:
        engine = engine_for(unet, IMAGES)
        return engine.sample(table, Noise(0, Purpose.TRAINING), indices, saved=[STEPS])

    return run


def distillation() -> Callable[[], object]:
    """A step of everything: reconstruction, adversary and gradient penalty."""
    with tempfile.TemporaryDirectory() as folder:
        config = override(CONFIG, ["run.device=cpu"])
        store = sampled_store(Path(folder))
        training = Distillation(config, store, dataset("fashion-mnist").train())
        every = config.distill.r1_every
        step = -(-training.adversary_start // every) * every
        drawn = training.drawn(step)
    training.drawn = lambda _: drawn  # type: ignore[method-assign]

    def run() -> object:
        with Workers(1, device.resolve("cpu")) as workers:
            return training.step(step, workers)

    return run


JOBS = {
    f"{IMAGES} images of cifar10-32": sampling,
    f"a distillation step, batch {CONFIG.distill.batch}": distillation,
}


def measure(job: str, contender: str) -> None:
    before = resident("VmRSS")
    run = JOBS[job]()
    made = resident("VmRSS")
    # Making the networks may have taken more for a moment: the peak is counted anew from here.
    Path("/proc/self/clear_refs").write_text("5")
    with ops.use_backend("reference" if contender == "eager" else None):
        run()
    peak = resident("VmHWM")
    print(f"{peak - made:.0f} {peak - before:.0f}")


def main() -> None:
    if len(sys.argv) > 1:
        return measure(*sys.argv[1:])
    rows = []
    for job in JOBS:
        found = {}
        for contender in CONTENDERS:
            command = [sys.executable, "-m", "tests.bench.peak_memory", job, contender]
            run = subprocess.run(command, check=True, capture_output=True, text=True)
            found[contender] = [int(word) for word in run.stdout.split()]
        for i, since in enumerate(("the networks stand", "before they were made")):
            ours, eager = (found[contender][i] for contender in CONTENDERS)
            rows.append([job, since, str(ours), str(eager), f"{ours / eager:.2f}"])
    print(markdown(["peak of", "MiB since", "ours", "eager", "ours of it"], rows))


if __name__ == "__main__":
    main()
