"""Breaks the CUDA kernels in one place at a time and shows that the emulated tests notice.

    python tests/cuda/mutations.py [--write]

Removes each __syncthreads and flips each comparison of csrc/cuda's kernels and their launchers, and
runs the tests of that file on each. --write puts the table into docs/kernels.md. It takes about ten
minutes.
"""

from __future__ import annotations

import argparse
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import advkd.engine.cuda  # noqa: F401  once, and not in the fork of each mutant

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "cuda_emulation"))
import build

PATIENCE = 60  # seconds of processor time for the tests of a mutant
HERE = Path(__file__).resolve().parent
DOCS = build.CSRC.parent / "docs" / "kernels.md"
BEGIN, END = "<!-- mutations: begin -->", "<!-- mutations: end -->"
TESTS = {
    "philox.cu": ["test_philox.py"],
    "sampling_step.cu": ["test_sampling_step.py", "test_sampling_loop.py"],
    "sampling_loop.cu": ["test_sampling_loop.py", "test_sampling_step.py"],
}
FLIPPED = {"<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "=="}
COMPARISON = re.compile(r"(?<= )(<=|>=|==|!=|<|>)(?= )")
NO_CODE = ("//", "#", "template", "static_assert")

# What no test can see, by what stands in the line, and why.
EQUIVALENT = {
    "x0 < -bound": "at the bound both give the bound",
    "x0 > bound": "at the bound both give the bound",
    "pixel >= tile.width": "computes normals of no pixel, and none is used",
    "left < cut.width ?": "where they are equal both are the same",
    "args.batch * blocks > 0x": "a batch of exactly so many blocks holds four terabytes",
    "if (queued < run.steps)": "records an event once more, after the last step",
}


@dataclass(frozen=True)
class Mutant:
    """A file with one change."""

    source: str
    line: int
    was: str
    becomes: str
    text: str  # of the whole file

    @property
    def reason(self) -> str | None:
        """Why it may survive; None where it may not."""
        return next((why for part, why in EQUIVALENT.items() if part in self.was), None)


def mutants(source: Path) -> Iterator[Mutant]:
    lines = source.read_text().split("\n")

    def changed(number: int, line: str) -> Mutant:
        text = "\n".join([*lines[:number], line, *lines[number + 1 :]])
        return Mutant(source.name, number + 1, lines[number].strip(), line.strip(), text)

    for number, line in enumerate(lines):
        if line.strip().startswith(NO_CODE):
            continue
        if "__syncthreads();" in line:
            yield changed(number, line.replace("__syncthreads();", ";"))
        for found in COMPARISON.finditer(line.split("//")[0]):
            flipped = line[: found.start()] + FLIPPED[found[0]] + line[found.end() :]
            yield changed(number, flipped)


def noticed_by(mutant: Mutant, folder: Path) -> str | None:
    """The test that fails, or what else happens; None if all pass. FOLDER holds the objects."""
    csrc = folder / "csrc"
    shutil.copytree(build.CSRC, csrc, dirs_exist_ok=True)
    (csrc / "cuda" / mutant.source).write_text(mutant.text)
    stem = Path(mutant.source).stem
    try:
        mutated = build.objects_of(
            [csrc / "cuda" / mutant.source], folder / "mutated", [f"-I{csrc}", "-O1"]
        )
    except RuntimeError:
        return "the compiler"
    others = [str(at) for at in (folder / "whole").glob("*.o") if at.stem != stem]
    module = folder / "mutated" / f"{build.NAME}.so"
    build.run([str(build.compiler()), "-shared", *mutated, *others, "-o", str(module)])
    status, output = tested(module, [str(HERE / name) for name in TESTS[mutant.source]], folder)
    if status is None:
        return "it does not end"
    failed = re.search(r"(?:FAILED|ERROR) \S+::(\w+)", output)
    return None if status == 0 else failed[1] if failed else f"the process ends with {status}"


def tested(module: Path, tests: list[str], folder: Path) -> tuple[int | None, str]:
    """pytest's exit status and output, in a fork, which need not import torch anew; None: late."""
    log = folder / "log"
    child = os.fork()
    if child == 0:
        with log.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            os.environ["ADVKD_CUDA_EMULATION"] = str(module)
            os.chdir(HERE.parents[1])
            resource.setrlimit(resource.RLIMIT_CPU, (PATIENCE, PATIENCE + 5))
            status = int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests]))
            sys.stdout.flush()
        os._exit(status)
    end = time.monotonic() + 20 * PATIENCE
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            return (None, "") if code == -signal.SIGXCPU else (code, log.read_text())
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None, ""


def row(mutant: Mutant, found: str | None) -> str:
    def code(text: str) -> str:
        return "`" + text.replace("|", "\\|") + "`"

    place = f"{mutant.source}:{mutant.line}"
    outcome = f"`{found}`" if found else f"survives: {mutant.reason or 'NOT EXPLAINED'}"
    becomes = "removed" if mutant.becomes == ";" else code(mutant.becomes)
    return f"| {place} | {code(mutant.was)} | {becomes} | {outcome} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="into docs/kernels.md")
    parser.add_argument("--only", default="", help="files whose name holds this")
    args = parser.parse_args()
    lines = ["| place | line | becomes | noticed by |", "|---|---|---|---|"]
    unexplained = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        build.build(folder / "whole")
        for name in TESTS:
            for mutant in mutants(build.CSRC / "cuda" / name) if args.only in name else ():
                found = noticed_by(mutant, folder)
                unexplained += found is None and mutant.reason is None
                lines.append(row(mutant, found))
                print(lines[-1], flush=True)
    if args.write:
        head, rest = DOCS.read_text().split(BEGIN)
        DOCS.write_text("\n".join([head + BEGIN, *lines, END + rest.split(END)[1]]))
    print(f"{len(lines) - 2} mutants, {unexplained} survivors without an explanation")
    return 1 if unexplained else 0


if __name__ == "__main__":
    sys.exit(main())
