# Copyright: (c) 2026, The sottovoce.stack contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What differs between a declared Incus object and the one that is there. Plain dicts only.

An object of ours carries two marks in its configuration: whose it is, and which of its keys were
declared when it was last written. Keys outside that record belong to the user or to Incus
(`volatile.*`, `image.*`): they stay. Keys in the record that are no longer declared go.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

MARK = "user.sottovoce.project"
RECORD = "user.sottovoce.managed"
OURS = (MARK, RECORD)

# Keys of a device that exclude each other: declaring one of a group drops the others.
_EXCLUSIVE: dict[str, tuple[frozenset[str], ...]] = {
    "nic": (frozenset({"network", "nictype"}), frozenset({"network", "parent"})),
    "gpu": (frozenset({"pci", "id"}), frozenset({"pci", "vendorid"}), frozenset({"pci", "productid"})),
}

# A running container takes all other keys at once.
_CONTAINER_RESTART = (
    "security.nesting",
    "security.privileged",
    "security.idmap.",
    "security.syscalls.",
    "nvidia.",
    "raw.",
    "linux.sysctl.",
    "limits.kernel.",
    "limits.hugepages.",
)
# A running virtual machine takes only these.
_VM_LIVE = (
    "user.",
    "boot.",
    "snapshots.",
    "cluster.",
    "cloud-init.",
    "environment.",
    "agent.",
    "security.protection.",
    "limits.memory",
    "limits.cpu",
)
_NIC_RESTART = frozenset({"network", "nictype", "parent", "name", "hwaddr", "ipv4.address", "ipv6.address"})

_SECRET_KEY = re.compile(r"(?i)(passw|secret|token|api_?key|private)")

Config = dict[str, str]
Devices = dict[str, dict[str, str]]


