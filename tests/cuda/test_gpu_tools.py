"""What tests/gpu does without a GPU: it collects its tests, and its commands are well-formed."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
# Each argument of a call on a line, the calls apart by empty lines.
RECORDER = """#!/bin/sh
for argument in "$@"; do echo "$argument"; done >> "$CALLS"
echo >> "$CALLS"
"""


def recorded_calls(tmp_path: Path) -> list[list[str]]:
    """The arguments of each call that compute_sanitizer.sh makes of compute-sanitizer."""
    command, calls = tmp_path / "compute-sanitizer", tmp_path / "calls"
    command.write_text(RECORDER)
    command.chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "CALLS": str(calls),
        "PYTHON": sys.executable,
    }  # fmt: skip
    script = ROOT / "tests" / "gpu" / "compute_sanitizer.sh"
    subprocess.run(["bash", str(script)], env=os.environ | environment, check=True)
    return [call.splitlines() for call in calls.read_text().split("\n\n") if call]


def test_compute_sanitizer_is_asked_for_our_kernels_alone(tmp_path: Path) -> None:
    """Its filters are pairs of key and value; a name that no kernel has would check nothing."""
    calls = recorded_calls(tmp_path)
    tools = [call[call.index("--tool") + 1] for call in calls]
    assert sorted(tools) == ["initcheck", "memcheck", "racecheck", "synccheck"]
    source = (ROOT / "csrc" / "cuda" / "sampling_step.cu").read_text()
    for tool, call in zip(tools, calls, strict=True):
        filters = [call[i + 1] for i, word in enumerate(call) if word.startswith("--kernel-name")]
        # Memory written by kernels that are not checked would count as uninitialized.
        assert len(filters) == (0 if tool == "initcheck" else 2)
        for key, name in (each.split("=", 1) for each in filters):
            assert key == "kernel_substring"
            assert f" {name}(" in source
        file, test = call[-1].split("::")
        assert f"def {test}(" in (ROOT / file).read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_there_is_a_report_of_what_would_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    program = importlib.import_module("tests.gpu.__main__")
    monkeypatch.setattr(program, "TESTS", "tests/gpu")  # all of them take long to collect
    report = tmp_path / "gpu-report.md"
    assert program.main(["--out", str(report)]) == 2
    text = report.read_text()
    assert "Nothing ran: torch sees no CUDA device." in text
    assert "## Tests: collected" in text
    assert "test_training.py::" in text and "tests collected" in text
