# Copyright: (c) 2026, The sottovoce.stack contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What is on a server, read in a handful of requests whose number does not grow with the machines."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import socket
import struct
import subprocess
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, quote, unquote

from ansible_collections.sottovoce.stack.plugins.module_utils._incus_client import IncusNotFound
from ansible_collections.sottovoce.stack.plugins.module_utils._nvidia_driver import loaded_driver

if TYPE_CHECKING:
    from ansible_collections.sottovoce.stack.plugins.module_utils._incus_client import IncusClient

Obj = dict[str, Any]
# kind, project, name; a volume's name is pool/name, a project's project is empty
Key = tuple[str, str, str]

RUNNING, STOPPED, FROZEN = 103, 102, 110


@dataclasses.dataclass(frozen=True)
class Route:
    """An IPv4 route of the host; `direct` without a gateway, that is: the subnet of an interface."""

    interface: str
    subnet: str
    direct: bool = True


@dataclasses.dataclass
class Snapshot:
    server: Obj = dataclasses.field(default_factory=dict)
    projects: dict[str, Obj] = dataclasses.field(default_factory=dict)
    networks: dict[tuple[str, str], Obj] = dataclasses.field(default_factory=dict)
    profiles: dict[tuple[str, str], Obj] = dataclasses.field(default_factory=dict)
    instances: dict[tuple[str, str], Obj] = dataclasses.field(default_factory=dict)
    volumes: dict[tuple[str, str, str], Obj] = dataclasses.field(default_factory=dict)
    # Read only if a question needs them:
    pools: list[str] | None = None
    aliases: list[Obj] | None = None
    resources: Obj | None = None
    # Of each member of a cluster by its name; of a lone server under the empty name.
    member_resources: dict[str, Obj] = dataclasses.field(default_factory=dict)
    members: list[Obj] = dataclasses.field(default_factory=list)
    # The output of `nvidia-smi -L`, where it can be had, and whether LXC's hook for NVIDIA is there.
    slices: str | None = None
    nvidia_hook: bool = True
    routes: list[Route] = dataclasses.field(default_factory=list)

    def feature(self, project: str, feature: str, declared: Mapping[str, Obj] | None = None) -> str:
        """The project that holds `project`'s objects of a kind: itself, or the default one."""
        config = {
            **((self.projects.get(project) or {}).get("config") or {}),
            **(((declared or {}).get(project) or {}).get("config") or {}),
        }
        # A new project has networks of the default one, and everything else of its own.
        own = config.get(f"features.{feature}", "false" if feature == "networks" else "true")
        return project if own == "true" or project == "default" else "default"


def by_name(objects: Iterable[Obj]) -> dict[tuple[str, str], Obj]:
    return {(str(o.get("project") or "default"), str(o["name"])): o for o in objects}


def parse_url(url: str) -> Key | None:
    """What a `used_by` entry means; None for kinds that are not handled here."""
    path, _unused, query = url.partition("?")
    project = parse_qs(query).get("project", ["default"])[0]
    parts = [unquote(p) for p in path.strip("/").split("/")][1:]
    match parts:
        case ["instances" | "containers" | "virtual-machines", name]:
            return "instance", project, name
        case ["profiles", name]:
            return "profile", project, name
        case ["networks", name]:
            return "network", project, name
        case ["projects", name]:
            return "project", "", name
        case ["storage-pools", pool, "volumes", "custom", name]:
            return "volume", project, f"{pool}/{name}"
    return None


def read(client: IncusClient, *, recursion: int = 1) -> Snapshot:
    """The four lists that every run needs. recursion=2 adds the live state of instances, which is slow."""
    snapshot = Snapshot(server=client.server())

    def all_of(path: str, extension: str, **query: Any) -> list[Obj]:
        every = {"all-projects": "true"} if client.has(extension) else {"project": "default"}
        return list(client.get(path, query={"recursion": 1, **every, **query}).metadata or [])

    projects = client.get("/1.0/projects", query={"recursion": 1}).metadata or []
    snapshot.projects = {str(p["name"]): p for p in projects}
    snapshot.networks = by_name(all_of("/1.0/networks", "networks_all_projects"))
    snapshot.profiles = by_name(all_of("/1.0/profiles", "profiles_all_projects"))
    snapshot.instances = by_name(all_of("/1.0/instances", "instance_all_projects", recursion=recursion))
    return snapshot


def read_volumes(client: IncusClient, snapshot: Snapshot, pools: Iterable[str]) -> None:
    every = {"all-projects": "true"} if client.has("storage_volumes_all_projects") else {}
    for pool in sorted(set(pools)):
        path = f"/1.0/storage-pools/{quote(pool, safe='')}/volumes/custom"
        try:
            volumes = client.get(path, query={"recursion": 1, **every}).metadata or []
        except IncusNotFound:
            continue  # the plan names the pool that is missing
        for volume in volumes:
            if volume.get("type", "custom") == "custom":
                key = (str(volume.get("project") or "default"), pool, str(volume["name"]))
                snapshot.volumes[key] = volume


def pools_in_use(snapshot: Snapshot) -> set[str]:
    """The pools that hold volumes of any project, as the projects themselves tell."""
    keys = (parse_url(url) for p in snapshot.projects.values() for url in p.get("used_by") or [])
    return {key[2].partition("/")[0] for key in keys if key and key[0] == "volume"}


