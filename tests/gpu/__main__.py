"""`python -m tests.gpu`: everything that needs a CUDA device, and a report of it.

    python -m tests.gpu [--out gpu-report.md] [--skip tests sanitizer benchmarks]

Runs all tests marked `gpu`, compute-sanitizer where it is installed, and the benchmarks, and writes
what they say. Exit status: 0 if all that ran passed, 1 if not, 2 without a CUDA device.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from advkd import info, ops

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("tests", "sanitizer", "benchmarks")


def run(*command: str) -> tuple[int, str]:
    """The exit status and the last lines."""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.returncode, "\n".join((done.stdout + done.stderr).splitlines()[-40:])


def fenced(text: str) -> str:
    return f"```\n{text}\n```"


def sections(skip: list[str], failed: list[str]) -> Iterator[str]:
    """The report, piece by piece; names of what failed go to `failed`."""
    yield f"# advkd on {torch.cuda.get_device_name()}\n"
    yield fenced("\n".join(info.report()))
    if "tests" not in skip:
        status, text = run(sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests")
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
    from . import bench

    yield "\n## Benchmarks\n"
    yield from bench.images_per_second()
    yield ""
    yield from bench.launch_overhead()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("gpu-report.md"))
    parser.add_argument("--skip", nargs="*", choices=PARTS, default=[])
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("tests.gpu: torch sees no CUDA device, so there is nothing to check", file=sys.stderr)
        return 2
    missing = ops.cuda_missing()
    if missing is not None:
        print(f"tests.gpu: {missing}", file=sys.stderr)
        return 2
    failed: list[str] = []
    with args.out.open("w") as report:
        for text in sections(args.skip, failed):
            print(text, flush=True)
            print(text, file=report, flush=True)
    outcome = f"failed: {', '.join(failed)}" if failed else "all passed"
    print(f"\nwritten to {args.out}; {outcome}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