def text(value: Any) -> str:
    """A configuration value as Incus stores it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value)


def clean(config: Mapping[str, Any] | None) -> Config:
    """Strings only; Incus drops keys with an empty value, so an empty one is an absent one."""
    return {str(k): text(v) for k, v in (config or {}).items() if v is not None and text(v) != ""}


def clean_devices(devices: Mapping[str, Mapping[str, Any]] | None) -> Devices:
    return {str(name): clean(device) for name, device in (devices or {}).items()}


def owner(obj: Mapping[str, Any] | None) -> str | None:
    """The project_name that an object is marked with."""
    value = ((obj or {}).get("config") or {}).get(MARK)
    return str(value) if value else None


def record_of(obj: Mapping[str, Any] | None) -> dict[str, Any]:
    """What an earlier run declared on this object; empty if it was not one of ours."""
    raw = ((obj or {}).get("config") or {}).get(RECORD, "")
    try:
        data = json.loads(raw) if raw else {}
    except ValueError:
        data = {}
    if not isinstance(data, dict):
        data = {}
    config = data.get("config")
    devices = data.get("devices")
    image = data.get("image")
    return {
        "config": [str(k) for k in config] if isinstance(config, list) else [],
        "devices": {
            str(n): [str(k) for k in keys] if isinstance(keys, list) else []
            for n, keys in (devices if isinstance(devices, dict) else {}).items()
        },
        "image": str(image) if image else "",
    }


def make_record(
    config: Mapping[str, str], devices: Mapping[str, Mapping[str, str]] | None, image: str
) -> str:
    data: dict[str, Any] = {"config": sorted(k for k in config if k not in OURS)}
    if devices is not None:
        data["devices"] = {name: sorted(device) for name, device in sorted(devices.items())}
    if image:
        data["image"] = image
    return json.dumps(data, separators=(",", ":"), sort_keys=True)


def merge_config(current: Mapping[str, str], declared: Mapping[str, str], recorded: Iterable[str]) -> Config:
    merged = dict(current)
    for key in recorded:
        if key not in declared and key not in OURS and not key.startswith(("volatile.", "image.")):
            merged.pop(key, None)
    for key, value in declared.items():
        # `auto` was answered by the server when the object was made.
        if value == "auto" and current.get(key) not in (None, "", "none"):
            continue
        merged[key] = value
    return merged


def merge_devices(
    current: Mapping[str, Mapping[str, str]],
    declared: Mapping[str, Mapping[str, str]],
    recorded: Mapping[str, Iterable[str]],
) -> Devices:
    merged: Devices = {name: dict(device) for name, device in current.items()}
    for name in recorded:
        if name not in declared:
            merged.pop(name, None)
    for name, wanted in declared.items():
        there = merged.get(name, {})
        if there.get("type") != wanted.get("type"):
            merged[name] = dict(wanted)
            continue
        ours = set(recorded.get(name, ()))
        kept = {k: v for k, v in there.items() if k not in ours}
        for group in _EXCLUSIVE.get(wanted.get("type", ""), ()):
            if group & wanted.keys():
                kept = {k: v for k, v in kept.items() if k not in group}
        merged[name] = {**kept, **wanted}
    return merged


def rebuild(kind: str, current: Mapping[str, Any], target: Mapping[str, Any]) -> dict[str, Any]:
    """The writable part of `current` as it should be after `target` was applied to it.

    `target` has `description`, `config`, `mark` and, for what has them, `devices`, `profiles`, `image`.
    """
    record = record_of(current)
    declared = clean(target.get("config"))
    devices = clean_devices(target["devices"]) if "devices" in target else None
    config = merge_config(current.get("config") or {}, declared, record["config"])
    config[MARK] = str(target["mark"])
    # The image a machine was made from is a fact of the past: kept, not overwritten.
    config[RECORD] = make_record(declared, devices, record["image"] or str(target.get("image") or ""))
    after: dict[str, Any] = {"description": str(target.get("description") or ""), "config": config}
    if devices is not None:
        after["devices"] = merge_devices(current.get("devices") or {}, devices, record["devices"])
    if kind == "instance":
        after["profiles"] = list(target.get("profiles") or [])
        after["architecture"] = current.get("architecture", "")
        after["ephemeral"] = bool(current.get("ephemeral", False))
        after["stateful"] = bool(current.get("stateful", False))
    return after


def give_up_addresses(current: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """The writable part of an instance, its cards `names` without their static IPv4 address.

    Incus forgets the DHCP lease only when it takes the card out; another address alone leaves the old one
    leased, and the machine that should get it gets any. A change of boot.priority, which means nothing
    here, makes Incus take the card out and put it back, with its hardware address. The key is recorded as
    ours, so the next write drops it.
    """
    fields = ("architecture", "description", "ephemeral", "profiles", "stateful")
    config = dict(current.get("config") or {})
    devices: Devices = {name: dict(device) for name, device in (current.get("devices") or {}).items()}
    record = record_of(current)
    for name in names:
        device = devices.get(name)
        if device is None:
            continue
        device.pop("ipv4.address", None)
        key = "mtu" if "boot.priority" in device else "boot.priority"
        device[key] = "1500" if key == "mtu" else "1"
        recorded = {n: dict.fromkeys(keys, "") for n, keys in record["devices"].items()}
        recorded.setdefault(name, {})[key] = ""
        config[RECORD] = make_record(dict.fromkeys(record["config"], ""), recorded, record["image"])
        record = record_of({"config": config})
    return {**{k: current.get(k) for k in fields}, "config": config, "devices": devices}


def shown(key: str, value: Any) -> Any:
    """A value as people may see it."""
    if isinstance(value, str) and _SECRET_KEY.search(key):
        return "********"
    return value


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Every differing key by its dotted path, with the value before and after."""
    found: dict[str, dict[str, Any]] = {}

    def put(path: str, old: Any, new: Any) -> None:
        if old != new:
            found[path] = {"before": old, "after": new}

    put("description", before.get("description") or "", after.get("description") or "")
    if "profiles" in after:
        put("profiles", list(before.get("profiles") or []), list(after["profiles"]))
    old_config, new_config = before.get("config") or {}, after.get("config") or {}
    for key in sorted({*old_config, *new_config}):
        put(f"config.{key}", old_config.get(key), new_config.get(key))
    if "devices" in after:
        old_devices, new_devices = before.get("devices") or {}, after["devices"]
        for name in sorted({*old_devices, *new_devices}):
            old, new = old_devices.get(name) or {}, new_devices.get(name) or {}
            for key in sorted({*old, *new}):
                put(f"devices.{name}.{key}", old.get(key), new.get(key))
    return found


