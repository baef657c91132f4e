"""metrics.jsonl and summary.json: read where they are whole, refused in a sentence where not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from advkd.files import CheckpointError
from advkd.report.inputs import read_metrics, read_summary
from advkd.report.page import write_report
from advkd.report.pictures import Pictures
from advkd.report.tables import QUALITY, final_table


def test_metrics_are_read_and_a_cut_line_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(path) == []
    path.write_text('{"stage": "distill", "step": 1}\n\n{"stage": "distill", "step": 2}\n{"sta')
    assert [line["step"] for line in read_metrics(path)] == [1, 2]
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl line 2 is not JSON"):
        read_metrics(path)
    path.write_text("[1]\n")
    with pytest.raises(CheckpointError, match="line 1 is not a JSON object"):
        read_metrics(path)
    path.write_text('{"step": 1}\n' + "[" * 100_000 + "\n")
    with pytest.raises(CheckpointError, match="line 2 is not JSON"):
        read_metrics(path)
    path.write_bytes(b'{"step": 1, "a": "\xff"}\n')
    with pytest.raises(CheckpointError, match="cannot be read: byte 18 is not UTF-8"):
        read_metrics(path)
    with pytest.raises(CheckpointError, match="cannot be read: it is not a file"):
        read_metrics(tmp_path)


GOOD: dict[str, Any] = {
    "fd": {"real": None, "teacher": 18.42, "student": 21},
    "texture_fd": {"real": 4, "teacher": {"mean": 20.5, "std": 0}, "student": None},
    "spectra": {"real": [3.5, -40], "teacher": [3.25, -38.5], "student": None},
    "classes": {"teacher": [0.5, 0.5], "student": [1, 0.0], "real": None},
    "class_names": ["bag", "coat"],
    "seconds": {"teacher": None, "distill": 3.0},
    "speed_up": None,
    "name": "it",
    "of a later version": [{}],
}


def test_a_summary_is_read(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    path.write_text(json.dumps(GOOD))
    assert read_summary(path) == GOOD
    with pytest.raises(CheckpointError, match=r"none\.json does not exist"):
        read_summary(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fd": [1, 2]}, r"fd=\[1, 2\] is not a number or {mean, std} for each side"),
        *(
            ({key: {"teacher": value}}, f"{key}=.* is not a number or {{mean, std}}")
            for key in [figure.key for figure in QUALITY]
            for value in ("3", True, [1.0], {}, {"mean": 1.0})
        ),
        *(
            ({"fd": {"student": {"mean": 1.0, "std": 0.5} | odd}}, "fd=.* is not a number or")
            for odd in (
                {"std": None},
                {"mean": None},
                {"mean": "1"},
                {"std": True},
                {"std": [0.5]},
                {"std": {"mean": 1.0, "std": 0.5}},
                {"mean": float("nan")},
                {"mean": 10**400},
                {"std": float("inf")},
                {"more": 1.0},
            )
        ),
        ({"ms_per_image": {"teacher": {"mean": 1.0, "std": 0.5}}}, "is not a number for each side"),
        ({"spectra": [3.5, -40.0]}, "spectra=.* is not a list of decibels for each side"),
        ({"spectra": {"nobody": [3.5]}}, "not a list of decibels"),
        ({"spectra": {"real": 3.5}}, "not a list of decibels"),
        ({"spectra": {"real": {"0": 3.5}}}, "not a list of decibels"),
        ({"spectra": {"real": [3.5, None]}}, "not a list of decibels"),
        ({"spectra": {"real": [3.5, "loud"]}}, "not a list of decibels"),
        ({"spectra": {"real": [3.5, True]}}, "not a list of decibels"),
        ({"spectra": {"real": [3.5, float("nan")]}}, "not a list of decibels"),
        ({"spectra": {"real": [3.5, 10**400]}}, "not a list of decibels"),
        ({"classes": [0.5, 0.5]}, "classes=.* is not a list of shares for each side"),
        ({"classes": {"teacher": [0.5, None]}}, "not a list of shares"),
        ({"classes": {"teacher": [0.5, "a"]}}, "not a list of shares"),
        ({"classes": {"teacher": [0.5, float("nan")]}}, "not a list of shares"),
        ({"classes": {"nobody": [0.5]}}, "not a list of shares"),
        ({"classes": {"teacher": [1.0], "real": [0.5, 0.5]}}, "not of equally many classes"),
        ({"class_names": ["bag"]}, "not of equally many classes"),
        ({"class_names": "bag"}, "class_names='bag' is not a list of names"),
        ({"seconds": {"teacher": "long"}}, "seconds=.* is not a number for each stage"),
        ({"speed_up": "x" * 500}, r"speed_up='x{59} is not a number"),
        ({"name": 3}, "name=3 is not text"),
    ],
)
def test_a_hostile_summary_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    path.write_text(json.dumps(GOOD | change))
    with pytest.raises(CheckpointError, match=rf"summary\.json: .*{message}"):
        read_summary(path)


def test_what_is_read_can_be_shown(tmp_path: Path) -> None:
    """Numbers of any size, and a summary in which every entry is empty or missing."""
    path, one = tmp_path / "summary.json", torch.zeros(1, 1, 4, 4)
    huge = {"teacher": 10**400, "student": 1e308, "real": float("nan")}
    wide = {side: {"mean": -1e308, "std": 1e308} for side in huge}
    spectra = {"real": [1e308, 1e308], "teacher": [10**25, 1], "student": []}
    none = dict.fromkeys(
        ("fd", "texture_fd", "classes", "spectra", "class_names", "seconds", "speed_up", "name")
    )
    numbers = {"fd": huge, "kid": wide, "texture_fd": wide, "parameters": huge, "spectra": spectra}
    for summary in (GOOD, GOOD | numbers, none, {}):
        path.write_text(json.dumps(summary))
        read = read_summary(path)
        final_table(read)
        write_report(tmp_path / "run", read, [], Pictures(one, one, None), "")
