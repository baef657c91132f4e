"""The teacher's sampling loop on a CUDA device: a pass of the network, captured in a graph, and
the C++ loop over it (csrc/cuda/sampling_loop.cu), in which Python takes no part in a step.

The state is float32. The network may be of float32, float16 or bfloat16; the step's kernel then
writes the state in that type too. What the network is told of the time is computed for all steps
before the first, and the kernel puts the next step's row where the graph reads it.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from advkd import ops
from advkd.diffusion import StepTable
from advkd.models.student import Student
from advkd.models.unet import UNet
from advkd.ops._backend import use_fused
from advkd.ops.reference import memory_format_of

# Steps between two looks at Ctrl-C and two calls of a callback.
CHUNK = 10
_WARM_UP = 3  # passes before the capture, in which libraries choose their algorithms
_MOST_CHANNELS = 128  # of a channels_last image in csrc/cuda/sampling_step.h
_NAMES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


def unavailable(unet: UNet) -> str | None:
    """Why no CUDA graph serves this network, as one sentence; None where one does."""
    weight = unet.conv_in.weight
    if not weight.is_cuda:
        return f"the network is on {weight.device.type}"
    if weight.dtype not in _NAMES:
        return f"the CUDA loop takes float32, float16 and bfloat16, not {weight.dtype}"
    if unet.training and unet.config.dropout > 0:
        return "the network is in training, with dropout"
    if unet.config.in_channels != unet.config.out_channels:
        return "the network's output has another shape than its input"
    if unet.config.in_channels > _MOST_CHANNELS:
        return f"images have more than {_MOST_CHANNELS} channels"
    return ops.cuda_missing() or ops.cuda_code_missing(
        torch.cuda.get_device_capability(weight.device)
    )


@dataclass
class Buffers:
    """Tensors that stay in their place. The network reads x_in and told and writes model_out."""

    x_t: Tensor  # (B, C, H, W) float32
    x_in: Tensor  # the same in the network's dtype; x_t itself where that is float32
    told: Tensor  # (R,) of that dtype, R * itemsize a multiple of 16
    model_out: Tensor | None = None  # (B, C, H, W), laid out as x_t


def new_buffers(
    shape: tuple[int, int, int, int], told: int, dtype: torch.dtype, device: torch.device,
    memory_format: torch.memory_format,
) -> Buffers:  # fmt: skip
    """Unwritten buffers for images of `shape` and rows of `told` numbers."""
    x_t = torch.empty(shape, device=device, memory_format=memory_format)
    x_in = x_t if dtype == torch.float32 else torch.empty_like(x_t, dtype=dtype)
    return Buffers(x_t, x_in, torch.empty(told, dtype=dtype, device=device))


class Loop:
    """The C++ loop over a captured pass. `network` is the address of a cudaGraph_t.

    Raises RuntimeError where CUDA refuses, which names the call and the error.
    """

    def __init__(self, extension: Any, buffers: Buffers, network: int, on_device: bool):
        x_t, model_out = buffers.x_t, buffers.model_out
        # With one channel both formats are the same, whatever the strides say.
        assert model_out is not None and model_out.shape == x_t.shape
        assert model_out.is_contiguous(memory_format=memory_format_of(x_t))
        B, C, H, W = x_t.shape
        self.buffers = buffers
        self.loop = extension.CudaSamplingLoop(
            device=x_t.device.index or 0, network=network, x_t=x_t.data_ptr(),
            x_in=0 if buffers.x_in is x_t else buffers.x_in.data_ptr(),
            model_out=model_out.data_ptr(), type=_NAMES[model_out.dtype],
            told=buffers.told.data_ptr(),
            told_bytes=buffers.told.numel() * buffers.told.element_size(), sizes=(B, C, H * W),
            channels_last=memory_format_of(x_t) == torch.channels_last, on_device=on_device,
        )  # fmt: skip

    def run(
        self, table: StepTable, told: Tensor, seed: int, indices: Tensor, *, kept: Sequence[int],
        target: str, half: bool = False, chunk: int = CHUNK, stream: int = 0,
        on_chunk: Callable[[int], object] | None = None,
    ) -> Tensor:  # fmt: skip
        """All steps; what is kept after the steps `kept`, (K, B, C, H, W) on the device.

        told: (N, R). `on_chunk` is told how many steps are done, every `chunk` steps.
        """
        x_t = self.buffers.x_t
        out = torch.empty(
            (len(kept) * len(x_t), *x_t.shape[1:]), device=x_t.device,
            dtype=torch.float16 if half else torch.float32, memory_format=memory_format_of(x_t),
        )  # fmt: skip
        rows = step_rows(table, kept, target).to(x_t.device)
        indices = indices.to(x_t.device, torch.int64).contiguous()
        told = told.to(x_t.device, self.buffers.told.dtype).contiguous()
        self.loop.run(
            steps=len(table), seed=seed, clip=table.clip, image_index=indices.data_ptr(),
            rows=rows.data_ptr(), told=told.data_ptr(), kept=out.data_ptr(), kept_half=half,
            chunk=chunk, stream=stream, on_chunk=on_chunk,
        )  # fmt: skip
        return out.unflatten(0, (len(kept), len(x_t)))


def _new_loop(extension: Any, buffers: Buffers, network: int, on_device: bool | None) -> Loop:
    """The loop on the device, on the host, or (None) the former where driver and graph allow it."""
    if on_device is not None:
        return Loop(extension, buffers, network, on_device)
    if not extension.cuda_device_loop_unavailable():
        try:
            return Loop(extension, buffers, network, True)
        except RuntimeError:
            pass  # some nodes cannot be in a loop; what else is wrong, the host's loop meets too
    return Loop(extension, buffers, network, False)


def step_rows(table: StepTable, kept: Sequence[int], target: str) -> Tensor:
    """(N, 8) float32: a step's six coefficients and, as integers, its kept target and whether that
    is x0_hat (csrc/cuda/sampling_step.h)."""
    rows = torch.zeros(len(table), 8)
    rows[:, :6] = torch.as_tensor(table.coefficients)
    integers = rows.view(torch.int32)
    integers[:, 6] = -1
    for place, step in enumerate(kept):
        integers[step - 1, 6] = place
        integers[step - 1, 7] = target == "denoised" and step < len(table)
    return rows


def captured(
    function: Callable[[], Tensor], device: torch.device
) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """What a function launches, as a CUDA graph, and the tensor that it then writes."""
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    with torch.cuda.device(device):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM_UP):
                function()
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(graph):
            out = function()
    return graph, out


def current_stream(device: torch.device) -> int:
    """torch's current stream there, as CUDA's handle."""
    return torch.cuda.current_stream(device).cuda_stream


class CudaEngine:
    """A teacher captured for batches of one size: `sample` is its whole loop.

    Weights are read where they lie, so they may change in their place between runs. `on_device`:
    the device repeats the steps of a chunk itself; None: where the driver can.
    """

    name = "cuda"

    def __init__(self, unet: UNet, batch: int, side: int, *, on_device: bool | None = None):
        weight = unet.conv_in.weight
        unet.check_size(side, side)
        # Engines are kept by their network's side, which they must not keep alive.
        self.unet = cast(UNet, weakref.proxy(unet))
        self.batch = batch
        channels_last = weight.shape[1] > 1 and memory_format_of(weight) == torch.channels_last
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        shape = (batch, unet.config.in_channels, side, side)
        hidden = 4 * unet.config.block_out_channels[0]
        buffers = new_buffers(shape, hidden, weight.dtype, weight.device, memory_format)
        conditional = unet.class_embedding is not None
        self.labels = weight.new_zeros(batch, dtype=torch.int64) if conditional else None
        self.norms = ops.CudaGroupNorm()
        extension = ops.extension
        assert extension is not None
        with torch.inference_mode():
            buffers.x_in.zero_()
            buffers.told.zero_()
            # The graph goes with the engine, since the network works in its memory.
            self.graph, buffers.model_out = captured(lambda: self._pass(buffers), weight.device)
            self.loop = _new_loop(extension, buffers, self.graph.raw_cuda_graph(), on_device)

    def _pass(self, buffers: Buffers) -> Tensor:
        temb = buffers.told.expand(self.batch, -1)
        if self.labels is not None and self.unet.class_embedding is not None:
            temb = temb + self.unet.class_embedding(self.labels)
        with self.norms:
            out = self.unet.denoise(buffers.x_in, temb)
        return out.contiguous(memory_format=memory_format_of(buffers.x_t))

    @torch.inference_mode()
    def sample(
        self, table: StepTable, seed: int, indices: Tensor, y: Tensor | None, *,
        kept: Sequence[int], target: str, half: bool = False,
        callback: Callable[[int, int], None] | None = None,
    ) -> Tensor:  # fmt: skip
        """What a sampler keeps after the steps `kept`: (K, B, C, H, W) float32, or float16 if half,
        on the device. `callback` is called for every step, some steps later.

        A batch that is not whole is filled up, and a larger one drawn in parts; an image has the
        same bits in any of them. Raises ValueError for labels that do not fit, RuntimeError for
        what CUDA refuses.
        """
        if (y is None) != (self.labels is None):
            raise ValueError("labels are given to an unconditional teacher, or missing")
        if y is not None and y.shape != indices.shape:
            raise ValueError(f"y holds {y.numel()} labels for {len(indices)} images")
        if len(indices) == 0:
            raise ValueError("a batch on a CUDA device has at least one image")
        parts = range(0, len(indices), self.batch)
        found = [
            self._sample_part(
                table, seed, indices[at : at + self.batch],
                None if y is None else y[at : at + self.batch], kept, target, half,
                callback if at == parts[-1] else None,
            )
            for at in parts
        ]  # fmt: skip
        return found[0] if len(found) == 1 else torch.cat(found, dim=1)

    def _sample_part(
        self, table: StepTable, seed: int, indices: Tensor, y: Tensor | None, kept: Sequence[int],
        target: str, half: bool, callback: Callable[[int, int], None] | None,
    ) -> Tensor:  # fmt: skip
        count = len(indices)
        whole = torch.arange(self.batch).clamp(max=count - 1)
        indices = indices.cpu()[whole]
        device = self.loop.buffers.x_t.device
        if self.labels is not None and y is not None:
            self.labels.copy_(y.cpu()[whole])
        self.norms.refresh()
        timesteps = torch.as_tensor(table.timesteps, device=device)
        told = self.unet.embed_time(timesteps, len(table))
        told_of = 0

        def on_chunk(done: int) -> None:
            nonlocal told_of
            assert callback is not None
            while told_of < done:
                told_of += 1
                callback(told_of, len(table))

        out = self.loop.run(
            table, told, seed, indices, kept=kept, target=target, half=half,
            stream=current_stream(device), on_chunk=None if callback is None else on_chunk,
        )  # fmt: skip
        return out[:, :count]


_KEPT = 2  # engines of one network, the newest
_Engines = dict[tuple[int, int], tuple[list[object], CudaEngine]]  # by side and batch
_kept: weakref.WeakKeyDictionary[UNet, _Engines] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def engine_for(model: UNet | Student, side: int, images: int) -> CudaEngine | None:
    """The engine that draws so many images of side x side pixels; None where torch draws them.

    Engines are kept with their network as long as its settings are the same and its tensors in
    their places: what these hold is read anew in each pass.
    """
    if isinstance(model, Student):
        reason: str | None = "a student is one pass"
    else:
        reason = unavailable(model) if images else "there are no images"
    if not use_fused("the sampling loop", None, reason) or isinstance(model, Student):
        return None
    with _lock:
        kept = _kept.setdefault(model, {})
        state = _state_of(model)
        found = kept.pop((side, images), None)
        if found is None or found[0] != state:
            found = state, CudaEngine(model, images, side)
        kept[side, images] = found
        while len(kept) > _KEPT:
            kept.pop(next(iter(kept)))
        return found[1]


def _state_of(unet: UNet) -> list[object]:
    """What a captured pass depends on: every module's settings, and its tensors' places."""
    state: list[object] = []
    for module in unet.modules():
        plain = (v for v in vars(module).values() if isinstance(v, int | float | str | tuple))
        hooks = len(module._forward_hooks) + len(module._forward_pre_hooks)
        state.append((type(module), hooks, *plain))
    for t in (*unet.parameters(), *unet.buffers()):
        state.append((t.data_ptr(), t.dtype, t.shape, t.stride()))
    return state
