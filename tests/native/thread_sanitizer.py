"""The thread pool, the executor, the sampling loop and the CPU kernels under the thread sanitizer.

    python tests/native/thread_sanitizer.py

Fails if anything races or computes something wrong, or if a race goes unseen: a few locks and
waits are taken out of a copy of csrc, one at a time, and each time the sanitizer must report a
race. Takes GCC or Clang with its thread sanitizer.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent))
import native

CSRC = native.ROOT / "csrc"
OPTIONS = {"TSAN_OPTIONS": "halt_on_error=1 exitcode=66"}
RACE = 66
PATIENCE = 300  # seconds of one run
TRIES = 3  # runs in which a mutation must be reported once


class Mutation(NamedTuple):
    """A change of text that occurs once in a file; `compiled` are the sources that include it."""

    what: str
    source: str
    was: str
    becomes: str
    compiled: tuple[str, ...] = ()


MUTATIONS = (
    Mutation(
        "a job that does not wait for its workers",
        "runtime/thread_pool.cpp",
        "done_.wait(lock, [this] { return busy_ == 0; });",
        "",
    ),
    Mutation(
        "exceptions of tasks without their lock",
        "runtime/thread_pool.cpp",
        "const std::lock_guard<std::mutex> lock(error_mutex_);",
        "",
    ),
    Mutation(
        "a plan's memory handed out without its lock",
        "runtime/pooled_plan.cpp",
        "  {\n    const std::lock_guard<std::mutex> lock(mutex_);\n    for",
        "  {\n    for",
    ),
    Mutation(
        "threads that share one workspace",
        "cpu/convolution_tile.h",
        "return own_ + slot * plan_.own_size();",
        "return own_ + 0 * slot;",
        compiled=("cpu/winograd.cpp",),
    ),
    Mutation(
        "threads that share their scratch memory",
        "cpu/group_norm_silu.h",
        "thread_local std::unique_ptr<Buffer<T>> memory;",
        "static std::unique_ptr<Buffer<T>> memory;",
        compiled=("cpu/group_norm_silu.cpp", "cpu/group_norm_silu_backward.cpp"),
    ),
)


def run(program: Path) -> subprocess.CompletedProcess[str]:
    # The sanitizer wants its memory where address randomization may have put other things.
    command = ["setarch", "-R", str(program)]
    return subprocess.run(
        command, capture_output=True, text=True, env=os.environ | OPTIONS, check=False,
        timeout=PATIENCE,
    )  # fmt: skip


def reports_a_race(program: Path) -> bool:
    done = run(program)
    return done.returncode == RACE and "data race" in done.stderr


def mutated(mutation: Mutation, whole: Path, folder: Path) -> Path:
    """The program with one change."""
    csrc = folder / "csrc"
    shutil.copytree(CSRC, csrc)
    source = csrc / mutation.source
    text = source.read_text()
    if text.count(mutation.was) != 1:
        raise SystemExit(f"{mutation.source} does not hold {mutation.was!r} once")
    source.write_text(text.replace(mutation.was, mutation.becomes))
    sources = mutation.compiled or (mutation.source,)
    return native.mutated(folder, whole, csrc, [csrc / name for name in sources])


def main() -> int:
    with tempfile.TemporaryDirectory() as temporary:
        whole = Path(temporary) / "whole"
        clean = run(native.program(whole))
        print(f"thread sanitizer: {clean.stdout.strip()}{clean.stderr[:4000]}", flush=True)
        if clean.returncode != 0:
            return 1
        for number, mutation in enumerate(MUTATIONS):
            racing = mutated(mutation, whole, Path(temporary) / str(number))
            # On a loaded machine a worker may sleep through all of a run.
            if not any(reports_a_race(racing) for _ in range(TRIES)):
                print(f"thread sanitizer: {mutation.what} went unseen")
                return 1
            print(f"thread sanitizer: {mutation.what}: reported", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
