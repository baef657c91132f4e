"""Compiles every variant of the Triton kernels for GPUs that need not be there, and checks it.

    python tests/kernels/aot.py [--jobs 2] [--only TEXT] [--write]

For each build of kernels/variants.py and each target: registers, shared memory, spills, stack,
occupancy, widths of the global accesses, tensor-core and float64 instructions, read from the
machine code by the tools that come with Triton. A build that breaks a rule is an error; --write
puts the table of all variants into docs/kernels.md. The traffic is counted by Triton's
interpreter, see traffic.py beside this file.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import triton
from advkd.kernels.compilation import Build
from advkd.kernels.variants import all_builds, all_variants
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# Also where this file is run as a script or loaded by its path.
sys.path.insert(0, str(Path(__file__).parent))
import traffic

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs" / "kernels.md"
BEGIN, END = "<!-- variants: begin -->", "<!-- variants: end -->"
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# What a program may take: the least that a consumer GPU of sm_86 or sm_89 gives, and LDS.
SHARED_LIMIT = {"sm_80": 99 << 10, "sm_90": 99 << 10, "sm_100": 99 << 10, "gfx942": 64 << 10}
SHARED_OF_PROCESSOR = {"sm_80": 164 << 10, "sm_90": 228 << 10, "sm_100": 228 << 10}


@dataclass(frozen=True)
class Report:
    """What one build became on one target."""

    registers: int  # of a thread
    shared: int  # bytes of a program
    stack: int  # bytes of a thread
    spills: int  # instructions that spill or reload, or what the compiler says it spilled
    occupancy: float  # warps that a processor holds at a time, of those that it could
    reads: dict[int, int]  # width of global loads in bytes -> instructions
    writes: dict[int, int]
    matrix: int  # tensor-core instructions
    float64: int  # instructions with float64 operands


def serves(build: Build, target: str) -> bool:
    """Whether the launchers pick the build on the target."""
    return not build.nvidia or (target.startswith("sm_") and int(target[3:]) >= build.nvidia)


def compiled(build: Build, target: str) -> triton.compiler.CompiledKernel:
    """The build for a target; pointers are at 16 bytes, as the launchers see to."""
    names = build.kernel.arg_names
    signature = {name: build.types.get(name, "constexpr") for name in names}
    pointers = [(i,) for i, name in enumerate(names) if signature[name].startswith("*")]
    attrs = {place: [["tt.divisibility", 16]] for place in pointers}
    source = ASTSource(build.kernel, signature, dict(build.constants), attrs)
    return triton.compile(source, target=TARGETS[target], options=dict(build.options))


def inspect(build: Build, target: str) -> Report:
    kernel = compiled(build, target)
    warps, shared = build.options["num_warps"], kernel.metadata.shared
    if "amdgcn" in kernel.asm:
        return _inspect_amd(kernel.asm["amdgcn"], warps, shared)
    return _inspect_nvidia(kernel.asm["cubin"], kernel.asm["ptx"], target, warps, shared)


def _tool(name: str, *arguments: str) -> str:
    done = subprocess.run(
        [str(TOOLS / name), *arguments], capture_output=True, text=True, check=True, timeout=120
    )
    return done.stdout


def _widths(instructions: Iterator[str]) -> dict[int, int]:
    """Of SASS instructions such as LDG.E.128 or STG.E.U16: bytes -> how many."""
    widths: Counter[int] = Counter()
    for words in instructions:
        found = re.search(r"\.[US]?(8|16|64|128|256)\b", words)
        widths[int(found[1]) // 8 if found else 4] += 1
    return dict(widths)


def _inspect_nvidia(cubin: bytes, ptx: str, target: str, warps: int, shared: int) -> Report:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        sass = _tool("nvdisasm", "-c", "-ndf", file.name)
    numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    opcodes = re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", sass, re.M)
    assert opcodes, "nvdisasm printed no instruction"
    return Report(
        registers=numbers["REG"],
        shared=shared,
        stack=numbers["STACK"] + numbers["LOCAL"],
        spills=sum(op.split(".")[0] in ("STL", "LDL") for op in opcodes),
        occupancy=_nvidia_occupancy(target, numbers["REG"], shared, warps),
        # LDGSTS copies to shared memory asynchronously.
        reads=_widths(op for op in opcodes if op.split(".")[0] in ("LDG", "LDGSTS")),
        writes=_widths(op for op in opcodes if op.split(".")[0] == "STG"),
        matrix=sum(bool(re.match(r"HMMA|HGMMA|UTC\w*MMA", op)) for op in opcodes),
        float64=len(re.findall(r"\.f64\b", ptx))
        + sum(bool(re.match(r"D(ADD|MUL|FMA|SETP|MNMX|MMA)\b", op)) for op in opcodes),
    )


def _nvidia_occupancy(target: str, registers: int, shared: int, warps: int) -> float:
    """Of 64 warps: registers are handed to warps in units of 256, 1 KiB a program is reserved."""
    by_registers = 65536 // (-(-registers * 32 // 256) * 256) // warps
    by_shared = SHARED_OF_PROCESSOR[target] // (shared + 1024)
    return min(by_registers, by_shared, 64 // warps, 32) * warps / 64


def _inspect_amd(text: str, warps: int, shared: int) -> Report:
    def number(key: str) -> int:
        return int(re.search(rf"\.{key}:\s+(\d+)", text)[1])  # type: ignore[index]

    def widths(kind: str) -> dict[int, int]:
        pattern = rf"^\s+(?:global|buffer|flat)_{kind}_(\w+)"
        sizes = {"dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16}
        found = re.findall(pattern, text, re.M)
        return dict(Counter(sizes.get(word, 1 if "byte" in word else 2) for word in found))

    vgprs = number("vgpr_count")  # accumulation registers included
    # A SIMD has 512 registers for each lane, handed out eight at a time, and holds 8 waves at most.
    of_simd = min(8, 512 // (-(-vgprs // 8) * 8))
    programs = min(of_simd * 4 // warps, (64 << 10) // max(shared, 1))
    return Report(
        registers=vgprs,
        shared=shared,
        stack=number("private_segment_fixed_size"),
        # Scalar registers spill to vector registers, which costs no memory.
        spills=number("vgpr_spill_count"),
        occupancy=programs * warps / 32,
        reads=widths("load"),
        writes=widths("store"),
        matrix=len(re.findall(r"^\s+v_mfma_", text, re.M)),
        float64=len(re.findall(r"^\s+v_\w+_f64", text, re.M)),
    )


def problems(build: Build, target: str, report: Report) -> list[str]:
    """What the build does on the target that no kernel of ours may do."""
    found = []
    if report.spills:
        found.append(f"{report.spills} spills")
    if report.stack:
        found.append(f"{report.stack} bytes of stack")
    if report.shared > SHARED_LIMIT[target]:
        found.append(f"{report.shared} bytes of shared memory")
    if report.float64:
        found.append(f"{report.float64} float64 instructions")
    if not report.occupancy:
        found.append("does not fit a processor")
    if max(report.reads) < build.read_bytes:
        found.append(f"reads {max(report.reads)} bytes at a time, not {build.read_bytes}")
    if max(report.writes) < build.write_bytes:
        found.append(f"writes {max(report.writes)} bytes at a time, not {build.write_bytes}")
    if build.tensor_cores and not report.matrix:
        found.append("no tensor-core instruction")
    return [f"{build.variant} ({build.edges}) on {target}: {words}" for words in found]


def _inspect_by_number(work: tuple[int, str]) -> tuple[int, str, Report]:
    number, target = work
    return number, target, inspect(all_builds()[number], target)


def inspect_all(numbers: Sequence[int], jobs: int) -> Iterator[tuple[int, str, Report]]:
    """(number of the build, target, report) for each build and target, as they are done."""
    builds = all_builds()
    work = [(number, t) for number in numbers for t in TARGETS if serves(builds[number], t)]
    if jobs == 1:
        yield from map(_inspect_by_number, work)
        return
    with ProcessPoolExecutor(jobs) as pool:
        yield from pool.map(_inspect_by_number, work, chunksize=4)


HEADER = """\
| variant | warps | registers | shared KiB | occupancy % | spills | widths read, written | \
tensor-core instructions | traffic |
|---|---|---|---|---|---|---|---|---|"""


def row(variant: str, reports: dict[tuple[int, str], Report], traffic: str) -> str:
    """The variant's row: the worst of its builds, for each target."""
    builds = all_builds()
    numbers = [number for number, build in enumerate(builds) if build.variant == variant]
    wide = max(builds[number].read_bytes for number in numbers)
    widest = [number for number in numbers if builds[number].read_bytes == wide]

    def worst(field: str, choose: Callable[[list[float]], float] = max) -> list[float]:
        values = {
            t: [getattr(reports[n, t], field) for n in numbers if (n, t) in reports]
            for t in TARGETS
        }
        return [choose(values[target]) for target in TARGETS if values[target]]

    def width(field: str) -> int:
        return min(max(getattr(reports[at], field)) for at in reports if at[0] in widest)

    cells = [
        variant,
        str(builds[numbers[0]].options["num_warps"]),
        _joined(worst("registers")),
        _joined([shared / 1024 for shared in worst("shared")]),
        _joined([100 * share for share in worst("occupancy", min)]),
        str(int(sum(worst("spills")))),
        f"{width('reads')} {width('writes')}",
        _joined(worst("matrix", min)),
        traffic,
    ]
    return "| " + " | ".join(cells) + " |"


