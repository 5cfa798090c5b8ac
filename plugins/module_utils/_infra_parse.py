# Copyright: (c) 2026, The sottovoce.stack contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""infra.yml, as one file or as a folder, into an `Infra`. Every problem is collected, none raises early."""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from ansible_collections.sottovoce.stack.plugins.module_utils import _infra_schema as schema
from ansible_collections.sottovoce.stack.plugins.module_utils._infra_schema import (
    Devices,
    Domain,
    Gpu,
    Infra,
    InfraError,
    Machine,
    Place,
    Policy,
    Problem,
    Profile,
    SharedVolume,
    Volume,
    did_you_mean,
)
from ansible_collections.sottovoce.stack.plugins.module_utils._infra_yaml import (
    Node,
    compose,
    entries,
    is_null,
    kind_of,
    plain_value,
    scalar_value,
)

T = TypeVar("T")
Fields = dict[str, Node]
Read = Callable[[str], bytes]

_PCI = re.compile(r"(?:([0-9a-f]{4}|0000[0-9a-f]{4}):)?([0-9a-f]{2}):([01][0-9a-f])\.([0-7])")
# A slice by its UUID (newer drivers; older ones name card, instance and compute instance), or its profile.
_MIG = re.compile(r"MIG-[0-9A-Za-z-]+(/[0-9]+/[0-9]+)?|([0-9]c\.)?[0-9]g\.[0-9]+gb(\+me)?")
_UUID = re.compile(r"GPU-[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
_SIZE = re.compile(r"[1-9][0-9]*(B|kB|MB|GB|TB|PB|EB|KiB|MiB|GiB|TiB|PiB|EiB)?")
_CRON = re.compile(r"(\S+\s+){4}\S+")
_CRON_ALIASES = (
    "@annually",
    "@daily",
    "@hourly",
    "@midnight",
    "@monthly",
    "@startup",
    "@weekly",
    "@yearly",
    "@never",
)
_EXPIRY = re.compile(r"([1-9][0-9]*)([dhmwyHM])")
_TARGET = re.compile(r"@?[A-Za-z0-9][A-Za-z0-9._-]*")
_POOL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
# What the plugin computes from the document cannot be set a second time through `vars`.
_COMPUTED = re.compile(
    r"instance_.*|domain_.*|incus_(project|network|profiles)|ansible_incus_(project|instance)|sottovoce_.*"
)


def _read(path: str) -> bytes:
    with open(path, "rb") as stream:
        return stream.read(64 * 1024 * 1024 + 1)


def normal_pci(text: str) -> str | None:
    """A PCI address in the form Incus uses: lower case, four digits of domain. None if it is none."""
    match = _PCI.fullmatch(text.strip().lower())
    if match is None:
        return None
    domain, bus, device, function = match.groups()
    return f"{(domain or '0000')[-4:]}:{bus}:{device}.{function}"


def looks_like_cdi(text: str) -> bool:
    """nvidia.com/gpu=0 and its kind: names of the Container Device Interface."""
    return bool(re.match(r"[A-Za-z0-9.-]+\.[A-Za-z]+/[A-Za-z0-9._-]+([=:].*)?$", text))


class _Reader:
    """Turns nodes into values and writes down what is wrong with them."""

    def __init__(self, infra: Infra) -> None:
        self.infra = infra
        self.problems = infra.problems

    def wrong(self, node: Node, path: str, message: str) -> None:
        self.problems.append(Problem(node.file, node.line, path, message))

    def ignore(self, level: str, key: str, name: str) -> None:
        self.infra.ignored.setdefault(f"{level} {key}".strip(), []).append(name)

    # Containers

    def mapping(self, node: Node, path: str, what: str = "a mapping") -> dict[str, tuple[Node, Node]]:
        if is_null(node):
            return {}
        if node.kind != "mapping":
            self.wrong(node, path, f"must be {what}, not {kind_of(node)}")
            return {}
        return entries(node, path, self.problems)

    def fields(
        self,
        node: Node,
        path: str,
        known: Iterable[str],
        ignored: Iterable[str] = (),
        level: str = "",
        name: str = "",
    ) -> tuple[Fields, dict[str, Place]]:
        """A mapping whose keys are known. A key without a value counts as not there."""
        found: Fields = {}
        places: dict[str, Place] = {}
        for key, (key_node, value) in self.mapping(node, path).items():
            if key in known:
                if not is_null(value):
                    found[key] = value
                    places[key] = Place(key_node.file, key_node.line, f"{path}.{key}" if path else key)
            elif key in ignored:
                self.ignore(level, key, name)
            else:
                hint = did_you_mean(key, [*known, *ignored]) or f"; known here: {', '.join(sorted(known))}"
                self.wrong(key_node, f"{path}.{key}" if path else key, f"unknown key{hint}")
        return found, places

    def sequence(self, node: Node, path: str, of: str) -> list[Node]:
        if is_null(node):
            return []
        if node.kind != "sequence":
            self.wrong(node, path, f"must be a list of {of}, not {kind_of(node)}")
            return []
        return list(node.value)

    # Scalars

    def text(
        self, node: Node, path: str, what: str = "text", *, empty: bool = False, loose: bool = False
    ) -> str | None:
        """A string. `loose` takes numbers as they were written, for names like 1 or addresses like 10.100."""
        value = scalar_value(node) if node.kind == "scalar" else None
        if isinstance(value, str) or (
            loose and isinstance(value, (int, float)) and not isinstance(value, bool)
        ):
            text = str(node.value)
            if empty or text.strip():
                return text
            self.wrong(node, path, f"must be {what}, not empty")
            return None
        quote = f' (write "{node.value}" in quotes)' if node.kind == "scalar" and value is not None else ""
        self.wrong(node, path, f"must be {what}, not {kind_of(node)}{quote}")
        return None

    def boolean(self, node: Node, path: str) -> bool | None:
        value = scalar_value(node) if node.kind == "scalar" else None
        if isinstance(value, bool):
            return value
        self.wrong(node, path, f"must be true or false, not {kind_of(node)}")
        return None

    def integer(self, node: Node, path: str, low: int, high: int | None) -> int | None:
        value = scalar_value(node) if node.kind == "scalar" else None
        span = (
            f"a whole number from {low} to {high}"
            if high is not None
            else f"a whole number of at least {low}"
        )
        if (
            isinstance(value, int)
            and not isinstance(value, bool)
            and value >= low
            and (high is None or value <= high)
        ):
            return value
        self.wrong(node, path, f"must be {span}, not {kind_of(node)}")
        return None

    def choice(self, node: Node, path: str, choices: Iterable[str]) -> str | None:
        options = list(choices)
        value = scalar_value(node) if node.kind == "scalar" else None
        if isinstance(value, str) and value in options:
            return value
        hint = did_you_mean(value, options) if isinstance(value, str) else ""
        self.wrong(node, path, f"must be one of {', '.join(options)}, not {kind_of(node)}{hint}")
        return None

    def absolute(self, node: Node, path: str) -> str | None:
        value = self.text(node, path, "an absolute path")
        if value is None:
            return None
        if not value.startswith("/") or "\0" in value or "/../" in f"{value}/":
            self.wrong(node, path, f"must be an absolute path, not {value!r}")
            return None
        return value.rstrip("/") or "/"

    def matching(self, node: Node, path: str, pattern: re.Pattern[str], what: str) -> str | None:
        value = self.text(node, path, what, loose=True)
        if value is not None and not pattern.fullmatch(value):
            self.wrong(node, path, f"must be {what}, not {kind_of(node)}")
            return None
        return value

    def name(self, key: Node, text: str, path: str, what: str) -> bool:
        if not schema.NAME.fullmatch(text):
            self.wrong(key, path, f"{text!r} is no name for a {what}: {schema.NAME_RULE}")
            return False
        if len(text) > schema.NAME_LIMIT:
            self.wrong(
                key, path, f"a {what}'s name has at most {schema.NAME_LIMIT} characters, this one {len(text)}"
            )
            return False
        if text.isdigit() and what in ("machine", "domain"):
            self.wrong(key, path, f"{text!r} is no name for a {what}: it must not be a number")
            return False
        return True

    # Pieces of Incus configuration

    def incus_value(self, node: Node, path: str) -> str | None:
        """A configuration value as Incus keeps it: text. Numbers stay as they were written."""
        if node.kind != "scalar":
            self.wrong(node, path, f"must be text, a number or a boolean, not {kind_of(node)}")
            return None
        value = scalar_value(node)
        if value is None:
            self.wrong(node, path, "has no value")
            return None
        if isinstance(value, bool):
            return str(value).lower()
        return str(node.value)

    def config(self, node: Node, path: str) -> dict[str, str]:
        found: dict[str, str] = {}
        for key, (key_node, value) in self.mapping(node, path, "a mapping of Incus options").items():
            if not key or any(c.isspace() for c in key):
                self.wrong(key_node, path, f"{key!r} is no Incus option")
                continue
            text = self.incus_value(value, f"{path}.{key}")
            if text is not None:
                found[key] = text
        return found

    def devices(self, node: Node, path: str) -> Devices:
        found: Devices = {}
        for name, (key_node, value) in self.mapping(node, path, "a mapping of Incus devices").items():
            where = f"{path}.{name}"
            if not name or len(name) > 63 or "/" in name or any(c.isspace() for c in name):
                self.wrong(key_node, where, f"{name!r} is no name for a device")
                continue
            if value.kind != "mapping":
                self.wrong(value, where, f"must be a mapping with a type, not {kind_of(value)}")
                continue
            device: dict[str, str] = {}
            fine = True
            for key, (_key, option) in self.mapping(value, where).items():
                text = self.incus_value(option, f"{where}.{key}")
                if text is None:
                    fine = False
                else:
                    device[key] = text
            kind = device.get("type")
            if kind is None:
                if fine:
                    self.wrong(key_node, where, f"type is missing (one of {', '.join(schema.DEVICE_TYPES)})")
                continue
            if kind not in schema.DEVICE_TYPES:
                self.wrong(
                    value,
                    f"{where}.type",
                    f"no Incus device type {kind!r}{did_you_mean(kind, schema.DEVICE_TYPES)}",
                )
                continue
            if kind == "gpu" and not self.gpu_device(value, device, where):
                continue
            if fine:
                found[name] = device
        return found

    def gpu_device(self, node: Node, device: dict[str, str], path: str) -> bool:
        for key in ("id", "pci", "mig.uuid", "vendorid", "productid", "mdev"):
            if looks_like_cdi(device.get(key, "")):
                self.cdi(node, f"{path}.{key}", device[key])
                return False
        if "pci" in device:
            pci = normal_pci(device["pci"])
            if pci is None:
                self.wrong(node, f"{path}.pci", f"{device['pci']!r} is no PCI address (like 0000:01:00.0)")
                return False
            device["pci"] = pci
        return True

    def cdi(self, node: Node, path: str, text: str) -> None:
        self.wrong(
            node,
            path,
            f"{text!r} is a CDI name, which Incus does not know; write the card's PCI address (like "
            "0000:01:00.0, see `incus info --resources`) or gpu: {uuid: GPU-…}",
        )

    def volumes(self, node: Node, path: str, known: Iterable[str], need_path: bool) -> dict[str, Volume]:
        found: dict[str, Volume] = {}
        for name, (key_node, value) in self.mapping(node, path, "a mapping of volumes").items():
            where = f"{path}.{name}"
            if not self.name(key_node, name, where, "volume"):
                continue
            before = len(self.problems)
            body, _places = self.fields(value, where, known)
            mount = self.absolute(body["path"], f"{where}.path") if "path" in body else None
            if mount == "/":
                self.wrong(body["path"], f"{where}.path", "the root of a machine is not a place for a volume")
            if mount is None and need_path and "path" not in body:
                self.wrong(key_node, where, "path is missing: where the volume is mounted in the machine")
            volume = Volume(
                path=mount,
                size=self.optional(
                    body, "size", where, lambda n, p: self.matching(n, p, _SIZE, "a size like 10GiB")
                ),
                pool=self.optional(
                    body, "pool", where, lambda n, p: self.matching(n, p, _POOL, "a storage pool")
                ),
                readonly=bool(self.optional(body, "readonly", where, self.boolean)),
            )
            if len(self.problems) == before:
                found[name] = volume
        return found

    def optional(self, body: Fields, key: str, path: str, read: Callable[[Node, str], T | None]) -> T | None:
        node = body.get(key)
        return None if node is None else read(node, f"{path}.{key}" if path else key)

    # The levels of the document

    def gpu(self, node: Node, path: str) -> Gpu | None:
        if node.kind == "scalar":
            value = scalar_value(node)
            if isinstance(value, bool):
                return Gpu() if value else None
            if isinstance(value, str) and looks_like_cdi(value):
                self.cdi(node, path, value)
                return None
            self.wrong(
                node,
                path,
                f"must be true, false or a mapping ({', '.join(schema.GPU_KEYS)}), not {kind_of(node)}",
            )
            return None
        if node.kind != "mapping":
            self.wrong(
                node,
                path,
                f"must be true, false or a mapping ({', '.join(schema.GPU_KEYS)}), not {kind_of(node)}",
            )
            return None
        body, _places = self.fields(node, path, schema.GPU_KEYS)
        chosen = [key for key in ("pci", "uuid", "count", "all", "mig") if key in body]
        if len(chosen) > 1 and set(chosen) != {"pci", "mig"}:
            self.wrong(
                node,
                path,
                "choose the card by one of pci, uuid, count, all, mig (mig and pci go together), not by "
                f"{' and '.join(chosen)}",
            )
        pci = self.optional(body, "pci", path, self.pci)
        uuid = self.optional(body, "uuid", path, self.uuid)
        count = self.optional(body, "count", path, lambda n, p: self.integer(n, p, 1, 64))
        every = self.optional(body, "all", path, self.boolean)
        mig = self.optional(body, "mig", path, self.mig)
        optional = self.optional(body, "optional", path, self.boolean)
        return Gpu(pci, uuid, count, bool(optional), bool(every), mig)

    def pci(self, node: Node, path: str) -> str | None:
        # 01:00.0 unquoted is a number in base 60 to YAML: what was written counts.
        text = self.text(node, path, "a PCI address like 0000:01:00.0", loose=True)
        if text is None:
            return None
        if looks_like_cdi(text):
            self.cdi(node, path, text)
            return None
        pci = normal_pci(text)
        if pci is None:
            self.wrong(node, path, f"{text!r} is no PCI address (like 0000:01:00.0)")
        return pci

    def uuid(self, node: Node, path: str) -> str | None:
        text = self.text(node, path, "the UUID of a card")
        if text is None:
            return None
        if looks_like_cdi(text):
            self.cdi(node, path, text)
            return None
        if text.startswith("MIG-"):
            self.wrong(node, path, f"{text!r} is a MIG slice, not a card; write gpu: {{mig: {text}}}")
            return None
        if not _UUID.fullmatch(text):
            self.wrong(node, path, f"{text!r} is no UUID of a card (GPU-…, see `nvidia-smi -L`)")
            return None
        return text

    def mig(self, node: Node, path: str) -> str | None:
        text = self.text(node, path, "a MIG slice")
        if text is None:
            return None
        if looks_like_cdi(text):
            self.cdi(node, path, text)
            return None
        if not _MIG.fullmatch(text):
            self.wrong(
                node,
                path,
                f"{text!r} is neither the UUID of a MIG slice (MIG-…, see `nvidia-smi -L`) nor a profile "
                "like 1g.5gb",
            )
            return None
        return text

    def profiles(self, node: Node, path: str) -> dict[str, Profile]:
        found: dict[str, Profile] = {}
        for name, (key_node, value) in self.mapping(node, path, "a mapping of profiles").items():
            where = f"{path}.{name}"
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name):
                self.wrong(key_node, where, f"{name!r} is no name for a profile")
                continue
            body, _places = self.fields(value, where, schema.PROFILE_KEYS)
            found[name] = Profile(
                description=self.optional(body, "description", where, self.description) or "",
                config=self.config(body["config"], f"{where}.config") if "config" in body else {},
                devices=self.devices(body["devices"], f"{where}.devices") if "devices" in body else {},
            )
        return found

    def description(self, node: Node, path: str) -> str | None:
        return self.text(node, path, empty=True)

    def image(self, node: Node, path: str) -> str | None:
        return self.matching(node, path, re.compile(r"\S+"), "an image like images:debian/13")

    def schedule(self, node: Node, path: str) -> str | None:
        value = self.text(node, path, "a cron expression like '0 2 * * *'")
        if value is None:
            return None
        parts = [part.strip() for part in value.split(", ")]
        if _CRON.fullmatch(value.strip()) or all(p in _CRON_ALIASES for p in parts):
            return value.strip()
        hint = did_you_mean(value, _CRON_ALIASES)
        self.wrong(
            node, path, f"must be a cron expression of five fields or one of @daily …, not {value!r}{hint}"
        )
        return None

    def expiry(self, node: Node, path: str) -> str | None:
        value = self.text(node, path, "a time like 30d")
        if value is None:
            return None
        match = _EXPIRY.fullmatch(value)
        if match is None:
            self.wrong(node, path, f"must be a time like 30d, 24h, 60m (minutes), 2w or 1y, not {value!r}")
            return None
        # Incus writes hours and minutes in capitals; its m is a month.
        return match[1] + {"h": "H", "m": "M"}.get(match[2], match[2])

    def ip(self, node: Node, path: str) -> str | None:
        value = self.text(node, path, "an IPv4 address", loose=True)
        if value is None:
            return None
        try:
            return str(ipaddress.IPv4Address(value))
        except ValueError:
            self.wrong(node, path, f"{value!r} is no IPv4 address")
            return None

    def role_list(self, node: Node, path: str, machine: str) -> list[str]:
        infra = self.infra
        found: list[str] = []
        for i, item in enumerate(self.sequence(node, path, "role names")):
            where = f"{path}[{i}]"
            role = self.text(item, where, "the name of a role")
            if role is None:
                continue
            role = role.removeprefix(schema.COLLECTION)
            if role in schema.FOREIGN_ROLES and role not in infra.local_roles:
                self.ignore("role", role, machine)
            elif role not in schema.OWN_ROLES and role not in infra.local_roles:
                known = [*schema.OWN_ROLES, *sorted(infra.local_roles), *sorted(schema.FOREIGN_ROLES)]
                hint = (
                    did_you_mean(role, known)
                    or f"; known: {', '.join([*schema.OWN_ROLES, *sorted(infra.local_roles)])}"
                )
                self.wrong(
                    item,
                    where,
                    f"unknown role {role!r} (roles of your own belong in roles/ beside this file){hint}",
                )
                continue
            if role not in found:
                found.append(role)
        return found

    def variables(self, node: Node, path: str) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, (key_node, value) in self.mapping(node, path, "a mapping of variables").items():
            where = f"{path}.{key}"
            if not schema.VARIABLE.fullmatch(key):
                self.wrong(key_node, where, f"{key!r} is no name for a variable (letters, digits and '_')")
            elif _COMPUTED.fullmatch(key):
                self.wrong(key_node, where, "is computed from this document and cannot be set here")
            else:
                found[key] = plain_value(value, where, self.problems)
        return found

    def machine(self, name: str, key: Node, node: Node, path: str) -> Machine:
        body, places = self.fields(node, path, schema.MACHINE_KEYS, schema.MACHINE_IGNORED, "machine", name)
        machine = Machine(name, Place(key.file, key.line, path), places)
        for field, value in body.items():
            where = f"{path}.{field}"
            match field:
                case "description":
                    machine.description = self.description(value, where) or ""
                case "type":
                    machine.type = self.choice(value, where, ("lxc", "vm")) or "lxc"
                case "ip":
                    machine.ip = self.ip(value, where)
                case "gpu":
                    machine.gpu = self.gpu(value, where)
                case "profiles":
                    listed = [
                        self.text(item, f"{where}[{i}]", "the name of a profile")
                        for i, item in enumerate(self.sequence(value, where, "profile names"))
                    ]
                    machine.profiles = list(dict.fromkeys(p for p in listed if p is not None))
                case "config":
                    machine.config = self.config(value, where)
                case "devices":
                    machine.devices = self.devices(value, where)
                case "storage_volumes":
                    machine.storage_volumes = self.volumes(value, where, schema.VOLUME_KEYS, False)
                case "persistent_data":
                    machine.persistent_data = self.volumes(value, where, schema.PERSISTENT_KEYS, True)
                case "ephemeral":
                    machine.ephemeral = self.boolean(value, where)
                case "boot_autostart":
                    machine.boot_autostart = self.boolean(value, where)
                case "boot_priority":
                    machine.boot_priority = self.integer(value, where, 0, 100)
                case "snapshots_schedule":
                    machine.snapshots_schedule = self.schedule(value, where)
                case "snapshots_expiry":
                    machine.snapshots_expiry = self.expiry(value, where)
                case "os_image":
                    machine.os_image = self.image(value, where)
                case "roles":
                    machine.roles = self.role_list(value, where, name)
                case "target":
                    machine.target = self.matching(value, where, _TARGET, "a cluster member or @group")
                case "vars":
                    machine.vars = self.variables(value, where)
                case "wiring":
                    machine.wiring = self.boolean(value, where)
        return machine

    def domain(self, name: str, key: Node, node: Node, path: str) -> Domain:
        body, places = self.fields(node, path, schema.DOMAIN_KEYS, schema.DOMAIN_IGNORED, "domain", name)
        domain = Domain(name, Place(key.file, key.line, path), places)
        for field, value in body.items():
            where = f"{path}.{field}"
            match field:
                case "description":
                    domain.description = self.description(value, where) or ""
                case "enabled":
                    domain.enabled = self.boolean(value, where) is not False
                case "trust_level":
                    domain.trust_level = self.choice(value, where, schema.ZONES) or schema.DEFAULT_TRUST
                case "subnet_id":
                    domain.subnet_id = self.integer(value, where, 0, 254)
                case "ephemeral":
                    domain.ephemeral = bool(self.boolean(value, where))
                case "profiles":
                    domain.profiles = self.profiles(value, where)
                case "bridge":
                    domain.bridge = self.bridge(value, where)
                case "wiring":
                    domain.wiring = self.boolean(value, where)
        if "machines" in body:
            self.machines(domain, body["machines"], f"{path}.machines")
        return domain

    def bridge(self, node: Node, path: str) -> str | None:
        value = self.matching(
            node, path, schema.BRIDGE, "the name of a bridge (letters, digits, '-', '_', '.')"
        )
        if value is not None and len(value) > schema.BRIDGE_LIMIT:
            self.wrong(
                node,
                path,
                f"{value!r} has {len(value)} characters; Linux allows {schema.BRIDGE_LIMIT} for a bridge",
            )
            return None
        return value

    def machines(self, domain: Domain, node: Node, path: str) -> None:
        for name, (key, value) in self.mapping(node, path, "a mapping of machines").items():
            self.infra.machine_names.add(name)
            where = f"{path}.{name}"
            if value.kind != "mapping" and not is_null(value):
                self.wrong(value, where, f"must be a mapping, not {kind_of(value)}")
                continue
            fine = self.name(key, name, where, "machine")
            machine = self.machine(name, key, value, where)
            if fine:
                domain.machines[name] = machine

    def domains(self, pairs: dict[str, tuple[Node, Node]], prefix: str) -> None:
        for name, (key, value) in pairs.items():
            path = f"domains.{name}"
            if name in self.infra.domain_names:
                first = self.infra.domains.get(name)
                seen = f" (first in {first.place.file}, line {first.place.line})" if first else ""
                self.wrong(key, path, f"the domain {name!r} is there twice{seen}")
                continue
            self.infra.domain_names.add(name)
            if value.kind != "mapping" and not is_null(value):
                self.wrong(value, path, f"must be a mapping, not {kind_of(value)}")
                continue
            fine = self.name(key, name, path, "domain")
            domain = self.domain(name, key, value, path)
            if not fine:
                continue
            if (
                domain.bridge is None
                and "bridge" not in domain.places
                and len(domain.network) > schema.BRIDGE_LIMIT
            ):
                room = schema.BRIDGE_LIMIT - len(schema.BRIDGE_PREFIX)
                self.wrong(
                    key,
                    path,
                    f"its bridge {domain.network!r} has {len(domain.network)} characters, Linux allows "
                    f"{schema.BRIDGE_LIMIT}: shorten the domain's name to {room} characters, or name "
                    "the bridge yourself (bridge: net-…)",
                )
            self.infra.domains[name] = domain

    def globals(self, node: Node) -> None:
        infra = self.infra
        body, _places = self.fields(node, "global", schema.GLOBAL_KEYS, schema.GLOBAL_IGNORED, "global")
        for field, value in body.items():
            where = f"global.{field}"
            match field:
                case "addressing":
                    self.addressing(value, where)
                case "base_subnet":
                    infra.base_subnet = self.base_subnet(value, where)
                case "default_os_image":
                    infra.default_os_image = self.image(value, where) or infra.default_os_image
                case "gpu_policy":
                    # A wrong word must not bring the policy's own errors with it.
                    infra.gpu_policy = self.choice(value, where, ("exclusive", "shared")) or "shared"
                case "default_user":
                    infra.default_user = (
                        self.matching(value, where, re.compile(r"[a-z_][a-z0-9_-]*\$?"), "the name of a user")
                        or infra.default_user
                    )
                case "wiring":
                    infra.wiring = self.boolean(value, where) is not False
                case "shared_volumes_base":
                    infra.shared_volumes_base = self.absolute(value, where)
                case "persistent_data_base":
                    infra.persistent_data_base = self.absolute(value, where)
        if "addressing" in body and "base_subnet" in body:
            self.wrong(
                body["base_subnet"],
                "global.base_subnet",
                "cannot stand beside global.addressing; keep one of them",
            )

    def addressing(self, node: Node, path: str) -> None:
        infra = self.infra
        body, _places = self.fields(node, path, schema.ADDRESSING_KEYS)
        if "base_octet" in body:
            octet = self.integer(body["base_octet"], f"{path}.base_octet", 0, 255)
            if octet not in (None, 10):
                self.wrong(
                    body["base_octet"],
                    f"{path}.base_octet",
                    f"must be 10, the private network of that size, not {octet}",
                )
        base = self.optional(body, "zone_base", path, lambda n, p: self.integer(n, p, 0, 245))
        step = self.optional(body, "zone_step", path, lambda n, p: self.integer(n, p, 1, 51))
        infra.zone_base = infra.zone_base if base is None else base
        infra.zone_step = infra.zone_step if step is None else step

    def base_subnet(self, node: Node, path: str) -> str | None:
        # Unquoted, 10.100 is a number to YAML: what was written counts.
        text = self.text(node, path, 'two octets like "10.100"', loose=True)
        if text is None:
            return None
        try:
            network = ipaddress.IPv4Network(f"{text}.0.0/16") if text.count(".") == 1 else None
        except ValueError:
            network = None
        if network is None:
            self.wrong(node, path, f'must be two octets like "10.100", not {text!r}')
            return None
        if not any(
            network.subnet_of(ipaddress.IPv4Network(private))
            for private in ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16")
        ):
            self.wrong(
                node, path, f"{network} is no private network (10.0 to 10.255, 172.16 to 172.31, 192.168)"
            )
            return None
        return text

    def policies(self, node: Node, path: str) -> None:
        for i, item in enumerate(self.sequence(node, path, "policies")):
            where = f"{path}[{i}]"
            if item.kind != "mapping":
                self.wrong(item, where, f"must be a mapping, not {kind_of(item)}")
                continue
            before = len(self.problems)
            body, _places = self.fields(item, where, schema.POLICY_KEYS)
            ends: dict[str, str] = {}
            for end in ("from", "to"):
                if end not in body:
                    self.wrong(item, where, f"{end} is missing: a domain, a machine or host")
                    continue
                text = self.text(body[end], f"{where}.{end}", "a domain, a machine or host")
                ends[end] = text or ""
            ports: tuple[int, ...] | str = "all"
            if "ports" in body:
                ports = self.ports(body["ports"], f"{where}.ports")
            policy = Policy(
                place=Place(item.file, item.line, where),
                source=ends.get("from", ""),
                to=ends.get("to", ""),
                description=self.optional(body, "description", where, self.description) or "",
                ports=ports,
                protocol=self.optional(
                    body, "protocol", where, lambda n, p: self.choice(n, p, ("tcp", "udp"))
                ),
                bidirectional=bool(self.optional(body, "bidirectional", where, self.boolean)),
            )
            if len(self.problems) == before:
                self.infra.policies.append(policy)

    def ports(self, node: Node, path: str) -> tuple[int, ...] | str:
        if node.kind == "scalar":
            if scalar_value(node) == "all":
                return "all"
            self.wrong(node, path, f"must be a list of port numbers or all, not {kind_of(node)}")
            return "all"
        numbers = [
            self.integer(item, f"{path}[{i}]", 1, 65535)
            for i, item in enumerate(self.sequence(node, path, "port numbers"))
        ]
        return tuple(n for n in numbers if n is not None)

    def shared_volumes(self, node: Node, path: str) -> None:
        for name, (key, value) in self.mapping(node, path, "a mapping of volumes").items():
            where = f"{path}.{name}"
            if name in self.infra.shared_volumes:
                self.wrong(key, where, f"the shared volume {name!r} is there twice")
                continue
            if not self.name(key, name, where, "volume"):
                continue
            before = len(self.problems)
            body, _places = self.fields(value, where, schema.SHARED_KEYS)
            if "propagate" in body and self.boolean(body["propagate"], f"{where}.propagate"):
                self.ignore("shared volume", "propagate", name)
            consumers: dict[str, tuple[str, Place]] = {}
            if "consumers" in body:
                for who, (who_node, access) in self.mapping(body["consumers"], f"{where}.consumers").items():
                    at = f"{where}.consumers.{who}"
                    mode = self.choice(access, at, ("ro", "rw"))
                    consumers[who] = (mode or "ro", Place(who_node.file, who_node.line, at))
            if not consumers and len(self.problems) == before:
                at_node = body.get("consumers", key)
                self.wrong(
                    at_node, where, "consumers is missing: a mapping of domains or machines to ro or rw"
                )
            shift = self.optional(body, "shift", where, self.boolean)
            volume = SharedVolume(
                name=name,
                place=Place(key.file, key.line, where),
                source=self.optional(body, "source", where, self.absolute),
                path=self.optional(body, "path", where, self.absolute) or f"/shared/{name}",
                shift=shift is not False,
                consumers=consumers,
                size=self.optional(
                    body, "size", where, lambda n, p: self.matching(n, p, _SIZE, "a size like 10GiB")
                ),
                pool=self.optional(
                    body, "pool", where, lambda n, p: self.matching(n, p, _POOL, "a storage pool")
                ),
            )
            if volume.source and (volume.size or volume.pool):
                self.wrong(
                    key, where, "source is a folder of the host: size and pool belong to a volume of Incus"
                )
            if len(self.problems) == before:
                self.infra.shared_volumes[name] = volume


