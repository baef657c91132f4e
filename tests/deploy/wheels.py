"""Wheels for Linux, CPU only, with all instruction sets of a processor family, built by zig.

    python tests/deploy/wheels.py x86_64 --out dist
    python tests/deploy/wheels.py aarch64 --out dist

Builds advkd's wheel for the Python that runs this, against the glibc of manylinux2014 (2.17),
whatever this machine's glibc and processor are, and checks what it asks of a system: nothing but
the C library, and of that nothing newer. The C++ library lies inside. Takes setuptools, wheel,
pybind11 and `pip install ziglang==0.15.1`. Wheels of other Pythons are `cibuildwheel`'s work
(pyproject.toml), which needs containers.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import struct
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("advkd", "csrc", "kernels", "setup.py", "pyproject.toml", "README.md", "LICENSE")
GLIBC = (2, 17)
# What a manylinux wheel may load (PEP 599), as far as this one does.
SYSTEM = re.compile(r"lib(c|m|pthread|dl|rt)\.so\.\d|ld-linux-(x86-64|aarch64)\.so\.\d")
MACHINES = {"x86_64": 62, "aarch64": 183}  # e_machine of ELF
ISAS = {
    "x86_64": ("portable", "avx2", "avx512"),
    "aarch64": ("neon",),
}


def built(machine: str, out: Path) -> Path:
    """advkd's wheel for a processor family, in a folder."""
    target = f"{machine}-linux-gnu.{GLIBC[0]}.{GLIBC[1]}"
    # zig leaves evex512 out of what -mavx512f means.
    extra = ["-mevex512"] if machine == "x86_64" else []
    compiler = [sys.executable, "-m", "ziglang", "c++", "-target", target, *extra]
    version = sysconfig.get_config_var("SOABI").split("-")[1]
    settings = {
        "ADVKD_CUDA": "0",
        "CXX": shlex.join(compiler),
        "_PYTHON_HOST_PLATFORM": f"linux-{machine}",
        "SETUPTOOLS_EXT_SUFFIX": f".cpython-{version}-{machine}-linux-gnu.so",
    }
    with tempfile.TemporaryDirectory(prefix="advkd-wheel-") as folder:
        for name in SOURCES:
            source, copy = ROOT / name, Path(folder, name)
            if source.is_dir():
                ignored = shutil.ignore_patterns("__pycache__", "_C*.so")
                shutil.copytree(source, copy, ignore=ignored)
            else:
                shutil.copy(source, copy)
        tag = f"manylinux_{GLIBC[0]}_{GLIBC[1]}_{machine}"
        command = [sys.executable, "setup.py", "--quiet", "bdist_wheel", "--plat-name", tag]
        done = subprocess.run(
            [*command, "--dist-dir", str(out.resolve())],
            cwd=folder, env=os.environ | settings, capture_output=True, text=True, check=False,
        )  # fmt: skip
    if done.returncode != 0:
        raise SystemExit(f"no wheel was built:\n{done.stdout}{done.stderr}")
    (wheel,) = out.glob(f"advkd-*{machine}.whl")
    return wheel


class Library(NamedTuple):
    """What an ELF file of 64 bits says of itself."""

    machine: int
    needed: list[str]  # libraries
    versions: list[str]  # of symbols that it asks of them, as "GLIBC_2.17"
    exported: list[str]


def library_of(content: bytes) -> Library:
    """Read an ELF file's sections .dynamic, .dynsym and .gnu.version_r."""
    (machine,) = struct.unpack_from("<H", content, 18)
    offset, (size, count) = (
        struct.unpack_from("<Q", content, 40)[0],
        struct.unpack_from("<HH", content, 58),
    )
    sections = [struct.unpack_from("<IIQQQQIIQQ", content, offset + size * i) for i in range(count)]

    def text(strings: int, at: int) -> str:
        begin = sections[strings][4] + at
        return content[begin : content.index(b"\0", begin)].decode()

    needed, versions, exported = [], [], []
    for _, kind, _, _, at, length, link, info, _, _ in sections:
        if kind == 6:  # SHT_DYNAMIC
            for entry in range(at, at + length, 16):
                tag, value = struct.unpack_from("<QQ", content, entry)
                needed += [text(link, value)] if tag == 1 else []
        elif kind == 11:  # SHT_DYNSYM
            for entry in range(at, at + length, 24):
                name, how, _, where = struct.unpack_from("<IBBH", content, entry)
                exported += [text(link, name)] if where and how >> 4 else []
        elif kind == 0x6FFFFFFE:  # SHT_GNU_verneed
            for _ in range(info):
                _, auxiliary, _, first, following = struct.unpack_from("<HHIII", content, at)
                each = at + first
                for _ in range(auxiliary):
                    _, _, _, name, further = struct.unpack_from("<IHHII", content, each)
                    versions.append(text(link, name))
                    each += further
                at += following
    return Library(machine, needed, versions, exported)


def problems(wheel: Path, machine: str) -> list[str]:
    """What keeps a wheel from running where its name says."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".so")]
        contents = [archive.read(name) for name in names]
        tags = archive.read(next(n for n in archive.namelist() if n.endswith("/WHEEL"))).decode()
    if len(names) != 1:
        return [f"it holds {len(names)} libraries instead of one"]
    library, found = library_of(contents[0]), []
    if f"-{machine}-linux-gnu.so" not in names[0] or library.machine != MACHINES[machine]:
        found.append(f"{names[0]} is for another machine, {library.machine}")
    if f"manylinux_{GLIBC[0]}_{GLIBC[1]}_{machine}" not in tags:
        found.append("it is not tagged as it is named")
    found += [f"it needs {name}" for name in library.needed if not SYSTEM.fullmatch(name)]
    for version in library.versions:
        number = re.fullmatch(r"GLIBC_(\d+)\.(\d+)(\.\d+)?", version)
        if number is None or (int(number[1]), int(number[2])) > GLIBC:
            found.append(f"it needs {version}")
    wanted = {"PyInit__C", "advkd_version", "advkd_generate"}
    found += [f"it does not export {name}" for name in sorted(wanted - {*library.exported})]
    absent = [isa for isa in ISAS[machine] if f"\0{isa}\0".encode() not in contents[0]]
    found += [f"it has no kernels for {isa}" for isa in absent]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("machine", choices=tuple(MACHINES))
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    wheel = built(arguments.machine, arguments.out)
    found = problems(wheel, arguments.machine)
    if found:
        raise SystemExit(f"{wheel}: {'; '.join(found)}")
    print(f"{wheel}: {wheel.stat().st_size:,} bytes, glibc {GLIBC[0]}.{GLIBC[1]} and later")
    return 0


if __name__ == "__main__":
    sys.exit(main())
