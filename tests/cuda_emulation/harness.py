"""Memory between guard pages as tensors, and the sampling loop over the toy network."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from advkd import ops
from advkd.diffusion import StepTable
from advkd.engine.cuda import Buffers, Loop

TYPES = (torch.float32, torch.float16, torch.bfloat16)  # as csrc/cuda/elements.h counts them
ORDERS = (0, 1, 2, 3)  # of threads: forward, reverse, two random ones


def guarded(cuda: Any, like: Tensor, align: int | None = None) -> Tensor:
    """A copy of `like`, of its layout, that ends right before a page nobody may touch.

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


def nan_fill(cuda: Any, like: Tensor, align: int | None = None) -> Tensor:
    return guarded(cuda, torch.full_like(like, float("nan")), align)


def toy(x_in: Tensor, told: Tensor) -> Tensor:
    """What toy_network.cu computes, in torch: (B, C, H, W) of x_in's dtype."""
    return (x_in.float() * 0.25 + told[0].float()).to(x_in.dtype)


def told_of(table: StepTable, dtype: torch.dtype) -> Tensor:
    """(N, R): a number that depends on the step, in a row of 16 bytes; the toy reads float32."""
    times = torch.as_tensor(table.timesteps).float() / 1000
    return times[:, None].expand(-1, 4).contiguous()


def expected(
    table: StepTable, seed: int, indices: Tensor, shape: tuple[int, ...], dtype: torch.dtype,
    kept: list[int], target: str, memory_format: torch.memory_format,
) -> list[Tensor]:  # fmt: skip
    """The loop in Python, by the CPU's kernels: the bits that the GPU's must have."""
    told = told_of(table, dtype)
    x_t = ops.philox_normal(seed, indices, ops.X_T_STEP, shape, memory_format=memory_format)
    found = []
    for i in range(len(table)):
        x_t, x0_hat = ops.sampling_step(
            x_t, toy(x_t.to(dtype), told[i]).float(), table.coefficients[i], clip=table.clip,
            seed=seed, image_index=indices, step=i,
        )  # fmt: skip
        if i + 1 in kept:
            found.append(x0_hat if target == "denoised" and i + 1 < len(table) else x_t)
    return found


class ToyLoop:
    """advkd.engine.cuda.Loop over the toy network, all of it in emulation."""

    def __init__(
        self, cuda: Any, batch: int, shape: tuple[int, int, int], dtype: torch.dtype,
        memory_format: torch.memory_format, on_device: bool = False, align: int | None = None,
    ):  # fmt: skip
        like = torch.empty(batch, *shape).contiguous(memory_format=memory_format)
        x_t = nan_fill(cuda, like, align)
        narrow = like.to(dtype)
        x_in = x_t if dtype == torch.float32 else nan_fill(cuda, narrow, align)
        told = nan_fill(cuda, torch.empty(4))
        self.cuda = cuda
        self.buffers = Buffers(x_t, x_in, told, nan_fill(cuda, narrow, align))
        assert self.buffers.model_out is not None
        self.graph = cuda.toy_network(
            x_in.data_ptr(), self.buffers.model_out.data_ptr(), TYPES.index(dtype),
            told.data_ptr(), like.numel(),
        )  # fmt: skip
        try:
            self.loop = Loop(cuda, self.buffers, self.graph, on_device)
        finally:
            cuda.destroy_graph(self.graph)  # the loop has a copy

    def run(self, table: StepTable, seed: int, indices: Tensor, **how: Any) -> list[Tensor]:
        dtype = self.buffers.x_in.dtype
        told = guarded(self.cuda, told_of(table, dtype))
        return list(self.loop.run(table, told, seed, indices, **how))
