"""`python -m tests.against COMMIT`: are bits and speed what they were at an older commit?

Checks the commit out beside this tree, builds its extension (CPU only), and compares: first the
SHA-256 of trajectories and of weights after some steps of both trainings, then, with --time, CPU
time at one thread, the two trees taking turns. Exit status 1 where bits differ.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WORKLOADS = Path(__file__).with_name("workloads.py")


@contextmanager
def checked_out(commit: str) -> Iterator[Path]:
    """A folder with the commit's package, its extension built in place."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "old"
        archive = subprocess.run(
            ["git", "-C", str(ROOT), "archive", commit], check=True, capture_output=True
        )
        folder.mkdir()
        subprocess.run(["tar", "x", "-C", str(folder)], check=True, input=archive.stdout)
        (folder / "advkd" / "kernels").symlink_to(folder / "kernels")  # as an installation has it
        subprocess.run(
            [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"],
            check=True, cwd=folder, env={**os.environ, "ADVKD_CUDA": "0"},
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        yield folder


def command(tree: Path | None, mode: str, folder: Path) -> list[str]:
    """A workload's command, by the advkd of a tree; None: the one that is installed."""
    if tree is None:
        return [sys.executable, str(WORKLOADS), mode, str(folder)]
    script = f"import sys, runpy; sys.path.insert(0, {str(tree)!r}); sys.argv = sys.argv[1:]; "
    script += "sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]; "
    script += f"runpy.run_path({str(WORKLOADS)!r}, run_name='__main__')"
    return [sys.executable, "-c", script, "workloads", mode, str(folder)]


def bits(tree: Path | None) -> dict[str, str]:
    """What `workloads.bits` finds with a tree."""
    with tempfile.TemporaryDirectory() as folder:
        argv = command(tree, "bits", Path(folder))
        done = subprocess.run(argv, check=True, capture_output=True, text=True)
    found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return found


def compare_bits(old: Path) -> bool:
    """Print which hashes are equal; whether all are."""
    theirs, ours = bits(old), bits(None)
    for name in theirs:
        print(f"{name:<28}{'equal' if ours.get(name) == theirs[name] else 'DIFFERENT'}")
    return theirs == ours


def compare_times(old: Path, rounds: int) -> None:
    """Print medians of CPU time, and the median of the ratios of neighboring runs."""
    with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
        processes = []
        for tree, folder in ((old, first), (None, second)):
            argv = command(tree, "time", Path(folder))
            pipe = subprocess.PIPE
            processes.append(subprocess.Popen(argv, stdin=pipe, stdout=pipe, text=True))
        names = [json.loads(process.stdout.readline()) for process in processes].pop()
        print(f"{'CPU time, one thread':<32}{'old, ms':>10}{'new, ms':>10}{'old/new':>9}")
        for name in names:
            pairs = [[_seconds(process, name) for process in processes] for _ in range(rounds + 1)]
            before, after = zip(*pairs[1:], strict=True)
            ratio = statistics.median(a / b for a, b in pairs[1:])
            print(
                f"{name:<32}{1e3 * statistics.median(before):>10.2f}"
                f"{1e3 * statistics.median(after):>10.2f}{ratio:>9.3f}"
            )
        for process in processes:
            process.kill()


def _seconds(process: subprocess.Popen[str], name: str) -> float:
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(f"{name}\n")
    process.stdin.flush()
    return float(process.stdout.readline())


def main() -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.against", description=__doc__)
    parser.add_argument("commit")
    parser.add_argument("--time", type=int, metavar="ROUNDS", default=0, help="also compare speed")
    args = parser.parse_args()
    with checked_out(args.commit) as old:
        equal = compare_bits(old)
        if args.time:
            compare_times(old, args.time)
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
