"""Exported files: the student's images, plain operators, no pickle, and nothing that is wrong."""

from __future__ import annotations

import argparse
import importlib.util
import math
import re
import zipfile
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor

import advkd.export
from advkd.config import StudentConfig
from advkd.deploy.graph import inputs, largest_difference, traced
from advkd.export import main, parser
from advkd.models.student import Student
from advkd.pretrained import load_student, save_student

UNET = StudentConfig(stages=(4, 8), widths=(16, 8), attention=(4,), groups=4)
PYRAMID = StudentConfig(family="pyramid", stages=(4, 8), widths=(16, 8), attention=(4,), groups=4)


@pytest.fixture
def student(tmp_path: Path) -> str:
    return _student(tmp_path / "student", UNET)


def _student(folder: Path, config: StudentConfig, **settings: Any) -> str:
    torch.manual_seed(0)
    save_student(Student(config, 8, 1, **settings), folder)
    return str(folder)


def _run_onnx(path: Path, *arguments: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    feeds = zip([node.name for node in session.get_inputs()], arguments, strict=True)
    return torch.from_numpy(session.run(None, {name: a.numpy() for name, a in feeds})[0])


def _assert_same(image: Tensor, student: Student, arguments: tuple[Tensor, ...], **s: Any) -> None:
    expected = student(*arguments, **s)
    assert image.shape == expected.shape and expected.std() > 0
    assert (image - expected).abs().max() <= 1e-4


def test_onnx_for_any_batch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = _student(tmp_path / "student", UNET, num_classes=3)
    path = tmp_path / "new" / "a.onnx"
    assert main(["--student", folder, "--out", str(path)]) == 0
    said = capsys.readouterr()
    shapes = "x_T (batch, 1, 8, 8), y (batch,) -> image (batch, 1, 8, 8)"
    assert f"{path}: 0." in said.out and shapes in said.out and said.out.count("\n") == 1
    assert [file.name for file in path.parent.iterdir()] == ["a.onnx"]

    model = onnx.load(path)
    onnx.checker.check_model(model)
    assert {node.domain for node in model.graph.node} == {""} and not model.functions
    names = {v.name: _dims(v) for v in (*model.graph.input, *model.graph.output)}
    assert names == {"x_T": ["batch", 1, 8, 8], "y": ["batch"], "image": ["batch", 1, 8, 8]}
    _assert_no_paths(path.read_bytes())

    loaded = load_student(folder)
    for count in (1, 5):
        x_T = torch.randn((count, 1, 8, 8), generator=torch.Generator().manual_seed(count))
        arguments = (x_T, torch.arange(count) % 3)
        _assert_same(_run_onnx(path, *arguments), loaded, arguments)


def test_onnx_of_a_pyramid_that_leaves_early_for_one_batch(tmp_path: Path) -> None:
    folder = _student(tmp_path / "student", PYRAMID)
    path = tmp_path / "a.onnx"
    arguments = ["--student", folder, "--out", str(path), "--exit-at", "1", "--batch", "3"]
    assert main(arguments) == 0
    graph = onnx.load(path).graph
    assert _dims(graph.input[0]) == [3, 1, 8, 8] and _dims(graph.output[0]) == [3, 1, 4, 4]
    x_T = torch.randn((3, 1, 8, 8), generator=torch.Generator().manual_seed(1))
    _assert_same(_run_onnx(path, x_T), load_student(folder), (x_T,), exit_at=1)


def _dims(value: onnx.ValueInfoProto) -> list[str | int]:
    return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]


@pytest.mark.parametrize(("config", "num_classes"), [(UNET, None), (PYRAMID, 3)])
def test_pt2(tmp_path: Path, config: StudentConfig, num_classes: int | None) -> None:
    folder = _student(tmp_path / "student", config, num_classes=num_classes)
    path = tmp_path / "a.pt2"
    assert main(["--student", folder, "--format", "pt2", "--out", str(path)]) == 0
    program = torch.export.load(path)
    calls = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert {call.split(".")[0] for call in calls} <= {"aten", "<built-in function getitem>"}
    loaded = load_student(folder)
    for count in (1, 5):
        arguments = inputs(loaded, count)
        _assert_same(program.module()(*arguments), loaded, arguments)


