"""`python -m tests.gpu`: everything that needs a CUDA device, and a report of it.

    python -m tests.gpu [--out gpu-report.md] [--skip tests sanitizer benchmarks]

Runs all tests marked `gpu`, compute-sanitizer where it is installed, and the benchmarks, and writes
what they print. Without a device it collects the tests and imports the benchmarks, and the report
says so. Exit status: 0 if all that ran passed, 1 if not, 2 without a CUDA device.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from advkd import info, ops

from . import bench, training_speed

ROOT = Path(__file__).resolve().parents[2]
TESTS = "tests"
PARTS = ("tests", "sanitizer", "benchmarks")


def run(*command: str, **environment: str) -> tuple[int, str]:
    """The exit status and the last lines."""
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False,
        env=os.environ | environment,
    )  # fmt: skip
    return done.returncode, "\n".join((done.stdout + done.stderr).splitlines()[-40:])


def pytest(*arguments: str) -> tuple[int, str]:
    """The tests marked `gpu`; several at a time with pytest-xdist, since Triton's compiler is what
    they wait for, each with few threads of the CPU, lest those of all get in each other's way."""
    if importlib.util.find_spec("xdist"):
        arguments = ("-n", "8", *arguments)
    command = (sys.executable, "-m", "pytest", "-q", "-m", "gpu", "--durations=5", *arguments)
    return run(*command, TESTS, OMP_NUM_THREADS="2")


def fenced(text: str) -> str:
    return f"```\n{text}\n```"


def sections(skip: list[str], failed: list[str]) -> Iterator[str]:
    """The report, piece by piece; names of what failed go to `failed`."""
    yield f"# advkd on {torch.cuda.get_device_name()}\n"
    yield fenced("\n".join(info.report()))
    if "tests" not in skip:
        status, text = pytest()
        failed += ["tests"] * (status != 0)
        yield f"\n## Tests: {'failed' if status else 'passed'}\n\n{fenced(text)}"
    if "sanitizer" not in skip:
        status, text = run("bash", str(ROOT / "tests" / "gpu" / "compute_sanitizer.sh"))
        word = {0: "passed", 3: "not installed"}.get(status, "failed")
        failed += ["sanitizer"] * (word == "failed")
        yield f"\n## compute-sanitizer: {word}\n\n{fenced(text)}"
    if "benchmarks" in skip:
        return
    if "tests" in failed:
        yield "\n## Benchmarks\n\nNone while tests fail."
        return
    yield "\n## Benchmarks\n"
    tables = {
        "loops": bench.images_per_second, "students": bench.students, "host": bench.host_time,
        "launches": bench.launch_overhead, "device": bench.device_time,
        "kernels": bench.kernel_time, "trainings": training_speed.images_per_second,
    }  # fmt: skip
    for name, lines in tables.items():
        try:
            yield from lines()
        except Exception as error:  # the other tables are worth having
            failed.append(f"benchmark of {name}")
            yield fenced("".join(traceback.format_exception(error)[-8:]))
        yield ""


def without_device(missing: str, failed: list[str]) -> Iterator[str]:
    """The report where nothing can run."""
    yield f"# advkd without a CUDA device\n\nNothing ran: {missing}.\n"
    yield fenced("\n".join(info.report()))
    status, text = pytest("--collect-only")
    failed += ["collection of the tests"] * (status != 0)
    yield f"\n## Tests: {'not collected' if status else 'collected'}\n\n{fenced(text)}"


def missing_device() -> str | None:
    """Why nothing can run here; None where it can."""
    return ops.cuda_missing() if torch.cuda.is_available() else "torch sees no CUDA device"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("gpu-report.md"))
    parser.add_argument("--skip", nargs="*", choices=PARTS, default=[])
    args = parser.parse_args(arguments)
    missing = missing_device()
    failed: list[str] = []
    parts = sections(args.skip, failed) if missing is None else without_device(missing, failed)
    with args.out.open("w") as report:
        for text in parts:
            print(text, flush=True)
            print(text, file=report, flush=True)
    outcome = f"failed: {', '.join(failed)}" if failed else missing or "all passed"
    print(f"\nwritten to {args.out}; {outcome}")
    return 1 if failed else 2 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