def _no_mapping(root: Node | None, file: str, path: str = "") -> Problem | None:
    if root is None or is_null(root):
        return Problem(file, 0, path, "the file is empty")
    if root.kind != "mapping":
        return Problem(file, root.line, path, f"must be a mapping (key: value), not {kind_of(root)}")
    return None


def _member(file: str, folder: str) -> str:
    """A short name for messages, relative to where the document lives."""
    return os.path.relpath(file, folder)


def local_roles(folder: str) -> frozenset[str]:
    """The roles that Ansible finds beside the document."""
    try:
        with os.scandir(os.path.join(folder, "roles")) as found:
            return frozenset(
                entry.name for entry in found if entry.is_dir() and not entry.name.startswith(".")
            )
    except OSError:
        return frozenset()


def is_folder_form(path: str) -> bool:
    """base.yml with its domains/ or policies.yml beside it."""
    folder = os.path.dirname(path)
    return os.path.basename(path) in ("base.yml", "base.yaml") and (
        os.path.isdir(os.path.join(folder, "domains")) or bool(_first(folder, "policies"))
    )


def _first(folder: str, stem: str) -> str | None:
    for suffix in (".yml", ".yaml"):
        path = os.path.join(folder, stem + suffix)
        if os.path.isfile(path):
            return path
    return None


