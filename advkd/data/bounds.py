"""How much a compressed file may unpack to, before anything of it is unpacked."""

from __future__ import annotations

from pathlib import Path

from advkd.data.sentences import DataError

_ALWAYS = 1 << 26  # bytes that a file of any size may unpack to
_RATIO = 200  # bytes for each byte of the file; dSprites has 116, and deflate's most is 1,032


def check_unpacked(path: Path, wanted: int) -> None:
    """Raise DataError where a compressed file asks for more memory than its size vouches for."""
    check_vouched(path, path.stat().st_size, wanted)


def check_vouched(name: object, size: int, wanted: int) -> None:
    """The same of anything with a name that takes `size` bytes where it lies."""
    if wanted > max(_ALWAYS, _RATIO * size):
        raise DataError(
            f"{name} asks for {wanted:,} bytes, which a file of {size:,} bytes does not vouch for"
        )
