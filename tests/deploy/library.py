"""Builds the C library of csrc by CMake, calls it by ctypes, and makes students for it to run."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from advkd.runtime.library import Info, Request
from torch import nn

from advkd.config import StudentConfig
from advkd.models.student import Student

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
ERROR_SIZE = 256
JOBS = 2

OK, FILE, FORMAT, MEMORY, ARGUMENT, LABEL, EXIT, WORKSPACE = range(8)
FLOAT32, UINT8 = range(2)


def missing() -> str | None:
    """Why the library cannot be built here, None where it can."""
    if cmake() is None:
        return "CMake is not installed: pip install cmake ninja"
    if compiler() is None:
        return "no C++ compiler was found"
    return None


def cmake() -> str | None:
    """The program cmake, of PATH or of the Python that runs this."""
    beside = Path(sys.executable).parent
    return shutil.which("cmake", path=f"{os.environ.get('PATH', '')}{os.pathsep}{beside}")


def compiler() -> list[str] | None:
    """The command of the C++ compiler, as setup.py finds it."""
    spec = importlib.util.spec_from_file_location("advkd_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    setup = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(setup)
    found: list[str] | None = setup.find_compiler(os.environ)
    return found


def build(folder: Path, *options: str, targets: tuple[str, ...] = ()) -> Path:
    """FOLDER with everything that CMake builds of csrc, or with some targets.

    RuntimeError with what CMake or the compiler says where that fails.
    """
    program = cmake()
    assert program is not None
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    run(program, "-S", str(CSRC), "-B", str(folder), *generator, *options)
    chosen = ["--target", *targets] if targets else []
    run(program, "--build", str(folder), "--parallel", str(JOBS), *chosen)
    return folder


def run(*command: str, **settings: Any) -> str:
    """What a program prints; RuntimeError with it where the program fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, **settings)
    if done.returncode != 0:
        raise RuntimeError(f"{shlex.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout


def generated(
    command: list[str], file: Path, shape: tuple[int, ...], *options: str, **variables: str
) -> np.ndarray:
    """The images that advkd-generate, run by COMMAND, writes of a model file, float32 of SHAPE."""
    out = file.with_suffix(".raw")
    arguments = ["--num", str(shape[0]), "--raw", str(out), *options]
    run(*command, str(file), *arguments, env=os.environ | variables)
    return np.fromfile(out, np.float32).reshape(shape)


# The C API.


@functools.cache
def library(path: Path) -> ctypes.CDLL:
    """The shared library with the types of its functions."""
    loaded = ctypes.CDLL(str(path))
    pointer, text, number = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int32
    request = ctypes.POINTER(Request)
    for name, result, arguments in (
        ("version", text, []),
        ("isa", text, []),
        ("status_text", text, [ctypes.c_int]),
        ("open_memory", ctypes.c_int, [text, ctypes.c_size_t, ctypes.POINTER(pointer), pointer]),
        ("open_file", ctypes.c_int, [text, ctypes.POINTER(pointer), pointer]),
        ("close", None, [pointer]),
        ("describe", None, [pointer, ctypes.POINTER(Info)]),
        ("class_name", text, [pointer, number]),
        ("image_size", number, [pointer, number]),
        ("workspace_size", ctypes.c_size_t, [pointer, request]),
        ("generate", ctypes.c_int, [pointer, request, pointer, ctypes.c_size_t, pointer]),
    ):
        function = getattr(loaded, f"advkd_{name}")
        function.restype, function.argtypes = result, arguments
    return loaded


class Refused(Exception):
    """A status that is not ADVKD_OK, and the library's words."""

    def __init__(self, status: int, words: str):
        super().__init__(f"status {status}: {words}")
        self.status, self.words = status, words


class Model:
    """A model opened from bytes; raises Refused."""

    def __init__(self, loaded: ctypes.CDLL, content: bytes):
        self.loaded, self.at = loaded, ctypes.c_void_p()
        error = ctypes.create_string_buffer(b"x" * (ERROR_SIZE - 1))
        status = loaded.advkd_open_memory(content, len(content), ctypes.byref(self.at), error)
        words = error.value.decode(errors="replace")
        if status != OK:
            assert not self.at.value
            raise Refused(status, words)
        assert words == ""
        self.info = Info()
        loaded.advkd_describe(self.at, ctypes.byref(self.info))

    def close(self) -> None:
        self.loaded.advkd_close(self.at)
        self.at = ctypes.c_void_p()

    def workspace_size(self, request: Request) -> int:
        return int(self.loaded.advkd_workspace_size(self.at, ctypes.byref(request)))

    def generate(self, labels: list[int] | None = None, offset: int = 0, **fields: Any) -> Any:
        """Images (count, side, side, channels); the workspace lies OFFSET bytes from a page's
        beginning."""
        request = Request(**fields)
        if labels is not None:
            listed = np.array(labels, np.int64)
            request.labels = listed.ctypes.data
        size = self.workspace_size(request)
        side = int(self.loaded.advkd_image_size(self.at, request.exit_at))
        dtype = np.uint8 if request.format == UINT8 else np.float32
        out = np.empty((request.count, side, side, self.info.channels), dtype)
        memory = np.empty(size + 4096 + offset, np.uint8)
        at = (memory.ctypes.data + 4095) // 4096 * 4096 + offset
        status = self.loaded.advkd_generate(
            self.at, ctypes.byref(request), at, size, out.ctypes.data
        )
        if status != OK:
            raise Refused(status, self.loaded.advkd_status_text(status).decode())
        return out


# Students.

STUDENTS = {
    "small": StudentConfig(stages=(4, 8), widths=(8, 8), attention=(), groups=4),
    "attention": StudentConfig(
        stages=(4, 4, 8), widths=(16, 12, 8), blocks=2, attention=(4, 8), groups=4
    ),
    "pyramid": StudentConfig(
        family="pyramid", stages=(4, 4, 8), widths=(16, 12, 8), attention=(4,), groups=4
    ),
}


def student(name: str, num_classes: int | None = None, **settings: Any) -> Student:
    """A tiny student with no parameter at a value, such as 0 or 1, that hides a mistake."""
    torch.manual_seed(0)
    config = STUDENTS[name]
    made = Student(
        config, config.stages[-1], settings.pop("channels", 1), num_classes=num_classes, **settings
    )
    for parameter in made.parameters():
        # Of He's size, so that signals neither die nor blow up.
        fan_in = parameter[0].numel() if parameter.dim() > 1 else 25
        nn.init.normal_(parameter, std=fan_in**-0.5)
        if parameter.dim() == 1:
            parameter.data += 0.5
    if num_classes is not None:
        made.class_names = tuple(f"klasse {i} ü" for i in range(num_classes))
    return made.eval().requires_grad_(False)
