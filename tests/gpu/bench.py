"""Images a second of ddpm-cifar10-32's architecture and of the students on a GPU, ours against
other loops, where the device's time goes, what each kernel takes beside what memory allows, and
what a step and a call of an op cost the host. `python -m tests.gpu` calls it; random weights take
as long as trained ones.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from advkd import ops
from advkd.config import load_preset
from advkd.diffusion import Schedule, ddim_table
from advkd.engine import cuda as cuda_engine
from advkd.engine.cuda import Buffers, CudaEngine
from advkd.engine.device_pass import joined
from advkd.engine.noise import Noise, Purpose
from advkd.models.student import Student
from advkd.models.unet import UNet, config_to_diffusers
from advkd.ops import use_backend
from advkd.pretrained import load_student

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


STUDENTS = ("fashion-mnist-student", "avatars-student")
STUDENT_CASES = ((torch.float32, 1), (torch.float32, 256), (torch.bfloat16, 256))


@torch.inference_mode()
def students() -> Iterator[str]:
    """Lines of a table: a call of the engine, the noise on the device."""
    yield "| student | dtype | batch | ms ours | torch eager | torch.compile | images/s ours |"
    yield "|---|---|---|---|---|---|---|"
    for name in STUDENTS:
        for dtype, batch in STUDENT_CASES:
            student = load_student(f"zoo:{name}").cuda().to(dtype)
            took = student_seconds(student.to(memory_format=torch.channels_last), batch)
            cells = " | ".join(f"{t * 1e3:.3f}" for t in took)
            yield f"| {name} | {str(dtype)[6:]} | {batch} | {cells} | {batch / took[0]:.0f} |"


def student_seconds(student: Student, batch: int) -> list[float]:
    """Of a call of our engine, of the modules, and of torch.compile's function."""
    size = (student.size, student.size)
    x = NOISE.x_T(torch.arange(batch).cuda(), (student.channels, *size))
    y = torch.zeros(batch, dtype=torch.int64, device="cuda") if student.num_classes else None
    narrow, engine = x.to(next(student.parameters()).dtype), CudaEngine.make(student, size, batch)
    torch._dynamo.reset()
    compiled = torch.compile(student, mode="reduce-overhead", fullgraph=True, dynamic=False)
    calls: list[tuple[str | None, Callable[[], object]]] = [
        (None, lambda: engine.run(x, y)),
        ("reference", lambda: student(narrow, y)),
        ("reference", lambda: compiled(narrow, y)),
    ]
    took = []
    for backend, call in calls:
        with use_backend(backend):
            took.append(seconds(lambda _, call=call: [call() for _ in range(20)], x) / 20)
    return took


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
    ("bias and residual", ("bias_residual",)),
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
        engine = CudaEngine.make(teacher(dtype), (32, 32), batch)
        x = torch.randn(batch, 3, 32, 32, device="cuda")
        kernels = kernels_of(lambda engine=engine, x=x: engine.run(x, t=300))
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


def by_graph(calls: Sequence[Callable[[], object]]) -> float:
    """Microseconds of a call on the device: the median of replays of a graph of all of them, whose
    inputs are others, so that the cache holds none."""
    calls[0]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    took = []
    for _ in range(7):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        graph.replay()
        last.record()
        torch.cuda.synchronize()
        took.append(first.elapsed_time(last) / len(calls) * 1e3)
    return statistics.median(took[1:])


# (channels, side) of the maps that a pass normalizes, and batches.
NORMS = ((128, 32), (256, 32), (384, 32), (256, 16), (384, 16), (512, 16), (256, 8), (256, 4))
BATCHES = ((torch.float32, 64), (torch.bfloat16, 256))
APART = 150 << 20  # bytes of all inputs, three times the largest cache of today


@torch.inference_mode()
def kernel_time() -> Iterator[str]:
    """Lines of tables: each kernel, what the bytes that it must move take, and torch's."""
    big = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    half = len(big) // 2
    copied = by_graph([lambda: big[:half].copy_(big[half:])] * 3)
    rate = len(big) / copied  # bytes a microsecond, read and written
    yield f"A copy on the device moves {rate / 1e6:.2f} TB/s, read and written."
    yield "\n| kernel | map | dtype | batch | microseconds | at the copy's rate | torch's |"
    yield "|---|---|---|---|---|---|---|"
    for dtype, batch in BATCHES:
        for channels, side in NORMS:
            yield norm_row(dtype, batch, channels, side, rate)
    for dtype, batch in BATCHES:
        yield join_row(dtype, batch, rate)
    yield "\n| attention, 256 tokens, head of 256 | batch | microseconds | TFLOP/s | torch's |"
    yield "|---|---|---|---|---|"
    for dtype, batch in BATCHES:
        for precision in ("ieee", "tf32") if dtype == torch.float32 else ("",):
            yield attention_row(dtype, batch, precision)


