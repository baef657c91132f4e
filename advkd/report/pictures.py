"""What a report shows as pictures: grids of images, sheets with labels, charts of a training.

Everything here makes arrays or the bytes of a PNG from plain data, and writes no file.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

GRID_COLUMNS = 6
GRID_ROWS = 8
TILE = 96  # pixels of a tile's side that pictures aim at: small images grow, by whole factors
LARGEST_TILE = 128  # larger images shrink to it
LABEL = 34  # pixels that a labelled sheet leaves for its text
MARGIN = 12
SMOOTH = 60  # a curve's solid line is a running mean over 1/SMOOTH of its points


@dataclass(frozen=True)
class Pictures:
    """The images of a report: float32 (n, C, H, W) in [-1, 1], C = 1 or 3.

    teacher, student: samples from the same x_T.
    data: real images, or None where the run has none.
    trajectory: K tensors (m, C, h_k, w_k), what the teacher kept for m images, earliest first.
    heads: K tensors (m, C, h_k, w_k), the student's heads for the same x_T.
    times: the timestep t of each of the K kept targets, the last one 0; empty where unknown.
    """

    teacher: Tensor
    student: Tensor
    data: Tensor | None
    trajectory: Sequence[Tensor] = ()
    heads: Sequence[Tensor] = ()
    times: Sequence[int] = ()

    def __post_init__(self) -> None:
        if len(self.trajectory) != len(self.heads):
            raise ValueError(
                f"{len(self.trajectory)} kept targets do not pair with {len(self.heads)} heads"
            )
        if self.times and len(self.times) != len(self.heads):
            raise ValueError(f"{len(self.times)} times do not pair with {len(self.heads)} heads")


def image_grid(images: Tensor, columns: int, scale: int = 1) -> np.ndarray:
    """Lay images out row by row, touching; each pixel becomes scale × scale pixels.

    images: float (n, C, H, W) in [-1, 1] (values outside are clipped), C = 1 or 3, n >= 1.
    Returns uint8 (rows*H*scale, columns*W*scale), with a last axis of 3 for C = 3; -1 becomes
    0 and 1 becomes 255, and places beyond the last image stay black.
    ValueError for another shape, a value that is not finite, or columns or scale below 1.
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3) or images.shape[0] == 0:
        raise ValueError(f"a grid needs images (n, 1 or 3, H, W), not {tuple(images.shape)}")
    if columns < 1 or scale < 1:
        raise ValueError(f"columns={columns} and scale={scale} must be at least 1")
    values = images.detach().to("cpu", torch.float32)
    if not torch.isfinite(values).all():
        raise ValueError("the images hold values that are not finite")
    n, channels, height, width = values.shape
    pixels = ((values.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).numpy()
    rows = -(-n // columns)
    canvas = np.zeros((rows * columns, channels, height, width), np.uint8)
    canvas[:n] = pixels
    canvas = canvas.reshape(rows, columns, channels, height, width).transpose(0, 3, 1, 4, 2)
    grid = canvas.reshape(rows * height, columns * width, channels)
    grid = grid.repeat(scale, axis=0).repeat(scale, axis=1)
    return grid[:, :, 0] if channels == 1 else grid


def png_bytes(grid: np.ndarray) -> bytes:
    """A PNG file's bytes of uint8 (H, W) or (H, W, 3); ValueError for another array."""
    if grid.dtype != np.uint8 or not (grid.ndim == 2 or (grid.ndim == 3 and grid.shape[2] == 3)):
        raise ValueError(f"a PNG needs uint8 (H, W) or (H, W, 3), not {grid.dtype} {grid.shape}")
    buffer = io.BytesIO()
    Image.fromarray(grid).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _tile_grid(images: Tensor, columns: int) -> np.ndarray:
    """A grid whose tiles are near TILE pixels: small images grow by a whole factor."""
    size = max(images.shape[-2:])
    if size > LARGEST_TILE:
        height, width = (max(1, round(side * LARGEST_TILE / size)) for side in images.shape[-2:])
        images = torch.nn.functional.interpolate(
            images.detach().float(), (height, width), mode="area"
        )
    return image_grid(images, columns, max(1, round(TILE / size)))


def sample_grids(pictures: Pictures) -> dict[str, np.ndarray]:
    """The grids of teacher, student and data, of equally many images."""
    named = {"teacher": pictures.teacher, "student": pictures.student, "data": pictures.data}
    present = {name: images for name, images in named.items() if images is not None}
    count = min(GRID_COLUMNS * GRID_ROWS, *(len(images) for images in present.values()))
    if count > GRID_COLUMNS:
        count -= count % GRID_COLUMNS
    return {
        name: _tile_grid(images[:count], min(GRID_COLUMNS, count))
        for name, images in present.items()
    }


def strips_of(kept: Sequence[Tensor]) -> list[np.ndarray]:
    """Per image a uint8 strip of its K pictures, all brought to one tile size.

    kept: K tensors (m, C, h_k, w_k) as `image_grid` takes them.
    """
    largest = max(max(tensor.shape[-2:]) for tensor in kept)
    side = min(LARGEST_TILE, largest * max(1, round(TILE / largest)))
    strips: list[list[np.ndarray]] = [[] for _ in range(len(kept[0]))]
    for tensor in kept:
        for strip, image in zip(strips, tensor.split(1), strict=True):
            grid = image_grid(image, 1)
            how = Image.Resampling.NEAREST if max(grid.shape[:2]) <= side else Image.Resampling.BOX
            strip.append(np.asarray(Image.fromarray(grid).resize((side, side), how)))
    return [np.concatenate(strip, axis=1) for strip in strips]


def grid_sheet(grids: Mapping[str, np.ndarray]) -> np.ndarray:
    """grid.png: the grids side by side under their names, on white."""
    height = max(grid.shape[0] for grid in grids.values()) + LABEL + MARGIN
    width = MARGIN + sum(grid.shape[1] + MARGIN for grid in grids.values())
    sheet = Image.new("RGB", (width, height), "white")
    draw, font, left = ImageDraw.Draw(sheet), ImageFont.load_default(18), MARGIN
    for name, grid in grids.items():
        draw.text((left + grid.shape[1] / 2, LABEL / 2), name, "#333", font, anchor="mm")
        sheet.paste(Image.fromarray(grid), (left, LABEL))
        left += grid.shape[1] + MARGIN
    return np.asarray(sheet)


def trajectory_sheet(pictures: Pictures) -> np.ndarray:
    """trajectory.png: per image the teacher's strip above the student's, labelled, on white."""
    pairs = list(zip(strips_of(pictures.trajectory), strips_of(pictures.heads), strict=True))
    side, width = pairs[0][0].shape[:2]
    left, gap = 90, 3
    block = 2 * side + gap + MARGIN
    size = (left + width + MARGIN, 2 * LABEL + len(pairs) * block)
    sheet = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(16)
    for k in range(len(pictures.heads)):
        x = left + (k + 0.5) * side
        if pictures.times:
            time = f"t = {pictures.times[k]}" if k == 0 else str(pictures.times[k])
            draw.text((x, LABEL / 2), time, "#333", font, anchor="mm")
        head = f"head {k + 1}"
        draw.text((x, size[1] - LABEL / 2 - MARGIN / 2), head, "#333", font, anchor="mm")
    for row, pair in enumerate(pairs):
        for part, (name, strip) in enumerate(zip(("teacher", "student"), pair, strict=True)):
            top = LABEL + row * block + part * (side + gap)
            draw.text((left - MARGIN, top + side / 2), name, "#333", font, anchor="rm")
            sheet.paste(Image.fromarray(strip), (left, top))
    return np.asarray(sheet)


@dataclass(frozen=True)
class Theme:
    """Colours of the charts; `paper` "none" leaves the page's background through."""

    paper: str
    ink: str
    line: str
    hues: tuple[str, str, str]  # neutral, blue, orange
    ramp: tuple[str, str]  # first and last head


LIGHT = Theme(
    "none", "#565b63", "#dedbd3", ("#8d9096", "#35699c", "#c05f2a"), ("#c9b8a8", "#b0501c")
)
DARK = Theme(
    "none", "#a3a7ae", "#383b41", ("#8b9099", "#79abdc", "#e8935c"), ("#7d6c5e", "#f0a06c")
)
SHEET = Theme("#ffffff", LIGHT.ink, LIGHT.line, LIGHT.hues, LIGHT.ramp)


@dataclass(frozen=True)
class Curve:
    """One line of a panel: finite values over steps; colour is an index of hues, or a share of
    the way along the ramp of heads."""

    label: str
    steps: np.ndarray
    values: np.ndarray
    hue: int = 0
    along: float | None = None


@dataclass(frozen=True)
class Panel:
    """One chart: a title and its curves."""

    title: str
    curves: list[Curve]
    zero_line: bool = False


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read a metrics.jsonl: one dict a line, in order; an absent file is an empty list.

    A last line that was cut off is left out; a broken line elsewhere is a ValueError that names
    the file and the line.
    """
    path = Path(path)
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    lines = text.split("\n")
    entries: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError:
            if number == len(lines):
                break
            raise ValueError(f"{path} line {number} is not JSON") from None
        if not isinstance(entry, dict):
            raise ValueError(f"{path} line {number} is not a JSON object")
        entries.append(entry)
    return entries


def _curve(
    metrics: Iterable[Mapping[str, Any]], stage: str, key: str, label: str, **look: Any
) -> list[Curve]:
    """The curve of one key in a list, or an empty list where it has no finite value."""
    points = [
        (entry["step"], entry[key])
        for entry in metrics
        if entry.get("stage") == stage and "step" in entry and is_finite(entry.get(key))
    ]
    if not points:
        return []
    steps, values = np.array(points, dtype=np.float64).T
    return [Curve(label, steps, values, **look)]


def _by_head(metrics: Sequence[Mapping[str, Any]], key: str) -> list[Curve]:
    """The curves of key_1 .. key_K, coloured from first to last; at most three are named."""
    numbers = {
        int(name.removeprefix(f"{key}_"))
        for entry in metrics
        for name in entry
        if name.startswith(f"{key}_") and name.removeprefix(f"{key}_").isdecimal()
    }
    heads = max(numbers, default=0)
    named = numbers if heads <= 5 else {1, (heads + 1) // 2, heads}
    return [
        curve
        for k in sorted(numbers)
        for curve in _curve(
            metrics,
            "distill",
            f"{key}_{k}",
            f"head {k}" if k in named else "_",
            along=(k - 1) / max(1, heads - 1),
        )
    ]


def panels_of(metrics: Sequence[Mapping[str, Any]]) -> list[Panel]:
    """The charts that the metrics allow; a key that is not there draws nothing."""
    losses = [
        *_curve(metrics, "distill", "loss_g", "student", hue=2),
        *_curve(metrics, "distill", "adv", "its adversarial part", hue=0),
        *_curve(metrics, "distill", "loss_d", "discriminator", hue=1),
    ]
    margin = [
        *_curve(metrics, "distill", "real", "D(teacher's)", hue=1),
        *_curve(metrics, "distill", "fake", "D(student's)", hue=2),
        *_curve(metrics, "distill", "margin", "margin", hue=0),
    ]
    distance = _by_head(metrics, "rec") or _curve(metrics, "distill", "rec", "all heads", hue=2)
    panels = [
        Panel("Teacher: loss", _curve(metrics, "teacher", "loss", "loss", hue=1)),
        Panel("Student: distance to the targets", distance),
        Panel("Student: adversarial loss", _by_head(metrics, "adv")),
        Panel("Discriminator: real minus fake", _by_head(metrics, "margin") or margin, True),
        Panel("Distillation: losses", losses),
    ]
    return [panel for panel in panels if panel.curves]


def _running_mean(values: np.ndarray) -> np.ndarray:
    """Centred running mean, cut off at both ends."""
    half = len(values) // SMOOTH // 2
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    start, end = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    return (sums[end] - sums[start]) / (end - start)


def _spans_decades(panel: Panel) -> bool:
    """Whether a logarithmic axis serves: all positive, and more than a factor of ten."""
    values = np.concatenate([_running_mean(curve.values) for curve in panel.curves])
    return not panel.zero_line and values.min() > 0 and bool(values.max() > 10 * values.min())


def _draw(axes: Any, panel: Panel, theme: Theme) -> None:
    """Draw one panel: each curve faint as measured, solid as its running mean."""
    from matplotlib.colors import to_hex, to_rgb
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    first, last = (np.array(to_rgb(end)) for end in theme.ramp)
    for curve in panel.curves:
        colour = theme.hues[curve.hue]
        if curve.along is not None:
            colour = to_hex(first + (last - first) * curve.along)
        axes.plot(curve.steps, curve.values, color=colour, alpha=0.18, linewidth=0.7)
        mean = _running_mean(curve.values)
        axes.plot(curve.steps, mean, color=colour, linewidth=1.6, label=curve.label)
    if _spans_decades(panel):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        solid = np.concatenate([curve.values for curve in panel.curves])
        low, high = np.percentile(solid, [0.5, 99.5])
        if panel.zero_line:
            low, high = min(low, 0.0), max(high, 0.0)
            axes.axhline(0, color=theme.ink, linewidth=0.6, alpha=0.6)
        room = 0.08 * (high - low) or 1.0
        axes.set_ylim(low - room, high + room)
    axes.set_facecolor("none")
    axes.set_title(panel.title, loc="left", color=theme.ink, fontsize=10.5, pad=24)
    axes.set_xlabel("step", color=theme.ink, fontsize=9)
    axes.tick_params(which="both", colors=theme.ink, labelsize=8.5, length=0)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.grid(axis="y", color=theme.line, linewidth=0.7)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(theme.line)
    if len(panel.curves) > 1:
        axes.legend(
            frameon=False,
            fontsize=8.5,
            labelcolor=theme.ink,
            loc="lower left",
            bbox_to_anchor=(0, 1),
            ncols=5,
            borderaxespad=0.2,
            borderpad=0,
            handlelength=1.2,
            columnspacing=1.4,
        )


def chart(panels: Sequence[Panel], theme: Theme) -> bytes:
    """A PNG of the panels, two beside each other (one alone is as wide as one)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    across = min(2, len(panels))
    down = -(-len(panels) // across)
    figure = Figure((5.2 * across, 3.2 * down), dpi=150, facecolor=theme.paper, layout="tight")
    FigureCanvasAgg(figure)
    for place, panel in enumerate(panels, 1):
        _draw(figure.add_subplot(down, across, place), panel, theme)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def is_finite(value: Any) -> bool:
    """Whether it is a real number that can be shown."""
    number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    return number and math.isfinite(value)
