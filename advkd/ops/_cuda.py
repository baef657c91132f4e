"""The C++ CUDA kernels: whether they are there, and GroupNorm-SiLU by them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from advkd.ops import _backend
from advkd.ops.reference import memory_format_of

_NAMES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
_MOST_COLUMNS = 512  # of threads in a block, in csrc/cuda/group_norm_silu.cu


def cuda_missing() -> str | None:
    """Why no C++ CUDA kernel can run here, as one sentence; None where they can."""
    extension = _backend.extension
    if extension is None:
        return _backend.extension_missing
    if not hasattr(extension, "cuda_unavailable"):
        return f"the extension was built without CUDA: {extension.cuda_left_out}"
    return extension.cuda_unavailable() or None


def cuda_code_missing(capability: tuple[int, int]) -> str | None:
    """Why a device of this capability cannot run what was compiled; None where it can.

    Machine code runs on later devices of the same major number, PTX, which there is of the newest
    architecture, on all later ones.
    """
    archs = [divmod(int(arch), 10) for arch in _backend.fused_extension().cuda_archs.split()]
    same = any(arch[0] == capability[0] and arch[1] <= capability[1] for arch in archs)
    if same or capability >= max(archs):
        return None
    built = ", ".join(f"{major}.{minor}" for major, minor in archs)
    return f"the CUDA part was built for {built}, not for {capability[0]}.{capability[1]}"


class CudaGroupNorm(TorchDispatchMode):
    """Within the block, GroupNorm-SiLU of CUDA tensors runs by the C++ kernel where that serves.

    For code that is captured in a CUDA graph: parameters of half types are widened once, into
    tensors that are kept, and `refresh` does so again before the graph is replayed.
    """

    def __init__(self, extension: Any = None, device_type: str = "cuda"):
        super().__init__()
        self.extension = _backend.fused_extension() if extension is None else extension
        self.device_type = device_type
        self.widened: dict[int, tuple[Tensor, Tensor]] = {}  # by id of the narrow tensor

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.advkd.group_norm_silu.default and self._serves(*args):
            return self._group_norm_silu(*args)
        return func(*args, **(kwargs or {}))

    @torch.inference_mode()
    def refresh(self) -> None:
        """Takes over what the parameters' values are now."""
        for narrow, wide in self.widened.values():
            wide.copy_(narrow)

    def _serves(self, x: Tensor, *rest: Any) -> bool:
        groups = rest[4]
        return (
            x.device.type == self.device_type
            and x.dtype in _NAMES
            and x.shape[1] // groups <= _MOST_COLUMNS
            and x[:1].numel() < 1 << 31
            and 0 < x.shape[0] * groups < 1 << 21
            and x.numel() > 0
        )

    def _wide(self, parameter: Tensor | None) -> Tensor | None:
        if parameter is None or parameter.dtype == torch.float32:
            return None if parameter is None else parameter.contiguous()
        if not isinstance(parameter, torch.nn.Parameter):
            return parameter.float().contiguous()
        if id(parameter) not in self.widened:
            self.widened[id(parameter)] = parameter, parameter.detach().float().contiguous()
        return self.widened[id(parameter)][1]

    def _group_norm_silu(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, scale: Tensor | None,
        shift: Tensor | None, groups: int, eps: float, silu: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        x = x.contiguous(memory_format=memory_format_of(x))
        y = torch.empty_like(x)
        wide = [self._wide(p) for p in (weight, bias, scale, shift)]
        sizes = (x.shape[0], x.shape[1], math.prod(x.shape[2:]), groups)
        how = (x.data_ptr(), y.data_ptr(), _NAMES[x.dtype])
        last = not x.is_contiguous()
        floats = self.extension.cuda_group_norm_silu_workspace(*how, sizes, last)
        workspace = torch.empty(floats, dtype=torch.float32, device=x.device)
        stream = torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0
        self.extension.cuda_group_norm_silu(
            *how, tuple(0 if p is None else p.data_ptr() for p in wide), sizes, last, eps, silu,
            workspace.data_ptr(), stream,
        )  # fmt: skip
        # The statistics are for the backward pass, which a captured graph has none of.
        return y, x.new_empty(0), x.new_empty(0)
