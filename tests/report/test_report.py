"""The report: its files, the page, what it says and what it leaves out."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import math
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from markupsafe import escape
from matplotlib.figure import Figure
from PIL import Image

from advkd.deploy.page import POLICY, packed, section
from advkd.report.charts import LIGHT, _draw, spectrum_panel
from advkd.report.page import write_report
from advkd.report.pictures import Pictures

POWER = "Power, in dB"  # the chart of spectra
NASTY = '<script>alert("x")</script> & <img src=x onerror=y>'


def some_summary() -> dict[str, Any]:
    return {
        "name": "fashion-mnist",
        "fd": {"real": 3.213, "teacher": 18.42, "student": 21.31},
        "kid": {"real": -0.00004, "teacher": 0.0132, "student": 0.0171},
        "precision": {"real": 0.842, "teacher": 0.861, "student": 0.871},
        "recall": {"real": 0.85, "teacher": 0.772, "student": 0.701},
        "swd": {"real": 0.021, "teacher": 0.0412, "student": 0.0433},
        "texture_fd": {
            "real": {"mean": 4.2, "std": 0.3},
            "teacher": {"mean": 61.5, "std": 1.25},
            "student": {"mean": 74.6, "std": 2.5},
        },
        "texture_swd": {"real": 0.0241, "teacher": 0.0312, "student": 0.0407},
        "spectrum": {"real": 0.18, "teacher": 1.25, "student": 2.125},
        "ms_per_image": {"teacher": 36.82, "student": 0.4018},
        "passes": {"teacher": 50, "student": 1},
        "parameters": {"teacher": 671489, "student": 412001},
        "classes": {"real": [0.5, 0.5], "teacher": [0.45, 0.55], "student": [0.62, 0.38]},
        "spectra": {"real": [9.0, -30.0], "teacher": [9.5, -28.0], "student": [9.25, -20.0]},
        "protocol": "2,000 samples against 2,000 held-out images.",
        "features": "the small classifier",
        "speed_up": 91.64,
        "seconds": {"trajectories": 341.2, "distill": 4021.0},
        "student_family": "unet",
        "teacher_steps": 50,
    }


def some_metrics() -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = [
        {"stage": "teacher", "step": step, "loss": 1.0 / step} for step in range(1, 40)
    ]
    for step in range(1, 40):
        lines.append(
            {"stage": "distill", "step": step, "loss_d": 1.4, "rec_1": 0.3 / step, "rec_2": 0.2}
            | {"logit_gap_1": 0.1, "logit_gap_2": -0.2, "adv_1": 0.7, "adv_2": 0.8}
        )
    return lines


def some_pictures(channels: int = 1, size: int = 8, n: int = 13, m: int = 2) -> Pictures:
    generator = torch.Generator().manual_seed(0)

    def images(count: int, side: int) -> torch.Tensor:
        return torch.rand(count, channels, side, side, generator=generator) * 2 - 1

    targets = [images(m, size // 2), images(m, size)]
    heads = [images(m, size // 2), images(m, size)]
    return Pictures(images(n, size), images(n, size), images(n + 3, size), targets, heads, (500, 0))


class Page(HTMLParser):
    """Collects tags, their attributes and the visible text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report.html of a run that has everything."""
    folder = tmp_path_factory.mktemp("run")
    path = write_report(folder, some_summary(), some_metrics(), some_pictures(), "key = 7")
    assert path == folder / "report" / "report.html"
    return path


def test_report_writes_its_files(page: Path) -> None:
    names = {file.name for file in page.parent.iterdir()}
    assert names == {
        "grid.png",
        "loss_curves.png",
        "report.html",
        "summary.json",
        "trajectory.png",
    }
    assert json.loads((page.parent / "summary.json").read_text()) == some_summary()
    with Image.open(page.parent / "grid.png") as grid:
        # three grids of 2 rows and 6 columns, each tile 8 pixels taken 12 times
        assert grid.width >= 3 * 6 * 96 and grid.height >= 2 * 96
    with Image.open(page.parent / "trajectory.png") as sheet:
        assert sheet.width >= 2 * 96 and sheet.height >= 2 * 2 * 96


def test_page_is_self_contained(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert "{{" not in text and "{%" not in text
    assert "http:" not in text and "https:" not in text and "url(" not in text
    parsed = Page(text)
    used = {tag for tag, _ in parsed.tags}
    assert not used & {"script", "link", "iframe", "object", "embed", "base", "form"}
    sources = [
        attributes[key]
        for _, attributes in parsed.tags
        for key in ("src", "srcset", "href")
        if key in attributes
    ]
    prefix = "data:image/png;base64,"
    assert len(sources) >= 3 + 2 * 2 + 2 * 6  # grids, strips, charts for light and dark
    for source in sources:
        assert source is not None and source.startswith(prefix)
        with Image.open(io.BytesIO(base64.b64decode(source[len(prefix) :]))) as image:
            image.verify()
    images = [attributes for tag, attributes in parsed.tags if tag == "img"]
    assert all(image["alt"] for image in images)
    assert "viewport" in text and "prefers-color-scheme" in text and "@media print" in text


def test_page_says_what_the_summary_holds(page: Path) -> None:
    text = Page(page.read_text(encoding="utf-8")).text
    for said in ("21.31", "18.42", "3.21", "91.6×", "412,001", "5 min 41 s", "1 h 07 min"):
        assert said in text
    for said in ("4.20 ± 0.30", "61.50 ± 1.25", "74.60 ± 2.50", "Texture SWD", "Spectrum"):
        assert said in text
    for said in ("key = 7", "2,000 held-out images.", "the small classifier", "62.0%"):
        assert said in text
    assert "1.19 times as far away as the teacher" in text  # (21.31 - 3.213) / (18.42 - 3.213)
    assert re.search(r"5\.0 points for the teacher .* and 12\.0 points for the student", text)


def test_the_student_runs_on_the_page(tmp_path: Path) -> None:
    model = b"a model file"
    path = write_report(tmp_path, some_summary(), [], some_pictures(), "", model)
    text = path.read_text(encoding="utf-8")
    assert "http:" not in text and "https:" not in text and "url(" not in text
    part = section(model, str(tmp_path / "student"))
    assert part.html in text and part.style in text and f'content="{escape(part.policy)}"' in text
    assert packed(model) in part.html
    page = Page(text)
    assert [a["type"] for tag, a in page.tags if tag == "script"] == ["text/plain"] * 3 + ["module"]


def test_a_student_that_cannot_run_on_the_page_is_told(tmp_path: Path) -> None:
    path = write_report(tmp_path, some_summary(), [], some_pictures(), "", f"of {NASTY}")
    text = path.read_text(encoding="utf-8")
    assert f"The student cannot run on this page: of {NASTY}." in Page(text).text
    assert "<script" not in text and f'content="{escape(POLICY)}"' in text


def test_all_text_is_escaped(tmp_path: Path) -> None:
    summary = some_summary() | {
        "name": NASTY,
        "protocol": NASTY,
        "features": "f" + NASTY,
        "student_family": NASTY,
        "class_names": [NASTY, "bag"],
        "seconds": {NASTY: 3.0},
    }
    path = write_report(tmp_path, summary, [], some_pictures(), NASTY)
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert "<script" not in text.lower()
    assert not any("onerror" in attributes for _, attributes in page.tags)
    # title, h1, lead, protocol, features, settings, and the class in bars and words
    assert page.text.count('alert("x")') >= 8


def test_a_file_name_that_is_not_text_is_shown(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9")
    summary = some_summary() | {"protocol": f"held-out images of {name}"}
    path = write_report(tmp_path, summary, [], some_pictures(), f'path = "{name}"')
    text = Page(path.read_text(encoding="utf-8")).text
    assert text.count("caf\\udce9") == 2


def test_missing_values_are_dashes(tmp_path: Path) -> None:
    one = torch.zeros(1, 3, 4, 4)
    summary = {
        "fd": {"teacher": math.nan, "student": np.float32(7.5)},
        "kid": None,
        "classes": None,
        "ms_per_image": {"teacher": None, "student": math.inf},
        "speed_up": None,
    }
    path = write_report(tmp_path, summary, [], Pictures(one, one, None), "")
    stored = json.loads((path.parent / "summary.json").read_text())
    assert stored["fd"] == {"teacher": None, "student": 7.5}
    assert stored["ms_per_image"]["student"] is None
    text = Page(path.read_text(encoding="utf-8")).text
    assert re.search(r"\bnan\b|\binf\b|None", text) is None
    assert text.count("–") >= 10
    assert {file.name for file in path.parent.iterdir()} == {
        "grid.png",
        "report.html",
        "summary.json",
    }


def test_color_images_and_many_heads(tmp_path: Path) -> None:
    large = some_pictures(channels=3, size=160, n=4, m=1)
    heads = [large.heads[0]] * 11
    pictures = Pictures(large.teacher, large.student, None, heads, heads)
    metrics = [
        {"stage": "distill", "step": s, **{f"rec_{k}": 0.1 * k for k in range(1, 12)}}
        for s in range(3)
    ]
    path = write_report(tmp_path, some_summary(), metrics, pictures, "")
    with Image.open(path.parent / "grid.png") as grid:
        assert grid.mode == "RGB" and grid.width < 2 * 4 * 160  # large images shrink
    assert (path.parent / "loss_curves.png").exists()


def test_spectra_are_drawn_where_there_are_any(page: Path, tmp_path: Path) -> None:
    parsed = Page(page.read_text(encoding="utf-8"))
    charts = [attributes for _, attributes in parsed.tags if attributes.get("alt") == POWER]
    assert len(charts) == 1 and "a grain that they lack" in parsed.text
    nothing: dict[str, Any] = {"real": [], "teacher": None, "student": [1.0, 1e300]}
    for spectra in (None, {}, nothing):
        summary = some_summary() | {"spectra": spectra}
        path = write_report(tmp_path, summary, [], some_pictures(), "")
        assert POWER not in path.read_text(encoding="utf-8")


def test_the_panel_of_spectra() -> None:
    """Decibels are logarithms: their axis is linear, though they may span a factor of ten."""
    given = {"teacher": [20, 15, 1], "student": [25, 1], "real": [30.0, 20.5, 1.25, 0.5]}
    panel = spectrum_panel(given)
    assert panel is not None and panel.title == POWER
    assert [curve.label for curve in panel.curves] == ["real", "teacher", "student"]
    for curve in panel.curves:
        assert curve.steps.tolist() == [*range(1, len(given[curve.label]) + 1)]
        assert curve.values.tolist() == given[curve.label]
    figure = Figure()
    _draw(figure.add_subplot(), panel, LIGHT)
    axes = figure.axes[0]
    assert axes.get_yscale() == "linear" and axes.get_xlabel() == "periods a side"
    of_steps = dataclasses.replace(panel, linear=False)
    _draw(figure.add_subplot(), of_steps, LIGHT)
    assert figure.axes[1].get_yscale() == "log"
    large = spectrum_panel({"real": [2**90, 1]})  # an integer, but no int64
    assert large is not None and large.curves[0].values.tolist() == [2.0**90, 1.0]


def test_curves_pass_over_what_is_not_finite(tmp_path: Path) -> None:
    metrics: list[dict[str, Any]] = [
        {"stage": "distill", "step": 1, "loss_d": math.nan, "logit_gap_1": None},
        {
            "stage": "distill",
            "step": 2,
            "logit_gap_1": "wide",
            "rec_0": 1.0,
            "rec_x": 1.0,
            "rec_": 1.0,
        },
        {"stage": "distill", "step": "3", "rec_1": 1.0, "rec_2": 10**400, "adv_1": 1e300},
        {"stage": "distill", "step": 10**400, "rec_1": 1.0},
        {"stage": ["teacher"], "step": 1, "loss": 2.0},
        {"stage": "teacher", "loss": 2.0},
    ]
    path = write_report(tmp_path, some_summary(), metrics, some_pictures(), "")
    assert not (path.parent / "loss_curves.png").exists()
    assert "Training" not in Page(path.read_text(encoding="utf-8")).text
    metrics.append({"stage": "distill", "step": 3, "logit_gap_1": 0.5})
    write_report(tmp_path, some_summary(), metrics, some_pictures(), "")
    assert (path.parent / "loss_curves.png").exists()
