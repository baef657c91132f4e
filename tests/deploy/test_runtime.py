"""advkd.runtime: the same images as the package's, without torch."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import re
import subprocess
import sys
import tomllib
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import advkd
from advkd.config import StudentConfig
from advkd.deploy.model_file import model_bytes
from advkd.models.student import Student
from advkd.ops import extension
from advkd.pretrained import load_student
from advkd.report.pictures import image_grid

if extension is None:
    pytest.skip("the C++ extension is not installed", allow_module_level=True)

from advkd.runtime.__main__ import main

from advkd import runtime

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ("zoo:fashion-mnist-student", "zoo:avatars-student")
LAST_SEED = (1 << 64) - 1


@pytest.fixture(scope="module")
def packages() -> dict[str, Student]:
    return {name: load_student(name) for name in SHIPPED}


@pytest.fixture(scope="module")
def files(
    packages: dict[str, Student], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    paths = {name: folder / f"{name[4:]}.advkd" for name in SHIPPED}
    for name, path in paths.items():
        path.write_bytes(model_bytes(packages[name]))
    return paths


@pytest.fixture(scope="module")
def students(files: dict[str, Path]) -> dict[str, runtime.Student]:
    return {name: runtime.load(path) for name, path in files.items()}


@pytest.fixture(scope="module")
def fashion(students: dict[str, runtime.Student]) -> runtime.Student:
    return students[SHIPPED[0]]


def of_package(student: Student, num: int, seed: int, **options: Any) -> np.ndarray:
    """The package's images, (num, H, W, C) float32."""
    return advkd.generate(student, num, seed, **options).permute(0, 2, 3, 1).numpy()


def as_bytes(images: np.ndarray) -> np.ndarray:
    return np.rint((images + 1) * np.float32(127.5)).astype(np.uint8)


def small_student(classes: int | None, names: tuple[str, ...] | None = None) -> Student:
    """A student of 8×8 pixels whose weights are noise."""
    torch.manual_seed(0)
    config = StudentConfig(stages=(4, 8), widths=(8, 8), attention=(), groups=4)
    student = Student(config, 8, 1, num_classes=classes, target="denoised")
    student.class_names = names
    return student.eval()


# Images.


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize("num", [0, 1, 3, 4, 16, 70])
def test_images_are_the_packages_to_the_bit(
    packages: dict[str, Student], students: dict[str, runtime.Student], name: str, num: int
) -> None:
    wanted = of_package(packages[name], num, 7)
    for threads in (1, 2, 3, None):
        floats = students[name].generate(num, 7, dtype="float32", threads=threads)
        assert floats.dtype == np.float32
        np.testing.assert_array_equal(floats, wanted)
        pixels = students[name].generate(num, 7, threads=threads)
        assert pixels.dtype == np.uint8
        np.testing.assert_array_equal(pixels, as_bytes(wanted))


@pytest.mark.parametrize("num", [0, 1, 4, 70])
@pytest.mark.parametrize("options", [{}, {"first": 9, "label": "sandal"}, {"exit_at": 1}])
def test_bytes_are_those_of_the_images(
    fashion: runtime.Student, num: int, options: dict[str, Any]
) -> None:
    given = dict(options)
    labels = given.pop("label", None)
    wanted = fashion.generate(num, 7, labels=labels, **given)
    assert fashion.generate_bytes(num, 7, **options) == wanted.tobytes()


@pytest.mark.parametrize("exit_at", [1, 2, 3])
def test_leaving_early(
    packages: dict[str, Student], fashion: runtime.Student, exit_at: int
) -> None:
    wanted = of_package(packages[SHIPPED[0]], 5, LAST_SEED, exit_at=exit_at)
    images = fashion.generate(5, LAST_SEED, exit_at=exit_at, dtype="float32")
    np.testing.assert_array_equal(images, wanted)
    assert images.shape[1] == fashion.heads[exit_at - 1]


def test_labels_by_number_and_by_name(
    packages: dict[str, Student], fashion: runtime.Student
) -> None:
    wanted = of_package(packages[SHIPPED[0]], 4, 1, y=torch.full((4,), 5))
    for labels in (5, np.int64(5), "sandal", np.full(4, 5, np.uint8), ["sandal", 5, 5, "sandal"]):
        images = fashion.generate(4, 1, labels=labels, dtype="float32")
        np.testing.assert_array_equal(images, wanted)
    mixed = of_package(packages[SHIPPED[0]], 20, 1, y=torch.arange(20) % 10)
    images = fashion.generate(20, 1, labels=np.arange(20) % 10, dtype="float32", threads=3)
    np.testing.assert_array_equal(images, mixed)
    assert fashion.label("sandal") == fashion.label(5) == 5


def test_an_image_depends_on_its_number_alone(fashion: runtime.Student) -> None:
    images = fashion.generate(70, 3)
    np.testing.assert_array_equal(fashion.generate(9, 3, first=61), images[61:])
    last = (1 << 63) - 2
    assert fashion.generate(1, first=last).shape == (1, 28, 28, 1)


