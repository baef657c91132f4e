"""Builds the extension advkd._C with ninja; all metadata live in pyproject.toml.

ADVKD_EXT=0 skips the extension; ADVKD_SANITIZE=1 builds it with the address and undefined-behaviour
sanitizers (tests/sanitize.sh). Without any C++ compiler the package installs without it and
runs on the plain torch ops; a compiler that is there but fails fails the installation.

The CUDA part is built where nvcc of CUDA 12.0 or later is found, in CUDA_HOME or on PATH;
ADVKD_CUDA=0 leaves it out, ADVKD_CUDA=1 insists. It is compiled for the GPUs of this machine; where
there are none, to PTX of one architecture, which the driver of a later machine compiles at the
first use. ADVKD_CUDA_ARCHS, as "80 90" or "all", says otherwise.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"

# The normals and the sampling step have the same bits in every instruction set, on every GPU and in
# torch, so there each operation is rounded on its own. Elsewhere in csrc/cpu and csrc/cuda a
# multiplication and an addition may be contracted, which only saves a rounding.
UNCONTRACTED_SOURCES = (
    *("cpu/philox.cpp", "cpu/sampling_step.cpp"),
    *("cuda/philox.cu", "cuda/sampling_step.cu"),
)
BINDINGS = "bindings.cpp"  # in the folder of the build
# Of builds without threads and of browsers (csrc/CMakeLists.txt, tests/wasm).
ELSEWHERE = ("single_thread.cpp", "wasm.cpp")
X86_ISA_FLAGS = {
    "avx2": ["-mavx2", "-mfma"],
    "avx512": [
        *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"),
        "-mprefer-vector-width=512",
    ],
}
# For instruction sets with dot products of bytes alone, each built beside the set that it extends.
DOT_PRODUCT_SOURCES = ("convolution_int8.cpp",)
X86_DOT_PRODUCT_FLAGS = {
    "avxvnni": [*X86_ISA_FLAGS["avx2"], "-mavxvnni"],
    "avx512vnni": [*X86_ISA_FLAGS["avx512"], "-mavx512vnni"],
}
# The two -fno-* flags only let sqrt and comparisons be vectorized; they change no result.
CXX_FLAGS = [
    *("-std=c++17", "-O3", "-fPIC", "-pthread", "-fvisibility=hidden", "-Wall", "-Wextra"),
    *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
]

# What ADVKD_CUDA_ARCHS=all stands for, as far as nvcc knows them. PTX of the first runs on all of
# them, and PTX of the newest on what comes after.
CUDA_ARCHS = ("80", "86", "89", "90", "100", "120")
OLDEST_CUDA = (12, 0)
CUDA_FLAGS = [
    *("-std=c++17", "-O3", "-DADVKD_ISA=cuda", "-Xcompiler", "-fPIC,-fvisibility=hidden"),
    *("-Xcompiler", "-Wall,-Wextra"),
]

# A finding ends the process. Less optimization, since the checks slow everything down.
SANITIZER_FLAGS = [
    *("-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
    "-fno-omit-frame-pointer",
]


def find_compiler(environ: Mapping[str, str]) -> list[str] | None:
    """The command of the C++ compiler: $CXX, else c++, g++ or clang++ of $PATH, else None."""
    if environ.get("CXX"):
        return shlex.split(environ["CXX"])
    for name in ("c++", "g++", "clang++"):
        found = shutil.which(name, path=environ.get("PATH", ""))
        if found:
            return [found]
    return None


def skip_reason(environ: Mapping[str, str]) -> str | None:
    """Why the extension is not built, as one sentence; None when it is."""
    if environ.get("ADVKD_EXT") == "0":
        return "ADVKD_EXT=0 is set"
    if find_compiler(environ) is None:
        return "no C++ compiler was found (looked for $CXX, c++, g++ and clang++)"
    return None


class Cuda(NamedTuple):
    """A CUDA toolkit: nvcc, its folder, where the static runtime lies, and what to compile for."""

    nvcc: str
    home: Path
    libraries: Path
    archs: tuple[str, ...]
    has_machine_code: bool = True  # of each architecture; PTX is only of the last

    def numbers(self) -> list[str]:
        """The architectures as numbers, without the letter of those that fit one device alone."""
        return [arch.rstrip("af") for arch in self.archs]

    def gencode(self) -> list[str]:
        """nvcc's options for machine code of all architectures, and PTX of the newest."""
        machine = self.archs if self.has_machine_code else ()
        codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in machine]
        newest = self.archs[-1]
        return [*codes, f"-gencode=arch=compute_{newest},code=compute_{newest}"]


