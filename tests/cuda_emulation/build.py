"""Compiles csrc/cuda, unchanged, with g++ against the emulation in this folder, as a Python module.

    python tests/cuda_emulation/build.py FOLDER

The module offers what advkd._C offers where it was built with CUDA, and the emulation's controls.
For the sanitizers there is a program of its own, without Python (program.cpp).
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
    *("-DADVKD_CUDA_EMULATION", "-DADVKD_ISA=cuda", '-DADVKD_CUDA_ARCHS="80"'),
]
SANITIZERS = {
    # Of arrays in a thread; a finding ends the process.
    "bounds": ["-fsanitize=bounds", "-fsanitize-undefined-trap-on-error"],
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


def sources(csrc: Path) -> list[Path]:
    """All .cu files, and what stands in for CUDA."""
    names = ("emulation.cpp", "fake_runtime.cpp", "toy_network.cu")
    return [*sorted((csrc / "cuda").glob("*.cu")), *(HERE / name for name in names)]


def objects_of(
    found: list[Path], folder: Path, flags: list[str], sanitizer: str = "bounds"
) -> list[str]:
    """Compiles sources, two at a time; RuntimeError with the compiler's message."""
    command = compiler()
    if command is None:
        raise RuntimeError("no C++ compiler was found")
    folder.mkdir(parents=True, exist_ok=True)

    def compiled(source: Path) -> str:
        target = str(folder / f"{source.stem}.o")
        extra = [f"-I{HERE}", *flags, *SANITIZERS[sanitizer]]
        if sanitizer == "thread" and source.name in UNWATCHED:
            extra.remove("-fsanitize=thread")
        run([command, *FLAGS, *extra, "-x", "c++", "-c", str(source), "-o", target])
        return target

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(compiled, found))


def build(folder: Path, csrc: Path = CSRC) -> Path:
    """The module, in FOLDER."""
    import pybind11

    paths = sysconfig.get_paths()
    includes = [csrc, pybind11.get_include(), paths["include"], paths["platinclude"]]
    found = [*sources(csrc), csrc / "python" / "cuda_bindings.cpp", HERE / "module.cpp"]
    objects = objects_of(found, folder, [f"-I{path}" for path in includes])
    module = folder / f"{NAME}.so"
    run([str(compiler()), "-shared", *objects, "-o", str(module)])
    return module


def build_program(folder: Path, sanitizer: str, csrc: Path = CSRC) -> Path:
    """program.cpp under "thread" or "address", in FOLDER."""
    found = [*sources(csrc), HERE / "program.cpp"]
    objects = objects_of(found, folder, [f"-I{csrc}"], sanitizer)
    program = folder / "program"
    link = next(flag for flag in SANITIZERS[sanitizer] if flag.startswith("-fsanitize"))
    run([str(compiler()), link, *objects, "-o", str(program)])
    return program


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
    print(build(parser.parse_args().folder))


if __name__ == "__main__":
    main()
