"""What readers of images say: errors of one sentence, and names and counts as people read them."""

from __future__ import annotations


class DataError(ValueError):
    """Data that cannot be used; the message is one sentence that names the file."""


def plural(count: int, noun: str) -> str:
    """A count and its noun: `1 image`, `2,000 images`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def brief(text: str, most: int = 300) -> str:
    """A text that a file provides, on one line and cut where it is longer than people read."""
    line = text if text.isprintable() else repr(text)[1:-1]
    return line if len(line) <= most else f"{line[:most]}..."


def reason_of(error: BaseException) -> str:
    """What an exception of any library says, on one line; its type where it says nothing."""
    return brief(str(error)) or type(error).__name__