def output_of(*command: str) -> str:
    """What a command prints, "" if it cannot be run."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout + done.stderr


def find_nvcc(environ: Mapping[str, str]) -> str | None:
    """The path of nvcc: of $CUDA_HOME, else of $PATH, else None."""
    home = environ.get("CUDA_HOME")
    if home and (Path(home) / "bin" / "nvcc").exists():
        return str(Path(home) / "bin" / "nvcc")
    return shutil.which("nvcc", path=environ.get("PATH", ""))


def find_cuda(environ: Mapping[str, str]) -> Cuda | str:
    """The toolkit to build the CUDA part with, or as one clause why it is left out.

    Raises SystemExit if ADVKD_CUDA=1 insists on what cannot be, or an architecture is unknown.
    """
    if environ.get("ADVKD_CUDA") == "0":
        return "ADVKD_CUDA=0 was set"
    found = toolkit(environ)
    if isinstance(found, str) and environ.get("ADVKD_CUDA") == "1":
        raise SystemExit(f"advkd: ADVKD_CUDA=1 cannot be met, because {found}")
    return found


def toolkit(environ: Mapping[str, str]) -> Cuda | str:
    """The CUDA toolkit to build with, or why none serves, as a clause."""
    nvcc = find_nvcc(environ)
    if nvcc is None:
        return "nvcc was not found (looked in CUDA_HOME and on PATH)"
    release = re.search(r"release (\d+)\.(\d+)", output_of(nvcc, "--version"))
    if release is None:
        return f"{nvcc} does not tell its version"
    version = (int(release[1]), int(release[2]))
    if version < OLDEST_CUDA:
        return f"nvcc is of CUDA {version[0]}.{version[1]}, older than 12.0"
    top = re.search(r"^#\$ TOP=(.*)$", output_of(nvcc, "--dryrun", "-c", "x.cu"), re.MULTILINE)
    home = Path(top[1].strip()).resolve() if top else Path(nvcc).resolve().parents[1]
    if not (home / "include" / "cuda_runtime.h").exists():
        return f"{home} holds no include/cuda_runtime.h"
    for name in ("lib64", f"targets/{platform.machine()}-linux/lib", "lib"):
        if (home / name / "libcudart_static.a").exists():
            return Cuda(nvcc, home, home / name, *cuda_archs(nvcc, environ))
    return f"{home} holds no libcudart_static.a"


def cuda_archs(nvcc: str, environ: Mapping[str, str]) -> tuple[tuple[str, ...], bool]:
    """The architectures to compile for, and whether to machine code or only to PTX: those of
    $ADVKD_CUDA_ARCHS, all of which nvcc must know, else those of the GPUs that are here."""
    known = set(re.findall(r"sm_(\w+)", output_of(nvcc, "--list-gpu-code")))
    usual = [arch for arch in CUDA_ARCHS if arch in known]
    asked = re.findall(r"\w+", environ.get("ADVKD_CUDA_ARCHS", ""))
    if asked == ["all"]:
        return tuple(usual), True
    unknown = [arch for arch in asked if arch not in known]
    if unknown:
        raise SystemExit(f"advkd: nvcc knows no architecture {', '.join(unknown)}")
    chosen = asked or [arch for arch in present_archs(environ) if arch in known]
    return (tuple(chosen), True) if chosen else (tuple(usual[:1]), False)


def present_archs(environ: Mapping[str, str]) -> list[str]:
    """The architectures of this machine's GPUs, as "90", each once and in order."""
    tool = shutil.which("nvidia-smi", path=environ.get("PATH", ""))
    if tool is None:
        return []
    said = output_of(tool, "--query-gpu=compute_cap", "--format=csv,noheader")
    found = re.findall(r"^(\d+)\.(\d)$", said, re.MULTILINE)
    return [f"{major}{minor}" for major, minor in sorted({(int(a), int(b)) for a, b in found})]


def target_machine() -> str:
    """The processor family to build for: this machine's, or, where another system is built for, the
    one that _PYTHON_HOST_PLATFORM names, as "linux-aarch64"."""
    named = os.environ.get("_PYTHON_HOST_PLATFORM", "")
    return named.rpartition("-")[2] or platform.machine()


def isa_flags(machine: str) -> dict[str, list[str]]:
    """Compiler flags of each instruction set built for a processor family."""
    if machine in ("aarch64", "arm64"):
        # Every such processor has it. GCC would schedule the products' loads so far ahead that the
        # sums leave the registers.
        return {"neon": ["-fno-schedule-insns"]}
    return {"portable": []} | (X86_ISA_FLAGS if machine in ("x86_64", "AMD64") else {})