@pytest.mark.parametrize("threads", [1, 2, 3, 8, 100])
def test_parts_are_of_the_algorithms_of_the_whole(threads: int) -> None:
    for num in (*range(40), 63, 64, 65, 70, 129, 1000):
        parts = runtime.student.parts_of(num, threads)
        numbers = [number for part in parts for number in range(part.start, part.stop)]
        assert numbers == list(range(num))
        sizes = {part.stop - part.start for part in parts}
        assert max(sizes) <= runtime.student.PART and max(sizes) - min(sizes) <= 1
        assert len(parts) == 1 if num <= 3 else min(sizes) > 3


def test_images_are_written_to_out(fashion: runtime.Student) -> None:
    wanted = fashion.generate(20, 2)
    stack = np.zeros((3, 20, 28, 28, 1), np.uint8)
    out = stack[1]
    assert fashion.generate(20, 2, out=out, threads=2) is out
    np.testing.assert_array_equal(out, wanted)
    assert not stack[0].any() and not stack[2].any()


def test_threads_share_a_student(packages: dict[str, Student], fashion: runtime.Student) -> None:
    wanted = of_package(packages[SHIPPED[0]], 6, 0, exit_at=2)

    def use(i: int) -> bool:
        num = 4 + i % 3
        images = fashion.generate(num, 0, exit_at=2, dtype="float32", threads=1 + i % 2)
        return bool(np.array_equal(images, wanted[:num]))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(use, range(40)))


# What a student is.


def test_a_student_describes_itself(students: dict[str, runtime.Student]) -> None:
    fashion, avatars = (students[name] for name in SHIPPED)
    assert (fashion.size, fashion.channels, fashion.classes) == (28, 1, 10)
    assert (avatars.size, avatars.channels, avatars.classes) == (32, 3, 3)
    assert avatars.class_names == ("pixel-art", "open-peeps", "lorelei")
    assert fashion.heads == (7, 14, 28)
    assert 0 < fashion.arena_bytes < fashion.weights_bytes < 10_000_000
    assert fashion.isa in ("portable", "avx2", "avx512", "neon")
    assert repr(avatars) == "<advkd student: 32×32×3, 3 classes>"


def test_students_without_names_and_without_classes() -> None:
    unnamed, unconditional = (runtime.load(model_bytes(small_student(c))) for c in (3, None))
    assert (unnamed.classes, unnamed.class_names) == (3, None)
    assert (unconditional.classes, unconditional.class_names) == (0, None)
    assert repr(unconditional) == "<advkd student: 8×8×1>"
    with pytest.raises(ValueError, match="'bag' names no class"):
        unnamed.generate(1, labels="bag")
    with pytest.raises(ValueError, match="labels=0: this student takes none"):
        unconditional.generate(1, labels=0)


def test_a_path_or_its_bytes(files: dict[str, Path], fashion: runtime.Student) -> None:
    path = files[SHIPPED[0]]
    data = path.read_bytes()
    wanted = fashion.generate(2)
    for source in (str(path), data, bytearray(data), memoryview(data)):
        np.testing.assert_array_equal(runtime.load(source).generate(2), wanted)


def test_a_student_is_freed_with_its_last_reference(files: dict[str, Path]) -> None:
    student = runtime.load(files[SHIPPED[0]])
    model = weakref.ref(student._model)
    copied = copy.copy(student)
    del student
    gc.collect()
    assert copied.generate(1).any()
    with pytest.raises((TypeError, ValueError)):
        pickle.dumps(copied)
    del copied
    gc.collect()
    assert model() is None


# Refusals.


