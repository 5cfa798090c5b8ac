# Copyright: (c) 2026, The sottovoce.stack contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Filters around the VRAM plan of each GPU machine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ansible_collections.sottovoce.stack.plugins.module_utils import (
    _gpu_capability,
    _ollama,
    _summary,
    _vram_chart,
    _vram_request,
)
from ansible_collections.sottovoce.stack.plugins.module_utils._vram_footprint import UnknownModel
from ansible_collections.sottovoce.stack.plugins.module_utils._vram_plan import PlanError

_READ = (
    "instance_roles",
    "gpu_vram_mib",
    "gpu_card",
    "vram_policy",
    *_vram_request.STT_DEFAULTS,
    *_vram_request.OLLAMA_DEFAULTS,
    *(name.replace("_server_", "_") for name in _vram_request.OLLAMA_DEFAULTS),
)


def vram_plans(hosts: Iterable[str], hostvars: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """
    The plan of each host that has a GPU; what makes no sense is a refused plan that says so. Where
    incus_infra ran, its result tells the card, and a machine that got none (gpu: {optional: true}) has no
    plan.
    """
    found: dict[str, dict[str, Any]] = {}
    infra = hostvars.get("localhost", {}).get("sottovoce_infra") or {}
    for host in hosts:
        variables = hostvars[host]
        if not _summary.has_card(str(host), infra, bool(variables.get("instance_gpu"))):
            continue
        # One at a time: looking at all of them would template every variable of the host.
        picked = {name: variables[name] for name in _READ if name in variables}
        capabilities = [card["capability"] for card in _gpu_capability.cards_of(infra, str(host))]
        capabilities = [str(variables.get("stt_server_gpu_capability") or ""), *capabilities]
        try:
            found[str(host)] = _vram_request.plan(picked, [c for c in capabilities if c][:1])
        except (PlanError, UnknownModel) as error:
            found[str(host)] = {
                "status": "refused",
                "card_mib": 0,
                "parts": [],
                "verdict": "",
                "lines": [str(error)],
            }
    return found


def vram_plan_refusals(plans: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The message of an apply that is not to be: host, table, what would fit. Empty if all is well."""
    return [
        line
        for host, plan in plans.items()
        if plan["status"] == "refused"
        for line in (f"{host}:", *plan["lines"])
    ]


def vram_plan_notes(plans: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What was not planned, or not wholly, one line for each machine."""
    notes = []
    for host, plan in plans.items():
        if plan["status"] != "unknown":
            continue
        if not plan["card_mib"]:
            notes.append(f"{host}: {plan['lines'][0]}")
        else:
            notes.append(
                f"{host}: the VRAM plan does not count {', '.join(plan['unknown'])}: size not known."
            )
    return notes


def vram_plan_report(plans: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """All plans as text."""
    lines: list[str] = []
    for host, plan in plans.items():
        lines += ([""] if lines else []) + [host, *(f"  {line}" for line in plan["lines"])]
    return lines or ["No machine has a GPU (gpu: true in infra.yml), so there is nothing to plan."]


def vram_plan_fit_target(plans: Mapping[str, Mapping[str, Any]]) -> int:
    """MiB that Ollama is to leave free by the one plan in there; 0 if there is none that counts all."""
    fitting = [plan for plan in plans.values() if plan["status"] == "fits"]
    return max((int(plan["settings"]["fit_target_mib"]) for plan in fitting), default=0)


def vram_plan_speech(plans: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """What `auto` of stt_server means by the one plan in there: {model, quantization}; empty without one."""
    for plan in plans.values():
        if plan["status"] == "fits" and plan["settings"]["stt_server_model"]:
            settings = plan["settings"]
            return {
                "model": settings["stt_server_model"],
                "quantization": settings["stt_server_quantization"],
            }
    return {}


def vram_plan_turns(
    plans: Mapping[str, Mapping[str, Any]],
    roles: Iterable[str],
    ollama_host: str,
    wanted: Mapping[str, Any],
) -> dict[str, Any]:
    """
    What voicegate is told of the card by the one plan in there, as its settings; empty without a plan.
    `wanted` has `fallback` (list of int8 and cpu), `pinned` (names of models), `reload`.
    """
    for plan in plans.values():
        settings = plan.get("settings") or {}
        if plan["status"] == "refused" or not settings.get("speech_need_mib"):
            continue
        smaller = {"int8": settings["speech_int8_mib"], "cpu": 0}
        fallback = [name for name in wanted["fallback"] if name == "cpu" or smaller.get(name)]
        beside = "ollama_server" in roles
        return {
            "vram_policy": settings["vram_policy"],
            "vram_need_mib": settings["speech_need_mib"],
            "vram_kept_mib": settings["speech_kept_mib"],
            "vram_fallback": ",".join(
                f"{name}={smaller[name]}" if smaller[name] else name for name in fallback
            ),
            "ollama_url": _ollama.server_url(ollama_host) if beside else "",
            "ollama_pinned": ",".join(wanted["pinned"]),
            "ollama_reload": "true" if wanted["reload"] else "false",
        }
    return {}


def vram_plan_units(plans: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, int]]:
    """What each systemd unit takes by the one plan in there, as module vram_health is given it (MiB)."""
    for plan in plans.values():
        if plan["status"] == "fits":
            return dict(plan["units"])
    return {}


class FilterModule:
    """Filters of sottovoce.stack for the VRAM plan."""

    def filters(self) -> Mapping[str, Callable[..., Any]]:
        return {
            "vram_plans": vram_plans,
            "vram_plan_refusals": vram_plan_refusals,
            "vram_plan_notes": vram_plan_notes,
            "vram_plan_report": vram_plan_report,
            "vram_plan_fit_target": vram_plan_fit_target,
            "vram_plan_turns": vram_plan_turns,
            "vram_plan_units": vram_plan_units,
            "vram_plan_speech": vram_plan_speech,
            "vram_chart": lambda plans, title: _vram_chart.chart(title, plans),
        }
