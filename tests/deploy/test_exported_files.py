"""What `advkd export` writes for the C library and for browsers, and `advkd info` of it."""

from __future__ import annotations

import copy
import json
import math
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from advkd import export, info, runtime
from advkd.config import StudentConfig
from advkd.deploy.graph import inputs
from advkd.deploy.model_file import difference_of, input_ranges, model_bytes, quantized
from advkd.engine.lowering import LoweringError
from advkd.models.student import Student
from advkd.pretrained import load_student, save_student

UNET = StudentConfig(stages=(4, 8), widths=(16, 8), attention=(4,), groups=4)
WIDE = StudentConfig(stages=(4, 8), widths=(32, 20), attention=(4,), groups=4)
PYRAMID = StudentConfig(family="pyramid", stages=(4, 8), widths=(16, 8), attention=(4,), groups=4)


def student_of(config: StudentConfig, **settings: Any) -> Student:
    """A student whose weights are those of its initialization."""
    torch.manual_seed(0)
    return Student(config, 8, 1, **settings).eval()


def header_of(content: bytes) -> dict[str, Any]:
    length = int.from_bytes(content[:8], "little")
    header: dict[str, Any] = json.loads(content[8 : 8 + length])
    return header


def dtypes_of(content: bytes) -> set[str]:
    header = header_of(content)
    return {entry["dtype"] for name, entry in header.items() if name != "__metadata__"}


@pytest.mark.parametrize("config", [UNET, PYRAMID])
@pytest.mark.parametrize("num_classes", [None, 3])
def test_a_file_gives_the_students_images(config: StudentConfig, num_classes: int | None) -> None:
    student = student_of(config, num_classes=num_classes)
    content = model_bytes(student)
    assert difference_of(content, student) <= 1e-5
    assert content == model_bytes(student)
    model = runtime.load(content)
    assert (model.size, model.channels, model.classes) == (8, 1, num_classes or 0)
    assert model.heads == (4, 8)


def test_another_students_images_differ() -> None:
    student = student_of(UNET)
    content = model_bytes(student)
    with torch.no_grad():
        student.heads[0].conv.bias.add_(0.01)  # only the first head's images change
    assert 0.005 < difference_of(content, student) < 0.02
    with torch.no_grad():
        student.heads[0].conv.bias.fill_(math.nan)
    assert difference_of(content, student) == math.inf


def test_noisy_heads_are_left_out() -> None:
    student = student_of(UNET, target="state")
    content = model_bytes(student)
    assert len(json.loads(header_of(content)["__metadata__"]["plan"])["heads"]) == 1
    assert difference_of(content, student) <= 1e-5


def test_weights_that_float16_holds_are_stored_in_it(tmp_path: Path) -> None:
    save_student(student_of(UNET, num_classes=3), tmp_path, torch.float16)
    half = load_student(tmp_path)
    content = model_bytes(half)
    # Biases that are sums of two need more digits.
    assert dtypes_of(content) == {"F16", "F32"}
    assert difference_of(content, half) <= 1e-5
    assert dtypes_of(model_bytes(half, "float32")) == {"F32"}
    assert len(model_bytes(half)) < len(model_bytes(half, "float32"))


@pytest.mark.parametrize(("dtype", "most"), [("float16", 0.01), ("int8", 0.25)])
def test_rounded_weights_change_images_a_little(dtype: str, most: float) -> None:
    student = student_of(UNET, num_classes=3)
    assert 1e-5 < difference_of(model_bytes(student, dtype), student) < most


def ops_of(content: bytes) -> list[dict[str, Any]]:
    """The operations of the last head."""
    heads = json.loads(header_of(content)["__metadata__"]["plan"])["heads"]
    listed: list[dict[str, Any]] = heads[-1]["ops"]
    return listed


def in_eager(student: Student, num: int) -> Tensor:
    """The images that a file of int8 means, by torch's modules: (num, 8, 8, 1)."""
    copied, ranges = copy.deepcopy(student), input_ranges(student)

    def rounded(ends: tuple[float, float], _: nn.Module, given: tuple[Tensor, ...]) -> Any:
        step = (ends[1] - ends[0]) / 255
        zero = round(-ends[0] / step)
        return (((given[0] / step + zero).round().clamp(0, 255) - zero) * step,)

    for name, module in copied.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear | nn.Embedding):
            values, scale = quantized(module.weight.detach())
            wide = values * scale.view(-1, *[1] * (values.dim() - 1))
            module.weight.data = wide
        # Attention's three projections have the same input.
        operation = re.sub(r"\.to_[qkv]$", ".to_qkv", name)
        if operation in ranges:
            module.register_forward_pre_hook(partial(rounded, ranges[operation]))
    with torch.inference_mode():
        return copied(*inputs(student, num)).clamp(-1, 1).permute(0, 2, 3, 1)


def test_inputs_of_wide_convolutions_are_rounded() -> None:
    student = student_of(WIDE, num_classes=3)
    content = model_bytes(student, "int8")
    assert content == model_bytes(student, "int8")
    assert header_of(content)["__metadata__"]["advkd"] == "2"
    rounded = {op["module"] for op in ops_of(content) if "x_range" in op["numbers"]}
    wide = {
        op["module"]
        for op in ops_of(content)
        if op["kind"] == "convolution"
        and min(op["numbers"]["in_channels"], op["numbers"]["out_channels"]) >= 16
        and op["module"] != "time_emb_proj"
    }
    assert rounded == wide and len(rounded) > 8
    assert any("to_qkv" in name for name in rounded) and any("reduce" in name for name in rounded)
    ranges = header_of(content)["x_ranges"]
    assert ranges["shape"] == [len(rounded), 2] and ranges["dtype"] == "F32"
    for low, high in input_ranges(student).values():
        assert low <= 0 < high
    # The same ranges wherever a student is exported.
    assert all(not module._forward_pre_hooks for module in student.modules())


