"""The emulated kernels and launchers under the thread sanitizer and the address sanitizer.

    python tests/cuda/sanitizers.py

Fails if a kernel races, if memory is misused, or if the race of a kernel that lacks a barrier is
not found. Takes GCC with libtsan and libasan.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "cuda_emulation"))
import build

OPTIONS = {"TSAN_OPTIONS": "halt_on_error=1 exitcode=66", "ASAN_OPTIONS": "detect_leaks=1"}


def run(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    # The thread sanitizer wants its memory where address randomization may have put other things.
    command = ["setarch", "-R", str(program), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, env=os.environ | OPTIONS, check=False, timeout=1800
    )


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        for sanitizer in ("thread", "address"):
            program = build.build_program(Path(folder) / sanitizer, sanitizer)
            clean = run(program)
            print(f"{sanitizer} sanitizer: {clean.stdout.strip() or clean.stderr[:4000]}")
            if clean.returncode != 0:
                print(clean.stderr[:4000])
                return 1
            if sanitizer == "thread":
                racing = run(program, "race")
                if racing.returncode != 66 or "data race" not in racing.stderr:
                    print("thread sanitizer: a missing __syncthreads went unseen")
                    return 1
                line = next(at for at in racing.stderr.splitlines() if "sum_kernel" in at)
                print(f"thread sanitizer: the missing __syncthreads is reported: {line.strip()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
