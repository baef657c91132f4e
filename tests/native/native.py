"""Compiles parts of csrc with the C++ files of this folder, by setup.py's compiler and flags.

`module` is a Python module (module.cpp) that offers what only tests and benchmarks need: the
thread pool by itself, and a copy to measure bandwidth by. `program` is for the thread sanitizer
(program.cpp), and needs neither Python nor torch.
"""

from __future__ import annotations

import atexit
import functools
import importlib.util
import os
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
NAME = "native_tests"


def _imported(name: str, path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


setup = _imported("advkd_setup", ROOT / "setup.py")

THREAD_SANITIZER_FLAGS = ("-O1", "-g1", "-fsanitize=thread")


def missing() -> str | None:
    """Why the module cannot be built; None if it can."""
    if importlib.util.find_spec("pybind11") is None:
        return "pybind11 is not installed"
    return None if setup.find_compiler(os.environ) else "no C++ compiler was found"


@functools.cache
def module() -> ModuleType:
    """The module, built once for this process; RuntimeError with the compiler's message."""
    import pybind11

    paths = sysconfig.get_paths()
    includes = (ROOT / "csrc", pybind11.get_include(), paths["include"])
    flags = [f"-I{path}" for path in includes]
    if os.environ.get("ADVKD_SANITIZE") == "1":
        flags += setup.SANITIZER_FLAGS
    folder = Path(tempfile.mkdtemp(prefix="advkd-native-"))
    atexit.register(shutil.rmtree, folder)
    sources = [HERE / "module.cpp", ROOT / "csrc" / "runtime" / "thread_pool.cpp"]
    objects = compiled([(source, flags) for source in sources], folder)
    target = folder / f"{NAME}.so"
    link(["-shared", *flags], objects, target)
    loaded: ModuleType = _imported(NAME, target)
    return loaded


def program(folder: Path, csrc: Path = ROOT / "csrc") -> Path:
    """program.cpp, the runtime and the portable kernels under the thread sanitizer, in FOLDER."""
    flags = [f"-I{csrc}", f"-I{HERE}", *THREAD_SANITIZER_FLAGS]
    units = [(HERE / "program.cpp", flags)]
    for source, _, extra in setup.compile_units("portable", "CUDA is not needed here"):
        if source.parent.name in ("runtime", "cpu"):
            units.append((csrc / source.relative_to(ROOT / "csrc"), [*flags, *extra]))
    target = folder / "program"
    link(THREAD_SANITIZER_FLAGS, compiled(units, folder), target)
    return target


def mutated(folder: Path, whole: Path, csrc: Path, sources: list[Path]) -> Path:
    """The program of the folder `whole` with some sources of the copy `csrc` instead, in FOLDER."""
    flags = [f"-I{csrc}", *THREAD_SANITIZER_FLAGS, "-DADVKD_ISA=portable"]
    changed = compiled([(source, flags) for source in sources], folder)
    names = {Path(at).name for at in changed}
    others = [str(at) for at in whole.glob("*.o") if at.name not in names]
    target = folder / "program"
    link(THREAD_SANITIZER_FLAGS, [*changed, *others], target)
    return target


def compiled(units: list[tuple[Path, list[str]]], folder: Path) -> list[str]:
    """Compile (source, flags), two at a time; RuntimeError with the compiler's message."""
    folder.mkdir(parents=True, exist_ok=True)

    def one(unit: tuple[Path, list[str]]) -> str:
        source, flags = unit
        target = str(folder / f"{source.parent.name}-{source.stem}.o")
        _run(*_compiler(), *setup.CXX_FLAGS, *flags, "-c", str(source), "-o", target)
        return target

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(one, units))


def link(flags: Any, objects: list[str], target: Path) -> None:
    _run(*_compiler(), "-pthread", *flags, *objects, "-o", str(target))


def _compiler() -> list[str]:
    found: list[str] | None = setup.find_compiler(os.environ)
    if found is None:
        raise RuntimeError("no C++ compiler was found")
    return found


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{shlex.join(command)}\n{done.stdout}{done.stderr}")
