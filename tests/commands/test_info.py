"""`advkd info` tells versions, the instruction set, and every op's backend."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from advkd import info, ops
from advkd.config import StudentConfig
from advkd.models.student import Student
from advkd.ops import _backend
from advkd.pretrained import save_student


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


def test_what_would_serve_a_run_on_a_device(capsys: pytest.CaptureFixture[str]) -> None:
    assert info.main(["--device", "cpu"]) == 0
    run = capsys.readouterr().out.split("a run on cpu:")[1]
    assert ("the C++ engine" in run) == (ops.extension is not None)
    assert info.main(["--device", "cuda:99"]) == 1
    assert "'cuda:99' does not exist" in capsys.readouterr().err


def test_a_missing_extension_is_explained(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_backend, "extension", None)
    monkeypatch.setattr(_backend, "extension_missing", "it was left out")
    info.main([])
    out = capsys.readouterr().out
    assert "none: it was left out" in out
    assert "fused, C++" not in out


@pytest.mark.skipif(ops.extension is None, reason="the C++ extension is not installed")
@pytest.mark.parametrize("name", ["zoo:fashion-mnist-unlabelled", "zoo:fashion-mnist-student"])
def test_a_plan_is_described(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert info.main(["--plan", name, "--batch", "2", "--time"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("convolution") and "7x7x" in line for line in lines)
    assert any(line.startswith("attention") for line in lines)
    assert any("GFLOP an image" in line for line in lines)
    assert any("GFLOP/s" in line for line in lines)


@pytest.mark.skipif(ops.extension is None, reason="the C++ extension is not installed")
@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("cat", "dog"), "2 classes: 0 cat, 1 dog"),
        (("cat\n", "d" * 100), f"2 classes: 0 cat\\n, 1 {'d' * 60}..."),
        (None, "2 classes without names"),
        (tuple(map(str, range(202))), "199 199, and 2 more"),
    ],
)
def test_a_networks_classes_are_named(
    names: tuple[str, ...] | None,
    words: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = StudentConfig(stages=(4, 8), widths=(8, 8), attention=(4,), groups=4)
    student = Student(config, 8, 1, num_classes=len(names or "ab"))
    student.class_names = names
    save_student(student, tmp_path)
    assert info.main(["--plan", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith(words)


def test_a_plan_of_nothing_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert info.main(["--plan", "zoo:nothing"]) == 1
    assert "the zoo has no 'nothing'" in capsys.readouterr().err


def test_unknown_options_are_refused() -> None:
    with pytest.raises(SystemExit):
        info.main(["--nonsense"])
