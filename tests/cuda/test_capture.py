"""How a pass is captured, on a stand-in for torch.cuda that keeps streams, devices and memory pools
as torch does: several devices, and captures that fail in Python, in CUDA, or at their end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from advkd.engine import cuda as cuda_engine
from advkd.engine.cuda import captured


class Stream:
    def __init__(self, cuda: FakeCuda, device: int):
        self.device = device
        cuda.streams.append(self)

    def wait_stream(self, other: Stream) -> None:
        assert other.device == self.device

    def synchronize(self) -> None:
        pass


class FakeCuda:
    """Two devices, each with a default stream; pools in which the allocator still allocates."""

    def __init__(self) -> None:
        self.streams: list[Stream] = []
        self.defaults = [Stream(self, device) for device in (0, 1)]
        self.current = list(self.defaults)  # of each device
        self.device = 0
        self.open_pools: set[int] = set()
        self.taken_pools: set[int] = set()
        self.invalid = False  # the capture under way
        self.fail_begin = self.fail_end = False

    def current_stream(self, device: torch.device) -> Stream:
        return self.current[device.index]

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before = self.device, self.current[stream.device]
        self.device, self.current[stream.device] = stream.device, stream
        try:
            yield
        finally:
            self.device, self.current[stream.device] = before

    def end_allocate(self, device: int, pool: int) -> None:
        if pool not in self.open_pools:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.open_pools.remove(pool)

    def release(self, device: int, pool: int) -> None:
        self.taken_pools.remove(pool)


class Graph:
    """torch.cuda.CUDAGraph, as far as a capture goes."""

    cuda: FakeCuda

    def __init__(self, keep_graph: bool):
        assert keep_graph
        self.ended = False
        self.pool: int | None = None

    def capture_begin(self, pool: int, capture_error_mode: str) -> None:
        cuda = self.cuda
        assert capture_error_mode == "thread_local"
        assert cuda.current[cuda.device] is not cuda.defaults[cuda.device]
        cuda.open_pools.add(pool)
        cuda.taken_pools.add(pool)
        self.pool = pool
        if cuda.fail_begin:
            raise RuntimeError("CUDA error: operation not supported")

    def capture_end(self) -> None:
        cuda = self.cuda
        if cuda.invalid or cuda.fail_begin:
            raise RuntimeError("CUDA error: operation failed due to a previous error")
        assert self.pool is not None
        cuda.end_allocate(cuda.device, self.pool)
        if cuda.fail_end:
            raise RuntimeError("Invalid capture.")
        self.ended = True

    def __del__(self) -> None:
        if self.ended and self.pool is not None:
            self.cuda.release(0, self.pool)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    """Afterwards the caller's device and streams are what they were."""
    cuda = FakeCuda()
    cuda_engine._side_stream.cache_clear()
    monkeypatch.setattr(Graph, "cuda", cuda, raising=False)
    pools = iter(range(100))
    for name, value in {
        "Stream": lambda device: Stream(cuda, device.index),
        "stream": cuda.stream,
        "current_stream": cuda.current_stream,
        "CUDAGraph": Graph,
        "graph_pool_handle": lambda: next(pools),
        "empty_cache": lambda: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", cuda.end_allocate)
    monkeypatch.setattr(torch._C, "_cuda_releasePool", cuda.release)
    yield cuda
    cuda_engine._side_stream.cache_clear()
    assert not cuda_engine._capturing.locked()
    assert cuda.device == 0 and cuda.current == cuda.defaults


@pytest.mark.parametrize("index", [0, 1])
def test_a_pass_is_captured_on_its_own_device(fake: FakeCuda, index: int) -> None:
    seen: list[tuple[int, Stream]] = []

    def function() -> Tensor:
        seen.append((fake.device, fake.current[index]))
        return torch.zeros(len(seen))

    graph, out = captured(function, torch.device("cuda", index))
    assert len(seen) == 4 and len(out) == 4  # three passes to warm up, and the captured one
    assert {device for device, _ in seen} == {index}
    assert len({stream for _, stream in seen}) == 1 and seen[0][1] is not fake.defaults[index]
    assert seen[0][1].device == index
    assert not fake.open_pools and len(fake.taken_pools) == 1
    del graph
    assert not fake.taken_pools
    captured(function, torch.device("cuda", index))
    assert len({stream for _, stream in seen}) == 1  # libraries keep memory for each stream


@pytest.mark.parametrize("call", [1, 4])
@pytest.mark.parametrize("invalid", [False, True])
@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no memory"), KeyboardInterrupt()])
def test_a_function_that_fails_leaves_nothing(
    fake: FakeCuda, error: BaseException, invalid: bool, call: int
) -> None:
    """In a warm-up pass or in the captured one, which then CUDA may refuse even to end."""
    calls = 0

    def function() -> Tensor:
        nonlocal calls
        calls += 1
        if calls == call:
            fake.invalid = invalid
            raise error
        return torch.zeros(1)

    with pytest.raises(type(error)) as raised:
        captured(function, torch.device("cuda", 1))
    assert raised.value is error
    error.__traceback__ = raised.value.__context__ = None
    del raised
    assert not fake.open_pools and not fake.taken_pools


@pytest.mark.parametrize("where", ["fail_begin", "fail_end"])
def test_a_capture_that_cuda_refuses_leaves_nothing(fake: FakeCuda, where: str) -> None:
    setattr(fake, where, True)
    with pytest.raises(RuntimeError, match=r"Invalid capture|not supported"):
        captured(lambda: torch.zeros(1), torch.device("cuda", 1))
    assert not fake.open_pools and not fake.taken_pools


def test_a_capture_that_is_invalid_at_its_end_leaves_nothing(fake: FakeCuda) -> None:
    calls = 0

    def function() -> Tensor:
        nonlocal calls
        calls += 1
        fake.invalid = calls == 4  # CUDA has refused a call, of which nobody heard
        return torch.zeros(1)

    with pytest.raises(RuntimeError, match="due to a previous error"):
        captured(function, torch.device("cuda", 1))
    assert not fake.open_pools and not fake.taken_pools