def find(path: str) -> str:
    """The main file of what a user names: a file, or a folder that holds infra.yml or base.yml."""
    if not os.path.isdir(path):
        return path
    found = _first(path, "infra") or _first(path, "base")
    if found is None:
        raise InfraError(path, [Problem(path, 0, "", "holds neither infra.yml nor base.yml")])
    return found


def _load_tree(path: str, name: str, read: Read, problems: list[Problem]) -> Node | None:
    try:
        return compose(read(path), name)
    except InfraError as error:
        problems.extend(error.problems)
    except OSError as error:
        problems.append(Problem(name, 0, "", f"cannot be read: {error.strerror or error}"))
    return None


def parse_text(text: str | bytes, *, name: str = "infra.yml", roles: Iterable[str] = ()) -> Infra:
    """One document from memory. Problems are in the result."""
    data = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
    infra = Infra(source=name, files=[name], place=Place(name), local_roles=frozenset(roles))
    before = len(infra.problems)
    root = None
    try:
        root = compose(data, name)
    except InfraError as error:
        infra.problems.extend(error.problems)
    if len(infra.problems) == before:
        _document(infra, root, name)
    return infra


def parse(path: str, *, read: Read = _read) -> Infra:
    """The document at `path`: a file, base.yml of the folder form, or a folder that holds either."""
    main = find(path)
    folder = os.path.dirname(os.path.abspath(main))
    name = os.path.basename(main)
    infra = Infra(
        source=os.path.abspath(main), files=[main], place=Place(name), local_roles=local_roles(folder)
    )
    before = len(infra.problems)
    root = _load_tree(main, name, read, infra.problems)
    folder_form = is_folder_form(os.path.abspath(main))
    if len(infra.problems) == before:
        _document(infra, root, name, folder_form)
    if folder_form:
        _members(infra, folder, read)
    return infra


