"""Steps captured and replayed, without a GPU: a recording of the operations stands for the graph.

As a CUDA graph does, it repeats operations at fixed addresses and runs nothing of Python in
between. So whatever a step reads but does not find at such an address shows in the weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from advkd.data.trajectories import Trajectories
from advkd.ops import _normed_conv3x3
from advkd.parallel import Workers
from advkd.training import graphs, settings
from advkd.training.distill import Distillation
from advkd.training.graphs import Steps
from advkd.training.loop import Training
from advkd.training.teacher import TeacherTraining

from .tiny import CPU, changed, photos, squares, teacher_config


class Recording(TorchDispatchMode):
    """The operations of a step, repeated by `replay` into the tensors that they made."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], Any, Any]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        with torch.no_grad():
            for func, args, kwargs, out in self.calls:
                again = func(*args, **kwargs)
                for ours, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                    if isinstance(ours, Tensor) and ours.data_ptr() != new.data_ptr():
                        ours.copy_(new)


def state_of(training: Training) -> list[Tensor]:
    """Every tensor that a step changes."""
    modules = [p.data for module in training.modules.values() for p in module.parameters()]
    states = [s for optimizer in training.optimizers.values() for s in optimizer.state.values()]
    return modules + [tensor for state in states for tensor in state.values()]


@pytest.fixture(autouse=True)
def like_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU is waited for like a GPU, and runs the ops that a GPU would run."""
    monkeypatch.setattr(settings, "is_host", lambda device: False)
    monkeypatch.setattr(_normed_conv3x3, "fit", lambda *_: False)


def capturing(training: Training, monkeypatch: pytest.MonkeyPatch) -> list[Recording]:
    """Let the training's steps be captured on the CPU; returns the recordings to come."""
    found: list[Recording] = []

    def captured(
        numbers: Callable[[], Tensor], device: torch.device, **options: Any
    ) -> tuple[Recording, Tensor]:
        before = [tensor.clone() for tensor in state_of(training)]
        with Recording() as recording:
            out = numbers()
        for tensor, value in zip(state_of(training), before, strict=True):
            tensor.copy_(value)  # a capture carries nothing out
        found.append(recording)
        return recording, out

    def carried_out(self: Steps, kind: Any, inputs: Any, work: Any) -> Any:
        self._capture = True
        return self._carried_out(kind, inputs, work)

    monkeypatch.setattr(graphs, "captured", captured)
    monkeypatch.setattr(Steps, "__call__", carried_out)
    return found


def make_teacher() -> Training:
    return TeacherTraining(teacher_config("unet.num_class_embeds=4"), squares(True))


def steps_of(training: Training, steps: int) -> list[dict[str, float]]:
    with Workers(1, CPU) as workers:
        values = [training.step(step, workers) for step in range(steps)]
    return [{name: float(value) for name, value in of.items()} for of in values]


def compare(make: Callable[[], Training], steps: int, kinds: int, monkeypatch: Any) -> None:
    eager = make()
    expected = steps_of(eager, steps)
    replayed = make()
    recordings = capturing(replayed, monkeypatch)
    assert steps_of(replayed, steps) == expected
    assert len(recordings) == kinds
    for ours, theirs in zip(state_of(replayed), state_of(eager), strict=True):
        assert torch.equal(ours, theirs)


def test_a_teachers_steps_are_repeated_to_the_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    compare(make_teacher, 8, 1, monkeypatch)


@pytest.mark.parametrize(
    ("changes", "kinds"),
    [
        ({"adversary": "fresh", "adversary_after": 0.25, "lambda_div": 1.0, "translate": 1}, 5),
        ({"schedule": "progressive", "r2_gamma": 0.5}, 8),
    ],
)
def test_a_distillations_steps_are_repeated_to_the_bit(
    store: Trajectories, changes: dict[str, Any], kinds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    compare(
        lambda: Distillation(changed(steps=24, **changes), store, photos(False)),
        24, kinds, monkeypatch,
    )  # fmt: skip


@pytest.mark.parametrize("captured", [False, True])
def test_what_is_not_finite_changes_nothing(
    captured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither in a step as it comes nor in one that is repeated, and the steps go on after it."""
    training = TeacherTraining(teacher_config(), squares())
    recordings = capturing(training, monkeypatch) if captured else []
    steps_of(training, 4)
    assert len(recordings) == captured
    before = [tensor.clone() for tensor in state_of(training)]
    inputs = training.inputs
    x_0, *others = training.drawn(4)
    training.inputs = lambda step: (x_0 * float("nan"), *others)  # type: ignore[assignment]
    with Workers(1, CPU) as workers:
        values = training.step(4, workers)
    assert not any(math.isfinite(values[name]) for name in ("loss", "grad_norm"))
    after = state_of(training)
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    training.inputs = inputs
    assert all(math.isfinite(value) for of in steps_of(training, 2) for value in of.values())
    moved = [not torch.equal(a, b) for a, b in zip(after, before, strict=True)]
    assert sum(moved) > 0.9 * len(moved)


def test_what_cannot_be_captured_is_carried_out_as_it_comes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    training = make_teacher()
    expected = steps_of(make_teacher(), 4)

    def refused(*args: Any, **options: Any) -> None:
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore")

    capturing(training, monkeypatch)
    monkeypatch.setattr(graphs, "captured", refused)
    monkeypatch.setattr(Steps, "__call__", Steps._carried_out)
    training.steps._capture = True
    with pytest.warns(UserWarning, match="^steps run without CUDA graphs: CUDA error: .*ing$"):
        assert steps_of(training, 4) == expected
