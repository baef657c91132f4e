"""Work shared out over threads and processes so that it depends on neither's pace or, where the
shares are fixed, number."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor, nn

from advkd import processes

Item = TypeVar("Item")
Result = TypeVar("Result")


class Workers:
    """Threads that each take a share of a batch through forward and backward.

    On the CPU each runs torch with one thread of its own: a step then has one barrier instead of
    one for every operation, so a neighbor that takes a core costs its share and no more. The
    shares are fixed by their number, and summed in order: the same number gives the same bits.
    That number is the threads', unless it is given or processes share the work.
    """

    def __init__(
        self,
        threads: int,
        device: torch.device,
        accumulate: int = 1,
        shares: int = 0,
        fast: bool = False,
    ):
        """`accumulate` cuts each share into so many, taken one after another.

        A number of `shares` gives the same bits for any number of threads and processes, unless
        `fast` lets each process add up its part of a batch before they meet. Several processes
        need one or the other.
        """
        if threads < 0:
            raise ValueError(f"threads={threads} is negative")
        if accumulate < 1:
            raise ValueError(f"accumulate={accumulate} is below 1")
        self.count, self.accumulate = 1, accumulate
        self.fast = fast and processes.count() > 1
        self.fixed = 0 if self.fast else shares
        self.numbered = self.fast or self.fixed > 0  # each share is to have its own random numbers
        if processes.count() > 1 and not fast and shares < processes.count():
            raise ValueError(f"{shares} shares are too few for {processes.count()} processes")
        self._threads_before = torch.get_num_threads()
        if device.type == "cpu":
            self.count = threads or self._threads_before
            torch.set_num_threads(1)
        # In each of them too: else a thread's first convolution takes as many as OpenMP has.
        begin = partial(torch.set_num_threads, 1) if device.type == "cpu" else None
        self._pool = ThreadPoolExecutor(self.count, initializer=begin)

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
        order, and named 0-d tensors to log, whose means over the batch are returned. ProcessError
        where another process that takes shares has ended.
        """
        if self.numbered:
            return self._flat_gradients(gradients_of, batch, list(parameters))
        shares = self.shares(batch)
        results = self._each(gradients_of, shares)
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

    def _each(self, function: Callable[[Item], Result], shares: Iterable[Item]) -> Iterator[Result]:
        # A dispatch mode and a stream are those of a thread, which one worker does without.
        alone = self.count == 1 or torch._C._len_torch_dispatch_stack() > 0
        return map(function, shares) if alone else self._pool.map(function, shares)

    def _flat_gradients(
        self,
        gradients_of: Callable[[slice], tuple[Sequence[Tensor], dict[str, Tensor]]],
        batch: int,
        parameters: list[nn.Parameter],
    ) -> dict[str, Tensor]:
        """`gradients`, with shares that all processes cut alike: a row of numbers for each."""
        whole, dtype = slice(0, batch), parameters[0].dtype
        if self.fast:
            (ours,) = processes.share_of(evenly_cut(whole, processes.count()))
            shares = evenly_cut(ours, self.count)
        else:
            shares = evenly_cut(whole, self.fixed)
        names: list[str] = []

        def row_of(share: slice) -> Tensor:
            total: Tensor | None = None
            for part in evenly_cut(share, self.accumulate):
                gradients, logged = gradients_of(part)
                names[:] = logged  # the same of every share
                values = [*(x.reshape(-1) for x in (*gradients, *logged.values()))]
                row = torch.cat([x.to(dtype) for x in values]).mul_(_length(part) / batch)
                total = row if total is None else total.add_(row)
            assert total is not None
            return total

        if self.fast:
            found = processes.summed(_sum(self._each(row_of, shares)))
        elif processes.count() == 1:
            found = _sum(self._each(row_of, shares))
        else:
            rows = list(self._each(row_of, processes.share_of(shares)))
            found = processes.summed_in_order(rows, len(shares))
        *gradients, logs = found.split([*(p.numel() for p in parameters), len(names)])
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = _laid_as(parameter, gradient.view(parameter.shape))
        return dict(zip(names, logs.clone().unbind(), strict=True))

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


def _length(part: slice) -> int:
    return int(part.stop - part.start)


def evenly_cut(part: slice, count: int) -> list[slice]:
    """A slice as `count` slices in order, as long as each other give or take one; fewer, of one
    each, where it is shorter than that."""
    n = min(count, _length(part))
    ends = [part.start + _length(part) * i // n for i in range(n + 1)]
    return [slice(a, b) for a, b in pairwise(ends)]


def _sum(rows: Iterable[Tensor]) -> Tensor:
    """The sum of rows in their order, in the first one's place."""
    remaining = iter(rows)
    total = next(remaining)
    for row in remaining:
        total.add_(row)
    return total


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
