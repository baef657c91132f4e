"""Tables of figures: rows for the page, and text for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from advkd.report.inputs import SIDES
from advkd.report.numbers import DASH, MINUS, brief, common_decimals, is_finite


class Figure(NamedTuple):
    """A figure of quality: its key in the summary, and how it is shown."""

    key: str
    label: str
    digits: int  # significant ones of the largest value in a row
    better: str  # "lower" or "higher"
    meaning: str


class Row(NamedTuple):
    """A row of a table: text of the label, a note below it, and text by side."""

    label: str
    note: str
    cells: dict[str, str]


QUALITY = (
    Figure("fd", "FD", 4, "lower", "Fréchet distance of the features"),
    Figure("kid", "KID", 3, "lower", "kernel distance of the features"),
    Figure("precision", "Precision", 3, "higher", "share of samples that lie among real images"),
    Figure("recall", "Recall", 3, "higher", "share of real images that lie among samples"),
    Figure("swd", "SWD", 3, "lower", "sliced Wasserstein distance of the pixels"),
    Figure("texture_fd", "Texture FD", 4, "lower", "Fréchet distance of the earlier layers"),
    Figure("texture_swd", "Texture SWD", 3, "lower", "sliced Wasserstein distance of fine patches"),
    Figure("spectrum", "Spectrum", 3, "lower", "distance of the power at each frequency, in dB"),
)
_COSTS = (
    ("passes", "Network passes per image"),
    ("ms_per_image", "Milliseconds per image"),
    ("parameters", "Parameters"),
)
_ARROWS = {"lower": "↓", "higher": "↑"}
# What a terminal shows whose encoding lacks the character.
_SPELLED = {
    "↓": "(lower is better)", "↑": "(higher is better)", "×": "x", "±": "+-", "é": "e", DASH: "-",
    MINUS: "-",
}  # fmt: skip


def by_side(summary: Mapping[str, Any], key: str) -> dict[str, float | None]:
    """The values of real, teacher and student, means where there is a spread; None where there is
    none, or no finite one."""
    return _parts(summary.get(key), "mean")


def spreads_by_side(summary: Mapping[str, Any], key: str) -> dict[str, float | None]:
    """The standard deviations over blocks; None where a value is of a single block."""
    return _parts(summary.get(key), "std")


def _parts(entry: Any, part: str) -> dict[str, float | None]:
    found = {}
    for side in SIDES:
        value = (entry or {}).get(side)
        if isinstance(value, Mapping):
            value = value.get(part)
        elif part == "std":
            value = None
        found[side] = value if is_finite(value) else None
    return found


def speed_up(summary: Mapping[str, Any]) -> float | None:
    """How many times faster than the teacher the student is, or None."""
    value = summary.get("speed_up")
    return value if is_finite(value) else None


def quality_rows(summary: Mapping[str, Any]) -> list[Row]:
    """The figures of quality."""
    return [
        Row(
            figure.label,
            f"{figure.meaning}; {figure.better} is better",
            shown_by_side(summary, figure.key, figure.digits),
        )
        for figure in QUALITY
    ]


def shown_by_side(summary: Mapping[str, Any], key: str, digits: int) -> dict[str, str]:
    """The values as text, each with its spread where it has one."""
    return common_decimals(by_side(summary, key), digits, spreads_by_side(summary, key))


def cost_rows(summary: Mapping[str, Any]) -> list[Row]:
    """Network passes, time, parameters and speed-up."""
    rows = [
        Row(label, "", {side: brief(value) for side, value in by_side(summary, key).items()})
        for key, label in _COSTS
    ]
    factor = speed_up(summary)
    cells = dict.fromkeys(SIDES, DASH)
    if factor is not None:
        cells |= {"teacher": "1×", "student": f"{brief(factor)}×"}
    return [*rows, Row("Speed-up", "", cells)]


def filled_sides(rows: Sequence[Row]) -> list[str]:
    """Teacher and student, and real images where any row has a value for them."""
    return [side for side in SIDES if side != "real" or any(r.cells[side] != DASH for r in rows)]


def final_table(summary: Mapping[str, Any], encoding: str | None = None) -> str:
    """The table that closes the main job: teacher and student side by side, below 80 columns.

    Real images have a column where they have a value. A value that is missing or not finite is a
    dash. What `encoding` cannot express is spelled out (None: it can express everything).
    """
    distance = Row("Fréchet distance (FD)", "", shown_by_side(summary, "fd", 4))
    texture = Row("Texture FD", "", shown_by_side(summary, "texture_fd", 4))
    rows = [distance, *([texture] if "texture_fd" in summary else []), *cost_rows(summary)]
    return _text_table(filled_sides(rows), [(r.label, r.cells) for r in rows], encoding)


def quality_table(
    figures: Mapping[str, Any],
    class_names: Sequence[str] | None = None,
    encoding: str | None = None,
) -> str:
    """All figures of quality, with a column for each side that there is.

    figures: by figure and side, as `advkd.evaluation.protocol.evaluate_networks` gives them. Class
    shares are in percent, under `class_names` or numbers. What is missing is a dash; what
    `encoding` cannot express is spelled out (None: it can express everything).
    """
    sides = [side for side in SIDES if side in figures["fd"]]
    rows: list[tuple[str, Mapping[str, str]]] = [
        (f"{f.label} {_ARROWS[f.better]}", shown_by_side(figures, f.key, f.digits)) for f in QUALITY
    ]
    shares = {side: values for side, values in figures["classes"].items() if values}
    for c in range(max(map(len, shares.values()), default=0)):
        name = class_names[c] if class_names else f"class {c}"
        percent = {side: 100 * values[c] for side, values in shares.items()}
        rows.append((f"{name}, %", _cells(percent, sides, ".1f")))
    return _text_table(sides, rows, encoding)


def _cells(values: Mapping[str, Any], sides: Sequence[str], form: str) -> dict[str, str]:
    return {s: DASH if values.get(s) is None else format(values[s], form) for s in sides}


def _text_table(
    sides: Sequence[str],
    rows: Sequence[tuple[str, Mapping[str, str]]],
    encoding: str | None,
) -> str:
    """Lines of labels and right-aligned cells, in columns of one width."""
    spelled = [
        (spell(label, encoding), {side: spell(cells[side], encoding) for side in sides})
        for label, cells in rows
    ]
    stub = max(len(label) for label, _ in spelled)
    width = max(12, *(len(cells[side]) + 2 for _, cells in spelled for side in sides))
    lines = [" " * stub + "".join(f"{side:>{width}}" for side in sides)]
    for label, cells in spelled:
        lines.append(f"{label:<{stub}}" + "".join(f"{cells[side]:>{width}}" for side in sides))
    return "\n".join(lines)


def spell(text: str, encoding: str | None) -> str:
    """The text with what `encoding` cannot express spelled out, or as \\u escapes."""
    if not encoding:
        return text
    return "".join(_spelled_character(character, encoding) for character in text)


def _spelled_character(character: str, encoding: str) -> str:
    try:
        character.encode(encoding)
    except UnicodeEncodeError:
        escaped = character.encode(encoding, "backslashreplace").decode(encoding)
        return _SPELLED.get(character, escaped)
    return character
