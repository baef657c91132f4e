"""`python -m advkd.info`: versions, the instruction set, and which backend serves each op."""

from __future__ import annotations

import argparse
import importlib.util
import platform
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

import torch

from advkd import ops
from advkd.ops import _backend


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed" if importlib.util.find_spec(package) is None else "unknown"


def report() -> Iterator[str]:
    """The lines that the command prints."""
    for name in ("advkd", "torch", "triton", "numpy"):
        yield f"{name:<10} {_version(name)}"
    yield f"{'python':<10} {platform.python_version()} on {platform.machine()}"
    yield f"{'threads':<10} {torch.get_num_threads()}"
    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else "no device"
    yield f"{'CUDA':<10} {cuda}"
    extension = _backend.extension
    if extension is None:
        yield f"{'extension':<10} none: {_backend.extension_missing}"
    else:
        yield f"{'extension':<10} {extension.version}, compiled by {extension.compiler}"
        yield f"{'CPU':<10} {extension.isa()} in use; {', '.join(extension.isas())} run here"
    yield ""
    rows = ops.describe()
    width = max(len(op) for op, _, _ in rows)
    for op, backend, reason in rows:
        yield f"{op:<{width}}  {backend}" + (f"  ({reason})" if reason else "")


def main(argv: list[str] | None = None) -> int:
    """Prints the report; returns the exit status."""
    parser = argparse.ArgumentParser(prog="advkd info", description=__doc__)
    parser.parse_args(argv)
    print("\n".join(report()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
