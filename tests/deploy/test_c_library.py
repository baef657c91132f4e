"""The C library: the package's images, what it refuses, and that it takes no more than it says."""

from __future__ import annotations

import ctypes
import platform
import shutil
import sys
import tomllib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from advkd import runtime
from advkd.deploy.model_file import model_bytes
from advkd.engine.sampling import generate
from advkd.models.student import Student
from advkd.ops import extension
from advkd.pretrained import load_student

sys.path.insert(0, str(Path(__file__).resolve().parent))
import library
from library import ARGUMENT, EXIT, FILE, FORMAT, LABEL, OK, UINT8, WORKSPACE, Model, Refused

pytestmark = [
    pytest.mark.skipif(extension is None, reason="the C++ extension is not installed"),
    pytest.mark.skipif(library.missing() is not None, reason=library.missing() or ""),
]

TOLERANCE = 5e-5  # between instruction sets
LAST_SEED = (1 << 64) - 1
MOST_RESIDENT = 8 << 10  # KiB, of a program that generates one image of 28 x 28
# Of the stripped library; that of AVX2 holds AVX-VNNI's convolutions, too.
MOST_BYTES = {"avx2": 220_000, "portable;avx2;avx512": 1_000_000}
X86 = platform.machine() in ("x86_64", "AMD64")

STUDENTS: dict[str, Any] = {
    "zoo:fashion-mnist-student": lambda: load_student("zoo:fashion-mnist-student"),
    "zoo:avatars-student": lambda: load_student("zoo:avatars-student"),
    "without labels": lambda: library.student("small", channels=2),
    "one class": lambda: library.student("small", 1),
    "attention, blocks": lambda: library.student("attention", 3, channels=3),
    "pyramid": lambda: library.student("pyramid", 4),
    "pyramid, states": lambda: library.student("pyramid", None, target="state"),
}
FASHION = "zoo:fashion-mnist-student"


class Opened:
    """A student, its file, and the model that the library opens of it."""

    def __init__(self, name: str, built: Path, folder: Path):
        self.student: Student = STUDENTS[name]()
        self.content = model_bytes(self.student)
        self.path = folder / f"{name.replace(':', '-')}.advkd"
        self.path.write_bytes(self.content)
        self.command = [str(built / "advkd-generate")]
        self.model = Model(shared(built), self.content)

    def of_package(self, num: int, seed: int = 0, **settings: Any) -> np.ndarray:
        """The package's images, (num, side, side, channels)."""
        images = generate(self.student, num, seed, **settings)
        return images.permute(0, 2, 3, 1).contiguous().numpy()


