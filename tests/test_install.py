"""Building and installing: the helpers of setup.py, and the package without its extension."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import subprocess
import sys
from glob import glob
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def build() -> ModuleType:
    pytest.importorskip("setuptools")
    spec = importlib.util.spec_from_file_location("advkd_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def executable(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path


def test_no_compiler_is_one_clear_line(build: ModuleType, tmp_path: Path) -> None:
    reason = build.skip_reason({"PATH": str(tmp_path)})
    assert reason == "no C++ compiler was found (looked for $CXX, c++, g++ and clang++)"


def test_the_extension_can_be_switched_off(build: ModuleType) -> None:
    assert build.skip_reason(dict(os.environ) | {"ADVKD_EXT": "0"}) == "ADVKD_EXT=0 is set"


def test_the_compiler_is_found(build: ModuleType, tmp_path: Path) -> None:
    compiler = executable(tmp_path / "g++", "#!/bin/sh\n")
    assert build.find_compiler({"PATH": str(tmp_path)}) == [str(compiler)]
    chosen = build.find_compiler({"PATH": str(tmp_path), "CXX": "ccache clang++"})
    assert chosen == ["ccache", "clang++"]
    assert build.skip_reason({"PATH": str(tmp_path)}) is None


def test_a_failing_compiler_fails_the_installation(build: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("ninja")
    pytest.importorskip("pybind11")
    compiler = executable(tmp_path / "c++", "#!/bin/sh\necho 'the disk is on fire' >&2\nexit 1\n")
    text = build.ninja_text([str(compiler)], tmp_path / "_C.so", "0", "x86_64", "no CUDA")
    (tmp_path / "build.ninja").write_text(text)
    (tmp_path / build.BINDINGS).write_text(build.bindings_text())
    with pytest.raises(SystemExit, match=r"(?s)compiler failed.*ADVKD_EXT=0.*the disk is on fire"):
        build.run_ninja(tmp_path)


@pytest.mark.parametrize(
    ("machine", "isas", "dot_products"),
    [
        ("x86_64", {"portable", "avx2", "avx512"}, {"avxvnni", "avx512vnni"}),
        ("aarch64", {"neon"}, {"neondot"}),
    ],
)
def test_each_kernel_is_compiled_for_each_instruction_set(
    build: ModuleType, machine: str, isas: set[str], dot_products: set[str]
) -> None:
    units = {name: flags for _, name, flags in build.compile_units(machine, "no CUDA")}
    for source in (ROOT / "csrc" / "cpu").glob("*.cpp"):
        for isa in dot_products if source.stem == "convolution_int8" else isas:
            flags = units.pop(f"cpu/{isa}/{source.stem}.o")
            assert f"-DADVKD_ISA={isa}" in flags
            exact = source.name in ("philox.cpp", "sampling_step.cpp")
            assert ("-ffp-contract=fast" in flags) != exact
    assert not any(name.startswith("cpu/") for name in units)
    assert ("-DADVKD_HAVE_AVX2" in units["runtime/dispatch.o"]) == ("avx2" in isas)


def test_another_machine_to_build_for(build: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("_PYTHON_HOST_PLATFORM", raising=False)
    assert build.target_machine() == platform.machine()
    monkeypatch.setenv("_PYTHON_HOST_PLATFORM", "linux-aarch64")
    assert build.target_machine() == "aarch64"


def test_sets_that_a_compiler_does_not_know_are_left_out(build: ModuleType, tmp_path: Path) -> None:
    script = """#!/bin/sh\ncase "$*" in *-mavxvnni*) exit 1;; esac\n"""
    compiler = executable(tmp_path / "c++", script)
    unknown = build.unknown_sets([str(compiler)], "x86_64")
    assert unknown == ["avxvnni"]
    units = {name: flags for _, name, flags in build.compile_units("x86_64", "none", unknown)}
    assert "cpu/avxvnni/convolution_int8.o" not in units
    assert "cpu/avx512vnni/convolution_int8.o" in units
    assert "-DADVKD_HAVE_AVXVNNI" not in units["runtime/dispatch.o"]
    assert "-DADVKD_HAVE_AVX512VNNI" in units["runtime/dispatch.o"]


