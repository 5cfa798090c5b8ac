# Copyright: (c) 2026, The sottovoce.stack contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What infra.yml may hold: its keys, its limits, and the typed document the parser makes of it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

PLUGIN = "sottovoce.stack.infra"
COLLECTION = "sottovoce.stack."

NAME = re.compile(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?")
NAME_RULE = "lower-case letters, digits and '-', beginning and ending with a letter or digit"
NAME_LIMIT = 63
BRIDGE_PREFIX = "net-"
BRIDGE_LIMIT = 15  # IFNAMSIZ of Linux, less its closing NUL
BRIDGE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]+")
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")

ZONES = {"admin": 0, "trusted": 1, "semi-trusted": 2, "untrusted": 4, "disposable": 5}
DEFAULT_TRUST = "semi-trusted"
DEFAULT_IMAGE = "images:debian/13"

# Roles of this collection that a machine may have, then those AnKLuMe has and this collection has not.
OWN_ROLES = ("base_system", "ollama_server", "stt_server", "voice_gateway", "open_webui", "vram_exporter")
FOREIGN_ROLES = frozenset({
    "admin_bootstrap", "code_sandbox", "dev_agent_runner", "dev_test_runner", "firewall_router",
    "incus_firewall_vm", "incus_images", "incus_instances", "incus_networks", "incus_nftables",
    "incus_profiles", "incus_projects", "incus_snapshots", "llm_sanitizer", "lobechat",
    "openclaw_server", "opencode_server",
})  # fmt: skip

# Keys per level. "ignored" ones mean something to AnKLuMe and nothing here: they are named in a note.
TOP_KEYS = ("project_name", "global", "domains", "network_policies", "shared_volumes", "plugin")
GLOBAL_KEYS = (
    "addressing", "base_subnet", "default_os_image", "gpu_policy", "default_user", "wiring",
    "shared_volumes_base", "persistent_data_base",
)  # fmt: skip
GLOBAL_IGNORED = (
    "default_connection", "resource_policy", "nesting_prefix", "firewall_mode", "ai_access_policy",
    "ai_access_default", "ai_vram_flush", "desktop",
)  # fmt: skip
ADDRESSING_KEYS = ("base_octet", "zone_base", "zone_step")
DOMAIN_KEYS = (
    "description", "enabled", "trust_level", "subnet_id", "ephemeral", "profiles", "machines", "bridge",
    "wiring",
)  # fmt: skip
DOMAIN_IGNORED = ("ai_provider", "ai_sanitize", "file_portal", "desktop", "openclaw")
MACHINE_KEYS = (
    "description", "type", "ip", "gpu", "profiles", "config", "devices", "storage_volumes",
    "persistent_data", "ephemeral", "boot_autostart", "boot_priority", "snapshots_schedule",
    "snapshots_expiry", "os_image", "roles", "target", "vars", "wiring",
)  # fmt: skip
MACHINE_IGNORED = ("weight", "export_apps", "services")
PROFILE_KEYS = ("description", "config", "devices")
GPU_KEYS = ("pci", "uuid", "count", "all", "mig", "optional")
VOLUME_KEYS = ("path", "size", "pool", "readonly")
PERSISTENT_KEYS = ("path", "size", "pool", "readonly")
SHARED_KEYS = ("source", "path", "shift", "propagate", "consumers", "size", "pool")
POLICY_KEYS = ("description", "from", "to", "ports", "protocol", "bidirectional")
POLICIES_FILE_KEYS = ("network_policies", "shared_volumes")
DEVICE_TYPES = (
    "none", "nic", "disk", "gpu", "usb", "unix-char", "unix-block", "unix-hotplug", "infiniband", "proxy",
    "tpm", "pci",
)  # fmt: skip

# Ansible gives these group names a meaning of their own, or this plugin does.
RESERVED_GROUPS = frozenset({"all", "ungrouped", "instances"})
RESERVED_HOSTS = frozenset({"localhost"})
# `host` stands for the Incus host in network_policies; `default` is the project Incus keeps for itself.
POLICY_HOST = "host"


@dataclass(frozen=True, slots=True, order=True)
class Problem:
    """One thing that is wrong, and where."""

    file: str
    line: int
    path: str
    message: str

    def __str__(self) -> str:
        where = f"{self.file}:{self.line}" if self.line else self.file
        return f"{where}: {self.path}: {self.message}" if self.path else f"{where}: {self.message}"


class InfraError(Exception):
    """Everything that is wrong with a document, in the order of its lines."""

    def __init__(self, source: str, problems: Iterable[Problem]) -> None:
        self.source = source
        self.problems = sorted(set(problems), key=lambda p: (p.file, p.line, p.path, p.message))
        super().__init__(source, self.problems)

    def __str__(self) -> str:
        count = len(self.problems)
        head = f"{self.source}: {count} error{'s' if count != 1 else ''}, nothing was loaded"
        width = len(str(count))
        return "\n".join([head, *(f"  {n:>{width}}. {p}" for n, p in enumerate(self.problems, 1))])


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A suggestion to end a message with, or nothing."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