def dot_product_flags(machine: str) -> dict[str, list[str]]:
    """The same of each instruction set with dot products of bytes."""
    if machine in ("aarch64", "arm64"):
        # Every processor of Apple has them, and its compilers expect so.
        extra = [] if sys.platform == "darwin" else ["-mcpu=generic+dotprod"]
        return {"neondot": [*extra, *isa_flags(machine)["neon"]]}
    return X86_DOT_PRODUCT_FLAGS if machine in ("x86_64", "AMD64") else {}


def unknown_sets(compiler: list[str], machine: str) -> list[str]:
    """The sets with dot products of bytes that a compiler is too old for."""

    def knows(flags: list[str]) -> bool:
        command = [*compiler, *flags, "-x", "c++", "-E", os.devnull]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0

    return [name for name, flags in dot_product_flags(machine).items() if not knows(flags)]


def compile_units(
    machine: str, cuda: Cuda | str, left_out: Sequence[str] = ()
) -> Iterator[tuple[Path, str, list[str]]]:
    """(source, object name, extra flags) of every C++ translation unit of the extension.

    All of csrc/cpu is compiled once per instruction set that it is for, but for those left out;
    everything else once, and csrc/python's own as one unit (`bindings_text`).
    """
    isas = isa_flags(machine)
    dot_products = {n: f for n, f in dot_product_flags(machine).items() if n not in left_out}
    have = [f"-DADVKD_HAVE_{isa.upper()}" for isa in (*isas, *dot_products)]
    have += ["-DADVKD_TEACHERS"]  # operations that no student has
    if isinstance(cuda, Cuda):
        have += ["-DADVKD_HAVE_CUDA", f'-DADVKD_CUDA_ARCHS="{" ".join(cuda.numbers())}"']
        have += [f"-I{cuda.home / 'include'}"]
    else:
        have += [f'-DADVKD_CUDA_LEFT_OUT="{cuda}"']
    yield Path(BINDINGS), "bindings.o", have  # takes longest, so it begins
    bound = bindings()
    for source in sorted(CSRC.rglob("*.cpp")):
        room = source.parent.name
        if source.name in ELSEWHERE or source in bound:
            continue
        if source.name == "cuda_bindings.cpp" and not isinstance(cuda, Cuda):
            continue
        if room == "cpu":
            exact = f"cpu/{source.name}" in UNCONTRACTED_SOURCES
            contract = [] if exact else ["-ffp-contract=fast"]
            sets = dot_products if source.name in DOT_PRODUCT_SOURCES else isas
            for isa, flags in sets.items():
                name = f"cpu/{isa}/{source.stem}.o"
                yield source, name, [f"-DADVKD_ISA={isa}", *flags, *contract]
        else:
            yield source, f"{room}/{source.stem}.o", have


def bindings() -> list[Path]:
    """The sources of csrc/python, but for those that need CUDA."""
    sources = sorted((CSRC / "python").glob("*.cpp"))
    return [source for source in sources if source.name != "cuda_bindings.cpp"]


def bindings_text() -> str:
    """The source that includes all bindings: the compiler reads pybind11's headers, which take it
    longer than what is bound, only once."""
    return "".join(f'#include "python/{source.name}"\n' for source in bindings())


def cuda_units(cuda: Cuda | str) -> Iterator[tuple[Path, str, list[str]]]:
    """The same of every CUDA unit."""
    if isinstance(cuda, str):
        return
    for source in sorted((CSRC / "cuda").glob("*.cu")):
        exact = ["-fmad=false"] if f"cuda/{source.name}" in UNCONTRACTED_SOURCES else []
        yield source, f"cuda/{source.stem}.o", exact


def ninja_escape(text: str) -> str:
    return text.replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def cuda_rule(cuda: Cuda) -> list[str]:
    """ninja's rule for a CUDA unit. nvcc works on two architectures at a time."""
    command = [cuda.nvcc, *CUDA_FLAGS, "--threads", "2", f"-I{CSRC}", *cuda.gencode()]
    return [
        "rule compile_cuda",
        f"  command = {shlex.join(command).replace('$', '$$')} $extra "
        "-MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = compile $out",
    ]


def libraries_of(cuda: Cuda | str) -> list[str]:
    """The linker's options. The runtime's names stay inside, lest they meet those of torch's."""
    if isinstance(cuda, str):
        return []
    return [
        *("-Wl,--exclude-libs,ALL", f"-L{cuda.libraries}", "-lcudart_static"),
        *("-lpthread", "-ldl", "-lrt"),
    ]


