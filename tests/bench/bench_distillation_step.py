"""Distillation of the default preset, with the fused ops and with plain torch.

A training begins with steps that only reconstruct; from `distill.adversary_after` on they have the
discriminator. Its view of the inner heads and its gradient penalty come round within
`distill.r1_every` steps, so that these are timed together. Batches are drawn beforehand.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from advkd import device, ops
from advkd.config import load_preset
from advkd.data import dataset
from advkd.data.trajectories import Trajectories, index_of, sample_trajectories
from advkd.parallel import Workers
from advkd.pretrained import load_teacher
from advkd.training.batches import Batch, Labeled
from advkd.training.distill import Distillation
from advkd.training.inputs import Ahead

from .measuring import Contender, Contest

BACKENDS = {"ours": None, "eager": "reference"}
LAYERS, TERMS = 30, 1000  # a gradient passes through, and of the sums in each

# Few and hardly drawn: what the images show does not change what a step costs.
CONFIG = load_preset("fashion-mnist", ["trajectory.num=64", "trajectory.steps=3"])
PARTS = ("a step that reconstructs", f"{CONFIG.distill.r1_every} steps with the discriminator")


def sampled_store(folder: Path) -> Trajectories:
    teacher = load_teacher(CONFIG.teacher.source).eval().requires_grad_(False)
    heads = len(CONFIG.student.stages)
    index = index_of(teacher, CONFIG.trajectory, heads, CONFIG.run.seed, CONFIG.data.size)
    drawn = sample_trajectories(teacher, folder, index, CONFIG.trajectory.num, threads=1)
    assert drawn is not None
    return drawn


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Trajectories:
    return sampled_store(tmp_path_factory.mktemp("trajectories"))


def prepared(part: str, store: Trajectories) -> tuple[Distillation, list[int]]:
    """A training, and the steps of one part of it, whose batches it has at hand."""
    training = Distillation(CONFIG, store, dataset("fashion-mnist").train())
    length = CONFIG.distill.r1_every
    first = -(-training.adversary_start // length) * length
    steps = [0] if part == PARTS[0] else list(range(first, first + length))
    batches = {step: training.batch(step) for step in steps}
    training.drawn, training.made = (lambda step: step), batches.__getitem__  # type: ignore
    training.inputs = Ahead(training.drawn, training.device)
    return training, steps


def doubled(value: Any) -> Any:
    """A batch, or a part of it, in float64."""
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, Batch):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return Batch(**{name: doubled(part) for name, part in fields.items()})
    if isinstance(value, Labeled):
        return Labeled(doubled(value.x), value.y)
    return [doubled(part) for part in value] if isinstance(value, list) else value


def gradients(training: Distillation, batch: Batch, backend: str | None) -> Tensor:
    """All gradients of a step with everything in it, in one vector."""
    length = CONFIG.distill.r1_every
    plan = training.plan(-(-training.adversary_start // length) * length)
    with ops.use_backend(backend):
        found, _ = training.gradients(batch, plan)
    return torch.cat([gradient.double().flatten() for gradient in found])


def check(store: Trajectories, backend: str | None) -> None:
    """Compares the gradients with those of the plain ops in float64, by their whole length."""
    images = dataset("fashion-mnist").train()
    single, exact = (Distillation(CONFIG, store, images) for _ in range(2))
    exact.student.double()
    exact.discriminator.double()
    batch = single.batch(single.adversary_start).share(slice(0, 8))
    truth = gradients(exact, doubled(batch), "reference")
    error = float((gradients(single, batch, backend) - truth).norm() / truth.norm())
    bound = 16 * torch.finfo(torch.float32).eps * (LAYERS * TERMS) ** 0.5
    assert error <= bound, f"the gradients are off by {error:.2g}, more than {bound:.2g}"


def contest_of(part: str, store: Trajectories, workers: Workers) -> Contest:
    def contender(backend: str | None) -> Contender:
        training, steps = prepared(part, store)

        def run(_: Any) -> None:
            with ops.use_backend(backend):
                for step in steps:
                    training.step(step, workers)

        return Contender(run, lambda: check(store, backend))

    return Contest({name: contender(backend) for name, backend in BACKENDS.items()})


@pytest.mark.parametrize("implementation", BACKENDS)
@pytest.mark.parametrize("part", PARTS)
def test_step(contest: Any, store: Trajectories, part: str, implementation: str) -> None:
    op = f"distillation, batch {CONFIG.distill.batch}"
    with Workers(torch.get_num_threads(), device.resolve(CONFIG.run.device)) as workers:
        contest(op, part, implementation, lambda: contest_of(part, store, workers))
