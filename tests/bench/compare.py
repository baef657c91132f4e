"""What became slower between two states of csrc, by the instructions that workloads execute.

    python -m tests.bench.compare OLD NEW           # e.g. HEAD~5 .
    python -m tests.bench.compare tests/bench/instructions.json .
    python -m tests.bench.compare . --write         # replaces the committed counts

A state is a checkout's folder, a commit, or counts that --write wrote. Five workloads
(instructions.cpp; two students that ship, one of them in int8) run on one thread under valgrind's
callgrind, with the AVX2 kernels, which are the newest that it knows, and a simulated cache of fixed
sizes. So the counts do not depend on what else a machine does, nor on its processor. What executes
more than 5% more instructions is named, with the functions that the difference lies in, and ends it
with status 1. The first-level and last-level misses are shown beside; they are not compared, since
they depend on where memory happens to lie.

Compilers write different code, so counts of two compilers, or of two versions of one, are shown but
fail nothing. Takes valgrind, a C++ compiler, and advkd with its extension to write the students'
model files; takes about a minute a state.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
COMMITTED = Path(__file__).with_name("instructions.json")
DRIVER = ("tests/bench/instructions.cpp", "tests/native/network.h")
GROWTH = 1.05  # of instructions, at most
SHOWN = 5  # functions of a workload that moved
SHARE = 0.01  # of a workload's instructions, of a function that is written down
ISA = "avx2"
CACHES = ("--I1=32768,8,64", "--D1=32768,8,64", "--LL=1048576,16,64")
# Workload -> the driver's arguments; a student's name and dtype stand for its model file.
WORKLOADS = {
    "a student's image": ("few", "zoo:fashion-mnist-student", "auto"),
    "five images": ("many", "zoo:avatars-student", "auto"),
    "five images, int8": ("many", "zoo:fashion-mnist-student", "int8"),
    "a sampler": ("sampler",),
    "kernels of training": ("training",),
}


class Count(NamedTuple):
    """What a workload executes: instructions in all and by function, and misses of two levels."""

    instructions: int
    first_level: int
    last_level: int
    functions: dict[str, int]


class State(NamedTuple):
    """The counts of a state of csrc, and the compiler that they are of."""

    compiler: str
    counts: dict[str, Count]


def main(argv: list[str] | None = None) -> int:
    """Compare or write; return the exit status."""
    p = argparse.ArgumentParser(description=__doc__)
    p.formatter_class = argparse.RawDescriptionHelpFormatter
    p.add_argument("states", nargs="+", metavar="STATE", help="a folder, a commit or counts")
    p.add_argument("--write", action="store_true", help=f"write the counts to {COMMITTED.name}")
    args = p.parse_args(argv)
    if len(args.states) != (1 if args.write else 2):
        p.error("give one state to write, or two to compare")
    if shutil.which("valgrind") is None:
        print("valgrind is not installed, so no instructions are counted", file=sys.stderr)
        return 0
    with tempfile.TemporaryDirectory(prefix="advkd-compare-") as name:
        models = written_models(Path(name))
        states = [
            state_of(given, Path(name, str(i)), models) for i, given in enumerate(args.states)
        ]
    if args.write:
        (state,) = states
        counts = {name: count._asdict() for name, count in state.counts.items()}
        content = {"compiler": state.compiler, "counts": counts}
        COMMITTED.write_text(json.dumps(content, indent=1) + "\n")
        return 0
    return compared(*states)


# What is shown.


def compared(old: State, new: State) -> int:
    """Print what changed; the exit status."""
    print(f"{'':22} {'instructions':>25} {'change':>8}   {'misses, first':>19}  last level")
    slower = []
    for name, after in new.counts.items():
        before = old.counts.get(name)
        if before is None:
            print(f"{name:22} {'':>12} {after.instructions:>12,}      new")
            continue
        ratio = after.instructions / before.instructions
        pairs = [
            f"{b:>9,} {a:>9,}"
            for b, a in zip(before[1:3], after[1:3], strict=True)
        ]  # fmt: skip
        print(
            f"{name:22} {before.instructions:>12,} {after.instructions:>12,} "
            f"{100 * (ratio - 1):>+7.2f}%  {'  '.join(pairs)}"
        )
        for line in moved(before.functions, after.functions, before.instructions):
            print(line)
        if ratio > GROWTH:
            slower.append(f"{name} by {100 * (ratio - 1):.1f}%")
    if not slower:
        print(f"nothing executes over {100 * (GROWTH - 1):.0f}% more instructions")
        return 0
    print(f"more instructions: {', '.join(slower)}")
    if old.compiler != new.compiler:
        print(f"but the compilers differ, so it fails nothing: {old.compiler} and {new.compiler}")
        return 0
    return 1


def moved(before: dict[str, int], after: dict[str, int], total: int) -> Iterator[str]:
    """Lines of the functions whose instructions changed by a part of the total that counts."""
    changes = Counter({name: after.get(name, 0) - before.get(name, 0) for name in before | after})
    largest = sorted(changes.items(), key=lambda change: -abs(change[1]))[:SHOWN]
    for name, change in largest:
        if abs(change) > SHARE * total:
            yield f"    {change:>+13,}  {name if len(name) <= 70 else name[:67] + '...'}"


# What is counted.


def state_of(given: str, folder: Path, models: dict[str, Path]) -> State:
    """The counts of a folder, a commit or a file."""
    path = Path(given)
    if path.is_file():
        content = json.loads(path.read_text())
        counts = {name: Count(**count) for name, count in content["counts"].items()}
        return State(content["compiler"], counts)
    if not path.is_dir():
        path = checkout(given, folder / "checkout")
    program, compiler = built(path.resolve(), folder / "build")
    with ThreadPoolExecutor(2) as pool:
        found = pool.map(lambda name: counted(program, name, models, folder), WORKLOADS)
        return State(compiler, dict(zip(WORKLOADS, found, strict=True)))


def checkout(commit: str, folder: Path) -> Path:
    """A commit's sources in a folder."""
    folder.mkdir(parents=True)
    archive = subprocess.run(
        ["git", "-C", str(ROOT), "archive", commit, "csrc", "setup.py", "tests"],
        capture_output=True, check=False,
    )  # fmt: skip
    if archive.returncode != 0:
        raise SystemExit(f"{commit} is no folder, no file and no commit")
    subprocess.run(
        ["tar", "--extract", "--directory", str(folder)], input=archive.stdout, check=True
    )
    return folder


