"""Model cards: the README.md of a network's folder, with the front matter that the hub reads."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from advkd.files import write_bytes
from advkd.models.student import Student
from advkd.models.unet import UNet

CARD = "README.md"
TASK = "unconditional-image-generation"
UNKNOWN = "unknown"  # a license, as the hub writes it


class Metric(NamedTuple):
    """A figure as the hub lists it: a key, a name for people, and its value."""

    key: str
    name: str
    value: float


@dataclass(frozen=True)
class Facts:
    """What a card says of a network beyond its architecture.

    name: a heading. license: an SPDX name, or "unknown". dataset: what its images are. of_hub: the
    same as the hub calls it, where it is from there. table: figures as text, a mapping of columns
    for each label. metrics: the same as numbers, for the hub. words: paragraphs on how the figures
    came about. picture: a PNG beside the card.
    """

    name: str
    license: str = UNKNOWN
    dataset: str = ""
    of_hub: str = ""
    table: Sequence[tuple[str, Mapping[str, str]]] = ()
    metrics: Sequence[Metric] = ()
    words: Sequence[str] = ()
    picture: str = ""


def write_card(folder: Path, network: Student | UNet, facts: Facts) -> None:
    """Write the model card of a network's folder, in place of one that is there."""
    write_bytes(folder / CARD, card(network, facts).encode("utf-8", "backslashreplace"))


def card(network: Student | UNet, facts: Facts) -> str:
    """The text of a model card."""
    is_student = isinstance(network, Student)
    of_diffusers = not is_student and network.num_classes is None
    front = _front_matter(facts, "diffusers" if of_diffusers else "advkd")
    parts = [front, f"# {_plain(facts.name)}", _described(network, facts)]
    if facts.picture:
        parts.append(f"![Samples]({facts.picture})")
    parts.append(_STUDENT_USE if is_student else _TEACHER_USE)
    if of_diffusers:
        parts.append(_TEACHER_IN_DIFFUSERS)
    if facts.table:
        parts += ["## Figures", _table(facts.table), *facts.words]
    parts += ["## License", _license_words(facts.license)]
    return "\n\n".join(parts) + "\n"


def _front_matter(facts: Facts, library: str) -> str:
    """YAML whose values are JSON, which is YAML too; `library` loads the network."""
    known = re.fullmatch(r"[\w.+-]+", facts.license)
    entries: dict[str, Any] = {"license": facts.license.lower() if known else "other"}
    if not known:
        entries["license_name"] = facts.license
    entries |= {"library_name": library, "pipeline_tag": TASK}
    entries["tags"] = ["advkd", "image-generation", "distillation"]
    if facts.of_hub:
        entries["datasets"] = [facts.of_hub]
    if facts.metrics:
        entries["model-index"] = [
            {
                "name": facts.name,
                "results": [
                    {
                        "task": {"type": TASK},
                        "dataset": {"name": facts.dataset, "type": _slug(facts.dataset)},
                        "metrics": [
                            {"type": m.key, "name": m.name, "value": m.value} for m in facts.metrics
                        ],
                    }
                ],
            }
        ]
    lines = [f"{key}: {json.dumps(value)}" for key, value in entries.items()]
    return "\n".join(["---", *lines, "---"])


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "images"


def _plain(text: str) -> str:
    """A name as Markdown shows it letter by letter, on one line."""
    return re.sub(r"([\\`*_\[\]<>#|])", r"\\\1", " ".join(text.split()))


def _described(network: Student | UNet, facts: Facts) -> str:
    """The network in a paragraph."""
    is_student = isinstance(network, Student)
    size = network.size if isinstance(network, Student) else network.config.sample_size
    channels = network.channels if isinstance(network, Student) else network.config.in_channels
    sides = f"{size}×{size} " if size else ""
    kind = {1: "grayscale ", 3: "RGB "}.get(channels, "")
    what = "one-pass generator" if is_student else "DDPM, a diffusion model,"
    how = ", distilled from a diffusion model" if is_student else ""
    parameters = sum(p.numel() for p in network.parameters())
    lines = [
        f"A {what} of {sides}{kind}images{how} by [advkd](https://arxiv.org/abs/2405.20675); "
        f"{parameters:,} parameters."
    ]
    if facts.dataset:
        lines.append(f"Images: {_plain(facts.dataset)}.")
    if network.num_classes:
        names = network.class_names
        listed = f": {', '.join(map(_plain, names))}" if names and len(names) <= 20 else ""
        lines.append(f"It is conditional on {network.num_classes} classes{listed}.")
    return " ".join(lines)


_STUDENT_USE = """\
## Use

With advkd, where FOLDER is this folder or its repository, OWNER/NAME:

```python
import advkd

student = advkd.load_student("FOLDER")
images = advkd.generate(student, num=16, seed=0)  # (16, C, H, W) float32 in [-1, 1]
```

With diffusers (advkd must be installed beside it):

```python
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained(
    "FOLDER", custom_pipeline="FOLDER", trust_remote_code=True
)
images = pipeline(batch_size=16).images
```"""

_TEACHER_USE = """\
## Use

With advkd, where FOLDER is this folder or its repository, OWNER/NAME:

```python
import advkd

teacher = advkd.load_teacher("FOLDER")
images = advkd.generate(teacher, num=4, seed=0, steps=50)  # (4, C, H, W) float32 in [-1, 1]
```"""

# DDIMPipeline passes no labels on, so it is for networks without classes.
_TEACHER_IN_DIFFUSERS = """\
With diffusers:

```python
from diffusers import DDIMPipeline

images = DDIMPipeline.from_pretrained("FOLDER")(batch_size=4, num_inference_steps=50).images
```"""


def _table(rows: Sequence[tuple[str, Mapping[str, str]]]) -> str:
    """Rows as a Markdown table; the columns are those of the first."""
    columns = list(rows[0][1])
    lines = [f"| | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    lines += [f"| {label} | {' | '.join(cells[c] for c in columns)} |" for label, cells in rows]
    return "\n".join(lines)


def _license_words(license: str) -> str:
    if license == UNKNOWN:
        return (
            "Not known: whoever publishes this names it, here and in the front matter. What the "
            "images' owners allow comes first."
        )
    return f"{_plain(license)}, as the images it was trained on."
