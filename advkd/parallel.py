"""Work shared out over threads so that it does not depend on how busy the machine is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor, nn

Item = TypeVar("Item")
Result = TypeVar("Result")


class Workers:
    """Threads that each take a share of a batch through forward and backward.

    On the CPU each runs torch with one thread of its own: a step then has one barrier instead of
    one for every operation, so a neighbor that takes a core costs its share and no more. The
    shares are fixed by their number, and summed in order: the same number gives the same bits.
    """

    def __init__(self, threads: int, device: torch.device, accumulate: int = 1):
        """`accumulate` cuts each worker's share into so many, taken one after another."""
        if threads < 0:
            raise ValueError(f"threads={threads} is negative")
        if accumulate < 1:
            raise ValueError(f"accumulate={accumulate} is below 1")
        self.count, self.accumulate = 1, accumulate
        self._threads_before = torch.get_num_threads()
        if device.type == "cpu":
            self.count = threads or self._threads_before
            torch.set_num_threads(1)
        self._pool = ThreadPoolExecutor(self.count)

    def shares(self, batch: int) -> list[slice]:
        """Slices of a batch: `accumulate` per worker, fewer if the batch is smaller than that."""
        size = -(-batch // (self.count * self.accumulate))
        return [slice(start, min(start + size, batch)) for start in range(0, batch, size)]

    def gradients(
        self,
        gradients_of: Callable[[slice], tuple[Sequence[Tensor], dict[str, Tensor]]],
        batch: int,
        parameters: Iterable[nn.Parameter],
    ) -> dict[str, Tensor]:
        """Set every parameter's `.grad` to that of the batch, each worker taking a share of it.

        `gradients_of(share)` returns the gradients of the share's mean loss, in the parameters'
        order, and named 0-d tensors to log, whose means over the batch are returned.
        """
        shares = self.shares(batch)
        # A dispatch mode and a stream are those of a thread, which one worker does without.
        alone = self.count == 1 or torch._C._len_torch_dispatch_stack() > 0
        results = map(gradients_of, shares) if alone else self._pool.map(gradients_of, shares)
        weights = [(share.stop - share.start) / batch for share in shares]
        total: list[Tensor] | None = None
        logs = []
        for weight in weights:
            gradients, logged = next(results)
            if total is None:
                total = list(torch._foreach_mul(list(gradients), weight))
            else:
                torch._foreach_add_(total, list(gradients), alpha=weight)
            del gradients  # of shares taken one after another, only the sum is kept
            logs.append(logged)
        assert total is not None
        for parameter, gradient in zip(parameters, total, strict=True):
            parameter.grad = _laid_as(parameter, gradient)
        return {key: _mean([logged[key] for logged in logs], weights) for key in logs[0]}

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """Apply `function` to the items, several at once; results come in the items' order."""
        return self._pool.map(function, items)

    def close(self) -> None:
        """End the threads, dropping work that has not begun, and give torch its own back."""
        self._pool.shutdown(cancel_futures=True)
        torch.set_num_threads(self._threads_before)

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *details: object) -> None:
        self.close()


def _mean(values: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    total = values[0] * weights[0]
    for value, weight in zip(values[1:], weights[1:], strict=True):
        total = total + value * weight
    return total


def _laid_as(parameter: Tensor, gradient: Tensor) -> Tensor:
    """The gradient in its parameter's memory layout: torch's fused Adam ignores strides.

    Gradients of channels_last weights are contiguous where autograd differentiates twice.
    """
    if gradient.stride() == parameter.stride():
        return gradient
    return torch.empty_like(parameter).copy_(gradient)
