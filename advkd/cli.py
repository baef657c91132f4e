"""What the commands share: errors as one sentence, and options that mean the same everywhere."""

from __future__ import annotations

import argparse
import io
import sys
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

from advkd.errors import CheckpointError, Interrupted, TrainingError

# Where no network is placed, a command does not wait for torch.
if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "bfloat16", "float16")  # of torch


def guarded(command: Callable[[], None], again: str = "the same command") -> int:
    """Run a command's body; errors become one sentence on stderr and exit status 1.

    130 means that it was stopped by a signal and goes on by `again`.
    """
    warnings.showwarning = _one_line_warning  # type: ignore[assignment]
    if isinstance(sys.stdout, io.TextIOWrapper):  # a name that the terminal cannot show
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        command()
    except Interrupted as stop:
        _say(f"{stop}; {again} goes on from there")
        return 130
    except MemoryError as error:
        return _fail(f"out of memory {_first_line(error)}".rstrip())
    except (CheckpointError, TrainingError, ValueError, OSError) as error:
        return _fail(str(error))
    except RuntimeError as error:  # of torch, whose messages go on with where in C++ it was
        return _fail(_first_line(error) or type(error).__name__)
    except KeyboardInterrupt:
        _say("stopped")
        return 130
    return 0


def _fail(sentence: str) -> int:
    _say(sentence)
    return 1


def _say(words: str) -> None:
    """Write a line to stderr, all at once, since several processes may share it."""
    sys.stderr.write(f"advkd: {words}\n")


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]


def _one_line_warning(message: Warning | str, *details: object) -> None:
    _say(f"warning: {message}")


def add_threads(parser: argparse.ArgumentParser) -> None:
    """Declare --threads."""
    parser.add_argument(
        "--threads", type=int, default=0, metavar="N", help="CPU threads (default: all cores)"
    )


def add_device(parser: argparse.ArgumentParser) -> None:
    """Declare --device."""
    parser.add_argument(
        "--device", default="auto", metavar="D",
        help="auto (default: a GPU if there is one), cpu, cuda or cuda:N",
    )  # fmt: skip


def add_dtype(parser: argparse.ArgumentParser) -> None:
    """Declare --dtype."""
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float32",
        help="in which a network computes on a GPU (default float32, multiplied as TF32)",
    )  # fmt: skip


def place_of(args: argparse.Namespace) -> tuple[torch.device, torch.dtype]:
    """The device and the dtype that --device and --dtype name; ValueError for a half type on the
    CPU."""
    import torch

    from advkd import device

    place = device.resolve(args.device)
    if place.type == "cpu" and args.dtype != "float32":
        raise ValueError(f"--dtype {args.dtype} is for a GPU; on the CPU networks take float32")
    return place, getattr(torch, args.dtype)


def use_threads(threads: int) -> None:
    """Let torch, and everything that follows it, use this many threads; 0 changes nothing."""
    if threads < 0:
        raise ValueError(f"--threads {threads} is negative")
    if threads:
        import torch

        torch.set_num_threads(threads)
