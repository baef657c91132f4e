"""A student as one file that the C library reads: safetensors whose metadata hold its plans.

`docs/file-format.md` describes it. Weights stand in it as the network has them, untransformed and
by name; a plan is the list of operations that the CPU engine runs, and there is one for each head
that gives an image.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from advkd import runtime
from advkd.deploy.graph import difference_between, inputs
from advkd.engine.interface import input_shape
from advkd.engine.lowering import LoweringError
from advkd.engine.networks import lower_student
from advkd.engine.noise import Noise, Purpose
from advkd.engine.plan import Builder, lay_out
from advkd.files import CheckpointError
from advkd.models.layers import Attention
from advkd.models.student import Student
from advkd.ops import extension

VERSION, VERSION_WITH_RANGES = "1", "2"
DTYPES = ("auto", "float32", "float16", "int8")
Ranges = dict[str, tuple[float, float]]
_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.int8: "I8"}
_LARGEST = 127  # of int8; without -128, so that it is symmetric
_CALIBRATED, _CALIBRATED_AT_ONCE = 64, 16  # images whose inputs of convolutions are looked at
_FEWEST_CHANNELS = 16  # of a convolution whose products are int8; fewer do not fill a vector
_CHECKED = (1, 5)  # images: for few and for many, the algorithms differ
# What a reader settles by itself: where the weights lie, and how a convolution is computed.
_SETTLED = ("algorithm", "packed", "bias", "weight", "values", "table")


def model_bytes(student: Student, dtype: str = "auto") -> bytes:
    """The file of a student.

    dtype is that of its matrices and convolutions: `auto` is float16 where that loses nothing, as
    for a student that was saved in it, else float32; `int8` has a scale for each output channel,
    and the inputs of all but the narrowest convolutions are rounded to 8 bits as well, over the
    range that they have for some noise. Vectors stay float32 where float16 would round them. Raises
    ValueError for another dtype, LoweringError for a student that no plan expresses.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is not one of {DTYPES}")
    if extension is None:
        raise LoweringError("the C++ extension is not installed, and it plans the operations")
    tensors: dict[str, Tensor] = {}
    ranges = input_ranges(student) if dtype == "int8" else {}
    plan = {
        "size": student.size,
        "channels": student.channels,
        "classes": student.num_classes or 0,
        "class_names": None if student.class_names is None else list(student.class_names),
        "heads": [_head(student, depth, tensors, ranges) for depth in _depths(student)],
    }
    version = VERSION_WITH_RANGES if ranges else VERSION
    metadata = {"advkd": version, "plan": _json(plan)}
    stored: dict[str, Tensor] = {}
    for name in sorted(tensors):
        tensor = tensors[name].detach().to("cpu", torch.float32).contiguous()
        if dtype == "int8" and tensor.dim() > 1:
            stored[name], stored[f"{name}.scale"] = quantized(tensor)
        else:
            stored[name] = _stored(tensor, dtype)
    if ranges:
        stored["x_ranges"] = torch.tensor(list(ranges.values()))
    return _safetensors(stored, metadata)


def difference_of(content: bytes, student: Student) -> float:
    """The largest difference of any pixel between the images of a file and of its student.

    Both are float32, clamped to [-1, 1]; all heads are compared. Not finite where a pixel of
    either is not. Raises CheckpointError for a file that the library does not open.
    """
    try:
        model = runtime.load(content)
    except runtime.ModelError as error:
        raise CheckpointError(f"the file of this student cannot be used: {error}") from None
    worst = 0.0
    for count in _CHECKED:
        arguments = inputs(student, count)
        for k, depth in enumerate(_depths(student), 1):
            with torch.inference_mode():
                expected = student(*arguments, exit_at=depth).clamp(-1, 1).permute(0, 2, 3, 1)
            images = model.generate(num=count, seed=0, exit_at=k, dtype="float32")
            worst = max(worst, difference_between(torch.from_numpy(images), expected))
    return worst


def describe_file(path: Path) -> Iterator[str]:
    """Lines that list a model file's operations, head by head, and what it makes and takes.

    Raises CheckpointError for a file that cannot be read or that the library does not open.
    """
    try:
        model = runtime.load(path)
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    except runtime.ModelError as error:
        raise CheckpointError(str(error)) from None
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    plan = json.loads(header["__metadata__"]["plan"])
    dtypes = sorted({entry["dtype"] for name, entry in header.items() if name != "__metadata__"})
    yield (
        f"a model file of version {header['__metadata__']['advkd']}: images of {model.size}x"
        f"{model.size} pixels in {model.channels} "
        f"{'channel' if model.channels == 1 else 'channels'}; "
        f"{len(header) - 1} tensors, {' and '.join(dtypes)}, {len(content) / 1e6:.2f} MB"
    )
    for number, head in enumerate(plan["heads"], 1):
        yield f"\nhead {number}: {head['size']}x{head['size']}, arena {4 * head['arena']:,} bytes"
        yield f"{'operation':<15}{'module':<42}{'input':>12}{'output':>12}"
        for op in head["ops"]:
            yield _line(op, head["buffers"])


def _line(op: dict[str, Any], buffers: list[list[int]]) -> str:
    """An operation, the pixels and channels of what it reads and writes, and whether its input is
    rounded for products of int8."""

    def shape(*names: str) -> str:
        found = next((op["numbers"][name] for name in names if name in op["numbers"]), None)
        return "" if found is None else f"{buffers[found][1]}x{buffers[found][2]}"

    read, written = shape("x", "qkv"), shape("y", "scale")
    products = "  int8" if "x_range" in op["numbers"] else ""
    return f"{op['kind']:<15}{op['module']:<42}{read:>12}{written:>12}{products}"