def _document(infra: Infra, root: Node | None, name: str, folder_form: bool = False) -> None:
    broken = _no_mapping(root, name)
    if broken or root is None:
        infra.problems.append(broken or Problem(name, 0, "", "the file is empty"))
        return
    reader = _Reader(infra)
    pairs = entries(root, "", infra.problems)
    if _is_list(pairs.get("domains")) and "live_os" in pairs:
        infra.problems.append(
            Problem(
                name,
                root.line,
                "",
                "this describes a live image of AnKLuMe, not machines; its domains are a list",
            )
        )
        return
    for key, (key_node, _value) in pairs.items():
        if key not in schema.TOP_KEYS:
            hint = did_you_mean(key, schema.TOP_KEYS) or f"; known here: {', '.join(schema.TOP_KEYS)}"
            reader.wrong(key_node, key, f"unknown key{hint}")
    # `global:` and `domains:` may be there without a value: nothing set, no domain yet.
    needed = ["project_name", "global"] if folder_form else ["project_name", "global", "domains"]
    for key in needed:
        if key not in pairs or (key == "project_name" and is_null(pairs[key][1])):
            infra.problems.append(
                Problem(name, root.line, key, "is missing (project_name, global and domains are required)")
            )
    if "plugin" in pairs:
        plugin = reader.text(pairs["plugin"][1], "plugin")
        if plugin not in (None, schema.PLUGIN):
            reader.wrong(pairs["plugin"][1], "plugin", f"must be {schema.PLUGIN}, not {plugin!r}")
    if "project_name" in pairs and not is_null(pairs["project_name"][1]):
        text = reader.text(pairs["project_name"][1], "project_name", "the name of the project")
        if text is not None and (len(text) > 64 or not text.isprintable()):
            reader.wrong(
                pairs["project_name"][1], "project_name", "must be printable and at most 64 characters long"
            )
        infra.project_name = text or ""
    if "global" in pairs:
        reader.globals(pairs["global"][1])
    if "domains" in pairs:
        reader.domains(reader.mapping(pairs["domains"][1], "domains", "a mapping of domains"), "domains")
    if "network_policies" in pairs:
        reader.policies(pairs["network_policies"][1], "network_policies")
    if "shared_volumes" in pairs:
        reader.shared_volumes(pairs["shared_volumes"][1], "shared_volumes")


