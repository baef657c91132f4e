"""The engine of a teacher on a CUDA device: one network pass, captured in a CUDA graph, and the C++
loop that launches it once a step (csrc/cuda/sampling_loop.cu). Python takes no part in a step.

The state is float32. The network may be of float32, float16 or bfloat16; the kernel of the step
then writes the state in that type too. Time embeddings are computed for all steps before the first,
and the kernel copies the next step's to where the graph reads it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from advkd import ops
from advkd.diffusion import StepTable
from advkd.engine.interface import Engine, OnStep, check_labels, check_saved, patched
from advkd.engine.lowering import LoweringError
from advkd.engine.noise import Noise
from advkd.models import layers, unet
from advkd.models.student import Student
from advkd.models.unet import UNet

CHUNK = 10  # steps between two looks at Ctrl-C and at callbacks
MAX_BATCH = 256  # images of a captured pass; more are sampled in parts
_MAX_CHANNELS = 128  # of an image, in csrc/cuda/sampling_step.h
_WARM_UP = 3  # passes before the capture, in which libraries choose their algorithms
_NAMES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}

# A graph repeats the launches of one call, so the modules in it must be known to have no state of
# their own in Python.
_BLOCKS: tuple[type[nn.Module], ...] = (
    *(unet.UNet, unet.DownBlock, unet.MidBlock, unet.UpBlock),
    *(layers.ResnetBlock, layers.Attention, layers.GroupNormSiLU, layers.Conv3x3),
    *(layers.Downsample, layers.Upsample, layers.TimestepEmbedding),
    *(nn.Conv2d, nn.Linear, nn.Embedding, nn.Dropout, nn.ModuleList),
)

_capturing = threading.Lock()  # one capture at a time, for they share a stream


@dataclass(frozen=True)
class Buffers:
    """Tensors whose addresses the graph holds, images channels_last. The network reads `x_in` and
    `time_embedding` and writes `model_out`."""

    loop_state: Tensor  # of the C++ loop
    x_t: Tensor  # (B, C, H, W) float32
    x_in: Tensor  # the same in the network's dtype; x_t itself where that is float32
    time_embedding: Tensor  # (R,) of that dtype, R * itemsize a multiple of 16

    @classmethod
    def allocate(
        cls, shape: tuple[int, int, int, int], width: int, dtype: torch.dtype, device: torch.device
    ) -> Buffers:
        """Zeros for images of `shape` (B, C, H, W) and time embeddings of `width` numbers."""
        state = torch.zeros(_extension().cuda_loop_bytes, dtype=torch.uint8, device=device)
        last = torch.channels_last
        x_t = torch.empty(shape, dtype=torch.float32, device=device, memory_format=last).zero_()
        x_in = x_t if dtype == torch.float32 else x_t.to(dtype)
        return cls(state, x_t, x_in, torch.zeros(width, dtype=dtype, device=device))


class Loop:
    """The C++ loop over a captured pass. `network` is the address of a cudaGraph_t.

    Raises RuntimeError where CUDA refuses, with the names of the call and the error.
    """

    def __init__(self, extension: Any, buffers: Buffers, network: int, model_out: Tensor):
        x_t, embedding = buffers.x_t, buffers.time_embedding
        assert model_out.shape == x_t.shape and model_out.dtype == buffers.x_in.dtype
        assert all(t.is_contiguous(memory_format=torch.channels_last) for t in (x_t, model_out))
        B, C, H, W = x_t.shape
        self.buffers = buffers
        self._loop = extension.CudaSamplingLoop(
            device=x_t.device.index or 0, network=network, loop=buffers.loop_state.data_ptr(),
            x_t=x_t.data_ptr(), x_in=0 if buffers.x_in is x_t else buffers.x_in.data_ptr(),
            model_out=model_out.data_ptr(), type=_NAMES[model_out.dtype],
            time_embedding=embedding.data_ptr(),
            time_embedding_bytes=embedding.numel() * embedding.element_size(),
            sizes=(B, C, H * W),
        )  # fmt: skip

    def run(
        self, table: StepTable, time_embeddings: Tensor, noise: Noise, indices: Tensor, *,
        saved: Sequence[int], target: str, half: bool = False, chunk: int = CHUNK, stream: int = 0,
        on_chunk: Callable[[int], object] | None = None,
    ) -> Tensor:  # fmt: skip
        """Run all steps; the targets saved after the steps `saved`, (K, B, C, H, W) on the device,
        float16 if `half`, else float32.

        time_embeddings: (N, R). `on_chunk` is called with the number of steps done, every `chunk`
        steps. Raises RuntimeError while another run uses the buffers.
        """
        x_t, embedding = self.buffers.x_t, self.buffers.time_embedding
        B, C, H, W = x_t.shape
        out = torch.empty(
            (len(saved), B, H, W, C), dtype=torch.float16 if half else torch.float32,
            device=x_t.device,
        )  # fmt: skip
        rows = step_rows(table, saved, target).to(x_t.device)
        indices = indices.to(x_t.device, torch.int64).contiguous()
        time_embeddings = time_embeddings.to(x_t.device, embedding.dtype).contiguous()
        self._loop.run(
            steps=len(table), seed=noise.seed, purpose=int(noise.purpose), clip=table.clip,
            image_index=indices.data_ptr(), rows=rows.data_ptr(),
            time_embedding=time_embeddings.data_ptr(), saved=out.data_ptr(), saved_half=half,
            chunk=chunk, stream=stream, on_chunk=on_chunk,
        )  # fmt: skip
        return out.permute(0, 1, 4, 2, 3)


def step_rows(table: StepTable, saved: Sequence[int], target: str) -> Tensor:
    """A row per step, (N, 8) float32 on the CPU: six coefficients and, as integers, the number of
    the target saved after it (-1: none) and whether that is x0_hat (csrc/cuda/sampling_step.h)."""
    rows = torch.zeros((len(table), 8), dtype=torch.float32, device="cpu")
    rows[:, :6] = torch.from_numpy(table.coefficients)
    integers = rows.view(torch.int32)
    integers[:, 6] = -1
    for number, step in enumerate(saved):
        integers[step - 1, 6] = number
        integers[step - 1, 7] = target == "denoised" and step < len(table)
    return rows


def captured(
    function: Callable[[], Tensor],
    device: torch.device,
    *,
    stream: torch.cuda.Stream | None = None,
    warm_up: int = _WARM_UP,
    pool: Any = None,
) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """Capture what a function launches on the device: the CUDA graph, and the tensor it writes.

    `stream` and `pool` are where, if not on the stream of all captures and in memory of its own;
    `warm_up` times the function is carried out before. An exception, of the function or of CUDA,
    leaves no capture under way and no memory taken.
    """
    with _capturing:
        stream = _side_stream(device) if stream is None else stream
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(warm_up):
                function()
            found = _captured_on(stream, function, device, pool)
        torch.cuda.current_stream(device).wait_stream(stream)
    return found


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of all captures on a device: libraries keep memory for each they have seen."""
    return torch.cuda.Stream(device)


