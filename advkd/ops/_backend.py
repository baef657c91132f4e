"""The extension, and the choice between a fused op and its reference."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter


def _load_extension() -> tuple[ModuleType | None, str | None]:
    """The C++ extension, or why there is none."""
    try:
        return import_module("advkd._C"), None
    except ImportError as error:
        return None, f"the C++ extension is not installed ({error})"


extension, extension_missing = _load_extension()

BACKENDS = ("reference", "fused")


def checked_backend(name: str | None, source: str) -> str | None:
    """`name`, if it is a backend or None; ValueError names the source of any other."""
    if name is not None and name not in BACKENDS:
        raise ValueError(f"{source} is '{name}', but it must be 'reference' or 'fused'.")
    return name


_default_backend = checked_backend(os.environ.get("ADVKD_OPS") or None, "ADVKD_OPS")


@contextmanager
def use_backend(backend: str | None) -> Iterator[None]:
    """Within the block, ops called without `backend` use this one (None: fused where it exists)."""
    global _default_backend
    before = _default_backend
    _default_backend = checked_backend(backend, "backend")
    try:
        yield
    finally:
        _default_backend = before


def use_fused(op: str, backend: str | None, unavailable: str | None) -> bool:
    """Whether to run the fused op, given why it cannot run on these tensors (None: it can)."""
    chosen = checked_backend(backend, "backend") or _default_backend
    if chosen == "reference":
        return False
    if unavailable is None:
        return True
    # An explicit wish that cannot be met is an error, so that nobody times the reference unawares.
    if backend == "fused":
        raise ValueError(f"{op} has no fused backend here: {unavailable}.")
    if chosen == "fused" and extension_missing is not None:
        raise ValueError(f"ADVKD_OPS=fused cannot be met: {extension_missing}.")
    return False


def cpu_unavailable(*tensors: Tensor) -> str | None:
    """Why the C++ engine cannot take these tensors, as a clause; None where it can."""
    if extension_missing is not None:
        return extension_missing
    for tensor in tensors:
        if not tensor.is_cpu:
            return f"no kernel serves tensors on {tensor.device.type}"
        if tensor.dtype is not torch.float32 and tensor.is_floating_point():
            return f"the C++ kernel takes float32, not {tensor.dtype}"
    return None


def transformed() -> bool:
    """Whether forward-mode AD or a transform of torch.func is active.

    Kernels see plain numbers only, so a tangent or a batch dimension of these would be lost; the
    references are made of torch's ops, which carry both.
    """
    return not torch.compiler.is_compiling() and _has_level()


def _has_level() -> bool:
    """`transformed` in code that is not being compiled."""
    return (
        forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None
    )


def runs_eagerly(*tensors: Tensor) -> bool:
    """Whether these are plain tensors that nothing traces, transforms or casts on the way.

    Then an op may call its kernel itself; torch's dispatcher, which leads through Python several
    times, takes longer than a small kernel.
    """
    for x in tensors:
        if type(x) is not Tensor and type(x) is not Parameter:
            return False
    return (
        not torch.compiler.is_compiling()
        and not torch._C._is_tracing()
        and torch._C._len_torch_dispatch_stack() == 0
        and not _has_level()
        and not torch._C._is_any_autocast_enabled()
    )


def runs_eagerly_backward(*tensors: Tensor) -> bool:
    """`runs_eagerly` where gradients may come in batches, of torch.autograd.grad(is_grads_batched).

    Those are batches of an older kind than torch.func's, which only the tensors know of.
    """
    if not runs_eagerly(*tensors):
        return False
    return not any(torch._C._functorch.is_legacy_batchedtensor(x) for x in tensors)


def fused_extension() -> ModuleType:
    """The C++ extension; ValueError where there is none."""
    if extension is None:
        raise ValueError(f"the op was asked for as fused, but {extension_missing}.")
    return extension


def asked_reference() -> str | None:
    """Why no fused op is used by default, if it is by choice."""
    return "ADVKD_OPS=reference is set" if _default_backend == "reference" else None