def _is_list(pair: tuple[Node, Node] | None) -> bool:
    return pair is not None and pair[1].kind == "sequence"


def _members(infra: Infra, folder: str, read: Read) -> None:
    """domains/*.yml in the order of their names, then policies.yml."""
    reader = _Reader(infra)
    directory = os.path.join(folder, "domains")
    try:
        names = sorted(
            n for n in os.listdir(directory) if n.endswith((".yml", ".yaml")) and not n.startswith(".")
        )
    except OSError:
        names = []
    for name in names:
        path = os.path.join(directory, name)
        infra.files.append(path)
        short = _member(path, folder)
        before = len(infra.problems)
        root = _load_tree(path, short, read, infra.problems)
        if root is None or is_null(root):  # a file whose domain is commented out
            continue
        if len(infra.problems) != before:
            continue
        broken = _no_mapping(root, short)
        if broken:
            infra.problems.append(broken)
            continue
        reader.domains(entries(root, "domains", infra.problems), "domains")
    policies = _first(folder, "policies")
    if policies is None:
        return
    infra.files.append(policies)
    short = _member(policies, folder)
    root = _load_tree(policies, short, read, infra.problems)
    if root is None or is_null(root):
        return
    broken = _no_mapping(root, short)
    if broken:
        infra.problems.append(broken)
        return
    body, _places = reader.fields(root, "", schema.POLICIES_FILE_KEYS)
    if "network_policies" in body:
        if infra.policies:
            reader.wrong(
                body["network_policies"],
                "network_policies",
                f"is in {os.path.basename(infra.source)} as well; keep one",
            )
        else:
            reader.policies(body["network_policies"], "network_policies")
    if "shared_volumes" in body:
        reader.shared_volumes(body["shared_volumes"], "shared_volumes")


