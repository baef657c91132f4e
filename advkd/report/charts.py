"""Charts of a training, from the entries of metrics.jsonl to the bytes of a PNG."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from advkd.report.numbers import is_finite

SMOOTH = 60  # a curve's solid line is a running mean over 1/SMOOTH of its points
PANEL = (5.2, 3.1)  # inches
ROOM = (0.55, 0.1, 0.5, 0.55)  # of these left, right, below and above the axes
LARGEST = 1e30  # beyond this a value is not drawn: sums of it may leave the floats


@dataclass(frozen=True)
class Theme:
    """Colors of the charts; `paper` "none" leaves the page's background through."""

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
    """One line of a panel: finite values over steps; color is an index of hues, or a share of
    the way along the ramp of heads."""

    label: str
    steps: np.ndarray
    values: np.ndarray
    hue: int = 0
    along: float | None = None


@dataclass(frozen=True)
class Panel:
    """One chart: a title, its curves, and what they run over; `linear` where the values are
    logarithms already."""

    title: str
    curves: list[Curve]
    zero_line: bool = False
    over: str = "step"
    linear: bool = False


def panels_of(metrics: Sequence[Mapping[str, Any]]) -> list[Panel]:
    """The charts that the metrics allow; a key that is not there draws nothing."""
    panels = [
        Panel("Teacher: loss", _curve(metrics, "teacher", "loss", "loss", hue=1)),
        Panel("Student: distance to the targets", _by_head(metrics, "rec")),
        Panel("Student: adversarial loss", _by_head(metrics, "adv")),
        Panel("Discriminator: loss", _curve(metrics, "distill", "loss_d", "loss", hue=1)),
        Panel("Discriminator: logit gap, real minus fake", _by_head(metrics, "logit_gap"), True),
    ]
    return [panel for panel in panels if panel.curves]


def spectrum_panel(spectra: Mapping[str, Sequence[float]]) -> Panel | None:
    """The mean power of each side's images at each radial frequency; None without any."""
    hues = {"real": 0, "teacher": 1, "student": 2}
    drawn = {side: spectra[side] for side in hues if spectra.get(side)}
    curves = [
        Curve(side, np.arange(1.0, len(values) + 1), np.array(values, np.float64), hues[side])
        for side, values in drawn.items()
        if all(map(_is_drawn, values))
    ]
    return Panel("Power, in dB", curves, over="periods a side", linear=True) if curves else None


def _curve(
    metrics: Iterable[Mapping[str, Any]], stage: str, key: str, label: str, **look: Any
) -> list[Curve]:
    """The curve of one key in a list, or an empty list where nothing can be drawn."""
    points = [
        (entry["step"], entry[key])
        for entry in metrics
        if entry.get("stage") == stage and all(_is_drawn(entry.get(k)) for k in ("step", key))
    ]
    if not points:
        return []
    steps, values = np.array(points, dtype=np.float64).T
    return [Curve(label, steps, values, **look)]


def _is_drawn(value: Any) -> bool:
    return is_finite(value) and abs(value) < LARGEST


def _by_head(metrics: Sequence[Mapping[str, Any]], key: str) -> list[Curve]:
    """The curves of key_1 .. key_K, colored from first to last; at most three are named."""
    names = {name for entry in metrics for name in entry}
    found = (re.fullmatch(rf"{key}_([1-9][0-9]{{0,2}})", name, re.ASCII) for name in names)
    numbers = {int(match[1]) for match in found if match}
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


def _running_mean(values: np.ndarray) -> np.ndarray:
    """Centered running mean, cut off at both ends."""
    half = len(values) // SMOOTH // 2
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    start, end = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    return (sums[end] - sums[start]) / (end - start)


def _spans_decades(panel: Panel) -> bool:
    """Whether a logarithmic axis serves: all positive, and more than a factor of ten."""
    if panel.linear or panel.zero_line:
        return False
    values = np.concatenate([_running_mean(curve.values) for curve in panel.curves])
    return bool(values.min() > 0 and values.max() > 10 * values.min())


def _draw(axes: Any, panel: Panel, theme: Theme) -> None:
    """Draw one panel: each curve faint as measured, solid as its running mean."""
    from matplotlib.colors import to_hex, to_rgb
    from matplotlib.ticker import LogLocator, NullLocator

    first, last = (np.array(to_rgb(end)) for end in theme.ramp)
    for curve in panel.curves:
        color = theme.hues[curve.hue]
        if curve.along is not None:
            color = to_hex(first + (last - first) * curve.along)
        axes.plot(curve.steps, curve.values, color=color, alpha=0.18, linewidth=0.7)
        mean = _running_mean(curve.values)
        axes.plot(curve.steps, mean, color=color, linewidth=1.6, label=curve.label)
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
    _style(axes, panel, theme)


def _style(axes: Any, panel: Panel, theme: Theme) -> None:
    """Title, ticks, grid and legend in the theme's colors."""
    from matplotlib.ticker import MaxNLocator

    axes.set_facecolor("none")
    axes.set_title(panel.title, loc="left", color=theme.ink, fontsize=10.5, pad=24, x=-0.1)
    axes.set_xlabel(panel.over, color=theme.ink, fontsize=9)
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
            bbox_to_anchor=(-0.1, 1),
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
    width, height = PANEL[0] * across, PANEL[1] * down
    figure = Figure((width, height), dpi=150, facecolor=theme.paper)
    FigureCanvasAgg(figure)
    left, right, bottom, top = ROOM
    size = (PANEL[0] - left - right) / width, (PANEL[1] - bottom - top) / height
    for place, panel in enumerate(panels):
        row, column = divmod(place, across)
        x, y = column * PANEL[0] + left, height - (row + 1) * PANEL[1] + bottom
        _draw(figure.add_axes((x / width, y / height, *size)), panel, theme)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
