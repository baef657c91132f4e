"""The files that a report is made from, metrics.jsonl and summary.json, checked when read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from advkd.evaluation.figures import FIGURES
from advkd.files import CheckpointError, read_json, read_text
from advkd.report.numbers import is_finite

MAX_METRICS = 256 << 20  # bytes of a metrics.jsonl
SIDES = ("real", "teacher", "student")
_NUMBERS_BY_SIDE = ("passes", "ms_per_image", "parameters")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read a metrics.jsonl: one dict a line, in order; an absent file is an empty list.

    A last line that was cut off is left out. Raises CheckpointError, which names the file and the
    line, for whatever else is not a JSON object.
    """
    path = Path(path)
    if not path.exists():
        return []
    lines = read_text(path, MAX_METRICS).split("\n")
    entries: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            if number == len(lines):
                break
            raise CheckpointError(f"{path} line {number} is not JSON") from None
        if not isinstance(entry, dict):
            raise CheckpointError(f"{path} line {number} is not a JSON object")
        entries.append(entry)
    return entries


def read_summary(path: Path) -> dict[str, Any]:
    """Read a summary.json; CheckpointError, which names file and key, where it does not hold what
    `advkd.report.page.write_report` takes."""
    summary = read_json(path)
    for key, value in summary.items():
        wanted, holds = _WANTED.get(key, ("", _anything))
        if value is not None and not holds(value):
            raise CheckpointError(f"{path}: {key}={value!r:.60} is not {wanted}")
    classes, names = summary.get("classes"), summary.get("class_names")
    counts = {len(shares) for shares in (classes or {}).values() if shares}
    if len(counts) > 1 or (counts and names and counts != {len(names)}):
        raise CheckpointError(f"{path}: classes and class_names are not of equally many classes")
    return summary


def _anything(value: Any) -> bool:
    return True


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _is_list_of(holds: Callable[[Any], bool], value: Any) -> bool:
    return isinstance(value, list) and all(holds(entry) for entry in value)


def _are_numbers(value: Any) -> bool:
    return isinstance(value, dict) and all(_is_number(entry) for entry in value.values())


def _is_figure(value: Any) -> bool:
    if not isinstance(value, dict):
        return _is_number(value)
    return set(value) == {"mean", "std"} and all(map(is_finite, value.values()))


def _are_figures(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_figure, value.values()))


def _are_lists(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and set(value) <= set(SIDES)
        and all(entry is None or _is_list_of(is_finite, entry) for entry in value.values())
    )


_WANTED: dict[str, tuple[str, Callable[[Any], bool]]] = {
    **{key: ("a number or {mean, std} for each side", _are_figures) for key in FIGURES},
    **{key: ("a number for each side", _are_numbers) for key in _NUMBERS_BY_SIDE},
    "classes": ("a list of shares for each side", _are_lists),
    "spectra": ("a list of decibels for each side", _are_lists),
    "class_names": ("a list of names", lambda value: _is_list_of(_is_text, value)),
    "seconds": ("a number for each stage", _are_numbers),
    **{key: ("a number", _is_number) for key in ("speed_up", "teacher_steps")},
    **{key: ("text", _is_text) for key in ("name", "student_family", "protocol", "features")},
}