def _captured_on(
    stream: torch.cuda.Stream, function: Callable[[], Tensor], device: torch.device, pool: Any
) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """`captured`, on the current stream."""
    stream.synchronize()
    torch.cuda.empty_cache()  # the graph's memory is a pool of its own
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    pool = torch.cuda.graph_pool_handle() if pool is None else pool
    try:
        # Other threads may go on to use CUDA.
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        out = function()
        graph.capture_end()
    except BaseException:
        _abandon(graph, pool, device)
        raise
    return graph, out


def _abandon(graph: torch.cuda.CUDAGraph, pool: Any, device: torch.device) -> None:
    """End a capture that failed. Where CUDA itself refuses to end it, torch leaves its allocator in
    the capture's pool; that is undone here."""
    try:
        graph.capture_end()
    except RuntimeError:
        with suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(device.index, pool)
        with suppress(RuntimeError):
            torch._C._cuda_releasePool(device.index, pool)


def current_stream(device: torch.device) -> int:
    """The handle of torch's current stream on the device."""
    return torch.cuda.current_stream(device).cuda_stream


def synchronize(device: torch.device) -> None:
    """Wait for torch's current stream on the device."""
    torch.cuda.current_stream(device).synchronize()


class CudaEngine(Engine):
    """A teacher captured for batches of one size.

    A smaller batch is padded and a larger one sampled in parts; an image has the same bits in any
    of them. Weights are read in their places, so new values need no new engine. Threads take turns.
    A callback cannot use the engine that calls it, which is a RuntimeError. So is what CUDA refuses
    while it runs.
    """

    reads_in_place = True

    @classmethod
    def unavailable(cls, model: UNet | Student) -> str | None:
        """Why no CUDA graph serves this network, as a clause; None where one does."""
        if isinstance(model, Student):
            return "a student is one network pass"
        unsuited, device = _unsuited(model), model.conv_in.weight.device
        if device.type != "cuda":
            return unsuited or f"the network is on {device.type}"
        return (
            unsuited
            or ops.cuda_missing()
            or ops.cuda_code_missing(torch.cuda.get_device_capability(device))
        )

    @classmethod
    def batch_for(cls, images: int) -> int:
        """The next power of two, at most MAX_BATCH, so that few sizes are ever captured."""
        return min(1 << max(images - 1, 0).bit_length(), MAX_BATCH)

    @classmethod
    def make(
        cls, model: UNet | Student, size: tuple[int, int], batch: int, exit_at: int | None = None
    ) -> CudaEngine:
        """Capture a teacher for inputs of `size` (H, W) and `batch` images at a time.

        Raises LoweringError for whatever fails on the way, such as memory that does not suffice or
        a driver that is too old; ValueError for a size that the network does not have.
        """
        if isinstance(model, Student):
            raise LoweringError("a student is one network pass, which is not captured")
        if exit_at is not None:
            raise ValueError(f"exit_at={exit_at}: a teacher has no heads to leave by")
        if batch < 1:
            raise ValueError(f"batch={batch} is below 1")
        model.check_size(*size)
        try:
            return cls(model, size, batch)
        except Exception as error:
            reason = str(error).strip().split("\n")[0] or type(error).__name__
        # Raised out here, so that no traceback holds the memory of the attempt.
        torch.cuda.empty_cache()
        raise LoweringError(f"the network pass could not be captured: {reason}")

    def __init__(self, model: UNet, size: tuple[int, int], batch: int):
        config, weight = model.config, model.conv_in.weight
        self.name = f"cuda graph for batch {batch}"
        self.shape = (config.in_channels, *size)
        self.classes, self.schedule = model.num_classes, model.schedule
        self.batch = batch
        self._turns, self._busy = threading.RLock(), False
        # What the graph reads must stay; the network itself may go, since engines are cached by it.
        self._tensors = [*model.parameters(), *model.buffers()]
        self._config, self._time_embedding = config, model.time_embedding
        with _undisturbed(weight):
            self._buffers = buffers = Buffers.allocate(
                (batch, *self.shape), 4 * config.block_out_channels[0], weight.dtype, weight.device
            )
            self._labels = torch.zeros(batch, dtype=torch.int64, device=weight.device)
            self._graph, self._model_out = captured(
                partial(_network_pass, model, buffers, self._labels), weight.device
            )
            network = self._graph.raw_cuda_graph()
            self._loop = Loop(_extension(), buffers, network, self._model_out)

    def run(
        self, x: Tensor, y: Tensor | None = None, *, t: int | None = None, threads: int = 0
    ) -> Tensor:
        """One captured pass: x (B, C, H, W) float32 -> the same, on the network's device.

        y (B,) int64 are labels for a class-conditional network, t is the time, and `threads` has no
        effect. Raises ValueError for a shape, dtype or label that does not fit.
        """
        if x.shape[1:] != self.shape or x.dtype != torch.float32:
            raise ValueError(f"x {tuple(x.shape)} {x.dtype} is not (B, *{self.shape}) float32")
        if t is None:
            raise ValueError("a teacher needs a time t")
        check_labels(y, len(x), self.classes)
        buffers, device = self._buffers, self._buffers.x_t.device
        out = torch.empty(x.shape, dtype=torch.float32, device=device)
        with self._turn(), _undisturbed(buffers.x_t):
            buffers.time_embedding.copy_(self._time_embeddings([t])[0])
            for part in self._parts(len(x)):
                count = len(x[part])
                buffers.x_in[:count].copy_(x[part])
                if y is not None:
                    self._labels[:count].copy_(y[part])
                self._graph.replay()
                out[part].copy_(self._model_out[:count])
            synchronize(device)
        return out

    def sample(
        self,
        table: StepTable,
        noise: Noise,
        indices: Tensor,
        y: Tensor | None = None,
        *,
        saved: Sequence[int],
        target: str = "denoised",
        out: Tensor | None = None,
        threads: int = 0,
        on_step: OnStep | None = None,
        poll: Callable[[], object] | None = None,
    ) -> Tensor:
        """`Engine.sample`. The callbacks are called for every step, but some steps later; where the
        batch is sampled in parts, `on_step` counts the steps of the last."""
        check_saved(len(table), saved, target)
        check_labels(y, len(indices), self.classes)
        shape = (len(indices), len(saved), *self.shape)
        device = self._buffers.x_t.device
        if out is None:
            out = torch.empty(shape, dtype=torch.float32, device=device)
        if out.shape != shape or out.dtype not in (torch.float32, torch.float16):
            given = f"{tuple(out.shape)} {out.dtype}"
            raise ValueError(f"out {given} is not {shape} of float32 or float16")
        parts = self._parts(len(indices))
        with self._turn():
            with _undisturbed(self._buffers.x_t):
                embeddings = self._time_embeddings(table.timesteps)
            for part in parts:
                step = on_step if part is parts[-1] else None
                padded = self._padded(indices[part], None if y is None else y[part])
                found = self._loop.run(
                    table, embeddings, noise, padded, saved=saved, target=target,
                    half=out.dtype == torch.float16, stream=current_stream(device),
                    on_chunk=_chunk_callback(len(table), step, poll),
                )  # fmt: skip
                with _undisturbed(found):
                    out[part].copy_(found.transpose(0, 1)[: len(indices[part])])
        return out

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """The buffers for this thread alone."""
        with self._turns:
            if self._busy:
                raise RuntimeError("an engine cannot be used by a callback of its own run")
            self._busy = True
            try:
                yield
            finally:
                self._busy = False

    def _parts(self, images: int) -> list[slice]:
        return [slice(at, at + self.batch) for at in range(0, images, self.batch)]

    def _padded(self, indices: Tensor, y: Tensor | None) -> Tensor:
        """A whole batch of image numbers, the last repeated; the labels go where they are read."""
        last = len(indices) - 1
        whole = torch.arange(self.batch, device=indices.device).clamp(max=last)
        if y is not None:
            with _undisturbed(self._labels):
                self._labels.copy_(y[whole.to(y.device)])
        return indices[whole]

    def _time_embeddings(self, timesteps: Any) -> Tensor:
        """(N, R) of the network's dtype, by what the weights are now."""
        config, like = self._config, self._buffers.time_embedding
        sinusoids = layers.timestep_embedding(
            torch.as_tensor(timesteps, dtype=torch.int64, device=like.device),
            config.block_out_channels[0], config.flip_sin_to_cos, config.freq_shift,
        )  # fmt: skip
        embeddings: Tensor = self._time_embedding(sinusoids.to(like.dtype))
        return embeddings