def test_pt2_holds_no_pickle_and_only_what_runs(student: str, tmp_path: Path) -> None:
    path = tmp_path / "a.pt2"
    arguments = ["--student", student, "--format", "pt2", "--out", str(path), "--exit-at", "1"]
    assert main(arguments) == 0
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    weights = {n: c for n, c in members.items() if re.fullmatch(r".*/data/weights/weight_\d+", n)}
    # The rest are JSON, short texts and empty members; a pickle is neither (nor is torch.save's
    # zip archive in the archive).
    for name in set(members) - set(weights):
        assert not members[name].startswith((b"\x80", b"PK")), name
        members[name].decode()
    _assert_no_paths(path.read_bytes())
    parts = load_student(student)
    unused = (parts.submodules[1], parts.heads[1])
    used = sum(p.numel() for p in parts.parameters())
    used -= sum(p.numel() for part in unused for p in part.parameters())
    assert sum(len(content) for content in weights.values()) == 4 * used


def _assert_no_paths(content: bytes) -> None:
    """The file does not tell where on the exporting machine the package lies."""
    assert str(Path(advkd.export.__file__).parent).encode() not in content
    assert str(Path(torch.__file__).parent).encode() not in content


def test_the_default_name_is_the_folders(
    student: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["--student", student, "--format", "pt2"]) == 0
    assert Path("student.pt2").is_file()


def test_a_file_that_differs_is_not_kept(
    student: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def wrong(model: Student, exit_at: int | None, batch: int | None) -> Any:
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with torch.no_grad():
            model.heads[-1].conv.bias.add_(2e-4)
        program = traced(model, exit_at, batch)
        model.load_state_dict(state)
        return program

    monkeypatch.setattr(advkd.export, "traced", wrong)
    out = tmp_path / "out"
    path = out / "a.pt2"
    arguments = ["--student", student, "--format", "pt2", "--out", str(path)]
    assert main(arguments) == 1
    said = capsys.readouterr().err
    assert said == (
        f"advkd: {path} was not written: its images would differ from the student's by 0.0002, "
        "more than 0.0001\n"
    )
    assert list(out.iterdir()) == []
    path.write_bytes(b"before")
    assert main(arguments) == 1
    assert path.read_bytes() == b"before" and len(list(out.iterdir())) == 1


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_pixel_that_is_not_finite_never_passes(student: str, value: float) -> None:
    loaded = load_student(student)

    def run(x_T: Tensor) -> Tensor:
        image: Tensor = loaded(x_T).clone()
        image[0, 0, 0, 0] = value
        return image

    assert largest_difference(run, loaded, None, None) == math.inf
    assert largest_difference(loaded, loaded, None, 2) == 0
    assert largest_difference(lambda x_T: loaded(x_T)[:, :, :1], loaded, None, 2) == math.inf


def test_a_missing_extra_says_how_to_install_it(
    student: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name.startswith("onnx") else find(name)
    )
    path = tmp_path / "out" / "a.onnx"
    assert main(["--student", student, "--out", str(path)]) == 1
    said = capsys.readouterr().err
    expected = "onnx and onnxscript and onnxruntime: pip install 'advkd[export]'"
    assert said == f"advkd: ONNX needs {expected}\n"
    assert list(path.parent.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--exit-at", "3"], "exit_at=3 is not between 1 and 2"),
        (["--exit-at", "0"], "exit_at=0 is not between 1 and 2"),
        (["--out", "a.pt2"], "--out a.pt2 does not name a .onnx file"),
    ],
)
def test_refused(
    student: str, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--student", student, *options]) == 1
    assert capsys.readouterr().err == f"advkd: {message}\n"


def test_noisy_heads_are_not_exported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = _student(tmp_path / "student", UNET, target="state")
    assert main(["--student", folder, "--exit-at", "1"]) == 1
    assert "exit_at is not possible" in capsys.readouterr().err


@pytest.mark.parametrize("batch", ["0", "-1", "many", "2.5"])
def test_batches_that_cannot_be(batch: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parser().parse_args(["--student", "x", f"--batch={batch}"])
    assert "is neither 'dynamic' nor a number from 1 up" in capsys.readouterr().err


def test_batch_is_any_number_unless_given() -> None:
    def batch(*options: str) -> int | None:
        args: argparse.Namespace = parser().parse_args(["--student", "x", *options])
        return args.batch  # type: ignore[no-any-return]

    assert batch() is None and batch("--batch", "dynamic") is None and batch("--batch", "4") == 4
