"""The addresses that C++ gets: the one place where a tensor becomes a number."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor


def address(
    tensor: Tensor,
    dtype: torch.dtype,
    *,
    device: torch.device | None = None,
    layout: torch.memory_format | None = None,
) -> int:
    """The address of a tensor's first element, once the tensor is what C++ takes it for.

    A program's default device or dtype (`torch.set_default_device`, `torch.set_default_dtype`)
    reaches every tensor that was made without its own, and C++ sees an address alone.

    Args:
        tensor: what C++ reads or writes; the caller keeps it alive meanwhile.
        dtype: of the elements.
        device: where C++ takes them to lie; None is the CPU.
        layout: torch.contiguous_format or torch.channels_last where C++ takes it to be dense; None
            where C++ gets the strides too, or the caller has made the tensor dense.

    Raises:
        TypeError, ValueError: a tensor of another dtype, on another device, or laid out otherwise.
    """
    if (
        tensor.dtype is dtype
        and (tensor.is_cpu if device is None else tensor.device == device)
        and (layout is None or tensor.is_contiguous(memory_format=layout))
    ):
        return tensor.data_ptr()
    _refuse(tensor, dtype, device, layout)


def addresses(dtype: torch.dtype, *tensors: Tensor | None) -> list[int]:
    """`address` of several tensors on the CPU at once; 0, C++'s null, for None."""
    return [
        0
        if t is None
        else t.data_ptr()
        if t.dtype is dtype and t.is_cpu
        else _refuse(t, dtype, None, None)
        for t in tensors
    ]


def address_and_strides(tensor: Tensor, dtype: torch.dtype) -> tuple[int, int, int, int]:
    """`address` of a tensor (B, H, N, D) on the CPU, and the strides of B, H and N."""
    if tensor.dtype is dtype and tensor.is_cpu:
        batch, head, row, _ = tensor.stride()
        return tensor.data_ptr(), batch, head, row
    _refuse(tensor, dtype, None, None)


def _refuse(
    tensor: Tensor,
    dtype: torch.dtype,
    device: torch.device | None,
    layout: torch.memory_format | None,
) -> NoReturn:
    if tensor.dtype is not dtype:
        raise TypeError(f"C++ takes a tensor of {dtype} here, not of {tensor.dtype}.")
    where = torch.device("cpu") if device is None else device
    if tensor.device != where:
        raise ValueError(f"C++ takes a tensor on {where} here, not on {tensor.device}.")
    raise ValueError(
        f"C++ takes a {str(layout).removeprefix('torch.')} tensor here, but the strides of one of "
        f"shape {tuple(tensor.shape)} are {tensor.stride()}."
    )
