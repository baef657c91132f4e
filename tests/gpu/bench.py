"""Images a second of ddpm-cifar10-32's architecture on a GPU, ours against other loops, where the
device's time goes, and what a step and a call of an op cost the host. `python -m tests.gpu` calls
it; random weights take as long as trained ones.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from advkd import ops
from advkd.config import load_preset
from advkd.diffusion import Schedule, ddim_table
from advkd.engine import cuda as cuda_engine
from advkd.engine.cuda import Buffers, CudaEngine
from advkd.engine.noise import Noise, Purpose
from advkd.models.unet import UNet, config_to_diffusers
from advkd.ops import use_backend

STEPS, ROUNDS = 50, 3
CASES = ((torch.float32, 64), (torch.bfloat16, 1), (torch.bfloat16, 256))

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
    torch._dynamo.reset()  # it gives up on a function that it has compiled for too many networks
    compiled = torch.compile(unet, mode="reduce-overhead", fullgraph=True, dynamic=False)

    def by_compile(indices: Tensor) -> Tensor:
        with use_backend("reference"):
            return python_loop(compiled, indices)

    yield "torch.compile, reduce-overhead", by_compile
    yield "diffusers", diffusers_loop(unet, batch)


def diffusers_loop(unet: UNet, batch: int) -> Loop:
    """What DDIMPipeline does, which cannot be called with bfloat16."""
    from diffusers import DDIMScheduler, UNet2DModel, logging

    logging.set_verbosity_error()
    dtype = unet.conv_in.weight.dtype
    model = UNet2DModel(**config_to_diffusers(unet.config)).eval().cuda().to(dtype)
    model = model.to(memory_format=torch.channels_last)
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(STEPS)

    def loop(indices: Tensor) -> Tensor:
        x_t = torch.randn(batch, 3, 32, 32, device="cuda", dtype=dtype)
        for t in scheduler.timesteps:
            x_t = scheduler.step(model(x_t, t).sample, t, x_t).prev_sample
        return x_t

    return loop


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
    for dtype, batch in CASES:
        indices, ours = torch.arange(batch), None
        for name, loop in loops(teacher(dtype), batch):
            try:
                took = seconds(loop, indices)
            except Exception as error:
                reason = (str(error).splitlines() or [type(error).__name__])[0][:80]
                yield f"| {name} | {str(dtype)[6:]} | {batch} | failed: {reason} | | |"
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


# Words in the names of kernels, in the order in which they are looked for.
KINDS = (
    ("attention", ("attention", "flash", "softmax")),
    ("GroupNorm-SiLU", ("group_norm", "rowwisemoments")),
    ("convolution", ("conv", "fprop", "implicit", "cudnn", "winograd", "nchw", "nhwc")),
    ("matrix product", ("gemm", "cutlass", "nvjet", "splitk")),
)


@torch.inference_mode()
def device_time() -> Iterator[str]:
    """The device's time of a pass, kind by kind, and its longest kernels: lines of two tables."""
    kinds = [name for name, _ in KINDS]
    yield f"| ms of a pass on the device | {' | '.join(kinds)} | the rest | all | launches |"
    yield "|---" * (len(kinds) + 4) + "|"
    longest = []
    for dtype, batch in CASES:
        unet = teacher(dtype)
        x = torch.randn(batch, 3, 32, 32, device="cuda", dtype=dtype)
        x = x.contiguous(memory_format=torch.channels_last)
        kernels = kernels_of(lambda unet=unet, x=x: unet(x, 300))
        spent = dict.fromkeys([*kinds, "the rest"], 0.0)
        for name, (microseconds, _) in kernels.items():
            spent[kind_of(name)] += microseconds / 1e3
        cells = [*spent.values(), sum(spent.values())]
        launches = sum(count for _, count in kernels.values())
        case = f"{str(dtype)[6:]}, {batch}"
        yield f"| {case} | {' | '.join(f'{ms:.3f}' for ms in cells)} | {launches} |"
        longest += [
            f"| {case} | {name[:70].replace('|', '/')} | {count} | {microseconds:.1f} |"
            for name, (microseconds, count) in list(kernels.items())[:6]
        ]
    yield ""
    yield "| longest kernels of a pass | name | launches | microseconds |"
    yield "|---|---|---|---|"
    yield from longest


def kind_of(kernel: str) -> str:
    """The kind of operation that a kernel's name tells."""
    lower = kernel.lower()
    return next((kind for kind, words in KINDS if any(w in lower for w in words)), "the rest")


def kernels_of(run: Callable[[], object]) -> dict[str, tuple[float, int]]:
    """Microseconds on the device and launches of each kernel, the longest first."""
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    found = {e.key: (e.self_device_time_total, e.count) for e in profile.key_averages()}
    found = {name: of for name, of in found.items() if of[0] > 0}
    return dict(sorted(found.items(), key=lambda item: -item[1][0]))


@torch.no_grad()
def host_time() -> Iterator[str]:
    """What calls of the fused ops cost the host, on tensors so small that the device waits."""
    x = torch.randn(2, 32, 8, 8, device="cuda").to(memory_format=torch.channels_last)
    weight, q = torch.ones(32, device="cuda"), torch.randn(2, 1, 64, 32, device="cuda")
    calls: dict[str, Callable[[], object]] = {
        "group_norm_silu": lambda: ops.group_norm_silu(x, weight, weight, 8, 1e-5),
        "torch's group_norm and silu": lambda: F.silu(F.group_norm(x, 8, weight, weight, 1e-5)),
        "attention": lambda: ops.attention(q, q, q),
        "scaled_dot_product_attention": lambda: F.scaled_dot_product_attention(q, q, q),
    }
    yield "| a call on the host | microseconds |"
    yield "|---|---|"
    for name, call in calls.items():
        took = seconds(lambda indices, call=call: [call() for _ in range(200)], torch.empty(0))
        yield f"| {name} | {took / 200 * 1e6:.1f} |"
