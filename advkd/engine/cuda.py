"""The engine of a network on a CUDA device: its plan as `device_pass` carries it out, captured in a
CUDA graph; for a teacher also the C++ loop that launches the graph once a step
(csrc/cuda/sampling_loop.cu). Python takes no part in a step.

The state is float32. The network may be of float32, float16 or bfloat16; the kernel of the step
then writes the state in that type too. What depends on the time is computed for all steps before
the first, and the kernel copies the next step's to where the graph reads it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from advkd import ops
from advkd.device import products_as_convolutions
from advkd.diffusion import StepTable
from advkd.engine.device_pass import DevicePass
from advkd.engine.interface import (
    Engine,
    OnStep,
    check_labels,
    check_plain,
    check_saved,
    input_shape,
    patched,
)
from advkd.engine.lowering import Lowering, LoweringError
from advkd.engine.networks import lower_student, lower_time, lower_unet
from advkd.engine.noise import Noise
from advkd.engine.plan import INPUT, Builder, lay_out
from advkd.models import layers
from advkd.models.student import Student
from advkd.models.unet import UNet

CHUNK = 10  # steps between two looks at Ctrl-C and at callbacks
MAX_PIXELS = 1 << 20  # of a captured pass, unless it is of one image: 1024 images of 32x32
_MEMORY_SHARE = 4  # a captured pass takes at most one part in so many of the memory that is free
_MAX_CHANNELS = 128  # of an image, in csrc/cuda/sampling_step.h
_WARM_UP = 3  # passes before the capture, in which libraries choose their algorithms
_NAMES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}

_capturing = threading.Lock()  # one capture at a time, for they share a stream


@dataclass(frozen=True)
class Buffers:
    """Tensors whose addresses the graph holds, images channels_last. The network reads `x_in` and
    `time_embedding` and writes `model_out`."""

    loop_state: Tensor  # of the C++ loop
    x_t: Tensor  # (B, C, H, W) float32
    x_in: Tensor  # the same in the network's dtype; x_t itself where that is float32
    time_embedding: Tensor  # (R,) float32, what the plan makes of the time; R is a multiple of 4

    @classmethod
    def allocate(
        cls, shape: tuple[int, int, int, int], width: int, dtype: torch.dtype, device: torch.device
    ) -> Buffers:
        """Zeros for images of `shape` (B, C, H, W) and at least `width` numbers of the time."""
        state = torch.zeros(_extension().cuda_loop_bytes, dtype=torch.uint8, device=device)
        last = torch.channels_last
        x_t = torch.empty(shape, dtype=torch.float32, device=device, memory_format=last).zero_()
        x_in = x_t if dtype == torch.float32 else x_t.to(dtype)
        width = max(4, -(-width // 4) * 4)
        return cls(state, x_t, x_in, torch.zeros(width, dtype=torch.float32, device=device))


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


def recorded(device: torch.device) -> torch.cuda.Event:
    """An event at which all that torch's current stream has to do is done."""
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event


def after(event: torch.cuda.Event | None, device: torch.device) -> None:
    """Let torch's current stream wait for an event, if there is one; the host goes on."""
    if event is not None:
        torch.cuda.current_stream(device).wait_event(event)


def free_memory(device: torch.device) -> int:
    """Bytes of the device that nothing has taken."""
    return torch.cuda.mem_get_info(device)[0]


def _most_images(plan: Builder, like: Tensor) -> int:
    """The images of a captured pass at most: a power of two that fills a GPU and fits memory."""
    source = plan.buffers[INPUT]
    bytes_of_image = lay_out(plan.buffers, plan.ops) * like.element_size()
    by_memory = free_memory(like.device) // _MEMORY_SHARE // max(1, bytes_of_image)
    return min(_power_of_two(by_memory), images_that_fill(source.height * source.width))


