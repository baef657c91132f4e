"""Benchmarks: `pytest tests/bench --benchmark-only`; see docs/performance.md."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from . import report
from .measuring import Clock, Contest, Outcome, clock, fused_missing, hold, keep_freed_memory

Hold = Callable[[str, str, str, Callable[[], Contest]], None]

_RECORDS = pytest.StashKey[list[dict[str, Any]]]()


class Playback:
    """The clock that pytest-benchmark sees. Its rounds of two tests cannot alternate; ours do, and
    each of its rounds plays back one of the samples that were taken."""

    def __init__(self) -> None:
        self._now = 0.0

    def __call__(self) -> float:
        return self._now

    def advance(self, samples: list[float]) -> Callable[[], None]:
        left = iter(samples)

        def play() -> None:
            self._now += next(left)

        return play


_playback = Playback()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_RECORDS] = []


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "contest" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.benchmark(timer=_playback))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    records = config.stash.get(_RECORDS, [])
    if records:
        terminalreporter.section("benchmarks: ours against each")
        terminalreporter.write_line(report.text(records))


@pytest.fixture(scope="session")
def timer() -> Clock:
    missing = fused_missing()
    assert missing is None, f"nothing to time: {missing}"
    keep_freed_memory()
    return clock()


@pytest.fixture(scope="session")
def outcomes() -> dict[tuple[str, str], Outcome]:
    return {}


@pytest.fixture
def contest(
    benchmark: BenchmarkFixture,
    timer: Clock,
    outcomes: dict[tuple[str, str], Outcome],
    pytestconfig: pytest.Config,
) -> Hold:
    """contest(op, shape, implementation, make): one contender's part in the contest that make()
    sets up. The first that asks has it held; the others find their samples taken."""

    def held(op: str, shape: str, implementation: str, make: Callable[[], Contest]) -> None:
        if (op, shape) not in outcomes:
            outcomes[op, shape] = hold(make(), timer)
        outcome = outcomes[op, shape]
        if implementation in outcome.errors:
            pytest.fail(f"{implementation}: {outcome.errors[implementation]}", pytrace=False)
        samples = outcome.samples[implementation]
        benchmark.group = f"{op}: {shape}"
        benchmark.extra_info.update(
            op=op, shape=shape, implementation=implementation, clock=timer.name,
            threads=timer.threads, **outcome.details(implementation),
        )  # fmt: skip
        benchmark.pedantic(_playback.advance(samples), rounds=len(samples))
        records = pytestconfig.stash[_RECORDS]
        records.append(report.record(benchmark.extra_info, benchmark.stats["median"]))

    return held