def shared(built: Path) -> ctypes.CDLL:
    suffix = "dylib" if sys.platform == "darwin" else "so"
    return library.library(built / f"libadvkd.{suffix}")


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which CMake has built everything."""
    return library.build(tmp_path_factory.mktemp("advkd-library"))


@pytest.fixture(scope="session")
def known(built: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Opened]:
    """Students by name, as far as tests have asked for them."""
    del built, tmp_path_factory
    return {}


@pytest.fixture
def opened(
    request: pytest.FixtureRequest,
    known: dict[str, Opened],
    built: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Opened:
    """The student that a test is parametrized with, else the one of Fashion-MNIST."""
    name = getattr(request, "param", FASHION)
    if name not in known:
        known[name] = Opened(name, built, tmp_path_factory.mktemp("model"))
    return known[name]


every_student = pytest.mark.parametrize("opened", STUDENTS, indirect=True)
SHIPPED = [name for name in STUDENTS if name.startswith("zoo:")]
zoo = pytest.mark.parametrize("opened", SHIPPED, indirect=True)


# The package's images.


@every_student
def test_images_are_the_packages_bits(opened: Opened) -> None:
    for num, seed in ((1, 0), (3, LAST_SEED), (16, 0), (70, LAST_SEED)):
        expected = opened.of_package(num, seed)
        found = library.generated(opened.command, opened.path, expected.shape, "--seed", str(seed))
        assert np.array_equal(found, expected), (num, seed)
        assert np.array_equal(opened.model.generate(seed=seed, count=num), expected)


@every_student
def test_so_are_those_of_every_head(opened: Opened) -> None:
    heads = len(opened.student.heads)
    is_state = opened.student.target == "state"
    assert opened.model.info.heads == (1 if is_state else heads)
    for exit_at in range(1, opened.model.info.heads + 1):
        depth = heads if is_state else exit_at
        expected = opened.of_package(5, 3, exit_at=depth)
        found = library.generated(
            opened.command, opened.path, expected.shape, "--seed", "3", "--exit-at", str(exit_at)
        )
        assert np.array_equal(found, expected), exit_at
        side = opened.student.config.stages[depth - 1]
        assert expected.shape[1] == side
        assert opened.model.loaded.advkd_image_size(opened.model.at, exit_at) == side


@every_student
def test_so_are_those_of_chosen_classes(opened: Opened) -> None:
    classes = opened.student.num_classes
    if classes is None:
        with pytest.raises(Refused) as refused:
            opened.model.generate([0], count=1)
        assert refused.value.status == LABEL
        return
    labels = [(7 * i + 1) % classes for i in range(9)]
    expected = opened.of_package(9, 4, y=torch.tensor(labels))
    assert np.array_equal(opened.model.generate(labels, seed=4, count=9), expected)
    label = classes - 1
    assert opened.student.class_names is not None
    expected = opened.of_package(2, 4, y=torch.full((2,), label))
    for text in (str(label), opened.student.class_names[label]):
        found = library.generated(
            opened.command, opened.path, expected.shape, "--seed", "4", "--class", text
        )
        assert np.array_equal(found, expected), text


@zoo
@pytest.mark.parametrize("isa", ["avx2", "portable"])
def test_instruction_sets_differ_in_the_last_bits(opened: Opened, isa: str) -> None:
    assert extension is not None
    if isa not in extension.isas():
        pytest.skip(f"this machine does not run {isa}")
    for num in (1, 16):
        expected = opened.of_package(num, 11)
        found = library.generated(
            opened.command, opened.path, expected.shape, "--seed", "11", ADVKD_ISA=isa
        )
        assert np.abs(found - expected).max() <= TOLERANCE


@zoo
def test_files_of_int8_give_the_same_bits_in_every_library(
    opened: Opened, built: Path, tmp_path: Path
) -> None:
    content = model_bytes(opened.student, "int8")
    expected = runtime.load(content).generate(20, seed=2, dtype="float32", threads=1)
    model = Model(shared(built), content)
    assert np.array_equal(model.generate(seed=2, count=20), expected)
    # Neither the place nor what is in it matters.
    assert np.array_equal(model.generate(seed=2, count=20, offset=4, together=3), expected)
    model.close()
    path = tmp_path / "int8.advkd"
    path.write_bytes(content)
    found = library.generated(opened.command, path, expected.shape, "--seed", "2")
    assert np.array_equal(found, expected)
    if not X86:
        return
    # Rounding differs where an input lies between two levels, so images do here and there.
    other = library.generated(
        opened.command, path, expected.shape, "--seed", "2", ADVKD_ISA="portable"
    )
    exact = opened.of_package(20, 2)
    assert np.abs(other - expected).mean() < np.abs(exact - expected).mean() / 2


def test_an_unknown_instruction_set_is_refused(opened: Opened) -> None:
    with pytest.raises(RuntimeError, match="the instruction set 'none' was not built"):
        library.generated(opened.command, opened.path, (1, 28, 28, 1), ADVKD_ISA="none")


@every_student
def test_windows_hold_the_same_images(opened: Opened) -> None:
    # Images that are few are computed by another plan, so only those that are many are compared.
    whole = opened.model.generate(seed=5, count=40)
    for first, count in ((0, 7), (13, 20), (36, 4)):
        window = opened.model.generate(seed=5, first=first, count=count)
        assert np.array_equal(window, whole[first : first + count])
    far = (1 << 63) - 6
    expected = opened.of_package(5, 5, first=far)
    assert np.array_equal(opened.model.generate(seed=5, first=far, count=5), expected)


@every_student
def test_bytes_are_rounded_to_the_nearest_and_even(opened: Opened) -> None:
    images = opened.model.generate(seed=2, count=20)
    expected = np.rint((images + np.float32(1)) * np.float32(127.5)).astype(np.uint8)
    assert np.array_equal(opened.model.generate(seed=2, count=20, format=UINT8), expected)


@every_student
def test_together_changes_memory_and_no_bits(opened: Opened) -> None:
    whole = opened.model.generate(seed=1, count=17)
    sizes = []
    for together in (1, 2, 5, 16):
        request = library.Request(count=17, together=together)
        sizes.append(opened.model.workspace_size(request))
        found = opened.model.generate(seed=1, count=17, together=together)
        assert np.array_equal(found, whole), together
    assert sizes == sorted(sizes) and sizes[0] < sizes[1]


@pytest.mark.parametrize("offset", [1, 2, 3, 4, 8, 15, 33, 63])
def test_a_workspace_may_lie_at_any_address(opened: Opened, offset: int) -> None:
    whole = opened.model.generate(seed=1, count=5)
    assert np.array_equal(opened.model.generate(offset=offset, seed=1, count=5), whole)


@zoo
def test_threads_share_a_model(opened: Opened) -> None:
    requests = [(seed, count) for seed in range(8) for count in (1, 6)]

    def images(request: tuple[int, int]) -> np.ndarray:
        made: np.ndarray = opened.model.generate(seed=request[0], count=request[1])
        return made

    alone = list(map(images, requests))
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(images, requests))
    assert all(np.array_equal(a, b) for a, b in zip(alone, together, strict=True))


# What a model is, and what is refused.


@every_student
def test_a_model_describes_itself(opened: Opened) -> None:
    model, student = opened.model, opened.student
    info = model.info
    classes = student.num_classes or 0
    assert (info.size, info.channels, info.classes) == (student.size, student.channels, classes)
    assert info.arena > 0 and info.weights > 0
    names = [model.loaded.advkd_class_name(model.at, label) for label in range(-1, classes + 1)]
    expected = [None, *(name.encode() for name in student.class_names or ()), None]
    assert names == expected
    assert model.loaded.advkd_image_size(model.at, 0) == student.size
    for exit_at in (-1, info.heads + 1, 1 << 30):
        assert model.loaded.advkd_image_size(model.at, exit_at) == 0


def test_the_library_says_what_it_is(built: Path) -> None:
    assert extension is not None
    loaded = shared(built)
    version = loaded.advkd_version().decode()
    project = tomllib.loads((library.ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == version
    assert f"project(advkd VERSION {version} " in (library.CSRC / "CMakeLists.txt").read_text()
    assert loaded.advkd_isa().decode() == extension.isas()[0]
    texts = [loaded.advkd_status_text(status).decode() for status in range(8)]
    assert len(set(texts)) == 8
    for unknown in (-1, 8, 1000):
        assert loaded.advkd_status_text(unknown) == b"an unknown status"


class Call:
    """A request of three images with valid memory around it, to be spoilt."""

    def __init__(self, opened: Opened, **fields: Any):
        self.model = opened.model
        self.loaded = opened.model.loaded
        self.request = library.Request(**{"count": 3} | fields)
        self.workspace = np.empty(1 << 23, np.uint8)
        self.out = np.full(1 << 14, 7.5, np.float32)
        self.size = self.workspace.size

    def status(self, **instead: Any) -> int:
        """The status with some arguments replaced; a call that fails must leave `out` alone."""
        given = {
            "model": self.model.at,
            "request": ctypes.byref(self.request),
            "workspace": self.workspace.ctypes.data,
            "size": self.size,
            "out": self.out.ctypes.data,
        } | instead
        status = int(self.loaded.advkd_generate(*given.values()))
        assert status == OK or (self.out == 7.5).all()
        return status


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, OK),
        ({"count": 0}, OK),
        ({"count": -1}, ARGUMENT),
        ({"count": -(1 << 63)}, ARGUMENT),
        ({"first": -1}, ARGUMENT),
        ({"first": (1 << 63) - 3}, ARGUMENT),
        ({"first": (1 << 63) - 4}, OK),
        ({"first": (1 << 63) - 1, "count": 1}, ARGUMENT),
        ({"count": (1 << 63) - 1, "first": 1}, ARGUMENT),
        ({"together": -1}, ARGUMENT),
        ({"together": 16}, OK),
        ({"together": 17}, ARGUMENT),
        ({"format": 2}, ARGUMENT),
        ({"format": -1}, ARGUMENT),
        ({"exit_at": -1}, EXIT),
        ({"exit_at": 3}, OK),
        ({"exit_at": 4}, EXIT),
        ({"exit_at": (1 << 31) - 1}, EXIT),
    ],
)
def test_requests_that_are_refused(opened: Opened, fields: dict[str, int], expected: int) -> None:
    call = Call(opened, **fields)
    assert call.status() == expected
    assert (call.model.workspace_size(call.request) == 0) == (expected != OK)


@pytest.mark.parametrize("label", [-1, 10, 1 << 62, -(1 << 63)])
def test_labels_that_are_refused(opened: Opened, label: int) -> None:
    for labels in ([label, 0, 0], [0, 0, label]):
        listed = np.array(labels)
        assert Call(opened, labels=listed.ctypes.data).status() == LABEL
    # Only `count` labels are read.
    listed = np.array([0, 9, label])
    assert Call(opened, labels=listed.ctypes.data, count=2).status() == OK


@pytest.mark.parametrize("argument", ["model", "request", "workspace", "out"])
def test_null_pointers_are_refused(opened: Opened, argument: str) -> None:
    assert Call(opened).status(**{argument: None}) == ARGUMENT
    if argument in ("workspace", "out"):
        assert Call(opened, count=0).status(**{argument: None}) == OK


def test_null_pointers_are_allowed_or_refused_elsewhere(opened: Opened) -> None:
    loaded, model = opened.model.loaded, opened.model.at
    loaded.advkd_close(None)
    loaded.advkd_describe(model, None)
    info = library.Info(size=7)
    loaded.advkd_describe(None, ctypes.byref(info))
    assert info.size == 0
    assert loaded.advkd_class_name(None, 0) is None
    assert loaded.advkd_image_size(None, 0) == 0
    assert loaded.advkd_workspace_size(None, library.Request(count=1)) == 0
    assert loaded.advkd_workspace_size(model, None) == 0
    at = ctypes.c_void_p(1)
    assert loaded.advkd_open_memory(None, 0, ctypes.byref(at), None) == ARGUMENT
    assert at.value is None
    assert loaded.advkd_open_memory(b"", 0, None, None) == ARGUMENT
    at.value = 1
    assert loaded.advkd_open_file(None, ctypes.byref(at), None) == ARGUMENT
    assert at.value is None
    assert loaded.advkd_open_file(b"x", None, None) == ARGUMENT


def test_a_workspace_that_is_too_small_is_refused(opened: Opened) -> None:
    call = Call(opened)
    enough = call.model.workspace_size(call.request)
    for size in (0, 1, enough - 1):
        assert call.status(size=size) == WORKSPACE
    assert call.status(size=enough) == OK


def test_a_workspace_is_not_left(opened: Opened) -> None:
    for num in (1, 5):
        call = Call(opened, count=num)
        size = call.model.workspace_size(call.request)
        call.workspace[:] = 99
        begin = 1 << 12
        assert call.status(workspace=call.workspace.ctypes.data + begin, size=size) == OK
        assert (call.workspace[:begin] == 99).all() and (call.workspace[begin + size :] == 99).all()
        assert (call.out[num * 784 :] == 7.5).all()


def test_a_file_is_opened_by_its_name(opened: Opened, tmp_path: Path) -> None:
    loaded = opened.model.loaded
    at, error = ctypes.c_void_p(), ctypes.create_string_buffer(library.ERROR_SIZE)

    def status(path: Path) -> int:
        return int(loaded.advkd_open_file(str(path).encode(), ctypes.byref(at), error))

    assert status(opened.path) == OK and at.value and error.value == b""
    loaded.advkd_close(at)
    for path in (tmp_path / "none", tmp_path):
        assert status(path) == FILE and not at.value
        assert error.value == b"the file cannot be read"
    (tmp_path / "cut").write_bytes(opened.content[:1000])
    assert status(tmp_path / "cut") == FORMAT and not at.value
    assert b"only a part" in error.value


def test_options_that_are_refused(opened: Opened, tmp_path: Path) -> None:
    program, file = opened.command[0], str(opened.path)
    for options, words in (
        ([], "no MODEL is given"),
        ([file, file], "more than one MODEL"),
        ([file, "--num"], "an option without a value: --num"),
        ([file, "--nums", "1"], "an unknown option: --nums"),
        ([file, "--num", "0"], "a value that the option does not take: --num"),
        ([file, "--seed", "-1"], "a value that the option does not take: --seed"),
        ([file, "--seed", str(1 << 64)], "a value that the option does not take: --seed"),
        ([file, "--exit-at", "4"], "the model has no such head to leave by"),
        ([file, "--class", "10"], "the model has no such class: 10"),
        ([file, "--raw", str(tmp_path / "none" / "x")], "cannot write"),
        ([str(tmp_path / "none")], "the file cannot be read"),
    ):
        with pytest.raises(RuntimeError, match=words):
            library.run(program, "--num", "1", *options)


# What it takes.


@pytest.fixture(scope="session")
def measured(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """measured.c, linked with the static library."""
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("needs glibc, whose allocator can be replaced")
    program = tmp_path_factory.mktemp("measured") / "measured"
    compile_c(Path(__file__).with_name("measured.c"), program, built)
    return program


def compile_c(source: Path, program: Path, built: Path) -> None:
    compiled = program.with_suffix(".o")
    include = f"-I{library.CSRC / 'include'}"
    # Without builtins, or the compiler might leave out what is to be counted.
    flags = ("-std=c99", "-O1", "-fno-builtin", include)
    library.run("cc", *flags, "-c", str(source), "-o", str(compiled))
    command = library.compiler()
    assert command is not None
    library.run(*command, str(compiled), str(built / "libadvkd.a"), "-o", str(program))


@every_student
def test_nothing_is_allocated_after_opening(opened: Opened, measured: Path) -> None:
    _, allocations = library.run(str(measured), str(opened.path)).split()
    assert int(allocations) == 0


def test_one_image_takes_little_memory(opened: Opened, measured: Path) -> None:
    resident, _ = library.run(str(measured), str(opened.path)).split()
    assert 0 < int(resident) <= MOST_RESIDENT


@pytest.mark.skipif(not X86, reason="the bounds are those of x86-64")
@pytest.mark.parametrize("isas", MOST_BYTES)
def test_the_library_is_small(isas: str, built: Path, tmp_path: Path) -> None:
    strip = shutil.which("strip")
    if strip is None:
        pytest.skip("needs strip, of binutils")
    if isas == "avx2":
        built = library.build(tmp_path / "b", f"-DADVKD_ISAS={isas}", targets=("advkd",))
    stripped = tmp_path / "libadvkd.so"
    library.run(strip, "-o", str(stripped), str(built / "libadvkd.so"))
    assert stripped.stat().st_size <= MOST_BYTES[isas]
    model = Model(library.library(stripped), model_bytes(library.student("small")))
    assert model.generate(count=1).shape == (1, 8, 8, 1)
    model.close()


# How it is used.

CONSUMER_CMAKE = """\
cmake_minimum_required(VERSION 3.18)
project(consumer LANGUAGES C CXX)
find_package(advkd 0.2 REQUIRED)
add_executable(with_shared main.c)
target_link_libraries(with_shared advkd::advkd)
add_executable(with_static main.c)
target_link_libraries(with_static advkd::advkd_static)
"""
CONSUMER_C = """\
#include <advkd.h>
#include <stdio.h>
#include <stdlib.h>
int main(int argc, char **argv) {
  advkd_model *model;
  advkd_request request = {.count = 1, .seed = 9};
  float pixels[28 * 28];
  if (argc != 2 || advkd_open_file(argv[1], &model, NULL) != ADVKD_OK) return 1;
  size_t size = advkd_workspace_size(model, &request);
  if (advkd_generate(model, &request, malloc(size), size, pixels) != ADVKD_OK) return 1;
  return fwrite(pixels, sizeof pixels, 1, stdout) != 1;
}
"""


@pytest.fixture
def installed(built: Path, tmp_path: Path) -> Iterator[Path]:
    prefix = tmp_path / "prefix"
    program = library.cmake()
    assert program is not None
    library.run(program, "--install", str(built), "--prefix", str(prefix))
    yield prefix


def test_a_project_finds_the_installed_library(
    opened: Opened, installed: Path, tmp_path: Path
) -> None:
    source = tmp_path / "consumer"
    source.mkdir()
    (source / "CMakeLists.txt").write_text(CONSUMER_CMAKE)
    (source / "main.c").write_text(CONSUMER_C)
    program = library.cmake()
    assert program is not None
    library.run(
        program, "-S", str(source), "-B", str(source / "b"), f"-DCMAKE_PREFIX_PATH={installed}"
    )
    library.run(program, "--build", str(source / "b"))
    expected = opened.of_package(1, 9)
    for name in ("with_shared", "with_static"):
        written = tmp_path / name
        library.run("sh", "-c", f"{source / 'b' / name} {opened.path} > {written}")
        assert np.array_equal(np.fromfile(written, np.float32), expected.ravel())
    names = {path.name for path in installed.rglob("*") if path.is_file()}
    assert {"advkd-generate", "advkd.h", "libadvkd.a", "advkdConfig.cmake"} <= names


@pytest.mark.parametrize("language", ["c99", "c11", "c++11", "c++17"])
def test_the_header_is_plain(language: str, tmp_path: Path) -> None:
    is_c = not language.startswith("c++")
    source = tmp_path / ("main.c" if is_c else "main.cpp")
    source.write_text('#include "advkd.h"\nint main(void) { return advkd_version() == 0; }\n')
    command = library.compiler()
    assert command is not None
    library.run(
        *(["cc"] if is_c else command), f"-std={language}", f"-I{library.CSRC / 'include'}",
        *("-Wall", "-Wextra", "-Wpedantic", "-Werror", "-fsyntax-only", str(source)),
    )  # fmt: skip
