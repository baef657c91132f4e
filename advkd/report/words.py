"""A run's summary in sentences; one whose numbers are missing is left out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from advkd.report.numbers import brief, common_decimals, count, fixed, is_finite
from advkd.report.tables import by_side, shown_by_side, speed_up


def summary_words(summary: Mapping[str, Any]) -> str:
    """The run in a paragraph."""
    return " ".join([_what_was_made(summary), *_speed(summary), *_quality(summary)])


def _what_was_made(summary: Mapping[str, Any]) -> str:
    family = summary.get("student_family")
    student = f"A student of the {family} family" if family else "A student"
    steps = by_side(summary, "passes")["teacher"]
    steps = summary.get("teacher_steps") if steps is None else steps
    teacher = f"in {brief(steps)}" if is_finite(steps) else "in many"
    return f"{student} learned to make in one network pass what its teacher makes {teacher}."


def _speed(summary: Mapping[str, Any]) -> Iterator[str]:
    factor, time = speed_up(summary), by_side(summary, "ms_per_image")
    if factor is not None:
        spent = ""
        if time["teacher"] is not None and time["student"] is not None:
            spent = f": {brief(time['student'])} ms an image instead of {brief(time['teacher'])} ms"
        yield f"That is {brief(factor)} times as fast{spent}."


def _quality(summary: Mapping[str, Any]) -> Iterator[str]:
    distance, recall = by_side(summary, "fd"), by_side(summary, "recall")
    real, teacher, student = distance.values()
    if teacher is not None and student is not None:
        shown = shown_by_side(summary, "fd", 4)
        yield (
            f"Its Fréchet distance to real images is {shown['student']}, "
            f"the teacher's {shown['teacher']}."
        )
        if real is not None and teacher > real:
            ratio = fixed((student - real) / (teacher - real), 2)
            yield (
                f"Real images among themselves are at {shown['real']}; counted from there, "
                f"the student is {ratio} times as far away as the teacher."
            )
    if recall["teacher"] is not None and recall["student"] is not None:
        yield (
            f"It covers {recall['student']:.1%} of the real images' variety (recall), "
            f"the teacher {recall['teacher']:.1%}."
        )


def facts(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The few numbers that say the most, each with what it is."""
    found: list[tuple[str, str]] = []
    factor = speed_up(summary)
    if factor is not None:
        found.append((f"{brief(factor)}×", "faster per image"))
    passes = by_side(summary, "passes")
    if passes["student"] is not None:
        plural = "pass" if passes["student"] == 1 else "passes"
        beside = f"per image, teacher {brief(passes['teacher'])}"
        found.append((f"{brief(passes['student'])} {plural}", beside))
    distance = by_side(summary, "fd")
    if distance["student"] is not None:
        shown = common_decimals(distance, 4)
        found.append((f"{shown['student']} FD", f"teacher {shown['teacher']}"))
    size = by_side(summary, "parameters")
    if size["student"] is not None:
        share = ""
        if size["teacher"]:
            share = f", {size['student'] / size['teacher']:.0%} of the teacher's"
        found.append((count(size["student"]), f"parameters{share}"))
    return found


def class_words(shares: Mapping[str, Sequence[float]], names: Sequence[str]) -> str:
    """Where teacher and student stray most from the real images' shares."""
    said = "Share of each class among the images, as the classifier sees them."
    if "real" not in shares:
        return said
    found = []
    for side in ("teacher", "student"):
        if side in shares:
            gaps = np.subtract(shares[side], shares["real"])
            worst = int(np.abs(gaps).argmax())
            points = f"{100 * abs(gaps[worst]):.1f} points"
            found.append(f"{points} for the {side} (class {names[worst]})")
    if found:
        said += f" The largest differences from the real images are {' and '.join(found)}."
    return said


def protocol_paragraphs(summary: Mapping[str, Any]) -> list[str]:
    """How quality and time were measured."""
    protocol, features = (str(summary.get(key) or "") for key in ("protocol", "features"))
    paragraphs = [protocol] if protocol else []
    if features and features not in protocol:
        paragraphs.append(f"The features are those of {features}.")
    return paragraphs
