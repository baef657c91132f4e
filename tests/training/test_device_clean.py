"""Whole training steps on device `meta`, where no tensor has a value to read.

What mixes devices, reads a value back to the host or waits for a copy inside a step, fails here as
it would break or stall on a GPU. Two steps of a kind must do the same operations on the same
shapes, as a CUDA graph would repeat them.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _foreach_utils
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from advkd import device
from advkd.data.trajectories import Trajectories
from advkd.parallel import Workers
from advkd.training import distill, loop, teacher
from advkd.training.checkpoint import CheckpointWriter
from advkd.training.distill import Distillation
from advkd.training.loop import Training, run_training
from advkd.training.teacher import TeacherTraining

from .tiny import changed, photos, squares, teacher_config

META = torch.device("meta")
COPIES = {"copy_", "_to_copy"}
READS = {"_local_scalar_dense", "item", "is_nonzero", "nonzero", "equal", "masked_select", "unique"}


class NoReads(TorchDispatchMode):
    """Fails whatever would make the host wait for the device or take the two for one.

    `operations` are those on the device: by name, with the shapes of what they are given.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func.overloadpacket.__name__
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        out = func(*args, **(kwargs or {}))
        made = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        on_device = [x.is_meta for x in given]
        if any(x.is_meta for x in [*given, *made]):
            shapes = ", ".join(f"{x.dtype} {tuple(x.shape)}" for x in given)
            self.operations.append(f"{func} {shapes}")
            if name in READS or any(not x.is_meta for x in made):
                raise AssertionError(f"{func} reads from the device")
            if not all(on_device):
                if name not in COPIES or (any(on_device) and name != "copy_"):
                    raise AssertionError(f"{func} mixes devices")
                if not ((kwargs or {}).get("non_blocking") or args[2:] == (True,)):
                    raise AssertionError(f"{func} waits for a copy")
        return out


@pytest.fixture(autouse=True)
def trains_on_meta(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes `meta` a device to train on."""
    fused = _foreach_utils._get_fused_kernels_supported_devices()
    optimizer = sys.modules["torch.optim.optimizer"]  # not to be had as an attribute
    supported = "_get_fused_kernels_supported_devices"
    monkeypatch.setattr(optimizer, supported, lambda: [*fused, "meta"])
    for adam in ("_fused_adam_", "_fused_adamw_"):  # lacks a rate that is a tensor of `meta`
        monkeypatch.setattr(torch, adam, lambda *args, **kwargs: None)
    monkeypatch.setattr(device, "resolve", lambda name: META)
    for module in (teacher, distill):  # torch has none for `meta`
        monkeypatch.setattr(module, "autocast", lambda mode, device: contextlib.nullcontext())


def operations_of(training: Training, step: int) -> list[str]:
    """What a step does on the device, its values left there."""
    assert {p.device for net in training.modules.values() for p in net.parameters()} == {META}
    with Workers(0, META) as workers, NoReads() as mode:
        values = training.step(step, workers)
    on_device = [value for value in values.values() if isinstance(value, Tensor)]
    assert {n for n, value in values.items() if not isinstance(value, Tensor)} <= {"lr", "lr_d"}
    assert all(value.is_meta and value.dim() == 0 for value in on_device)
    return mode.operations


@pytest.mark.parametrize(
    ("overrides", "labels"),
    [
        ([], False),
        (["unet.num_class_embeds=4"], True),
        (["unet.dropout=0.1", "schedule.prediction_type=v_prediction"], False),
        (
            [
                *("unet.resnet_time_scale_shift=scale_shift", "unet.downsample_type=resnet"),
                *("unet.num_class_embeds=4", "unet.class_embed_type=timestep"),
            ],
            True,
        ),
    ],
)
def test_a_teachers_step(overrides: list[str], labels: bool) -> None:
    training = TeacherTraining(teacher_config(*overrides), squares(labels))
    operations_of(training, 0)  # in which the optimizer takes its memory
    first, second = (operations_of(training, step) for step in (1, 2))
    assert len(first) > 300 and first == second


@pytest.mark.parametrize(
    ("changes", "classes"),
    [
        ({"adversary": "fresh", "adversary_after": 0.25}, True),
        ({"adversarial_loss": "relativistic", "schedule": "progressive", "rho": "l2"}, False),
        ({"adversary": "fresh", "lambda_div": 1.0, "translate": 1, "cutout": 3}, False),
    ],
)
def test_a_distillations_step(
    request: pytest.FixtureRequest, changes: dict[str, Any], classes: bool
) -> None:
    """Each kind of step: without D where it enters late, with the last head, with all, with R1."""
    store: Trajectories = request.getfixturevalue("store_with_classes" if classes else "store")
    training = Distillation(changed(steps=72, **changes), store, photos(classes))
    operations_of(training, 71)  # in which the optimizers take their memory
    kinds: dict[str, list[list[str]]] = {}
    for step in range(72):
        known = kinds.setdefault(str(training.plan(step)), [])
        if len(known) < 2:
            known.append(operations_of(training, step))
    assert len(kinds) >= 4
    for plan, (first, second) in kinds.items():
        assert len(first) > 300 and first == second, plan


def test_a_training_reads_all_its_values_when_it_logs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One transfer for `log_every` steps, and one before each checkpoint."""
    read: list[int] = []

    def on_host(values: Sequence[Tensor]) -> list[float]:
        read.append(len(values))
        return [0.5] * len(values)

    monkeypatch.setattr(loop, "on_host", on_host)
    monkeypatch.setattr(CheckpointWriter, "save", lambda writer, checkpoint: None)
    training = TeacherTraining(teacher_config(), squares())
    every = ["teacher.steps=7", "teacher.log_every=3", "teacher.checkpoint_every=5"]
    config = teacher_config(*every)
    run_training(training, tmp_path, config.teacher, config.run)
    assert read == [2 * steps for steps in (3, 2, 1, 1)]


def read(x: Tensor) -> Any:
    return x.sum().item()


@pytest.mark.parametrize(
    "work",
    [
        read,
        lambda x: bool(x.isfinite().all()),
        lambda x: x.cpu(),
        lambda x: torch.ones(3).to(META),
        lambda x: x.copy_(torch.ones(3)),
        lambda x: x[x > 0],
        lambda x: x + torch.ones(3),
        lambda x: torch.cat([x, torch.ones(3)]),
    ],
)
def test_the_mode_finds_them(work: Callable[[Tensor], Any]) -> None:
    x = torch.ones(3, device=META)
    with NoReads(), pytest.raises((AssertionError, RuntimeError, NotImplementedError)):
        work(x)
