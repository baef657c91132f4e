"""The model card of a run's student: what the run knows of it, figures and samples included."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from advkd.card import UNKNOWN, Facts, Metric, write_card
from advkd.files import write_bytes
from advkd.report.tables import QUALITY, by_side, cost_rows, filled_sides, quality_rows
from advkd.report.words import protocol_paragraphs
from advkd.run.run import Run

GRID = "grid.png"


def describe_student(run: Run, summary: Mapping[str, Any]) -> None:
    """Write `student/README.md`, with the figures of a summary, and the report's grid beside it."""
    folder = run.path / "student"
    write_bytes(folder / GRID, (run.path / "report" / GRID).read_bytes())
    rows = [*quality_rows(summary), *cost_rows(summary)]
    sides = filled_sides(rows)
    student = {figure: by_side(summary, figure.key)["student"] for figure in QUALITY}
    facts = Facts(
        name=f"{run.config.name} student",
        license=(run.dataset.license if run.dataset else "") or UNKNOWN,
        dataset=_dataset(run),
        table=[(row.label, {side: row.cells[side] for side in sides}) for row in rows],
        metrics=[
            Metric(f.key, f.label, value) for f, value in student.items() if value is not None
        ],
        words=protocol_paragraphs(summary),
        picture=GRID,
    )
    write_card(folder, run.stored_student(), facts)


def _dataset(run: Run) -> str:
    """What the student's images are of, in words."""
    if run.dataset is not None:
        return run.dataset.title or run.dataset.name
    if run.config.data.path:
        return f"those of {run.config.name}"
    return "samples of the teacher alone"
