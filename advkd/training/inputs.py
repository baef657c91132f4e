"""What a step takes from the host: drawn one step ahead, and copied without waiting for the device.

Inputs are trees: tensors on the host within tuples, named tuples and dicts, beside plain values.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

import torch
from torch import Tensor

Tree = TypeVar("Tree")


def mapped(function: Callable[[Tensor], Tensor], tree: Tree) -> Tree:
    """The tree with `function` of each of its tensors in the tensor's place."""
    found: object = tree
    if isinstance(tree, Tensor):
        found = function(tree)
    elif isinstance(tree, dict):
        found = {key: mapped(function, value) for key, value in tree.items()}
    elif isinstance(tree, tuple):
        values = [mapped(function, value) for value in tree]
        found = type(tree)(*values) if hasattr(tree, "_fields") else tuple(values)
    return found  # type: ignore[return-value]


def leaves(tree: object) -> list[Tensor]:
    """The tensors of a tree, in order."""
    found: list[Tensor] = []
    mapped(lambda x: found.append(x) or x, tree)  # type: ignore[func-returns-value]
    return found


def on_device(tree: Tree, device: torch.device) -> Tree:
    """The tree on a device. Nobody waits for a copy from pinned memory: the device's own work
    comes after it, and torch keeps the memory until then."""
    return mapped(lambda x: x.to(device, non_blocking=True), tree)


class Ahead(Generic[Tree]):
    """Draws what each step takes: for a CUDA device one step ahead, by a thread, in pinned memory.

    What a step takes depends on its number alone, so it is the same with and without the thread.
    """

    def __init__(self, draw: Callable[[int], Tree], device: torch.device):
        self._draw: Callable[[int], Tree] | None = draw
        self._device = device
        self._next: tuple[int, Future[Tree]] | None = None
        self._pool = ThreadPoolExecutor(1) if device.type == "cuda" else None

    def __call__(self, step: int) -> Tree:
        """What `step` takes, on the host; drawing it may have raised any exception."""
        assert self._draw is not None, "these inputs are closed"
        if self._pool is None:
            return self._draw(step)
        ready = self._next
        if ready is None or ready[0] != step:
            ready = step, self._pool.submit(self._pinned, self._draw, step)
        self._next = step + 1, self._pool.submit(self._pinned, self._draw, step + 1)
        return ready[1].result()

    def _pinned(self, draw: Callable[[int], Tree], step: int) -> Tree:
        with torch.cuda.device(self._device):  # memory is pinned for the current device
            return mapped(Tensor.pin_memory, draw(step))

    def close(self) -> None:
        """End the thread, and let go of what draws: a training, and with it a device's memory."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        self._draw = self._next = None
