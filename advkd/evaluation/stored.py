"""Evaluations of a teacher that are stored, so that its images need not be sampled again.

What is stored are the figures of every block, under the protocol they were made by. Only two makers
are trusted: this package, whose evaluations are known by their SHA-256, and a run, which reads what
lies in its own folder. A file beside a teacher that somebody gives is never read.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from advkd.evaluation.figures import FIGURES, Evaluation
from advkd.files import CheckpointError, read_json, seal, write_json

ZOO = Path(__file__).parents[1] / "zoo"
# SHA-256 of every evaluation.json that ships.
SHIPPED: dict[str, str] = {
    "avatars": "399b409c46312ea3bcd1554ae7f711b7afdd6f34a5e8db3930a2e1869c44a90c",
    "fashion-mnist": "71b9cb60f44ac7f3869290117b26ce650b34ca9467dee032e7c4a0b939bc49b0",
}
FILE = "evaluation.json"
_LARGEST = 1e30  # no figure is beyond it; the mean of larger ones may leave the floats


def save_evaluation(folder: Path, protocol: Mapping[str, Any], found: Evaluation) -> None:
    """Write `evaluation.json`, sealed, into `folder`."""
    content = {"protocol": dict(protocol), **asdict(found)}
    write_json(folder / FILE, {**content, "seal": seal(content)})


def shipped_evaluation(protocol: Mapping[str, Any]) -> Evaluation | None:
    """The evaluation by this very protocol that ships with the package; None where none does."""
    for name, sha256 in SHIPPED.items():
        path = ZOO / name / FILE
        if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == sha256:
            found = load_evaluation(path.parent, protocol)
            if found is not None:
                return found
    return None


def load_evaluation(folder: Path, protocol: Mapping[str, Any]) -> Evaluation | None:
    """The evaluation in `folder`; None where there is none, or one by another protocol.

    A damaged or altered one is passed over with a warning.
    """
    path = folder / FILE
    if not path.exists():
        return None
    try:
        content = read_json(path)
        if content.pop("seal", None) != seal(content):
            raise CheckpointError(f"{path} is not the file that was written (its seal differs)")
        if content.get("protocol") != dict(protocol):
            return None
        return _read(path, content)
    except CheckpointError as error:
        warnings.warn(f"stored evaluation passed over: {error}", stacklevel=2)
        return None


def _read(path: Path, content: Mapping[str, Any]) -> Evaluation:
    """The figures; CheckpointError where the file does not hold what it has to."""
    blocks, spectrum = content.get("blocks"), content.get("spectrum")
    if not isinstance(blocks, list) or len(blocks) != content["protocol"].get("blocks"):
        raise CheckpointError(f"{path} does not hold the figures of its blocks")
    for block in blocks:
        if not isinstance(block, dict) or set(block) != set(FIGURES):
            raise CheckpointError(f"{path} holds a block without the figures {', '.join(FIGURES)}")
        if not _are_numbers([value for key, value in block.items() if key != "classes"]):
            raise CheckpointError(f"{path} holds a figure that is no number")
    shares = [block["classes"] for block in blocks if block["classes"] is not None]
    if shares and (len(shares) < len(blocks) or not all(map(_are_numbers, shares))):
        raise CheckpointError(f"{path} holds shares of classes that are no numbers")
    if len({len(share) for share in shares}) > 1:
        raise CheckpointError(f"{path} holds blocks of different classes")
    if not isinstance(spectrum, list) or not _are_numbers(spectrum):
        raise CheckpointError(f"{path} holds a spectrum that is no list of numbers")
    return Evaluation(blocks, spectrum)


def _are_numbers(values: Any) -> bool:
    return isinstance(values, list) and all(
        isinstance(value, int | float) and type(value) is not bool and abs(value) <= _LARGEST
        for value in values
    )
