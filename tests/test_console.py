"""Progress in a log file: a line now and then, and none for what is short."""

from __future__ import annotations

import re
import time

import pytest

from advkd import console
from advkd.console import progress_bar


def test_a_log_file_has_a_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console, "LOG_SECONDS", 0.2)
    with progress_bar("distill", 40, done=10) as bar:
        for _ in range(30):
            time.sleep(0.02)
            bar.update()
            bar.set_postfix(rec="0.125")  # which draws a bar anew
    lines = capsys.readouterr().err.splitlines()
    assert 2 <= len(lines) <= 4
    form = r"advkd: distill, step \d\d of 40, \d\d:\d\d so far, \d\d:\d\d left, rec=0.125"
    assert all(re.fullmatch(form, line) for line in lines)
    with progress_bar("evaluate", 100, unit="%") as bar:
        time.sleep(0.25)
        bar.update(40)
    assert capsys.readouterr().err.startswith("advkd: evaluate, 40%, 00:00 so far, ")


def test_what_is_short_writes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("sample", 3, unit="pass") as bar:
        bar.update()
        bar.set_postfix(loss="1")
        bar.update(2)
    assert capsys.readouterr().err == ""
