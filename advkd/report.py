"""What a run shows of itself: summary.json, pictures, one self-contained page, the closing table.

Everything here takes plain data (numbers, images, text) and writes files; nothing is trained,
sampled or judged. The page embeds its pictures, runs no script and loads nothing from outside.
"""

from __future__ import annotations

import base64
import html
import io
import itertools
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

from advkd.checkpoint import write_bytes, write_json

DASH = "–"
COLUMNS = ("real", "teacher", "student")
GRID_COLUMNS = 6
GRID_ROWS = 8
TILE = 96  # pixels of a tile's side that pictures aim at: small images grow, by whole factors
LARGEST_TILE = 128  # larger images shrink to it
LABEL = 34  # pixels that a labelled sheet leaves for its text
MARGIN = 12
SMOOTH = 60  # a curve's solid line is a running mean over 1/SMOOTH of its points

# (key of the summary, label, significant digits of the row's largest value, better, meaning)
QUALITY = (
    ("fd", "FD", 4, "lower", "Fréchet distance of the features"),
    ("kid", "KID", 3, "lower", "kernel distance of the features"),
    ("precision", "Precision", 3, "higher", "share of samples that lie among the real images"),
    ("recall", "Recall", 3, "higher", "share of real images that lie among the samples"),
    ("swd", "SWD", 3, "lower", "sliced Wasserstein distance of the pixels"),
)


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


def save_png(path: Path, grid: np.ndarray) -> None:
    """Write uint8 (H, W) or (H, W, 3) as a PNG, atomically; ValueError for another array."""
    write_bytes(Path(path), _png(grid))


def _png(grid: np.ndarray) -> bytes:
    """A PNG file's bytes."""
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


def _sample_grids(pictures: Pictures) -> dict[str, np.ndarray]:
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


def _strips(kept: Sequence[Tensor]) -> list[np.ndarray]:
    """Per image a strip of its K pictures, all brought to one tile size."""
    largest = max(max(tensor.shape[-2:]) for tensor in kept)
    side = min(LARGEST_TILE, largest * max(1, round(TILE / largest)))
    strips: list[list[np.ndarray]] = [[] for _ in range(len(kept[0]))]
    for tensor in kept:
        for strip, image in zip(strips, tensor.split(1), strict=True):
            grid = image_grid(image, 1)
            how = Image.Resampling.NEAREST if max(grid.shape[:2]) <= side else Image.Resampling.BOX
            strip.append(np.asarray(Image.fromarray(grid).resize((side, side), how)))
    return [np.concatenate(strip, axis=1) for strip in strips]


def _grid_sheet(grids: Mapping[str, np.ndarray]) -> np.ndarray:
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


def _trajectory_sheet(pictures: Pictures) -> np.ndarray:
    """trajectory.png: per image the teacher's strip above the student's, labelled, on white."""
    pairs = list(zip(_strips(pictures.trajectory), _strips(pictures.heads), strict=True))
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
        if entry.get("stage") == stage and "step" in entry and _finite(entry.get(key))
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
            "distil",
            f"{key}_{k}",
            f"head {k}" if k in named else "_",
            along=(k - 1) / max(1, heads - 1),
        )
    ]


def _panels(metrics: Sequence[Mapping[str, Any]]) -> list[Panel]:
    """The charts that the metrics allow; a key that is not there draws nothing."""
    losses = [
        *_curve(metrics, "distil", "loss_g", "student", hue=2),
        *_curve(metrics, "distil", "adv", "its adversarial part", hue=0),
        *_curve(metrics, "distil", "loss_d", "discriminator", hue=1),
    ]
    margin = [
        *_curve(metrics, "distil", "real", "D(teacher's)", hue=1),
        *_curve(metrics, "distil", "fake", "D(student's)", hue=2),
        *_curve(metrics, "distil", "margin", "margin", hue=0),
    ]
    distance = _by_head(metrics, "rec") or _curve(metrics, "distil", "rec", "all heads", hue=2)
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


def _chart(panels: Sequence[Panel], theme: Theme) -> bytes:
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


def _finite(value: Any) -> bool:
    """Whether it is a real number that can be shown."""
    number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    return number and math.isfinite(value)


def _values(summary: Mapping[str, Any], key: str) -> dict[str, Any]:
    """The entries of real, teacher and student; None where there is none."""
    entry = summary.get(key) or {}
    return {c: entry.get(c) if _finite(entry.get(c)) else None for c in COLUMNS}


