"""What wheels.py refuses: libraries that ask more of a system than their wheel's name says."""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

import pytest

from advkd.ops import extension

sys.path.insert(0, str(Path(__file__).resolve().parent))
import wheels

if extension is None or sys.platform != "linux":
    pytest.skip("the C++ extension is not installed", allow_module_level=True)


def _wheel(path: Path, library: bytes, machine: str) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"advkd/_C.cpython-311-{machine}-linux-gnu.so", library)
        tag = f"Tag: cp311-cp311-manylinux_2_17_{machine}\n"
        archive.writestr("advkd-0.dist-info/WHEEL", tag)
    return path


@pytest.fixture
def content() -> bytes:
    assert extension is not None and extension.__file__ is not None
    return Path(extension.__file__).read_bytes()


def test_what_is_read_of_a_library(content: bytes) -> None:
    library = wheels.library_of(content)
    assert library.machine in wheels.MACHINES.values()
    assert any(name.startswith("libc.so") for name in library.needed)
    assert any(version.startswith("GLIBC_2") for version in library.versions)
    assert {"PyInit__C", "advkd_generate"} <= {*library.exported}


def test_a_library_of_this_machine_is_refused(content: bytes, tmp_path: Path) -> None:
    """GCC links libstdc++, which a system may have too old."""
    found = wheels.problems(_wheel(tmp_path / "a.whl", content, "x86_64"), "x86_64")
    assert any(problem.startswith("it needs libstdc++") for problem in found)
    assert any(problem.startswith("it needs GLIBCXX") for problem in found)
    other = next(m for m, code in wheels.MACHINES.items() if code != wheels.library_of(content)[0])
    found = wheels.problems(_wheel(tmp_path / "b.whl", content, other), other)
    assert any("is for another machine" in problem for problem in found)


def test_a_tag_that_is_not_the_names(content: bytes, tmp_path: Path) -> None:
    wheel = tmp_path / "a.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("advkd/_C.cpython-311-x86_64-linux-gnu.so", content)
        archive.writestr("advkd-0.dist-info/WHEEL", "Tag: cp311-cp311-linux_x86_64\n")
    assert "it is not tagged as it is named" in wheels.problems(wheel, "x86_64")
