"""What a run shows of itself: summary.json, one self-contained page, the closing table.

Everything here takes plain data (numbers, images, text) and writes files; nothing is trained,
sampled or judged. The page embeds its pictures, runs no script and loads nothing from outside.
"""

from __future__ import annotations

import base64
import html
import io
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from advkd.files import write_bytes, write_json
from advkd.report.pictures import (
    DARK,
    LIGHT,
    SHEET,
    Panel,
    Pictures,
    chart,
    grid_sheet,
    is_finite,
    panels_of,
    png_bytes,
    sample_grids,
    strips_of,
    trajectory_sheet,
)

DASH = "–"
COLUMNS = ("real", "teacher", "student")

# (key of the summary, label, significant digits of the row's largest value, better, meaning)
QUALITY = (
    ("fd", "FD", 4, "lower", "Fréchet distance of the features"),
    ("kid", "KID", 3, "lower", "kernel distance of the features"),
    ("precision", "Precision", 3, "higher", "share of samples that lie among the real images"),
    ("recall", "Recall", 3, "higher", "share of real images that lie among the samples"),
    ("swd", "SWD", 3, "lower", "sliced Wasserstein distance of the pixels"),
)


def save_png(path: Path, grid: np.ndarray) -> None:
    """Write uint8 (H, W) or (H, W, 3) as a PNG, atomically; ValueError for another array."""
    write_bytes(Path(path), png_bytes(grid))


def _values(summary: Mapping[str, Any], key: str) -> dict[str, Any]:
    """The entries of real, teacher and student; None where there is none."""
    entry = summary.get(key) or {}
    return {c: entry.get(c) if is_finite(entry.get(c)) else None for c in COLUMNS}


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
    return value if is_finite(value) else None


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
    said[0] += f"{_brief(steps)} passes." if is_finite(steps) else "many."
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
        f"<td>{_duration(value if is_finite(value) else None)}</td></tr>"
        for stage, value in seconds.items()
    )
    total = _duration(sum(value for value in seconds.values() if is_finite(value)))
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
        f"{_image(png_bytes(grid), f'images: {name}')}</figure>"
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
    for kept, made in zip(strips_of(pictures.trajectory), strips_of(pictures.heads), strict=True):
        above = _image(png_bytes(kept), "what the teacher kept, from early to late")
        below = _image(png_bytes(made), "the student's heads, from first to last")
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
        f"<figure>{_image(chart([panel], LIGHT), panel.title, chart([panel], DARK))}</figure>"
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
    panels, grids = panels_of(metrics), sample_grids(pictures)
    write_json(report / "summary.json", plain)
    save_png(report / "grid.png", grid_sheet(grids))
    if pictures.heads:
        save_png(report / "trajectory.png", trajectory_sheet(pictures))
    if panels:
        write_bytes(report / "loss_curves.png", chart(panels, SHEET))
    page = report / "report.html"
    write_bytes(page, _page(plain, panels, grids, pictures, settings).encode())
    return page
