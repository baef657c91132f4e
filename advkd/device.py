"""Where networks run, decided in one place, and how: precision and repeatability."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from advkd import processes

Network = TypeVar("Network", bound=nn.Module)

CUBLAS_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


def resolve(name: str) -> torch.device:
    """The device that a setting names: "cpu", "cuda", "cuda:N", or "auto" (a GPU if there is one).

    A CUDA device comes with its number: of several processes on a machine each has its own.
    Raises ValueError for one that does not exist here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    kind, colon, number = name.partition(":")
    if kind != "cuda" or (colon and not (number.isascii() and number.isdigit())):
        raise ValueError(f"device={name!r} is not one of auto, cpu, cuda, cuda:N")
    if not torch.cuda.is_available():
        raise ValueError(f"device={name!r} does not exist: torch {_why_no_cuda()}")
    count = torch.cuda.device_count()
    several = processes.local_count() > 1
    if several and colon:
        raise ValueError(
            f"device={name!r} is one GPU for {processes.local_count()} processes: give cuda, and "
            "each takes its own"
        )
    own = processes.local_rank() if several else torch.cuda.current_device()
    index = int(number) if colon else own
    if index >= count:
        last = "cuda:0" if count == 1 else f"cuda:0 to cuda:{count - 1}"
        asked = f"cuda:{index}" if several else name
        raise ValueError(f"device={asked!r} does not exist: torch sees {last}")
    return torch.device("cuda", index)


def _why_no_cuda() -> str:
    return "sees no CUDA device" if torch.version.cuda else "was built without CUDA"


@contextlib.contextmanager
def without_memory() -> Iterator[None]:
    """Within `with`, networks are made on device meta: shapes and dtypes without numbers."""
    with torch.device("meta"), _Unfilled():
        yield


class _Unfilled(TorchFunctionMode):
    """Passes over torch.nn.init: on meta, some of it imports torch's compiler, for seconds."""

    def __torch_function__(
        self, func: Any, kinds: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__module__", None) == nn.init.__name__:
            return (kwargs or {})["tensor"]
        return func(*args, **kwargs or {})


def placed(network: Network, device: torch.device, dtype: torch.dtype | None = None) -> Network:
    """Move a network to a device and a dtype (None: its own), and return it.

    On CUDA its weights become channels_last, as the convolutions there read them.
    """
    network.to(device, dtype)
    if device.type == "cuda":
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return network


def autocast(mode: str, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """bfloat16 autocast: "on", "off", or "auto" on GPUs that compute in bfloat16.

    CPUs that do, without matrix units, take twice as long with it as our float32 kernels.
    """
    if mode not in ("auto", "on", "off"):
        raise ValueError(f"autocast={mode!r} is not one of auto, on, off")
    native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    enabled = mode == "on" or (mode == "auto" and native)
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


@contextlib.contextmanager
def products_as_convolutions() -> Iterator[None]:
    """Within `with`, matrices are multiplied on a CUDA device as exactly as convolutions are: in
    TF32 unless torch.backends.cudnn.conv.fp32_precision says otherwise."""
    products: Any = torch.backends.cuda.matmul
    convolutions: Any = torch.backends.cudnn
    before = products.fp32_precision
    try:
        products.fp32_precision = convolutions.conv.fp32_precision
        yield
    finally:
        products.fp32_precision = before


@contextlib.contextmanager
def tensor_float32(device: torch.device, allowed: bool) -> Iterator[None]:
    """Within `with`, convolutions and products of float32 on a CUDA device round what they multiply
    to TF32's 11 bits, or none does; kernels of this package follow. The settings come back."""
    if device.type != "cuda":
        yield
        return
    products: Any = torch.backends.cuda.matmul
    convolutions: Any = torch.backends.cudnn
    before = products.fp32_precision, convolutions.conv.fp32_precision
    try:
        products.fp32_precision = "tf32" if allowed else "ieee"
        convolutions.conv.fp32_precision = products.fp32_precision
        yield
    finally:
        products.fp32_precision, convolutions.conv.fp32_precision = before


@contextlib.contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """Within `with`, the same work on a CUDA device gives the same bits; on a CPU it does anyway.

    An operation that torch can only do otherwise is carried out with torch's warning. cuBLAS reads
    its setting when a process first multiplies matrices, so earlier products may have fixed another
    one. All settings come back at the end.
    """
    if device.type != "cuda":
        yield
        return
    cudnn: Any = torch.backends.cudnn
    memory: Any = torch.utils.deterministic
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    before = cudnn.deterministic, cudnn.benchmark, memory.fill_uninitialized_memory
    workspace = os.environ.get(CUBLAS_WORKSPACE)
    try:
        os.environ.setdefault(CUBLAS_WORKSPACE, ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=warn_only or not enabled)
        cudnn.deterministic, cudnn.benchmark = True, False
        memory.fill_uninitialized_memory = False  # nothing here reads what it has not written
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        cudnn.deterministic, cudnn.benchmark, memory.fill_uninitialized_memory = before
        if workspace is None:
            os.environ.pop(CUBLAS_WORKSPACE, None)