def test_every_source_is_compiled_to_an_object_of_its_own(build: ModuleType) -> None:
    names = [name for _, name, _ in build.compile_units("x86_64", "no CUDA")]
    assert len(set(names)) == len(names)
    sources = {source for source, *_ in build.compile_units("x86_64", "no CUDA")}
    included = re.findall(r'#include "(.*)"', build.bindings_text())
    sources |= {ROOT / "csrc" / name for name in included}
    left_out = {*(ROOT / "csrc").rglob("*.cpp")} - sources
    assert {source.name for source in left_out} == {"cuda_bindings.cpp", *build.ELSEWHERE}


def test_the_package_holds_the_data_sets(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr(build, "setup", given.update)
    monkeypatch.setenv("ADVKD_EXT", "0")
    build.main()
    patterns, package = given["package_data"]["advkd"], ROOT / "advkd"
    packed = {name for p in patterns for name in glob(p, root_dir=package, recursive=True)}
    files = [file for file in (package / "data" / "datasets").rglob("*") if file.is_file()]
    assert len(files) >= 13
    assert {str(file.relative_to(package)) for file in files} <= packed


def test_the_names_of_exact_sources_are_those_of_files(build: ModuleType) -> None:
    for name in build.UNCONTRACTED_SOURCES:
        assert (ROOT / "csrc" / name).is_file()


def test_the_runtime_knows_neither_python_nor_torch() -> None:
    for room in ("runtime", "cpu"):
        for source in (ROOT / "csrc" / room).iterdir():
            assert not re.search(r"Python\.h|pybind11|torch/|\"python/", source.read_text()), source


NVCC = """#!/bin/sh
case "$1" in
  --version) echo "Cuda compilation tools, release {release}, V0" ;;
  --dryrun) echo '#$ TOP={top}' >&2 ;;
  --list-gpu-code) printf 'sm_75\\nsm_80\\nsm_90\\nsm_100\\n' ;;
esac
"""


def cuda_home(tmp_path: Path, release: str = "13.0") -> dict[str, str]:
    """An environment whose CUDA_HOME holds what the build looks for."""
    (tmp_path / "bin").mkdir()
    executable(tmp_path / "bin" / "nvcc", NVCC.format(release=release, top=tmp_path))
    for name in ("include/cuda_runtime.h", "lib64/libcudart_static.a"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    return {"PATH": "/usr/bin:/bin", "CUDA_HOME": str(tmp_path)}


def test_a_toolkit_is_found(build: ModuleType, tmp_path: Path) -> None:
    environ = cuda_home(tmp_path)
    cuda = build.find_cuda(environ)
    assert (cuda.home, cuda.libraries) == (tmp_path, tmp_path / "lib64")
    with pytest.raises(SystemExit, match="nvcc knows no architecture 61"):
        build.find_cuda(environ | {"ADVKD_CUDA_ARCHS": "61 90"})
    text = build.ninja_text(["g++"], tmp_path / "_C.so", "0", "x86_64", cuda)
    assert "build cuda/sampling_step.o: compile_cuda" in text
    assert "-lcudart_static" in text
    assert "ADVKD_CUDA_LEFT_OUT" not in text
    assert "build python/cuda_bindings.o: compile " in text


@pytest.mark.parametrize(
    ("asked", "gpus", "codes"),
    [
        ("", None, ["compute_80"]),  # no nvidia-smi: PTX of one architecture
        ("", "No devices were found\n", ["compute_80"]),
        ("", "9.0\n9.0\n8.0\n", ["sm_80", "sm_90", "compute_90"]),
        ("", "7.5\n12.1\n", ["sm_75", "compute_75"]),  # the second one nvcc does not know
        ("", "12.1\n", ["compute_80"]),
        ("75, 90", "8.0\n", ["sm_75", "sm_90", "compute_90"]),
        ("all", "8.0\n", ["sm_80", "sm_90", "sm_100", "compute_100"]),
    ],
)
def test_what_cuda_code_is_compiled_for(
    build: ModuleType, tmp_path: Path, asked: str, gpus: str | None, codes: list[str]
) -> None:
    environ = cuda_home(tmp_path) | {"ADVKD_CUDA_ARCHS": asked}
    if gpus is not None:
        executable(tmp_path / "nvidia-smi", f"#!/bin/sh\nprintf '{gpus}'\n")
        environ["PATH"] = f"{tmp_path}:{environ['PATH']}"
    cuda = build.find_cuda(environ)
    found = [option.partition(",code=")[2] for option in cuda.gencode()]
    assert found == codes
    assert all(
        re.fullmatch(r"-gencode=arch=compute_(\d+),code=(sm|compute)_\1", option)
        for option in cuda.gencode()
    )
    assert cuda.numbers()[-1] == codes[-1].removeprefix("compute_")


@pytest.mark.parametrize(
    ("missing", "release", "reason"),
    [
        ("bin/nvcc", "13.0", "nvcc was not found"),
        ("include/cuda_runtime.h", "13.0", "holds no include/cuda_runtime.h"),
        ("lib64/libcudart_static.a", "13.0", "holds no libcudart_static.a"),
        (None, "11.8", "nvcc is of CUDA 11.8, older than 12.0"),
    ],
)
def test_why_the_cuda_part_is_left_out(
    build: ModuleType, tmp_path: Path, missing: str | None, release: str, reason: str
) -> None:
    environ = cuda_home(tmp_path, release)
    if missing is not None:
        (tmp_path / missing).unlink()
    assert reason in build.find_cuda(environ)
    with pytest.raises(SystemExit, match=f"ADVKD_CUDA=1 cannot be met, because .*{reason}"):
        build.find_cuda(environ | {"ADVKD_CUDA": "1"})
    assert build.find_cuda(environ | {"ADVKD_CUDA": "0"}) == "ADVKD_CUDA=0 was set"
    units = [name for _, name, _ in build.compile_units("x86_64", reason)]
    assert "python/cuda_bindings.o" not in units
    assert list(build.cuda_units(reason)) == []


USING = """
import sys
{block}
import torch
from advkd import ops
x, weight, bias = torch.randn(2, 8, 5, 5), torch.ones(8), torch.zeros(8)
index = torch.arange(2)
y = ops.group_norm_silu(x, weight, bias, 2, 1e-5)
torch.testing.assert_close(y, torch.nn.functional.silu(torch.nn.functional.group_norm(x, 2)))
z = ops.philox_normal(1, index, ops.X_T_STEP, (3, 4, 4))
ops.sampling_step(z, z, [1.0] * 6, clip=1.0, seed=1, image_index=index, step=0)
print({result})
"""


def run_python(code: str, **environ: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environ, capture_output=True, text=True,
        check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_reference_serves_every_op_on_request() -> None:
    code = USING.format(block="", result="ops.describe()")
    out = run_python(code, ADVKD_OPS="reference")
    assert "fused" not in out.replace("no fused kernel", "")
    assert "ADVKD_OPS=reference is set" in out


def test_the_package_works_without_the_extension() -> None:
    block = "sys.modules['advkd._C'] = None"
    out = run_python(USING.format(block=block, result="ops.describe()"), ADVKD_OPS="")
    assert "the C++ extension is not installed" in out


def test_fused_without_the_extension_is_an_error() -> None:
    code = """
import sys
sys.modules['advkd._C'] = None
import torch
from advkd import ops
try:
    ops.philox_normal(1, torch.arange(2), 0, (1, 2, 2))
except ValueError as error:
    print(error)
"""
    assert "ADVKD_OPS=fused cannot be met" in run_python(code, ADVKD_OPS="fused")


def test_an_unknown_backend_is_refused() -> None:
    code = """
try:
    from advkd import ops
except ValueError as error:
    print(error)
"""
    assert "ADVKD_OPS is 'turbo'" in run_python(code, ADVKD_OPS="turbo")
