"""Memory between guard pages as tensors, the sampling loop over the toy network, and in Python."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from advkd import ops
from advkd.diffusion import StepTable
from advkd.engine.cuda import Buffers, Loop
from advkd.engine.noise import Noise
from advkd.models.unet import UNet

TYPES = (torch.float32, torch.float16, torch.bfloat16)  # as csrc/cuda/elements.h counts them
ORDERS = (0, 1, 2, 3)  # of threads: forward, reverse, two random ones


def guarded(cuda: Any, like: Tensor, align: int | None = None) -> Tensor:
    """A copy of `like`, with its strides, that ends right before a page nobody may touch.

    With `align` None it begins at 16 bytes where its size is a multiple of that.
    """
    count = like.numel() * like.element_size()
    if align is None:
        align = 16 if count % 16 == 0 else like.element_size()
    address = cuda.allocate(max(count, 1), align)
    dense = torch.frombuffer(cuda.view(address, max(count, 1)), dtype=torch.uint8)[:count]
    out = dense.view(like.dtype).as_strided(like.shape, like.stride())
    out.copy_(like)
    weakref.finalize(out.untyped_storage(), cuda.free, address)
    return out


def nan_filled(cuda: Any, like: Tensor, align: int | None = None) -> Tensor:
    return guarded(cuda, torch.full_like(like, float("nan")), align)


def toy(x_in: Tensor, time_embedding: Tensor) -> Tensor:
    """What toy_network.cu computes, in torch: (B, C, H, W) of x_in's dtype."""
    return (x_in.float() * 0.25 + time_embedding[0].float()).to(x_in.dtype)


def time_embeddings(table: StepTable) -> Tensor:
    """(N, 4) float32, as the toy network reads it: a number that depends on the step."""
    times = torch.as_tensor(table.timesteps).float() / 1000
    return times[:, None].expand(-1, 4).contiguous()


def expected(
    table: StepTable, noise: Noise, indices: Tensor, shape: tuple[int, int, int],
    dtype: torch.dtype, saved: Sequence[int], target: str,
) -> list[Tensor]:  # fmt: skip
    """The loop in Python, by the CPU's kernels: the bits that the GPU's must have."""
    embeddings = time_embeddings(table)
    x_t = noise.x_T(indices, shape)
    found = []
    for i in range(len(table)):
        model_out = toy(x_t.to(dtype), embeddings[i]).float()
        x_t, x0_hat = ops.sampling_step(
            x_t, model_out, table.coefficients[i], clip=table.clip, seed=noise.seed,
            image_index=indices, step=noise.step_word(i),
        )  # fmt: skip
        if i + 1 in saved:
            found.append(x0_hat if target == "denoised" and i + 1 < len(table) else x_t)
    return found


@torch.inference_mode()
def eager(
    unet: UNet, table: StepTable, noise: Noise, indices: Tensor, y: Tensor | None = None
) -> Tensor:
    """The final samples of a loop in Python over the network's modules, (B, C, H, W) float32."""
    weight, size = unet.conv_in.weight, unet.config.sample_size
    assert size is not None
    indices = indices.to(weight.device)
    x_t = noise.x_T(indices, (unet.config.in_channels, size, size))
    for i, t in enumerate(table.timesteps.tolist()):
        x_t, _ = ops.sampling_step(
            x_t, unet(x_t.to(weight.dtype), t, y).float(), table.coefficients[i], clip=table.clip,
            seed=noise.seed, image_index=indices, step=noise.step_word(i),
        )  # fmt: skip
    return x_t


def _on_device(cuda: Any, device: int) -> Any:
    """The emulation, whose memory is the CPU's, making loops for one of its devices."""
    return SimpleNamespace(
        CudaSamplingLoop=lambda **how: cuda.CudaSamplingLoop(**how | {"device": device})
    )


class ToyLoop:
    """advkd.engine.cuda.Loop over the toy network, all of it in emulation."""

    def __init__(
        self, cuda: Any, batch: int, shape: tuple[int, int, int], dtype: torch.dtype,
        align: int | None = None, device: int = 0,
    ):  # fmt: skip
        like = torch.empty(batch, *shape, memory_format=torch.channels_last)
        x_t = nan_filled(cuda, like, align)
        x_in = x_t if dtype == torch.float32 else nan_filled(cuda, like.to(dtype), align)
        state = guarded(cuda, torch.full((cuda.cuda_loop_bytes,), 0xFF, dtype=torch.uint8), 8)
        model_out = nan_filled(cuda, like.to(dtype), align)
        self.cuda = cuda
        self.buffers = Buffers(state, x_t, x_in, nan_filled(cuda, torch.empty(4)))
        graph = cuda.toy_network(
            x_in.data_ptr(), model_out.data_ptr(), TYPES.index(dtype),
            self.buffers.time_embedding.data_ptr(), like.numel(),
        )  # fmt: skip
        try:
            self.loop = Loop(_on_device(cuda, device), self.buffers, graph, model_out)
        finally:
            cuda.destroy_graph(graph)  # the loop has a copy
        self._model_out = model_out

    def run(self, table: StepTable, noise: Noise, indices: Tensor, **how: Any) -> list[Tensor]:
        """The saved targets, each (B, C, H, W)."""
        embeddings = guarded(self.cuda, time_embeddings(table))
        return list(self.loop.run(table, embeddings, noise, indices, **how))
