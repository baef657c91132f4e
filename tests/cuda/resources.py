"""What nvcc makes of the CUDA kernels, for GPUs that need not be here, and its rules.

    python tests/cuda/resources.py [--write] [--archs 86 120]

Compiles csrc/cuda for sm_80, sm_90 and sm_100, or those named, with setup.py's flags and reads
registers, shared memory, stack and the SASS by cuobjdump, which comes with Triton. A kernel that
spills, uses local memory or float64, or whose vectors do not move 16 bytes at a time, is an error;
--write puts the table into docs/kernels.md.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs" / "kernels.md"
BEGIN, END = "<!-- cuda resources: begin -->", "<!-- cuda resources: end -->"
ARCHS = ("80", "90", "100")
SOURCES = {"philox.cu": ["-fmad=false"], "sampling_step.cu": ["-fmad=false"]}


@dataclass(frozen=True)
class Kernel:
    """One kernel on one architecture."""

    name: str
    registers: int
    shared: int  # bytes of a block
    stack: int  # bytes of a thread
    spills: int  # local loads and stores in the SASS
    loads: tuple[int, ...]  # widths in bits of global loads
    stores: tuple[int, ...]
    doubles: int  # float64 instructions

    @property
    def vectors(self) -> bool:
        """Whether its threads access 16 bytes of elements at a time."""
        return re.search(r"<\w+, [2-9]", self.name) is not None

    def broken_rules(self) -> list[str]:
        found = []
        if self.stack or self.spills:
            found.append(f"{self.stack} bytes of stack and {self.spills} local accesses")
        if self.doubles:
            found.append(f"{self.doubles} float64 instructions")
        if self.vectors and 128 not in self.stores:
            found.append("no 16-byte store")
        if self.vectors and "first_state" not in self.name and 128 not in self.loads:
            found.append("no 16-byte load")
        return found


def nvcc() -> str | None:
    return shutil.which("nvcc")


def cuobjdump() -> str | None:
    """That of Triton, else of the PATH."""
    spec = importlib.util.find_spec("triton")
    if spec is not None and spec.origin is not None:
        packaged = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        if packaged.exists():
            return str(packaged)
    return shutil.which("cuobjdump")


def output_of(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def compiled(source: str, arch: str, folder: Path) -> Path:
    compiler = nvcc()
    assert compiler is not None
    target = folder / f"{source}.{arch}.cubin"
    output_of(
        compiler, "-std=c++17", "-O3", "-DADVKD_ISA=cuda", f"-I{ROOT / 'csrc'}", f"-arch=sm_{arch}",
        *SOURCES[source], "-cubin", str(ROOT / "csrc" / "cuda" / source), "-o", str(target),
    )  # fmt: skip
    return target


def short(mangled: str) -> str:
    """A kernel's name and template arguments."""
    name = subprocess.run(["c++filt", mangled], capture_output=True, text=True).stdout.strip()
    name = name.replace("advkd::cuda::(anonymous namespace)::", "").removeprefix("void ")
    name = re.sub(r"\(\w+\)(?=\d)", "", name)  # (int)8
    return re.sub(r"\(.*", "", name).replace("__nv_", "").replace("__half", "float16")


def kernels_of(cubin: Path) -> list[Kernel]:
    tool = cuobjdump()
    assert tool is not None
    usage = output_of(tool, "-res-usage", str(cubin))
    resources = re.findall(
        r"Function (\w+):\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage
    )
    sass = re.split(r"\n\s*Function : ", output_of(tool, "-sass", str(cubin)))[1:]
    text_of = {text.split()[0]: text for text in sass}
    return sorted(
        (
            _kernel(name, int(registers), int(shared), int(stack) + int(local), text_of[name])
            for name, registers, stack, shared, local in resources
        ),
        key=lambda kernel: kernel.name,
    )


def _kernel(name: str, registers: int, shared: int, stack: int, sass: str) -> Kernel:
    def widths(instruction: str) -> tuple[int, ...]:
        found = re.findall(rf"\b{instruction}((?:\.\w+)*)", sass)
        return tuple(
            sorted({next((int(w) for w in m.split(".") if w in ("64", "128")), 32) for m in found})
        )

    return Kernel(
        short(name), registers, shared, stack, len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        widths("LDG"), widths("STG"), len(re.findall(r"\b(?:DADD|DMUL|DFMA|F2F\.F64)\b", sass)),
    )  # fmt: skip


def table(folder: Path, archs: tuple[str, ...] = ARCHS) -> tuple[list[str], list[str]]:
    """The lines of the table, and all broken rules."""
    by_arch = {
        arch: {
            kernel.name: kernel
            for source in SOURCES
            for kernel in kernels_of(compiled(source, arch, folder))
        }
        for arch in archs
    }
    lines = [
        "| kernel | registers on " + ", ".join(f"sm_{a}" for a in archs)
        + " | shared memory, bytes | widest load and store, bytes |",
        "|---|---|---|---|",
    ]  # fmt: skip
    broken = []
    for name in sorted(by_arch[archs[0]]):
        kernels = [by_arch[arch][name] for arch in archs]
        registers = ", ".join(str(kernel.registers) for kernel in kernels)
        widest = f"{max(kernels[0].loads) // 8}, {max(kernels[0].stores) // 8}"
        lines.append(f"| `{name}` | {registers} | {max(k.shared for k in kernels)} | {widest} |")
        for arch, kernel in zip(archs, kernels, strict=True):
            broken += [f"{name} on sm_{arch}: {rule}" for rule in kernel.broken_rules()]
    return lines, broken


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="into docs/kernels.md")
    parser.add_argument("--archs", nargs="+", default=ARCHS, help="compute capabilities, as 86")
    args = parser.parse_args()
    if args.write and tuple(args.archs) != ARCHS:
        parser.error("the table is of the usual architectures, so --write takes no --archs")
    with tempfile.TemporaryDirectory() as folder:
        lines, broken = table(Path(folder), tuple(args.archs))
    print("\n".join([*lines, "", *broken]))
    if args.write:
        head, rest = DOCS.read_text().split(BEGIN)
        DOCS.write_text("\n".join([head + BEGIN, *lines, END + rest.split(END)[1]]))
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