def _fixed(value: float | None, decimals: int) -> str:
    """A number with so many decimals; no minus before zero."""
    if value is None:
        return DASH
    text = f"{value:,.{decimals}f}"
    if text.startswith("-") and not text.strip("-0.,"):
        text = text[1:]
    return text.replace("-", "\N{MINUS SIGN}")


def _row(values: Mapping[str, float | None], digits: int) -> dict[str, str]:
    """One table row with common decimals: the largest value gets `digits` significant ones."""
    largest = max((abs(value) for value in values.values() if value is not None), default=0.0)
    order = math.floor(math.log10(largest)) if largest > 0 else 0
    decimals = min(8, max(0, digits - 1 - order))
    return {column: _fixed(value, decimals) for column, value in values.items()}


def _brief(value: float | None) -> str:
    """A number with three significant digits; a whole number in full."""
    if value is None:
        return DASH
    if float(value).is_integer():
        return _fixed(value, 0)
    return _fixed(value, max(0, 2 - math.floor(math.log10(abs(value)))))


def _duration(seconds: float | None) -> str:
    """Seconds as people say them."""
    if seconds is None:
        return DASH
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _speed_up(summary: Mapping[str, Any]) -> float | None:
    """How many times faster the student is, or None."""
    value = summary.get("speed_up")
    return value if _finite(value) else None


def _cost_rows(summary: Mapping[str, Any]) -> list[tuple[str, dict[str, str]]]:
    """Passes, time, parameters and speed-up as text."""
    rows = [
        (label, {c: _brief(value) for c, value in _values(summary, key).items()})
        for key, label in (
            ("passes", "Network passes per image"),
            ("ms_per_image", "Milliseconds per image"),
            ("parameters", "Parameters"),
        )
    ]
    factor = _speed_up(summary)
    gain = {"real": DASH, "teacher": DASH, "student": DASH}
    if factor is not None:
        gain |= {"teacher": "1×", "student": f"{_brief(factor)}×"}
    return [*rows, ("Speed-up", gain)]


def final_table(summary: Mapping[str, Any]) -> str:
    """The table that closes the main job: teacher and student side by side, below 80 columns.

    Real images have a column where they have a value. A value that is missing, or not finite,
    is a dash. Lines end without a trailing newline or spaces.
    """
    distance = ("Fréchet distance (FD)", _row(_values(summary, "fd"), 4))
    rows = [distance, *_cost_rows(summary)]
    columns = [c for c in COLUMNS if c != "real" or any(row[c] != DASH for _, row in rows)]
    stub = max(len(label) for label, _ in rows)
    width = max(10, *(len(row[c]) + 2 for _, row in rows for c in columns))
    lines = [" " * stub + "".join(f"{column:>{width}}" for column in columns)]
    lines += [
        f"{label:<{stub}}" + "".join(f"{row[c]:>{width}}" for c in columns) for label, row in rows
    ]
    return "\n".join(lines)


# -------------------------------------------------------------------------------------- page