def test_files_that_are_none(tmp_path: Path, files: dict[str, Path]) -> None:
    with pytest.raises(FileNotFoundError, match=r"missing\.advkd"):
        runtime.load(tmp_path / "missing.advkd")
    data = files[SHIPPED[0]].read_bytes()
    damaged = tmp_path / "damaged.advkd"
    for content in (b"", b"no model", data[:-1], data[: len(data) // 2]):
        damaged.write_bytes(content)
        with pytest.raises(runtime.ModelError, match=rf"^{re.escape(str(damaged))}: \w.*\w$"):
            runtime.load(damaged)
    with pytest.raises(ValueError, match=r"^the bytes of a model: "):
        runtime.load(b"no model")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num": -1}, ValueError, "num=-1 is not between 0 and "),
        ({"num": 1.5}, TypeError, "num=1.5 is not a whole number"),
        ({"seed": -1}, ValueError, f"seed=-1 is not between 0 and {LAST_SEED}"),
        ({"seed": 1 << 64}, ValueError, f"seed={1 << 64} is not between"),
        ({"seed": "x"}, TypeError, "seed='x' is not a whole number"),
        ({"first": -1}, ValueError, "first=-1 is not between"),
        ({"first": (1 << 63) - 4}, ValueError, "num=4 is not between 0 and 3"),
        ({"exit_at": 0}, ValueError, "exit_at=0 is not between 1 and 3"),
        ({"exit_at": 4}, ValueError, "exit_at=4 is not between 1 and 3"),
        ({"threads": 0}, ValueError, "threads=0 is not between"),
        ({"labels": 10}, ValueError, "label=10 is not between 0 and 9"),
        ({"labels": [1, 2, -1, 3]}, ValueError, "label=-1 is not between 0 and 9"),
        ({"labels": 1.5}, TypeError, "label=1.5 is not a whole number"),
        ({"labels": np.zeros((4, 1))}, TypeError, "label=array.* is not a whole number"),
        ({"labels": "boot"}, ValueError, "label 'boot' names no class of this student"),
        ({"labels": [1, 2]}, ValueError, "there are 2 labels for num=4 images"),
        ({"dtype": "float64"}, ValueError, "dtype='float64' is neither uint8 nor float32"),
        ({"dtype": ">f4"}, ValueError, "dtype='>f4' is neither uint8 nor float32"),
        ({"out": [0]}, TypeError, "out is not a numpy array but of list"),
        (
            {"out": np.zeros((4, 28, 28), np.uint8)},
            ValueError,
            r"out is uint8 \(4, 28, 28\), and the images are uint8 \(4, 28, 28, 1\)",
        ),
        ({"out": np.zeros((4, 28, 28, 1))}, ValueError, "out is float64"),
        (
            {"out": np.zeros((4, 28, 28, 2), np.uint8)[..., :1]},
            ValueError,
            "out is read-only or not in C order",
        ),
    ],
)
def test_what_cannot_be_is_named(
    fashion: runtime.Student, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"^{message}"):
        fashion.generate(**{"num": 4, **options})


# The command.


@pytest.mark.parametrize(
    ("name", "options", "num", "label"),
    [
        (SHIPPED[0], [], 16, None),
        (SHIPPED[0], ["--num", "5", "--class", "ankle boot"], 5, 9),
        (SHIPPED[1], ["--num", "2", "--class", "1"], 2, 1),
    ],
)
def test_the_grid_is_that_of_advkd_sample(
    packages: dict[str, Student],
    files: dict[str, Path],
    tmp_path: Path,
    name: str,
    options: list[str],
    num: int,
    label: int | None,
) -> None:
    out = tmp_path / "grid.png"
    assert main([str(files[name]), "--out", str(out), "--seed", "4", *options]) == 0
    y = None if label is None else torch.full((num,), label)
    wanted = image_grid(advkd.generate(packages[name], num, 4, y=y), int(np.ceil(num**0.5)), 2)
    with Image.open(out) as image:
        np.testing.assert_array_equal(np.asarray(image), wanted)


def test_the_numbers_of_the_command(
    files: dict[str, Path], fashion: runtime.Student, tmp_path: Path
) -> None:
    out = tmp_path / "images.npy"
    command = [str(files[SHIPPED[0]]), "--num", "3", "--exit-at", "1", "--out", str(out)]
    assert main(command) == 0
    wanted = fashion.generate(3, exit_at=1, dtype="float32")
    np.testing.assert_array_equal(np.load(out), wanted)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--class", "boot"], "label 'boot' names no class of this student"),
        (["--out", "grid.jpg"], "--out grid.jpg is no .png or .npy file"),
        (["--num", "0"], "--num 0 is below 1"),
    ],
)
def test_the_command_refuses_in_one_line(
    files: dict[str, Path],
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    assert main([str(files[SHIPPED[0]]), *options]) == 1
    assert capsys.readouterr().err == f"python -m advkd.runtime: {message}\n"


# The package.


def run_python(code: str, *arguments: str, **environ: str) -> str:
    """What a fresh Python prints; nothing may come on stderr."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], env=os.environ | environ, capture_output=True,
        text=True, check=False, timeout=120,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_no_torch_is_imported(files: dict[str, Path]) -> None:
    code = """
import sys
from advkd import runtime
assert "numpy" not in sys.modules
student = runtime.load(sys.argv[1])
student.generate(num=70, threads=2)
print({name.split(".")[0] for name in sys.modules} & {"torch", "PIL", "scipy"}, runtime.__version__)
"""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert run_python(code, str(files[SHIPPED[0]])) == f"set() {version}\n"


def test_without_a_library_it_says_how_to_build() -> None:
    code = """
import sys
sys.modules["advkd._C"] = None
try:
    import advkd.runtime
except ImportError as error:
    print(error)
"""
    said = run_python(code)
    assert said.startswith("advkd's C library has not been built: ")
    assert "`pip install ./csrc`" in said


def test_the_versions_agree() -> None:
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    (entry,) = tomllib.loads((ROOT / "csrc/pyproject.toml").read_text())["tool"]["dynamic-metadata"]
    found = re.search(entry["regex"], (ROOT / "csrc" / entry["input"]).read_text())
    assert found is not None and found["value"] == wanted
