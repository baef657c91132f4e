"""`python -m advkd_runtime student.advkd`: a grid of images as a PNG, or their numbers."""

from __future__ import annotations

import argparse
import math
import struct
import sys
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

from . import Student, __version__, load

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

TILE = 64  # pixels: small images are enlarged by a whole factor up to this side


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog=f"python -m {__package__}",
        description="Generate images of a student, in one network pass.",
        epilog="--out FILE.png takes a grid; FILE.npy float32 (N, side, side, channels) "
        "in [-1, 1].",
    )
    p.add_argument("model", metavar="MODEL", help="what `advkd export --format advkd` wrote")
    p.add_argument("--num", type=int, default=16, metavar="N", help="how many (default 16)")
    p.add_argument("--seed", type=int, default=0, help="0 to 2^64 - 1 (default 0)")
    p.add_argument("--first", type=int, default=0, metavar="n", help="number of the first image")
    p.add_argument("--class", dest="label", metavar="c", help="only this: a name or a number")
    p.add_argument("--exit-at", type=int, metavar="k", help="leave by head k")
    p.add_argument("--threads", type=int, metavar="t", help="threads at most")
    p.add_argument("--out", type=Path, default=Path("grid.png"), help="FILE.png or FILE.npy")
    p.add_argument("--version", action="version", version=__version__)
    return p


def label_of(student: Student, text: str | None) -> str | int | None:
    """What --class means: a class's name, else a number."""
    if text is None or text in (student.class_names or ()) or not text.isdecimal():
        return text
    return int(text)


def image_grid(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Images (n, H, W, C) row by row, (rows*H*scale, columns*W*scale, C), the rest black."""
    import numpy as np

    n, height, width, channels = images.shape
    columns = math.ceil(math.sqrt(n))
    rows = -(-n // columns)
    grid = np.zeros((rows * columns, height, width, channels), np.uint8)
    grid[:n] = images
    grid = grid.reshape(rows, columns, height, width, channels).swapaxes(1, 2)
    grid = grid.reshape(rows * height, columns * width, channels)
    scale = max(1, TILE // width)
    return grid.repeat(scale, axis=0).repeat(scale, axis=1)


def png_bytes(grid: NDArray[np.uint8]) -> bytes:
    """A PNG file's bytes of pixels (H, W, C), C = 1 or 3."""
    import numpy as np

    height, width, channels = grid.shape
    rows = np.zeros((height, 1 + width * channels), np.uint8)  # each begins with its filter: none
    rows[:, 1:] = grid.reshape(height, -1)
    head = struct.pack(">IIBBBBB", width, height, 8, 2 if channels == 3 else 0, 0, 0, 0)

    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + checksum

    body = chunk(b"IDAT", zlib.compress(rows.tobytes(), 9))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + body + chunk(b"IEND", b"")


def write_images(args: argparse.Namespace) -> None:
    """Generate the images that the command line asks for, and write them."""
    student = load(args.model)
    is_png = args.out.suffix == ".png"
    if args.num < 1:
        raise ValueError(f"--num {args.num} is below 1")
    if not is_png and args.out.suffix != ".npy":
        raise ValueError(f"--out {args.out} is no .png or .npy file")
    if is_png and student.channels not in (1, 3):
        raise ValueError(f"a PNG has 1 or 3 channels, not {student.channels}: use --out FILE.npy")
    images = student.generate(
        args.num,
        args.seed,
        first=args.first,
        labels=label_of(student, args.label),
        exit_at=args.exit_at,
        dtype="uint8" if is_png else "float32",
        threads=args.threads,
    )
    if is_png:
        args.out.write_bytes(png_bytes(image_grid(images)))
        return
    import numpy as np

    np.save(args.out, images)


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    args = parser().parse_args(argv)
    try:
        write_images(args)
    except (OSError, ValueError) as error:
        print(f"{parser().prog}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
