# Copyright: (c) 2026, The sottovoce.stack contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Results of the module vram_health as lines that a person reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ansible_collections.sottovoce.stack.plugins.module_utils._summary import finding_line, gpu_line, table

_UNIT_HEADER = ("UNIT", "STATE", "VRAM", "PLAN", "KNOWN BY")


def _mib(value: Any) -> str:
    return f"{value} MiB" if isinstance(value, int) else "?"


def _unit_row(unit: Mapping[str, Any]) -> list[str]:
    rest, peak, drift = unit["plan_rest_mib"], unit["plan_peak_mib"], unit["drift_percent"]
    plan = "-" if peak is None else _mib(peak) if rest == peak else f"{rest} to {_mib(peak)}"
    if drift:
        plan += f" ({drift:+g} %)"
    return [unit["name"], unit["state"] or "-", _mib(unit["used_mib"]), plan, unit["source"]]


def _model_line(model: Mapping[str, Any]) -> str:
    told = [str(model[key]) for key in ("compute_type", "device", "state") if model[key]]
    if model["offload_percent"] is not None:
        told.append(f"{model['vram_mib']} of {model['size_mib']} MiB in VRAM ({model['offload_percent']} %)")
    return f"{model['unit']}: {model['name']}{': ' if told else ''}{', '.join(told)}"


def vram_report(machines: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """
    Everything that was found on each machine.

    machines: host name to its variables, of which sottovoce_vram (a result of vram_health) is looked at.
    """
    lines: list[str] = []
    for name in sorted(machines):
        found = machines[name].get("sottovoce_vram") or {}
        if "status" not in found:
            if found.get("unreachable") or found.get("msg"):
                lines.append(f"{name}: not known: {found.get('msg') or 'it cannot be reached'}")
            continue
        versions = [found["source"]]
        versions += [
            f"{word} {found[key]}" for word, key in (("driver", "driver"), ("CUDA", "cuda")) if found[key]
        ]
        lines.append(f"{name}: {found['status']} ({', '.join(versions) if found['gpus'] else 'no card'})")
        lines += [f"  {gpu_line(gpu)}" for gpu in found["gpus"]]
        for gpu in (gpu for gpu in found["gpus"] if not gpu["error"]):
            lines += [
                f"    MIG {m['uuid']}: {m['used_mib']} of {m['total_mib']} MiB used" for m in gpu["mig"]
            ]
        if found["gpus"] and found["units"]:
            lines += [f"  {line}" for line in table(_UNIT_HEADER, map(_unit_row, found["units"]))]
        lines += [f"  {_model_line(model)}" for model in found["models"]]
        lines += [f"  {finding_line(finding)}" for finding in found["findings"]]
        lines += [f"  note: {note}" for note in found["notes"]]
    return lines or ["No machine has a GPU."]


def vram_problems(machines: Mapping[str, Mapping[str, Any]], fail_on: str = "fail") -> list[str]:
    """
    What is bad enough to fail: machines that could not be asked, and findings of the given severity or worse.

    machines: as for vram_report; fail_on: never, fail or warn.
    """
    severities = {"never": (), "fail": ("fail",), "warn": ("fail", "warn")}[fail_on]
    problems = []
    for name in sorted(machines):
        found = machines[name].get("sottovoce_vram") or {}
        if severities and (found.get("unreachable") or found.get("failed")) and "status" not in found:
            problems.append(f"{name}: {found.get('msg') or 'it cannot be reached'}")
        problems += [
            f"{name}: {finding_line(finding)}"
            for finding in found.get("findings") or []
            if finding["severity"] in severities
        ]
    return problems
