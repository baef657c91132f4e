"""Every address that C++ gets has been checked, and no default of the user's program reaches it."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from advkd.config import DiscriminatorConfig, StudentConfig, UNetConfig
from advkd.models.discriminator import Discriminator
from advkd.models.student import Student
from advkd.models.unet import UNet
from advkd.ops import address, addresses, extension

sys.path.insert(0, str(Path(__file__).parent))
from op_cases import NAMES, cases

PACKAGE = Path(__file__).resolve().parents[2] / "advkd"
AMBIENT = ("float64", "float16", "bfloat16", "meta")


@contextmanager
def ambient(default: str) -> Iterator[None]:
    """What a user's program may have set: another default dtype, or another default device."""
    dtype = torch.get_default_dtype()
    try:
        if default == "meta":
            torch.set_default_device("meta")
        else:
            torch.set_default_dtype(getattr(torch, default))
        yield
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(dtype)


def both_ways(name: str, backend: str) -> list[Tensor]:
    """The op's results and gradients, and those of its derivative."""
    run, tensors = cases(backend)[name]
    leaves = [t.requires_grad_() for t in tensors]
    results = run(*leaves)
    if not leaves:
        return list(results)
    total = sum((y.square().sum() for y in results), results[0].new_zeros(()))
    slopes = torch.autograd.grad(total, leaves, create_graph=True)
    second = torch.autograd.grad(sum(s.square().sum() for s in slopes), leaves)
    return [t.detach() for t in (*results, *slopes, *second)]


def networks() -> list[tuple[nn.Module, tuple[Tensor | float, ...]]]:
    torch.manual_seed(0)
    kinds = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D")}
    kinds |= {"up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    teacher = UNetConfig(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(16, 16),
        attention_head_dim=8, norm_num_groups=4, num_class_embeds=3, **kinds,
    )  # fmt: skip
    student = StudentConfig(stages=(4, 8), widths=(16, 8), attention=(4,), groups=4)
    discriminator = DiscriminatorConfig(widths=(8, 16), attention=(4,), groups=4)
    x, labels = torch.randn(2, 1, 8, 8), torch.tensor([0, 2])
    return [
        (UNet(teacher), (x, 7, labels)),
        (UNet(teacher), (x, 300.3, labels)),
        (UNet(teacher), (x, torch.tensor([7, 900]), labels)),
        (Student(student, 8, 1), (x,)),
        (Discriminator(discriminator, 8, 1, [8]), (x, x, 0)),
    ]


def outputs_and_slopes(model: nn.Module, inputs: tuple[Tensor | float, ...]) -> list[Tensor]:
    out = model(*inputs)
    out = out if isinstance(out, (list, tuple)) else [out]
    parameters = [p for p in model.parameters() if p.requires_grad]
    slopes = torch.autograd.grad(sum(y.square().sum() for y in out), parameters, allow_unused=True)
    return [t.detach() for t in (*out, *slopes) if t is not None]


