# Copyright: (c) 2026, The sottovoce.stack contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What plays found, as text that a person reads: the end of apply, the status table, the end of destroy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

# Order and wording of what one role says of itself.
_FACTS = ("engine", "version", "model", "quantization", "device")

# Registered results of speech_check and what the sentence went through.
_WAYS = {"sottovoce_heard_stt": "the speech-to-text server", "sottovoce_heard": "Open WebUI"}


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines with columns padded to their widest cell, two spaces between them, no trailing blanks."""
    lines = [list(header), *[list(row) for row in rows]]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]


def pick_vars(
    hosts: Iterable[str], hostvars: Mapping[str, Any], keys: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Of each host the named variables that it has: host name to {key: value}."""
    picked = {}
    for host in hosts:
        variables = hostvars[host]
        picked[str(host)] = {key: variables[key] for key in keys if key in variables}
    return picked


def _roles(variables: Mapping[str, Any]) -> list[str]:
    """Roles that may have left a summary: gpu_userland runs without being listed, where there is a GPU."""
    return ["gpu_userland", *(variables.get("instance_roles") or [])]


def summary_vars(hosts: Iterable[str], hostvars: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The variables of each host that apply_summary looks at."""
    fixed = ["instance_ip", "instance_roles", "sottovoce_vram", *_WAYS]
    return {
        host: pick_vars(
            [host],
            hostvars,
            [*fixed, *(f"{role}_summary" for role in _roles(hostvars[host]))],
        )[host]
        for host in hosts
    }


def running_instances(info: Mapping[str, Any]) -> list[str]:
    """Names of the instances that a result of incus_infra_info shows as running."""
    return sorted(item["name"] for item in info.get("instances", []) if item.get("status") == "Running")


def unhealthy_services(health: Mapping[str, Any]) -> list[str]:
    """Enabled services of a result of service_health_info that are not healthy, each with its reason."""
    return [
        f"{service['name']}: {service['health']}"
        for service in health.get("services", [])
        if service["enabled"] and service["health"] not in ("ok", "unknown")
    ]


def instances_to_create(infra: Mapping[str, Any]) -> list[str]:
    """Names of the instances that a result of incus_infra says were (in check mode: would be) created."""
    return sorted(
        resource["name"]
        for resource in infra.get("resources", [])
        if resource.get("kind") == "instance" and resource.get("action") == "created"
    )


def infra_summary(infra: Mapping[str, Any]) -> list[str]:
    """One line per action of incus_infra with the resources it touched, then what was left alone and why."""
    by_action: dict[str, list[str]] = {}
    for resource in infra.get("resources", []):
        by_action.setdefault(resource["action"], []).append(f"{resource['kind']} {resource['name']}")
    lines = [
        f"{action}: {', '.join(names)}"
        for action, names in sorted(by_action.items())
        if action not in ("unchanged", "skipped")
    ]
    for resource in infra.get("resources", []):
        if resource["action"] == "skipped":
            lines.append(f"left alone: {resource['kind']} {resource['name']}: {resource.get('why', '')}")
    lines += [str(note) for note in infra.get("notes", [])]
    return lines or ["nothing to do"]


def _service_line(role: str, facts: Mapping[str, Any]) -> str:
    told = [str(facts[key]) for key in _FACTS if facts.get(key)]
    return f"    {role}: {'  '.join(part for part in [str(facts.get('url') or ''), ', '.join(told)] if part)}"


def apply_summary(
    machines: Mapping[str, Mapping[str, Any]],
    infra: Mapping[str, Any] | None = None,
    notes: Sequence[str] = (),
    host: Mapping[str, Any] | None = None,
) -> list[str]:
    """
    Lines that end an apply.

    machines: host name to its variables, as summary_vars picks them. Every role leaves what it has to say in
    a fact <role>_summary {url, engine, version, model, quantization, device, skipped [{what, why}], notes};
    infra: the result of incus_infra when it ran; notes: what the parser of infra.yml has to say; host:
    gpu_host_summary {notes}, what role gpu_host found on the host and could not mend.
    """
    lines: list[str] = []
    remarks: list[str] = [str(note) for note in notes]
    remarks += [f"host: {note}" for note in (host or {}).get("notes") or []]
    # Without `resources` it was only read.
    if infra and "resources" in infra:
        lines.append(f"Incus: {'; '.join(infra_summary({**infra, 'notes': []}))}")
        remarks += [str(note) for note in infra.get("notes", [])]
    heard: list[str] = []
    for name in sorted(machines):
        variables = machines[name]
        lines.append(f"{name} ({variables.get('instance_ip') or 'no address'})")
        for role in _roles(variables):
            facts = variables.get(f"{role}_summary")
            if not isinstance(facts, Mapping):
                continue
            lines.append(_service_line(role, facts))
            remarks += [
                f"{name}, skipped: {item['what']}: {item['why']}" for item in facts.get("skipped") or []
            ]
            remarks += [f"{name}, {role}: {note}" for note in facts.get("notes") or []]
        vram = variables.get("sottovoce_vram") or {}
        lines += [f"    {gpu_line(gpu)}" for gpu in vram.get("gpus") or []]
        remarks += [f"{name}, VRAM, {finding_line(found)}" for found in vram.get("findings") or []]
        for key, way in _WAYS.items():
            answer = variables.get(key) or {}
            if answer.get("text"):
                heard.append(f"heard through {way} in {answer['seconds']:.2f} s: {answer['text']}")
    return lines + [f"note: {remark}" for remark in dict.fromkeys(remarks)] + heard


def _mib(value: Any) -> str:
    return f"{value} MiB" if isinstance(value, int) else "-"


def _room(health: Mapping[str, Any], vram: Mapping[str, Any]) -> str:
    cards = [card for card in vram.get("gpus") or [] if not card["error"]]
    if cards:
        return ", ".join(f"VRAM {card['free_mib']} of {card['total_mib']} MiB free" for card in cards)
    memory = health.get("memory") or {}
    if memory:
        return f"memory {memory['available_mib']} of {memory['total_mib']} MiB free"
    return "-"


def gpu_line(gpu: Mapping[str, Any]) -> str:
    """One card of a result of vram_health in one line."""
    name = f"GPU {gpu['index']} {gpu['name']}".rstrip()
    if gpu["error"]:
        return f"{name}: {gpu['error']}"
    parts = [f"{gpu['used_mib']} of {gpu['total_mib']} MiB used", f"{gpu['free_mib']} free"]
    if gpu["reserved_mib"]:
        parts.append(f"{gpu['reserved_mib']} reserved")
    if gpu["temperature_c"] is not None:
        parts.append(f"{gpu['temperature_c']} °C")
    return f"{name}: {', '.join(parts)}"


def finding_line(finding: Mapping[str, Any]) -> str:
    return f"{finding['severity']}: {finding['what']} ({finding['why']}). To do: {finding['remedy']}"


def _vram(used: Mapping[str, int | None], service: str) -> str:
    """What a service uses of the cards; `?` where it uses some and how much cannot be known."""
    if service not in used:
        return "-"
    return "?" if used[service] is None else f"{used[service]} MiB"


def has_card(name: str, infra: Mapping[str, Any], declared: bool) -> bool:
    """
    Was a card given to this instance? infra: a result of incus_infra or incus_infra_info; where neither ran,
    what infra.yml declares decides.
    """
    instances = infra.get("instances")
    if instances is None:
        return declared
    return any(item["name"] == name and item.get("gpu") for item in instances)


def _model(details: Mapping[str, Any]) -> str:
    if details.get("model"):
        extra = "/".join(str(details[key]) for key in ("compute_type", "device") if details.get(key))
        return f"{details['model']} ({extra})" if extra else str(details["model"])
    loaded = details.get("models")
    if isinstance(loaded, list):
        names = [
            str(item.get("name") or item.get("id")) if isinstance(item, dict) else str(item)
            for item in loaded
        ]
        return ", ".join(names) or "none loaded"
    return str(details["version"]) if details.get("version") else "-"


def status_table(
    instances: Sequence[Mapping[str, Any]], machines: Mapping[str, Mapping[str, Any]]
) -> list[str]:
    """
    One line per machine and service, then what is not as it should be with the VRAM.

    instances: of incus_infra_info (name, status, address, gpu); machines: host name to its variables, of
    which sottovoce_health (a result of service_health_info) and, of machines with a card, sottovoce_vram (of
    vram_health) are looked at.
    """
    rows: list[list[str]] = []
    notes: list[str] = []
    for instance in sorted(instances, key=lambda item: str(item["name"])):
        name = str(instance["name"])
        found = machines.get(name, {}).get("sottovoce_health") or {}
        vram = machines.get(name, {}).get("sottovoce_vram") or {}
        used = {unit["name"]: unit["used_mib"] for unit in vram.get("units") or [] if unit["used_mib"] != 0}
        notes += [f"{name}, VRAM, {finding_line(finding)}" for finding in vram.get("findings") or []]
        gpus = instance.get("gpu") or []
        head = [
            name,
            str(instance.get("status") or "-").lower(),
            str(instance.get("address") or "-"),
            ", ".join(gpus) if gpus else "-",
        ]
        room = _room(found, vram)
        for service in found.get("services") or [None]:
            if service is None:
                rows.append([*head, "-", "-", "-", "-", "-", room])
            else:
                details = service.get("details") or {}
                rows.append(
                    [
                        *head,
                        service["name"],
                        service["health"],
                        _model(details),
                        _mib(service["memory_mib"]),
                        _vram(used, service["name"]),
                        room,
                    ]
                )
            head, room = ["", "", "", ""], ""
    header = ["MACHINE", "STATE", "ADDRESS", "GPU", "SERVICE", "HEALTH", "MODEL", "IN USE", "VRAM", "FREE"]
    return table(header, rows) + notes