def ninja_text(
    compiler: list[str], target: Path, version: str, machine: str, cuda: Cuda | str
) -> str:
    """The build.ninja that compiles every unit and links them into `target`."""
    import pybind11

    paths = sysconfig.get_paths()
    includes = [
        *(str(CSRC), str(CSRC / "include"), pybind11.get_include()),
        *(paths["include"], paths["platinclude"]),
    ]
    flags = [*CXX_FLAGS, *(f"-I{path}" for path in dict.fromkeys(includes))]
    flags.append(f'-DADVKD_VERSION="{version}"')
    sanitized = SANITIZER_FLAGS if os.environ.get("ADVKD_SANITIZE") == "1" else []
    flags += sanitized
    link = ["-bundle", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-shared"]
    lines = [
        f"cxx = {shlex.join(compiler).replace('$', '$$')}",
        f"flags = {shlex.join(flags).replace('$', '$$')}",
        "rule compile",
        "  command = $cxx $flags $extra -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = compile $out",
        "rule link",
        f"  command = $cxx {shlex.join([*link, *sanitized])} -pthread $in -o $out "
        + shlex.join(libraries_of(cuda)).replace("$", "$$"),
        "  description = link $out",
    ]
    if isinstance(cuda, Cuda):
        lines += cuda_rule(cuda)
    objects = []
    # nvcc takes longest, so it begins.
    for rule, units in (
        ("compile_cuda", cuda_units(cuda)),
        ("compile", compile_units(machine, cuda, unknown_sets(compiler, machine))),
    ):
        for source, name, extra in units:
            objects.append(name)
            lines.append(f"build {name}: {rule} {ninja_escape(str(source))}")
            lines.append(f"  extra = {shlex.join(extra).replace('$', '$$')}")
    lines.append(f"build {ninja_escape(str(target))}: link {' '.join(objects)}")
    return "\n".join(lines) + "\n"


def ninja_command() -> str:
    """The ninja of the Python package of that name, else the one of $PATH."""
    try:
        import ninja
    except ImportError:
        return "ninja"
    packaged = Path(ninja.BIN_DIR) / "ninja"
    return str(packaged) if packaged.exists() else "ninja"


class NinjaBuildExt(build_ext):
    """build_ext that hands the whole extension to ninja."""

    def build_extension(self, ext: Extension) -> None:
        """Build the extension by ninja; SystemExit with the compiler's message where it fails."""
        compiler = find_compiler(os.environ)
        if compiler is None:
            raise SystemExit("advkd: no C++ compiler was found")
        build_dir = Path(self.build_temp).resolve() / "advkd"
        build_dir.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        version = self.distribution.get_version()
        cuda = find_cuda(os.environ)
        if isinstance(cuda, str):
            print(f"advkd: the extension is built without CUDA, because {cuda}", file=sys.stderr)
        text = ninja_text(compiler, target, version, target_machine(), cuda)
        (build_dir / "build.ninja").write_text(text)
        write_if_changed(build_dir / BINDINGS, bindings_text())
        run_ninja(build_dir)


def write_if_changed(path: Path, text: str) -> None:
    """Write a source that ninja compiles anew when its time changes."""
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def run_ninja(build_dir: Path) -> None:
    """Runs ninja in a folder; a failure ends the installation with the compiler's message."""
    done = subprocess.run(
        [ninja_command(), "-C", str(build_dir)], text=True, capture_output=True, check=False
    )
    if done.returncode != 0:
        raise SystemExit(
            "advkd: a compiler failed on the extension (ADVKD_EXT=0 installs without it, "
            "ADVKD_CUDA=0 without its CUDA part):\n" + done.stdout + done.stderr
        )


def main() -> None:
    """Install the package, with its extension unless `skip_reason` has one against it."""
    reason = skip_reason(os.environ)
    if reason is not None:
        print(f"advkd: installing without the C++ extension, because {reason}", file=sys.stderr)
    setup(
        packages=[
            *find_packages(include=["advkd", "advkd.*"]),
            *("advkd.kernels", "advkd.runtime"),
        ],
        package_dir={"advkd.kernels": "kernels", "advkd.runtime": "csrc/advkd_runtime"},
        include_package_data=False,
        package_data={
            "advkd": [
                *("presets/*.toml", "zoo/**/*", "data/datasets/**/*"),
                *("report/*.j2", "report/*.css", "deploy/web/*"),
            ],
            "advkd.runtime": ["py.typed"],
        },
        ext_modules=[] if reason else [Extension("advkd._C", sources=[])],
        cmdclass={"build_ext": NinjaBuildExt},
    )


if __name__ == "__main__":
    main()