def visible(found: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The changes as they are reported: our bookkeeping only if nothing else changes, no secrets."""
    record = f"config.{RECORD}"
    rest = {k: v for k, v in found.items() if k != record} or dict(found)
    return {k: {"before": shown(k, v["before"]), "after": shown(k, v["after"])} for k, v in rest.items()}


def needs_restart(
    instance_type: str,
    config_before: Mapping[str, str],
    config_after: Mapping[str, str],
    devices_before: Mapping[str, Mapping[str, str]],
    devices_after: Mapping[str, Mapping[str, str]],
) -> list[str]:
    """The changed keys that a running instance does not take. Arguments are the expanded ones."""
    vm = instance_type == "virtual-machine"
    why: list[str] = []
    for key in sorted({*config_before, *config_after}):
        old, new = config_before.get(key), config_after.get(key)
        # A container's switch that is not there is off; some of a virtual machine's are on.
        same = old == new or (not vm and (old or "false") == (new or "false"))
        if same or key.startswith(("volatile.", "image.")):
            continue
        if (not key.startswith(_VM_LIVE)) if vm else key.startswith(_CONTAINER_RESTART):
            why.append(key)
    for name in sorted({*devices_before, *devices_after}):
        had, has = devices_before.get(name), devices_after.get(name)
        if had == has:
            continue
        kind = (has or had or {}).get("type")
        # A slice of a card is handed over by the runtime's hook, which runs at a start.
        if kind == "gpu" and (vm or "mig" in ((has or {}).get("gputype"), (had or {}).get("gputype"))):
            why.append(name)
        # A card that is plugged or pulled is seen at once; one that moves must ask for its address again.
        elif kind == "nic" and had and has:
            why.extend(f"{name}.{k}" for k in sorted(_NIC_RESTART) if had.get(k) != has.get(k))
    return why


def expand(
    own_config: Mapping[str, str],
    own_devices: Mapping[str, Mapping[str, str]],
    profiles: Iterable[Mapping[str, Any]],
) -> tuple[Config, Devices]:
    """Configuration and devices after the profiles, in their order, and then the instance's own."""
    config: Config = {}
    devices: Devices = {}
    for profile in profiles:
        config.update({k: v for k, v in (profile.get("config") or {}).items() if k not in OURS})
        devices.update({n: dict(d) for n, d in (profile.get("devices") or {}).items()})
    config.update(own_config)
    devices.update({n: dict(d) for n, d in own_devices.items()})
    return config, devices


def as_text(obj: Mapping[str, Any] | None) -> str:
    """An object as short YAML, for the diff: no bookkeeping, no volatile keys, no secrets."""
    if not obj:
        return ""
    lines: list[str] = []
    for key in ("type", "description", "image", "status"):
        if obj.get(key):
            lines.append(f"{key}: {obj[key]}")
    if obj.get("profiles"):
        lines.append(f"profiles: [{', '.join(obj['profiles'])}]")
    config = {
        k: v
        for k, v in (obj.get("config") or {}).items()
        if k != RECORD and not k.startswith(("volatile.", "image."))
    }
    if config:
        lines.append("config:")
        lines += [f"  {k}: {_scalar(shown(k, config[k]))}" for k in sorted(config)]
    devices = obj.get("devices") or {}
    if devices:
        lines.append("devices:")
        for name in sorted(devices):
            lines.append(f"  {name}:")
            lines += [f"    {k}: {_scalar(devices[name][k])}" for k in sorted(devices[name])]
    return "\n".join(lines) + "\n" if lines else ""


def _scalar(value: Any) -> str:
    line = str(value)
    return json.dumps(line) if "\n" in line or line != line.strip() or line in ("", "~") else line
