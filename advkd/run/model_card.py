"""The model card of a run's student: what the run knows of it, figures and samples included."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from advkd.card import UNKNOWN, Facts, Metric, write_card
from advkd.data.hub import PREFIX
from advkd.files import write_bytes
from advkd.report.tables import (
    QUALITY,
    by_side,
    cost_rows,
    filled_sides,
    quality_rows,
    spreads_by_side,
)
from advkd.report.words import protocol_paragraphs
from advkd.run.run import Run

GRID = "grid.png"


def describe_student(run: Run, summary: Mapping[str, Any]) -> None:
    """Write `student/README.md`, with the figures of a summary, and the report's grid beside it."""
    folder = run.path / "student"
    write_bytes(folder / GRID, (run.path / "report" / GRID).read_bytes())
    rows = [*quality_rows(summary), *cost_rows(summary)]
    sides = filled_sides(rows)
    facts = Facts(
        name=f"{run.config.name} student",
        license=(run.dataset.license if run.dataset else "") or UNKNOWN,
        dataset=_dataset(run),
        table=[(row.label, {side: row.cells[side] for side in sides}) for row in rows],
        of_hub=_of_hub(run.config.data.path),
        metrics=list(_metrics(summary)),
        words=protocol_paragraphs(summary),
        picture=GRID,
    )
    write_card(folder, run.stored_student(), facts)


def _metrics(summary: Mapping[str, Any]) -> Iterator[Metric]:
    """The student's figures; the spread, for which the hub has no place, stands in their names."""
    for figure in QUALITY:
        value = by_side(summary, figure.key)["student"]
        spread = spreads_by_side(summary, figure.key)["student"]
        name = figure.label if spread is None else f"{figure.label} (± {spread:.2g} over blocks)"
        if value is not None:
            yield Metric(figure.key, name, value)


def _of_hub(path: str) -> str:
    """The data set of the hub that a path names; empty for any other."""
    name = path.removeprefix(PREFIX)
    return name if path.startswith(PREFIX) and not Path(name).is_absolute() else ""


def _dataset(run: Run) -> str:
    """What the student's images are of, in words."""
    if run.dataset is not None:
        return run.dataset.title or run.dataset.name
    if _of_hub(run.config.data.path):
        return _of_hub(run.config.data.path)
    if run.config.data.path:
        return f"those of {run.config.name}"
    return "samples of the teacher alone"