STYLE = """
:root{color-scheme:light dark;--paper:#fbfaf7;--ink:#26292e;--soft:#686d75;--line:#dedbd3;
--real:#8d9096;--teacher:#35699c;--student:#c05f2a}
@media screen and (prefers-color-scheme:dark){:root{--paper:#17191c;--ink:#dfded9;--soft:#9a9ea6;
--line:#383b41;--real:#8b9099;--teacher:#79abdc;--student:#e8935c}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;text-size-adjust:100%}
body{margin:0;background:var(--paper);color:var(--ink);
font:1.0625rem/1.6 Charter,"Bitstream Charter","Iowan Old Style",Palatino,Georgia,serif}
main{max-width:60rem;margin:0 auto;padding:3.5rem 1.25rem 5rem}
.text{max-width:40rem}
h1{font-size:2.1rem;line-height:1.15;font-weight:600;letter-spacing:-.01em;margin:0 0 1.4rem;
overflow-wrap:anywhere}
h2{font-size:1.25rem;font-weight:600;margin:3.25rem 0 .9rem}
p{margin:0 0 1rem}
.over,table,.facts,.legend,.bars,.strip,figcaption,summary,pre{
font-family:system-ui,-apple-system,"Segoe UI",Roboto,"Liberation Sans",Arial,sans-serif}
.over{color:var(--soft);font-size:.82rem;letter-spacing:.04em;margin:0 0 .5rem}
.facts{display:grid;grid-template-columns:repeat(auto-fit,minmax(8.5rem,1fr));gap:1.4rem 2rem;
margin:2.2rem 0 0;padding:1.3rem 0;border:solid var(--line);border-width:1px 0}
.facts b{display:block;font-size:1.75rem;line-height:1.2;font-weight:500;letter-spacing:-.02em;
font-variant-numeric:tabular-nums}
.facts span{color:var(--soft);font-size:.85rem;line-height:1.4;display:block}
.tables,.bars,.charts,.grids,.paths{display:grid;
grid-template-columns:repeat(auto-fit,minmax(min(100%,var(--least)),1fr))}
.tables{--least:25rem;gap:0 3.5rem}
.bars{--least:22rem;gap:.9rem 3.5rem;font-size:.85rem;font-variant-numeric:tabular-nums}
.charts{--least:24rem;gap:1.5rem 2rem}
.grids{--least:15rem;gap:1.5rem}
.paths{gap:1.8rem 2.5rem}
table{border-collapse:collapse;width:100%;font-size:.92rem;line-height:1.35;
font-variant-numeric:tabular-nums}
th,td{padding:.5rem 0 .5rem .9rem;text-align:right;vertical-align:baseline;white-space:nowrap}
th:first-child{padding-left:0;text-align:left;font-weight:400;white-space:normal}
thead th{color:var(--soft);font-weight:500;font-size:.85rem}
tbody tr,tfoot tr{border-top:1px solid var(--line)}
th small{display:block;color:var(--soft);font-size:.8rem}
.teacher{color:var(--teacher)}.student{color:var(--student)}
.legend{color:var(--soft);font-size:.85rem;margin:0 0 1rem}
.legend span{margin-right:1.2rem;white-space:nowrap}
.legend i{display:inline-block;width:.65rem;height:.65rem;margin-right:.4rem}
i.real{background:var(--real)}i.teacher{background:var(--teacher)}i.student{background:var(--student)}
.bars>div{display:grid;grid-template-columns:minmax(1.6rem,auto) 1fr;gap:.9rem;align-items:center;
break-inside:avoid}
.bars .of{min-width:var(--name)}
.bars .bar{display:grid;grid-template-columns:1fr 3.2rem;align-items:center;line-height:1.15rem}
.bars i{height:.5rem;display:block;border-radius:0 1px 1px 0;min-width:1px;
-webkit-print-color-adjust:exact;print-color-adjust:exact}
.legend i{-webkit-print-color-adjust:exact;print-color-adjust:exact}
.bars .bar span{text-align:right;color:var(--soft);font-size:.78rem}
figure{margin:0;break-inside:avoid}
img{display:block;width:100%;height:auto}
figcaption{color:var(--soft);font-size:.85rem;line-height:1.4;padding-bottom:.45rem}
.strip{display:grid;align-items:center;font-size:.78rem;line-height:1.5;color:var(--soft);
text-align:center;break-inside:avoid;font-variant-numeric:tabular-nums}
.strip .side{text-align:right;padding-right:.7rem}
.strip img{grid-column:2/-1;margin-bottom:3px}
details{margin-top:3.25rem;border-top:1px solid var(--line);padding-top:1rem}
summary{cursor:pointer;font-size:.95rem}
pre{font:.8rem/1.55 ui-monospace,SFMono-Regular,Menlo,Consolas,"Liberation Mono",monospace;
overflow-x:auto;margin:1rem 0 0}
@media (max-width:34rem){body{font-size:1rem}main{padding:2rem 1.1rem 3.5rem}h1{font-size:1.7rem}
.facts{grid-template-columns:1fr 1fr;gap:1.2rem}.facts b{font-size:1.5rem}
th,td{padding-left:.6rem}}
@media print{:root{--paper:#fff}main{max-width:none;padding:0}body{font-size:10.5pt}
h2{break-after:avoid}table{break-inside:avoid}pre{white-space:pre-wrap}
details::details-content{content-visibility:visible;height:auto}}
"""

