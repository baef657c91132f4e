"""Weights that torch.save pickled, for `advkd convert`: read in a process of their own.

That process, `python -m advkd.pickles OLD NEW [KEY]`, reads with weights_only=True, which makes
tensors and plain containers and calls nothing else, and writes safetensors. No other code of this
package reads a pickle.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from advkd.files import CheckpointError, check_downloaded, listed, write_tensors


def unpickle(old: Path, new: Path, key: str | None = None) -> None:
    """Write the tensors of a pickle as a safetensors file, in another process.

    `key` is the entry that holds them where the pickle holds several. Raises CheckpointError, which
    names the file, for whatever is no table of tensors.
    """
    check_downloaded(old)
    command = [sys.executable, "-m", "advkd.pickles", str(old), str(new), *([key] if key else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"the process ended with {done.returncode}"]
        raise CheckpointError(f"{old} cannot be converted: {lines[-1]:.500}")


def _tensors_of(content: Any, key: str | None) -> dict[str, Tensor]:
    """The table of tensors of what a pickle held; ValueError where there is none."""
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__}, not a table of tensors")
    if key is not None:
        if not isinstance(content.get(key), dict):
            raise ValueError(f"it has no table {key!r:.100}, but {listed(list(map(str, content)))}")
        content = content[key]
    others = [str(name) for name, value in content.items() if not isinstance(value, Tensor)]
    if others:
        raise ValueError(
            f"it holds more than tensors ({listed(others)}): name the table of the network by --key"
        )
    tensors = {}
    for name, tensor in content.items():
        if not isinstance(name, str) or tensor.layout is not torch.strided or tensor.is_quantized:
            raise ValueError(f"{name!r:.100} is no plain tensor")
        tensors[name] = tensor.detach().clone()  # tensors that share memory are two in a file
    if not tensors:
        raise ValueError("it holds no tensors")
    return tensors


def main(old: str, new: str, key: str | None = None) -> int:
    """Entry point of the process; its last line on stderr says what is wrong."""
    try:
        content = torch.load(old, map_location="cpu", weights_only=True)
        write_tensors(Path(new), _tensors_of(content, key))
    except Exception as error:  # a pickle can make torch raise anything
        words = str(error).strip().partition("\n")[0] or type(error).__name__
        print(words.partition(". ")[0], file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
