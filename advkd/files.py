"""Files that are whole or absent: safetensors and JSON, written aside, synced, then renamed.

Nothing here is a pickle. A checkpoint is two files, `NAME-STEP.safetensors` and `NAME-STEP.json`;
the JSON comes last, holds the tensors' SHA-256 and its own, and so closes the checkpoint.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn


class CheckpointError(RuntimeError):
    """A file that cannot be used; the message names it and says why."""


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path in the same folder; on success it replaces `path` atomically.

    On any failure (a full disk, Ctrl-C) the temporary file goes and `path` stays as it was.
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


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; CheckpointError names a file that is absent, broken or another thing."""
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} cannot be read: it holds no JSON object")
    return content


def seal(content: Mapping[str, Any]) -> str:
    """SHA-256 of JSON content whatever the order of its keys: tells whether a file was altered."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write a safetensors file atomically and return its SHA-256."""
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    content = safetensors.torch.save(whole)
    write_bytes(path, content)
    return hashlib.sha256(content).hexdigest()


def read_tensors(path: Path, sha256: str | None = None) -> dict[str, Tensor]:
    """Read a safetensors file; CheckpointError if it is absent, broken or not what was written."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    if sha256 is not None and hashlib.sha256(content).hexdigest() != sha256:
        raise CheckpointError(f"{path} is not the file that was written (checksum differs)")
    try:
        return safetensors.torch.load(content)
    except (safetensors.SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path} is not a whole safetensors file: {error}") from None


def load_strictly(module: nn.Module, tensors: Mapping[str, Tensor], where: Path) -> None:
    """Copy tensors into a module by name; every missing, superfluous or misshaped one is listed."""
    own = module.state_dict()
    problems = [f"missing {name}" for name in own if name not in tensors]
    problems += [f"superfluous {name}" for name in tensors if name not in own]
    problems += [
        f"{name} is {tuple(tensors[name].shape)} instead of {tuple(tensor.shape)}"
        for name, tensor in own.items()
        if name in tensors and tensors[name].shape != tensor.shape
    ]
    if problems:
        raise CheckpointError(f"{where} does not fit the network: {'; '.join(problems)}")
    module.load_state_dict({name: tensors[name].to(own[name].dtype) for name in own})


def tensors_hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes, dtypes and bytes: the identity of a set of weights."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