def _joined(values: Sequence[float]) -> str:
    """Of the targets that it serves; one number where they agree."""
    words = [f"{value:.0f}" for value in values]
    return words[0] if len(set(words)) == 1 else " ".join(words)


def rows_of(text: str) -> dict[str, str]:
    """Variant -> row of a document's table, in its order."""
    lines = text.split(BEGIN)[1].split(END)[0].strip().splitlines()[2:]
    return {line.split("|")[1].strip(): line for line in lines}


def write(rows: dict[str, str]) -> None:
    """Puts rows into the table in docs/kernels.md; those of other variants stay."""
    text = DOCS.read_text()
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    rows = rows_of(text) | rows
    table = "\n".join([HEADER, *(rows[name] for name in all_variants() if name in rows)])
    DOCS.write_text(f"{before}{BEGIN}\n{table}\n{END}{after}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--only", default="", help="only variants whose name contains this")
    parser.add_argument("--write", action="store_true", help="put the rows into docs/kernels.md")
    arguments = parser.parse_args()
    builds = all_builds()
    numbers = [i for i, build in enumerate(builds) if arguments.only in build.variant]
    reports: dict[tuple[int, str], Report] = {}
    found = []
    for number, target, report in inspect_all(numbers, arguments.jobs):
        reports[number, target] = report
        found += problems(builds[number], target, report)
        print(f"{builds[number].variant} ({builds[number].edges}) {target}: {report}", flush=True)
    print(f"{len(reports)} compilations of {len(builds)} builds, {len(found)} problems")
    print("\n".join(found))
    if arguments.write:
        names = dict.fromkeys(builds[number].variant for number in numbers)
        ratios = traffic.by_variant(names)
        write({name: row(name, reports, ratios[name]) for name in names})
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
