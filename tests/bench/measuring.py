"""Measuring contenders for one op in turn, so that the machine's moods meet all of them alike."""

from __future__ import annotations

import ctypes
import gc
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from advkd import ops

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "native"))
import native

SAMPLE_SECONDS = 0.004  # a sample repeats a call until it takes about this long
HEAD_START = 1_000_000  # cycles that a GPU spins, about half a millisecond
ROUNDS = (3, 40)  # samples of a contender, at least and at most


@dataclass(frozen=True)
class Contender:
    """`run(prepare())` is one call; only `run` is timed. `check` raises where its result is wrong,
    as an AssertionError."""

    run: Callable[[Any], object]
    check: Callable[[], None]
    prepare: Callable[[], Any] = lambda: None


@dataclass(frozen=True)
class Contest:
    """Contenders for one op on one shape, and the bytes it cannot but move (0: unknown)."""

    contenders: dict[str, Contender]
    moved_bytes: int = 0


@dataclass
class Outcome:
    """Seconds of a call, by contender; why a contender is not timed; the bandwidth of a copy."""

    samples: dict[str, list[float]]
    errors: dict[str, str] = field(default_factory=dict)
    moved_bytes: int = 0
    copy_seconds: float | None = None

    def details(self, name: str) -> dict[str, float]:
        """GB/s of one contender, and the fraction of a copy of as many bytes."""
        if self.copy_seconds is None:
            return {}
        seconds = statistics.median(self.samples[name])
        return {
            "gb_per_s": self.moved_bytes / seconds / 1e9,
            "copy_fraction": self.copy_seconds / seconds,
        }


class Clock(Protocol):
    name: str
    threads: int
    contest_seconds: float  # spent on the samples of one contest
    overhead: float  # seconds that timing a call takes beside the call

    def seconds(self, run: Callable[[Any], object], prepared: list[Any]) -> float:
        """The mean time of run(p) over what was prepared."""


class CpuClock:
    """CPU time at one thread, which neighbours on the machine do not lengthen; else wall time."""

    contest_seconds, overhead = 1.5, 0.0

    def __init__(self) -> None:
        self.threads = torch.get_num_threads()
        self.name = "CPU time" if self.threads == 1 else "wall time"
        self._now = time.process_time if self.threads == 1 else time.perf_counter

    def seconds(self, run: Callable[[Any], object], prepared: list[Any]) -> float:
        start = self._now()
        for item in prepared:
            run(item)
        return (self._now() - start) / len(prepared)


class CudaClock:
    """The device's time between events; the L2 cache is written over before each call.

    The device spins before the first event until the host has launched all of a call: else a short
    kernel's time would be that of its launch.
    """

    name = "CUDA events, cold L2"
    contest_seconds, overhead = 0.5, 7e-4

    def __init__(self) -> None:
        self.threads = torch.get_num_threads()
        l2_bytes = torch.cuda.get_device_properties(0).L2_cache_size
        self._flush = torch.empty(2 * l2_bytes, dtype=torch.int8, device="cuda")

    def seconds(self, run: Callable[[Any], object], prepared: list[Any]) -> float:
        milliseconds = 0.0
        for item in prepared:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._flush.zero_()
            torch.cuda._sleep(HEAD_START)
            start.record()
            run(item)
            end.record()
            end.synchronize()
            milliseconds += start.elapsed_time(end)
        return milliseconds / 1e3 / len(prepared)


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def clock() -> Clock:
    return CudaClock() if device() == "cuda" else CpuClock()


def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """torch.compile, anew for each shape, as for a network of fixed shapes."""
    # By default it gives up on a function that has been compiled for eight of them.
    torch._dynamo.config.recompile_limit = 1000
    torch._dynamo.config.accumulated_recompile_limit = 1000
    return torch.compile(function, fullgraph=True, dynamic=False)


def keep_freed_memory() -> None:
    """Lets malloc keep what is freed: a new tensor's page faults would be timed with every op."""
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def l2_bytes() -> int:
    """The size of a core's L2 cache, or of the device's; 1 MiB where the system does not tell."""
    if device() == "cuda":
        return torch.cuda.get_device_properties(0).L2_cache_size
    file = Path("/sys/devices/system/cpu/cpu0/cache/index2/size")
    return int(file.read_text().strip().rstrip("K")) * 1024 if file.exists() else 1 << 20


def hold(contest: Contest, timer: Clock) -> Outcome:
    """Checks the contenders, and times those whose result is right."""
    errors = {}
    for name, contender in contest.contenders.items():
        try:
            contender.check()
        except AssertionError as error:
            errors[name] = f"not timed, because its result is wrong: {error}"
    timed = {name: c for name, c in contest.contenders.items() if name not in errors}
    if contest.moved_bytes:
        timed["copy"] = _copy(contest.moved_bytes)
    samples = _measure(timed, timer)
    copied = samples.pop("copy", None)
    return Outcome(
        samples, errors, contest.moved_bytes, statistics.median(copied) if copied else None
    )


def _copy(moved_bytes: int) -> Contender:
    """A copy that moves so many bytes, half of them read and half of them written: on the CPU our
    own, whose stores pass the cache."""
    elements = moved_bytes // 2 // 4
    source, target = (torch.ones(elements, device=device()) for _ in range(2))

    def run(_: Any) -> None:
        if device() == "cuda" or native.missing() is not None:
            target.copy_(source)
        else:
            native.module().copy_float32(
                source.data_ptr(), target.data_ptr(), elements, torch.get_num_threads()
            )

    return Contender(run, check=lambda: None)


def _measure(contenders: dict[str, Contender], timer: Clock) -> dict[str, list[float]]:
    gc.collect()
    gc.disable()
    try:
        expected = {name: _trial(contender, timer) for name, contender in contenders.items()}
        repeats = {name: max(1, round(SAMPLE_SECONDS / s)) for name, s in expected.items()}
        round_seconds = sum(repeats[name] * seconds for name, seconds in expected.items())
        rounds = min(max(round(timer.contest_seconds / round_seconds), ROUNDS[0]), ROUNDS[1])
        samples: dict[str, list[float]] = {name: [] for name in contenders}
        order = list(contenders)
        for _ in range(rounds):
            for name in order:
                prepared = [contenders[name].prepare() for _ in range(repeats[name])]
                samples[name].append(timer.seconds(contenders[name].run, prepared))
            order.append(order.pop(0))
        return samples
    finally:
        gc.enable()


def _trial(contender: Contender, timer: Clock) -> float:
    """About the seconds that a warm call takes to time."""
    calls = [timer.seconds(contender.run, [contender.prepare()]) for _ in range(2)]
    return max(calls[1], 1e-6) + timer.overhead


def assert_right(got: Tensor, truth: Tensor, terms: int, what: str = "the result") -> None:
    """The rule of tests/kernels: errors of `terms` summands add up like a random walk; 16 covers
    the roundings of one term and the worst of many elements. truth is float64."""
    eps = torch.finfo(got.dtype).eps
    size = truth.square().mean().sqrt() + truth.abs()
    worst = float(((got.double() - truth).abs() / size.clamp_min(1e-30)).max())
    bound = 16 * eps * terms**0.5
    assert worst <= bound, f"{what} is off by {worst:.2g}, more than {bound:.2g}"


def fused_missing() -> str | None:
    """Why the fused ops cannot be timed here."""
    if device() == "cuda":
        from advkd.kernels import unavailable_reason

        return unavailable_reason()
    return None if ops.extension is not None else "the C++ extension is not installed"
