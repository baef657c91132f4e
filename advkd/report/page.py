"""The report of a run: summary.json, pictures, and one self-contained page.

Everything here takes plain data (numbers, images, text) and writes files; nothing is trained,
sampled or evaluated. `page.html.j2` is the page's template, with every value escaped; its style is
that of `advkd.deploy.page` and `style.css`.
"""

from __future__ import annotations

import base64
import io
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from PIL import Image

from advkd.deploy.page import POLICY, Section, base_style, environment, section
from advkd.files import write_bytes, write_json
from advkd.report.charts import DARK, LIGHT, SHEET, Panel, chart, panels_of, spectrum_panel
from advkd.report.inputs import SIDES
from advkd.report.numbers import duration, is_finite
from advkd.report.pictures import (
    Pictures,
    grid_sheet,
    png_bytes,
    sample_grids,
    save_png,
    strips_of,
    trajectory_sheet,
)
from advkd.report.tables import cost_rows, filled_sides, quality_rows
from advkd.report.words import class_words, facts, protocol_paragraphs, summary_words

_FOLDER = Path(__file__).parent


def write_report(
    folder: Path,
    summary: Mapping[str, Any],
    metrics: Sequence[Mapping[str, Any]],
    pictures: Pictures,
    settings: str,
    model_file: bytes | str = "no model file was given",
) -> Path:
    """Write `report/` into a run's folder and return the path of its report.html.

    summary: `fd`, `kid`, `precision`, `recall`, `swd`, `texture_fd`, `texture_swd`, `spectrum`
    (each {"real"?, "teacher", "student"} of numbers or {"mean", "std"}), `ms_per_image`, `passes`,
    `parameters` (the same of numbers; None = not known), `classes` and `spectra` (the same of lists
    of shares and of decibels, or None), `class_names` (optional), `protocol`, `features`, `name`,
    `student_family` (text), `speed_up`, `teacher_steps`, `seconds` ({stage: seconds}); written as
    summary.json.
    metrics: the entries of metrics.jsonl; a curve is drawn where its key exists.
    settings: the resolved configuration, shown as it is.
    model_file: the student as `advkd.deploy.model_file` makes it, which the page runs; or, as a
    clause, why there is none.
    Also writes grid.png, and where there is something to draw trajectory.png and
    loss_curves.png. Every file is replaced atomically; ValueError for images that `image_grid`
    refuses, OSError where a file cannot be written.
    """
    report = Path(folder) / "report"
    plain = _plain(summary)
    panels, grids = panels_of(metrics), sample_grids(pictures)
    write_json(report / "summary.json", plain)
    save_png(report / "grid.png", grid_sheet(grids))
    if pictures.heads:
        save_png(report / "trajectory.png", trajectory_sheet(pictures))
    if panels:
        write_bytes(report / "loss_curves.png", chart(panels, SHEET))
    page = report / "report.html"
    student = str(report.parent / "student")
    try_it = model_file if isinstance(model_file, str) else section(model_file, student)
    text = _page(plain, panels, grids, pictures, settings, try_it)
    # A file name that is not UTF-8 comes as characters that UTF-8 cannot hold.
    write_bytes(page, text.encode("utf-8", "backslashreplace"))
    return page


def _page(
    summary: Mapping[str, Any],
    panels: Sequence[Panel],
    grids: Mapping[str, np.ndarray],
    pictures: Pictures,
    settings: str,
    try_it: Section | str,
) -> str:
    """The whole report.html."""
    quality, cost = quality_rows(summary), cost_rows(summary)
    why_not = try_it if isinstance(try_it, str) else ""
    part = Section(Markup(), Markup(), POLICY) if isinstance(try_it, str) else try_it
    style = Markup((_FOLDER / "style.css").read_text(encoding="utf-8"))
    template = environment(_FOLDER).get_template("page.html.j2")
    return template.render(
        policy=part.policy,
        style=base_style() + style + part.style,
        name=summary.get("name") or "distillation",
        words=summary_words(summary),
        try_it=part.html,
        why_not=why_not,
        facts=facts(summary),
        samples={side: _image(png_bytes(g), f"images: {side}") for side, g in grids.items()},
        quality={"sides": SIDES, "rows": quality},
        cost={"sides": filled_sides(cost), "rows": cost},
        **_stages(summary),
        paths=_paths(pictures),
        classes=_classes(summary),
        spectrum=_chart(spectrum_panel(summary.get("spectra") or {})),
        charts=[_chart(panel) for panel in panels],
        protocol=protocol_paragraphs(summary),
        settings=settings,
    )


def _image(png: bytes, alt: str, dark: bytes | None = None) -> dict[str, Any]:
    """A picture as the page embeds it; `dark` is the one for a dark screen."""
    with Image.open(io.BytesIO(png)) as opened:
        width, height = opened.size
    found = {"url": _data_url(png), "width": width, "height": height, "alt": alt}
    return {**found, "dark": None if dark is None else _data_url(dark)}


def _chart(panel: Panel | None) -> dict[str, Any] | None:
    """A chart as the page embeds it, for a light and a dark screen."""
    if panel is None:
        return None
    return _image(chart([panel], LIGHT), panel.title, chart([panel], DARK))


def _data_url(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _stages(summary: Mapping[str, Any]) -> dict[str, Any]:
    """The time of each stage, and of all together."""
    seconds = summary.get("seconds") or {}
    shown = {stage: value if is_finite(value) else None for stage, value in seconds.items()}
    return {
        "stages": [(stage, duration(value)) for stage, value in shown.items()],
        "together": duration(sum(value for value in shown.values() if value is not None)),
    }


def _paths(pictures: Pictures) -> dict[str, Any] | None:
    """Strips of the teacher's targets above those of the student's heads, image by image."""
    heads = len(pictures.heads)
    if not heads:
        return None
    sizes = [f"{head.shape[-2]}×{head.shape[-1]}" for head in pictures.heads]
    runs = [(size, sum(1 for _ in run)) for size, run in itertools.groupby(sizes)]
    return {
        "heads": heads,
        "times": pictures.times,
        "sizes": ", ".join(size if n == 1 else f"{n} of {size}" for size, n in runs),
        "width": min(58, 5 + 4 * heads),
        "pairs": [
            (
                _image(png_bytes(above), "the teacher's targets, from early to late"),
                _image(png_bytes(below), "the student's heads, from first to last"),
            )
            for above, below in zip(
                strips_of(pictures.trajectory), strips_of(pictures.heads), strict=True
            )
        ],
    }


def _classes(summary: Mapping[str, Any]) -> dict[str, Any] | None:
    """Each class's share as bars, beside the largest differences from the data in words."""
    given = summary.get("classes") or {}
    shares = {side: given[side] for side in SIDES if given.get(side)}
    if not shares:
        return None
    numbers = range(max(len(values) for values in shares.values()))
    names = [str(name) for name in summary.get("class_names") or numbers]
    largest = max(max(values) for values in shares.values()) or 1.0
    return {
        "words": class_words(shares, names),
        "sides": list(shares),
        "width": f"{0.55 * max(len(name) for name in names):.1f}",
        "groups": [
            (
                names[c],
                [
                    (side, f"{100 * values[c] / largest:.1f}%", f"{100 * values[c]:.1f}%")
                    for side, values in shares.items()
                ],
            )
            for c in numbers
        ],
    }


def _plain(value: Any) -> Any:
    """The same in JSON's types: numpy scalars and arrays unpacked, non-finite numbers None."""
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