def _depths(student: Student) -> Sequence[int]:
    """The heads that give an image, by number; of noisy states only the last does."""
    depths = range(1, len(student.heads) + 1)
    return depths[-1:] if student.target == "state" else depths


def _head(
    student: Student, depth: int, tensors: dict[str, Tensor], ranges: Ranges
) -> dict[str, Any]:
    """The plan that leaves by head number `depth`; its weights are added to `tensors`."""
    plan = lower_student(student, input_shape(student)[1:], 1, 1, depth).plan
    arena = lay_out(plan.buffers, plan.ops)
    return {
        "size": student.config.stages[depth - 1],
        "arena": arena,
        "buffers": [[b.offset, b.height * b.width, b.channels] for b in plan.buffers],
        "ops": _operations(plan, tensors, ranges),
    }


def _operations(plan: Builder, tensors: dict[str, Tensor], ranges: Ranges) -> list[dict[str, Any]]:
    listed, rows = [], list(ranges)
    for op, own in zip(plan.ops, plan.tensors, strict=True):
        names = {}
        for role, tensor in own.items():
            name = f"{op.module}.{'weight' if role in ('packed', 'table') else role}"
            known = tensors.setdefault(name, tensor)
            assert torch.equal(known, tensor), f"two tensors are called {name}"
            names[role] = name
        numbers = {
            key: value
            for key, value in op.numbers.items()
            if key not in _SETTLED and not (key.endswith("_channel") and value == 0)
        }
        if op.module in ranges:
            numbers["x_range"] = rows.index(op.module)
        listed.append(
            {
                "kind": op.kind,
                "module": op.module,
                "numbers": numbers,
                "factor": op.factor,
                "weights": names,
            }
        )
    return listed


def _safetensors(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    """The bytes of a safetensors file, always the same; the library's own order is random."""
    header: dict[str, Any] = {"__metadata__": metadata}
    data: list[bytes] = []
    end = 0
    for name, tensor in tensors.items():
        data.append(tensor.numpy().tobytes())
        offsets = [end, end := end + len(data[-1])]
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": offsets,
        }
    text = _json(header).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([len(text).to_bytes(8, "little"), text, *data])


def _json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def _stored(tensor: Tensor, dtype: str) -> Tensor:
    """The tensor in the dtype that the file holds it in."""
    half = tensor.half()
    if dtype == "float32":
        return tensor
    is_exact = torch.equal(half.float(), tensor)
    return half if is_exact or (dtype == "float16" and tensor.dim() > 1) else tensor


def quantized(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Weights (out, ...) as int8, and the scale (out,) float32 of each output channel.

    Of some scales, from the one that holds the largest weight down, each channel takes the one
    with the least squared error.
    """
    rows = weight.flatten(1).double()
    largest = rows.abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    best = torch.full_like(largest, math.inf)
    scale = largest.clone()
    for part in torch.linspace(1.0, 0.6, 41, dtype=torch.float64):
        tried = (largest * part / _LARGEST).float().double()
        error = (_rounded(rows, tried) * tried - rows).square().sum(1, keepdim=True)
        scale = torch.where(error < best, tried, scale)
        best = torch.minimum(error, best)
    return _rounded(rows, scale).to(torch.int8).view_as(weight), scale[:, 0].float()


def input_ranges(student: Student) -> Ranges:
    """The ranges that the inputs of convolutions are rounded over, by the operation's module.

    Each goes from the least to the largest number, 0 included, for x_T that the student may have
    been trained on. Narrow convolutions are left out, and inputs that are 0 or not finite.
    """
    ranges: Ranges = {}

    def widen(name: str, _: nn.Module, given: tuple[Tensor, ...]) -> None:
        low, high = ranges.get(name, (0.0, 0.0))
        least, largest = (float(end) for end in given[0].aminmax())
        ranges[name] = (min(low, least), max(high, largest))

    hooks = [
        module.register_forward_pre_hook(partial(widen, name))
        for name, module in _rounded_layers(student)
    ]
    try:
        noise, shape = Noise(0, Purpose.TRAINING), input_shape(student)
        for numbers in torch.arange(_CALIBRATED).split(_CALIBRATED_AT_ONCE):
            with torch.inference_mode():
                student(noise.x_T(numbers, shape), noise.labels(numbers, student.num_classes))
    finally:
        for hook in hooks:
            hook.remove()
    return {name: ends for name, ends in ranges.items() if 0 < ends[1] - ends[0] < math.inf}


def _rounded_layers(student: Student) -> Iterator[tuple[str, nn.Module]]:
    """The layers whose inputs are rounded, with the name of their operation."""
    for name, module in student.named_modules():
        if isinstance(module, Attention):
            yield f"{name}.to_qkv", module.to_q  # three layers with one input are one operation
            yield f"{name}.to_out.0", module.to_out[0]
        elif isinstance(module, nn.Conv2d) and min(module.weight.shape[:2]) >= _FEWEST_CHANNELS:
            yield name, module


def _rounded(rows: Tensor, scale: Tensor) -> Tensor:
    return (rows / scale).round().clamp(-_LARGEST, _LARGEST)