@dataclass(frozen=True, slots=True)
class Place:
    """Where something was written."""

    file: str = ""
    line: int = 0
    path: str = ""


@dataclass(frozen=True, slots=True)
class Gpu:
    pci: str | None = None
    uuid: str | None = None
    count: int | None = None
    optional: bool = False
    all: bool = False
    mig: str | None = None

    @property
    def selects(self) -> bool:
        return self.all or any(x is not None for x in (self.pci, self.uuid, self.count, self.mig))

    @property
    def named(self) -> str:
        """The one thing that can be given to one machine only; empty where any card will do."""
        if self.mig is not None:
            return self.mig.lower() if self.mig.startswith("MIG-") else ""
        return (self.pci or self.uuid or "").lower() or ("all" if self.all else "")

    def request(self) -> dict[str, Any]:
        """What the reconciler resolves against the cards it finds."""
        wanted: dict[str, Any] = {"optional": self.optional}
        if self.pci is not None:
            wanted["pci"] = self.pci
        if self.uuid is not None:
            wanted["uuid"] = self.uuid
        if self.count is not None:
            wanted["count"] = self.count
        if self.all:
            wanted["all"] = True
        if self.mig is not None:
            wanted["mig"] = self.mig
        return wanted


Devices = dict[str, dict[str, str]]


@dataclass(slots=True)
class Profile:
    description: str = ""
    config: dict[str, str] = field(default_factory=dict)
    devices: Devices = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Volume:
    path: str | None
    size: str | None = None
    pool: str | None = None
    readonly: bool = False


@dataclass(slots=True)
class Machine:
    name: str
    place: Place
    places: dict[str, Place]
    description: str = ""
    type: str = "lxc"
    ip: str | None = None
    gpu: Gpu | None = None
    profiles: list[str] = field(default_factory=lambda: ["default"])
    config: dict[str, str] = field(default_factory=dict)
    devices: Devices = field(default_factory=dict)
    storage_volumes: dict[str, Volume] = field(default_factory=dict)
    persistent_data: dict[str, Volume] = field(default_factory=dict)
    ephemeral: bool | None = None
    boot_autostart: bool | None = None
    boot_priority: int | None = None
    snapshots_schedule: str | None = None
    snapshots_expiry: str | None = None
    os_image: str | None = None
    roles: list[str] = field(default_factory=list)
    target: str | None = None
    vars: dict[str, Any] = field(default_factory=dict)
    wiring: bool | None = None

    def at(self, key: str) -> Place:
        return self.places.get(key, self.place)


@dataclass(slots=True)
class Domain:
    name: str
    place: Place
    places: dict[str, Place]
    description: str = ""
    enabled: bool = True
    trust_level: str = DEFAULT_TRUST
    subnet_id: int | None = None
    ephemeral: bool = False
    bridge: str | None = None
    wiring: bool | None = None
    profiles: dict[str, Profile] = field(default_factory=dict)
    machines: dict[str, Machine] = field(default_factory=dict)

    def at(self, key: str) -> Place:
        return self.places.get(key, self.place)

    @property
    def network(self) -> str:
        return self.bridge or BRIDGE_PREFIX + self.name


@dataclass(frozen=True, slots=True)
class Policy:
    place: Place
    source: str
    to: str
    description: str = ""
    ports: tuple[int, ...] | str = "all"
    protocol: str | None = None
    bidirectional: bool = False

    def as_dict(self) -> dict[str, Any]:
        told: dict[str, Any] = {"description": self.description, "from": self.source, "to": self.to}
        told["ports"] = self.ports if isinstance(self.ports, str) else list(self.ports)
        if self.protocol:
            told["protocol"] = self.protocol
        told["bidirectional"] = self.bidirectional
        return told


@dataclass(frozen=True, slots=True)
class SharedVolume:
    name: str
    place: Place
    source: str | None
    path: str
    shift: bool
    consumers: Mapping[str, tuple[str, Place]]
    size: str | None = None
    pool: str | None = None


@dataclass(slots=True)
class Infra:
    """A whole document. What could not be read is left out; `problems` says what."""

    source: str
    files: list[str]
    place: Place
    project_name: str = ""
    base_octet: int = 10
    zone_base: int = 100
    zone_step: int = 10
    base_subnet: str | None = None
    default_os_image: str = DEFAULT_IMAGE
    gpu_policy: str = "exclusive"
    default_user: str = "root"
    wiring: bool = True
    shared_volumes_base: str | None = None
    persistent_data_base: str | None = None
    domains: dict[str, Domain] = field(default_factory=dict)
    policies: list[Policy] = field(default_factory=list)
    shared_volumes: dict[str, SharedVolume] = field(default_factory=dict)
    local_roles: frozenset[str] = frozenset()
    # "level key" -> names of the places where an ignored key was found
    ignored: dict[str, list[str]] = field(default_factory=dict)
    # names that were written, though their bodies may not be readable: a broken domain must not make
    # everything that refers to it wrong as well
    domain_names: set[str] = field(default_factory=set)
    machine_names: set[str] = field(default_factory=set)
    problems: list[Problem] = field(default_factory=list)
