# Copyright: (c) 2026, The sottovoce.stack contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A report of _vram_health in Prometheus' text format. Units: bytes, seconds, ratios, degrees Celsius."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

MIB = 1024 * 1024
# Name without the prefix: (type, help).
METRICS = {
    "up": ("gauge", "1 if the card can be read, else 0."),
    "total_bytes": ("gauge", "Memory of the card."),
    "free_bytes": ("gauge", "Free memory of the card."),
    "reserved_bytes": ("gauge", "Memory that the driver keeps for itself."),
    "allocated_bytes": ("gauge", "Used memory of the card, whoever uses it."),
    "temperature_celsius": ("gauge", "Temperature of the card."),
    "throttled": ("gauge", "1 if heat or power supply slows the card down."),
    "ecc_errors_total": ("counter", "Memory errors since the driver was loaded."),
    "xid_errors": ("gauge", "Xid errors of the card in the kernel log since boot."),
    "used_bytes": ("gauge", "Memory of the card that a systemd unit uses."),
    "unit_active": ("gauge", "1 if the unit is active."),
    "plan_rest_bytes": ("gauge", "What the unit is planned to use, loaded and idle."),
    "plan_peak_bytes": ("gauge", "What the unit is planned to use at its peak."),
    "plan_drift_ratio": (
        "gauge",
        "Part by which a unit is over its planned peak (or, negative, under its rest).",
    ),
    "offload_ratio": ("gauge", "Part of a loaded model that is in VRAM."),
    "reserve_bytes": ("gauge", "Under how much free memory of a card an idle model is unloaded."),
    "evictions_total": ("counter", "Idle models that were unloaded to make room."),
    "findings": ("gauge", "Findings by severity."),
    "duration_seconds": ("gauge", "How long the reading took."),
    "last_run_timestamp_seconds": ("gauge", "When the reading ended."),
}
PREFIX = "sottovoce_vram_"


def _label(value: Any) -> str:
    return str(value).replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def samples(report: Mapping[str, Any]) -> list[tuple[str, dict[str, Any], float]]:
    """(metric, labels, value) of everything that the report knows; what is not known is left out."""
    found: list[tuple[str, dict[str, Any], Any]] = []
    for gpu in report["gpus"]:
        labels = {"gpu": gpu["index"], "uuid": gpu["uuid"], "name": gpu["name"]}
        found.append(("up", labels, 0 if gpu["error"] else 1))
        if gpu["error"]:
            continue
        for metric, key in (
            ("total", "total"),
            ("free", "free"),
            ("reserved", "reserved"),
            ("allocated", "used"),
        ):
            found.append((f"{metric}_bytes", labels, gpu[f"{key}_mib"] * MIB))
        found.append(("temperature_celsius", labels, gpu["temperature_c"]))
        if gpu["throttling"] is not None:
            found.append(("throttled", labels, int(bool(gpu["throttling"]))))
        for kind in ("corrected", "uncorrected"):
            found.append(("ecc_errors_total", {**labels, "kind": kind}, gpu[f"ecc_{kind}"]))
        if gpu["xid"] is not None:
            found.append(("xid_errors", labels, len(gpu["xid"])))
    for unit in report["units"]:
        labels = {"unit": unit["name"]}
        if unit["state"] is not None:
            found.append(("unit_active", labels, int(unit["state"] == "active")))
        for share in unit["gpus"]:
            if share["used_mib"] is not None:
                found.append(("used_bytes", {"gpu": share["gpu"], **labels}, share["used_mib"] * MIB))
        for key in ("rest", "peak"):
            if unit[f"plan_{key}_mib"] is not None:
                found.append((f"plan_{key}_bytes", labels, unit[f"plan_{key}_mib"] * MIB))
        if unit["drift_percent"] is not None:
            found.append(("plan_drift_ratio", labels, round(unit["drift_percent"] / 100, 4)))
    for model in report["models"]:
        if model["offload_percent"] is not None:
            labels = {"unit": model["unit"], "model": model["name"]}
            found.append(("offload_ratio", labels, model["offload_percent"] / 100))
    for severity in ("warn", "fail"):
        number = sum(finding["severity"] == severity for finding in report["findings"])
        found.append(("findings", {"severity": severity}, number))
    return [(metric, labels, value) for metric, labels, value in found if value is not None]


def exposition(
    report: Mapping[str, Any],
    more: Sequence[tuple[str, dict[str, Any], float]] = (),
    *,
    duration: float,
    now: float,
) -> str:
    """
    The text of a scrape. more: further samples; duration: seconds that the reading took; now: since 1970.

    A sample that comes twice (a model that is loaded twice) is given once: Prometheus refuses the file else.
    """
    given = [
        *samples(report),
        *more,
        ("duration_seconds", {}, round(duration, 4)),
        ("last_run_timestamp_seconds", {}, now),
    ]
    by_metric: dict[str, dict[str, float]] = {name: {} for name in METRICS}
    for metric, labels, value in given:
        inner = ",".join(f'{key}="{_label(label)}"' for key, label in labels.items())
        by_metric[metric][f"{{{inner}}}" if inner else ""] = value
    lines = []
    for metric, found in by_metric.items():
        kind, text = METRICS[metric]
        if found:
            lines += [f"# HELP {PREFIX}{metric} {text}", f"# TYPE {PREFIX}{metric} {kind}"]
            lines += [f"{PREFIX}{metric}{labels} {value}" for labels, value in found.items()]
    return "\n".join(lines) + "\n"