def built(state: Path, folder: Path) -> tuple[Path, str]:
    """The driver with a state's runtime and AVX2 kernels, by its own flags; and its compiler."""
    setup = imported(state / "setup.py")
    setup.isa_flags = lambda machine: {ISA: setup.X86_ISA_FLAGS[ISA]}
    setup.dot_product_flags = lambda machine: {}
    compiler = setup.find_compiler(os.environ)
    if compiler is None:
        raise SystemExit("no C++ compiler was found")
    # A state that is older than the driver is run by this one.
    source, header = (
        next(at for at in (state / name, ROOT / name) if at.exists()) for name in DRIVER
    )
    csrc = state / "csrc"
    flags = [*setup.CXX_FLAGS, f"-I{csrc}", f"-I{csrc / 'include'}", f"-I{header.parent}"]
    flags.append('-DADVKD_VERSION="compared"')
    units = [(source, "instructions.o", [])]
    for at, name, extra in setup.compile_units("x86_64", "it is not compared"):
        if at.parent.name in ("runtime", "capi", "cpu"):
            units.append((at, name.replace("/", "-"), extra))
    folder.mkdir(parents=True)

    def compile_unit(unit: tuple[Path, str, list[str]]) -> str:
        at, name, extra = unit
        run(*compiler, *flags, *extra, "-c", str(at), "-o", str(folder / name))
        return str(folder / name)

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_unit, units))
    run(*compiler, "-pthread", *objects, "-o", str(folder / "instructions"))
    return folder / "instructions", run(*compiler, "--version").splitlines()[0]


def imported(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location("compared_setup", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def written_models(folder: Path) -> dict[str, Path]:
    """The model files of the students that are run."""
    from advkd.deploy.model_file import model_bytes
    from advkd.pretrained import load_student

    files = {}
    for _, *student in WORKLOADS.values():
        if student:
            name, dtype = student
            path = folder / f"{name.partition(':')[2]}-{dtype}.advkd"
            path.write_bytes(model_bytes(load_student(name), dtype))
            files[f"{name} {dtype}"] = path
    return files


def counted(program: Path, workload: str, models: dict[str, Path], folder: Path) -> Count:
    """A workload under callgrind."""
    kind, *student = WORKLOADS[workload]
    out = folder / f"{re.sub('[^a-z0-9]+', '-', workload)}.callgrind"
    run(
        "valgrind", "--tool=callgrind", "--cache-sim=yes", *CACHES, "--toggle-collect=measured",
        f"--callgrind-out-file={out}", "--quiet", str(program), kind,
        *(str(models[" ".join(student)]) for _ in student[:1]),
        env=os.environ | {"ADVKD_ISA": ISA},
    )  # fmt: skip
    return parsed(out.read_text())


def parsed(text: str) -> Count:
    """The counts of a file that callgrind wrote: its totals, and what each function itself adds."""
    events = found(r"^events: (.*)$", text).split()
    totals = dict(zip(events, map(int, found(r"^(?:summary|totals): (.*)$", text).split()),
                      strict=False))  # fmt: skip
    names: dict[str, str] = {}
    own: Counter[str] = Counter()
    function, inherited = "", False
    for line in text.splitlines():
        if match := re.match(r"fn=\((\d+)\)(?: (.*))?$", line):
            names.setdefault(match[1], match[2] or "")
            function = names[match[1]]
        elif match := re.match(r"cfn=\((\d+)\) (.*)$", line):
            names.setdefault(match[1], match[2])
        elif line.startswith("calls="):
            inherited = True  # the next line is what the callee costs
        elif match := re.match(r"(?:0x[0-9a-f]+|[+-]?\d+|\*) (\d+)", line):
            own[function] += 0 if inherited else int(match[1])
            inherited = False
    least = SHARE * totals["Ir"]
    return Count(
        totals["Ir"],
        sum(totals.get(event, 0) for event in ("I1mr", "D1mr", "D1mw")),
        sum(totals.get(event, 0) for event in ("ILmr", "DLmr", "DLmw")),  # zeros may be left out
        {name: count for name, count in own.most_common() if count > least},
    )


def found(pattern: str, text: str) -> str:
    match = re.search(pattern, text, re.MULTILINE)
    if match is None:
        raise SystemExit(f"callgrind wrote no line like {pattern}")
    return match[1]


def run(*command: str, **settings: Any) -> str:
    """What a program prints; SystemExit with it where the program fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, **settings)
    if done.returncode != 0:
        raise SystemExit(f"{command[0]} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