def _network_pass(model: UNet, buffers: Buffers, labels: Tensor) -> Tensor:
    temb = buffers.time_embedding.expand(len(labels), -1)
    if model.class_embedding is not None:
        temb = temb + model.class_embedding(labels)
    out = model.denoise(buffers.x_in, temb)
    return out.contiguous(memory_format=torch.channels_last)


def _chunk_callback(
    steps: int, on_step: OnStep | None, poll: Callable[[], object] | None
) -> Callable[[int], None] | None:
    """What the loop calls with the number of steps done, so that both hear of every step."""
    if on_step is None and poll is None:
        return None
    reported = 0

    def on_chunk(done: int) -> None:
        nonlocal reported
        while reported < done:
            reported += 1
            if poll is not None:
                poll()
            if on_step is not None:
                on_step(reported, steps)

    return on_chunk


def _unsuited(model: UNet) -> str | None:
    """What about a network keeps it from being captured, as a clause; None if nothing does."""
    config, dtype = model.config, model.conv_in.weight.dtype
    if len({tensor.device for tensor in (*model.parameters(), *model.buffers())}) > 1:
        return "the network is on several devices"
    if dtype not in _NAMES:
        return f"the CUDA loop takes float32, float16 and bfloat16, not {dtype}"
    if config.in_channels != config.out_channels:
        return "the network's output has another shape than its input"
    if config.in_channels > _MAX_CHANNELS:
        return f"images have more than {_MAX_CHANNELS} channels"
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout) and module.training and module.p > 0:
            return "the network is in training, with dropout"
        if type(module) not in _BLOCKS:
            return f"{name or 'the network'} is a {type(module).__name__}, unknown to a graph"
        if module._forward_hooks or module._forward_pre_hooks:
            return f"{name or 'the network'} has hooks, which a graph cannot call"
    method = patched(model)
    return None if method is None else f"{method} has been replaced"


@contextmanager
def _undisturbed(tensor: Tensor) -> Iterator[None]:
    """The tensor's device current, without autograd and autocast; the caller's state comes back."""
    with (
        torch.inference_mode(),
        torch.autocast(tensor.device.type, enabled=False),
        torch.cuda.device_of(tensor),
    ):
        yield


def _extension() -> Any:
    assert ops.extension is not None
    return ops.extension
