"""A student as a graph of plain operators: ONNX, or a program of torch.export.

Neither file needs advkd to run. Both map x_T (B, C, S, S), standard normal float32, and labels y
(B,) int64 where the student is class-conditional, to the image (B, C, s, s), about [-1, 1] and not
clamped.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import io
import logging
import math
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from advkd import ops
from advkd.engine.noise import Noise, Purpose
from advkd.models.student import Student

EXAMPLES = 2  # images that the graph is traced with; 1 would make the batch a constant
CHECKED = (1, 3)  # batches that a file for any batch is checked with
INPUTS = ("x_T", "y")
NEEDED = ("onnx", "onnxscript", "onnxruntime")  # what the extra [export] installs

Runner = Callable[..., Tensor]  # (x_T) or (x_T, y) -> image


class Generator(nn.Module):
    """A student that always leaves after submodule `depth`, without the parts this never runs."""

    def __init__(self, student: Student, depth: int):
        super().__init__()
        self.depth = depth
        self.student = copy.deepcopy(student)
        for k in range(len(student.heads)):
            if k != depth - 1:
                self.student.heads[k] = nn.Identity()
            if k >= depth:
                self.student.submodules[k] = nn.Identity()

    def forward(self, x_T: Tensor, y: Tensor | None = None) -> Tensor:
        image: Tensor = self.student(x_T, y, self.depth)
        return image


def inputs(student: Student, count: int) -> tuple[Tensor, ...]:
    """x_T, and labels where the student takes them, of `count` images."""
    noise, numbers = Noise(0, Purpose.SAMPLING), torch.arange(count, device="cpu")
    x_T = noise.x_T(numbers, (student.channels, student.size, student.size)).contiguous()
    y = noise.labels(numbers, student.num_classes)
    return (x_T,) if y is None else (x_T, y)


def traced(student: Student, exit_at: int | None, batch: int | None) -> ExportedProgram:
    """The student as a graph of plain operators; `batch` images a call, None for any number."""
    arguments = inputs(student, batch or EXAMPLES)
    model = Generator(student, exit_at or len(student.heads)).eval()
    shapes = None
    if batch is None:
        # One Dim in both inputs, so that their sizes must agree.
        shapes = ({0: torch.export.Dim("batch")},) * len(arguments)
    with ops.use_backend("reference"), torch.no_grad():
        program = torch.export.export(model, arguments, dynamic_shapes=shapes)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # it holds paths of the machine that exports
    program.example_inputs = None  # an archive would hold them as a pickle
    return program


def write_pt2(program: ExportedProgram, path: Path) -> Runner:
    """Write a torch.export archive and read it back."""
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    path.write_bytes(buffer.getvalue())
    module = torch.export.load(io.BytesIO(path.read_bytes())).module()

    def run(*arguments: Tensor) -> Tensor:
        image: Tensor = module(*arguments)
        return image

    return run


def write_onnx(program: ExportedProgram, path: Path) -> Runner:
    """Write an ONNX file and open it in ONNX Runtime."""
    missing = [package for package in NEEDED if importlib.util.find_spec(package) is None]
    if missing:
        raise ValueError(f"ONNX needs {' and '.join(missing)}: pip install 'advkd[export]'")
    import onnxruntime

    names = INPUTS[: len(program.graph_signature.user_inputs)]
    with _quiet():
        exported = torch.onnx.export(
            program,
            input_names=names,
            output_names=["image"],
            dynamic_shapes=({0: "batch"},) * len(names) if program.range_constraints else None,
            dynamo=True,
            verbose=False,
        )
    assert exported is not None  # None is for the exporter that is not dynamo's
    model = exported.model_proto
    for node in model.graph.node:
        del node.metadata_props[:]  # how it was traced: as long as all the rest
    path.write_bytes(model.SerializeToString())
    session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])

    def run(*arguments: Tensor) -> Tensor:
        feeds = {name: value.numpy() for name, value in zip(names, arguments, strict=True)}
        return torch.from_numpy(session.run(["image"], feeds)[0])

    return run


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep from the user what the exporter tells its developers."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def largest_difference(
    run: Runner, student: Student, exit_at: int | None, batch: int | None
) -> float:
    """The largest difference of any pixel between the file's images and the student's.

    Not finite where a pixel of either is not.
    """
    worst = 0.0
    for count in CHECKED if batch is None else (batch,):
        arguments = inputs(student, count)
        with torch.inference_mode():
            expected = student(*arguments, exit_at=exit_at)
            image = run(*arguments)
        worst = max(worst, difference_between(image, expected))
    return worst


def difference_between(image: Tensor, expected: Tensor) -> float:
    """The largest difference of any pixel; not finite for other shapes or pixels that are not."""
    if image.shape != expected.shape:
        return math.inf
    difference = float((image - expected).abs().max())
    return difference if math.isfinite(difference) else math.inf
