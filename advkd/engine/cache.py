"""Which engine serves a network, and a cache of engines, valid as long as it stays the same."""

from __future__ import annotations

import threading
import warnings
import weakref
from itertools import chain

import torch
from torch import Tensor, nn

from advkd.diffusion import StepTable
from advkd.engine.cpu import CpuEngine
from advkd.engine.cuda import CudaEngine
from advkd.engine.eager import EagerEngine
from advkd.engine.interface import Engine, input_shape
from advkd.engine.lowering import LoweringError
from advkd.models.student import Student
from advkd.models.unet import UNet
from advkd.ops import address, extension
from advkd.ops._backend import fused_extension, use_fused

# Tried in this order; what none of them takes is the eager engine's.
ENGINES: list[type[Engine]] = [CpuEngine, CudaEngine]

_MOST = 2  # engines of one network, the newest
_Key = tuple[tuple[int, int], int, int | None]  # (H, W), batch, exit_at

# How torch tells C++ of its tensors: DLPack's functions, where it has them.
_EXCHANGE = getattr(Tensor, "__dlpack_c_exchange_api__", None)
_TABLES = ("_modules", "_parameters", "_buffers", "_forward_hooks", "_forward_pre_hooks")


def compile(
    model: UNet | Student,
    images: int = 1,
    *,
    size: tuple[int, int] | None = None,
    exit_at: int | None = None,
) -> Engine:
    """Make the fastest engine that serves a network on its device, for `images` at a time.

    For repeated calls: an engine checks nothing of the network it was made from, and a CPU engine
    copies the weights. `size` (H, W) is for a teacher whose configuration names none, `exit_at`
    the student's head to leave by. Raises ValueError for what the network cannot do.
    """
    size = input_shape(model, size)[1:]
    kind = _kind_of(model)
    engine = _made(kind, model, (size, kind.batch_for(images), exit_at))
    if engine is None:
        engine = EagerEngine(model, size, exit_at)
    engine.network = model  # lives as long as what reads its weights
    return engine


def engine_for(
    model: UNet | Student,
    images: int,
    *,
    size: tuple[int, int] | None = None,
    exit_at: int | None = None,
    table: StepTable | None = None,
) -> Engine:
    """The engine that samples so many images at once, by `table`; cached with its network.

    An engine is made anew once the network's weights, settings, hooks or methods have changed.
    Raises ValueError for what the network cannot do.
    """
    size = input_shape(model, size)[1:]
    plain = table is None or table.is_plain
    if not (plain and use_fused("the sampling loop", None, None)):
        return EagerEngine(model, size, exit_at)
    with _lock:
        cached = _cache.get(model)
        if cached is None or not cached.snapshot.is_of(model):
            _cache.pop(model, None)
            kind = _kind_of(model)
            if kind is EagerEngine:
                return EagerEngine(model, size, exit_at)
            cached = _cache[model] = _Cached(model, kind)
        return cached.engine(model, size, max(images, 1), exit_at)


def engine_named(
    name: str, model: UNet | Student, images: int, *, size: tuple[int, int] | None = None
) -> Engine:
    """The engine of that name, so that what it goes on with has the same bits as what it began.

    Raises ValueError where it cannot be had here.
    """
    if name == EagerEngine.name:
        return EagerEngine(model, input_shape(model, size)[1:])
    engine = engine_for(model, images, size=size)
    if engine.name != name:
        raise ValueError(f"they are of the engine {name!r}, but here that is {engine.name!r}")
    return engine


def _kind_of(model: UNet | Student) -> type[Engine]:
    """The first engine that takes the network as it is now."""
    reason = "no engine takes it"
    for kind in ENGINES:
        unavailable = kind.unavailable(model)
        if unavailable is None:
            return kind
        reason = unavailable
    use_fused("the sampling loop", None, reason)  # an explicit wish that cannot be met is an error
    return EagerEngine


def _made(kind: type[Engine], model: UNet | Student, key: _Key) -> Engine | None:
    """A new engine; None, with a warning, where it cannot express the network after all."""
    try:
        return kind.make(model, *key)
    except LoweringError as error:
        words = f"{kind.__name__} cannot run this network, so torch does: {error}"
        warnings.warn(words, stacklevel=3)
        return None


