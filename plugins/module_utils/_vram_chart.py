# Copyright: (c) 2026, The sottovoce.stack contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Plans as a bar chart in SVG: one bar for each card, what lives on it at rest and at peak, what is left."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

WIDTH, LEFT, RIGHT, TOP, BAR, GAP, LEGEND = 860, 150, 40, 64, 34, 58, 26
# Told apart by people who do not see red and green, on light and on dark (Okabe and Ito).
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#7f6db3", "#8c6d31", "#b0a800")
DRIVER, FREE = "#8a8a8a", "none"
STYLE = (
    "text{font:13px system-ui,sans-serif;fill:#1c1c1c}.small{font-size:11px}"
    ".title{font-size:17px;font-weight:600}.told{paint-order:stroke;stroke:#fff;stroke-width:4px}"
    ".axis,.card{stroke:#777;fill:none}.grid{stroke:#ccc}.err{stroke:#1c1c1c;stroke-width:1.5}"
    ".over{fill:#c00}.paper{fill:#fff}"
    "@media(prefers-color-scheme:dark){.told{stroke:#1c1c1c}text{fill:#eee}.grid{stroke:#444}.err{stroke:#eee}.paper{fill:#1c1c1c}"
    ".over{fill:#ff7b7b}}"
)


def _ticks(most: float) -> list[int]:
    """At most eight round steps."""
    step = 1024
    while most / step > 8:
        step *= 2
    return [step * n for n in range(math.floor(most / step) + 1)]


def chart(title: str, plans: Mapping[str, Mapping[str, Any]]) -> str:
    """
    SVG of plans as `_vram_request.plan` gives them, by the machine's name. Machines whose card is not known
    are left out. Solid is what stays, hatched what comes at peak, the whisker the error of the sum.
    """
    shown = [(name, plan) for name, plan in plans.items() if plan["card_mib"] and plan["parts"]]
    most = max(
        (max(plan["card_mib"], _sum(plan, "peak_mib") + _error(plan)) for _n, plan in shown), default=1024
    )
    scale = (WIDTH - LEFT - RIGHT) / most
    names = list(dict.fromkeys(part["name"] for _n, plan in shown for part in plan["parts"]))
    colour = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}
    bottom = TOP + max(1, len(shown)) * (BAR + GAP)
    rows = math.ceil((len(names) + 3) / 3)
    height = bottom + 44 + rows * LEGEND
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}"'
        f' height="{height}" role="img" aria-label="{escape(title, quote=True)}"><style>{STYLE}</style>',
        '<defs><pattern id="peak" width="6" height="6" patternUnits="userSpaceOnUse"'
        ' patternTransform="rotate(45)"><rect width="3" height="6" fill="#fff" fill-opacity=".55"/>'
        "</pattern></defs>",
        f'<rect class="paper" width="{WIDTH}" height="{height}"/>',
        f'<text class="title" x="{LEFT}" y="30">{escape(title)}</text>',
    ]
    for tick in _ticks(most):
        x = LEFT + tick * scale
        out.append(f'<line class="grid" x1="{x:.1f}" y1="{TOP - 12}" x2="{x:.1f}" y2="{bottom - 16}"/>')
        out.append(f'<text class="small" x="{x:.1f}" y="{bottom}" text-anchor="middle">{tick}</text>')
    out.append(
        f'<text class="small" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{bottom + 18}" text-anchor="middle">MiB of'
        " VRAM</text>"
    )
    for index, (name, plan) in enumerate(shown):
        out += _bar(name, plan, TOP + index * (BAR + GAP), scale, colour)
    entries = [("driver", DRIVER), *colour.items(), ("at peak only", "hatched"), ("free", FREE)]
    for index, (text, fill) in enumerate(entries):
        x, y = LEFT + (index % 3) * 225, bottom + 34 + index // 3 * LEGEND
        out += _swatch(x, y, fill)
        out.append(f'<text class="small" x="{x + 22}" y="{y + 11}">{escape(text)}</text>')
    return "\n".join([*out, "</svg>"]) + "\n"


def _swatch(x: float, y: float, fill: str) -> list[str]:
    if fill == "hatched":
        box = f'<rect x="{x}" y="{y}" width="14" height="14" fill="{DRIVER}"/>'
        return [box, f'<rect x="{x}" y="{y}" width="14" height="14" fill="url(#peak)"/>']
    return [f'<rect class="axis" style="fill:{fill}" x="{x}" y="{y}" width="14" height="14"/>']


def _sum(plan: Mapping[str, Any], key: str) -> int:
    return int(plan["driver_mib"]) + sum(int(part[key]) for part in plan["parts"])


def _error(plan: Mapping[str, Any]) -> int:
    return math.ceil(math.sqrt(sum(part["error_mib"] ** 2 for part in plan["parts"])))


def _bar(
    name: str, plan: Mapping[str, Any], y: float, scale: float, colour: Mapping[str, str]
) -> Sequence[str]:
    out = []
    card, peak, error = plan["card_mib"], _sum(plan, "peak_mib"), _error(plan)
    middle = y + BAR / 2
    out.append(f'<text x="{LEFT - 10}" y="{middle - 2:.1f}" text-anchor="end">{escape(name)}</text>')
    out.append(
        f'<text class="small" x="{LEFT - 10}" y="{middle + 14:.1f}" text-anchor="end">{card} MiB</text>'
    )
    x = float(LEFT)

    def block(mib: float, fill: str, hatched: bool, tip: str) -> None:
        nonlocal x
        width = mib * scale
        for paint in (fill, "url(#peak)") if hatched else (fill,):
            out.append(
                f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{BAR}" fill="{paint}">'
                f"<title>{escape(tip)}</title></rect>"
            )
        x += width

    block(plan["driver_mib"], DRIVER, False, f"driver {plan['driver_mib']} MiB")
    for part in plan["parts"]:
        rest, top = part["rest_mib"], part["peak_mib"]
        tip = f"{part['name']}: {rest} MiB at rest, {top} at peak (±{part['error_mib']})"
        block(rest, colour[part["name"]], False, tip)
        if top > rest:
            block(top - rest, colour[part["name"]], True, tip)
    low, high = LEFT + (peak - error) * scale, LEFT + (peak + error) * scale
    out.append(f'<line class="err" x1="{low:.1f}" y1="{middle}" x2="{high:.1f}" y2="{middle}"/>')
    out += [
        f'<line class="err" x1="{end:.1f}" y1="{middle - 5}" x2="{end:.1f}" y2="{middle + 5}"/>'
        for end in (low, high)
    ]
    out.append(
        f'<rect class="card" stroke-width="1.5" x="{LEFT}" y="{y}" width="{card * scale:.1f}"'
        f' height="{BAR}"/>'
    )
    left = card - peak
    told = f"{peak} MiB at peak (±{error}), " + (f"{left} free" if left >= 0 else f"{-left} too much")
    style = "small told" if plan["status"] != "refused" else "small told over"
    told = escape(f"{plan['verdict']}: {told}")
    out.append(f'<text class="{style}" x="{LEFT}" y="{y + BAR + 15}">{told}</text>')
    return out
