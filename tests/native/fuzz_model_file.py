"""Mutated model files through the C library under the address and undefined-behaviour sanitizers.

    python tests/native/fuzz_model_file.py [--files 20000]
    CC=clang CXX=clang++ python tests/native/fuzz_model_file.py --libfuzzer SECONDS

The first needs CMake and GCC or Clang, and always tries the same files. The second lets Clang's
libFuzzer look for files by what they reach. Fails at the first finding, and leaves its input as
model-file-finding.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "deploy"))
import library
import native

HERE = Path(__file__).resolve().parent
FINDING = Path("model-file-finding")
# The second has products of int8, where it runs.
ISAS = ("portable", "avx512") if platform.machine() in ("x86_64", "AMD64") else ("portable",)
# No model needs more at once than what it is opened from, times a little.
OPTIONS = {
    "ASAN_OPTIONS": "max_allocation_size_mb=512:hard_rss_limit_mb=2048:handle_abort=1",
    "UBSAN_OPTIONS": "print_stacktrace=1",
}


def program(folder: Path, flags: list[str], sources: list[str]) -> Path:
    """The sources of this folder linked with the library, all compiled with FLAGS."""
    options = [f"-DCMAKE_{language}_FLAGS={' '.join(flags)}" for language in ("C", "CXX")]
    built = library.build(
        folder / "library", f"-DADVKD_ISAS={';'.join(ISAS)}", "-DADVKD_TOOLS=OFF", *options,
        targets=("advkd_static",),
    )  # fmt: skip
    include = f"-I{library.CSRC / 'include'}"
    units = [(HERE / source, [include, *flags]) for source in sources]
    target = folder / "fuzz"
    # libFuzzer brings a main, which only the last step asks for.
    last = ["-fsanitize=fuzzer"] if "-fsanitize=fuzzer-no-link" in flags else []
    objects = [*native.compiled(units, folder / "objects"), str(built / "libadvkd.a")]
    native.link([*flags, *last], objects, target)
    return target


def seeds(folder: Path) -> list[Path]:
    """The files that the others are mutated from."""
    from advkd.deploy.model_file import model_bytes

    folder.mkdir()
    for name, classes, target, dtype in (
        ("small", None, "denoised", "float32"),
        ("attention", 3, "denoised", "int8"),
        ("pyramid", 2, "state", "float16"),
    ):
        content = model_bytes(library.student(name, classes, target=target), dtype)
        (folder / f"{name}.advkd").write_bytes(content)
    return sorted(folder.iterdir())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=20000, help="how many mutated files")
    parser.add_argument("--libfuzzer", type=int, metavar="SECONDS", help="let libFuzzer search")
    arguments = parser.parse_args()
    reason = library.missing()
    if reason is not None:
        raise SystemExit(reason)
    sanitizers: list[str] = native.setup.SANITIZER_FLAGS
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        files = seeds(folder / "seeds")
        if arguments.libfuzzer is not None:
            flags = [*sanitizers, "-fsanitize=fuzzer-no-link"]
            command = [
                *(str(program(folder, flags, ["fuzz_model_file.cpp"])), str(files[0].parent)),
                *(f"-max_total_time={arguments.libfuzzer}", f"-exact_artifact_path={FINDING}"),
                *("-rss_limit_mb=2048", "-timeout=30", "-max_len=100000", "-print_final_stats=1"),
            ]
        else:
            sources = ["fuzz_model_file.cpp", "fuzz_model_file_main.cpp"]
            target = program(folder, sanitizers, sources)
            command = [str(target), str(arguments.files), str(FINDING), *map(str, files)]
        return subprocess.run(command, env=os.environ | OPTIONS, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