class _Snapshot:
    """What a network's engines are made from: modules, their settings and methods, its tensors.

    Settings, modules and tensors are compared by identity. Where an engine copies the weights,
    their content is read each time, since nothing tells that numbers were written past torch, by
    `.data` or through numpy. A snapshot does not keep the network itself alive.
    """

    def __init__(self, model: nn.Module, reads_content: bool):
        modules = list(model.modules())
        self._reads_content = reads_content
        self._kind = type(model)
        self._inner = modules[1:]
        self._kinds = list(map(type, self._inner))
        self._methods = self._all_methods()
        self._tables = [
            *(vars(module) for module in modules),
            *(vars(module)[name] for module in modules for name in _TABLES),
        ]
        self._sizes = list(map(len, self._tables))
        self._values = list(chain.from_iterable(map(dict.values, self._tables)))
        self._tensors: list[Tensor] = [*model.parameters(), *model.buffers()]
        self._layouts = self._all_layouts()
        read = self._tensors if reads_content else []
        self._runs = _runs_of([t for t in read if _is_dense(t)])
        self._others = [t for t in read if not _is_dense(t)]
        self._content = self._fingerprint()

    def is_of(self, model: nn.Module) -> bool:
        """Whether the network is still as it was."""
        return (
            type(model) is self._kind
            and self._has_its_modules()
            and self._all_methods() == self._methods
            and self._all_layouts() == self._layouts
            and self._fingerprint() == self._content
        )

    def _has_its_modules(self) -> bool:
        """Whether modules are of their types, and hold the very settings, tensors and hooks; False
        without the extension, which compares them."""
        return (
            extension is not None
            and extension.have_types(self._inner, self._kinds)
            and extension.hold_values(self._tables, self._sizes, self._values)
        )

    def _all_methods(self) -> list[object]:
        kinds = dict.fromkeys((self._kind, *self._kinds))
        return [method for kind in kinds for method in vars(kind).values() if callable(method)]

    def _all_layouts(self) -> object:
        """Addresses, dtypes, shapes and strides of the tensors, to be compared."""
        if _EXCHANGE is not None and extension is not None:
            found: bytes | None = extension.layouts(_EXCHANGE, self._tensors)
            if found is not None:
                return found
        return [(t.data_ptr(), t.dtype, t.shape, t.stride()) for t in self._tensors]

    def _fingerprint(self) -> int:
        if not self._reads_content:
            return 0
        copies = [t.detach().contiguous() for t in self._others]
        runs = torch.cat((self._runs, _runs_of(copies))) if copies else self._runs
        number: int = fused_extension().fingerprint(address(runs, torch.int64), len(runs))
        return number


def _runs_of(tensors: list[Tensor]) -> Tensor:
    """Where dense tensors lie: (address, floats) of each, (N, 2) int64."""
    runs = [(address(t, torch.float32), t.numel()) for t in tensors]
    return torch.tensor(runs, dtype=torch.int64, device="cpu").view(-1, 2)


def _is_dense(tensor: Tensor) -> bool:
    """Whether its elements fill a run of memory, in this or that order."""
    return tensor.is_contiguous() or (
        tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    )


class _Cached:
    """The engines of one network, all of one kind."""

    def __init__(self, model: UNet | Student, kind: type[Engine]):
        self.kind = kind
        self.snapshot = _Snapshot(model, not kind.reads_in_place)
        self._engines: dict[_Key, Engine] = {}
        self._refused = False  # by `make`; a warning has said why

    def engine(
        self, model: UNet | Student, size: tuple[int, int], images: int, exit_at: int | None
    ) -> Engine:
        """The engine for so many images: a cached one, a new one, or the eager one if `make`
        refuses."""
        if self._refused:
            return EagerEngine(model, size, exit_at)
        key = (size, self.kind.batch_for(images), exit_at)
        engine = self._engines.pop(key, None)
        while len(self._engines) >= _MOST:  # before making one: memory may be short
            self._engines.pop(next(iter(self._engines)))
        if engine is None:
            engine = _made(self.kind, model, key)
        if engine is None:
            self._refused = True
            self._engines.clear()
            return EagerEngine(model, size, exit_at)
        self._engines[key] = engine
        return engine


_cache: weakref.WeakKeyDictionary[UNet | Student, _Cached] = weakref.WeakKeyDictionary()
_lock = threading.RLock()
