"""CudaEngine on a real GPU: the CPU's bits where they are promised, else within tolerances."""

from __future__ import annotations

import dataclasses
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from advkd import ops
from advkd.config import load_preset
from advkd.diffusion import Schedule, ddim_table
from advkd.engine import cuda as cuda_engine
from advkd.engine import device_pass
from advkd.engine.cuda import Buffers, CudaEngine, Loop
from advkd.engine.lowering import LoweringError
from advkd.engine.noise import Noise, Purpose
from advkd.engine.sampling import generate
from advkd.models.unet import UNet
from advkd.pretrained import load_student, load_teacher

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "cuda_emulation"))
from harness import eager, expected, time_embeddings, toy

pytestmark = pytest.mark.gpu

TYPES = [torch.float32, torch.float16, torch.bfloat16]
NOISE = Noise(3, Purpose.SAMPLING)
SIZE = (32, 32)


@pytest.fixture(autouse=True)
def exact_convolutions() -> Iterator[None]:
    """float32 is multiplied in float32; and the extension must be there."""
    missing = ops.cuda_missing()
    assert missing is None, missing
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def toy_loop(
    batch: int, shape: tuple[int, int, int], dtype: torch.dtype
) -> tuple[Loop, tuple[Any, ...]]:
    """The loop over a network of one product and one sum, by torch; and what must stay with it."""
    device = torch.device("cuda", torch.cuda.current_device())
    buffers = Buffers.allocate((batch, *shape), 4, dtype, device)
    buffers = dataclasses.replace(buffers, time_embedding=torch.zeros(4, device=device))
    graph, out = cuda_engine.captured(lambda: toy(buffers.x_in, buffers.time_embedding), device)
    return Loop(ops.extension, buffers, graph.raw_cuda_graph(), out), (graph, out)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", [(3, 32, 32), (3, 7, 5), (1, 28, 28), (5, 13, 17)])
def test_noise_and_update_have_the_cpus_bits(
    shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    loop, graph = toy_loop(3, shape, dtype)
    table = ddim_table(Schedule(), 50, eta=1.0)
    indices = torch.tensor([5, 1, (1 << 32) + 7])
    stream = cuda_engine.current_stream(loop.buffers.x_t.device)
    got = loop.run(
        table, time_embeddings(table), NOISE, indices, saved=[20, 50], target="denoised",
        stream=stream,
    )  # fmt: skip
    want = expected(table, NOISE, indices, shape, dtype, [20, 50], "denoised")
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a.cpu(), b)
    del graph


def cifar10(dtype: torch.dtype = torch.float32, device: int = 0) -> UNet:
    torch.manual_seed(0)
    config = dataclasses.replace(load_preset("cifar10-32").unet, dropout=0.0)
    unet = UNet(config).eval().requires_grad_(False).to(torch.device("cuda", device), dtype)
    return unet.to(memory_format=torch.channels_last)


def difference(a: Tensor, b: Tensor) -> float:
    return float((a.cpu().double() - b.cpu().double()).norm() / b.double().norm())


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_the_teacher_samples_the_cpus_images(eta: float) -> None:
    on_cpu, on_cuda = (load_teacher("zoo:fashion-mnist-unlabelled") for _ in range(2))
    on_cuda = on_cuda.cuda()
    table, indices = ddim_table(on_cpu.schedule, 50, eta), torch.arange(8)
    engine = CudaEngine.make(on_cuda, (28, 28), 8)
    got = engine.sample(table, NOISE, indices, saved=[25, 50])
    assert difference(got[:, 1], eager(on_cpu, table, NOISE, indices)) < 2e-3


@pytest.mark.parametrize("dtype", TYPES)
def test_the_graph_samples_what_the_modules_sample(dtype: torch.dtype) -> None:
    """Half types round elsewhere, and no more: it is as near to the network in float32."""
    unet = cifar10(dtype)
    table, indices = ddim_table(unet.schedule, 10, eta=0.0), torch.arange(4)
    engine = CudaEngine.make(unet, SIZE, 4)
    found = [engine.sample(table, NOISE, indices, saved=[10])[:, 0] for _ in range(2)]
    assert torch.equal(found[0], found[1])
    x = torch.randn(3, 3, *SIZE, device="cuda")
    one_pass = engine.run(x, t=300)
    with torch.inference_mode():
        theirs = [eager(unet, table, NOISE, indices), unet(x.to(dtype), 300).float()]
        unet = unet.float()
        exact = [eager(unet, table, NOISE, indices), unet(x, 300)]
    for got, their, truth in zip((found[0], one_pass), theirs, exact, strict=True):
        allowed = 1e-3 if dtype == torch.float32 else 1.5 * difference(their, truth)
        assert difference(got, truth) < allowed


def test_a_contiguous_network_is_sampled_in_channels_last() -> None:
    unet = cifar10()
    table, indices = ddim_table(unet.schedule, 5), torch.arange(4)
    want = CudaEngine.make(unet, SIZE, 4).sample(table, NOISE, indices, saved=[5])
    unet = unet.to(memory_format=torch.contiguous_format)
    got = CudaEngine.make(unet, SIZE, 4).sample(table, NOISE, indices, saved=[5])
    assert difference(got, want) < 1e-4


def test_an_image_does_not_depend_on_its_batch() -> None:
    unet = cifar10()
    engine = CudaEngine.make(unet, SIZE, 4)
    table = ddim_table(unet.schedule, 5, eta=1.0)
    whole = engine.sample(table, NOISE, torch.arange(7), saved=[5])
    alone = engine.sample(table, NOISE, torch.tensor([6]), saved=[5])
    assert torch.equal(whole[6:], alone)


