"""Files that are whole or absent, written aside, synced, then renamed; and files read as what they
claim to be, within bounds.

Nothing here is a pickle: weights are safetensors, everything else is JSON. What is read may come
from anywhere, so sizes, nesting, names, shapes and dtypes are checked before memory is taken.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import math
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from advkd.errors import CheckpointError

# Only tensors need torch, so what reads and writes other files does not wait for its import.
if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

MAX_TEXT = 16 << 20  # bytes of a text file; parsed, JSON takes up to 25 times as many
MAX_HEADER = 16 << 20  # bytes of a safetensors file's header
MAX_NESTING = 32  # levels of a JSON file
MAX_DIMENSIONS = 8  # of a tensor
LISTED = 6  # problems of one file that a message spells out

# What often stands in for a file that was not downloaded or converted, by its first bytes.
_NOT_FETCHED = (
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself: run `git lfs pull`"),
    (b"<", "a web page or XML"),
)
_MISTAKEN = (
    *_NOT_FETCHED,
    (b"PK\x03\x04", "a ZIP archive, as torch.save writes its pickles"),
    (b"\x80\x02", "a pickle"),
)
# The dtypes of a safetensors file that torch holds element for element.
_DTYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "I16": "int16",
    "I32": "int32",
    "I64": "int64",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
}
_TEMPORARY = re.compile(r"\..+\.(\d+)\.tmp")
_STARTED = time.time()
CACHE_VARIABLE = "ADVKD_CACHE"


def cache_folder() -> Path:
    """Where to keep what can be made again: $ADVKD_CACHE, else `advkd` in the user's caches."""
    user = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get(CACHE_VARIABLE) or Path(user, "advkd"))


# Writing.


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path in the same folder; on success it replaces `path` atomically.

    On any failure (a full disk, Ctrl-C) the temporary file goes and `path` stays as it was. A
    process that is killed leaves it behind; see `remove_stale`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Make a rename durable, where the system lets a folder be synced."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def remove_stale(folder: Path) -> list[Path]:
    """Remove the temporary files that killed processes left in a folder; return their paths.

    A file goes if the process it is named after is gone, or is this one and began after the file
    was last written. Call it while the folder is held, since processes of other machines cannot be
    seen from here.
    """
    stale = [path for path in sorted(folder.glob(".*.tmp")) if _is_stale(path)]
    for path in stale:
        path.unlink(missing_ok=True)
    return stale


def _is_stale(path: Path) -> bool:
    match = _TEMPORARY.fullmatch(path.name)
    if match is None or not path.is_file():
        return False
    pid = int(match[1])
    if pid == os.getpid():
        return path.stat().st_mtime < _STARTED
    return not is_running(pid)


def is_running(pid: int) -> bool:
    """Whether a process of this machine has this number."""
    try:
        os.kill(pid, 0)  # no signal: asks whether the process exists
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def created(path: Path, text: str = "") -> bool:
    """Create a file with a text; False where there is one. Of several processes that try, also on
    machines that share the folder, one alone succeeds."""
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        return False
    return True


def hold(folder: Path) -> IO[bytes]:
    """Keep a folder for this process, as long as the file that is returned stays open.

    CheckpointError where another process holds it. (The lock is advisory and goes with its
    process, also with a killed one.)
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / ".lock").open("wb")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise CheckpointError(f"another process is at work on {folder}") from None
    return file


def write_bytes(path: Path, content: bytes) -> None:
    """Write a whole file atomically; OSError (disk full, no permission) leaves the old one."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_json(path: Path, content: Any) -> None:
    """Write JSON atomically, indented, keys in the order given."""
    write_bytes(path, (json.dumps(content, indent=2) + "\n").encode())


def seal(content: Mapping[str, Any]) -> str:
    """SHA-256 of JSON content whatever the order of its keys: tells whether a file was altered."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write a safetensors file atomically and return its SHA-256."""
    import safetensors.torch

    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    content = safetensors.torch.save(whole, {"format": "pt"})  # which some readers insist on
    write_bytes(path, content)
    return hashlib.sha256(content).hexdigest()


# Reading.


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """A file open for reading; CheckpointError if it is absent, unreadable or no plain file."""
    try:
        if path.exists() and not path.is_file():
            raise CheckpointError(f"{path} cannot be read: it is not a file")
        with path.open("rb") as file:
            yield file
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except (OSError, MemoryError) as error:
        reason = getattr(error, "strerror", None) or "not enough memory"
        raise CheckpointError(f"{path} cannot be read: {reason}") from None


def _mistaken(head: bytes) -> str | None:
    """What a file that begins with these bytes is instead of text or safetensors, if known."""
    return next((words for first, words in _MISTAKEN if head.startswith(first)), None)


def check_downloaded(path: Path) -> None:
    """Raise CheckpointError for a file that is absent or stands in for one not fetched yet."""
    with _opened(path) as file:
        head = file.read(64)
    if head.startswith(tuple(first for first, _ in _NOT_FETCHED)):
        raise CheckpointError(f"{path} cannot be read: it is {_mistaken(head)}")


