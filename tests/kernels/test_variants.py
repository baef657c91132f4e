"""The Triton kernels' variants: the launchers never leave the list, and what it compiles to.

All of the list is compiled by `python tests/kernels/aot.py`, which CI runs; here a dozen of it is.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

triton = pytest.importorskip("triton", reason="Triton is not installed")

from advkd.kernels import attention, bias_residual, group_norm_silu, variants  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent))
import aot  # noqa: E402
import traffic  # noqa: E402

Launch = tuple[str, dict[str, Any], tuple[Any, ...], int]


@contextmanager
def recorded(module: Any) -> Iterator[list[Launch]]:
    """Collects (kernel, compile-time arguments and options, others, programs) of launches."""
    launches: list[Launch] = []

    class Recorder:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid: tuple[int]) -> Any:
            def launch(*arguments: Any, **constants: Any) -> None:
                launches.append((self.name, constants, arguments, *grid))

            return launch

    before = dict(module.KERNELS)
    module.KERNELS.update({name: Recorder(name) for name in before})
    try:
        yield launches
    finally:
        module.KERNELS.update(before)


def check_arguments(kernel: Any, launch: Launch) -> None:
    """Whole, and of the types that it is compiled for ahead of time, whatever the shape."""
    name, constants, arguments, programs = launch
    names = [n for n in kernel.arg_names if n not in constants]
    assert len(names) == len(arguments), name
    assert 0 < programs < 1 << 31
    for argument_name, value in zip(names, arguments, strict=True):
        if argument_name.endswith("_ptr"):
            assert value is None or isinstance(value, torch.Tensor)
            assert value is None or value.data_ptr() % 16 == 0
        elif isinstance(value, int):
            assert abs(value) < 1 << 31, (name, argument_name)
        else:
            assert isinstance(value, float)


DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])


@settings(max_examples=150)
@given(
    batch=st.integers(1, 600),
    groups=st.integers(1, 48),
    group_channels=st.integers(1, 600),
    sides=st.lists(st.sampled_from([1, 2, 3, 7, 8, 14, 16, 28, 31, 32, 64, 256]), max_size=3),
    last=st.booleans(),
    dtype=DTYPES,
    silu=st.booleans(),
)
def test_group_norm_silu_never_leaves_the_list(
    batch: int, groups: int, group_channels: int, sides: list[int], last: bool,
    dtype: torch.dtype, silu: bool,
) -> None:  # fmt: skip
    """The launchers themselves, on tensors without data, with recorders in the kernels' place."""
    channels = groups * group_channels
    shape = (batch, *sides, channels) if last else (batch, channels, *sides)
    x = torch.empty(shape, dtype=dtype, device="meta")
    x = x.movedim(-1, 1) if last else x
    weight, film = torch.empty(channels, device="meta"), torch.empty(batch, channels, device="meta")
    affine = (weight, weight, film, film)
    with recorded(group_norm_silu) as launches:
        try:
            y, mean, rstd = group_norm_silu.forward(x, affine, groups, 1e-5, silu)
        except ValueError:
            assert group_channels * x[0, 0].numel() >= 1 << 29
            return
        group_norm_silu.backward(y, x, affine, (mean, rstd), groups, silu)
    names = [name for name, *_ in launches]
    backward = ["sums", "reduce", "dx", "parameters"]
    assert names in (["forward", *backward], ["moments", "merge", "apply", *backward])
    compiled = {
        (b.variant, b.constants.get("VEC", 1)) for b in group_norm_silu.variants()
    }  # fmt: skip
    for launch in launches:
        name, constants, *_ = launch
        vec = constants.get("VEC", 1)
        picked = [
            v for v in group_norm_silu.VARIANTS
            if v.kernel == name and constants == v.constants(vec, silu) | v.options()
        ]  # fmt: skip
        assert len(picked) == 1, launch
        widths = {v for variant, v in compiled if variant == picked[0].name}
        assert min(widths) <= vec <= max(widths), launch
        check_arguments(group_norm_silu.KERNELS[name], launch)


