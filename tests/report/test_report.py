"""The report: pictures, the page, the closing table."""

from __future__ import annotations

import base64
import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from advkd.report.page import final_table, save_png, write_report
from advkd.report.pictures import Pictures, image_grid, read_metrics

NASTY = '<script>alert("x")</script> & <img src=x onerror=y>'


def some_summary() -> dict[str, Any]:
    return {
        "name": "fashion-mnist",
        "fd": {"real": 3.213, "teacher": 18.42, "student": 21.31},
        "kid": {"real": -0.00004, "teacher": 0.0132, "student": 0.0171},
        "precision": {"real": 0.842, "teacher": 0.861, "student": 0.871},
        "recall": {"real": 0.85, "teacher": 0.772, "student": 0.701},
        "swd": {"real": 0.021, "teacher": 0.0412, "student": 0.0433},
        "ms_per_image": {"teacher": 36.82, "student": 0.4018},
        "passes": {"teacher": 50, "student": 1},
        "parameters": {"teacher": 671489, "student": 412001},
        "classes": {"real": [0.5, 0.5], "teacher": [0.45, 0.55], "student": [0.62, 0.38]},
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
            | {"margin_1": 0.1, "margin_2": -0.2, "adv_1": 0.7, "adv_2": 0.8}
        )
    return lines


