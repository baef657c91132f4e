"""A teacher on the CPU: one pass of its network, and DDIM loops, ours and by other stacks.

The other loops take our fused step, so that they are compared by what runs the network. ONNX
Runtime and OpenVINO (`pip install -e '.[bench]'`) are left out where they are not installed.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib.util
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from advkd import ops
from advkd.config import load_preset
from advkd.diffusion import ddim_table
from advkd.engine.cpu import lower
from advkd.engine.interface import input_shape
from advkd.engine.noise import Noise, Purpose
from advkd.models.unet import UNet
from advkd.pretrained import load_teacher

from .measuring import Contender, Contest, device

IMPLEMENTATIONS = ("ours", "eager", "compile", "onnxruntime", "openvino")
NEEDS = {"onnxruntime": "onnxruntime", "openvino": "openvino"}
PASS_TOLERANCE, LOOP_TOLERANCE = 2e-5, 1e-3  # relative L2 against float64

Network = Callable[[Tensor, Tensor], Tensor]  # (x_t, t of one number) -> prediction

pytestmark = pytest.mark.skipif(device() != "cpu", reason="the engine and its peers run on the CPU")


@dataclass(frozen=True)
class Shape:
    """A teacher, the images at once, and the steps of its loop; 0: one pass of the network."""

    teacher: str
    batch: int
    steps: int = 0

    @property
    def name(self) -> str:
        return f"{self.teacher}, batch {self.batch}" + (f", {self.steps} steps" * (self.steps > 0))


# What a loop adds to its passes is the same in every step, so that few of the large one will do.
PASSES = [Shape(name, batch) for name in ("cifar10-32", "teacher") for batch in (1, 16)]
LOOPS = [Shape("teacher", 1, 50), Shape("teacher", 16, 50), Shape("cifar10-32", 1, 5)]


NOISE = Noise(0, Purpose.TRAINING)


@functools.cache
def teacher_of(name: str) -> UNet:
    """The small teacher that ships, or google/ddpm-cifar10-32's network with random weights."""
    if name == "teacher":
        return load_teacher("zoo:fashion-mnist-unlabelled")
    torch.manual_seed(0)
    config = dataclasses.replace(load_preset("cifar10-32").unet, dropout=0.0)
    return UNet(config).eval().requires_grad_(False)


def example(shape: Shape) -> Tensor:
    return NOISE.x_T(torch.arange(shape.batch), input_shape(teacher_of(shape.teacher)))


def eager(shape: Shape) -> Network:
    unet = teacher_of(shape.teacher)

    @torch.inference_mode()
    def run(x_t: Tensor, t: Tensor) -> Tensor:
        with ops.use_backend("reference"):
            return unet(x_t, t)

    return run


def compiled(shape: Shape) -> Network:
    """Inductor with frozen weights and a C++ wrapper, without autotuning."""
    from torch._inductor import config

    patches = {"freezing": True, "cpp_wrapper": True}
    unet = teacher_of(shape.teacher)
    network = torch.compile(unet, fullgraph=True, dynamic=False, options=patches)
    with config.patch(patches), torch.no_grad(), ops.use_backend("reference"):
        network(example(shape), torch.tensor([0]))

    def run(x_t: Tensor, t: Tensor) -> Tensor:
        with torch.no_grad(), ops.use_backend("reference"):
            return network(x_t, t)

    return run


@functools.cache
def onnx_file(teacher: str, batch: int) -> bytes:
    unet = teacher_of(teacher)
    inputs = (example(Shape(teacher, batch)).contiguous(), torch.tensor([0]))
    with tempfile.TemporaryDirectory() as folder, ops.use_backend("reference"):
        path = Path(folder) / "unet.onnx"
        torch.onnx.export(
            unet, inputs, path, dynamo=True, external_data=False, verbose=False,
            input_names=["x_t", "t"], output_names=["out"],
        )  # fmt: skip
        return path.read_bytes()


def onnxruntime(shape: Shape) -> Network:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(
        onnx_file(shape.teacher, shape.batch), options, providers=["CPUExecutionProvider"]
    )

    def run(x_t: Tensor, t: Tensor) -> Tensor:
        found = session.run(None, {"x_t": x_t.contiguous().numpy(), "t": t.numpy()})
        return torch.from_numpy(found[0])

    return run