def read_pools(client: IncusClient, snapshot: Snapshot) -> None:
    urls = client.get("/1.0/storage-pools").metadata or []
    snapshot.pools = sorted(unquote(str(url).rsplit("/", 1)[-1]) for url in urls)


def read_aliases(client: IncusClient, snapshot: Snapshot) -> None:
    snapshot.aliases = list(client.get("/1.0/images/aliases", query={"recursion": 1}).metadata or [])


def clustered(snapshot: Snapshot) -> bool:
    return bool((snapshot.server.get("environment") or {}).get("server_clustered"))


def pending(network: Mapping[str, Any]) -> bool:
    """Whether it was announced to members of a cluster and then never made."""
    return network.get("status") == "Pending"


def read_members(client: IncusClient, snapshot: Snapshot) -> None:
    """The members of a cluster; none of a lone server."""
    if clustered(snapshot) and not snapshot.members:
        snapshot.members = client.get("/1.0/cluster/members", query={"recursion": 1}).metadata or []


def read_resources(client: IncusClient, snapshot: Snapshot, parallel: int = 8) -> None:
    """The hardware: of a lone server, or of each member of a cluster that is online, side by side."""
    if not clustered(snapshot):
        snapshot.resources = client.get("/1.0/resources").metadata or {}
        snapshot.member_resources = {"": snapshot.resources or {}}
        return
    read_members(client, snapshot)
    online = [str(m["server_name"]) for m in snapshot.members if m.get("status") == "Online"]

    def ask(member: str) -> Obj:
        with contextlib.closing(client.clone()) as twin:
            found: Obj = twin.get("/1.0/resources", query={"target": member}).metadata or {}
            return found

    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(parallel) as pool:
        snapshot.member_resources = dict(zip(online, pool.map(ask, online), strict=True))
    client.requests += len(online)
    cards = [c for r in snapshot.member_resources.values() for c in (r.get("gpu") or {}).get("cards") or []]
    snapshot.resources = {"gpu": {"cards": cards}}


def refresh_driver(snapshot: Snapshot, root: str) -> None:
    """
    Put the NVIDIA driver that this host's kernel has loaded into the resources of its Incus, which, before
    6.0.6 and 7.3, go on telling what was so when it was first asked.
    """
    version = loaded_driver(root)[0]
    for card in (snapshot.member_resources.get("", {}).get("gpu") or {}).get("cards") or []:
        if version and card.get("nvidia"):
            card["nvidia"]["nvrm_version"] = version


def lists_stale_cards(server: Mapping[str, Any]) -> bool:
    """Whether this Incus keeps its list of cards from when it was first asked until it is restarted."""
    text = str((server.get("environment") or {}).get("server_version") or "")
    numbers = tuple(int(n) for n in text.split(".") if n.isdigit())
    return bool(numbers) and (numbers < (6, 0, 6) or (6, 1) <= numbers[:2] < (7, 3))


def nvidia_hook() -> bool:
    """Whether LXC's hook that nvidia.runtime needs is on this host, where Incus looks for it."""
    return os.path.exists(os.path.join(os.environ.get("INCUS_LXC_HOOK") or "/usr/share/lxc/hooks", "nvidia"))


def nvidia_slices(timeout: float = 15.0) -> str | None:
    """What `nvidia-smi -L` of this host prints; None if it cannot be had."""
    try:
        done = subprocess.run(
            ["nvidia-smi", "-L"], capture_output=True, text=True, timeout=timeout, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


def nvidia_tools_say(timeout: float = 15.0) -> str:
    """What this host's nvidia-container-cli complains of; empty if of nothing, or if it cannot be asked."""
    try:
        done = subprocess.run(
            ["nvidia-container-cli", "info"], capture_output=True, text=True, timeout=timeout, check=False
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stderr.strip() if done.returncode else ""


def location_of(instance: Mapping[str, Any]) -> str:
    """The member an instance is on; empty on a lone server."""
    location = str(instance.get("location") or "")
    return "" if location == "none" else location


def read_routes(client: IncusClient, snapshot: Snapshot, limit: int = 32) -> None:
    """The subnets that the host uses. A remote host is asked through its interfaces, 32 at most."""
    if client.endpoint.url is None:
        try:
            with open("/proc/net/route", encoding="ascii") as table:
                snapshot.routes = parse_routes(table.read())
            return
        except OSError:
            pass
    unmanaged = [o for o in snapshot.networks.values() if not o.get("managed")]
    for network in unmanaged[:limit]:
        name = str(network["name"])
        state = client.get(f"/1.0/networks/{quote(name, safe='')}/state").metadata or {}
        for address in state.get("addresses") or []:
            if address.get("family") == "inet" and not str(address["address"]).startswith("127."):
                snapshot.routes.append(Route(name, f"{address['address']}/{address['netmask']}"))


def parse_routes(table: str) -> list[Route]:
    """/proc/net/route; the default route and loopback say nothing about subnets in use."""
    routes: list[Route] = []
    for line in table.splitlines()[1:]:
        fields = line.split()
        if len(fields) < 8:
            continue
        interface, destination, gateway, mask = fields[0], fields[1], fields[2], int(fields[7], 16)
        prefix = bin(mask).count("1")
        if prefix == 0 or interface in ("lo", "*"):
            continue
        address = socket.inet_ntoa(struct.pack("<L", int(destination, 16)))
        routes.append(Route(interface, f"{address}/{prefix}", int(gateway, 16) == 0))
    return routes
