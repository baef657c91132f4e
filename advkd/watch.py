"""`python -m advkd.watch`: a run in the browser while it trains."""

from __future__ import annotations

import argparse
import contextlib
import sys
import webbrowser
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from advkd.cli import guarded
from advkd.report.inputs import read_metrics
from advkd.report.live import Live, LiveServer
from advkd.report.numbers import duration, is_finite
from advkd.run.folder import STAGES, RunFolder, stored_config
from advkd.run.following import PREVIEW

PORT = 8000
DOING = {
    "teacher": "The teacher is being made.",
    "trajectories": "The teacher's trajectories are being sampled.",
    "distill": "The student is being distilled.",
    "evaluate": "Teacher and student are being evaluated.",
    "report": "The report is being written.",
}
EPILOG = """\
Serves a page on this machine with the newest preview and the losses so far; it loads itself anew.
The run may be going on, stopped or finished; nothing of it is changed. From another machine:
ssh -L 8000:127.0.0.1:8000 MACHINE. Ctrl-C ends it.
"""


def parser() -> argparse.ArgumentParser:
    """The command line of `advkd watch`."""
    p = argparse.ArgumentParser(
        prog="advkd watch",
        description="Show a run in the browser while it trains.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("run", metavar="RUN", type=Path, help="a run's folder, such as runs/NAME")
    p.add_argument("--port", type=int, default=PORT, help=f"default {PORT}; 0 takes a free one")
    p.add_argument("--open", action="store_true", help="open the page in a browser")
    return p


def live_of(path: Path) -> Live:
    """A run's folder as it is now; CheckpointError for a folder that is no run."""
    config = stored_config(path)
    folder = RunFolder(path, config)
    metrics = read_metrics(path / "metrics.jsonl")
    stage = next((stage for stage in STAGES if not folder.is_done(stage)), None)
    preview, report = path / PREVIEW, path / "report" / "report.html"
    if stage is None:
        state = "The run is finished."
    else:
        steps = {"teacher": config.teacher.steps, "distill": config.distill.steps}
        state = f"{DOING[stage]}{_progress(metrics, stage, steps.get(stage))}"
    return Live(
        name=config.name,
        state=state,
        metrics=metrics,
        preview=preview.read_bytes() if preview.is_file() else None,
        report=report.read_bytes() if stage is None else None,
    )


def _progress(metrics: Sequence[Mapping[str, Any]], stage: str, steps: int | None) -> str:
    """How far a training is, as a sentence with a space before it."""
    last = next((entry for entry in reversed(metrics) if entry.get("stage") == stage), None)
    if last is None or steps is None or not all(map(is_finite, _numbers(last))):
        return ""
    step, seconds = _numbers(last)
    left = seconds / step * (steps - step) if step else None
    return (
        f" Step {step:,} of {steps:,}, after {duration(seconds)}; at this pace "
        f"{duration(left)} are left of this stage."
    )


def _numbers(entry: Mapping[str, Any]) -> tuple[Any, Any]:
    return entry.get("step"), entry.get("seconds")


def watch(args: argparse.Namespace) -> None:
    """Serve the page until Ctrl-C."""
    live_of(args.run)  # whatever is no run is refused at once
    if not 0 <= args.port < 1 << 16:
        raise ValueError(f"--port {args.port} is not between 0 and 65535")
    try:
        server = LiveServer(args.port, lambda: live_of(args.run))
    except OSError as error:
        raise OSError(f"--port {args.port} cannot be had: {error.strerror}") from None
    with server, contextlib.suppress(KeyboardInterrupt):
        print(f"{args.run}: {server.address} (Ctrl-C ends it)", flush=True)
        if args.open:
            webbrowser.open(server.address)
        server.serve_forever()


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    args = parser().parse_args(argv)
    return guarded(lambda: watch(args))


if __name__ == "__main__":
    sys.exit(main())