def assert_same(got: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(got, expected, strict=True):
        assert a.device == b.device
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


@pytest.mark.parametrize("default", AMBIENT)
@pytest.mark.parametrize("backend", ["fused", "reference"])
@pytest.mark.parametrize("name", NAMES)
def test_ops_do_not_see_the_programs_defaults(name: str, backend: str, default: str) -> None:
    if backend == "fused" and extension is None:
        pytest.skip("the C++ extension is not installed")
    expected = both_ways(name, backend)
    with ambient(default):
        got = both_ways(name, backend)
    assert_same(got, expected)


@pytest.mark.parametrize("default", AMBIENT)
@pytest.mark.parametrize("which", range(5))
def test_networks_do_not_see_the_programs_defaults(which: int, default: str) -> None:
    model, inputs = networks()[which]
    expected = outputs_and_slopes(model, inputs)
    with ambient(default):
        got = outputs_and_slopes(model, inputs)
    assert_same(got, expected)


def test_an_address_is_of_what_cpp_takes_it_for() -> None:
    x = torch.zeros(2, 3, 4, 4)
    assert address(x, torch.float32) == x.data_ptr()
    assert address(x[1:], torch.float32, layout=torch.contiguous_format) == x[1:].data_ptr()
    assert addresses(torch.float32, x, None, x[1]) == [x.data_ptr(), 0, x[1].data_ptr()]
    with pytest.raises(TypeError, match=r"takes a tensor of torch\.float64 here"):
        address(x, torch.float64)
    with pytest.raises(TypeError, match=r"not of torch.float32"):
        addresses(torch.int64, None, x)
    with pytest.raises(ValueError, match="takes a tensor on cpu here, not on meta"):
        address(x.to("meta"), torch.float32)
    with pytest.raises(ValueError, match="not on meta"):
        addresses(torch.float32, x, x.to("meta"))
    with pytest.raises(ValueError, match="takes a tensor on meta here, not on cpu"):
        address(x, torch.float32, device=torch.device("meta"))
    with pytest.raises(ValueError, match=r"takes a channels_last tensor .* shape \(2, 3, 4, 4\)"):
        address(x, torch.float32, layout=torch.channels_last)


# Where a tensor becomes a number, and the only place: advkd/ops/_address.py. The engine's files
# keep tables of addresses of their own.
ADDRESSES = {
    "ops/_address.py", "engine/plan.py", "engine/lowering.py", "engine/cache.py", "engine/cuda.py",
}  # fmt: skip
# Packages whose tensors reach a kernel, and functions that make tensors by a program's defaults.
MAKERS = {
    "arange", "as_tensor", "empty", "empty_strided", "eye", "full", "linspace", "logspace", "ones",
    "rand", "randint", "randn", "randperm", "tensor", "zeros",
}  # fmt: skip


def called(node: ast.AST) -> str:
    """The attribute that a call calls, "" for anything else."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        return node.func.attr
    return ""


def sources(*places: str) -> dict[str, ast.Module]:
    paths = [path for place in places for path in sorted((PACKAGE / place).rglob("*.py"))]
    return {str(path.relative_to(PACKAGE)): ast.parse(path.read_text()) for path in paths}


def makes_by_default(node: ast.AST) -> bool:
    """Whether a call torch.MAKER(...) leaves the dtype or the device to the program's defaults."""
    if not isinstance(node, ast.Call) or called(node) not in MAKERS:
        return False
    assert isinstance(node.func, ast.Attribute)
    if not isinstance(node.func.value, ast.Name) or node.func.value.id != "torch":
        return False
    return not {"dtype", "device"} <= {keyword.arg for keyword in node.keywords}


def test_addresses_are_taken_in_one_place() -> None:
    taken = {
        name
        for name, tree in sources(".").items()
        if any(called(node) == "data_ptr" for node in ast.walk(tree))
    }
    assert "ops/_address.py" in taken
    assert taken <= ADDRESSES


@pytest.mark.parametrize("name", sorted(sources("ops", "models")))
def test_every_new_tensor_has_its_dtype_and_device(name: str) -> None:
    tree = sources("ops", "models")[name]
    lines = [node.lineno for node in ast.walk(tree) if makes_by_default(node)]  # type: ignore[attr-defined]
    assert lines == []


@pytest.mark.parametrize(
    ("line", "bad"),
    [
        ("torch.empty(3)", True),
        ("torch.zeros(3, dtype=torch.float32)", True),
        ("torch.as_tensor(t, device=x.device)", True),
        ("torch.arange(3, dtype=torch.int64, device=x.device)", False),
        ("torch.empty_like(x)", False),
        ("np.zeros(3)", False),
        ("x.new_empty(3)", False),
    ],
)
def test_the_check_of_new_tensors_itself(line: str, bad: bool) -> None:
    assert any(makes_by_default(node) for node in ast.walk(ast.parse(line))) == bad