def read_text(path: Path, limit: int = MAX_TEXT) -> str:
    """Read a UTF-8 file, with or without a byte order mark, of at most `limit` bytes.

    CheckpointError names a file that is absent, larger or something else.
    """
    with _opened(path) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise CheckpointError(f"{path} cannot be read: it is larger than {limit} bytes")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        words = _mistaken(content) or f"byte {error.start} is not UTF-8"
        raise CheckpointError(f"{path} cannot be read: {words}") from None


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; CheckpointError names a file that is absent, broken or another thing."""
    text = read_text(path)
    try:
        content = json.loads(text)
        deep = _nesting(content) > MAX_NESTING
    except RecursionError:
        deep = True
    except ValueError as error:
        words = _mistaken(text[:32].encode()) or str(error)
        raise CheckpointError(f"{path} cannot be read: {words}") from None
    if deep:
        raise CheckpointError(f"{path} cannot be read: it is nested deeper than {MAX_NESTING}")
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} cannot be read: it holds no JSON object")
    return content


def _nesting(content: Any) -> int:
    """How many lists and tables lie within each other; counting ends past MAX_NESTING."""
    depth, level = 0, [content]
    while depth <= MAX_NESTING:
        containers = [entry for entry in level if isinstance(entry, dict | list)]
        if not containers:
            break
        lists = (entry.values() if isinstance(entry, dict) else entry for entry in containers)
        depth, level = depth + 1, [entry for entries in lists for entry in entries]
    return depth


@dataclass(frozen=True)
class TensorInfo:
    """What a safetensors header says of one tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Read the names, dtypes and shapes of a safetensors file, and nothing of its tensors.

    CheckpointError if the header is broken or does not account for every byte of the file.
    """
    with _opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        head = file.read(8)
        length = int.from_bytes(head, "little")
        if len(head) < 8 or length > min(size - 8, MAX_HEADER):
            words = _mistaken(head + file.read(32)) or "its header is cut off"
            raise CheckpointError(f"{path} is not a whole safetensors file: {words}")
        text = file.read(length)
    try:
        return _parsed_header(json.loads(text), size - 8 - length)
    except (ValueError, RecursionError) as error:
        words = str(error) or "its header is nested too deeply"
        raise CheckpointError(f"{path} is not a whole safetensors file: {words}") from None


def _parsed_header(header: Any, size: int) -> dict[str, TensorInfo]:
    """The tensors of a header whose data have `size` bytes; ValueError says what is wrong."""
    import torch

    if not isinstance(header, dict):
        raise ValueError("its header is no JSON object")
    found, ranges = {}, []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise ValueError(f"its header's entry {name!r:.100} is not a tensor's")
        stored, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(stored, str) or stored not in _DTYPES:
            raise ValueError(f"the dtype of {name!r:.100}, {stored!r:.40}, is not supported")
        dtype: torch.dtype = getattr(torch, _DTYPES[stored])
        if not _are_counts(shape) or not _are_counts(offsets) or len(offsets) != 2:
            raise ValueError(f"the shape or the offsets of {name!r:.100} are not whole numbers")
        if offsets[1] - offsets[0] != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"the size of {name!r:.100} is not what its shape asks for")
        found[name] = TensorInfo(dtype, tuple(shape))
        ranges.append(tuple(offsets))
    end = 0
    for first, last in sorted(ranges):
        if first != end:
            raise ValueError("its tensors overlap or leave gaps")
        end = last
    if end != size:
        raise ValueError(f"its tensors have {size} bytes where its header asks for {end}")
    return found


def _are_counts(values: Any) -> bool:
    """Whether this is a short list of whole numbers that torch can take as sizes."""
    return (
        isinstance(values, list)
        and len(values) <= MAX_DIMENSIONS
        and all(type(value) is int and 0 <= value < 1 << 48 for value in values)
    )


def read_tensors(path: Path, sha256: str | None = None) -> dict[str, Tensor]:
    """Read a safetensors file; CheckpointError if it is absent, broken or not what was written."""
    import safetensors.torch

    read_header(path)
    with _opened(path) as file:
        content = file.read()
    if sha256 is not None and hashlib.sha256(content).hexdigest() != sha256:
        raise CheckpointError(f"{path} is not the file that was written (checksum differs)")
    try:
        return safetensors.torch.load(content)
    except Exception as error:  # the decoder raises whatever its bindings and torch make of it
        raise CheckpointError(f"{path} is not a whole safetensors file: {error}") from None


# Tensors of a module.


def load_strictly(module: nn.Module, tensors: Mapping[str, Tensor], where: Path) -> None:
    """Copy tensors into a module by name, in the module's dtypes; one on device meta is then where
    they are.

    CheckpointError says which are missing, superfluous, of another shape or another kind of number;
    then the module is left as it was.
    """
    own = module.state_dict()
    check_fit(own, tensors, where)
    if any(tensor.is_meta for tensor in own.values()):
        copies = {name: tensors[name].to(own[name].dtype, copy=True) for name in own}
        module.load_state_dict(copies, assign=True)
    else:
        module.load_state_dict({name: tensors[name].to(own[name].dtype) for name in own})


def check_fit(
    own: Mapping[str, Tensor],
    stored: Mapping[str, Tensor | TensorInfo],
    where: Path,
    network: str = "the network",
) -> None:
    """Raise CheckpointError unless the tensors stored in `where` are a network's own: by name, by
    shape, and floating-point numbers where those are."""
    problems = []
    for name, ours in own.items():
        theirs = stored.get(name, ours)
        if theirs.shape != ours.shape:
            problems.append(f"{name} is {tuple(theirs.shape)} instead of {tuple(ours.shape)}")
        elif theirs.dtype.is_floating_point != ours.dtype.is_floating_point:
            problems.append(f"{name} is of {theirs.dtype} instead of {ours.dtype}")
    problems += [f"missing {name}" for name in own if name not in stored]
    problems += [f"superfluous {name}" for name in stored if name not in own]
    if problems:
        raise CheckpointError(f"{where} does not fit {network}: {listed(problems)}")


def listed(problems: Sequence[str]) -> str:
    """The first few of many, and how many more there are."""
    shown = "; ".join(f"{problem:.200}" for problem in problems[:LISTED])
    more = len(problems) - LISTED
    return f"{shown}; and {more} more" if more > 0 else shown


def tensors_hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes, dtypes and bytes: the identity of a set of weights."""
    import torch

    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
