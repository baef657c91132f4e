"""Tables as text: aligned, narrow, and whole on a terminal that lacks their characters."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest

from advkd.report.tables import final_table, quality_rows, quality_table, spell

SUMMARY: dict[str, Any] = {
    "fd": {"real": 3.213, "teacher": 18.42, "student": 21.31},
    "ms_per_image": {"teacher": 36.82, "student": 0.4018},
    "passes": {"teacher": 50, "student": 1},
    "parameters": {"teacher": 671489, "student": 412001},
    "speed_up": 91.64,
}
FIGURES: dict[str, Any] = {
    "fd": {"real": 1.23456, "student": 1234.5678},
    "kid": {"real": -0.000012345, "student": 0.5},
    "precision": {"real": 1.0, "student": 0.25},
    "recall": {"real": 0.5, "student": 0.0},
    "swd": {"real": 0.125, "student": None},
    "texture_fd": {"real": {"mean": 4.2, "std": 0.25}, "student": {"mean": 1234.5, "std": 10.25}},
    "texture_swd": {"real": 0.025, "student": {"mean": 0.0312, "std": 0.00149}},
    "spectrum": {"real": {"mean": 0.18, "std": 0.01}, "student": {"mean": 7.75, "std": 0.0}},
    "spectra": {"real": [1.0, -30.0], "student": [2.0, -20.0]},
    "classes": {"real": [0.25, 0.75], "student": None},
}


def test_final_table_aligns() -> None:
    lines = final_table(SUMMARY).split("\n")
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
    summary = SUMMARY | {"parameters": {"teacher": 113_673_219, "student": 98_765_432}}
    summary |= {"fd": {"real": 0.0, "teacher": 123456.7, "student": 1e-9}}
    assert all(len(line) < 80 for line in final_table(summary).split("\n"))
    spread = {side: {"mean": 123456.7, "std": 2345.6} for side in ("real", "teacher", "student")}
    lines = final_table(summary | {"fd": spread, "texture_fd": spread}, "ascii").split("\n")
    assert "123,457 +- 2,346" in lines[1] and all(len(line) < 80 for line in lines)


def test_quality_table() -> None:
    assert quality_table(FIGURES, ["bag", "coat"]).splitlines() == [
        "                          real          student",
        "FD ↓                         1            1,235",
        "KID ↓                    0.000            0.500",
        "Precision ↑               1.00             0.25",
        "Recall ↑                 0.500            0.000",
        "SWD ↓                    0.125                –",
        "Texture FD ↓             4 ± 0       1,234 ± 10",
        "Texture SWD ↓           0.0250  0.0312 ± 0.0015",
        "Spectrum ↓         0.18 ± 0.01      7.75 ± 0.00",
        "bag, %                    25.0                –",
        "coat, %                   75.0                –",
    ]
    autoencoder = FIGURES | {"classes": {"real": None, "student": None}}
    assert len(quality_table(autoencoder).splitlines()) == 9


def test_a_missing_spread_is_left_out() -> None:
    sides = {"real": {"mean": 3.25, "std": math.nan}, "teacher": {"mean": None, "std": 1.0}}
    cells = quality_rows({"fd": sides | {"student": {"mean": 20.0, "std": 1.5}}})[0].cells
    assert cells == {"real": "3.25", "teacher": "–", "student": "20.00 ± 1.50"}


def test_final_table_has_the_texture_where_the_summary_has() -> None:
    texture = {"texture_fd": FIGURES["texture_fd"]}
    assert "Texture" not in final_table(SUMMARY)
    row = final_table(SUMMARY | texture).split("\n")[2]
    assert row.split() == ["Texture", "FD", "4", "±", "0", "–", "1,234", "±", "10"]


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "cp437", "utf-8", "utf-16"])
def test_no_terminal_loses_a_figure(encoding: str) -> None:
    names = ["bag", "帽子"]
    whole = quality_table(FIGURES, names), final_table(SUMMARY)
    shown = quality_table(FIGURES, names, encoding), final_table(SUMMARY, encoding)
    for unlimited, limited in zip(whole, shown, strict=True):
        assert limited.encode(encoding).decode(encoding) == limited
        lines = limited.split("\n")
        assert len({len(line) for line in lines}) == 1  # still aligned
        for before, after in zip(unlimited.split("\n"), lines, strict=True):
            assert after.split() == spell(before, encoding).split()
    assert (shown == whole) == encoding.startswith("utf")


def test_ascii_says_in_words_what_signs_say() -> None:
    table = quality_table(FIGURES, ["bag", "caf\u00e9"], "ascii")
    assert table.splitlines() == [
        "                                           real           student",
        "FD (lower is better)                          1             1,235",
        "KID (lower is better)                     0.000             0.500",
        "Precision (higher is better)               1.00              0.25",
        "Recall (higher is better)                 0.500             0.000",
        "SWD (lower is better)                     0.125                 -",
        "Texture FD (lower is better)             4 +- 0       1,234 +- 10",
        "Texture SWD (lower is better)            0.0250  0.0312 +- 0.0015",
        "Spectrum (lower is better)         0.18 +- 0.01      7.75 +- 0.00",
        "bag, %                                     25.0                 -",
        "cafe, %                                    75.0                 -",
    ]
    assert "1x" in final_table(SUMMARY, "ascii") and "Frechet" in final_table(SUMMARY, "ascii")
    latin = final_table(SUMMARY, "latin-1")
    assert latin == final_table(SUMMARY).replace("–", "-")  # it has × and é


def test_spelling_escapes_what_has_no_word() -> None:
    assert spell("a\udcff帽", "utf-8") == "a\\udcff帽"
    assert spell("a帽", "latin-1") == "a\\u5e3d"
    assert spell("a帽", None) == "a帽"