def images_that_fill(pixels: int) -> int:
    """The images of so many pixels that fill a GPU at once: a power of two."""
    return _power_of_two(MAX_PIXELS // pixels)


def _power_of_two(most: int) -> int:
    """The largest that is not above `most`, or 1."""
    return 1 << max(0, most.bit_length() - 1)


class CudaEngine(Engine):
    """A network captured for batches of one size.

    A smaller batch is padded and a larger one sampled in parts; an image has the same bits in any
    of them. Weights are read in their places, so new values need no new engine. Threads take turns.
    A callback cannot use the engine that calls it, which is a RuntimeError. So is what CUDA refuses
    while it runs.
    """

    reads_in_place = True

    @classmethod
    def unavailable(cls, model: UNet | Student) -> str | None:
        """Why no CUDA graph serves this network, as a clause; None where one does."""
        unsuited, device = _unsuited(model), next(model.parameters()).device
        if device.type != "cuda":
            return unsuited or f"the network is on {device.type}"
        return (
            unsuited
            or ops.cuda_missing()
            or ops.cuda_code_missing(torch.cuda.get_device_capability(device))
        )

    @classmethod
    def batch_for(cls, images: int) -> int:
        """The next power of two, so that few sizes are ever captured."""
        return 1 << max(images - 1, 0).bit_length()

    @classmethod
    def make(
        cls, model: UNet | Student, size: tuple[int, int], batch: int, exit_at: int | None = None
    ) -> CudaEngine:
        """Capture a network for inputs of `size` (H, W) and `batch` images at a time, or as many as
        fill a GPU and fit its memory.

        Raises LoweringError for whatever fails on the way, such as memory that does not suffice or
        a driver that is too old; ValueError for a size or a head that the network does not have.
        """
        if exit_at is not None and not isinstance(model, Student):
            raise ValueError(f"exit_at={exit_at}: a teacher has no heads to leave by")
        if batch < 1:
            raise ValueError(f"batch={batch} is below 1")
        input_shape(model, size)
        try:
            return cls(model, size, batch, exit_at)
        except Exception as error:
            reason = str(error).strip().split("\n")[0] or type(error).__name__
        # Raised out here, so that no traceback holds the memory of the attempt.
        torch.cuda.empty_cache()
        raise LoweringError(f"the network pass could not be captured: {reason}")

    def __init__(
        self, model: UNet | Student, size: tuple[int, int], batch: int, exit_at: int | None
    ):
        weight = next(model.parameters())
        self.shape = input_shape(model, size)
        self.classes = model.num_classes
        self._last: torch.cuda.Event | None = None  # after which the buffers are free again
        self._turns, self._busy = threading.RLock(), False
        # What the graph reads must stay; the network itself may go, since engines are cached by it.
        self._tensors = [*model.parameters(), *model.buffers()]
        with _undisturbed(weight):
            low = self._lowered(model, size, exit_at, weight)
            self.batch = batch = min(batch, _most_images(low.plan, weight))
            self.name = f"cuda graph for batch {batch}"
            self._network = DevicePass(low.plan)
            self._buffers = buffers = Buffers.allocate(
                (batch, *self.shape), low.plan.conditioning, weight.dtype, weight.device
            )
            self._labels = torch.zeros(batch, dtype=torch.int64, device=weight.device)
            labels = None if self.classes is None else self._labels
            x, times = buffers.x_in.permute(0, 2, 3, 1), buffers.time_embedding
            network, is_student = self._network, self.schedule is None

            def network_pass() -> Tensor:
                if is_student:  # has no other pass that could wait for it
                    network.refresh()
                return network(x, times, labels).permute(0, 3, 1, 2)

            with products_as_convolutions():
                self._graph, self._model_out = captured(network_pass, weight.device)
            if self.schedule is not None:
                graph = self._graph.raw_cuda_graph()
                self._loop = Loop(_extension(), buffers, graph, self._model_out)

    @property
    def device(self) -> torch.device:
        """The network's."""
        return self._buffers.x_t.device

    def _lowered(
        self, model: UNet | Student, size: tuple[int, int], exit_at: int | None, like: Tensor
    ) -> Lowering:
        """The network's plan, and for a teacher that of what it makes of the time."""
        if isinstance(model, Student):
            return lower_student(model, size, 1, 1, exit_at, like)
        low = lower_unet(model, size, 1, 1, like)
        self.schedule, self._config = model.schedule, model.config
        self._time = DevicePass(lower_time(low, model))
        return low

    def run(
        self, x: Tensor, y: Tensor | None = None, *, t: int | None = None, threads: int = 0
    ) -> Tensor:
        """One captured pass: x (B, C, H, W) float32 -> (B, C', H', W') float32 on the network's
        device.

        y (B,) int64 are labels for a class-conditional network, t is a teacher's time, and
        `threads` has no effect. Raises ValueError for a shape, dtype or label that does not fit.
        """
        if x.shape[1:] != self.shape or x.dtype != torch.float32:
            raise ValueError(f"x {tuple(x.shape)} {x.dtype} is not (B, *{self.shape}) float32")
        if (t is None) != (self.schedule is None):
            raise ValueError("a teacher needs a time t, and a student takes none")
        check_labels(y, len(x), self.classes)
        buffers, device = self._buffers, self._buffers.x_t.device
        shape = (len(x), *self._model_out.shape[1:])
        out = torch.empty(shape, dtype=torch.float32, device=device)
        with self._turn(), _undisturbed(buffers.x_t):
            after(self._last, device)
            if t is not None:
                self._network.refresh()
                buffers.time_embedding.copy_(self._time_embeddings([t])[0])
            for part in self._parts(len(x)):
                count = len(x[part])
                buffers.x_in[:count].copy_(x[part])
                if y is not None:
                    self._labels[:count].copy_(y[part])
                self._graph.replay()
                out[part].copy_(self._model_out[:count])
            self._last = recorded(device)
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
        check_plain(table)
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
                after(self._last, device)
                self._network.refresh()
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
        """(N, R) float32, by what the weights are now."""
        config, x_in = self._config, self._buffers.x_in
        sinusoids = layers.timestep_embedding(
            torch.as_tensor(timesteps, dtype=torch.int64, device=x_in.device),
            config.block_out_channels[0], config.flip_sin_to_cos, config.freq_shift,
        )  # fmt: skip
        self._time.refresh()
        with products_as_convolutions():
            found = self._time(sinusoids[:, None, None, :].to(x_in.dtype))[:, 0, 0, :].float()
        return nn.functional.pad(found, (0, len(self._buffers.time_embedding) - found.shape[1]))


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


def _unsuited(model: UNet | Student) -> str | None:
    """What about a network keeps it from being captured, as a clause; None if nothing does."""
    dtype = next(model.parameters()).dtype
    if len({tensor.device for tensor in (*model.parameters(), *model.buffers())}) > 1:
        return "the network is on several devices"
    if dtype not in _NAMES:
        return f"the CUDA loop takes float32, float16 and bfloat16, not {dtype}"
    if (
        isinstance(model, UNet)
        and not model.learns_variance
        and model.config.in_channels != model.config.out_channels
    ):
        return "the network's output has another shape than its input"
    if isinstance(model, UNet) and model.config.in_channels > _MAX_CHANNELS:
        return f"images have more than {_MAX_CHANNELS} channels"
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout) and module.training and module.p > 0:
            return "the network is in training, with dropout"
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
