"""Plans: a network pass as operations on buffers of one arena, and the weights that they read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from advkd.ops import address, extension

# A tensor of the network, which can be read in its place, or how one is made of the network's.
Source = Tensor | Callable[[], Tensor]

ALGORITHMS = ("direct", "winograd2", "winograd4")
INPUT, OUTPUT = 0, 1  # the first two buffers, which lie in the caller's memory
_ALIGNMENT = 16  # floats of a cache line


@dataclass
class Buffer:
    """Activations (height, width, channels) of one image, at `offset` floats of the arena."""

    height: int
    width: int
    channels: int
    offset: int = 0

    @property
    def floats(self) -> int:
        return self.height * self.width * self.channels


class Part(NamedTuple):
    """Channels [channel, channel + channels) of a buffer."""

    buffer: int
    channel: int
    channels: int
    height: int
    width: int

    @property
    def pixels(self) -> int:
        return self.height * self.width

    def cut(self, channel: int, channels: int) -> Part:
        """The channels [channel, channel + channels) of this part."""
        return self._replace(channel=self.channel + channel, channels=channels)


@dataclass(frozen=True)
class Op:
    """One operation. The executor reads `kind`, `numbers` and `factor`; the rest is for reports and
    for laying out the buffers."""

    kind: str
    module: str  # whose operation it is
    numbers: dict[str, int]
    reads: tuple[Part, ...]
    writes: tuple[Part, ...]
    factor: float = 1.0
    flops: int = 0  # of one image; a convolution counts as a direct one
    weights: int = 0  # floats


@dataclass(frozen=True)
class Plan:
    """One network pass as a flat list of operations, and the weights they read; as in
    csrc/runtime/plan.h."""

    buffers: list[Buffer]
    ops: list[Op]
    arena: int  # floats of an image
    conditioning: int  # floats that depend on the time, the same for all images of a pass
    classes: int  # 0: takes no labels
    batch: int  # images of a pass at most
    threads: int  # for which the algorithms of convolutions are chosen
    weights: Tensor  # float32, on the CPU

    def compiled(self) -> Any:
        """The executor of this plan, which reads `weights` in place: keep the plan beside it.

        Raises ValueError for a plan that would read or write what it must not.
        """
        assert extension is not None
        return extension.Plan(
            buffers=[(b.offset, b.height * b.width, b.channels) for b in self.buffers],
            ops=[(op.kind, op.numbers, op.factor) for op in self.ops],
            arena=self.arena,
            conditioning=self.conditioning,
            classes=self.classes,
            batch=self.batch,
            weights=address(self.weights, torch.float32),
            weights_size=self.weights.numel(),
        )


@dataclass
class Builder:
    """A plan under construction."""

    batch: int
    threads: int
    conditioning: int = 0
    classes: int = 0
    buffers: list[Buffer] = field(default_factory=list)
    ops: list[Op] = field(default_factory=list)
    packing: list[tuple[int, int, Callable[[Tensor], object]]] = field(default_factory=list)
    floats: int = 0  # of weights so far
    sources: list[dict[str, Source]] = field(default_factory=list)  # of each operation, unpacked

    @property
    def tensors(self) -> list[dict[str, Tensor]]:
        """The tensors of each operation, unpacked."""
        return [{name: value_of(source) for name, source in own.items()} for own in self.sources]

    def new(self, channels: int, height: int = 1, width: int = 1) -> Part:
        """Add a buffer."""
        self.buffers.append(Buffer(height, width, channels))
        return Part(len(self.buffers) - 1, 0, channels, height, width)

    def weights(self, size: int, fill: Callable[[Tensor], object]) -> int:
        """Reserve `size` floats of weights, which `fill` will write, and return their offset."""
        offset = self.floats
        self.packing.append((offset, size, fill))
        self.floats = aligned(offset + size)
        return offset

    def add(
        self,
        kind: str,
        module: str,
        reads: dict[str, Part],
        writes: dict[str, Part],
        factor: float = 1.0,
        flops: int = 0,
        weights: int = 0,
        tensors: Mapping[str, Source] | None = None,
        **numbers: int,
    ) -> None:
        """Append an operation: the parts that it reads and writes, by name, its weights and its
        numbers.

        A number that has the name of a tensor is the offset of a packed form of it; the other
        tensors become weights as they are.
        """
        self.sources.append(dict(tensors or {}))
        for name, source in self.sources[-1].items():
            if name not in numbers:
                numbers[name] = self.weights(value_of(source).numel(), partial(_copy, source))
        for name, part in (reads | writes).items():
            numbers[name] = part.buffer
            numbers[f"{name}_channel"] = part.channel
        self.ops.append(
            Op(
                kind,
                module,
                {key: int(value) for key, value in numbers.items()},
                tuple(reads.values()),
                tuple(writes.values()),
                float(factor),
                flops,
                weights,
            )
        )

    def finished(self) -> Plan:
        """Lay out the buffers, write the weights, and return the plan."""
        arena = lay_out(self.buffers, self.ops)
        weights = torch.empty(self.floats, dtype=torch.float32, device="cpu")
        assert extension is not None
        extension.ask_for_huge_pages(address(weights, torch.float32), 4 * self.floats)
        weights.zero_()
        for offset, size, fill in self.packing:
            fill(weights[offset : offset + size])
        return Plan(
            self.buffers, self.ops, arena, self.conditioning, self.classes, self.batch,
            self.threads, weights,
        )  # fmt: skip


def value_of(source: Source) -> Tensor:
    """The tensor as it is now, without its gradient."""
    return (source if isinstance(source, Tensor) else source()).detach()


def _copy(source: Source, to: Tensor) -> None:
    to.copy_(value_of(source).reshape(-1))


def aligned(floats: int) -> int:
    """The number of floats, rounded up to whole cache lines."""
    return -(-floats // _ALIGNMENT) * _ALIGNMENT


def lives_of(buffers: Sequence[Buffer], ops: Sequence[Op]) -> list[tuple[int, int]]:
    """The first and the last operation of every buffer."""
    lives = [(len(ops), -1)] * len(buffers)
    for i, op in enumerate(ops):
        for part in (*op.reads, *op.writes):
            first, last = lives[part.buffer]
            lives[part.buffer] = (min(first, i), max(last, i))
    return lives


def lay_out(buffers: Sequence[Buffer], ops: Sequence[Op]) -> int:
    """Place every buffer in the arena, apart from those that live at the same time; return the
    floats of the arena.

    The largest come first, each as low as it can lie (Pisarchyk and Lee 2020, greedy by size).
    """
    lives = lives_of(buffers, ops)
    placed: list[int] = []
    top = 0
    inner = [i for i in range(len(buffers)) if i not in (INPUT, OUTPUT)]
    for i in sorted(inner, key=lambda i: -buffers[i].floats):
        first, last = lives[i]
        rivals = [j for j in placed if lives[j][0] <= last and first <= lives[j][1]]
        offset = 0
        for j in sorted(rivals, key=lambda j: buffers[j].offset):
            if offset + buffers[i].floats <= buffers[j].offset:
                break
            offset = max(offset, aligned(buffers[j].offset + buffers[j].floats))
        buffers[i].offset = offset
        placed.append(i)
        top = max(top, offset + buffers[i].floats)
    return aligned(top)
