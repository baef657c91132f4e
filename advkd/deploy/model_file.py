"""A student as one file that the C library reads: safetensors whose metadata hold its plans.

`docs/file-format.md` describes it. Weights stand in it as the network has them, untransformed and
by name; a plan is the list of operations that the CPU engine runs, and there is one for each head
that gives an image.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from advkd.engine.interface import input_shape
from advkd.engine.lowering import LoweringError
from advkd.engine.networks import lower_student
from advkd.engine.plan import Builder, lay_out
from advkd.models.student import Student
from advkd.ops import extension

VERSION = "1"
DTYPES = ("auto", "float16", "float32")
# What a reader settles by itself: where the weights lie, and how a convolution is computed.
_SETTLED = ("algorithm", "packed", "bias", "weight", "values", "table")


def model_bytes(student: Student, dtype: str = "auto") -> bytes:
    """The file of a student.

    Its matrices and convolutions are float16 or float32; `auto` is float16 where that loses
    nothing, as for a student that was saved in it. Vectors stay float32 where float16 would round
    them. Raises ValueError for another dtype, LoweringError for a student that no plan expresses.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is not one of {DTYPES}")
    if extension is None:
        raise LoweringError("the C++ extension is not installed, and it plans the operations")
    tensors: dict[str, Tensor] = {}
    depths = range(1, len(student.heads) + 1)
    if student.target == "state":
        depths = depths[-1:]  # the other heads give no clean image
    plan = {
        "size": student.size,
        "channels": student.channels,
        "classes": student.num_classes or 0,
        "class_names": None if student.class_names is None else list(student.class_names),
        "heads": [_head(student, depth, tensors) for depth in depths],
    }
    metadata = {"advkd": VERSION, "plan": _json(plan)}
    return _safetensors({name: _stored(tensors[name], dtype) for name in sorted(tensors)}, metadata)


def _head(student: Student, depth: int, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The plan that leaves by head number `depth`; its weights are added to `tensors`."""
    plan = lower_student(student, input_shape(student)[1:], 1, 1, depth).plan
    arena = lay_out(plan.buffers, plan.ops)
    return {
        "size": student.config.stages[depth - 1],
        "arena": arena,
        "buffers": [[b.offset, b.height * b.width, b.channels] for b in plan.buffers],
        "ops": _operations(plan, tensors),
    }


def _operations(plan: Builder, tensors: dict[str, Tensor]) -> list[dict[str, Any]]:
    listed = []
    for op, own in zip(plan.ops, plan.tensors, strict=True):
        names = {}
        for role, tensor in own.items():
            name = f"{op.module}.{'weight' if role in ('packed', 'table') else role}"
            known = tensors.setdefault(name, tensor)
            assert torch.equal(known, tensor), f"two tensors are called {name}"
            names[role] = name
        numbers = {key: value for key, value in op.numbers.items() if key not in _SETTLED}
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
    data = b""
    for name, tensor in tensors.items():
        content = tensor.numpy().tobytes()
        offsets = [len(data), len(data) + len(content)]
        dtype = "F16" if tensor.dtype is torch.float16 else "F32"
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": offsets}
        data += content
    text = _json(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data


def _json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def _stored(tensor: Tensor, dtype: str) -> Tensor:
    """The tensor in the dtype that the file holds it in."""
    tensor = tensor.detach().to("cpu", torch.float32).contiguous()
    half = tensor.half()
    if dtype == "float32":
        return tensor
    is_exact = torch.equal(half.float(), tensor)
    return half if is_exact or (dtype == "float16" and tensor.dim() > 1) else tensor