def test_threads_take_turns_and_others_may_use_cuda_during_a_capture() -> None:
    unet = cifar10()
    table, indices = ddim_table(unet.schedule, 20), torch.arange(4)
    engine = CudaEngine.make(unet, SIZE, 4)
    want = engine.sample(table, NOISE, indices, saved=[20])
    found: list[Tensor] = []

    def work() -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            found.extend(engine.sample(table, NOISE, indices, saved=[20]) for _ in range(3))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    made = CudaEngine.make(unet, SIZE, 4)
    for thread in threads:
        thread.join()
    found.append(made.sample(table, NOISE, indices, saved=[20]))
    assert len(found) == 7 and all(torch.equal(each, want) for each in found)


def test_autocast_does_not_reach_it() -> None:
    unet = cifar10()
    table, indices = ddim_table(unet.schedule, 5), torch.arange(4)
    want = CudaEngine.make(unet, SIZE, 4).sample(table, NOISE, indices, saved=[5])
    with torch.autocast("cuda", dtype=torch.bfloat16):
        engine = CudaEngine.make(unet, SIZE, 4)
        assert torch.equal(engine.sample(table, NOISE, indices, saved=[5]), want)


@pytest.mark.parametrize("name", ["zoo:fashion-mnist-student", "zoo:avatars-student"])
@pytest.mark.parametrize("exit_at", [None, 1])
def test_students_make_the_cpus_images(name: str, exit_at: int | None) -> None:
    on_cpu, on_cuda = load_student(name), load_student(name).cuda()
    want = generate(on_cpu, 20, 5, exit_at=exit_at)
    got = generate(on_cuda, 20, 5, exit_at=exit_at)
    assert difference(got, want) < 1e-4
    some = generate(on_cuda, 3, 5, exit_at=exit_at, first=17, batch=2)
    assert difference(some, got[17:]) < 1e-4
    half = generate(on_cuda.bfloat16(), 20, 5, exit_at=exit_at)
    assert difference(half, want) < 5e-2


def test_new_weights_need_no_new_engine() -> None:
    """Those that the graph reads in their places, and those that are made of several."""
    unet = cifar10()
    engine = CudaEngine.make(unet, SIZE, 2)
    x = torch.randn(2, 3, *SIZE, device="cuda")
    before = engine.run(x, t=300)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.data.mul_(1.05)
        want = unet(x, 300)
    assert difference(engine.run(x, t=300), want) < 1e-3 < difference(before, want)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(3, 32, 32), (3, 7, 5), (1, 28, 28)])
def test_noise_of_a_gpu_has_the_cpus_bits(
    shape: tuple[int, int, int], layout: torch.memory_format
) -> None:
    indices = torch.tensor([5, 1, (1 << 40) + 7])
    want = ops.philox_normal(9, indices, 0xFFFFFFFF, shape, memory_format=layout)
    got = ops.philox_normal(
        9, indices.cuda(), 0xFFFFFFFF, shape, memory_format=layout, backend="fused"
    )
    assert got.stride() == want.stride() and torch.equal(got.cpu(), want)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_second_gpu_samples_the_firsts_images() -> None:
    table, indices = ddim_table(Schedule(), 5), torch.arange(4)
    found = []
    for device in (0, 1):
        engine = CudaEngine.make(cifar10(device=device), SIZE, 4)
        found.append(engine.sample(table, NOISE, indices, saved=[5]))
        assert found[-1].device.index == device and torch.cuda.current_device() == 0
    assert difference(found[1], found[0]) < 1e-4


def test_a_failed_capture_leaves_torch_sane(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pass reads a value back, which no capture allows; then all goes on as before."""
    unet = cifar10()
    table, indices = ddim_table(unet.schedule, 5), torch.arange(4)
    want = CudaEngine.make(unet, SIZE, 4).sample(table, NOISE, indices, saved=[5])
    torch.cuda.empty_cache()
    before, group_norm = torch.cuda.memory_reserved(), device_pass.group_norm

    def reading(*arguments: Any) -> Tensor:
        out = group_norm(*arguments)
        return out * (1 if float(out.sum()) == float(out.sum()) else 2)

    with monkeypatch.context() as patched:
        patched.setattr(device_pass, "group_norm", reading)
        with pytest.raises(LoweringError, match="could not be captured"):
            CudaEngine.make(unet, SIZE, 4)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= before
    assert not torch.cuda.is_current_stream_capturing()
    engine = CudaEngine.make(unet, SIZE, 4)
    assert torch.equal(engine.sample(table, NOISE, indices, saved=[5]), want)


def test_a_callback_ends_the_run() -> None:
    unet = cifar10()
    engine = CudaEngine.make(unet, SIZE, 1)

    def stop(done: int, steps: int) -> None:
        raise KeyboardInterrupt

    table = ddim_table(unet.schedule, 500)
    with pytest.raises(KeyboardInterrupt):
        engine.sample(table, NOISE, torch.arange(1), saved=[500], on_step=stop)
    torch.cuda.synchronize()


def test_refused_calls_are_named() -> None:
    loop, (graph, out) = toy_loop(1, (3, 8, 8), torch.float32)
    with pytest.raises(RuntimeError, match=r"cudaGraphAddChildGraphNode failed: .*invalid"):
        Loop(ops.extension, loop.buffers, 0, out)
    del graph
