"""nvcc's machine code for the CUDA kernels: spills, widths of accesses, contraction; and what the
extension says where there is no device."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import resources

from advkd import ops

needs_nvcc = pytest.mark.skipif(
    resources.nvcc() is None or resources.cuobjdump() is None,
    reason="nvcc or cuobjdump is not installed",
)


@needs_nvcc
def test_no_kernel_breaks_a_rule(tmp_path: Path) -> None:
    lines, broken = resources.table(tmp_path)
    assert broken == []
    text = resources.DOCS.read_text()
    in_docs = text.split(resources.BEGIN)[1].split(resources.END)[0]
    names = [line.split("|")[1] for line in lines]
    assert [line.split("|")[1] for line in in_docs.strip().splitlines()] == names


@needs_nvcc
def test_the_step_contracts_no_product_with_a_sum(tmp_path: Path) -> None:
    for flags, contracted in (["-fmad=false"], False), ([], True):
        target = tmp_path / "step.ptx"
        subprocess.run(
            [
                str(resources.nvcc()), "-std=c++17", "-O3", "-DADVKD_ISA=cuda", "-arch=sm_80",
                f"-I{resources.ROOT / 'csrc'}", *flags, "-ptx",
                str(resources.ROOT / "csrc" / "cuda" / "sampling_step.cu"), "-o", str(target),
            ],
            check=True,
        )  # fmt: skip
        text = target.read_text()
        assert ("fma." in text) == contracted
        assert "sqrt.rn.f32" in text
        assert ".ftz" not in text and "approx" not in text


def test_the_rules_can_be_broken() -> None:
    good = resources.Kernel("sampling_step_kernel<float, 8>", 64, 0, 0, 0, (32, 128), (128,), 0)
    assert good.broken_rules() == []
    for change, words in (
        ({"stack": 8}, "8 bytes of stack"), ({"spills": 2}, "2 local"), ({"loads": (32,)}, "load"),
        ({"stores": (32,)}, "store"), ({"doubles": 1}, "1 float64"),
    ):  # fmt: skip
        broken = resources.Kernel(**(vars(good) | change)).broken_rules()
        assert len(broken) == 1 and words in broken[0]
    scalar = resources.Kernel("sampling_step_kernel<float, 1>", 64, 0, 0, 0, (32,), (32,), 0)
    assert scalar.broken_rules() == []


@pytest.mark.skipif(
    not hasattr(ops.extension, "cuda_unavailable"), reason="the extension has no CUDA part"
)
def test_the_extension_without_a_device_says_so() -> None:
    extension = ops.extension or SimpleNamespace()
    if not extension.cuda_unavailable():
        pytest.skip("there is a CUDA device")
    assert extension.cuda_unavailable().startswith("no CUDA device: cudaGetDeviceCount")
    with pytest.raises(RuntimeError, match=r"^cuda(Get|Set)Device failed: .* \(cudaError\w+\)$"):
        extension.CudaSamplingLoop(
            device=0, network=0, loop=0, x_t=0, x_in=0, model_out=0, type="float32",
            time_embedding=0, time_embedding_bytes=16, sizes=(1, 3, 64),
        )  # fmt: skip


@pytest.mark.skipif(
    not hasattr(ops.extension, "cuda_unavailable") or shutil.which("nm") is None,
    reason="the extension has no CUDA part, or nm is not installed",
)
def test_the_extension_needs_no_symbol_of_a_driver() -> None:
    """So that it loads where there is none, or an old one: CUDA's runtime is linked into it."""
    assert ops.extension is not None
    listed = subprocess.run(
        ["nm", "-D", "--undefined-only", str(ops.extension.__file__)], capture_output=True,
        text=True, check=True,
    ).stdout  # fmt: skip
    names = [line.split()[-1] for line in listed.splitlines()]
    assert names and not [name for name in names if re.match(r"_*cu(da)?[A-Z]", name)]
