"""`advkd info` tells versions, the instruction set, and every op's backend."""

from __future__ import annotations

import pytest
import torch

from advkd import info, ops
from advkd.ops import _backend


def test_the_report_is_complete(capsys: pytest.CaptureFixture[str]) -> None:
    assert info.main([]) == 0
    out = capsys.readouterr().out
    assert torch.__version__.split("+")[0] in out
    for op, backend, reason in ops.describe():
        line = next(line for line in out.splitlines() if line.startswith(f"{op} "))
        assert backend in line
        assert reason in line
    if ops.extension is not None:
        assert ops.extension.isa() in out


def test_a_missing_extension_is_explained(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_backend, "extension", None)
    monkeypatch.setattr(_backend, "extension_missing", "it was left out")
    info.main([])
    out = capsys.readouterr().out
    assert "none: it was left out" in out
    assert "fused, C++" not in out


def test_unknown_options_are_refused() -> None:
    with pytest.raises(SystemExit):
        info.main(["--nonsense"])
