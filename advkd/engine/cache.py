"""Engines that are kept with their networks, as long as these stay the same."""

from __future__ import annotations

import operator
import threading
import weakref
from itertools import chain

import torch
from torch import Tensor, nn

from advkd.engine.cpu import Engine, lower
from advkd.engine.lowering import LoweringError
from advkd.models.student import Student
from advkd.models.unet import UNet
from advkd.ops._backend import cpu_unavailable, fused_extension, use_fused

# Images of a pass for which the engine of few images, and that of many, is made.
_FEW, _MANY = 1, 16
_KEPT = 2  # engines of one network, the newest
_Key = tuple[int, int, int | None]  # side, batch, exit_at
_Layout = tuple[int, torch.dtype, torch.Size, tuple[int, ...]]

_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_TABLES = ("_modules", "_parameters", "_buffers")


class _Snapshot:
    """What a network's engines are made from: modules, their settings, their tensors' content.

    Settings, modules and tensors are compared by identity. The content is read each time, since
    nothing tells that numbers were written past torch, by `.data` or through numpy. What is held
    does not keep the network itself alive.
    """

    def __init__(self, model: nn.Module):
        modules = list(model.modules())
        self._kind = type(model)
        self._inner = modules[1:]
        self._kinds = list(map(type, self._inner))
        self._hooks = [vars(module)[name] for module in modules for name in _HOOKS]
        self._tables = [
            *(vars(module) for module in modules),
            *(vars(module)[name] for module in modules for name in _TABLES),
        ]
        self._values = self._all_values()
        self._tensors: list[Tensor] = [*model.parameters(), *model.buffers()]
        self._layouts = self._all_layouts()
        self._runs = [(t.data_ptr(), t.numel()) for t in self._tensors if _is_dense(t)]
        self._others = [t for t in self._tensors if not _is_dense(t)]
        self._content = self._fingerprint()

    def is_of(self, model: nn.Module) -> bool:
        """Whether the network is still as it was."""
        values = self._all_values()
        return (
            type(model) is self._kind
            and list(map(type, self._inner)) == self._kinds
            and not any(self._hooks)
            and len(values) == len(self._values)
            and all(map(operator.is_, values, self._values))
            and self._all_layouts() == self._layouts
            and self._fingerprint() == self._content
        )

    def _all_values(self) -> list[object]:
        return list(chain.from_iterable(map(dict.values, self._tables)))

    def _all_layouts(self) -> list[_Layout]:
        return [(t.data_ptr(), t.dtype, t.shape, t.stride()) for t in self._tensors]

    def _fingerprint(self) -> int:
        copies = [t.detach().contiguous() for t in self._others]
        runs = [*self._runs, *((t.data_ptr(), t.numel()) for t in copies)]
        number: int = fused_extension().fingerprint(runs)
        return number


def _is_dense(tensor: Tensor) -> bool:
    """Whether its elements fill a run of memory, in this or that order."""
    return tensor.is_contiguous() or (
        tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    )


class _Kept:
    """The engines of one network."""

    def __init__(self, model: UNet | Student):
        self.snapshot = _Snapshot(model)
        self._engines: dict[_Key, Engine] = {}

    def engine(self, model: UNet | Student, key: _Key) -> Engine:
        side, batch, exit_at = key
        engine = self._engines.pop(key, None)
        if engine is None:
            engine = lower(model, (side, side), batch=batch, exit_at=exit_at)
        self._engines[key] = engine
        while len(self._engines) > _KEPT:
            self._engines.pop(next(iter(self._engines)))
        return engine


_kept: weakref.WeakKeyDictionary[UNet | Student, _Kept] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def engine_for(
    model: UNet | Student, side: int, images: int, exit_at: int | None = None
) -> Engine | None:
    """The engine that draws so many images of side x side pixels; None where torch draws them.

    Engines are kept with their network as long as its weights and settings are the same. Up to
    three images have an engine of their own, made for one at a time.
    """
    if not use_fused("the sampling loop", None, None):
        return None
    key = (side, _FEW if images <= 3 * _FEW else _MANY, exit_at)
    with _lock:
        kept = _kept.get(model)
        if kept is None or not kept.snapshot.is_of(model):
            _kept.pop(model, None)
            unavailable = cpu_unavailable(*model.parameters(), *model.buffers())
            if not use_fused("the sampling loop", None, unavailable):
                return None
            kept = _Kept(model)
        try:
            engine = kept.engine(model, key)
        except LoweringError:
            return None
        _kept[model] = kept
        return engine
