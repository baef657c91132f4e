"""The programs of docs/deployment.md, compiled and run as they stand there."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from advkd.api import generate, load_student
from advkd.deploy.model_file import model_bytes

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "deployment.md").read_text()


def blocks(language: str) -> list[str]:
    """The code blocks of a language."""
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


@pytest.mark.skipif(shutil.which("cmake") is None, reason="cmake is not installed")
def test_the_program_in_c(tmp_path: Path) -> None:
    student = load_student("zoo:fashion-mnist-student")
    (tmp_path / "student.advkd").write_bytes(model_bytes(student))
    (program,) = blocks("c")
    (tmp_path / "main.c").write_text(program)
    build, prefix = tmp_path / "build", tmp_path / "installed"
    for command in (
        ["cmake", "-S", str(ROOT / "csrc"), "-B", str(build), "-DADVKD_ISAS=portable"],
        ["cmake", "--build", str(build), "--parallel", "2"],
        ["cmake", "--install", str(build), "--prefix", str(prefix)],
        ["sh", "-c", f"cc -std=c99 -Wall -Werror main.c -I{prefix}/include -o main "
         f"$(find {prefix} -name libadvkd.a) -lstdc++ -lm"],
    ):  # fmt: skip
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    made = subprocess.run(["./main"], cwd=tmp_path, capture_output=True, check=True).stdout
    head, pixels = made.split(b"\n", 1)
    assert head == b"P5 28 28 255"
    expected = (generate(student, 1, seed=7)[0, 0].numpy() + 1) * 127.5
    found = np.frombuffer(pixels, np.uint8).reshape(28, 28)
    assert np.abs(found - expected).max() <= 0.51
    assert found.std() > 10
