"""The terminal: progress bars, and signals that ask a command to stop."""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from types import FrameType, TracebackType
from typing import Any

from tqdm import tqdm

from advkd import processes

LOG_SECONDS = 30.0  # between lines of a log file; what is shorter writes none


class StopSignals:
    """Within `with`: SIGINT and SIGTERM set `requested` instead of ending the process."""

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, Any] = {}

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True

    def __enter__(self) -> StopSignals:
        with contextlib.suppress(ValueError):  # only the main thread may set handlers
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._request)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


class _LogLines(tqdm):
    """A bar for a log file: a line every LOG_SECONDS, each below the other."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self._written = time.monotonic()

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Write the state as one line, where it is time; tqdm calls this often."""
        now = time.monotonic()
        if now - self._written >= LOG_SECONDS:
            self._written = now
            self.fp.write(f"{self}\n")
            self.fp.flush()

    def close(self) -> None:
        """End without a line of its own."""
        self.disable = True


def progress_bar(stage: str, total: int, done: int = 0, unit: str = "step") -> tqdm:
    """A tqdm bar with the stage's name; where stderr is no terminal, a line every LOG_SECONDS.

    Of several processes only the first shows one.
    """
    if not processes.is_first():
        return tqdm(total=total, initial=done, disable=True)
    if not sys.stderr.isatty():
        place = "{n_fmt}%" if unit == "%" else f"{unit} {{n_fmt}} of {{total_fmt}}"
        times = "{elapsed} so far, {remaining} left"
        return _LogLines(
            total=total,
            initial=done,
            bar_format=f"advkd: {stage}, {place}, {times}{{postfix}}",
            delay=LOG_SECONDS,
        )
    return tqdm(
        total=total,
        initial=done,
        desc=f"{stage:<12}",
        unit=f" {unit}",
        dynamic_ncols=True,
    )
