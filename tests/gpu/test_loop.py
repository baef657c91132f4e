"""The sampling loop on a real GPU: the CPU's bits where promised, else within tolerances."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from advkd import ops
from advkd.config import load_preset
from advkd.diffusion import Schedule, ddim_table
from advkd.engine import cuda as graph
from advkd.engine import sampling
from advkd.models.unet import UNet
from advkd.pretrained import load_teacher

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "cuda_emulation"))
from harness import expected, told_of, toy

pytestmark = pytest.mark.gpu

TYPES = [torch.float32, torch.float16, torch.bfloat16]
LAYOUTS = [torch.contiguous_format, torch.channels_last]


@pytest.fixture(autouse=True)
def exact_convolutions() -> Any:
    """float32 is multiplied in float32; and the extension must be there."""
    missing = ops.cuda_missing()
    assert missing is None, missing
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def toy_loop(
    batch: int, shape: tuple[int, int, int], dtype: torch.dtype,
    memory_format: torch.memory_format, on_device: bool,
) -> tuple[graph.Loop, Any]:  # fmt: skip
    """The loop over a network of one product and one sum, by torch; and its graph, to be kept."""
    device = torch.device("cuda", torch.cuda.current_device())
    buffers = graph.new_buffers((batch, *shape), 4, dtype, device, memory_format)
    buffers.told = torch.empty(4, device=device)
    buffers.x_in.zero_()
    captured, out = graph.captured(lambda: toy(buffers.x_in, buffers.told), device)
    buffers.model_out = out
    assert ops.extension is not None
    return graph.Loop(ops.extension, buffers, captured.raw_cuda_graph(), on_device), captured


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("memory_format", LAYOUTS)
@pytest.mark.parametrize("shape", [(3, 32, 32), (3, 7, 5), (1, 28, 28), (5, 13, 17)])
def test_noise_and_update_have_the_cpus_bits(
    shape: tuple[int, int, int], memory_format: torch.memory_format, dtype: torch.dtype,
    on_device: bool,
) -> None:  # fmt: skip
    loop, captured = toy_loop(3, shape, dtype, memory_format, on_device)
    table = ddim_table(Schedule(), 50, eta=1.0)
    indices = torch.tensor([5, 1, (1 << 32) + 7])
    stream = graph.current_stream(loop.buffers.x_t.device)
    got = loop.run(
        table, told_of(table, dtype), 9, indices, kept=[20, 50], target="denoised", stream=stream
    )
    want = expected(table, 9, indices, shape, dtype, [20, 50], "denoised", memory_format)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a.cpu(), b)
    del captured


def cifar10(dtype: torch.dtype = torch.float32) -> UNet:
    torch.manual_seed(0)
    config = dataclasses.replace(load_preset("cifar10-32").unet, dropout=0.0)
    unet = UNet(config).eval().requires_grad_(False).cuda().to(dtype)
    return unet.to(memory_format=torch.channels_last)


def difference(a: Tensor, b: Tensor) -> float:
    return float((a.cpu().double() - b.cpu().double()).norm() / b.double().norm())


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_the_teacher_draws_the_cpus_images(eta: float) -> None:
    on_cpu = load_teacher("zoo:fashion-mnist")
    table = ddim_table(on_cpu.schedule, 50, eta)
    indices = torch.arange(8)
    want = sampling.sample(on_cpu, table, 3, indices, keep=[25])
    got = sampling.sample(load_teacher("zoo:fashion-mnist").cuda(), table, 3, indices, keep=[25])
    for a, b in zip(got, want, strict=True):
        assert difference(a, b) < 2e-3


@pytest.mark.parametrize(("dtype", "tolerance"), [*zip(TYPES, (1e-3, 5e-2, 2e-1), strict=True)])
def test_the_graph_draws_what_the_plain_loop_draws(dtype: torch.dtype, tolerance: float) -> None:
    unet = cifar10(dtype)
    table = ddim_table(unet.schedule, 10, eta=0.0)
    indices = torch.arange(4)
    want = sampling.sample_eagerly(unet, table, 3, indices, kept=[10])[0]
    engines = [graph.CudaEngine(unet, 4, 32, on_device=where) for where in (False, True)]
    found = [e.sample(table, 3, indices, None, kept=[10], target="denoised")[0] for e in engines]
    assert torch.equal(found[0], found[1])
    again = engines[0].sample(table, 3, indices, None, kept=[10], target="denoised")[0]
    assert torch.equal(found[0], again)
    assert difference(found[0], want) < tolerance


def test_an_image_does_not_depend_on_its_batch() -> None:
    unet = cifar10()
    engine = graph.CudaEngine(unet, 4, 32)
    table = ddim_table(unet.schedule, 5, eta=1.0)
    how: dict[str, Any] = {"kept": [5], "target": "state"}
    whole = engine.sample(table, 3, torch.arange(7), None, **how)[0]
    alone = engine.sample(table, 3, torch.tensor([6]), None, **how)[0]
    assert torch.equal(whole[6:], alone)


def test_a_callback_ends_the_run() -> None:
    unet = cifar10()
    engine = graph.CudaEngine(unet, 1, 32)

    def stop(done: int, steps: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.sample(
            ddim_table(unet.schedule, 500), 3, torch.arange(1), None, kept=[500], target="state",
            callback=stop,
        )  # fmt: skip
    torch.cuda.synchronize()


def test_refused_calls_are_told() -> None:
    loop, captured = toy_loop(1, (3, 8, 8), torch.float32, torch.channels_last, False)
    assert ops.extension is not None
    with pytest.raises(RuntimeError, match=r"cudaGraphAddChildGraphNode failed: .*invalid"):
        graph.Loop(ops.extension, loop.buffers, 0, False)
    del captured
