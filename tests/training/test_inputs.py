"""Inputs of steps: trees of tensors, and what is drawn one step ahead."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from advkd.training.batches import Labeled
from advkd.training.inputs import Ahead, leaves, mapped, on_device

META = torch.device("meta")


def test_a_tree_keeps_its_shape() -> None:
    x, y = torch.ones(2), torch.arange(3)
    tree = (Labeled(x, None), {4: y, 7: (x, 5)}, None)
    doubled = mapped(lambda tensor: tensor * 2, tree)
    assert isinstance(doubled[0], Labeled) and doubled[0].y is None and doubled[2] is None
    assert torch.equal(doubled[0].x, x * 2) and torch.equal(doubled[1][4], y * 2)
    assert doubled[1][7][1] == 5
    assert [tensor is given for tensor, given in zip(leaves(tree), (x, y, x), strict=True)] == [
        True
    ] * 3
    assert all(tensor.is_meta for tensor in leaves(on_device(tree, META)))
    assert leaves(on_device(tree, torch.device("cpu")))[0] is x


@pytest.fixture
def pinned(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of the threads in which memory was pinned, as if there were a GPU."""
    found: list[str] = []

    def pin(tensor: Tensor) -> Tensor:
        found.append(threading.current_thread().name)
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    yield found


def test_each_step_is_drawn_once_and_one_ahead_by_a_thread(pinned: list[str]) -> None:
    drawn: list[int] = []
    ready = {step: threading.Event() for step in range(20)}

    def draw(step: int) -> tuple[Tensor]:
        drawn.append(step)
        ready[step].set()
        return (torch.tensor(step),)

    with contextlib.closing(Ahead(draw, torch.device("cuda"))) as inputs:
        for step in range(4):
            assert int(inputs(step)[0]) == step
            assert ready[step + 1].wait(60)  # nobody has asked for it yet
            assert drawn == [*range(step + 2)]
        assert int(inputs(12)[0]) == 12  # from another step on, as after a checkpoint
        assert int(inputs(13)[0]) == 13
    assert len(pinned) == len(drawn) and threading.current_thread().name not in pinned


def test_what_fails_is_raised_at_its_step(pinned: list[str]) -> None:
    def draw(step: int) -> tuple[Tensor]:
        if step == 2:
            raise OSError("shard-00001.npy cannot be read")
        return (torch.tensor(step),)

    with contextlib.closing(Ahead(draw, torch.device("cuda"))) as inputs:
        assert [int(inputs(step)[0]) for step in range(2)] == [0, 1]
        with pytest.raises(OSError, match="shard-00001"):
            inputs(2)


def test_a_cpu_needs_no_thread(pinned: list[str]) -> None:
    threads: list[str] = []

    def draw(step: int) -> tuple[Tensor]:
        threads.append(threading.current_thread().name)
        return (torch.tensor(step),)

    with contextlib.closing(Ahead(draw, torch.device("cpu"))) as inputs:
        assert [int(inputs(step)[0]) for step in range(3)] == [0, 1, 2]
    assert threads == [threading.current_thread().name] * 3 and pinned == []