# The page may show embedded pictures and its own style, and nothing else.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def _data_url(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _image(png: bytes, alt: str, dark: bytes | None = None) -> str:
    """An <img> with its picture inside; `dark` is the picture for a dark screen."""
    with Image.open(io.BytesIO(png)) as opened:
        width, height = opened.size
    tag = f'<img src="{_data_url(png)}" width="{width}" height="{height}" alt="{html.escape(alt)}">'
    if dark is None:
        return tag
    media = "screen and (prefers-color-scheme: dark)"
    return f'<picture><source media="{media}" srcset="{_data_url(dark)}">{tag}</picture>'


def _words(summary: Mapping[str, Any]) -> str:
    """The run in a paragraph; a sentence whose numbers are missing is left out."""
    passes, time = _values(summary, "passes"), _values(summary, "ms_per_image")
    distance, recall = _values(summary, "fd"), _values(summary, "recall")
    family = summary.get("student_family")
    said = ["A student " + (f"of the {family} family " if family else "")]
    said[0] += "learned to make in one pass of its network what its teacher makes in "
    steps = passes["teacher"] if passes["teacher"] is not None else summary.get("teacher_steps")
    said[0] += f"{_brief(steps)} passes." if _finite(steps) else "many."
    factor = _speed_up(summary)
    if factor is not None:
        spent = ""
        if time["teacher"] is not None and time["student"] is not None:
            spent = (
                f": {_brief(time['student'])} ms an image instead of {_brief(time['teacher'])} ms"
            )
        said.append(f"That is {_brief(factor)} times as fast{spent}.")
    if distance["teacher"] is not None and distance["student"] is not None:
        shown = _row(distance, 4)
        said.append(
            f"Its Fréchet distance to real images is {shown['student']}, "
            f"the teacher's {shown['teacher']}."
        )
        real = distance["real"]
        if real is not None and distance["teacher"] > real:
            ratio = (distance["student"] - real) / (distance["teacher"] - real)
            said.append(
                f"Real images among themselves are at {shown['real']}; counted from there, "
                f"the student is {_fixed(ratio, 2)} times as far away as the teacher."
            )
    if recall["teacher"] is not None and recall["student"] is not None:
        shown = _row(recall, 3)
        said.append(
            f"It covers {shown['student']} of the real images' variety (recall), "
            f"the teacher {shown['teacher']}."
        )
    return " ".join(said)


def _facts(summary: Mapping[str, Any]) -> str:
    """The few numbers that say it all, large."""
    found: list[tuple[str, str]] = []
    factor = _speed_up(summary)
    if factor is not None:
        found.append((f"{_brief(factor)}×", "faster per image"))
    passes = _values(summary, "passes")
    if passes["student"] is not None:
        plural = "pass" if passes["student"] == 1 else "passes"
        found.append(
            (
                f"{_brief(passes['student'])} {plural}",
                f"per image, teacher {_brief(passes['teacher'])}",
            )
        )
    distance = _values(summary, "fd")
    if distance["student"] is not None:
        shown = _row(distance, 4)
        found.append((f"{shown['student']} FD", f"teacher {shown['teacher']}"))
    size = _values(summary, "parameters")
    if size["student"] is not None:
        share = ""
        if size["teacher"]:
            share = f", {size['student'] / size['teacher']:.0%} of the teacher's"
        found.append((f"{size['student'] / 1e6:.2f} M", f"parameters{share}"))
    if not found:
        return ""
    inner = "".join(
        f"<div><b>{html.escape(number)}</b><span>{html.escape(text)}</span></div>"
        for number, text in found
    )
    return f'<div class="facts">{inner}</div>'


def _table(columns: Sequence[str], rows: Iterable[tuple[str, Mapping[str, str]]]) -> str:
    """A table; the rows' labels are HTML already, the cells are text."""
    head = "".join(f'<th scope="col" class="{c}">{c.capitalize()}</th>' for c in columns)
    body = "".join(
        f'<tr><th scope="row">{label}</th>'
        + "".join(f"<td>{html.escape(cells[c])}</td>" for c in columns)
        + "</tr>"
        for label, cells in rows
    )
    return f"<table><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table>"


def _tables(summary: Mapping[str, Any]) -> str:
    """Quality and cost, beside each other where there is room."""
    quality = [
        (
            f"{label}<small>{meaning}; {better} is better</small>",
            _row(_values(summary, key), digits),
        )
        for key, label, digits, better, meaning in QUALITY
    ]
    cost = _cost_rows(summary)
    columns = [c for c in COLUMNS if c != "real" or any(row[c] != DASH for _, row in cost)]
    return (
        '<div class="tables">'
        f"<section><h2>Quality</h2>{_table(COLUMNS, quality)}</section>"
        f"<section><h2>Cost</h2>{_table(columns, cost)}{_stages(summary)}</section></div>"
    )


