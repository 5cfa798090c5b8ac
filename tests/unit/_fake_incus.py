# Copyright: (c) 2026, The sottovoce.stack contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A server in memory that behaves like Incus where the reconciler could notice the difference."""

from __future__ import annotations

import copy
import hashlib
import json
import threading
from collections.abc import Callable
from typing import Any, BinaryIO
from urllib.parse import parse_qsl, unquote

from ansible_collections.sottovoce.stack.plugins.module_utils._incus_client import (
    Endpoint,
    IncusConflict,
    IncusError,
    IncusForbidden,
    IncusNotFound,
    IncusOperationFailed,
    IncusPreconditionFailed,
    Response,
)

EXTENSIONS = [
    "projects",
    "instance_all_projects",
    "networks_all_projects",
    "profiles_all_projects",
    "storage_volumes_all_projects",
    "instance_create_start",
]
Obj = dict[str, Any]


class FakeServer:
    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.objects: dict[str, dict[tuple[str, ...], Obj]] = {
            "projects": {},
            "networks": {},
            "profiles": {},
            "instances": {},
            "volumes": {},
        }
        self.pools = ["default"]
        self.aliases: list[Obj] = [{"name": "lab", "target": "f" * 64, "type": "container"}]
        self.cards: list[Obj] = []
        # Of a cluster: the cards of each member, and what /1.0/cluster/members says.
        self.member_cards: dict[str, list[Obj]] = {}
        self.members: list[Obj] = []
        self.config: Obj | None = {}
        self.log: list[tuple[str, str]] = []
        self.extensions = list(EXTENSIONS)
        # Called before a request is carried out; raises to make it fail.
        self.hook: Callable[[str, str, Any], None] = lambda method, path, body: None
        self.start_fails: set[str] = set()
        self.lxc_log = b""
        self.running_creates = 0
        self.most_creates = 0
        self.add("projects", ("default",), {"name": "default", "config": {"features.networks": "true"}})
        self.add("profiles", ("default", "default"), {"name": "default", "devices": {}})

    def add(self, kind: str, key: tuple[str, ...], obj: Obj) -> Obj:
        full: Obj = {"description": "", "config": {}, **copy.deepcopy(obj)}
        if kind != "projects":
            full["project"] = key[0]
        if kind == "networks":
            full.setdefault("managed", True)
            full.setdefault("type", "bridge")
        if kind in ("profiles", "instances"):
            full.setdefault("devices", {})
        if kind == "instances":
            for name, value in (
                ("profiles", ["default"]),
                ("status", "Stopped"),
                ("status_code", 102),
                ("type", "container"),
                ("architecture", "x86_64"),
                ("ephemeral", False),
                ("stateful", False),
                ("location", "none"),
            ):
                full.setdefault(name, value)
        self.objects[kind][key] = full
        return full

    # what the lists show

    def used_by(self, kind: str, key: tuple[str, ...]) -> list[str]:
        found = []
        name = key[-1]
        for ikey, i in self.objects["instances"].items():
            devices = self.expanded(i)[1].values()
            if (
                (kind == "projects" and ikey[0] == name)
                or (kind == "profiles" and ikey[0] == key[0] and name in i["profiles"])
                or (kind == "networks" and any(d.get("network") == name for d in devices))
                or (kind == "volumes" and ikey[0] == key[0] and any(d.get("source") == name for d in devices))
            ):
                found.append(f"/1.0/instances/{ikey[1]}?project={ikey[0]}")
        for pkey, p in self.objects["profiles"].items():
            if (kind == "projects" and pkey[0] == name) or (
                kind == "networks" and any(d.get("network") == name for d in p["devices"].values())
            ):
                found.append(f"/1.0/profiles/{pkey[1]}?project={pkey[0]}")
        if kind == "projects":
            for other, path in (("networks", "networks"), ("volumes", "storage-pools/{}/volumes/custom")):
                for okey in self.objects[other]:
                    if okey[0] == name:
                        found.append(f"/1.0/{path.format(okey[1])}/{okey[-1]}?project={name}")
        return found

    def expanded(self, instance: Obj) -> tuple[Obj, Obj]:
        config: Obj = {}
        devices: Obj = {}
        for name in instance["profiles"]:
            profile = self.objects["profiles"].get((instance["project"], name), {})
            config.update(profile.get("config", {}))
            devices.update(profile.get("devices", {}))
        return {**config, **instance["config"]}, {**devices, **instance["devices"]}

    def show(self, kind: str, key: tuple[str, ...]) -> Obj:
        obj = copy.deepcopy(self.objects[kind][key])
        obj["used_by"] = self.used_by(kind, key)
        if kind == "instances":
            obj["expanded_config"], obj["expanded_devices"] = copy.deepcopy(self.expanded(obj))
            del obj["used_by"]
        return obj

    def etag(self, kind: str, key: tuple[str, ...]) -> str:
        obj = self.objects[kind][key]
        fields = {k: obj.get(k) for k in ("config", "description", "devices", "profiles")}
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()

    # requests

    def handle(
        self, method: str, target: str, query: dict[str, str], body: Any, etag: str | None
    ) -> Response:
        with self.lock:
            self.log.append((method, target))
        self.hook(method, target, body)
        with self.lock:
            return self._handle(method, target, query, copy.deepcopy(body), etag)

    def _handle(
        self, method: str, target: str, query: dict[str, str], body: Any, etag: str | None
    ) -> Response:
        parts = [unquote(p) for p in target.strip("/").split("/")][1:]
        project = query.get("project", "default")
        if not parts:
            return self._server(method, body, etag)
        if parts == ["cluster", "members"]:
            return Response(200, copy.deepcopy(self.members))
        if parts == ["resources"] and query.get("target"):
            return Response(200, {"gpu": {"cards": self.member_cards[query["target"]]}})
        if parts == ["resources"]:
            return Response(200, {"gpu": {"cards": self.cards}})
        if parts == ["storage-pools"]:
            return Response(200, [f"/1.0/storage-pools/{p}" for p in self.pools])
        if parts == ["images", "aliases"]:
            return Response(200, copy.deepcopy(self.aliases))
        if parts == ["images"]:
            self.aliases.append({"name": body["aliases"][0]["name"], "type": body["source"]["image_type"]})
            return Response(200, {"fingerprint": "a" * 64})
        kind, key = parts[0], (project, *parts[1:])
        if kind == "storage-pools":
            if parts[1] not in self.pools:
                raise IncusNotFound("Storage pool not found", code=404)
            kind, key = "volumes", (project, parts[1], *parts[4:])
        elif kind == "projects":
            key = tuple(parts[1:])
        if kind == "instances" and parts[2:] == ["state"]:
            return self._state(key[:2], body)
        objects = self.objects[kind]
        whole = len(key) == {"projects": 0, "volumes": 2}.get(kind, 1)
        if whole and method == "GET":
            keys = [k for k in objects if kind == "projects" or query.get("all-projects") or k[0] == project]
            if kind == "volumes":
                keys = [k for k in keys if k[1] == key[1]]
            return Response(200, [self.show(kind, k) for k in keys])
        if whole and method == "POST" and kind == "networks" and self.members:
            return self._create_on_members(key[0], body, query.get("target"))
        if whole and method == "POST":
            return self._create(kind, (*key, body["name"]), {**body, **self._location(kind, query)})
        if key not in objects:
            raise IncusNotFound(f"{kind} {key} not found", code=404)
        if method == "GET":
            return Response(200, self.show(kind, key), self.etag(kind, key))
        if method == "DELETE":
            if kind == "instances" and objects[key]["status_code"] != 102:
                raise IncusError("Instance is running", code=400)
            if (
                kind == "instances"
                and self.show(kind, key)["expanded_config"].get("security.protection.delete") == "true"
            ):
                raise IncusError("Instance is protected", code=400)
            left = [u for u in self.used_by(kind, key) if "/profiles/default" not in u]
            if kind != "instances" and left:
                raise IncusError(f"It is in use by {left}", code=400)
            del objects[key]
            if kind == "projects":
                self.objects["profiles"].pop((key[0], "default"), None)
            return Response(200, {})
        assert method == "PUT"
        if etag is not None and etag != self.etag(kind, key):
            raise IncusPreconditionFailed("ETag doesn't match", code=412)
        for field in ("config", "description", "devices", "profiles"):
            if field in body:
                objects[key][field] = body[field]
        self._addresses()
        return Response(200, {})

    def _server(self, method: str, body: Any, etag: str | None) -> Response:
        now = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode()).hexdigest()
        if method == "PATCH":
            if self.config is None:
                raise IncusForbidden("not authorized", code=403)
            if etag is not None and etag != now:
                raise IncusPreconditionFailed("ETag doesn't match", code=412)
            self.config = {k: v for k, v in {**self.config, **body["config"]}.items() if v}
            return Response(200, {})
        found: Obj = {
            "api_extensions": self.extensions,
            "environment": {"server_clustered": bool(self.members)},
        }
        if self.config is not None:
            found["config"] = dict(self.config)
        return Response(200, found, now)

    def _location(self, kind: str, query: dict[str, str]) -> Obj:
        return {"location": query["target"]} if query.get("target") else {}

    def _addresses(self) -> None:
        seen: dict[tuple[str, str], Any] = {}
        for key, i in self.objects["instances"].items():
            for d in i["devices"].values():
                if d.get("ipv4.address"):
                    other = seen.setdefault((d.get("network", ""), d["ipv4.address"]), key)
                    if other != key:
                        raise IncusOperationFailed(
                            f"IP address {d['ipv4.address']} already defined on another NIC"
                        )

    def _create(self, kind: str, key: tuple[str, ...], body: Obj) -> Response:
        objects = self.objects[kind]
        if key in objects:
            raise IncusConflict("It already exists", code=409)
        if kind != "projects" and (key[0],) not in self.objects["projects"]:
            raise IncusNotFound("Project not found", code=404)
        started = body.pop("start", False)
        body.pop("source", None)
        self.add(kind, key, body)
        if kind == "projects":
            self.add("profiles", (key[0], "default"), {"name": "default"})
        if kind == "instances":
            try:
                self._addresses()
            except IncusError:
                del objects[key]
                raise
            if started:
                self._state(key, {"action": "start"})
        return Response(200, {})

    def _create_on_members(self, project: str, body: Obj, member: str | None) -> Response:
        """Every member has to be told of a network, without its configuration, before it can be made."""
        key = (project, body["name"])
        found = self.objects["networks"].get(key)
        if member:
            assert body.keys() == {"name", "type"}
            if found is None:
                self.add("networks", key, {**body, "status": "Pending", "locations": []})
                found = self.objects["networks"][key]
            if member in found["locations"]:
                raise IncusConflict("Network is already defined on member", code=409)
            found["locations"].append(member)
            return Response(200, {})
        if found is None or set(found["locations"]) != {m["server_name"] for m in self.members}:
            raise IncusError("Network not defined on every member", code=400)
        if found["status"] != "Pending":
            raise IncusConflict("It already exists", code=409)
        found.update({**body, "description": found["description"]}, status="Created")
        return Response(200, {})

    def _state(self, key: tuple[str, ...], body: Obj) -> Response:
        instance = self.objects["instances"].get(key)
        if instance is None:
            raise IncusNotFound("Instance not found", code=404)
        if body["action"] in ("start", "unfreeze"):
            if key[1] in self.start_fails:
                raise IncusOperationFailed("Failed to run: lxc-start", code=400)
            instance.update(status="Running", status_code=103)
        else:
            instance.update(status="Stopped", status_code=102)
        return Response(200, {})


