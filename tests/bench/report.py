"""Tables of a benchmark run, as in docs/performance.md.

pytest tests/bench --benchmark-only --benchmark-json=bench.json
python tests/bench/report.py bench.json
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

Record = dict[str, Any]


def record(extra_info: Mapping[str, Any], seconds: float) -> Record:
    """What the tables take of one benchmark: its extra_info and the median of its samples."""
    return {**extra_info, "seconds": seconds}


def records_of(path: Path) -> list[Record]:
    """The records of a file that --benchmark-json wrote."""
    benchmarks = json.loads(path.read_text())["benchmarks"]
    return [record(b["extra_info"], b["stats"]["median"]) for b in benchmarks]


def unique(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(values))


def geometric_mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def table(op: str, records: list[Record]) -> str:
    """One op: a row for each shape, with ours in time and every other as a multiple of it."""
    peers = [name for name in unique(r["implementation"] for r in records) if name != "ours"]
    with_bytes = any("gb_per_s" in r for r in records)
    header = [op, "ours, ms", *peers, *(["GB/s", "of a copy"] if with_bytes else [])]
    rows, ratios = [], {name: [] for name in peers}
    for shape in unique(r["shape"] for r in records):
        found = {r["implementation"]: r for r in records if r["shape"] == shape}
        ours = found.get("ours")
        if ours is None:
            continue
        cells = [shape, f"{ours['seconds'] * 1e3:.3g}"]
        for name in peers:
            if name in found:
                ratios[name].append(found[name]["seconds"] / ours["seconds"])
            cells.append(f"{ratios[name][-1]:.2f}" if name in found else "")
        if with_bytes:
            cells += [f"{ours['gb_per_s']:.1f}", f"{ours['copy_fraction']:.0%}"]
        rows.append(cells)
    means = [f"{geometric_mean(v):.2f}" if v else "" for v in ratios.values()]
    rows.append(["geometric mean", "", *means, *(["", ""] if with_bytes else [])])
    return markdown(header, rows)


def markdown(header: list[str], rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells: list[str]) -> str:
        first, *others = zip(cells, widths, strict=True)
        parts = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]
        return f"| {' | '.join(parts)} |"

    rule = [":" + "-" * (widths[0] - 1), *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join(line(cells) for cells in [header, rule, *rows])


def text(records: list[Record]) -> str:
    """All ops' tables."""
    clocks = unique(f"{r['clock']}, threads: {r['threads']}" for r in records)
    tables = [
        table(op, [r for r in records if r["op"] == op]) for op in unique(r["op"] for r in records)
    ]
    said = "Medians; an implementation's column is its time over ours."
    return "\n\n".join([f"{'; '.join(clocks)}. {said}", *tables])


if __name__ == "__main__":
    print(text([record for name in sys.argv[1:] for record in records_of(Path(name))]))