def some_pictures(channels: int = 1, size: int = 8, n: int = 13, m: int = 2) -> Pictures:
    generator = torch.Generator().manual_seed(0)

    def draw(count: int, side: int) -> torch.Tensor:
        return torch.rand(count, channels, side, side, generator=generator) * 2 - 1

    kept = [draw(m, size // 2), draw(m, size)]
    heads = [draw(m, size // 2), draw(m, size)]
    return Pictures(draw(n, size), draw(n, size), draw(n + 3, size), kept, heads, (500, 0))


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


def test_grid_places_images_row_by_row() -> None:
    images = torch.stack([torch.full((1, 2, 3), value) for value in (-1.0, 0.0, 1.0)])
    grid = image_grid(images, columns=2, scale=2)
    assert grid.dtype == np.uint8 and grid.shape == (8, 12)
    corners = [grid[0, 0], grid[3, 11], grid[4, 0], grid[7, 11]]
    assert corners == [0, 128, 255, 0]  # the last place has no image and is black
    for image, place in zip(images, [(0, 0), (0, 6), (4, 0)], strict=True):
        tile = grid[place[0] : place[0] + 4, place[1] : place[1] + 6]
        assert (tile == tile[0, 0]).all() and tile[0, 0] == round(
            (image[0, 0, 0].item() + 1) * 127.5
        )


def test_grid_keeps_colours_and_orientation() -> None:
    image = torch.full((1, 3, 2, 2), -1.0)
    image[0, 0, 0, 1] = 1.0  # red, top right
    image[0, 2, 1, 0] = 5.0  # blue, bottom left, beyond the range
    grid = image_grid(image.contiguous(memory_format=torch.channels_last), 1)
    assert grid.tolist() == [[[0, 0, 0], [255, 0, 0]], [[0, 0, 255], [0, 0, 0]]]


@pytest.mark.parametrize(
    ("images", "columns", "scale", "words"),
    [
        (torch.zeros(1, 2, 4, 4), 1, 1, r"\(1, 2, 4, 4\)"),
        (torch.zeros(4, 4), 1, 1, "a grid needs images"),
        (torch.zeros(0, 1, 4, 4), 1, 1, "a grid needs images"),
        (torch.zeros(1, 1, 4, 4), 0, 1, "columns=0"),
        (torch.zeros(1, 1, 4, 4), 1, 0, "scale=0"),
        (torch.full((1, 1, 4, 4), math.nan), 1, 1, "not finite"),
    ],
)
def test_grid_refuses(images: torch.Tensor, columns: int, scale: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        image_grid(images, columns, scale)


def test_png_holds_the_pixels(tmp_path: Path) -> None:
    for shape in ((5, 7), (5, 7, 3)):
        grid = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
        save_png(tmp_path / "new" / "grid.png", grid)
        with Image.open(tmp_path / "new" / "grid.png") as image:
            assert np.array_equal(np.asarray(image), grid)
    with pytest.raises(ValueError, match="float64"):
        save_png(tmp_path / "grid.png", np.zeros((5, 7)))
    assert not (tmp_path / "grid.png").exists()


def test_pictures_must_pair() -> None:
    one = torch.zeros(1, 1, 4, 4)
    with pytest.raises(ValueError, match="2 kept targets do not pair with 1 heads"):
        Pictures(one, one, one, [one, one], [one])
    with pytest.raises(ValueError, match="2 times do not pair with 1 heads"):
        Pictures(one, one, one, [one], [one], (5, 0))


def test_report_writes_its_files(tmp_path: Path) -> None:
    page = write_report(tmp_path, some_summary(), some_metrics(), some_pictures(), "a = 1")
    assert page == tmp_path / "report" / "report.html"
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


def test_page_is_self_contained(tmp_path: Path) -> None:
    path = write_report(tmp_path, some_summary(), some_metrics(), some_pictures(), "a = 1")
    text = path.read_text(encoding="utf-8")
    assert "http:" not in text and "https:" not in text and "url(" not in text
    page = Page(text)
    used = {tag for tag, _ in page.tags}
    assert not used & {"script", "link", "iframe", "object", "embed", "base", "form"}
    sources = [
        attributes[key]
        for _, attributes in page.tags
        for key in ("src", "srcset", "href")
        if key in attributes
    ]
    prefix = "data:image/png;base64,"
    assert len(sources) >= 3 + 2 * 2 + 2 * 5  # grids, strips, charts for light and dark
    for source in sources:
        assert source is not None and source.startswith(prefix)
        with Image.open(io.BytesIO(base64.b64decode(source[len(prefix) :]))) as image:
            image.verify()
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert all(image["alt"] for image in images)
    assert "viewport" in text and "prefers-color-scheme" in text and "@media print" in text


def test_page_says_what_the_summary_holds(tmp_path: Path) -> None:
    path = write_report(tmp_path, some_summary(), some_metrics(), some_pictures(), "key = 7")
    text = Page(path.read_text(encoding="utf-8")).text
    for said in ("21.31", "18.42", "3.21", "91.6×", "412,001", "5 min 41 s", "1 h 07 min"):
        assert said in text
    for said in ("key = 7", "2,000 held-out images.", "the small classifier", "62.0%"):
        assert said in text
    assert "1.19 times as far away as the teacher" in text  # (21.31 - 3.213) / (18.42 - 3.213)
    assert re.search(r"5\.0 points for the teacher .* and 12\.0 points for the student", text)


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


def test_colour_images_and_many_heads(tmp_path: Path) -> None:
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


def test_curves_pass_over_what_is_not_finite(tmp_path: Path) -> None:
    metrics: list[dict[str, Any]] = [
        {"stage": "distill", "step": 1, "loss_d": math.nan, "margin": None},
        {"stage": "distill", "step": 2, "margin": "wide"},
        {"stage": "teacher", "loss": 2.0},
    ]
    path = write_report(tmp_path, some_summary(), metrics, some_pictures(), "")
    assert not (path.parent / "loss_curves.png").exists()
    assert "Training" not in Page(path.read_text(encoding="utf-8")).text
    metrics.append({"stage": "distill", "step": 3, "margin": 0.5})
    write_report(tmp_path, some_summary(), metrics, some_pictures(), "")
    assert (path.parent / "loss_curves.png").exists()


def test_final_table_aligns() -> None:
    lines = final_table(some_summary()).split("\n")
    assert lines[0].split() == ["real", "teacher", "student"]
    assert lines[1].split()[-3:] == ["3.21", "18.42", "21.31"]
    assert [line.split()[-2:] for line in lines[2:]] == [
        ["50", "1"],
        ["36.8", "0.402"],
        ["671,489", "412,001"],
        ["1×", "91.6×"],
    ]
    assert len({len(line) for line in lines}) == 1 and len(lines[0]) < 80


def test_final_table_without_real_or_values() -> None:
    table = final_table({"fd": {"teacher": 5.0, "student": None}, "speed_up": math.nan})
    assert "real" not in table
    assert re.search(r"FD\) +5\.000 +–$", table, re.MULTILINE)
    assert all(len(line) < 80 for line in final_table({}).split("\n"))


def test_final_table_stays_narrow_with_large_numbers() -> None:
    summary = some_summary() | {"parameters": {"teacher": 113_673_219, "student": 98_765_432}}
    summary["fd"] = {"real": 0.0, "teacher": 123456.7, "student": 1e-9}
    assert all(len(line) < 80 for line in final_table(summary).split("\n"))


def test_metrics_are_read_and_a_cut_line_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(path) == []
    path.write_text('{"stage": "distill", "step": 1}\n\n{"stage": "distill", "step": 2}\n{"sta')
    assert [line["step"] for line in read_metrics(path)] == [1, 2]
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl line 2 is not JSON"):
        read_metrics(path)
    path.write_text("[1]\n")
    with pytest.raises(ValueError, match="line 1 is not a JSON object"):
        read_metrics(path)