class FakeClient:
    """The interface of IncusClient over a FakeServer."""

    def __init__(self, server: FakeServer, url: str | None = None) -> None:
        self.fake = server
        self.requests = 0
        self.endpoint = Endpoint(url=url)
        self._in_use = threading.Lock()

    def clone(self) -> FakeClient:
        return FakeClient(self.fake, self.endpoint.url)

    def close(self) -> None:
        pass

    def server(self) -> Obj:
        metadata: Obj = self.get("/1.0").metadata
        return metadata

    def has(self, extension: str) -> bool:
        return extension in self.fake.extensions

    def get(self, path: str, *, project: str | None = None, query: Any = None) -> Response:
        return self.request("GET", path, project=project, query=query)

    def request(
        self,
        method: str,
        path: str,
        *,
        project: str | None = None,
        query: Any = None,
        body: Any = None,
        etag: str | None = None,
    ) -> Response:
        assert self._in_use.acquire(blocking=False), "one client used by two threads"
        try:
            return self._request(method, path, project, query, body, etag)
        finally:
            self._in_use.release()

    def _request(
        self, method: str, path: str, project: str | None, query: Any, body: Any, etag: str | None
    ) -> Response:
        self.requests += 1
        bare, _unused, tail = path.partition("?")
        merged = {**dict(parse_qsl(tail)), **{k: str(v) for k, v in (query or {}).items()}}
        if project:
            merged["project"] = project
        return self.fake.handle(method, bare, merged, body, etag)

    def run(self, method: str, path: str, *, wait_timeout: float = 300.0, **more: Any) -> Any:
        return self.request(method, path, **more).metadata

    def download(self, path: str, sink: BinaryIO, *, project: str | None = None) -> dict[str, str]:
        self.requests += 1
        sink.write(self.fake.lxc_log)
        return {}


# Declared states


def machine(name: str, host: int = 1, **more: Any) -> Obj:
    nic = {"type": "nic", "name": "eth0", "network": "net-a", "ipv4.address": f"10.120.0.{host}"}
    return {
        "project": "a",
        "name": name,
        "type": "container",
        "description": "",
        "image": "lab",
        "ephemeral": True,
        "profiles": ["default"],
        "target": None,
        "started": True,
        "config": {},
        "devices": {"eth0": nic},
        "gpu": None,
        **more,
    }


def desired(*instances: Obj, **more: Any) -> Obj:
    return {
        "project_name": "home",
        "source": "/somewhere/infra.yml",
        "gpu_policy": "exclusive",
        "projects": [
            {
                "name": "a",
                "description": "A",
                "config": {"features.images": "false", "features.networks": "false"},
            }
        ],
        "networks": [
            {
                "project": "default",
                "name": "net-a",
                "type": "bridge",
                "description": "",
                "config": {"ipv4.address": "10.120.0.254/24", "ipv4.nat": "true", "ipv6.address": "none"},
            }
        ],
        "profiles": [],
        "volumes": [],
        "instances": list(instances),
        **more,
    }