def _stages(summary: Mapping[str, Any]) -> str:
    """Seconds of each stage and their sum."""
    seconds = summary.get("seconds") or {}
    if not seconds:
        return ""
    rows = "".join(
        f'<tr><th scope="row">{html.escape(str(stage).capitalize())}</th>'
        f"<td>{_duration(value if _finite(value) else None)}</td></tr>"
        for stage, value in seconds.items()
    )
    total = _duration(sum(value for value in seconds.values() if _finite(value)))
    return (
        f"<h2>Time of the stages</h2><table><tbody>{rows}</tbody><tfoot><tr>"
        f'<th scope="row">Together</th><td>{total}</td></tr></tfoot></table>'
    )


def _classes(summary: Mapping[str, Any]) -> str:
    """Each class's share as bars, with the largest differences from the data in words."""
    classes = summary.get("classes") or {}
    shares = {c: [float(s) for s in classes[c]] for c in COLUMNS if classes.get(c) is not None}
    shares = {c: values for c, values in shares.items() if values}
    if not shares:
        return ""
    count = max(len(values) for values in shares.values())
    names = summary.get("class_names") or [str(index) for index in range(count)]
    largest = max(max(values) for values in shares.values()) or 1.0
    groups = ""
    for index in range(count):
        bars = "".join(
            f'<div class="bar"><i class="{c}" style="width:{100 * values[index] / largest:.1f}%">'
            f"</i><span>{100 * values[index]:.1f}%</span></div>"
            for c, values in shares.items()
        )
        groups += (
            f'<div><span class="of">{html.escape(str(names[index]))}</span><div>{bars}</div></div>'
        )
    legend = "".join(f'<span><i class="{c}"></i>{c.capitalize()}</span>' for c in shares)
    width = 0.55 * max(len(str(name)) for name in names)
    return (
        f'<section><h2>Classes</h2><p class="text">{_class_words(shares, names)}</p>'
        f'<p class="legend">{legend}</p>'
        f'<div class="bars" style="--name:{width:.1f}rem">{groups}</div></section>'
    )


def _class_words(shares: Mapping[str, Sequence[float]], names: Sequence[Any]) -> str:
    """Where teacher and student stray most from the real images' shares."""
    said = "Share of each class among the images, as the classifier sees them."
    if "real" not in shares:
        return said
    found = []
    for column in ("teacher", "student"):
        if column in shares:
            gaps = np.subtract(shares[column], shares["real"])
            worst = int(np.abs(gaps).argmax())
            points = f"{100 * abs(gaps[worst]):.1f} points"
            found.append(f"{points} for the {column} (class {html.escape(str(names[worst]))})")
    if found:
        said += f" The largest differences from the real images are {' and '.join(found)}."
    return said


def _samples(grids: Mapping[str, np.ndarray]) -> str:
    """The grids of teacher, student and data."""
    captions = {
        "teacher": '<span class="teacher">Teacher</span>',
        "student": '<span class="student">Student</span>, from the same noise',
        "data": "Data",
    }
    figures = "".join(
        f"<figure><figcaption>{captions[name]}</figcaption>"
        f"{_image(_png(grid), f'images: {name}')}</figure>"
        for name, grid in grids.items()
    )
    return f'<section><h2>Samples</h2><div class="grids">{figures}</div></section>'


