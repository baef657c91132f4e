"""Students that `advkd sample` runs without torch: when, and that nobody can tell by the files."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import advkd.sample
import advkd.sample_network
from advkd.config import StudentConfig
from advkd.deploy import prepared
from advkd.models.student import Student
from advkd.ops import extension
from advkd.pretrained import save_student
from advkd.sample import main

if extension is None:
    pytest.skip("the C++ extension is not installed", allow_module_level=True)

CONFIG = StudentConfig(stages=(4, 8), widths=(8, 8), attention=(4,), groups=4)
LAST_SEED = (1 << 64) - 1


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ADVKD_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("ADVKD_OPS", raising=False)
    monkeypatch.setattr(advkd.sample, "has_gpu_driver", lambda: False)
    return tmp_path / "cache" / "students"


@pytest.fixture
def ways(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What each call of the command sampled by."""
    seen: list[str] = []
    opened = advkd.sample._opened

    def watched(args: Any) -> Any:
        source = opened(args)
        seen.append(type(source).__name__)
        return source

    monkeypatch.setattr(advkd.sample, "_opened", watched)
    return seen


BY_TORCH, PREPARED = "SampledNetwork", "Prepared"


def _student(folder: Path, seed: int = 0, **settings: Any) -> str:
    torch.manual_seed(seed)
    save_student(Student(CONFIG, 8, settings.pop("channels", 1), **settings), folder)
    return str(folder)


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--num", "1", "--seed", str(LAST_SEED)],
        ["--num", "3", "--first", str((1 << 63) - 5)],
        ["--num", "70", "--first", "9", "--threads", "2"],
        ["--num", "5", "--exit-at", "1"],
        ["--num", "2", "--exit-at", "2", "--device", "cpu"],
        ["--num", "4", "--class", "2"],
    ],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_files_are_the_same_to_the_byte(
    options: list[str],
    channels: int,
    ways: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = _student(tmp_path / "student", channels=channels, num_classes=3)
    written = []
    for _ in range(2):
        png, npz = tmp_path / "grid.png", tmp_path / "images.npz"
        assert main(["--student", folder, *options, "--out", str(png), "--npz", str(npz)]) == 0
        said = capsys.readouterr()
        assert said.err == ""
        with np.load(npz, allow_pickle=False) as archive:
            arrays = {name: (array.dtype, array.tobytes()) for name, array in archive.items()}
        written.append((png.read_bytes(), arrays, said.out.partition(" in ")[0]))
    assert ways == [BY_TORCH, PREPARED]
    assert written[0] == written[1]


@pytest.mark.parametrize(
    "options",
    [
        ["--num", "1"],
        ["--num", "7", "--seed", str(LAST_SEED), "--first", "5"],
        ["--num", "5", "--exit-at", "1"],
        ["--num", "4", "--class", "2"],
        ["--num", "1100"],  # by numpy
    ],
)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("num_classes", [None, 3])
def test_a_grid_alone_is_the_same_to_the_byte(
    options: list[str],
    channels: int,
    num_classes: int | None,
    ways: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if num_classes is None and "--class" in options:
        pytest.skip("there are no classes")
    folder = _student(tmp_path / "student", channels=channels, num_classes=num_classes)
    written = []
    for _ in range(2):
        png = tmp_path / "grid.png"
        assert main(["--student", folder, *options, "--out", str(png)]) == 0
        written.append((png.read_bytes(), capsys.readouterr().out.partition(" in ")[0]))
    assert ways == [BY_TORCH, PREPARED]
    assert written[0] == written[1]


@pytest.mark.parametrize("exit_at", ["0", "3"])
def test_a_head_that_is_not_there(
    exit_at: str, ways: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, png = _student(tmp_path / "student"), str(tmp_path / "grid.png")
    arguments = ["--student", folder, "--num", "1", "--out", png]
    assert main(arguments) == 0
    assert main([*arguments, "--exit-at", exit_at]) == 1
    assert f"exit_at={exit_at}" in capsys.readouterr().err
    assert ways == [BY_TORCH, PREPARED]


def test_unconditional(ways: list[str], tmp_path: Path) -> None:
    folder, npz = _student(tmp_path / "student"), tmp_path / "images.npz"
    images = []
    for _ in range(2):
        assert main(["--student", folder, "--num", "4", "--npz", str(npz)]) == 0
        with np.load(npz, allow_pickle=False) as archive:
            assert list(archive) == ["images"]
            images.append(archive["images"])
    assert ways == [BY_TORCH, PREPARED]
    np.testing.assert_array_equal(*images)


@pytest.mark.parametrize(
    "options",
    [
        ["--num", str((1 << 20) // 64 + 1)],
        ["--threads", "-1"],
        ["--dtype", "bfloat16", "--device", "cpu"],
        ["--device", "nowhere"],
    ],
)
def test_what_is_left_to_torch(options: list[str], ways: list[str], tmp_path: Path) -> None:
    folder, npz = _student(tmp_path / "student"), str(tmp_path / "images.npz")
    assert main(["--student", folder, "--num", "1", "--npz", npz]) == 0
    main(["--student", folder, "--npz", npz, *options])
    assert PREPARED not in ways


def test_the_reference_is_left_to_torch(
    ways: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--student", _student(tmp_path / "student"), "--npz", str(tmp_path / "i.npz")]
    assert main(arguments) == 0
    monkeypatch.setenv("ADVKD_OPS", "reference")
    assert main(arguments) == 0
    monkeypatch.setattr(advkd.sample, "has_gpu_driver", lambda: True)
    monkeypatch.setenv("ADVKD_OPS", "")
    assert main(arguments) == 0
    assert main([*arguments, "--device", "cpu"]) == 0
    assert ways == [BY_TORCH, BY_TORCH, BY_TORCH, PREPARED]


def test_the_last_head_of_noisy_states_by_its_number(ways: list[str], tmp_path: Path) -> None:
    folder, npz = _student(tmp_path / "student", target="state"), str(tmp_path / "images.npz")
    for options in ([], [], ["--exit-at", "2"]):
        assert main(["--student", folder, "--num", "2", "--npz", npz, *options]) == 0
    assert ways == [BY_TORCH, PREPARED, BY_TORCH]


def test_other_content_is_another_student(ways: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "student"
    arguments = ["--student", str(folder), "--num", "1", "--npz", str(tmp_path / "images.npz")]
    for seed in (0, 1):
        _student(folder, seed)
        assert main(arguments) == 0
    config = folder / "config.json"
    config.write_text(config.read_text() + "\n")
    assert main(arguments) == 0
    assert main(arguments) == 0
    assert ways == [BY_TORCH, BY_TORCH, BY_TORCH, PREPARED]


def test_a_damaged_file_is_made_again(ways: list[str], cache: Path, tmp_path: Path) -> None:
    folder, npz = _student(tmp_path / "student"), str(tmp_path / "images.npz")
    assert main(["--student", folder, "--npz", npz]) == 0
    (entry,) = cache.iterdir()
    content = entry.read_bytes()
    entry.write_bytes(content[:-1])
    assert main(["--student", folder, "--npz", npz]) == 0
    assert ways == [BY_TORCH, BY_TORCH]
    assert entry.read_bytes() == content


def test_without_a_place_to_keep_it(
    ways: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("ADVKD_CACHE", str(tmp_path / "file"))
    folder, npz = _student(tmp_path / "student"), str(tmp_path / "images.npz")
    for _ in range(2):
        assert main(["--student", folder, "--npz", npz]) == 0
    assert ways == [BY_TORCH, BY_TORCH]


def test_what_was_used_longest_ago_goes(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepared, "ENTRIES", 2)
    for name in ("a", "b"):
        prepared.keep(name, b"no model")
        os.utime(cache / f"{name}.advkd", (ord(name), ord(name)))
    prepared.keep("c", b"no model")
    assert sorted(path.stem for path in cache.iterdir()) == ["b", "c"]


def test_large_weights_are_not_kept(
    ways: list[str], cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepared, "MOST_BYTES", 1000)
    folder, npz = _student(tmp_path / "student"), str(tmp_path / "images.npz")
    assert main(["--student", folder, "--npz", npz]) == 0
    assert ways == [BY_TORCH] and not cache.exists()


def test_every_maker_of_a_model_file_counts() -> None:
    package = Path(advkd.sample.__file__).parent
    assert all((package / name).is_file() for name in prepared._MAKERS)
    source = (package / "deploy" / "model_file.py").read_text()
    for name in ("lowering", "networks", "plan"):
        assert f"advkd.engine.{name}" in source


# What is imported, which is what a start takes.


def _imported(code: str, *arguments: str) -> set[str]:
    """The modules that a fresh Python has imported after some code."""
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys; print(*sys.modules)", *arguments],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split())


COMPILER = {"torch._dynamo", "torch._inductor", "sympy"}


def test_what_importing_the_package_imports() -> None:
    modules = _imported("import advkd")
    assert not modules & {"torch", "numpy", "scipy", "PIL", "matplotlib", "jinja2", "tqdm"}
    assert len({name for name in modules if name.startswith("advkd.")}) == 0


@pytest.mark.parametrize("command", ["train", "sample", "evaluate", "export", "info"])
def test_no_command_imports_torchs_compiler(command: str) -> None:
    modules = _imported(f"import torch\nimport advkd.{command}\n")
    assert not modules & COMPILER


def test_what_a_sampling_imports(tmp_path: Path) -> None:
    folder = _student(tmp_path / "student", num_classes=3)
    code = "import sys; from advkd.sample import main; main(sys.argv[1:])"
    arguments = ["--student", folder, "--device", "cpu", "--num", "1"]
    arguments += ["--out", str(tmp_path / "grid.png")]
    first, second = (_imported(code, *arguments) for _ in range(2))
    assert "torch" in first and not first & COMPILER
    assert not second & {"torch", "safetensors", "scipy", "matplotlib", "jinja2", "tqdm"}
    # Settings, fonts and numpy are more than half of the time that such a start would take.
    assert not second & {"advkd.config", "tomllib", "difflib", "PIL.ImageDraw", "PIL.ImageFont"}
    assert "numpy" not in second


def test_a_constant_of_torchs_compiler_is_marked_as_torch_marks_it() -> None:
    from advkd.ops._conv3x3 import _speedup

    @torch.compiler.assume_constant_result
    def constant() -> None:
        """Do nothing."""

    assert vars(_speedup) == vars(constant)
