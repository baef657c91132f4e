"""Training steps of today and of an earlier commit, with the earlier one's default configuration.

OMP_NUM_THREADS=1 python -m tests.bench.against_version a7ce509    # version 0.1

Checks the commit out into a folder of its own, builds its extension there, and times both in turn,
by CPU time of one thread. What is compared is a step of the student's reconstruction and of the
teacher's training, whose networks are the same in both; the discriminator of version 0.2 is
another one than that of 0.1.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from .report import markdown

ROOT = Path(__file__).resolve().parents[2]
WORKER = Path(__file__).with_name("version_worker.py")
PARTS = ("student, reconstruction", "teacher")
ROUNDS, STEPS = 15, 2
# Today's name of the teacher that was the default one; and a discriminator as there is today.
TODAY = ["teacher.source=zoo:fashion-mnist-unlabelled", "discriminator.widths=[24, 48, 96]"]


class Version:
    """A process that runs the steps of the package in `tree`."""

    def __init__(self, tree: Path, preset: Path, settings: list[str]):
        environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(WORKER), str(preset), *settings],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=tree,
        )
        if self._answer() != "ready":
            raise SystemExit(f"the steps of {tree} cannot be run")

    def _answer(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def milliseconds(self, part: str) -> float:
        """CPU time of a step."""
        assert self._process.stdin is not None
        print(part, STEPS, file=self._process.stdin, flush=True)
        return float(self._answer()) / STEPS * 1e3

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def checked_out(commit: str, folder: Path) -> Path:
    """The commit's files, with its extension built."""
    tree = folder / "earlier"
    tree.mkdir()
    archive = subprocess.run(["git", "archive", commit], cwd=ROOT, check=True, capture_output=True)
    subprocess.run(["tar", "--extract"], cwd=tree, input=archive.stdout, check=True)
    build = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    subprocess.run(build, cwd=tree, check=True, env=os.environ | {"ADVKD_CUDA": "0"})
    return tree


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("commit")
    commit = parser.parse_args().commit
    with tempfile.TemporaryDirectory() as folder:
        tree = checked_out(commit, Path(folder))
        preset = tree / "advkd" / "presets" / "fashion-mnist.toml"
        earlier, today = Version(tree, preset, []), Version(ROOT, preset, TODAY)
        rows = []
        for part in PARTS:
            rounds = [(earlier.milliseconds(part), today.milliseconds(part)) for _ in range(ROUNDS)]
            before, now = (statistics.median(times) for times in zip(*rounds[1:], strict=True))
            rows.append([part, f"{before:.1f}", f"{now:.1f}", f"{before / now:.2f}"])
        for version in (earlier, today):
            version.close()
    print(markdown(["a step, batch 32", f"{commit}, ms", "today, ms", "faster"], rows))


if __name__ == "__main__":
    main()