def maps(dtype: torch.dtype, batch: int, channels: int, side: int) -> list[Tensor]:
    """Maps that together fill more than a cache."""
    one = batch * channels * side * side * torch.finfo(dtype).bits // 8
    count = max(2, min(16, APART // one))
    shape = (count, batch, side, side, channels)
    return list(torch.randn(shape, device="cuda").to(dtype).permute(0, 1, 4, 2, 3))


def norm_row(dtype: torch.dtype, batch: int, channels: int, side: int, rate: float) -> str:
    xs = maps(dtype, batch, channels, side)
    weight = torch.ones(channels, device="cuda", dtype=dtype)
    ours = by_graph([lambda x=x: ops.group_norm_silu(x, weight, weight, 32, 1e-5) for x in xs])
    theirs = by_graph([lambda x=x: F.silu(F.group_norm(x, 32, weight, weight)) for x in xs])
    floor = 2 * xs[0].numel() * xs[0].element_size() / rate
    times = " | ".join(f"{t:.1f}" for t in (ours, floor, theirs))
    of = f"{channels}x{side}x{side} | {str(dtype)[6:]} | {batch}"
    return f"| GroupNorm-SiLU | {of} | {times} |"


def join_row(dtype: torch.dtype, batch: int, rate: float) -> str:
    xs = maps(dtype, batch, 256, 16)
    bias = torch.ones(256, device="cuda", dtype=dtype)
    pairs = list(zip(xs, [*xs[1:], xs[0]], strict=True))
    rows = [(x.permute(0, 2, 3, 1), r.permute(0, 2, 3, 1)) for x, r in pairs]
    outs = [torch.empty_like(x) for x, _ in rows]
    ours = by_graph(
        [lambda x=x, r=r, out=out: joined(x, bias, r, 1.0, out)
         for (x, r), out in zip(rows, outs, strict=True)]
    )  # fmt: skip
    theirs = by_graph([lambda x=x, r=r: x + bias[:, None, None] + r for x, r in pairs])
    floor = 3 * xs[0].numel() * xs[0].element_size() / rate
    times = " | ".join(f"{t:.1f}" for t in (ours, floor, theirs))
    return f"| bias and residual | 256x16x16 | {str(dtype)[6:]} | {batch} | {times} |"


def attention_row(dtype: torch.dtype, batch: int, precision: str) -> str:
    matmul: Any = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    qkv = [torch.randn(3, batch, 1, 256, 256, device="cuda").to(dtype) for _ in range(4)]
    try:
        matmul.fp32_precision = precision or before
        ours = by_graph([lambda x=x: ops.attention(*x) for x in qkv])
        theirs = by_graph([lambda x=x: F.scaled_dot_product_attention(*x) for x in qkv])
    finally:
        matmul.fp32_precision = before
    name = f"{str(dtype)[6:]}{' by tf32' if precision == 'tf32' else ''}"
    rate = 4 * batch * 256**3 / ours / 1e6
    return f"| {name} | {batch} | {ours:.1f} | {rate:.0f} | {theirs:.1f} |"


@torch.no_grad()
def host_time() -> Iterator[str]:
    """What calls of the fused ops cost the host, on tensors so small that the device waits."""
    x = torch.randn(2, 32, 8, 8, device="cuda").to(memory_format=torch.channels_last)
    weight, q = torch.ones(32, device="cuda"), torch.randn(2, 1, 64, 32, device="cuda")
    tracked = x.clone().requires_grad_()

    @torch.enable_grad()
    def both_ways(norm: Callable[[Tensor], Tensor]) -> object:
        return torch.autograd.grad(norm(tracked), tracked, x)

    calls: dict[str, Callable[[], object]] = {
        "group_norm_silu, forward and backward": lambda: both_ways(
            lambda x: ops.group_norm_silu(x, weight, weight, 8, 1e-5)
        ),
        "torch's, forward and backward": lambda: both_ways(
            lambda x: F.silu(F.group_norm(x, 8, weight, weight, 1e-5))
        ),
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
