"""Whole training steps on device `meta`, where no tensor has a value to read.

What mixes devices, or reads a value back to the host inside a step, fails here as it would break
or stall on a GPU. The one transfer that ends a step, `on_host`, is replaced and counted.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Mapping, Sequence
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
from advkd.training import loop, teacher
from advkd.training.distill import Distillation
from advkd.training.loop import Training
from advkd.training.teacher import TeacherTraining

from .tiny import changed, photos, squares, teacher_config

META = torch.device("meta")
READS = {"_local_scalar_dense", "item", "is_nonzero", "nonzero", "equal", "masked_select", "unique"}


class NoReads(TorchDispatchMode):
    """Fails whatever would make the host wait for the device or take the two for one.

    It counts the operations on the device.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func.overloadpacket.__name__
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        out = func(*args, **(kwargs or {}))
        made = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        if any(x.is_meta for x in given):
            self.operations += 1
            if name in READS or any(not x.is_meta for x in made):
                raise AssertionError(f"{func} reads from the device")
            if any(not x.is_meta for x in given) and name != "copy_":
                raise AssertionError(f"{func} mixes devices")
        return out


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Makes `meta` a device to train on; returns the names of the values read in each step."""
    found: list[list[str]] = []

    def on_host(values: Mapping[str, Tensor]) -> dict[str, float]:
        assert all(value.is_meta and value.dim() == 0 for value in values.values())
        found.append(list(values))
        return dict.fromkeys(values, 0.5)

    fused = _foreach_utils._get_fused_kernels_supported_devices()
    optimizer = sys.modules["torch.optim.optimizer"]  # not to be had as an attribute
    supported = "_get_fused_kernels_supported_devices"
    monkeypatch.setattr(optimizer, supported, lambda: [*fused, "meta"])
    monkeypatch.setattr(loop, "on_host", on_host)
    monkeypatch.setattr(device, "resolve", lambda name: META)
    monkeypatch.setattr(teacher, "autocast", lambda mode, device: contextlib.nullcontext())
    return found


def carry_out(training: Training, steps: Sequence[int]) -> None:
    assert {p.device for net in training.modules.values() for p in net.parameters()} == {META}
    for step in steps:
        with Workers(0, META) as workers, NoReads() as mode:
            training.step(step, workers)
        assert mode.operations > 300


@pytest.mark.parametrize(
    ("overrides", "labels"),
    [
        ([], False),
        (["unet.num_class_embeds=4"], True),
        (["unet.dropout=0.1", "schedule.prediction_type=v_prediction"], False),
    ],
)
def test_a_teachers_step(reads: list[list[str]], overrides: list[str], labels: bool) -> None:
    carry_out(TeacherTraining(teacher_config(*overrides), squares(labels)), [0])
    assert reads == [["loss", "grad_norm"]]


@pytest.mark.parametrize(
    ("changes", "classes"),
    [
        ({"adversary": "fresh", "adversary_after": 0.25}, True),
        ({"adversarial_loss": "relativistic", "schedule": "progressive", "rho": "l2"}, False),
    ],
)
def test_a_distillations_step(
    request: pytest.FixtureRequest, reads: list[list[str]], changes: dict[str, Any], classes: bool
) -> None:
    """A step without D where it enters late, one with the last head alone, one with all and R1."""
    store: Trajectories = request.getfixturevalue("store_with_classes" if classes else "store")
    training = Distillation(changed(**changes), store, photos(classes))
    carry_out(training, [1, 5, 6])
    assert len(reads) == 3
    assert ("grad_d" in reads[0]) == ("adversary_after" not in changes)
    assert "grad_d" in reads[1] and "r1" not in reads[1] and "adv_1" not in reads[1]
    assert {"grad_d", "r1", "adv_1"} <= {*reads[2]}


def read(x: Tensor) -> Any:
    return x.sum().item()


@pytest.mark.parametrize(
    "work",
    [
        read,
        lambda x: bool(x.isfinite().all()),
        lambda x: x.cpu(),
        lambda x: x[x > 0],
        lambda x: x + torch.ones(3),
        lambda x: torch.cat([x, torch.ones(3)]),
    ],
)
def test_the_mode_finds_them(work: Callable[[Tensor], Any]) -> None:
    x = torch.ones(3, device=META)
    with NoReads(), pytest.raises((AssertionError, RuntimeError, NotImplementedError)):
        work(x)
