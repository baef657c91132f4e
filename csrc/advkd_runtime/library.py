"""The C library by ctypes; csrc/include/advkd.h says what its structures and functions mean."""

from __future__ import annotations

import ctypes
import os
from importlib.util import find_spec

from . import __path__ as folders

FORMATS = {"float32": 0, "uint8": 1}
FILE_NAMES = ("libadvkd.so", "libadvkd.dylib", "libadvkd.dll", "advkd.dll")

_ERROR_SIZE = 256
_OK, _ERROR_MEMORY = 0, 3


class ModelError(ValueError):
    """What was opened is no model, is damaged, or of a version that is not known here."""


class Info(ctypes.Structure):
    """advkd_info."""

    _fields_ = (
        ("size", ctypes.c_int32),
        ("channels", ctypes.c_int32),
        ("classes", ctypes.c_int32),
        ("heads", ctypes.c_int32),
        ("arena", ctypes.c_int64),
        ("weights", ctypes.c_int64),
    )


class Request(ctypes.Structure):
    """advkd_request. What `labels` points at belongs to the caller."""

    _fields_ = (
        ("seed", ctypes.c_uint64),
        ("first", ctypes.c_int64),
        ("count", ctypes.c_int64),
        ("labels", ctypes.c_void_p),
        ("exit_at", ctypes.c_int32),
        ("together", ctypes.c_int32),
        ("format", ctypes.c_int),
    )


class Model(ctypes.c_void_p):
    """advkd_model *, which is closed when nothing refers to it any more."""

    def __del__(self) -> None:
        _library.advkd_close(self)


def _file() -> str:
    """The library's file: in this package, else the extension of the package around it.

    ImportError where there is neither.
    """
    for folder in folders:
        for name in FILE_NAMES:
            path = os.path.join(folder, name)
            if os.path.exists(path):
                return path
    around = __name__.split(".")[:-2]
    extension = find_spec(".".join([*around, "_C"])) if around else None
    if extension is None or extension.origin is None:
        raise ImportError(
            "advkd's C library has not been built: with a C++ compiler, `pip install ./csrc` in "
            "advkd's sources installs it as advkd_runtime, and `pip install .` as advkd.runtime"
        )
    return extension.origin


def _load(path: str) -> ctypes.CDLL:
    """The library with the types of its functions; ImportError for a file without them."""
    library = ctypes.CDLL(path)
    model, request, size = Model, ctypes.POINTER(Request), ctypes.c_size_t
    text, number, memory = ctypes.c_char_p, ctypes.c_int32, ctypes.c_void_p
    functions = {
        "version": (text, []),
        "isa": (text, []),
        "status_text": (text, [ctypes.c_int]),
        "open_memory": (ctypes.c_int, [memory, size, ctypes.POINTER(model), text]),
        "close": (None, [model]),
        "describe": (None, [model, ctypes.POINTER(Info)]),
        "class_name": (text, [model, number]),
        "image_size": (number, [model, number]),
        "workspace_size": (size, [model, request]),
        "generate": (ctypes.c_int, [model, request, memory, size, memory]),
    }
    for name, (result, arguments) in functions.items():
        function = getattr(library, f"advkd_{name}", None)
        if function is None:
            raise ImportError(f"{path} has no function advkd_{name}: build it again")
        function.restype, function.argtypes = result, arguments
    return library


_library = _load(_file())


def version() -> str:
    """The library's version, such as "0.2.0"."""
    return _text(_library.advkd_version())


def isa() -> str:
    """The instruction set in use: "portable", "avx2", "avx512" or "neon"."""
    return _text(_library.advkd_isa())


def open_model(data: bytes, name: str) -> Model:
    """The model of a file's bytes. ModelError, which begins with `name`, if they are none;
    MemoryError where the system gives no memory."""
    model, error = Model(), ctypes.create_string_buffer(_ERROR_SIZE)
    status = _library.advkd_open_memory(data, len(data), ctypes.byref(model), error)
    if status == _ERROR_MEMORY:
        raise MemoryError(f"{name}: {_text(error.value)}")
    if status != _OK:
        raise ModelError(f"{name}: {_text(error.value)}")
    return model


def describe(model: Model) -> Info:
    """What a model makes."""
    info = Info()
    _library.advkd_describe(model, ctypes.byref(info))
    return info


def class_name(model: Model, label: int) -> str | None:
    """The name of a class, None where it has no name."""
    name = _library.advkd_class_name(model, label)
    return None if name is None else _text(name)


def image_size(model: Model, exit_at: int) -> int:
    """Pixels of a side of the images of a head, 1 being the first."""
    return int(_library.advkd_image_size(model, exit_at))


def workspace_size(model: Model, request: Request) -> int:
    """Bytes that `generate` needs for a valid request."""
    return int(_library.advkd_workspace_size(model, ctypes.byref(request)))


def generate(
    model: Model, request: Request, workspace: int, workspace_size: int, images: int
) -> None:
    """Generates the images to the address `images`, with other threads free to run Python.

    `workspace` is the address of `workspace_size` bytes. RuntimeError for a request that is not
    valid, or a workspace that is too small.
    """
    status = _library.advkd_generate(
        model, ctypes.byref(request), workspace, workspace_size, images
    )
    if status != _OK:
        raise RuntimeError(_text(_library.advkd_status_text(status)))


def _text(utf8: bytes) -> str:
    return utf8.decode("utf-8", "replace")