def _is_document_name(name: str) -> bool:
    return name in ("infra.yml", "infra.yaml") or name.endswith((".infra.yml", ".infra.yaml"))


_PLUGIN_KEY = re.compile(
    rb"^[\"']?plugin[\"']?[ \t]*:[ \t]*[\"']?"
    + re.escape(schema.PLUGIN.encode())
    + rb"[\"']?[ \t]*(#.*)?\r?$",
    re.M,
)


def _names_plugin(path: str) -> bool:
    if not path.endswith((".yml", ".yaml")):
        return False
    try:
        with open(path, "rb") as stream:
            return bool(_PLUGIN_KEY.search(stream.read(65536)))
    except OSError:
        return False


def _holds_document(folder: str) -> bool:
    try:
        names = os.listdir(folder)
    except OSError:
        return False
    return any(_is_document_name(n) or is_folder_form(os.path.join(folder, n)) for n in names)


def classify(path: str) -> str | None:
    """'document' for what this plugin loads, 'member' for what belongs to one, None for all else.

    Ansible walks a folder given with -i file by file. The members are what it meets on the way that
    is no inventory of its own: the other files of the folder form, and the roles beside infra.yml.
    """
    path = os.path.abspath(path)
    folder, name = os.path.split(path)
    above = folder
    while os.path.dirname(above) != above:
        parent, last = os.path.split(above)
        if last == "roles" and _holds_document(parent):
            return "member"
        above = parent
    if _is_document_name(name) or is_folder_form(path):
        return "document"
    if name.endswith((".yml", ".yaml")):
        parent, last = os.path.split(folder)
        if last == "domains" and _first(parent, "base"):
            return "member"
        if name in ("policies.yml", "policies.yaml") and _first(folder, "base"):
            return "member"
    return "document" if _names_plugin(path) else None


def main_of(path: str) -> str | None:
    """base.yml of the folder form that a member belongs to; None for a file of a role."""
    folder = os.path.dirname(os.path.abspath(path))
    if os.path.basename(folder) == "domains":
        folder = os.path.dirname(folder)
        return _first(folder, "base")
    return _first(folder, "base") if os.path.basename(path).startswith("policies.") else None
