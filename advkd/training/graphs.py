"""Steps of a training as CUDA graphs, one for each kind of step.

A step is hundreds of operations, most of them shorter than their launch by the host; a graph
launches all of them at once. What it reads lies at fixed addresses: weights, the optimizers' state,
the settings of a step (`settings`), and a copy of its inputs.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from advkd import processes
from advkd.engine.cuda import captured
from advkd.training.inputs import Tree, leaves, on_device

MAX_GRAPHS = 64  # kinds of steps that are captured; further ones are carried out as they come

Values = Mapping[str, Tensor]  # of a step, 0-d by name


@dataclass(frozen=True)
class Graph:
    """A captured step: the inputs that it reads, and the values that it writes."""

    graph: torch.cuda.CUDAGraph
    inputs: Any
    names: list[str]
    numbers: Tensor  # (len(names),)

    def replay(self, inputs: Tree) -> Values:
        """Carry out the step with other inputs."""
        for ours, given in zip(leaves(self.inputs), leaves(inputs), strict=True):
            ours.copy_(given, non_blocking=True)
        self.graph.replay()
        return dict(zip(self.names, self.numbers.clone().unbind(), strict=True))


class Steps:
    """Carries out steps: each kind as it comes the first time, and from the second on as a graph.

    The first time fills what a graph cannot: compiled kernels, the optimizers' memory. What cannot
    be captured is carried out as it comes, with one warning that says why. All work is on a stream
    of its own, since a capture takes all that is on its stream.
    """

    def __init__(
        self, device: torch.device, optimizers: Sequence[torch.optim.Optimizer], capture: bool
    ):
        self._device, self._optimizers = device, optimizers
        self._on_cuda = device.type == "cuda"
        self._capture = capture and self._on_cuda
        if self._capture and processes.count() > 1:
            warnings.warn(
                f"steps run without CUDA graphs: {processes.count()} processes meet within each",
                stacklevel=4,
            )
            self._capture = False
        self._known: set[Hashable] = set()
        self._graphs: dict[Hashable, Graph] = {}
        self._stream = torch.cuda.Stream(device) if self._on_cuda else None
        self._pool = torch.cuda.graph_pool_handle() if self._capture else None

    def __call__(
        self, kind: Hashable, inputs: Tree, work: Callable[[Tree], Mapping[str, Any]]
    ) -> Mapping[str, Any]:
        """The values of `work(inputs)`, which does the same for every step of a kind.

        inputs: on the host; `work` is given them on the device.
        """
        if not self._on_cuda:
            return work(on_device(inputs, self._device))
        current = torch.cuda.current_stream(self._device)
        assert self._stream is not None
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            values = self._carried_out(kind, inputs, work)
        current.wait_stream(self._stream)
        return values

    def _carried_out(self, kind: Hashable, inputs: Tree, work: Callable[[Tree], Values]) -> Values:
        graph = self._graphs.get(kind)
        if graph is None and self._capture and kind in self._known:
            graph = self._captured(kind, inputs, work)
        if graph is not None:
            return graph.replay(inputs)
        if len(self._known) < MAX_GRAPHS:
            self._known.add(kind)
        return work(on_device(inputs, self._device))

    def _captured(
        self, kind: Hashable, inputs: Tree, work: Callable[[Tree], Values]
    ) -> Graph | None:
        """The graph of a kind of step; None, with a warning, where it cannot be had."""
        fixed = on_device(inputs, self._device)
        names: list[str] = []

        def numbers() -> Tensor:
            values = work(fixed)
            names[:] = values
            return torch.stack(list(values.values()))

        try:
            graph, found = self._on_fixed_addresses(numbers)
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            warnings.warn(f"steps run without CUDA graphs: {reason}", stacklevel=5)
            self._capture = False
            return None
        finally:
            for optimizer in self._optimizers:
                optimizer.zero_grad(set_to_none=True)  # gradients in the graph's memory
        self._graphs[kind] = Graph(graph, fixed, names, found)
        return self._graphs[kind]

    def _on_fixed_addresses(
        self, numbers: Callable[[], Tensor]
    ) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """The capture, with optimizers that let themselves be captured. All graphs share memory,
        since no two of them run at once and what they leave is copied."""
        groups = [group for optimizer in self._optimizers for group in optimizer.param_groups]
        for group in groups:
            group["capturable"] = True
        try:
            return captured(numbers, self._device, stream=self._stream, warm_up=0, pool=self._pool)
        finally:
            for group in groups:
                group["capturable"] = False
