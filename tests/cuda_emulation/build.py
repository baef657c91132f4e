"""Compiles csrc/cuda, unchanged, with g++ against the emulation in this folder, as a Python module.

    python tests/cuda_emulation/build.py FOLDER [--sanitizer thread|address]

The module offers what advkd._C offers where it was built with CUDA, and the emulation's controls.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
NAME = "cuda_emulation"

FLAGS = [
    *("-std=c++17", "-O2", "-fPIC", "-Wall", "-Wextra", "-Wno-unknown-pragmas"),
    # As nvcc has it: 16 bytes of any elements may be read as one vector; nothing is contracted.
    *("-fno-strict-aliasing", "-ffp-contract=off", "-Wno-maybe-uninitialized"),
    *("-DADVKD_CUDA_EMULATION", "-DADVKD_ISA=cuda"),
]
SANITIZERS = {
    "thread": ["-fsanitize=thread", "-g1", "-O1", "-DEMULATION_TSAN"],
    "address": [
        *("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g1", "-O1"),
        *("-fno-omit-frame-pointer", "-DEMULATION_ASAN"),
    ],
}
# The thread sanitizer watches the kernels, not the fibers that run them.
UNWATCHED = ("emulation.cpp", "fake_runtime.cpp")


def compiler() -> str | None:
    """The C++ compiler to emulate with: $CXX, g++ or c++; None where there is none."""
    for name in (os.environ.get("CXX"), "g++", "c++"):
        if name and shutil.which(name):
            return name
    return None


def sources(csrc: Path = CSRC) -> list[Path]:
    """All .cu files, the bindings, and the emulation."""
    kernels = sorted((csrc / "cuda").glob("*.cu"))
    return [*kernels, csrc / "cuda_bindings.cpp", *sorted(HERE.glob("*.c*"))]


def build(folder: Path, csrc: Path = CSRC, sanitizer: str | None = None, jobs: int = 2) -> Path:
    """Compiles what is newer than its object into FOLDER; the module's path.

    Raises RuntimeError with the compiler's message.
    """
    import pybind11

    command = compiler()
    if command is None:
        raise RuntimeError("no C++ compiler was found")
    folder.mkdir(parents=True, exist_ok=True)
    paths = sysconfig.get_paths()
    includes = [csrc, HERE, pybind11.get_include(), paths["include"], paths["platinclude"]]
    flags = [*FLAGS, *(f"-I{path}" for path in includes)]

    def compiled(source: Path) -> Path:
        target = folder / f"{source.stem}.o"
        extra = list(SANITIZERS.get(sanitizer or "", []))
        if sanitizer == "thread" and source.name in UNWATCHED:
            extra.remove("-fsanitize=thread")
        run([command, *flags, *extra, "-x", "c++", "-c", str(source), "-o", str(target)])
        return target

    with ThreadPoolExecutor(jobs) as pool:
        objects = list(pool.map(compiled, sources(csrc)))
    module = folder / f"{NAME}.so"
    link = [flag for flag in SANITIZERS.get(sanitizer or "", []) if flag.startswith("-fsanitize")]
    run([command, "-shared", *link, *map(str, objects), "-o", str(module)])
    return module


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(done.stdout + done.stderr)


def load(module: Path) -> ModuleType:
    """Imports the module that `build` made."""
    spec = importlib.util.spec_from_file_location(NAME, module)
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sanitizer", choices=sorted(SANITIZERS))
    args = parser.parse_args()
    print(build(args.folder, sanitizer=args.sanitizer))


if __name__ == "__main__":
    main()
