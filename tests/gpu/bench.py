"""Images a second of ddpm-cifar10-32's architecture on a GPU, ours against other loops, and what a
step costs beside its network. `python -m tests.gpu` calls it; random weights take as long as
trained ones.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from advkd import ops
from advkd.config import load_preset
from advkd.diffusion import Schedule, ddim_table
from advkd.engine import cuda as cuda_engine
from advkd.engine.cuda import Buffers, CudaEngine
from advkd.engine.noise import Noise, Purpose
from advkd.models.unet import UNet, config_to_diffusers
from advkd.ops import use_backend

STEPS, ROUNDS = 50, 5
BATCHES = (1, 64, 256)
TYPES = (torch.float32, torch.bfloat16)

NOISE = Noise(0, Purpose.SAMPLING)

Loop = Callable[[Tensor], object]  # samples the images of these numbers


def teacher(dtype: torch.dtype) -> UNet:
    config = dataclasses.replace(load_preset("cifar10-32").unet, dropout=0.0)
    torch.manual_seed(0)
    unet = UNet(config).eval().requires_grad_(False).cuda().to(dtype)
    return unet.to(memory_format=torch.channels_last)


def loops(unet: UNet, batch: int) -> Iterator[tuple[str, Loop]]:
    """The contenders: each runs STEPS steps."""
    table = ddim_table(unet.schedule, STEPS)
    engine = CudaEngine.make(unet, (32, 32), batch)
    yield "ours", lambda indices: engine.sample(table, NOISE, indices, saved=[STEPS])

    def python_loop(network: Callable[..., Tensor], indices: Tensor) -> Tensor:
        x_t = NOISE.x_T(indices.cuda(), (3, 32, 32))
        for i, t in enumerate(table.timesteps.tolist()):
            out = network(x_t.to(unet.conv_in.weight.dtype), torch.tensor(t, device="cuda"))
            a_x, a_m, c_0, c_x, c_m, _ = (float(c) for c in table.coefficients[i])
            x0 = (a_x * x_t + a_m * out.float()).clamp(-1, 1)
            x_t = c_0 * x0 + c_x * x_t + c_m * out.float()
        return x_t

    def eager(indices: Tensor) -> Tensor:
        with use_backend("reference"):
            return python_loop(unet, indices)

    yield "torch eager", eager
    yield "torch eager, our ops", lambda indices: python_loop(unet, indices)
    compiled = torch.compile(unet, mode="reduce-overhead", fullgraph=True, dynamic=False)

    def by_compile(indices: Tensor) -> Tensor:
        with use_backend("reference"):
            return python_loop(compiled, indices)

    yield "torch.compile, reduce-overhead", by_compile
    yield "diffusers", diffusers_loop(unet, batch)


def diffusers_loop(unet: UNet, batch: int) -> Loop:
    from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

    model = UNet2DModel(**config_to_diffusers(unet.config)).cuda().to(unet.conv_in.weight.dtype)
    model = model.to(memory_format=torch.channels_last)
    pipeline = DDIMPipeline(model, DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    return lambda indices: pipeline(batch, num_inference_steps=STEPS, output_type="np")


def seconds(loop: Loop, indices: Tensor) -> float:
    """The median of some runs, after one that is not counted."""
    found = []
    for _ in range(ROUNDS + 1):
        torch.cuda.synchronize()
        began = time.perf_counter()
        loop(indices)
        torch.cuda.synchronize()
        found.append(time.perf_counter() - began)
    return statistics.median(found[1:])


@torch.inference_mode()
def images_per_second() -> Iterator[str]:
    """Lines of a table."""
    yield "| images a second | dtype | batch | images/s | ms a step | of ours |"
    yield "|---|---|---|---|---|---|"
    for dtype in TYPES:
        unet = teacher(dtype)
        for batch in BATCHES:
            indices, ours = torch.arange(batch), None
            for name, loop in loops(unet, batch):
                try:
                    took = seconds(loop, indices)
                except Exception as error:
                    yield f"| {name} | {dtype} | {batch} | failed: {str(error)[:80]} | | |"
                    continue
                ours = took if ours is None else ours
                yield (
                    f"| {name} | {str(dtype)[6:]} | {batch} | {batch / took:.1f} | "
                    f"{took / STEPS * 1e3:.3f} | {ours / took:.2f} |"
                )


@torch.inference_mode()
def launch_overhead() -> Iterator[str]:
    """What a step costs beside the network: the loop over a network of one element's copy."""
    device = torch.device("cuda", torch.cuda.current_device())
    table = ddim_table(Schedule(), 1000)
    buffers = Buffers.allocate((1, 3, 32, 32), 4, torch.float32, device)
    captured, out = cuda_engine.captured(lambda: buffers.x_in * 0.5, device)
    loop = cuda_engine.Loop(ops.extension, buffers, captured.raw_cuda_graph(), out)

    def run(indices: Tensor) -> object:
        return loop.run(
            table, torch.zeros(1000, 4), NOISE, indices, saved=[1000], target="state", chunk=1000,
            stream=cuda_engine.current_stream(device),
        )  # fmt: skip

    yield "| launch overhead of a step, 1 image of 3x32x32 | microseconds |"
    yield "|---|---|"
    yield f"| the loop | {seconds(run, torch.arange(1)) * 1e3:.2f} |"
