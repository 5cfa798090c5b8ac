# Copyright: (c) 2026, The sottovoce.stack contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Measured rows beside the planner's predictions: as a table in Markdown, and as a plot. MiB."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from typing import Any

from bench.vram import collection

collection.importable()

from ansible_collections.sottovoce.stack.plugins.module_utils import _vram_chart
from ansible_collections.sottovoce.stack.plugins.module_utils import _vram_footprint as footprint

LIMIT = 0.10


@dataclass(frozen=True)
class Row:
    """
    One run: MiB when the model is loaded, at most, and when the work is done (allocators keep what they had);
    seconds of loading and work. `error` is why there are no figures; `comparable` is false without a card.
    """

    engine: str
    model: str
    compute_type: str
    batch: int
    rest_mib: float = 0.0
    peak_mib: float = 0.0
    after_mib: float = 0.0
    source: str = ""
    load_s: float = 0.0
    work_s: float = 0.0
    effective: str = ""
    comparable: bool = True
    error: str = ""

    @property
    def predicted(self) -> footprint.Footprint:
        return footprint.stt(self.model, self.compute_type, self.batch)

    @property
    def off(self) -> float | None:
        """By which part of the measured peak the prediction is off; None where nothing can be compared."""
        if self.error or not self.comparable or self.peak_mib <= 0:
            return None
        return self.predicted.peak / self.peak_mib - 1

    @property
    def beyond(self) -> bool:
        return self.off is not None and abs(self.off) > LIMIT


def as_data(rows: Sequence[Row], machine: Mapping[str, Any], versions: Mapping[str, str]) -> dict[str, Any]:
    return {
        "machine": dict(machine),
        "versions": dict(versions),
        "limit": LIMIT,
        "rows": [
            {
                **asdict(row),
                "predicted_rest_mib": row.predicted.rest,
                "predicted_peak_mib": row.predicted.peak,
                "predicted_error_mib": row.predicted.error,
                "off": None if row.off is None else round(row.off, 4),
                "beyond": row.beyond,
            }
            for row in rows
        ],
    }


HEADER = (
    "engine", "model", "compute type", "batch", "loaded, MiB", "planned", "peak, MiB", "planned", "off by",
    "after, MiB", "known by",
)  # fmt: skip


def line(row: Row) -> str:
    """A row of the table; what is beyond 10 % in bold."""
    asked = [row.engine, row.model, row.compute_type, str(row.batch)]
    rest, peak = str(row.predicted.rest), f"{row.predicted.peak} ±{row.predicted.error}"
    if row.error:
        found = ["", rest, "", peak, "", "", f"failed: {row.error}"]
    else:
        off = "" if row.off is None else f"{100 * row.off:+.1f} %"
        found = [
            f"{row.rest_mib:.0f}", rest, f"{row.peak_mib:.0f}", peak, f"**{off}**" if row.beyond else off,
            f"{row.after_mib:.0f}", row.source,
        ]  # fmt: skip
    return "| " + " | ".join(cell.replace("|", "/") for cell in [*asked, *found]) + " |"


def markdown(rows: Sequence[Row], machine: Mapping[str, Any], versions: Mapping[str, str]) -> str:
    """The table, what it was measured with, and how many rows are within 10 %."""
    where = (
        f"{machine['name']}, {machine['total_mib']} MiB, driver {machine['driver']}, CUDA {machine['cuda']}"
        if machine["device"] == "cuda"
        else "a CPU: memory of the process, which no prediction is about"
    )
    tools = "".join(f"; {name} {version}" for name, version in versions.items())
    head = ["| " + " | ".join(HEADER) + " |", "|" + "---|" * len(HEADER)]
    lines = [f"Measured on {where}{tools}.", "", *head, *map(line, rows)]
    compared = [row for row in rows if row.off is not None]
    beyond = sum(row.beyond for row in compared)
    if compared:
        lines += ["", f"{len(compared) - beyond} of {len(compared)} rows within {100 * LIMIT:.0f} %."]
    return "\n".join(lines) + "\n"


SIZE, LEFT, TOP, LEGEND = 520, 70, 50, 20


def plot(rows: Sequence[Row], title: str) -> str:
    """SVG: measured peak to the right, planned peak upwards, one point a row, and the band of 10 %."""
    shown = [row for row in rows if row.off is not None]
    most = 1.1 * max([1024.0, *(max(row.peak_mib, row.predicted.high) for row in shown)])
    models = list(dict.fromkeys(row.model for row in shown))
    colour = {name: _vram_chart.COLOURS[i % len(_vram_chart.COLOURS)] for i, name in enumerate(models)}
    width, height = LEFT + SIZE + 190, TOP + SIZE + 60

    def x(mib: float) -> float:
        return LEFT + SIZE * mib / most

    def y(mib: float) -> float:
        return TOP + SIZE - SIZE * mib / most

    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}"'
        f' height="{height}" role="img" aria-label="{escape(title, quote=True)}">'
        f"<style>{_vram_chart.STYLE}</style>",
        f'<rect class="paper" width="{width}" height="{height}"/>',
        f'<text class="title" x="{LEFT}" y="30">{escape(title)}</text>',
        f'<polygon fill="#009e73" fill-opacity=".15" points="{x(0):.1f},{y(0):.1f}'
        f" {x(most):.1f},{y(most * (1 - LIMIT)):.1f} {x(most):.1f},{y(most):.1f}"
        f' {x(most / (1 + LIMIT)):.1f},{y(most):.1f}"/>',
        f'<line class="axis" x1="{x(0)}" y1="{y(0)}" x2="{x(most):.1f}" y2="{y(most):.1f}"/>',
        f'<rect class="axis" x="{LEFT}" y="{TOP}" width="{SIZE}" height="{SIZE}"/>',
    ]
    step = 1024 * 2 ** max(0, math.ceil(math.log2(most / 8 / 1024)))
    for tick in range(0, int(most) + 1, step):
        out.append(
            f'<text class="small" x="{x(tick):.1f}" y="{TOP + SIZE + 18}" text-anchor="middle">{tick}</text>'
        )
        out.append(
            f'<text class="small" x="{LEFT - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick}</text>'
        )
    for row in shown:
        what = f"{row.model} {row.compute_type}, batch {row.batch}"
        tip = f"{what}: {row.peak_mib:.0f} measured, {row.predicted.peak} planned"
        ring = ' stroke="#c00" stroke-width="2"' if row.beyond else ""
        out.append(
            f'<circle cx="{x(row.peak_mib):.1f}" cy="{y(row.predicted.peak):.1f}" r="5"'
            f' fill="{colour[row.model]}"{ring}><title>{escape(tip)}</title></circle>'
        )
    for index, name in enumerate(models):
        at = TOP + index * LEGEND
        out.append(f'<circle cx="{LEFT + SIZE + 20}" cy="{at + 6}" r="5" fill="{colour[name]}"/>')
        out.append(f'<text class="small" x="{LEFT + SIZE + 32}" y="{at + 10}">{escape(name)}</text>')
    axes = "measured peak, MiB (planned peak upwards; the band is 10 %)"
    out.append(
        f'<text class="small" x="{LEFT + SIZE / 2}" y="{TOP + SIZE + 40}" text-anchor="middle">{axes}</text>'
    )
    return "\n".join([*out, "</svg>"]) + "\n"