def _paths(pictures: Pictures) -> str:
    """What the teacher kept above the student's heads, image by image."""
    if not pictures.heads:
        return ""
    heads = len(pictures.heads)

    def labels(side: str, texts: Iterable[Any]) -> str:
        cells = "".join(f"<span>{text}</span>" for text in texts)
        return f'<span class="side">{side}</span>{cells}'

    times = labels("t", pictures.times) if pictures.times else ""
    numbers = labels("head", range(1, heads + 1))
    blocks = ""
    for kept, made in zip(_strips(pictures.trajectory), _strips(pictures.heads), strict=True):
        above = _image(_png(kept), "what the teacher kept, from early to late")
        below = _image(_png(made), "the student's heads, from first to last")
        blocks += (
            f'<div class="strip" style="grid-template-columns:auto repeat({heads},1fr)">{times}'
            f'<span class="side teacher">teacher</span>{above}'
            f'<span class="side student">student</span>{below}{numbers}</div>'
        )
    sizes = [f"{head.shape[-2]}×{head.shape[-1]}" for head in pictures.heads]
    runs = [f"{sum(1 for _ in run)} at {size}" for size, run in itertools.groupby(sizes)]
    return (
        '<section><h2>From noise to image</h2><p class="text">What the teacher held on its way '
        "(above), and what the student's heads made of the same noise in one pass (below). "
        f"Heads by pixels: {', '.join(runs)}.</p>"
        f'<div class="paths" style="--least:{min(58, 5 + 4 * heads)}rem">{blocks}</div></section>'
    )


def _curves(panels: Sequence[Panel]) -> str:
    """The training's charts, each drawn for light and for dark."""
    if not panels:
        return ""
    figures = "".join(
        f"<figure>{_image(_chart([panel], LIGHT), panel.title, _chart([panel], DARK))}</figure>"
        for panel in panels
    )
    return f'<section><h2>Training</h2><div class="charts">{figures}</div></section>'


def _protocol(summary: Mapping[str, Any]) -> str:
    """How quality and time were taken."""
    protocol, features = (str(summary.get(key) or "") for key in ("protocol", "features"))
    texts = [protocol] if protocol else []
    if features and features not in protocol:
        texts.append(f"Judged by the features of {features}.")
    if not texts:
        return ""
    paragraphs = "".join(f"<p>{html.escape(text)}</p>" for text in texts)
    return f'<section class="text"><h2>How it was measured</h2>{paragraphs}</section>'


def _page(
    summary: Mapping[str, Any],
    panels: Sequence[Panel],
    grids: Mapping[str, np.ndarray],
    pictures: Pictures,
    settings: str,
) -> str:
    """The whole report.html."""
    name = html.escape(str(summary.get("name") or "distillation"))
    parts = [
        f'<p class="over">advkd report</p><h1>{name}</h1>',
        f'<p class="text">{html.escape(_words(summary))}</p>',
        _facts(summary),
        _samples(grids),
        _tables(summary),
        _paths(pictures),
        _classes(summary),
        _curves(panels),
        _protocol(summary),
        "<details><summary>Configuration of the run</summary>"
        f"<pre>{html.escape(settings)}</pre></details>",
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{name}: advkd report</title><style>{STYLE}</style></head>\n"
        f"<body><main>\n{chr(10).join(part for part in parts if part)}\n</main></body></html>\n"
    )


def _plain(value: Any) -> Any:
    """The same in JSON's types: numpy scalars and arrays unpacked, non-finite numbers None."""
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def write_report(
    folder: Path,
    summary: Mapping[str, Any],
    metrics: Sequence[Mapping[str, Any]],
    pictures: Pictures,
    settings: str,
) -> Path:
    """Write `report/` into a run's folder and return the path of its report.html.

    summary: `fd`, `kid`, `precision`, `recall`, `swd`, `ms_per_image`, `passes`, `parameters`
    (each {"real"?, "teacher", "student"}; None = not known), `classes` (the same of lists of
    shares, or None), `class_names` (optional), `protocol`, `features`, `name`, `student_family`
    (text), `speed_up`, `teacher_steps`, `seconds` ({stage: seconds}); written as summary.json.
    metrics: the lines of metrics.jsonl; a curve is drawn where its key exists.
    settings: the resolved configuration, shown as it is.
    Also writes grid.png, and where there is something to draw trajectory.png and
    loss_curves.png. Every file is replaced atomically; ValueError for images that `image_grid`
    refuses, OSError where a file cannot be written.
    """
    report = Path(folder) / "report"
    plain = _plain(summary)
    panels, grids = _panels(metrics), _sample_grids(pictures)
    write_json(report / "summary.json", plain)
    save_png(report / "grid.png", _grid_sheet(grids))
    if pictures.heads:
        save_png(report / "trajectory.png", _trajectory_sheet(pictures))
    if panels:
        write_bytes(report / "loss_curves.png", _chart(panels, SHEET))
    page = report / "report.html"
    write_bytes(page, _page(plain, panels, grids, pictures, settings).encode())
    return page
