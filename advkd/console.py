"""The terminal: progress bars, and signals that ask a command to stop."""

from __future__ import annotations

import contextlib
import signal
import sys
from types import FrameType, TracebackType
from typing import Any

from tqdm import tqdm


class Interrupted(RuntimeError):
    """A training that was asked to stop and has saved its state."""


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


def progress_bar(stage: str, total: int, done: int = 0, unit: str = "step") -> tqdm:
    """A tqdm bar with the stage's name; silent where stderr is not a terminal."""
    return tqdm(
        total=total,
        initial=done,
        desc=f"{stage:<12}",
        unit=f" {unit}",
        disable=not sys.stderr.isatty(),
        dynamic_ncols=True,
    )