@settings(max_examples=100)
@given(
    batch=st.integers(1, 300),
    heads=st.integers(1, 16),
    queries=st.integers(1, 5000),
    keys=st.integers(1, 5000),
    eighths=st.integers(1, 64),
    dtype=DTYPES,
)
def test_attention_never_leaves_the_list(
    batch: int, heads: int, queries: int, keys: int, eighths: int, dtype: torch.dtype
) -> None:
    q, k = (
        torch.empty(batch, n, heads, 8 * eighths, dtype=dtype, device="meta").transpose(1, 2)
        for n in (queries, keys)
    )
    with recorded(attention) as launches:
        out, lse = attention.forward(q, k, k, 1.0)
        attention.backward(out, q, k, k, out, lse, 1.0)
    assert [name for name, *_ in launches] == ["forward", "delta", "dkdv", "dq"]
    builds = [(b.kernel, b.constants | b.options) for b in attention.variants()]
    for launch in launches:
        name, constants, *_ = launch
        assert (attention.KERNELS[name], constants) in builds, launch
        check_arguments(attention.KERNELS[name], launch)


def test_the_list_is_short_and_each_name_means_one_thing() -> None:
    assert len(variants.all_variants()) <= variants.MOST_VARIANTS
    builds = variants.all_builds()
    assert len({(b.variant, b.edges) for b in builds}) == len(builds)
    modules = (group_norm_silu, bias_residual, attention)
    assert {b.kernel for b in builds} == {k for module in modules for k in module.KERNELS.values()}
    for build in builds:
        assert set(build.types) | set(build.constants) >= set(build.kernel.arg_names)
        # Left to Triton, this would depend on its version.
        assert build.options["enable_fp_fusion"] is True


def test_the_documents_table_has_a_row_for_each_variant() -> None:
    rows = aot.rows_of(aot.DOCS.read_text())
    assert list(rows) == variants.all_variants(), (
        "docs/kernels.md is not up to date: python tests/kernels/aot.py --write"
    )


# (variant, beginning of the build's edges, target): each kernel of both ops, each target.
DOZEN = [
    ("group_norm_silu forward contiguous 4096x1", "float16", "sm_80"),
    ("group_norm_silu forward contiguous 16384x1", "bfloat16", "sm_90"),
    ("group_norm_silu forward channels_last 1024x16", "float32", "sm_90"),
    ("group_norm_silu moments channels_last 128x64", "float16", "gfx942"),
    ("group_norm_silu merge", "float32", "sm_80"),
    ("group_norm_silu apply contiguous 64x64", "bfloat16", "sm_90"),
    ("group_norm_silu sums contiguous 512x4", "bfloat16", "sm_90"),
    ("group_norm_silu dx channels_last 128x32", "float32", "sm_100"),
    ("attention forward half", "float16, even", "sm_90"),
    ("attention forward half", "bfloat16", "gfx942"),
    ("attention dkdv half", "float16, even", "sm_80"),
    ("attention dq float32", "float32", "sm_100"),
]


@pytest.mark.parametrize(("variant", "edges", "target"), DOZEN)
def test_machine_code(variant: str, edges: str, target: str) -> None:
    """No spills, no stack, little shared memory, wide accesses, tensor cores, no float64."""
    found = [
        b for b in variants.all_builds()
        if b.variant.startswith(variant) and b.edges.startswith(edges)
    ]  # fmt: skip
    assert found
    report = aot.inspect(found[0], target)
    assert aot.problems(found[0], target, report) == []


def test_what_counts_as_a_problem() -> None:
    build = next(b for b in variants.all_builds() if b.tensor_cores)
    good = {
        "registers": 64, "shared": 1024, "stack": 0, "spills": 0, "occupancy": 0.5,
        "reads": {16: 8, 4: 1}, "writes": {16: 1}, "matrix": 8, "float64": 0,
    }  # fmt: skip
    assert aot.problems(build, "sm_80", aot.Report(**good)) == []
    for bad in (
        {"stack": 8}, {"spills": 1}, {"shared": 100 << 10}, {"occupancy": 0.0}, {"matrix": 0},
        {"reads": {4: 8}}, {"writes": {2: 8}}, {"float64": 1},
    ):  # fmt: skip
        assert len(aot.problems(build, "sm_80", aot.Report(**good | bad))) == 1, bad


def test_group_norm_silu_moves_few_bytes_more_than_it_must() -> None:
    ratios = traffic.group_norm_silu()
    for names, ratio in ratios:
        assert 1 <= ratio <= traffic.limit(names), (names, ratio)
    counted = {name for names, _ in ratios for name in names}
    assert counted == {variant.name for variant in group_norm_silu.VARIANTS}
