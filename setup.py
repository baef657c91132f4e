"""Builds the extension advkd._C with ninja; all metadata live in pyproject.toml.

ADVKD_EXT=0 skips the extension; ADVKD_SANITIZE=1 builds it with the address and undefined-behaviour
sanitizers (tests/sanitize.sh). Without any C++ compiler the package installs without it and
runs on the plain torch ops; a compiler that is there but fails fails the installation.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"

# Compiled once per instruction set; everything else under csrc/ is compiled once.
PER_ISA_SOURCES = (
    *("attention.cpp", "attention_backward.cpp"),
    *("convolution_direct.cpp", "convolution_pack.cpp", "convolution_product.cpp", "winograd.cpp"),
    "winograd_gradient.cpp",
    *("group_norm_affine.cpp", "group_norm_silu.cpp", "group_norm_silu_backward.cpp"),
    *("copy.cpp", "kernel_table.cpp", "philox.cpp", "sampling_step.cpp"),
)
# Sums of products, in which a contraction only saves a rounding.
CONTRACTED_SOURCES = (
    *("attention.cpp", "attention_backward.cpp"),
    *("convolution_direct.cpp", "convolution_pack.cpp", "convolution_product.cpp", "winograd.cpp"),
    "winograd_gradient.cpp",
    *("group_norm_affine.cpp", "group_norm_silu.cpp", "group_norm_silu_backward.cpp"),
)
X86_ISA_FLAGS = {
    "avx2": ["-mavx2", "-mfma"],
    "avx512": [
        *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"),
        "-mprefer-vector-width=512",
    ],
}
# No contraction: the normals must be the same bits in every unit and in torch. The two -fno-*
# flags only let sqrt and comparisons be vectorised; they change no result.
CXX_FLAGS = [
    *("-std=c++17", "-O3", "-fPIC", "-pthread", "-fvisibility=hidden", "-Wall", "-Wextra"),
    *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
]

# A finding ends the process. Less optimisation, since the checks make everything long.
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


def isa_flags(machine: str) -> dict[str, list[str]]:
    """Compiler flags of each instruction set built for a processor family."""
    return {"portable": []} | (X86_ISA_FLAGS if machine in ("x86_64", "AMD64") else {})


def compile_units(machine: str) -> Iterator[tuple[Path, str, list[str]]]:
    """(source, object name, extra flags) of every translation unit of the extension."""
    isas = isa_flags(machine)
    have = [f"-DADVKD_HAVE_{isa.upper()}" for isa in isas]
    for source in sorted(CSRC.rglob("*.cpp")):
        if source.name in PER_ISA_SOURCES:
            contract = ["-ffp-contract=fast"] if source.name in CONTRACTED_SOURCES else []
            for isa, flags in isas.items():
                yield source, f"{isa}/{source.stem}.o", [f"-DADVKD_ISA={isa}", *flags, *contract]
        else:
            yield source, f"{source.stem}.o", have


def ninja_escape(text: str) -> str:
    return text.replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def ninja_text(compiler: list[str], target: Path, version: str, machine: str) -> str:
    """The build.ninja that compiles every unit and links them into `target`."""
    import pybind11

    paths = sysconfig.get_paths()
    includes = [str(CSRC), pybind11.get_include(), paths["include"], paths["platinclude"]]
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
        f"  command = $cxx {shlex.join([*link, *sanitized])} -pthread $in -o $out",
        "  description = link $out",
    ]
    objects = []
    for source, name, extra in compile_units(machine):
        objects.append(name)
        lines.append(f"build {name}: compile {ninja_escape(str(source))}")
        lines.append(f"  extra = {shlex.join(extra)}")
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
        compiler = find_compiler(os.environ)
        if compiler is None:
            raise SystemExit("advkd: no C++ compiler was found")
        build_dir = Path(self.build_temp).resolve() / "advkd"
        build_dir.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        version = self.distribution.get_version()
        text = ninja_text(compiler, target, version, platform.machine())
        (build_dir / "build.ninja").write_text(text)
        run_ninja(build_dir)


def run_ninja(build_dir: Path) -> None:
    """Runs ninja in a folder; a failure ends the installation with the compiler's message."""
    done = subprocess.run(
        [ninja_command(), "-C", str(build_dir)], text=True, capture_output=True, check=False
    )
    if done.returncode != 0:
        raise SystemExit(
            "advkd: the C++ compiler failed on the extension "
            "(ADVKD_EXT=0 installs without it):\n" + done.stdout + done.stderr
        )


def main() -> None:
    reason = skip_reason(os.environ)
    if reason is not None:
        print(f"advkd: installing without the C++ extension, because {reason}", file=sys.stderr)
    setup(
        packages=[*find_packages(include=["advkd", "advkd.*"]), "advkd.kernels"],
        package_dir={"advkd.kernels": "kernels"},
        include_package_data=False,
        package_data={"advkd": ["presets/*.toml", "zoo/**/*", "datasets/**/*"]},
        ext_modules=[] if reason else [Extension("advkd._C", sources=[])],
        cmdclass={"build_ext": NinjaBuildExt},
    )


if __name__ == "__main__":
    main()