def openvino(shape: Shape) -> Network:
    import openvino

    settings = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
    }
    core = openvino.Core()
    model = core.read_model(onnx_file(shape.teacher, shape.batch))
    request = core.compile_model(model, "CPU", settings).create_infer_request()

    def run(x_t: Tensor, t: Tensor) -> Tensor:
        found = request.infer({"x_t": x_t.contiguous().numpy(), "t": t.numpy()})
        return torch.from_numpy(found[0].copy())

    return run


PEERS: dict[str, Callable[[Shape], Network]] = {
    "eager": eager,
    "compile": compiled,
    "onnxruntime": onnxruntime,
    "openvino": openvino,
}


def assert_close(found: Tensor, truth: Tensor, tolerance: float) -> None:
    error = float((found.double() - truth).norm() / truth.norm())
    assert error <= tolerance, f"the relative error is {error:.2g}, more than {tolerance:.2g}"


def installed(name: str) -> bool:
    return importlib.util.find_spec(NEEDS.get(name, "torch")) is not None


def pass_contest(shape: Shape) -> Contest:
    unet, x_t, t = teacher_of(shape.teacher), example(shape), torch.tensor([500])
    with torch.no_grad(), ops.use_backend("reference"):
        truth = copy.deepcopy(unet).double()(x_t.double(), t)
    engine = lower(unet, (x_t.shape[2], x_t.shape[3]), batch=shape.batch)

    def contender(network: Network) -> Contender:
        return Contender(
            lambda _: network(x_t, t), lambda: assert_close(network(x_t, t), truth, PASS_TOLERANCE)
        )

    networks: dict[str, Network] = {"ours": lambda x, t: engine.run(x, t=int(t))}
    networks |= {name: make(shape) for name, make in PEERS.items() if installed(name)}
    return Contest({name: contender(network) for name, network in networks.items()})


def loop_contest(shape: Shape) -> Contest:
    unet, x_T = teacher_of(shape.teacher), example(shape)
    table = ddim_table(unet.schedule, shape.steps)
    indices = torch.arange(shape.batch)
    engine = lower(unet, (x_T.shape[2], x_T.shape[3]), batch=shape.batch)

    def ours() -> Tensor:
        return engine.sample(table, NOISE, indices, saved=[shape.steps])[:, 0]

    def loop(network: Network, dtype: torch.dtype = torch.float32) -> Tensor:
        x_t = NOISE.x_T(indices, input_shape(unet)).to(dtype)
        for i, t in enumerate(table.timesteps.tolist()):
            x_t, _ = ops.sampling_step(
                x_t, network(x_t, torch.tensor([t])), table.coefficients[i], clip=table.clip,
                seed=NOISE.seed, image_index=indices, step=NOISE.step_word(i),
            )  # fmt: skip
        return x_t

    with torch.no_grad(), ops.use_backend("reference"):
        truth = loop(copy.deepcopy(unet).double(), torch.float64)

    def contender(run: Callable[[], Tensor]) -> Contender:
        return Contender(lambda _: run(), lambda: assert_close(run(), truth, LOOP_TOLERANCE))

    runs: dict[str, Callable[[], Tensor]] = {"ours": ours}
    for name, make in PEERS.items():
        if installed(name):
            runs[name] = functools.partial(loop, make(shape))
    return Contest({name: contender(run) for name, run in runs.items()})


def skip_unless_installed(implementation: str) -> None:
    if not installed(implementation):
        pytest.skip(f"{implementation} is not installed")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", PASSES, ids=lambda shape: shape.name)
def test_pass(contest: Any, shape: Shape, implementation: str) -> None:
    skip_unless_installed(implementation)
    contest("network pass", shape.name, implementation, lambda: pass_contest(shape))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", LOOPS, ids=lambda shape: shape.name)
def test_loop(contest: Any, shape: Shape, implementation: str) -> None:
    skip_unless_installed(implementation)
    contest("DDIM loop", shape.name, implementation, lambda: loop_contest(shape))