def test_a_file_of_int8_gives_the_images_of_rounded_inputs() -> None:
    student = student_of(WIDE, num_classes=3)
    plain, expected = runtime.load(model_bytes(student)), in_eager(student, 32)
    images = runtime.load(model_bytes(student, "int8")).generate(32, seed=0, dtype="float32")
    error = (torch.from_numpy(images) - expected).abs()
    effect = (torch.from_numpy(plain.generate(32, seed=0, dtype="float32")) - expected).abs()
    # A number between two levels may be rounded to either, which moves an image a little.
    assert error.mean() < effect.mean() / 4 and (error < 1e-4).float().mean() > 0.3


def test_a_student_too_narrow_for_int8_has_weights_of_it_alone() -> None:
    student = student_of(StudentConfig(stages=(4, 8), widths=(8, 8), attention=(), groups=4))
    content = model_bytes(student, "int8")
    assert header_of(content)["__metadata__"]["advkd"] == "1"
    assert "x_ranges" not in header_of(content) and "I8" in dtypes_of(content)
    assert difference_of(content, student) < 0.25


def test_an_unknown_dtype_and_an_unknown_network_are_refused() -> None:
    student = student_of(UNET)
    with pytest.raises(ValueError, match="dtype='float8' is not one of"):
        model_bytes(student, "float8")
    student.heads[-1].register_forward_hook(lambda *_: None)
    with pytest.raises(LoweringError, match="hooks"):
        model_bytes(student)


def test_quantized_weights_are_within_half_a_step_but_for_clipped_ones() -> None:
    weight = torch.randn(6, 5, 3, 3, generator=torch.Generator().manual_seed(0))
    weight[3] = 0
    values, scale = quantized(weight)
    assert values.dtype is torch.int8 and scale.dtype is torch.float32 and scale.shape == (6,)
    step = scale[:, None, None, None]
    error = (values * step - weight).abs()
    clipped = values.abs() == 127
    assert (error <= 0.5001 * step)[~clipped].all()
    assert not clipped.all() and (values[3] == 0).all()
    naive = weight.abs().flatten(1).amax(1)[:, None, None, None] / 127
    naive_error = ((weight / naive.clamp_min(1e-9)).round() * naive - weight).square().sum()
    assert error.square().sum() <= naive_error


def test_the_command_writes_every_format(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "student"
    save_student(student_of(UNET, num_classes=3), folder)
    for kind in ("advkd", "html"):
        path = tmp_path / f"out.{kind}"
        given = ["--student", str(folder), "--format", kind, "--out", str(path)]
        assert export.main(given) == 0
        said = capsys.readouterr().out
        assert said.startswith(f"{path}: ") and "images of 8x8 pixels in 3 classes" in said
    page = (tmp_path / "out.html").read_text()
    assert "<title>student: advkd</title>" in page and str(tmp_path) not in page
    (tmp_path / "config.toml").write_text("")
    assert export.main([*given[:-1], str(tmp_path / "of-a-run.html")]) == 0
    of_run = (tmp_path / "of-a-run.html").read_text()
    assert f"<title>{tmp_path.name}: advkd</title>" in of_run
    capsys.readouterr()
    assert info.main(["--plan", str(tmp_path / "out.advkd")]) == 0
    said = capsys.readouterr().out
    assert "a model file of version 1: images of 8x8 pixels in 1 channel" in said
    assert "head 2: 8x8, arena" in said and "attention" in said
    rounded = tmp_path / "int8.advkd"
    given = ["--student", str(folder), "--format", "advkd", "--out", str(rounded)]
    assert export.main([*given, "--dtype", "int8"]) == 0
    capsys.readouterr()
    assert info.main(["--plan", str(rounded)]) == 0
    said = capsys.readouterr().out
    assert "a model file of version 2" in said
    listed = [line for line in said.splitlines() if line.endswith("  int8")]
    assert listed and all(line.startswith("convolution ") for line in listed)
    assert info.main(["--plan", str(tmp_path / "out.html")]) == 1
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--format", "advkd", "--exit-at", "1"], "--exit-at is for the formats onnx and pt2"),
        (["--format", "html", "--batch", "2"], "--batch is for the formats onnx and pt2"),
        (["--format", "pt2", "--dtype", "int8"], "--dtype is for the formats advkd and html"),
        (["--format", "advkd", "--title", "x"], "--title is for the format html"),
        (["--format", "advkd", "--out", "a.onnx"], "--out a.onnx does not name a .advkd file"),
    ],
)
def test_options_of_another_format_are_refused(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_student(student_of(UNET), tmp_path)
    assert export.main(["--student", str(tmp_path), *options]) == 1
    assert capsys.readouterr().err == f"advkd: {message}\n"


def test_a_file_that_differs_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_student(student_of(UNET), tmp_path / "student")
    monkeypatch.setattr(export, "difference_of", lambda *_: 0.5)
    path = tmp_path / "out.advkd"
    given = ["--student", str(tmp_path / "student"), "--format", "advkd", "--out", str(path)]
    assert export.main(given) == 1
    assert "was not written: its images would differ" in capsys.readouterr().err
    assert not path.exists()
